"""Where the error of 8 bits comes from: calls of a part with some of its layers in 8 bits, and all else in float32.

The layers are those that openvino_backend.compression quantises on a CPU with AMX, and torch computes in them what
OpenVINO does there, since what OpenVINO has compiled cannot be split.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm

from benchmarks.parts import Part, list_tensors

# The first in a layer's name is its block, or its kind; a layer that has none is one of the others.
_BLOCKS = r"(?:down_blocks|up_blocks|layers)\.\d+|mid_block"
_KINDS = r"attn1|attn2|ff\.net\.0|ff\.net\.2|self_attn|fc1|fc2|proj_in|proj_out|resnets|downsamplers|upsamplers"
_OTHERS = "others"
_LEVELS = 127  # of each sign
_SILU_MINIMUM, _SILU_LEVELS = 0.2785, 32  # below zero, where the input is SiLU's


def write_errors(model: Path, parts: Sequence[str], *, size: int, path: Path) -> None:
    """Write a table for each part, of calls with seeded inputs: what is in 8 bits, the error, its share of all.

    Squares of errors add up where the layers' errors have nothing to do with each other, so that is what shares are of.
    """
    lines = [f"{model.name}, {size}², errors relative to float32"]
    for part in parts:
        errors = measure_errors(Part(model, part, "float32", size))
        lines += ["", "| in 8 bits | error | share |", "|---|---|---|"]
        lines += [
            f"| {part}: {name} | {error:.4f} | {(error / errors['all']) ** 2:.0%} |" for name, error in errors.items()
        ]
        path.write_text("\n".join(lines) + "\n")


def measure_errors(part: Part) -> dict[str, float]:
    """Return the relative error of all calls by what is in 8 bits: all, the weights alone, each block, each kind."""
    layers = {name: each for name, each in part.module.named_modules() if _is_quantized(each)}
    groups = {"all": layers, "the weights alone": layers, **_group(layers, _BLOCKS), **_group(layers, _KINDS)}

    def run() -> list[Any]:
        return [part.method(**each) for each in part.calls]

    with torch.no_grad():
        expected, errors = _flatten(run()), {}
        for name, chosen in (bar := tqdm(groups.items(), disable=None)):
            bar.set_postfix_str(f"{part.name}: {name}")
            result = run_in_8_bits(run, chosen.values(), weights_alone=name == "the weights alone")
            errors[name] = float((result - expected).norm() / expected.norm())
    return errors


def _is_quantized(layer: torch.nn.Module) -> bool:
    if isinstance(layer, torch.nn.Conv2d):
        return min(layer.in_channels, layer.out_channels) >= 32
    return isinstance(layer, torch.nn.Linear)


def _group(layers: Mapping[str, Any], pattern: str) -> dict[str, dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        found = re.search(pattern, name)
        groups.setdefault(found[0] if found else _OTHERS, {})[name] = layer
    return groups


def run_in_8_bits(run: Callable[[], Any], layers: Iterable[Any], *, weights_alone: bool) -> torch.Tensor:
    """Return all results in one vector, with the weights of these layers in 8 bits, and their inputs too or not."""
    chosen = list(layers)
    for layer in chosen:
        layer.forward = functools.partial(_compute, layer, weights_alone)
    try:
        return _flatten(run())
    finally:
        for layer in chosen:
            del layer.forward


def _flatten(results: Any) -> torch.Tensor:
    return torch.cat([each.flatten() for each in list_tensors(results)])


def _compute(layer: Any, weights_alone: bool, x: torch.Tensor) -> torch.Tensor:
    scale = layer.weight.abs().amax(tuple(range(1, layer.weight.dim())), keepdim=True) / _LEVELS
    weight = (layer.weight / scale).round() * scale
    if isinstance(layer, torch.nn.Conv2d):
        stays = weights_alone or max(layer.kernel_size) == 1
        return layer._conv_forward(x if stays else _quantize(x, range(1, x.dim())), weight, layer.bias)
    stays = weights_alone or x.dim() < 3  # vectors do
    return functional.linear(x if stays else _quantize(x, [x.dim() - 1]), weight, layer.bias)


def _quantize(x: torch.Tensor, axes: Iterable[int]) -> torch.Tensor:
    """Return a tensor in 256 levels, with one scale along these axes."""
    if -_SILU_MINIMUM <= float(x.amin()) < 0:
        above = 2 * _LEVELS + 1 - _SILU_LEVELS
        least = _SILU_MINIMUM / _SILU_LEVELS
        scale = (x.amax(tuple(axes), keepdim=True) / above).clamp(min=least)
        return (x / scale).round().clamp(-_SILU_LEVELS, above) * scale
    scale = (x.abs().amax(tuple(axes), keepdim=True) / _LEVELS).clamp(min=1e-30)
    return (x / scale).round() * scale
