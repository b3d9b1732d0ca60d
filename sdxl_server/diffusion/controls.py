"""The controls of a request: they run once, and the UNet of its images adds what they computed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sdxl_server.diffusion.stand_ins import Functions, check_finite
from sdxl_server.model.controls.registry import Control, list_unet_inputs
from sdxl_server.model.controls.t2i_adapter import prepare_image
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.request.fields import GenerationRequest
from sdxl_server.sampling.step_plan import is_inside

RESIDUALS = "down_intrablock_additional_residuals"  # the UNet's argument


@dataclass(frozen=True)
class Residuals:
    """The scaled feature maps of a control, which the UNet adds inside an interval of the denoising."""

    tensors: Sequence[Any]
    interval: tuple[float, float]


class ControlledUNet:
    """The function of the shared UNet with the inputs for controls.

    Args:
        run: the UNet's function.
        added: of the request's controls.
    """

    def __init__(self, loaded: LoadedPipeline, run: Callable[..., Any], added: Sequence[Residuals]) -> None:
        self._loaded, self._run, self._added = loaded, run, added
        self._kept: dict[Any, list[Any]] = {}

    def __call__(self, sample: Any, timestep: Any, *inputs: Any, **options: Any) -> Any:
        """Return the UNet's output. Outside all intervals it adds zeros."""
        trained, at = self._loaded.pipeline.scheduler.config.num_train_timesteps, float(timestep)
        active = tuple(is_inside(at, each.interval, trained=trained) for each in self._added)
        if (active, len(sample)) not in self._kept:
            self._kept[active, len(sample)] = self._add_up(active, sample)
        # The UNet empties this list.
        return self._run(sample, timestep, *inputs, **options, **{RESIDUALS: list(self._kept[active, len(sample)])})

    def _add_up(self, active: Sequence[bool], sample: Any) -> list[Any]:
        """Return the sum of the active controls, for each row of the UNet's input."""
        rows, _, height, width = sample.shape
        shapes = list_unet_inputs(self._loaded.controls, self._loaded.pipeline.unet, height=height, width=width)
        sums = [sample.new_zeros(rows, *shape) for shape in shapes]
        for is_active, each in zip(active, self._added, strict=True):
            if is_active:
                for total, tensor in zip(sums, each.tensors, strict=False):
                    total += tensor.to(total)
        return sums


def bind_controls(loaded: LoadedPipeline, request: GenerationRequest, functions: Functions) -> Functions:
    """Return the functions with the UNet that adds a request's controls; unchanged without registered controls."""
    if not loaded.controls:
        return functions
    registered, added = {each.config.name: each for each in loaded.controls}, []
    for each in request.control or ():
        if each.scale:
            maps = run_control(loaded, registered[each.name], each.image)
            added.append(Residuals([each.scale * tensor for tensor in maps], (each.begin, each.end)))
    return {**functions, "unet": ControlledUNet(loaded, functions["unet"], added)}


def run_control(loaded: LoadedPipeline, control: Control, image: Any) -> Sequence[Any]:
    """Return the feature maps of an image.

    Raises:
        NotFiniteError: they hold NaN or infinity.
    """
    with torch.no_grad():
        maps = loaded.functions[control.component](prepare_image(control.module, image))
    for each in maps:
        check_finite(each, f"what the control {control.config.name} makes of its image")
    return list(maps)
