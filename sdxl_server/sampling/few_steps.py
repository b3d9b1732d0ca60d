"""Models distilled to few steps: how they are recognised, and which steps and guidance suit them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdxl_server.request.samplers import split_sampler

DISTILLED = ("LCMScheduler", "TCDScheduler")  # each samples only models that were distilled for it
FEW_STEPS = 4
EMBEDDED_GUIDANCE = 8.0  # from the model cards of the LCM models
NAMED = re.compile(
    r"turbo|lightning|hyper-?sd|(?<![a-z])(?:lcm|tcd|dmd2?)(?![a-z])", re.IGNORECASE
)  # in file names of such models
MOST_STEPS = 16  # without a warning; Lightning and Hyper-SD go up to 8
MOST_GUIDANCE = 2.5  # without a warning; LCM's adapters take up to 2


@dataclass(frozen=True)
class SuitedDefaults:
    """The steps and the guidance that suit a model.

    Attributes:
        reason: why it is a few-step model; empty if it is not.
        is_embedded: guidance is an input of its UNet, whose calls then have no halves.
    """

    num_inference_steps: int = 30
    guidance_scale: float = 5.0
    reason: str = ""
    is_embedded: bool = False

    def describe_mismatch(self, num_inference_steps: int, guidance_scale: float) -> str:
        """Say why a configuration does not suit a few-step model; empty if it does."""
        burns = guidance_scale > MOST_GUIDANCE and not self.is_embedded
        if not self.reason or not burns and num_inference_steps <= MOST_STEPS:
            return ""
        return (
            f"This is a few-step model ({self.reason}). handler.num_inference_steps: {num_inference_steps} and "
            f"guidance_scale: {guidance_scale:g} overexpose its images or waste time: {self} suit it; null sets them"
        )

    def __str__(self) -> str:
        return f"{self.num_inference_steps} steps and a guidance of {self.guidance_scale:g}"


def choose_suited_defaults(
    own: Any, unet_config: Mapping[str, Any], sampler: str | Mapping[str, Any]
) -> SuitedDefaults:
    """Return the steps and the guidance that suit a model.

    A few-step model's scheduler has `trailing` timesteps, which start at full noise. Other models that predict the
    noise do not need that. SDXL Turbo is saved with EulerAncestralDiscreteScheduler, SD Turbo and Lightning with
    EulerDiscreteScheduler. LCM and TCD have their own schedulers.

    Args:
        own: the scheduler in the model's folder.
        sampler: the default of requests, from `read_sampler`.
    """
    config, (name, _) = own.config, split_sampler(sampler)
    if unet_config.get("time_cond_proj_dim") is not None:
        reason = "guidance is an input of its UNet, as in latent consistency models"
        return SuitedDefaults(FEW_STEPS, EMBEDDED_GUIDANCE, reason, is_embedded=True)
    if name in DISTILLED:
        return SuitedDefaults(FEW_STEPS, 0.0, f"its scheduler is {name}")
    is_trailing = config.get("timestep_spacing") == "trailing" and not config.get("rescale_betas_zero_snr")
    steps = {"epsilon": FEW_STEPS, "sample": 1}.get(config.get("prediction_type"))  # Lightning's of one step: sample
    if is_trailing and steps:
        reason = f"its {type(own).__name__} has timestep_spacing: trailing, like Turbo and Lightning"
        return SuitedDefaults(steps, 0.0, reason)
    return SuitedDefaults()


def describe_few_step_name(name: str) -> str:
    """Return a hint if a single-file model is named like a few-step model. Such a file holds no scheduler."""
    if not NAMED.search(name):
        return ""
    return (
        f"{name} is named like a few-step model, but the file holds neither the steps nor the scheduler. "
        "Copy this model's line from docs/models.md to model-config.yaml; otherwise 30 steps give wrong images"
    )
