"""Which calls of the UNet a picture makes, and what takes the place of those it leaves out. Lossy, and off by default.

All is fixed before the first step, so that a seed's picture and the time that is left do not hang on what happens.
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
class Plan:
    """The calls of the UNet for one picture, by their place in the full schedule.

    Attributes:
        costs: of each: 1, what half of the batch costs outside the guidance interval, 0 where it is forecast.
        guided: of each: both halves count.
    """

    costs: tuple[float, ...]
    guided: tuple[bool, ...]

    @property
    def total(self) -> float:
        """The calls that are made, in whole ones."""
        return sum(self.costs)


def plan_calls(scheduler: Any, request: GenerationRequest, *, unet_config: Mapping[str, Any], half: float) -> Plan:
    """Return the calls for a picture of a request.

    Args:
        scheduler: set to the request's steps.
        unet_config: tells of a UNet that was distilled with the guidance in it, whose calls have no halves.
        half: what one costs, in whole calls.

    Raises:
        RequestError: the request leaves no step, or an interval that is none.
    """
    timesteps = list_timesteps(scheduler, request)
    is_split = has_halves(request.guidance_scale, unet_config)
    guided = _find_guided(scheduler, request, timesteps) if is_split else [True] * len(timesteps)
    made = set(range(len(timesteps)))
    if request.unet_calls is not None:
        share = len(timesteps) / len(scheduler.timesteps)
        made = set(spread_calls(max(round(request.unet_calls * share), MIN_CALLS), total=len(timesteps)))
    first = guided.index(True) if True in guided else 0
    if first not in made:  # what the guidance changes cannot be forecast before it was seen once
        made -= {min(made - {0, len(timesteps) - 1}, key=lambda each: abs(each - first))}
        made |= {first}
    costs = [(1 if is_guided else half) if i in made else 0 for i, is_guided in enumerate(guided)]
    return Plan(tuple(costs), tuple(guided))


def has_halves(guidance_scale: float, unet_config: Mapping[str, Any]) -> bool:
    """Say whether a call of the UNet has two halves, one of which the prompt does not steer."""
    return guidance_scale > 1 and unet_config.get("time_cond_proj_dim") is None


def _find_guided(scheduler: Any, request: GenerationRequest, timesteps: Sequence[float]) -> list[bool]:
    """Say of each timestep whether it is inside the guidance interval."""
    begin, end = request.guidance_interval or (0, 1)
    if (begin, end) == (0, 1):
        return [True] * len(timesteps)
    if begin >= end:
        raise RequestError(
            f"guidance_interval takes two shares of which the second is greater, not {begin:g} and {end:g}",
            param="guidance_interval",
        )
    if hasattr(scheduler, "precondition_outputs"):
        raise RequestError(
            f"guidance_interval takes shares of the timesteps that a model was trained on, and {request.scheduler} "
            "has none; leave it out, or take another scheduler",
            param="guidance_interval",
        )
    trained = scheduler.config.num_train_timesteps
    return [round(trained * (1 - end)) <= each <= round(trained * (1 - begin)) for each in timesteps]


def spread_calls(count: int, *, total: int) -> list[int]:
    """Return which calls to make: the first, the last, and between them somewhat more near both ends.

    docs/benchmarks.md has what other ways of spreading them lose.
    """
    if count >= total:
        return list(range(total))
    places = []
    for i in range(count):
        way = i / (count - 1)
        curved = (way + (1 - math.cos(math.pi * way)) / 2) / 2
        places.append(round(curved * (total - 1)))
    for i in range(1, count):
        places[i] = max(places[i], places[i - 1] + 1)
    places[-1] = total - 1
    for i in reversed(range(count - 1)):
        places[i] = min(places[i], places[i + 1] - 1)
    return places
