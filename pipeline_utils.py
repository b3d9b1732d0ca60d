"""Export what the handler uses of the installed package sdxl_server. The guide gives this file its name."""

from sdxl_server.api.http import HttpRequest, ReplyState, Response, find_header, read_id
from sdxl_server.config.compile_settings import CompileConfig
from sdxl_server.config.settings import HandlerConfig, check_is_text
from sdxl_server.errors import ConfigError, RequestError, VersionError
from sdxl_server.loading import load_pipeline
from sdxl_server.model.describe import measure_components
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.service import Service, describe_error, load_service
from sdxl_server.serving.queue import Action, Queue, QueuedRequest

__all__ = [
    "Response",
    "HttpRequest",
    "CompileConfig",
    "ConfigError",
    "HandlerConfig",
    "LoadedPipeline",
    "Queue",
    "RequestError",
    "Service",
    "ReplyState",
    "QueuedRequest",
    "Action",
    "VersionError",
    "check_is_text",
    "describe_error",
    "find_header",
    "load_pipeline",
    "load_service",
    "measure_components",
    "read_id",
]
