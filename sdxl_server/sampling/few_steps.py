"""Models that were distilled to few steps: what tells them, and how many steps and how much guidance suit them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdxl_server.request.samplers import split_sampler

DISTILLED = ("LCMScheduler", "TCDScheduler")  # each draws what was distilled for it only
FEW_STEPS = 4
EMBEDDED_GUIDANCE = 8.0  # as the cards of the LCM models have it
NAMED = re.compile(
    r"turbo|lightning|hyper-?sd|(?<![a-z])(?:lcm|tcd|dmd2?)(?![a-z])", re.IGNORECASE
)  # files of such models
MOST_STEPS = 16  # of a few-step model without a warning; Lightning and Hyper-SD go up to 8
MOST_GUIDANCE = 2.5  # likewise; LCM's adapters take up to 2


@dataclass(frozen=True)
class Suited:
    """The steps and the guidance that suit a model.

    Attributes:
        reason: what tells that it is a few-step one; empty where nothing does.
        is_embedded: the guidance is an input of its UNet, whose calls then have no halves.
    """

    num_inference_steps: int = 30
    guidance_scale: float = 5.0
    reason: str = ""
    is_embedded: bool = False

    def find_warning(self, num_inference_steps: int, guidance_scale: float) -> str:
        """Say what a configuration makes of a few-step model; empty where it suits it."""
        burns = guidance_scale > MOST_GUIDANCE and not self.is_embedded
        if not self.reason or not burns and num_inference_steps <= MOST_STEPS:
            return ""
        return (
            f"This is a few-step model ({self.reason}), and handler has num_inference_steps: {num_inference_steps} and "
            f"guidance_scale: {guidance_scale:g}, which burn its pictures or cost time for nothing; {self} suit it, "
            "which null stands for"
        )

    def __str__(self) -> str:
        return f"{self.num_inference_steps} steps and a guidance of {self.guidance_scale:g}"


def find_suited(own: Any, unet_config: Mapping[str, Any], sampler: str | Mapping[str, Any]) -> Suited:
    """Return the steps and the guidance that suit a model, by what was saved with it and by its sampler.

    A few-step model's scheduler has its steps end where the noise is whole (`trailing`), as a model that predicts the
    noise does otherwise not need: SDXL Turbo's is EulerAncestralDiscreteScheduler, SD Turbo's and Lightning's
    EulerDiscreteScheduler. Latent consistency models have a scheduler of their own, and so have those of trajectories.

    Args:
        own: the scheduler in the model's folder.
        sampler: of requests that name none, as `read_sampler` returns it.
    """
    config, (name, _) = own.config, split_sampler(sampler)
    if unet_config.get("time_cond_proj_dim") is not None:
        reason = "its UNet has the guidance as an input, as latent consistency models have"
        return Suited(FEW_STEPS, EMBEDDED_GUIDANCE, reason, is_embedded=True)
    if name in DISTILLED:
        return Suited(FEW_STEPS, 0.0, f"its scheduler is {name}")
    is_trailing = config.get("timestep_spacing") == "trailing" and not config.get("rescale_betas_zero_snr")
    steps = {"epsilon": FEW_STEPS, "sample": 1}.get(config.get("prediction_type"))  # Lightning's of one step: sample
    if is_trailing and steps:
        reason = f"its {type(own).__name__} has timestep_spacing: trailing, as those of Turbo and Lightning"
        return Suited(steps, 0.0, reason)
    return Suited()


def find_hint(name: str) -> str:
    """Say of a model in one file, which holds no scheduler, that it is named as those of few steps are; or nothing."""
    if not NAMED.search(name):
        return ""
    return (
        f"{name} is named as models of few steps are, and the file does not hold how many, nor the scheduler: "
        "docs/models.md has their lines for model-config.yaml, without which such a model is drawn in 30 steps, wrong"
    )
