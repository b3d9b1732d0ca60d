"""Report a loaded pipeline: `describe`, the applied adapters, and the figures for metrics."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from sdxl_server import __version__
from sdxl_server.model.compiling import VAE_ENCODER
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.model.upscaler import UPSCALER
from sdxl_server.model.vaes import is_tiny_vae
from sdxl_server.request.fields import GenerationRequest


def describe_pipeline(loaded: LoadedPipeline) -> dict[str, Any]:
    """Return what runs, read from the graphs compiled so far. Without a warm-up there is none before a request."""
    import torch

    import openvino_backend

    config, counters = loaded.config, torch._dynamo.utils.counters
    report: dict[str, Any] = {
        "model_path": config.model_path,
        **loaded.original,
        "dtype": loaded.dtype,
        "scheduler": loaded.contract.properties["scheduler"]["default"],
        "backend": loaded.compilation.backend or "eager",
        "graphs_for": loaded.graphs,
        "compiled_parts": list(loaded.parts),
        "weights_sha256": loaded.weights_sha256,
        "vae": describe_vae(loaded),
        "safety_checker": config.safety_checker,
        "filter": config.filter,
        "marking": config.marking,
        "preview": {"kind": config.preview, "lossy": config.preview != "exact"},
        "adapters": [each.describe() for each in loaded.adapters],
        "embeddings": [each.describe() for each in loaded.embeddings],
        "controls": [each.describe() for each in loaded.controls],
        "upscaler": None if loaded.upscaler is None else loaded.upscaler.describe(),
        "weighted_prompts": config.weighted_prompts,
        "graphs": sum(count_component_graphs(loaded, name) for name in loaded.parts),
        "versions": {"sdxl_server": __version__, "openvino_backend": openvino_backend.__version__},
        "shortcuts": {
            "unet_calls": config.unet_calls,
            "guidance_interval": config.guidance_interval,
            "lossy": config.unet_calls is not None or config.guidance_interval is not None,
        },
        "graph_breaks": sum(counters["graph_break"].values()),
    }
    if loaded.compilation.backend == "openvino":
        report["arithmetic"] = describe_arithmetic(loaded)
        report["openvino"] = {
            name: [dataclasses.asdict(graph) for graph in backend.reports] for name, backend in loaded.parts.items()
        }
    return report


def describe_vae(loaded: LoadedPipeline) -> dict[str, Any]:
    """Return the VAE's class and folder, and whether it is lossy."""
    vae, config = loaded.pipeline.vae, loaded.config
    return {
        "class": type(vae).__name__,
        "path": config.vae_path,
        "lossy": is_tiny_vae(vae),
        "tile_side": config.vae_tile_side,
    }


def describe_arithmetic(loaded: LoadedPipeline) -> Mapping[str, Any] | None:
    """Return the settings of OpenVINO's arithmetic, and whether it is lossy. None under another backend."""
    backends = [backend for backend in loaded.parts.values() if backend is not None]
    described: Mapping[str, Any] | None = backends[0].options.describe_arithmetic() if backends else None
    return described


def list_applied_adapters(loaded: LoadedPipeline, request: GenerationRequest) -> list[dict[str, Any]]:
    """Return the adapters of an image: the fused ones, and those that its request names."""
    scales = {each["name"]: each["scale"] for each in request.adapters or ()}
    return [
        adapter.describe(scales.get(adapter.config.name))
        for adapter in loaded.adapters
        if adapter.config.fuse or adapter.config.name in scales
    ]


def list_applied_controls(loaded: LoadedPipeline, request: GenerationRequest) -> list[dict[str, Any]]:
    """Return the controls that a request names, with its scales and intervals."""
    registered = {each.config.name: each for each in loaded.controls}
    return [registered[each.name].describe(**each.describe()) for each in request.control or ()]


def count_component_graphs(loaded: LoadedPipeline, name: str) -> int:
    """Return how many graphs of a component the backend runs so far."""
    backend = loaded.parts[name]
    graphs: int = loaded.functions[name].graphs if backend is None else len(backend.reports)  # type: ignore[attr-defined]
    return graphs


def list_uncompiled_components(loaded: LoadedPipeline, request: GenerationRequest) -> list[str]:
    """Return the components that are compiled when this request is the first to need them."""
    if not request.is_drawn:
        return [name for name in loaded.parts if name == UPSCALER and not count_component_graphs(loaded, name)]
    named = {each.name for each in request.control or ()}
    controls = (each for each in loaded.controls if each.config.name not in named)
    unneeded = {name for each in controls for name in each.list_components()}
    unneeded |= {VAE_ENCODER} if request.image is None and request.hires is None else set()
    unneeded |= set() if request.list_enlargements(0) else {UPSCALER}
    return [name for name in loaded.parts if name not in unneeded and not count_component_graphs(loaded, name)]


def measure_components(loaded: LoadedPipeline) -> dict[str, dict[str, tuple[float, str]]]:
    """Return for each component on OpenVINO the figures for metrics: by name, the value and its unit."""
    if loaded.compilation.backend != "openvino":
        return {}
    figures = {}
    for name, backend in loaded.parts.items():
        models = [model for graph in backend.reports for model in graph.models]
        figures[name] = {
            "OpenVINOModels": (len(models), "count"),
            "OpenVINOModelsFromCache": (sum(model.loaded_from_cache for model in models), "count"),
            "OpenVINOOperatorsOutside": (sum(len(each.operators_outside) for each in backend.reports), "count"),
            "OpenVINOCompileTime": (sum(model.seconds for model in models), "s"),
        }
    return figures
