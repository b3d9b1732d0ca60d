"""One configuration in a process of its own: `python -m benchmarks.measure JOB` prints a record, both as JSON."""

import dataclasses
import functools
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks import native
from benchmarks.configurations import Configuration
from benchmarks.machine import read_peak_memory
from benchmarks.parts import Part, list_tensors
from sdxl_server.config.settings import CompileConfig
from sdxl_server.model.compiling import compile_method

Result = TypeVar("Result")
Describe = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        configuration: its arithmetic and the type of its weights are settled.
        model: the pipeline's folder.
        part, size: see Part.
        steps: how many calls to time after the first.
        num_inference_steps: denoising steps of a whole picture.
        cache: the folder of this configuration's cache; empty for a cold start.
        reference: the file of the results to compare with; written when it is not there.
        sheet: the file for the pictures, where whole ones are made.
    """

    configuration: Configuration
    model: str
    part: str
    size: int
    steps: int
    num_inference_steps: int
    cache: str
    reference: str
    sheet: str

    def write(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def read(cls, text: str) -> "Job":
        raw = json.loads(text)
        return cls(**{**raw, "configuration": Configuration(**raw["configuration"])})


def measure(job: Job) -> dict[str, Any]:
    """Load, compile and call the part; return the times in seconds, and what ran.

    `first` is from the loaded weights to the first result: tracing, conversion, compilation and one step.
    """
    part = Part(Path(job.model), job.part, str(job.configuration.weights), job.size)
    cache, reference = Path(job.cache), Path(job.reference)
    load = load_weights(part, job.configuration, cache)
    started = time.perf_counter()
    run, tell = prepare(part, job.configuration, cache)
    results = [run(**part.inputs)]
    first, steps = time.perf_counter() - started, []
    for result, seconds in itertools.islice(time_calls(run, part), job.steps):
        steps.append(round(seconds, 4))
        if len(results) < len(part.calls):
            results.append(result)
    return {
        "load": round(load, 2),
        "first": round(first, 2),
        "steps": steps,
        "peak_gigabytes": read_peak_memory(),
        **tell(),
        **({} if reference.exists() else {"flops": part.count_flops()}),
        **compare(list_tensors(results), reference),
    }


def load_weights(part: Part, configuration: Configuration, cache: Path) -> float:
    """Load torch's module where this configuration takes it; return the seconds."""
    if configuration.native is not None and native.find_kept(cache):
        return 0.0
    part.find_class()  # its import is no part of loading
    return time_call(lambda: part.module)[1]


def prepare(part: Part, configuration: Configuration, cache: Path) -> tuple[Callable[..., Any], Describe]:
    """Return what runs the part under a configuration, and what tells, after a call, what did run."""
    if configuration.native is not None:
        return native.compile_part(part, configuration.native, configuration.arithmetic, cache)
    compilation = settle_compilation(configuration, cache)
    if compilation.backend is None:
        return part.method, lambda: describe(compilation, part.weights, ())
    method = compile_method(part.method, compilation)
    return method, lambda: describe(compilation, part.weights, [getattr(method, "backend", None)])


def settle_compilation(configuration: Configuration, cache: Path) -> CompileConfig:
    """Return how torch.compile is to be called, the arithmetic and the cache's folder included."""
    compilation = CompileConfig.parse(configuration.pt2)
    options = dict(compilation.options or {})
    backend = compilation.backend or "eager"
    if backend.startswith("openvino") and "precision" not in options:
        options["config"] = {"INFERENCE_PRECISION_HINT": configuration.arithmetic, **options.get("config", {})}
    if backend == "openvino":
        options |= {"model_caching": True, "cache_dir": str(cache)}
    return dataclasses.replace(compilation, options=options or None)


def describe(compilation: CompileConfig, weights: str, backends: Sequence[Any]) -> dict[str, Any]:
    """Return what did run.

    Args:
        weights: the name of their type.
        backends: the OpenVINOBackend of each method that `openvino` compiled.
    """
    if compilation.backend is None:
        return {"ran": f"PyTorch in {weights}", "from_cache": False}
    if compilation.backend == "openvino":
        return _describe_ours([graph for backend in backends for graph in backend.reports])
    return _describe_stock() if compilation.backend == "openvino_stock" else _describe_inductor()


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


def _describe_stock() -> dict[str, Any]:
    from openvino.frontend.pytorch.torchdynamo import execute

    graphs = execute.partitioned_modules.values()
    given_up = sum(getattr(each, "perm_fallback", False) for graph in graphs for each in graph.children())
    ran = f"OpenVINO, {len(execute.compiled_cache)} models, {given_up} given up and run in eager PyTorch"
    return {"ran": ran, "from_cache": False}


def _describe_inductor() -> dict[str, Any]:
    counters = torch._dynamo.utils.counters
    hits, misses = (counters["inductor"][f"fxgraph_cache_{each}"] for each in ("hit", "miss"))
    breaks = sum(counters["graph_break"].values())
    return {
        "ran": f"Inductor, {counters['stats']['unique_graphs']} graphs, {breaks} breaks",
        "from_cache": hits > 0 and not misses,
    }


def compare(results: Sequence[torch.Tensor], reference: Path) -> dict[str, Any]:
    """Return the relative L2 distance of the results from the reference, which is written when it is not there."""
    result = torch.cat([each.detach().float().flatten() for each in results])
    if not bool(result.isfinite().all()):
        return {"error": None, "ran_wrong": "results that are not finite"}
    if not reference.exists():
        torch.save(result, reference)
        return {"error": 0.0}
    expected = torch.load(reference, weights_only=True)
    return {"error": float((result - expected).norm() / expected.norm())}


def time_call(function: Callable[[], Result]) -> tuple[Result, float]:
    started = time.perf_counter()
    return function(), time.perf_counter() - started


def time_calls(run: Callable[..., Any], part: Part) -> Iterator[tuple[Any, float]]:
    """Make the part's calls over and over, from the second on; give the result and the seconds of each."""
    for inputs in itertools.cycle([*part.calls[1:], part.calls[0]]):
        yield time_call(functools.partial(run, **inputs))


def run(function: Callable[[Job], dict[str, Any]]) -> None:
    """Do the job that the command line holds, and print the record."""
    # Where memory runs out, this process is the one to end, and not its neighbours.
    Path("/proc/self/oom_score_adj").write_text("1000")
    with torch.no_grad():
        print(json.dumps(function(Job.read(sys.argv[1]))))


if __name__ == "__main__":
    run(measure)
