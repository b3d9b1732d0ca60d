"""Check finished images with the model's safety checker."""

from collections.abc import Callable
from typing import Any

from sdxl_server.diffusion.stand_ins import StandIn, check_finite
from sdxl_server.errors import FlaggedError
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.model.safety_checker import SAFETY_CHECKER


class SafetyCheckerStandIn(StandIn):
    """The safety checker with another function for its vision model. diffusers' own code decides."""

    reads = (
        *StandIn.reads,
        *("visual_projection", "concept_embeds", "concept_embeds_weights"),
        *("special_care_embeds", "special_care_embeds_weights"),
    )

    def __init__(self, model: Any, run: Callable[..., Any]) -> None:
        super().__init__(model)
        self._run, self._decide = run, type(model).forward

    def vision_model(self, pixels: Any) -> tuple[None, Any]:
        """Return what the checker reads of the vision model's output: its second entry, one row per image."""
        row = self._run(pixels)[1].float()
        check_finite(row, "the safety checker's result")  # NaN would flag nothing
        return None, row

    def forward(self, pixels: Any) -> list[bool]:
        """Say for each image whether it is flagged."""
        import numpy as np

        _, flagged = self._decide(self, pixels, [np.empty(0) for _ in pixels])  # it overwrites flagged images
        return flagged


def check_safety(loaded: LoadedPipeline, image: Any, *, seed: int | None) -> None:
    """Refuse a finished image that the safety checker flags, if the configuration asks for it.

    Args:
        image: a Pillow image.
        seed: of the image; None for an uploaded one.

    Raises:
        FlaggedError: names the seed.
        NotFiniteError: the checker returned NaN or infinity.
    """
    if SAFETY_CHECKER not in loaded.functions:
        return
    checker = SafetyCheckerStandIn(loaded.pipeline.safety_checker, loaded.functions[SAFETY_CHECKER])
    pixels = loaded.pipeline.feature_extractor(image, return_tensors="pt").pixel_values
    if any(checker(pixels.to(checker.device, checker.dtype))):
        if seed is None:
            raise FlaggedError("the safety checker flagged the upscaled image, so it is not sent", param="image")
        raise FlaggedError(
            f"the safety checker flagged the image of seed {seed}, so it is not sent; change the prompt or the seed",
            param="prompt",
        )
