"""Masks for inpainting: how they are read, and how the result is blended into the image.

A request's mask is a grey Pillow image of the result's size. 255 is repainted, 0 is protected.
"""

from typing import Any

from sdxl_server.request.fields import GenerationRequest
from sdxl_server.request.uploads import Upload

MIN_PAINTED = 128  # of 255: this and more is repainted
BLEND_WIDTH = 4  # pixels


def read_mask(upload: Upload) -> Any:
    """Return an uploaded mask in grey: transparent pixels are repainted, or white ones if none are transparent."""
    from PIL import ImageOps

    return upload.pixels.convert("L") if upload.alpha is None else ImageOps.invert(upload.alpha)


def has_holes(upload: Upload) -> bool:
    """Say whether an image's own transparency is a mask that repaints something."""
    return upload.alpha is not None and upload.alpha.getextrema()[0] <= 255 - MIN_PAINTED


def binarize_mask(mask: Any) -> Any:
    """Return a mask of 0 and 255 only, without soft edges and JPEG artefacts."""
    return mask.point(lambda value: 255 if value >= MIN_PAINTED else 0)


def cover_cells(mask: Any, cell: int) -> Any:
    """Return a mask of whole latent cells. A cell is repainted if any of its pixels is.

    diffusers reads one pixel per cell.
    """
    from PIL import Image

    small = mask.resize((mask.width // cell, mask.height // cell), Image.Resampling.BOX)
    return small.point(lambda value: 255 if value else 0).resize(mask.size, Image.Resampling.NEAREST)


def blend(generated: Any, image: Any, mask: Any) -> Any:
    """Return the generated pixels inside the mask, and the exact pixels of the image outside.

    The seam is blended inside the mask, a few pixels wide. Thin parts of the mask are not blended. White pixels of the
    image are not blended either: they were transparent or bars, and a line would stay visible.
    """
    import numpy as np
    from PIL import Image, ImageFilter

    layers = [mask]
    for _ in range(BLEND_WIDTH - 1):
        layers.append(layers[-1].filter(ImageFilter.MinFilter(3)))
    thick = layers[-1]
    for _ in range(BLEND_WIDTH - 1):
        thick = thick.filter(ImageFilter.MaxFilter(3))
    ramp = np.mean([np.asarray(layer) for layer in layers], axis=0).astype(np.uint8)
    is_blended = (np.asarray(thick) > 0) & (np.asarray(image).min(axis=-1) < 255)
    share = np.where(is_blended, ramp, np.asarray(mask))
    return Image.composite(generated, image, Image.fromarray(share))


def keep_protected(generated: Any, request: GenerationRequest) -> Any:
    """Return a result, or a preview, with the protected pixels of the uploaded image."""
    return generated if request.mask_image is None else blend(generated, request.image, request.mask_image)
