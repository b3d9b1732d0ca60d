"""diffusers' schedulers: which draw a model right, and which steps they make for a request."""

import functools
import inspect
import itertools
import json
from collections.abc import Mapping
from typing import Any

from sdxl_server.errors import ConfigError, RequestError
from sdxl_server.fields import SCHEDULE_FIELDS, GenerationRequest
from sdxl_server.noise import find_level
from sdxl_server.samplers import Samplers, list_options, read_sampler, split_sampler
from sdxl_server.schemas import shorten

DISTILLED = ("LCMScheduler", "TCDScheduler")  # each draws what was distilled for it only
TRIAL_STEPS = 10
TRIAL_SIDE = 64  # of latents of four channels: chance moves the shares below by 0.01
FARTHEST = 0.03  # from the share of the picture, or of the noise, that a timestep is due
FARTHEST_LEVEL = 0.01  # likewise, in what a scheduler believes; without zero terminal SNR it is up to 0.07
LEAST_SIGMA = 0.001  # below it a step divides by next to nothing
LEAST_OF_PICTURE = 0.9  # in what a scheduler ends with
TAKES_NO_SIGMAS = "UniPCMultistepScheduler"  # but for models of flow, although set_timesteps has the argument


def find_samplers(own: Any, unet_config: Mapping[str, Any], *, is_adapted: bool = False) -> dict[str, Any]:
    """Return the options of each scheduler that draws a model right, by its name.

    Args:
        own: the scheduler in the model's folder.
        unet_config: tells of a UNet that was distilled to few steps with the guidance in it.
        is_adapted: adapters are in its weights, which may have distilled it.
    """
    import diffusers

    if type(own).__name__ in DISTILLED:
        candidates = [type(own)]
    elif unet_config.get("time_cond_proj_dim") is not None:
        candidates = [diffusers.LCMScheduler]
    else:
        candidates = sorted({*own.compatibles, type(own)}, key=lambda each: each.__name__)
        if is_adapted:
            candidates += [getattr(diffusers, each) for each in DISTILLED]
    source = _write_config(own)
    return {
        each.__name__: list_options(each) for each in candidates if not _find_fault(source, each.__name__, options="{}")
    }


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
                f"{_find_fault(_write_config(own), name, options='{}')}"
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
    fault = _find_fault(_write_config(own), name, options=json.dumps(options, sort_keys=True)) if options else ""
    if fault:
        raise ValueError(f"takes other options than these: {name} {fault}")


def _write_config(own: Any) -> str:
    return json.dumps(dict(own.config), default=list, sort_keys=True)


def build_scheduler(config: Mapping[str, Any], name: str, options: Mapping[str, Any]) -> Any:
    """Return a scheduler with the settings of the model's own.

    Latents are not bounded as pixels are, so they are only clipped where the model's own settings say so.
    """
    import diffusers

    chosen = getattr(diffusers, name)
    is_told = "clip_sample" in config and "clip_sample" not in config.get("_use_default_values", ())
    taken = inspect.signature(chosen.__init__).parameters
    free = {} if is_told or "clip_sample" not in taken else {"clip_sample": False}
    return chosen.from_config(config, **free, **options)


@functools.lru_cache(maxsize=256)
def _find_fault(source: str, name: str, *, options: str) -> str:
    """Say what is wrong with a scheduler for the model of these settings; empty where nothing is.

    Its noise levels must be those of the model's training, which a scheduler that cannot do zero terminal SNR has not
    where the model has it. Then it draws a picture of known numbers with a model that is never wrong: what the UNet is
    given must hold the share of the picture and of the noise that it was trained on at this timestep, which depends on
    the scaling of the noise and on the options, and the end must be the picture, which depends on the kind of
    prediction and on whether latents are clipped.
    """
    config = json.loads(source)
    try:
        scheduler = build_scheduler(config, name, json.loads(options))
        if hasattr(scheduler, "precondition_outputs"):  # EDM's have levels of their own, and draw EDM's models only
            return "" if config.get("sigma_data") is not None else "is for models of EDM"
        trained = build_scheduler(config, "DDIMScheduler", {})
        apart = (scheduler.alphas_cumprod.sqrt() - trained.alphas_cumprod.sqrt()).abs().max()
        if apart > FARTHEST_LEVEL:
            return f"has not the noise levels of the model's training: they are up to {apart:.2f} apart"
        return _try_levels(scheduler, trained)
    except (AttributeError, ImportError, IndexError, NotImplementedError, TypeError, ValueError) as error:
        return f"cannot be used here: {' '.join(str(error).split())}"


def _try_levels(scheduler: Any, trained: Any) -> str:
    """Draw as `_find_fault` says.

    Args:
        trained: knows the noise levels and the kind of prediction that the model was trained with.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    picture, noise = (torch.randn(1, 4, TRIAL_SIDE, TRIAL_SIDE, generator=generator) for _ in range(2))
    noise -= _project(noise, picture) * picture
    more = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    scheduler.set_timesteps(TRIAL_STEPS)
    latents = None
    for timestep in scheduler.timesteps:
        share, level = find_level(trained, timestep)
        if latents is None:
            latents = (share * picture + level * noise) * scheduler.init_noise_sigma
        given = scheduler.scale_model_input(latents, timestep)
        found = _project(given, picture)
        found_level = float((given - found * picture).std())
        if not (abs(found - share) <= FARTHEST and abs(found_level - level) <= FARTHEST):
            return (
                f"gives the model other noise than it was trained on: at timestep {float(timestep):.0f} {found:.2f} of "
                f"the picture and {found_level:.2f} of noise, where {share:.2f} and {level:.2f} are due"
            )
        exact = (given - share * picture) / max(level, 1e-6)
        outputs = {"epsilon": exact, "sample": picture, "v_prediction": share * exact - level * picture}
        latents = scheduler.step(outputs[trained.config.prediction_type], timestep, latents, **more).prev_sample
    end = _project(latents, picture)
    rest = float((latents - end * picture).std())
    return "" if end > LEAST_OF_PICTURE and rest < 1 - LEAST_OF_PICTURE else f"ends with {end:.2f} of the picture"


def _project(tensor: Any, picture: Any) -> float:
    """Return how much of a picture is in a tensor."""
    return float((tensor * picture).sum() / (picture * picture).sum())


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
