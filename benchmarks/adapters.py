"""Time a step of the UNet without and with adapters of all its linear layers: python -m benchmarks.adapters MODEL"""

import argparse
import functools
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import read_peak_memory
from benchmarks.measure import time_call
from benchmarks.parts import Part
from openvino_backend import CompiledFunction

RANKS = (16, 64)


def make_products(shapes: dict[str, torch.Size], rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return random matrices for the weights of these shapes."""
    return {
        name: (torch.randn(rank, shape[1]) / shape[1] ** 0.5, torch.randn(shape[0], rank) / 100)
        for name, shape in shapes.items()
    }


def time_steps(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    """Return the seconds of the first call of each, and of the later ones, made in turn."""
    first = {name: round(time_call(function)[1], 3) for name, function in functions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            function()  # another's matrices were there before
            seconds[name].append(time_call(function)[1])
    return {
        name: {"first": first[name], "median": round(statistics.median(each), 3), "least": round(min(each), 3)}
        for name, each in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="the folder of a pipeline")
    parser.add_argument("--size", type=int, default=512, help="the picture's width and height in pixels")
    parser.add_argument("--precision", default="fastest", help="as of the backend's option")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    part = Part(options.model, "unet", "float16", options.size)
    layers = [(name, each) for name, each in part.module.named_modules() if isinstance(each, torch.nn.Linear)]
    shapes = {f"{name}.weight": each.weight.shape for name, each in layers}
    with tempfile.TemporaryDirectory() as cache, torch.no_grad():
        settings = {
            "precision": options.precision,
            "model_caching": True,
            "cache_dir": cache,
            "release_weights": True,
        }
        plain = CompiledFunction(part.method, settings)
        first = {"none registered": functools.partial(plain, **part.inputs)}
        report = {"layers": len(shapes), **time_steps(first, options.repeats)}
        del plain, first
        compiled = CompiledFunction(part.method, settings, ranks=dict.fromkeys(shapes, max(RANKS)))
        functions: dict[str, Callable[[], Any]] = {"none named": functools.partial(compiled, **part.inputs)}
        for rank in RANKS:
            bound = compiled.bind(make_products(shapes, rank))
            functions[f"rank {rank}"] = functools.partial(bound, **part.inputs)
        report |= time_steps(functions, options.repeats)
    print(json.dumps({**report, "GB at most": read_peak_memory()}, indent=1))


if __name__ == "__main__":
    main()
