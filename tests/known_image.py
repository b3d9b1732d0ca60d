"""Draw a known image with a model that is never wrong, which shows whether a scheduler samples correctly."""

import functools
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import diffusers
import torch

from sdxl_server.sampling.own_classes import build_partial_classes
from sdxl_server.sampling.schedulers import build_scheduler

STEPS = 10
SIDE = 64  # of the latents, which have four channels; chance moves shares by 0.01
MAX_DIFFERENCE = 0.03  # of a share from its value at this timestep
MAX_LEVEL_DIFFERENCE = 0.01  # of noise levels; with zero terminal SNR the others differ by 0.07
MIN_IMAGE = 0.9  # share of the image at the end


def list_values(schema: Mapping[str, Any]) -> list[Any]:
    """Return values of a declared option: each of a few, or both ends of a range."""
    if "enum" in schema:
        return list(schema["enum"])
    if schema["type"] == "boolean":
        return [False, True]
    low, high = schema["minimum"], schema["maximum"]
    return list(range(low, high + 1)) if high - low < 5 else [low, high] if high < 1000 else [20, 100]


def find_fault(
    config: Mapping[str, Any], name: str, options: Mapping[str, Any], *, strengths: Sequence[float | None] = (None,)
) -> str:
    """Say what a scheduler does wrong for a model of these settings; empty if nothing.

    Its noise levels must equal the training's. The UNet's input must hold the share of image and of noise of each
    timestep. The result must be the image.

    Args:
        strengths: of image-to-image; None for text-to-image.
    """
    is_same = name not in build_partial_classes()  # building takes longer than drawing
    for is_partial in (False,) if is_same else (False, True):
        scheduler = build_scheduler(config, name, options, partial=is_partial)
        if not hasattr(scheduler, "precondition_outputs"):
            difference = (scheduler.alphas_cumprod.sqrt() - compute_trained_levels(config).sqrt()).abs().max()
            if difference > MAX_LEVEL_DIFFERENCE:
                return f"its noise levels differ from the training's by {difference:.2f}"
        for strength in strengths:
            is_due = is_same or (strength is not None) is is_partial
            if is_due and (wrong := find_wrong_step(scheduler, config, strength=strength)):
                return f"{wrong} at strength {strength}"
    return ""


def find_wrong_step(scheduler: Any, config: Mapping[str, Any], *, strength: float | None = None) -> str:
    """Describe the first step with wrong latents; empty if there is none."""
    scheduler.set_timesteps(STEPS)
    for timestep, image_share, noise_share, latents, image in draw_known(scheduler, config, strength=strength):
        found_image = _project(latents, image)
        found_noise = float((latents - found_image * image).std())
        if timestep is None:
            is_right = found_image > MIN_IMAGE and found_noise < 1 - MIN_IMAGE
            return "" if is_right else f"the end holds {found_image:.2f} of the image and {found_noise:.2f} of noise"
        if not max(abs(found_image - image_share), abs(found_noise - noise_share)) <= MAX_DIFFERENCE:  # NaN is wrong
            return (
                f"at timestep {float(timestep):.0f} the latents hold {found_image:.2f} of the image and "
                f"{found_noise:.2f} of noise, not {image_share:.2f} and {noise_share:.2f}"
            )
    return "it makes no step"


def draw_known(
    scheduler: Any, config: Mapping[str, Any], *, strength: float | None
) -> Iterator[tuple[Any, float, float, Any, Any]]:
    """Draw the image.

    Yields:
        For each step the timestep, the due shares of image and noise, what the UNet gets, and the image. At the end no
        timestep, and the result instead of what the UNet gets.
    """
    image, noise = make_image_and_noise()
    generator = torch.Generator().manual_seed(1)  # another seed than the image's
    more = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    begin = 0 if strength is None else (STEPS - int(STEPS * strength)) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):  # as diffusers' pipelines do
        scheduler.set_begin_index(begin)
    latents, alphas = None, compute_trained_levels(config).double().clamp(min=1e-12)
    for timestep in scheduler.timesteps[begin:]:
        image_share, noise_share = compute_shares(scheduler, timestep, alphas)
        if latents is None and strength is not None:
            latents = scheduler.add_noise(image, noise, timestep[None])
        elif latents is None:
            latents = (image_share * image + noise_share * noise) * scheduler.init_noise_sigma
        given = scheduler.scale_model_input(latents, timestep)
        yield timestep, image_share, noise_share, given, image
        exact = (given - image_share * image) / max(noise_share, 1e-6)
        outputs = {"epsilon": exact, "sample": image, "v_prediction": image_share * exact - noise_share * image}
        output = outputs[config["prediction_type"]]
        if hasattr(scheduler, "precondition_outputs"):  # a straight function of the output
            sigma, zero, one = torch.exp(4 * timestep), torch.zeros_like(image), torch.ones_like(image)
            offset = scheduler.precondition_outputs(latents, zero, sigma)
            output = (image - offset) / scheduler.precondition_outputs(zero, one, sigma)
        latents = scheduler.step(output, timestep, latents, **more).prev_sample
    yield None, 1.0, 0.0, latents, image


@functools.cache
def make_image_and_noise() -> tuple[torch.Tensor, torch.Tensor]:
    """Return an image, and noise that holds nothing of it."""
    generator = torch.Generator().manual_seed(0)
    image, noise = (torch.randn(1, 4, SIDE, SIDE, generator=generator) for _ in range(2))
    return image, noise - _project(noise, image) * image


def compute_trained_levels(config: Mapping[str, Any]) -> torch.Tensor:
    """Return the cumulative alphas of the training, made once for each model."""
    return _compute_trained_levels(json.dumps({**config}))


@functools.cache
def _compute_trained_levels(config: str) -> torch.Tensor:
    levels: torch.Tensor = diffusers.DDIMScheduler.from_config(json.loads(config)).alphas_cumprod
    return levels


def compute_shares(scheduler: Any, timestep: Any, alphas: Any) -> tuple[float, float]:
    """Return the shares of image and noise that a model was trained on at a timestep, whole or not."""
    if hasattr(scheduler, "precondition_outputs"):
        sigma = float(torch.exp(4 * timestep))
        scale = (sigma**2 + scheduler.config.sigma_data**2) ** -0.5
        return scale, sigma * scale
    sigmas = ((1 - alphas) / alphas) ** 0.5
    low = int(timestep)
    high = min(low + 1, len(sigmas) - 1)
    sigma = float(sigmas[low] + (float(timestep) - low) * (sigmas[high] - sigmas[low]))
    return (1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5


def _project(tensor: Any, image: Any) -> float:
    """Return how much of an image is in a tensor."""
    return float((tensor * image).sum() / (image * image).sum())
