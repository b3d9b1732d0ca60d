"""The controls of a request: their images are encoded once, and the UNet of its images gets what they compute."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch

from sdxl_server.diffusion.stand_ins import Functions, check_finite
from sdxl_server.model.controls.base import Control, UNetCall, add_inputs, complete_inputs
from sdxl_server.model.controls.registry import list_empty_inputs
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.request.controls import RequestControl
from sdxl_server.request.fields import GenerationRequest
from sdxl_server.request.masks import crop_map
from sdxl_server.sampling.step_plan import is_inside


@dataclass(frozen=True)
class ActiveControl:
    """A control of a request.

    Attributes:
        control: the registered control.
        request: how the request uses it.
        encoded: its image.
    """

    control: Control
    request: RequestControl
    encoded: Any


class ControlledUNet:
    """The function of the shared UNet with the inputs for controls.

    Args:
        functions: what runs each component.
        active: the controls of the request.
    """

    def __init__(self, loaded: LoadedPipeline, functions: Functions, active: Sequence[ActiveControl]) -> None:
        self._loaded, self._functions, self._active = loaded, functions, active

    def __call__(self, sample: Any, timestep: Any, **options: Any) -> Any:
        """Return the UNet's output. A control computes nothing outside its interval."""
        trained, at = self._loaded.pipeline.scheduler.config.num_train_timesteps, float(timestep)
        call = UNetCall(sample, timestep, options)
        added = [
            each.control.compute_inputs(self._functions, each.encoded, each.request.scale, call)
            for each in self._active
            if is_inside(at, (each.request.begin, each.request.end), trained=trained)
        ]
        empty = list_empty_inputs(self._loaded.controls, self._loaded.pipeline.unet, sample)
        inputs = complete_inputs(reduce(add_inputs, added, {}), empty)
        return self._functions["unet"](sample, timestep, **{**options, **inputs})


def bind_controls(loaded: LoadedPipeline, request: GenerationRequest, functions: Functions) -> Functions:
    """Return the functions with the UNet that adds a request's controls; unchanged without registered controls."""
    if not loaded.controls:
        return functions
    registered, active = {each.config.name: each for each in loaded.controls}, []
    for each in request.control or ():
        if each.scale:
            control = registered[each.name]
            image = crop_map(each.image, request) if control.is_map else each.image
            active.append(ActiveControl(control, each, _encode(functions, control, image, each.mode)))
    return {**functions, "unet": ControlledUNet(loaded, functions, active)}


def _encode(functions: Functions, control: Control, image: Any, mode: str | None) -> Any:
    """Return the encoded image of a control.

    Raises:
        NotFiniteError: it holds NaN or infinity.
    """
    with torch.no_grad():
        encoded = control.encode_image(functions, image, mode)
    for each in torch.utils._pytree.tree_leaves(encoded):
        if isinstance(each, torch.Tensor):
            check_finite(each, f"what the control {control.config.name} makes of its image")
    return encoded
