"""The guide's name for the model's side, which is the installed package sdxl_server; this file holds no logic."""

from sdxl_server.api.http import Answer, Call, State, read_id
from sdxl_server.config.sections import check_is_text
from sdxl_server.config.settings import CompileConfig, HandlerConfig
from sdxl_server.errors import ConfigError, RequestError, VersionError
from sdxl_server.loading import load_pipeline
from sdxl_server.model.describe import measure_parts
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.service import Service, explain, load_service
from sdxl_server.serving.queue import Pace, Queue, Ticket, Turn

__all__ = [
    "Answer",
    "Call",
    "CompileConfig",
    "ConfigError",
    "HandlerConfig",
    "LoadedPipeline",
    "Pace",
    "Queue",
    "RequestError",
    "Service",
    "State",
    "Ticket",
    "Turn",
    "VersionError",
    "check_is_text",
    "explain",
    "load_pipeline",
    "load_service",
    "measure_parts",
    "read_id",
]
