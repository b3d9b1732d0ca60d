"""diffusers' schedulers: which of them suit a model, and the steps that they make for a request."""

import inspect
import itertools
from collections.abc import Mapping
from typing import Any

from sdxl_server.errors import ConfigError, RequestError
from sdxl_server.request.fields import SCHEDULE_FIELDS, GenerationRequest
from sdxl_server.request.sampler_names import read_sampler
from sdxl_server.request.samplers import SAMPLERS, SIGMA_SCHEDULES, Samplers, split_sampler
from sdxl_server.sampling.few_steps import DISTILLED
from sdxl_server.sampling.own_classes import build_own_classes, build_partial_classes
from sdxl_server.schemas import is_valid, shorten

MIN_SIGMA = 0.001  # below it a step divides by nearly 0


def list_samplers(
    own: Any, unet_config: Mapping[str, Any], *, configured: Any = None, is_adapted: bool = False
) -> dict[str, Any]:
    """Return the options of each sampler that suits a model, by its name.

    Args:
        own: the scheduler in the model's folder.
        unet_config: shows whether the UNet was distilled with guidance as an input.
        configured: the scheduler in model-config.yaml. It can say that the weights were distilled for it.
        is_adapted: the weights hold adapters, which may have distilled them.
    """
    own_name, config = type(own).__name__, own.config
    if own_name in DISTILLED:
        names = [own_name]
    elif unet_config.get("time_cond_proj_dim") is not None:
        names = ["LCMScheduler"]
    elif config.get("sigma_data") is not None:
        names = [name for name, row in SAMPLERS.items() if row.use == "edm"]
    else:
        uses = ("any", "distilled") if is_adapted or _is_distilled(configured) else ("any",)
        names = [name for name, row in SAMPLERS.items() if row.use in uses or row.use == "own" and name == own_name]
    return {name: SAMPLERS[name].options for name in names if not find_mismatch(own, name)}


def find_mismatch(own: Any, name: str) -> str:
    """Return what of a model's settings a sampler cannot follow; empty if it suits the model."""
    row, config = SAMPLERS.get(name), own.config
    if row is None:
        return "is not supported"
    if config.get("prediction_type") not in row.predictions:
        return f"cannot sample the prediction type {config.get('prediction_type')}"
    if config.get("rescale_betas_zero_snr") and not row.zero_snr:
        return "cannot sample a model with zero terminal SNR"
    wrong = [] if name != type(own).__name__ else _list_unaccepted(config, name)
    return f"does not sample correctly with {wrong[0]}: {config[wrong[0]]}" if wrong else ""


def _list_unaccepted(config: Mapping[str, Any], name: str) -> list[str]:
    """Return the settings of a model's own scheduler that a sampler takes only as other values."""
    options = SAMPLERS[name].options if name in SAMPLERS else {}
    return [key for key, schema in options.items() if config.get(key) is not None and not is_valid(config[key], schema)]


def _is_distilled(configured: Any) -> bool:
    """Say whether a configuration names a scheduler for distilled models."""
    name = configured.get("name") if isinstance(configured, Mapping) else configured
    try:
        return bool(read_sampler(name, {each: SAMPLERS[each].options for each in DISTILLED}))
    except ValueError:
        return False


def choose_default(own: Any, samplers: Samplers, configured: Any) -> str | dict[str, Any]:
    """Return the scheduler of requests that name none.

    Args:
        configured: the setting in model-config.yaml; None for the model's own.

    Raises:
        ConfigError: it does not suit this model.
    """
    name = type(own).__name__
    if configured is None and name in samplers:
        return name
    try:
        if configured is not None:
            return read_sampler(configured, samplers)
    except ValueError as error:
        raise ConfigError(f"handler.scheduler {error}") from error
    accepted = ", ".join(samplers) or "none for this model"
    mismatch = find_mismatch(own, name) or "is for other models"
    raise ConfigError(f"handler.scheduler takes one of {accepted}: the model's own, {name}, {mismatch}")


def build_scheduler(config: Mapping[str, Any], name: str, options: Mapping[str, Any], *, partial: bool = False) -> Any:
    """Return a scheduler with the settings of the model's own.

    Args:
        config: the settings of the model's own scheduler.
        partial: it begins at any of its steps, as image-to-image does.
    """
    import diffusers

    chosen = {**build_own_classes(), **(build_partial_classes() if partial else {})}.get(name, getattr(diffusers, name))
    unaccepted = _list_unaccepted(config, name)
    settings = {key: value for key, value in config.items() if key not in unaccepted}
    changes: dict[str, Any] = {}
    if any(options.get(each) for each in SIGMA_SCHEDULES):  # they exclude each other
        changes = {each: False for each in SIGMA_SCHEDULES if each in SAMPLERS[name].options}
    if "clip_sample" in inspect.signature(chosen.__init__).parameters:
        changes["clip_sample"] = False  # latents exceed the range of pixels
    scheduler = chosen.from_config(settings, **{**changes, **options})
    scheduler.register_to_config(**{**changes, **options})  # our own classes have more settings than arguments
    return scheduler


def build_request_scheduler(model_own: Any, request: GenerationRequest) -> Any:
    """Return the scheduler that a request names, with the settings of the model's own, set to its steps.

    Raises:
        RequestError: the scheduler cannot make so few steps, or not these.
    """
    name, options = split_sampler(request.scheduler or type(model_own).__name__)
    scheduler = build_scheduler(model_own.config, name, options, partial=request.image is not None)
    schedule = read_schedule(request)
    steps: dict[str, Any] = schedule or {"num_inference_steps": request.num_inference_steps}
    try:
        scheduler.set_timesteps(**steps)
    except (IndexError, ValueError) as error:
        given = f"in {request.num_inference_steps} steps" if not schedule else f"with these {next(iter(schedule))}"
        key = request.schedule_field or "num_inference_steps"
        raise RequestError(
            f"{key}: {name} cannot make an image {given} ({error}); give "
            f"{'another number of steps' if not schedule else 'others'}, or another scheduler",
            param=key,
        ) from error
    return scheduler


def read_schedule(request: GenerationRequest) -> dict[str, list[float]]:
    """Return the schedule that a request names, as an argument of diffusers; empty if none."""
    from diffusers.schedulers import AysSchedules

    name = request.schedule_field
    if name is None:
        return {}
    if name == "schedule":
        return {"sigmas" if str(request.schedule).endswith("Sigmas") else "timesteps": AysSchedules[request.schedule]}
    return {name: list(getattr(request, name))}


def check_schedule(model_own: Any, samplers: Samplers, request: GenerationRequest) -> None:
    """Refuse a schedule that a request's scheduler or model cannot take.

    Args:
        samplers: the samplers that suit the model.

    Raises:
        RequestError: there are two schedules, or it does not fall, or the scheduler or model cannot take it.
    """
    named = [name for name in SCHEDULE_FIELDS if getattr(request, name) is not None]
    if len(named) > 1:
        raise RequestError(f"{' and '.join(named)} are one thing; give one of them", param=named[1])
    for kind, values in read_schedule(request).items():
        is_noise = kind == "sigmas"
        is_falling = all(before > after for before, after in itertools.pairwise(values))
        if not is_falling or is_noise and (len(values) < 2 or values[-1] != 0 or values[-2] < MIN_SIGMA):
            limits = f", to {MIN_SIGMA} or more and then 0" if is_noise else ""
            raise RequestError(f"{named[0]} takes numbers that fall{limits}, not {shorten(values)}", param=named[0])
        if named == ["schedule"] and model_own.config.prediction_type != "epsilon":
            raise RequestError(
                f"schedule takes a model that predicts the noise, not {model_own.config.prediction_type}",
                param="schedule",
            )
        name, _ = split_sampler(request.scheduler or type(model_own).__name__)
        takers = [each for each in samplers if kind in SAMPLERS[each].schedules]
        if name not in takers:
            raise RequestError(
                f"{named[0]} is taken by {', '.join(takers) or 'no scheduler of this model'}, not by {name}"
                f"{'; name one of them as scheduler' if takers else ''}",
                param=named[0],
            )


def list_timesteps(scheduler: Any, request: GenerationRequest) -> list[float]:
    """Return the timesteps of an image's UNet calls, as diffusers' pipelines choose them.

    Args:
        scheduler: set to the request's steps.

    Raises:
        RequestError: no step is left.
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
                f"denoising_end takes a share that leaves a step. At {request.denoising_end} the denoising ends at "
                f"noise level {last} of {trained} and begins at {first:.0f}: give more",
                param="denoising_end",
            )
    return timesteps
