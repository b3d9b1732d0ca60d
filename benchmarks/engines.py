"""Load a part of the model under one engine, and describe what ran."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import native
from benchmarks.configurations import Configuration
from benchmarks.parts import INPUTS, Part, list_tensors
from benchmarks.worker import Engine, Job, compute_error
from sdxl_server.config.compile_settings import CompileConfig
from sdxl_server.model.compiling import compile_method, count_graphs


def load_part(job: Job) -> Engine:
    """Load a part and compile it as configured."""
    part = Part(Path(job.model), job.part, str(job.configuration.weights), job.size)
    run, describe = _compile_part(part, job.configuration, Path(job.cache))

    return Engine(
        call=lambda number: run(**part.inputs[number % INPUTS]),
        describe=describe,
        judge=lambda results: compute_error(list_tensors(results), Path(job.reference)),
    )


def _compile_part(
    part: Part, configuration: Configuration, cache: Path
) -> tuple[Callable[..., Any], Callable[[], dict[str, Any]]]:
    """Return the compiled part and a function that describes what ran."""
    if configuration.native is not None:
        return native.compile_part(part, configuration.native, configuration.arithmetic, cache)
    compilation = complete_compilation(configuration, cache)
    if compilation.backend is None:
        return part.method, lambda: describe_engine(compilation, part.weights, ())
    method = compile_method(part.method, compilation)
    return method, lambda: describe_engine(compilation, part.weights, [getattr(method, "backend", None)])


def complete_compilation(configuration: Configuration, cache: Path) -> CompileConfig:
    """Return the settings of torch.compile, with the arithmetic and the cache's folder."""
    compilation = CompileConfig.parse(configuration.pt2)
    options = dict(compilation.options or {})
    backend = compilation.backend or "eager"
    if backend.startswith("openvino") and "precision" not in options:
        options["config"] = {"INFERENCE_PRECISION_HINT": configuration.arithmetic, **options.get("config", {})}
    if backend == "openvino":
        options |= {"model_caching": True, "cache_dir": str(cache)}
    return dataclasses.replace(compilation, options=options or None)


def describe_engine(compilation: CompileConfig, weights: str, backends: Sequence[Any]) -> dict[str, Any]:
    """Return what ran.

    Args:
        weights: the name of their type.
        backends: the OpenVINOBackend of each method that `openvino` compiled.
    """
    if compilation.backend is None:
        return {"ran": f"PyTorch in {weights}"}
    if compilation.backend == "openvino":
        return _describe_ours([graph for backend in backends for graph in backend.reports])
    if compilation.backend != "openvino_stock":
        counters = torch._dynamo.utils.counters
        breaks = sum(counters["graph_break"].values())
        return {"ran": f"Inductor, {counters['stats']['unique_graphs']} graphs, {breaks} breaks"}
    return {"ran": f"OpenVINO, {count_graphs(compilation.backend)[0]} models"}


def _describe_ours(graphs: Sequence[Any]) -> dict[str, Any]:
    models = [model for graph in graphs for model in graph.models]
    precisions = "+".join(sorted({each.precision for each in models}))
    quantized = {
        "convolutions": sum(each.quantized_convolutions for each in models),
        "linear layers": sum(each.quantized_linear_layers for each in models),
    }
    in_8_bits = [f"{count} {kind}" for kind, count in quantized.items() if count]
    return {
        "ran": f"OpenVINO in {precisions}, {len(models)} models"
        + (f", {' and '.join(in_8_bits)} in 8 bits" if in_8_bits else ""),
        "from_cache": all(each.loaded_from_cache for each in models) and not any(each.traced for each in graphs),
    }
