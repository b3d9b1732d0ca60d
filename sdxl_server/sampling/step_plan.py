"""The step plan of an image: which UNet calls are made, which are extrapolated. Lossy, and off by default.

The plan is fixed before the first step. So a seed gives the same image and the remaining time is known.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdxl_server.config.settings import MIN_CALLS
from sdxl_server.errors import RequestError
from sdxl_server.request.fields import GenerationRequest
from sdxl_server.sampling.schedulers import list_timesteps


@dataclass(frozen=True)
class StepPlan:
    """The UNet calls of one image, one entry for each call of the full schedule.

    Attributes:
        costs: 1 for a whole call, the cost of half a batch outside the guidance interval, 0 if extrapolated.
        guided: guidance is applied, so both halves of the batch are computed.
    """

    costs: tuple[float, ...]
    guided: tuple[bool, ...]

    @property
    def total(self) -> float:
        """The cost of all calls, in whole calls."""
        return sum(self.costs)


def build_step_plan(
    scheduler: Any, request: GenerationRequest, *, unet_config: Mapping[str, Any], half: float
) -> StepPlan:
    """Return the step plan for an image of a request.

    Args:
        scheduler: set to the request's steps.
        unet_config: shows whether guidance is an input of the UNet, whose calls then have no halves.
        half: the cost of half a batch, in whole calls.

    Raises:
        RequestError: no step is left, or the guidance interval is wrong.
    """
    timesteps = list_timesteps(scheduler, request)
    if any((each.begin, each.end) != (0, 1) for each in request.control or ()):
        _check_has_timesteps(scheduler, request, "control")
    is_split = has_halves(request.guidance_scale, unet_config)
    guided = _list_guided(scheduler, request, timesteps) if is_split else [True] * len(timesteps)
    made = set(range(len(timesteps)))
    if request.unet_calls is not None:
        share = len(timesteps) / len(scheduler.timesteps)
        made = set(spread_calls(max(round(request.unet_calls * share), MIN_CALLS), total=len(timesteps)))
    first = guided.index(True) if True in guided else 0
    if first not in made:  # the effect of guidance can only be extrapolated after one guided call
        made -= {min(made - {0, len(timesteps) - 1}, key=lambda each: abs(each - first))}
        made |= {first}
    costs = [(1 if is_guided else half) if i in made else 0 for i, is_guided in enumerate(guided)]
    return StepPlan(tuple(costs), tuple(guided))


def has_halves(guidance_scale: float, unet_config: Mapping[str, Any]) -> bool:
    """Say whether a UNet call has two halves: with the prompt and without."""
    return guidance_scale > 1 and unet_config.get("time_cond_proj_dim") is None


def _list_guided(scheduler: Any, request: GenerationRequest, timesteps: Sequence[float]) -> list[bool]:
    """Return for each timestep whether it is inside the guidance interval."""
    begin, end = request.guidance_interval or (0, 1)
    if (begin, end) == (0, 1):
        return [True] * len(timesteps)
    if begin >= end:
        raise RequestError(
            f"guidance_interval takes two shares, the second greater, not {begin:g} and {end:g}",
            param="guidance_interval",
        )
    _check_has_timesteps(scheduler, request, "guidance_interval")
    trained = scheduler.config.num_train_timesteps
    return [is_inside(each, (begin, end), trained=trained) for each in timesteps]


def is_inside(timestep: float, interval: tuple[float, float], *, trained: int) -> bool:
    """Say whether a timestep is inside an interval of the denoising.

    Args:
        interval: two shares.
        trained: the number of training timesteps.
    """
    begin, end = interval
    if (begin, end) == (0, 1):  # some schedulers have other timesteps than the training
        return True
    return round(trained * (1 - end)) <= timestep <= round(trained * (1 - begin))


def _check_has_timesteps(scheduler: Any, request: GenerationRequest, param: str) -> None:
    if hasattr(scheduler, "precondition_outputs"):
        raise RequestError(
            f"{param} takes shares of the training timesteps, and {request.scheduler} has none; leave it out, or name "
            "another scheduler",
            param=param,
        )


def spread_calls(count: int, *, total: int) -> list[int]:
    """Return the indices of the calls to make: both ends, and more calls near them than in the middle.

    docs/benchmarks.md compares other ways to spread them.
    """
    if count >= total:
        return list(range(total))
    indices = []
    for i in range(count):
        position = i / (count - 1)
        curved = (position + (1 - math.cos(math.pi * position)) / 2) / 2
        indices.append(round(curved * (total - 1)))
    for i in range(1, count):
        indices[i] = max(indices[i], indices[i - 1] + 1)
    indices[-1] = total - 1
    for i in reversed(range(count - 1)):
        indices[i] = min(indices[i], indices[i + 1] - 1)
    return indices
