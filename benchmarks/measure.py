"""One configuration in a process of its own: `python -m benchmarks.measure JOB` prints a record, both as JSON."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks import native
from benchmarks.configurations import Configuration
from benchmarks.machine import read_peak_memory
from benchmarks.parts import Part, list_tensors
from pipeline_utils import CompileConfig, compile_method

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
        cache: the folder of this configuration's cache; empty for a cold start.
        reference: the file of the results to compare with; written when it is not there.
    """

    configuration: Configuration
    model: str
    part: str
    size: int
    steps: int
    cache: str
    reference: str

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
    cache, load = Path(job.cache), 0.0
    if job.configuration.native is None or not native.find_kept(cache):
        part.find_class()  # its import is no part of loading
        _, load = _time(lambda: part.module)
    started = time.perf_counter()
    run, describe = prepare(part, job.configuration, cache)
    results = run(**part.inputs)
    first, steps = time.perf_counter() - started, []
    for _ in range(job.steps):
        results, seconds = _time(lambda: run(**part.inputs))
        steps.append(round(seconds, 4))
    return {
        "load": round(load, 2),
        "first": round(first, 2),
        "steps": steps,
        "peak_gigabytes": read_peak_memory(),
        **describe(),
        **compare(part, results, Path(job.reference)),
    }


def prepare(part: Part, configuration: Configuration, cache: Path) -> tuple[Callable[..., Any], Describe]:
    """Return what runs the part under a configuration, and what tells, after a call, what did run."""
    if configuration.native is not None:
        return native.compile_part(part, configuration.native, configuration.arithmetic, cache)
    compilation = CompileConfig.parse(configuration.pt2)
    if compilation.backend is None:
        return part.method, lambda: {"ran": f"PyTorch in {part.weights}", "from_cache": False}
    options = dict(compilation.options or {})
    if compilation.backend.startswith("openvino"):
        options["config"] = {"INFERENCE_PRECISION_HINT": configuration.arithmetic, **options.get("config", {})}
    if compilation.backend == "openvino":
        options |= {"model_caching": True, "cache_dir": str(cache)}
    method = compile_method(part.method, dataclasses.replace(compilation, options=options or None))
    describe = {"openvino": lambda: _describe_ours(method), "openvino_stock": _describe_stock}
    return method, describe.get(compilation.backend, _describe_inductor)


def _describe_ours(method: Any) -> dict[str, Any]:
    models = [model for graph in method.backend.reports for model in graph.models]
    precisions = "+".join(sorted({each.precision for each in models}))
    quantized = sum(each.quantized_convolutions for each in models)
    return {
        "ran": f"OpenVINO in {precisions}, {len(models)} models"
        + (f", {quantized} convolutions in 8 bits" if quantized else ""),
        "from_cache": all(each.loaded_from_cache for each in models) and not method.backend.reports[0].traced,
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


def compare(part: Part, results: Any, reference: Path) -> dict[str, Any]:
    """Return the relative L2 distance of the results from the reference, which is written when it is not there."""
    result = torch.cat([each.detach().float().flatten() for each in list_tensors(results)])
    if not bool(result.isfinite().all()):
        return {"error": None, "ran_wrong": "results that are not finite"}
    if not reference.exists():
        torch.save(result, reference)
        return {"error": 0.0, "flops": part.count_flops()}
    expected = torch.load(reference, weights_only=True)
    return {"error": float((result - expected).norm() / expected.norm())}


def _time(function: Callable[[], Result]) -> tuple[Result, float]:
    started = time.perf_counter()
    return function(), time.perf_counter() - started


def main() -> None:
    # Where memory runs out, this process is the one to end, and not its neighbours.
    Path("/proc/self/oom_score_adj").write_text("1000")
    with torch.no_grad():
        print(json.dumps(measure(Job.read(sys.argv[1]))))


if __name__ == "__main__":
    main()
