"""A torch.compile backend that runs a whole graph on OpenVINO or raises and says why not."""

from openvino_backend.backend import GraphReport, OpenVINOBackend, OpenVINOBackendError, compile_graph
from openvino_backend.options import Options, OptionsError

__all__ = ["GraphReport", "OpenVINOBackend", "OpenVINOBackendError", "Options", "OptionsError", "compile_graph"]
