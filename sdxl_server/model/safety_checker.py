"""The safety checker of Stable Diffusion 1.x: a CLIP model that compares images with concepts."""

from pathlib import Path
from typing import Any

from sdxl_server.errors import ConfigError
from sdxl_server.model.families import Family
from sdxl_server.model.folders import check_component, load_weights, write_redownload_command

SAFETY_CHECKER, FEATURE_EXTRACTOR = "safety_checker", "feature_extractor"


def check_has_safety_checker(folder: Path, family: Family) -> None:
    """Refuse a pipeline's folder without a safety checker.

    Raises:
        ConfigError: names the setting and what to do.
    """
    if family.is_xl:
        raise ConfigError(
            "handler.safety_checker: model takes a model with a safety checker, and Stable Diffusion XL has none: set "
            "it to null"
        )
    remedy = f"{write_redownload_command(folder)} --safety-checker"
    for name in (SAFETY_CHECKER, FEATURE_EXTRACTOR):
        if not (folder / name).is_dir():
            raise ConfigError(
                f"handler.safety_checker: model takes a folder with {name}, and {folder} has none: set it to null, or "
                f"download the model by: {remedy}"
            )
        check_component(folder / name, remedy=remedy)


def load_safety_checker(folder: Path, dtype: Any) -> dict[str, Any]:
    """Return the safety checker of a pipeline's folder, and what prepares images for it.

    Args:
        dtype: torch's type for the weights of its vision model. Thresholds decide, so the comparison is in float32.
    """
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessorPil

    checker = load_weights(StableDiffusionSafetyChecker, folder / SAFETY_CHECKER, dtype)
    checker.visual_projection.float()
    for parameter in checker.parameters(recurse=False):
        parameter.data = parameter.data.float()
    extractor = CLIPImageProcessorPil.from_pretrained(folder / FEATURE_EXTRACTOR, local_files_only=True)
    return {SAFETY_CHECKER: checker, FEATURE_EXTRACTOR: extractor}
