"""The kinds of models that are served; each is one row."""

import json
from dataclasses import dataclass
from pathlib import Path

from sdxl_server.errors import ConfigError
from sdxl_server.schemas import shorten


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        text_to_image, image_to_image, inpainting: diffusers' pipeline classes.
        text_encoders: the names of its text encoders in a pipeline.
        lacks: the fields of a request that mean nothing to it.
    """

    text_to_image: str
    image_to_image: str
    inpainting: str
    text_encoders: tuple[str, ...]
    lacks: tuple[str, ...] = ()


FAMILIES = {
    "sdxl": Family(
        text_to_image="StableDiffusionXLPipeline",
        image_to_image="StableDiffusionXLImg2ImgPipeline",
        inpainting="StableDiffusionXLInpaintPipeline",
        text_encoders=("text_encoder", "text_encoder_2"),
    ),
    "sd": Family(
        text_to_image="StableDiffusionPipeline",
        image_to_image="StableDiffusionImg2ImgPipeline",
        inpainting="StableDiffusionInpaintPipeline",
        text_encoders=("text_encoder",),
        lacks=(
            *("prompt_2", "negative_prompt_2", "guidance_rescale", "denoising_end"),
            *("original_size", "crops_coords_top_left", "target_size"),
        ),
    ),
}
# Pipelines that are published and not served.
OTHERS = {
    "StableDiffusionXLImg2ImgPipeline": "the refiner of Stable Diffusion XL, which finishes pictures that a base began",
    "StableDiffusionXLInstructPix2PixPipeline": "an instruct-pix2pix model, which edits pictures by instruction",
    "StableDiffusionInstructPix2PixPipeline": "an instruct-pix2pix model, which edits pictures by instruction",
    "StableDiffusionXLInpaintPipeline": "an inpainting model of nine channels",
    "StableDiffusionInpaintPipeline": "an inpainting model of nine channels",
}
XL = {True: "sdxl", False: "sd"}  # what `is_xl` stands for


def find_family(folder: Path, *, is_xl: bool | None) -> Family:
    """Return the family of the pipeline in a folder.

    Args:
        is_xl: what the configuration says of it; None: nothing.

    Raises:
        ConfigError: there is no pipeline, one that is not served, or another than is_xl says.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"handler.model_path takes the folder of a diffusers pipeline, but {folder} has no readable "
            f"model_index.json; python Download_model.py makes one ({error})"
        ) from error
    held = index.get("_class_name") if isinstance(index, dict) else None
    if isinstance(held, str) and held in OTHERS:
        raise ConfigError(f"handler.model_path: {folder} holds {OTHERS[held]} ({held}); that is not served")
    if is_xl is not None and held != FAMILIES[XL[is_xl]].text_to_image:
        raise ConfigError(
            f"handler.is_xl: {str(is_xl).lower()} takes a {FAMILIES[XL[is_xl]].text_to_image}, "
            f"but {folder} holds a {shorten(held)}"
        )
    for family in FAMILIES.values():
        if family.text_to_image == held:
            return family
    names = ", ".join(family.text_to_image for family in FAMILIES.values())
    raise ConfigError(f"handler.model_path takes the folder of one of {names}, but {folder} holds a {shorten(held)}")
