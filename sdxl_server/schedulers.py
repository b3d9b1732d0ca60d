"""diffusers' schedulers: which fit a model, how many calls of the UNet they make, what they take the end to be."""

import inspect
import itertools
import math
from typing import Any

from sdxl_server.errors import ConfigError, RequestError
from sdxl_server.fields import GenerationRequest
from sdxl_server.schemas import shorten


def list_schedulers(scheduler: Any) -> dict[str, Any]:
    """Return by their names the schedulers that can take this one's place and that can be used on this machine."""
    usable = {}
    for each in sorted(scheduler.compatibles, key=lambda each: each.__name__):
        try:
            each.from_config(scheduler.config)
        except (ImportError, TypeError, ValueError):  # a library is missing, or the settings do not fit
            continue
        usable[each.__name__] = each
    return usable


def set_scheduler(pipeline: Any, name: str | None) -> None:
    """Replace the scheduler by the named one, with the settings of the model's own.

    Raises:
        ConfigError: not a scheduler that fits this model.
    """
    if name is None:
        return
    schedulers = list_schedulers(pipeline.scheduler)
    if name not in schedulers:
        raise ConfigError(f"handler.scheduler takes one of {', '.join(schedulers)}, not {name!r}")
    pipeline.scheduler = schedulers[name].from_config(pipeline.scheduler.config)


def make_scheduler(model_own: Any, request: GenerationRequest) -> Any:
    """Return the scheduler that a request names, with the settings of the model's own, set to its steps.

    Raises:
        RequestError: it cannot make so few steps.
    """
    import diffusers

    scheduler = getattr(diffusers, str(request.scheduler)).from_config(model_own.config)
    schedule = find_schedule(request, scheduler)
    steps: dict[str, Any] = schedule or {"num_inference_steps": request.num_inference_steps}
    try:
        scheduler.set_timesteps(**steps)
    except (IndexError, ValueError) as error:
        name, given = next(iter(steps.items()))
        told = f"in {given} steps" if not schedule else f"with these {name}"
        raise RequestError(
            f"{name}: {request.scheduler} cannot make a picture {told} ({error}); give it more, or another scheduler",
            param=name,
        ) from error
    return scheduler


def find_schedule(request: GenerationRequest, scheduler: Any) -> dict[str, list[float]]:
    """Return the schedule that a request names, as diffusers' argument, or nothing.

    Raises:
        RequestError: it names two, one that does not fall, or one that this scheduler or model cannot take.
    """
    from diffusers.schedulers import AysSchedules

    named = [name for name in ("timesteps", "sigmas", "schedule") if getattr(request, name) is not None]
    if not named:
        return {}
    if len(named) > 1:
        raise RequestError(f"{' and '.join(named)} are one thing; give one of them", param=named[1])
    name, given = named[0], getattr(request, named[0])
    kind = name if name != "schedule" else "sigmas" if given.endswith("Sigmas") else "timesteps"
    values = list(AysSchedules[given] if name == "schedule" else given)
    if any(before <= after for before, after in itertools.pairwise(values)) or kind == "sigmas" and values[-1] != 0:
        raise RequestError(
            f"{name} takes numbers that fall{', to 0 at last' if kind == 'sigmas' else ''}, not {shorten(values)}",
            param=name,
        )
    if name == "schedule" and scheduler.config.prediction_type != "epsilon":
        raise RequestError(
            f"schedule takes a model that predicts the noise, not {scheduler.config.prediction_type}", param=name
        )
    takers = [each.__name__ for each in list_schedulers(scheduler).values() if _takes(each, kind)]
    if not _takes(type(scheduler), kind):
        raise RequestError(
            f"{name} is taken by {', '.join(takers)}, not by {request.scheduler}; name one of them as scheduler",
            param=name,
        )
    return {kind: values}


def _takes(scheduler: Any, kind: str) -> bool:
    return kind in inspect.signature(scheduler.set_timesteps).parameters


def list_timesteps(scheduler: Any, request: GenerationRequest) -> list[float]:
    """Return the timesteps of the UNet's calls for one picture, chosen as diffusers' pipelines choose them.

    Args:
        scheduler: set to the request's steps.

    Raises:
        RequestError: there would be none.
    """
    timesteps: list[float] = scheduler.timesteps.tolist()
    if request.image is not None and request.strength is not None:
        steps_of_all = len(timesteps) if find_schedule(request, scheduler) else request.num_inference_steps
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


def predict_original(scheduler: Any, sample: Any, timestep: Any, output: Any) -> Any:
    """Return the finished latents as they look from one call of the UNet.

    What the UNet is given is, under every scheduler, the sample of the diffusion process that it was trained on at this
    timestep, so the answer needs the noise level and the kind of prediction only. EDM's has scales of its own.

    Args:
        scheduler: its noise levels and its kind of prediction count.
        sample: what the UNet was given; 1, channels, height / 8, width / 8.
        timestep: likewise, whole or not.
        output: what it returned, guided.
    """
    sample, output = sample.float(), output.float()
    sigma = find_sigma(scheduler, timestep)
    if hasattr(scheduler, "precondition_outputs"):
        scale = (sigma**2 + scheduler.config.sigma_data**2) ** 0.5
        return scheduler.precondition_outputs(sample * scale, output, sigma)
    alpha, noise = (1 / (1 + sigma**2)) ** 0.5, (sigma**2 / (1 + sigma**2)) ** 0.5
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return output
    if kind == "v_prediction":
        return alpha * sample - noise * output
    return (sample - noise * output) / alpha


def find_output(scheduler: Any, sample: Any, timestep: Any, original: Any) -> Any:
    """Return what the UNet would have to return for its prediction to be these finished latents.

    The prediction is a straight function of the output, whatever its kind.
    """
    import torch

    offset = predict_original(scheduler, sample, timestep, torch.zeros_like(sample))
    slope = predict_original(scheduler, torch.zeros(1), timestep, torch.ones(1)).to(offset.device)
    return (original - offset) / slope


def find_sigma(scheduler: Any, timestep: Any) -> float:
    """Return the noise at a timestep, whole or not, as a share of the picture's own strength."""
    if hasattr(scheduler, "precondition_outputs"):
        return math.exp(4 * float(timestep))  # the inverse of EDM's precondition_noise
    alphas = scheduler.alphas_cumprod.double().clamp(min=1e-12)
    sigmas = ((1 - alphas) / alphas) ** 0.5
    low = int(timestep)
    high = min(low + 1, len(sigmas) - 1)
    return float(sigmas[low] + (float(timestep) - low) * (sigmas[high] - sigmas[low]))
