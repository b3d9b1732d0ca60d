"""The kinds of models that are served; each is one row."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from sdxl_server.errors import ConfigError
from sdxl_server.model.folders import read_json
from sdxl_server.schemas import shorten


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        saved_as: what a folder of it may say in its model_index.json: diffusers has base models inpaint, too.
        text_to_image, image_to_image, inpainting: diffusers' pipeline classes; of an inpainting model they are one.
        text_encoders: the names of its text encoders in a pipeline.
        lacks: the fields of a request that mean nothing to it.
        channels: that its UNet takes.
        needs: the fields beside the prompt that a request must have.
    """

    saved_as: tuple[str, ...]
    text_to_image: str
    image_to_image: str
    inpainting: str
    text_encoders: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    channels: int = 4
    needs: tuple[str, ...] = ()

    @property
    def is_xl(self) -> bool:
        """Say whether it is Stable Diffusion XL, and not 1.x or 2.x."""
        return len(self.text_encoders) > 1


def _make_inpainting(family: Family) -> Family:
    """Return the kind whose UNet is given the mask and what it leaves of the image beside the latents."""
    one = family.inpainting
    needs = ("image", "mask_image")
    return dataclasses.replace(family, text_to_image=one, image_to_image=one, channels=9, needs=needs)


FAMILIES = {
    "sdxl": Family(
        saved_as=("StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline"),
        text_to_image="StableDiffusionXLPipeline",
        image_to_image="StableDiffusionXLImg2ImgPipeline",
        inpainting="StableDiffusionXLInpaintPipeline",
        text_encoders=("text_encoder", "text_encoder_2"),
    ),
    "sd": Family(
        saved_as=("StableDiffusionPipeline", "StableDiffusionInpaintPipeline", "LatentConsistencyModelPipeline"),
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
FAMILIES |= {f"{name}-inpainting": _make_inpainting(family) for name, family in FAMILIES.items()}
# Pipelines that are published and not served.
OTHERS = {
    "StableDiffusionXLImg2ImgPipeline": "the refiner of Stable Diffusion XL, which finishes pictures that a base began",
    "StableDiffusionXLInstructPix2PixPipeline": "an instruct-pix2pix model, which edits pictures by instruction",
    "StableDiffusionInstructPix2PixPipeline": "an instruct-pix2pix model, which edits pictures by instruction",
}


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
    kinds = [family for family in FAMILIES.values() if held in family.saved_as]
    if is_xl is not None and not any(family.is_xl is is_xl for family in kinds):
        wanted = next(family.text_to_image for family in FAMILIES.values() if family.is_xl is is_xl)
        raise ConfigError(f"handler.is_xl: {str(is_xl).lower()} takes a {wanted}, but {folder} holds a {shorten(held)}")
    if not kinds:
        names = ", ".join(dict.fromkeys(family.text_to_image for family in FAMILIES.values()))
        raise ConfigError(
            f"handler.model_path takes the folder of one of {names}, but {folder} holds a {shorten(held)}"
        )
    # Where they do not say it, diffusers takes 4; where they cannot be read, the reading of the pipeline tells why.
    channels = read_json(folder / "unet/config.json").get("in_channels", 4)
    family = next((each for each in kinds if each.channels == channels), None)
    if family is None:
        raise ConfigError(
            f"handler.model_path: {folder} holds a UNet of {shorten(channels)} channels; those of 4, and of 9 for "
            "inpainting, are served"
        )
    return family
