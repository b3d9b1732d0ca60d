"""The guide's name for the model's side, which is the installed package sdxl_server; this file holds no logic."""

from sdxl_server.errors import ConfigError, RequestError, VersionError
from sdxl_server.pipeline import LoadedPipeline, load_pipeline
from sdxl_server.service import Answer, Call, Service, State, Ticket, explain, load_service
from sdxl_server.settings import CompileConfig, HandlerConfig

__all__ = [
    "Answer",
    "Call",
    "CompileConfig",
    "ConfigError",
    "HandlerConfig",
    "LoadedPipeline",
    "RequestError",
    "Service",
    "State",
    "Ticket",
    "VersionError",
    "explain",
    "load_pipeline",
    "load_service",
]
