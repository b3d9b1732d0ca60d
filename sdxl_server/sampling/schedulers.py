"""diffusers' schedulers: which draw a model right, and which steps they make for a request."""

import inspect
import itertools
import json
from collections.abc import Mapping
from typing import Any

from sdxl_server.errors import ConfigError, RequestError
from sdxl_server.request.fields import SCHEDULE_FIELDS, GenerationRequest
from sdxl_server.request.samplers import Samplers, list_options, read_sampler, split_sampler
from sdxl_server.sampling.few_steps import DISTILLED
from sdxl_server.sampling.trials import build_scheduler, find_fault, write_config
from sdxl_server.schemas import shorten

LEAST_SIGMA = 0.001  # below it a step divides by next to nothing
TAKES_NO_SIGMAS = "UniPCMultistepScheduler"  # but for models of flow, although set_timesteps has the argument


def find_samplers(
    own: Any, unet_config: Mapping[str, Any], *, configured: Any = None, is_adapted: bool = False
) -> dict[str, Any]:
    """Return the options of each scheduler that draws a model right, by its name.

    Args:
        own: the scheduler in the model's folder.
        unet_config: tells of a UNet that was distilled to few steps with the guidance in it.
        configured: the scheduler as model-config.yaml has it, which can say that the weights were distilled for it.
        is_adapted: adapters are in its weights, which may have distilled it.
    """
    import diffusers

    if type(own).__name__ in DISTILLED:
        candidates = [type(own)]
    elif unet_config.get("time_cond_proj_dim") is not None:
        candidates = [diffusers.LCMScheduler]
    else:
        candidates = sorted({*own.compatibles, type(own)}, key=lambda each: each.__name__)
        if is_adapted or _is_distilled(configured):
            candidates += [getattr(diffusers, each) for each in DISTILLED]
    source = write_config(own)
    return {
        each.__name__: list_options(each) for each in candidates if not find_fault(source, each.__name__, options="{}")
    }


def _is_distilled(configured: Any) -> bool:
    """Say whether a configuration names a scheduler for distilled models."""
    import diffusers

    known = {each: list_options(getattr(diffusers, each)) for each in DISTILLED}
    name = configured.get("name") if isinstance(configured, Mapping) else configured
    try:
        return bool(read_sampler(name, known))
    except ValueError:
        return False


def choose_default(own: Any, samplers: Samplers, configured: Any) -> str | dict[str, Any]:
    """Return the scheduler of requests that name none.

    Args:
        configured: as model-config.yaml has it; None for the model's own.

    Raises:
        ConfigError: it does not fit this model.
    """
    name = type(own).__name__
    try:
        if configured is not None:
            chosen = read_sampler(configured, samplers)
        elif name in samplers:
            return name
        else:
            raise ValueError(
                f"takes one of {', '.join(samplers) or 'none for this model'}, since the model's own, {name}, "
                f"{find_fault(write_config(own), name, options='{}')}"
            )
        check_options(own, chosen)
    except ValueError as error:
        raise ConfigError(f"handler.scheduler {error}") from error
    return chosen


def check_options(own: Any, sampler: str | Mapping[str, Any]) -> None:
    """Refuse options under which a scheduler does not draw the model right.

    Raises:
        ValueError: says what they make of it.
    """
    name, options = split_sampler(sampler)
    fault = find_fault(write_config(own), name, options=json.dumps(options, sort_keys=True)) if options else ""
    if fault:
        raise ValueError(f"takes other options than these: {name} {fault}")


def make_scheduler(model_own: Any, request: GenerationRequest) -> Any:
    """Return the scheduler that a request names, with the settings of the model's own, set to its steps.

    Raises:
        RequestError: it cannot make so few steps, or not these.
    """
    name, options = split_sampler(request.scheduler or type(model_own).__name__)
    scheduler = build_scheduler(model_own.config, name, options)
    schedule = find_schedule(request)
    steps: dict[str, Any] = schedule or {"num_inference_steps": request.num_inference_steps}
    try:
        scheduler.set_timesteps(**steps)
    except (IndexError, ValueError) as error:
        given = f"in {request.num_inference_steps} steps" if not schedule else f"with these {next(iter(schedule))}"
        key = request.schedule_field or "num_inference_steps"
        raise RequestError(
            f"{key}: {name} cannot make a picture {given} ({error}); give it "
            f"{'another number of steps' if not schedule else 'others'}, or another scheduler",
            param=key,
        ) from error
    return scheduler


def find_schedule(request: GenerationRequest) -> dict[str, list[float]]:
    """Return the schedule that a request names, as diffusers' argument, or nothing."""
    from diffusers.schedulers import AysSchedules

    name = request.schedule_field
    if name is None:
        return {}
    if name == "schedule":
        return {"sigmas" if str(request.schedule).endswith("Sigmas") else "timesteps": AysSchedules[request.schedule]}
    return {name: list(getattr(request, name))}


def check_sampling(model_own: Any, samplers: Samplers, request: GenerationRequest) -> None:
    """Refuse what a request's scheduler cannot draw the model right with.

    Args:
        samplers: the schedulers on offer.

    Raises:
        RequestError: names the options, or the schedule: two of them, one that does not fall, or one that this
            scheduler or model cannot take.
    """
    sampler = request.scheduler or type(model_own).__name__
    try:
        check_options(model_own, sampler)
    except ValueError as error:
        raise RequestError(f"scheduler {error}", param="scheduler") from error
    named = [name for name in SCHEDULE_FIELDS if getattr(request, name) is not None]
    if len(named) > 1:
        raise RequestError(f"{' and '.join(named)} are one thing; give one of them", param=named[1])
    for kind, values in find_schedule(request).items():
        is_noise = kind == "sigmas"
        is_falling = all(before > after for before, after in itertools.pairwise(values))
        if not is_falling or is_noise and (len(values) < 2 or values[-1] != 0 or values[-2] < LEAST_SIGMA):
            bounds = f", to {LEAST_SIGMA} or more and then 0" if is_noise else ""
            raise RequestError(
                f"{named[0]} takes numbers that fall{bounds}, not {shorten(values)}",
                param=named[0],
            )
        if named == ["schedule"] and model_own.config.prediction_type != "epsilon":
            raise RequestError(
                f"schedule takes a model that predicts the noise, not {model_own.config.prediction_type}",
                param="schedule",
            )
        takers, (name, _) = [each for each in samplers if _takes(each, kind)], split_sampler(sampler)
        if name not in takers:
            raise RequestError(
                f"{named[0]} is taken by {', '.join(takers) or 'no scheduler of this model'}, not by {name}"
                f"{'; name one of them as scheduler' if takers else ''}",
                param=named[0],
            )


def _takes(scheduler: str, kind: str) -> bool:
    import diffusers

    taken = inspect.signature(getattr(diffusers, scheduler).set_timesteps).parameters
    return kind in taken and (kind, scheduler) != ("sigmas", TAKES_NO_SIGMAS)


def list_timesteps(scheduler: Any, request: GenerationRequest) -> list[float]:
    """Return the timesteps of the UNet's calls for one picture, chosen as diffusers' pipelines choose them.

    Args:
        scheduler: set to the request's steps.

    Raises:
        RequestError: there would be none.
    """
    timesteps: list[float] = scheduler.timesteps.tolist()
    if request.image is not None and request.strength is not None:
        steps_of_all = len(timesteps) if request.schedule_field else request.num_inference_steps
        steps = int(steps_of_all * request.strength)
        if steps < 1:
            raise RequestError(
                f"strength times num_inference_steps must be 1 or more, not {request.strength} times {steps_of_all}",
                param="strength",
            )
        timesteps = timesteps[(steps_of_all - steps) * scheduler.order :]
    if request.denoising_end is not None and request.denoising_end < 1:
        trained = scheduler.config.num_train_timesteps
        last = round(trained - request.denoising_end * trained)
        first, timesteps = timesteps[0], [each for each in timesteps if each >= last]
        if not timesteps:
            raise RequestError(
                f"denoising_end takes a share that leaves a step; at {request.denoising_end} the denoising would end "
                f"at noise level {last} of {trained}, and it begins at {first:.0f}: give more",
                param="denoising_end",
            )
    return timesteps
