"""A torch.compile backend that runs a whole graph on OpenVINO or raises and says why not."""

from openvino_backend.backend import (
    GraphReport,
    ModelReport,
    OpenVINOBackend,
    OpenVINOBackendError,
    UnsupportedOperatorsError,
    compile_graph,
)
from openvino_backend.options import Options, OptionsError, split_device

__all__ = [
    "GraphReport",
    "ModelReport",
    "OpenVINOBackend",
    "OpenVINOBackendError",
    "Options",
    "OptionsError",
    "UnsupportedOperatorsError",
    "compile_graph",
    "split_device",
]
