"""OpenVINO without torch.compile, as its own documentation has it: convert once, keep the model, compile it."""

import dataclasses
import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import openvino
import torch
from torch.utils import _pytree as pytree

from benchmarks.parts import Part, list_tensors
from openvino_backend.running import TensorRequest

_FILE = "model.xml"
_TRACED_SIZE = 64  # pixels; torch.jit.trace holds all that it computes, which at the real size is more than the weights


class _Flat(torch.nn.Module):
    """A part that takes its tensors by position and returns a tuple, as torch.jit.trace wants it."""

    def __init__(self, part: Part, inputs: Mapping[str, Any]) -> None:
        super().__init__()
        self.module, self._method = part.module, part.method
        self._leaves, self._structure = pytree.tree_flatten(inputs)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in self._leaves]
        return list_tensors(self._method(**pytree.tree_unflatten(leaves, self._structure)))


def find_kept(folder: Path) -> bool:
    """Say whether the folder holds a converted model."""
    return (folder / _FILE).exists()


def compile_part(
    part: Part, options: Mapping[str, Any], precision: str, folder: Path
) -> tuple[Callable[..., Any], Callable[[], dict[str, Any]]]:
    """Return the part as OpenVINO compiles it, and what tells what runs; the converted model is kept in the folder."""
    is_kept = find_kept(folder)
    if not is_kept:
        _convert(part, options.get("weight_compression"), folder / _FILE)
    properties = {"INFERENCE_PRECISION_HINT": precision, **options.get("config", {})}
    compiled = openvino.Core().compile_model(folder / _FILE, "CPU", properties)
    ran = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    model = TensorRequest(compiled)

    def run(**inputs: Any) -> Any:
        return model(*list_tensors(inputs))

    return run, lambda: {"ran": f"OpenVINO in {ran}", "from_cache": is_kept}


def _convert(part: Part, compression: str | None, path: Path) -> None:
    """Write the part as an OpenVINO model, its weights in float16 or compressed, and let go of torch's module."""
    small = dataclasses.replace(part, size=_TRACED_SIZE).inputs
    model = openvino.convert_model(_Flat(part, small), example_input=list_tensors(small))
    model.reshape({index: list(tensor.shape) for index, tensor in enumerate(list_tensors(part.inputs))})
    if compression:
        import nncf

        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode(compression))
    openvino.save_model(model, path)
    del model, part.__dict__["module"]
    gc.collect()
