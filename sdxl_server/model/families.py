"""The kinds of models that are served, one row each."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from sdxl_server.errors import ConfigError
from sdxl_server.model.folders import load_json_object
from sdxl_server.schemas import shorten


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        saved_as: the class names that its model_index.json may hold. diffusers inpaints with base models, too.
        text_to_image, image_to_image, inpainting: diffusers' pipeline classes. An inpainting model has one for all.
        text_encoders: the names of its text encoders in a pipeline.
        lacks: request fields without a meaning for this model.
        channels: the input channels of its UNet.
        needs: the fields that a request must have besides the prompt.
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

    @property
    def models(self) -> tuple[str, ...]:
        """The components with weights."""
        return ("unet", "vae", *self.text_encoders)

    @property
    def components(self) -> tuple[str, ...]:
        """All components that are loaded."""
        tokenizers = (name.replace("text_encoder", "tokenizer") for name in self.text_encoders)
        return ("scheduler", *self.models, *tokenizers)


def _make_inpainting(family: Family) -> Family:
    """Return the kind whose UNet takes the mask and the masked image with the latents."""
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
# Published, but not served.
UNSERVED_PIPELINES = {
    "StableDiffusionXLImg2ImgPipeline": "the refiner of Stable Diffusion XL, which finishes a base model's images",
    "StableDiffusionXLInstructPix2PixPipeline": "an instruct-pix2pix model, which edits images by instruction",
    "StableDiffusionInstructPix2PixPipeline": "an instruct-pix2pix model, which edits images by instruction",
}


def find_family(folder: Path, *, is_xl: bool | None) -> Family:
    """Return the family of the pipeline in a folder.

    Args:
        is_xl: the setting; None if it is not set.

    Raises:
        ConfigError: the folder holds no pipeline, one that is not served, or one that contradicts is_xl.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"handler.model_path takes the folder of a diffusers pipeline, but {folder} has no readable "
            f"model_index.json; python Download_model.py downloads one ({error})"
        ) from error
    held = index.get("_class_name") if isinstance(index, dict) else None
    if isinstance(held, str) and held in UNSERVED_PIPELINES:
        raise ConfigError(f"handler.model_path: {folder} holds {UNSERVED_PIPELINES[held]} ({held}); that is not served")
    kinds = [family for family in FAMILIES.values() if held in family.saved_as]
    if is_xl is not None and not any(family.is_xl is is_xl for family in kinds):
        wanted = next(family.text_to_image for family in FAMILIES.values() if family.is_xl is is_xl)
        raise ConfigError(f"handler.is_xl: {str(is_xl).lower()} takes a {wanted}, but {folder} holds a {shorten(held)}")
    if not kinds:
        names = ", ".join(dict.fromkeys(family.text_to_image for family in FAMILIES.values()))
        raise ConfigError(
            f"handler.model_path takes the folder of one of {names}, but {folder} holds a {shorten(held)}"
        )
    # diffusers defaults to 4. An unreadable file is reported when the pipeline is loaded.
    channels = load_json_object(folder / "unet/config.json").get("in_channels", 4)
    family = next((each for each in kinds if each.channels == channels), None)
    if family is None:
        raise ConfigError(
            f"handler.model_path: {folder} holds a UNet of {shorten(channels)} channels; those of 4, and of 9 for "
            "inpainting, are served"
        )
    return family
