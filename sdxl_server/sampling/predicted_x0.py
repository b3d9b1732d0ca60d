"""The noise in what the UNet is given, and the picture that its output foretells, by diffusers' schedulers."""

import math
from typing import Any


def find_sigma(scheduler: Any, timestep: Any) -> float:
    """Return the noise at a timestep, whole or not, as a share of the picture's own strength."""
    if hasattr(scheduler, "precondition_outputs"):
        return math.exp(4 * float(timestep))  # the inverse of EDM's precondition_noise
    alphas = scheduler.alphas_cumprod.double().clamp(min=1e-12)
    sigmas = ((1 - alphas) / alphas) ** 0.5
    low = int(timestep)
    high = min(low + 1, len(sigmas) - 1)
    return float(sigmas[low] + (float(timestep) - low) * (sigmas[high] - sigmas[low]))


def find_level(scheduler: Any, timestep: Any) -> tuple[float, float]:
    """Return the shares of the picture and of the noise that a model was trained on at a timestep, whole or not."""
    sigma = find_sigma(scheduler, timestep)
    return (1 / (1 + sigma**2)) ** 0.5, (sigma**2 / (1 + sigma**2)) ** 0.5


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
    if hasattr(scheduler, "precondition_outputs"):
        sigma = find_sigma(scheduler, timestep)
        scale = (sigma**2 + scheduler.config.sigma_data**2) ** 0.5
        return scheduler.precondition_outputs(sample * scale, output, sigma)
    alpha, noise = find_level(scheduler, timestep)
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
