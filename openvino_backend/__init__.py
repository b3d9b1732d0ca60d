"""A torch.compile backend. It runs a whole graph on OpenVINO, or raises an error that says why not."""

from openvino_backend.backend import GraphReport, OpenVINOBackend, compile_graph
from openvino_backend.cache import keep_value, name_entry
from openvino_backend.deferred import compile_ahead
from openvino_backend.errors import GraphLimitError, OpenVINOBackendError, UnsupportedOperatorsError
from openvino_backend.function import CompiledFunction
from openvino_backend.models import ModelReport
from openvino_backend.options import Options, OptionsError, split_device
from openvino_backend.processors import find_processors, limit_torch
from openvino_backend.weights import digest_weights

__version__ = "0.3.0"

__all__ = [
    "CompiledFunction",
    "GraphLimitError",
    "GraphReport",
    "ModelReport",
    "OpenVINOBackend",
    "OpenVINOBackendError",
    "Options",
    "OptionsError",
    "UnsupportedOperatorsError",
    "compile_ahead",
    "compile_graph",
    "digest_weights",
    "find_processors",
    "keep_value",
    "limit_torch",
    "name_entry",
    "split_device",
]
