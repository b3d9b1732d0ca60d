"""OpenVINO without torch.compile, by its own documentation: convert once, save the model, compile it."""

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

_TRACED_SIZE = 64  # pixels; torch.jit.trace keeps all results, at the real size more than the weights


class _Flat(torch.nn.Module):
    """Take a part's tensors by position and return a tuple, as torch.jit.trace requires."""

    def __init__(self, part: Part, inputs: Mapping[str, Any]) -> None:
        super().__init__()
        self.module, self._method = part.module, part.method
        self._leaves, self._structure = pytree.tree_flatten(inputs)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in self._leaves]
        return list_tensors(self._method(**pytree.tree_unflatten(leaves, self._structure)))


def compile_part(
    part: Part, options: Mapping[str, Any], precision: str, folder: Path
) -> tuple[Callable[..., Any], Callable[[], dict[str, Any]]]:
    """Return the part compiled by OpenVINO, and a function that describes it. The folder keeps the converted model."""
    path = folder / "model.xml"
    is_kept = path.exists()
    if not is_kept:
        _convert(part, options.get("weight_compression"), path)
    properties = {"INFERENCE_PRECISION_HINT": precision, **options.get("config", {})}
    compiled = openvino.Core().compile_model(path, "CPU", properties)
    ran = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    model = TensorRequest(compiled)

    def run(**inputs: Any) -> Any:
        return model(*list_tensors(inputs))

    return run, lambda: {"ran": f"OpenVINO in {ran}", "from_cache": is_kept}


def _convert(part: Part, compression: str | None, path: Path) -> None:
    """Save the part as an OpenVINO model, with weights in float16 or compressed. Free torch's module."""
    small = dataclasses.replace(part, size=_TRACED_SIZE).inputs[0]
    model = openvino.convert_model(_Flat(part, small), example_input=list_tensors(small))
    model.reshape({index: list(tensor.shape) for index, tensor in enumerate(list_tensors(part.inputs[0]))})
    if compression:
        import nncf

        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode(compression))
    openvino.save_model(model, path)
    del model, part.__dict__["module"]
    gc.collect()
