"""The predicted x0: the finished latents that one UNet output implies, under diffusers' schedulers."""

import math
from typing import Any


def compute_sigma(scheduler: Any, timestep: Any) -> float:
    """Return the noise at a timestep, as a multiple of the image's own strength. The timestep may be a fraction."""
    if hasattr(scheduler, "precondition_outputs"):
        return math.exp(4 * float(timestep))  # the inverse of EDM's precondition_noise
    alphas = scheduler.alphas_cumprod.double().clamp(min=1e-12)
    sigmas = ((1 - alphas) / alphas) ** 0.5
    low = int(timestep)
    high = min(low + 1, len(sigmas) - 1)
    return float(sigmas[low] + (float(timestep) - low) * (sigmas[high] - sigmas[low]))


def compute_predicted_x0(scheduler: Any, sample: Any, timestep: Any, output: Any) -> Any:
    """Return the finished latents that one UNet call predicts.

    Under every scheduler the UNet's input is the sample that the model was trained on at this timestep. So only the
    noise level and the prediction type matter. EDM has its own scales.

    Args:
        scheduler: gives the noise levels and the prediction type.
        sample: the UNet's input; 1, channels, height / 8, width / 8.
        timestep: the UNet's timestep, which may be a fraction.
        output: the UNet's output, with guidance applied.
    """
    sample, output = sample.float(), output.float()
    sigma = compute_sigma(scheduler, timestep)
    if hasattr(scheduler, "precondition_outputs"):
        scale = (sigma**2 + scheduler.config.sigma_data**2) ** 0.5
        return scheduler.precondition_outputs(sample * scale, output, sigma)
    signal, noise = (1 / (1 + sigma**2)) ** 0.5, (sigma**2 / (1 + sigma**2)) ** 0.5
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "sample":
        return output
    if prediction_type == "v_prediction":
        return signal * sample - noise * output
    return (sample - noise * output) / signal


def compute_unet_output(scheduler: Any, sample: Any, timestep: Any, predicted_x0: Any) -> Any:
    """Return the UNet output that implies this predicted x0.

    The predicted x0 is a linear function of the output for every prediction type.
    """
    import torch

    offset = compute_predicted_x0(scheduler, sample, timestep, torch.zeros_like(sample))
    slope = compute_predicted_x0(scheduler, torch.zeros(1), timestep, torch.ones(1)).to(offset.device)
    return (predicted_x0 - offset) / slope
