"""Trials of diffusers' schedulers: each draws a picture of known numbers with a model that knows it."""

import functools
import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any

from sdxl_server.sampling.predicted_x0 import find_level

TRIAL_STEPS = 10
TRIAL_SIDE = 64  # of latents of four channels: chance moves the shares below by 0.01
FARTHEST = 0.03  # from the share of the picture, or of the noise, that a timestep is due
FARTHEST_LEVEL = 0.01  # likewise, in what a scheduler believes; without zero terminal SNR it is up to 0.07
LEAST_OF_PICTURE = 0.9  # in what a scheduler ends with


def write_config(own: Any) -> str:
    """Return a scheduler's settings as a key of caches."""
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
def find_fault(source: str, name: str, *, options: str) -> str:
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
        return try_levels(scheduler, trained)
    except (AttributeError, ImportError, IndexError, NotImplementedError, TypeError, ValueError) as error:
        return f"cannot be used here: {' '.join(str(error).split())}"


def try_levels(scheduler: Any, trained: Any) -> str:
    """Draw as `find_fault` says.

    Args:
        trained: knows the noise levels and the kind of prediction that the model was trained with.
    """
    scheduler.set_timesteps(TRIAL_STEPS)
    for timestep, share, level, given, picture, _ in _draw_known(scheduler, trained):
        found = _project(given, picture)
        found_level = float((given - found * picture).std())
        if timestep is None:
            is_right = found > LEAST_OF_PICTURE and found_level < 1 - LEAST_OF_PICTURE
            return "" if is_right else f"ends with {found:.2f} of the picture"
        if not (abs(found - share) <= FARTHEST and abs(found_level - level) <= FARTHEST):
            return (
                f"gives the model other noise than it was trained on: at timestep {float(timestep):.0f} {found:.2f} of "
                f"the picture and {found_level:.2f} of noise, where {share:.2f} and {level:.2f} are due"
            )
    return ""


@functools.lru_cache(maxsize=256)
def measure_growth(source: str, name: str, options: str, *, steps: int) -> float:
    """Return how large errors become in what a model is given, where its own are 1; 0 where noise is added anew."""
    config, error = json.loads(source), 0.05
    if hasattr(build_scheduler(config, name, json.loads(options)), "precondition_outputs"):
        return 0  # EDM's levels are others
    trained = build_scheduler(config, "DDIMScheduler", {})

    def draw(error: float) -> float:
        scheduler = build_scheduler(config, name, json.loads(options))
        scheduler.set_timesteps(steps)
        drawn = list(_draw_known(scheduler, trained, error=error))[:-1]  # the end has the last error only
        return max(
            float((given - share * picture - level * noise).std()) for _, share, level, given, picture, noise in drawn
        )

    return 0 if draw(0) > error else draw(error) / error


def _draw_known(scheduler: Any, trained: Any, *, error: float = 0) -> Iterator[tuple[Any, float, float, Any, Any, Any]]:
    """Draw a picture of known numbers with a model that knows it.

    Args:
        scheduler: set to its steps.
        error: of the model's picture, of which the standard deviation is 1, anew at each step.

    Yields:
        At each step the timestep, the shares of picture and noise that are due, what the UNet is given, the picture
        and the noise; at the end no timestep and, in the place of what the UNet is given, what was drawn.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    picture, noise = (torch.randn(1, 4, TRIAL_SIDE, TRIAL_SIDE, generator=generator) for _ in range(2))
    noise -= _project(noise, picture) * picture
    more = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    if hasattr(scheduler, "set_begin_index"):  # or it would look steps up by their timestep, which two may share
        scheduler.set_begin_index(0)
    latents = None
    for timestep in scheduler.timesteps:
        share, level = find_level(trained, timestep)
        if latents is None:
            latents = (share * picture + level * noise) * scheduler.init_noise_sigma
        given = scheduler.scale_model_input(latents, timestep)
        yield timestep, share, level, given, picture, noise
        known = picture + error * torch.randn(picture.shape, generator=generator) if error else picture
        exact = (given - share * known) / max(level, 1e-6)
        outputs = {"epsilon": exact, "sample": known, "v_prediction": share * exact - level * known}
        latents = scheduler.step(outputs[trained.config.prediction_type], timestep, latents, **more).prev_sample
    yield None, 1.0, 0.0, latents, picture, noise


def _project(tensor: Any, picture: Any) -> float:
    """Return how much of a picture is in a tensor."""
    return float((tensor * picture).sum() / (picture * picture).sum())
