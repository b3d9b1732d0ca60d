"""Masks for inpainting: how they are read, and how the result is blended into the image.

A request's mask is a grey Pillow image of the result's size. 255 is repainted, 0 is protected.
"""

from typing import Any

from sdxl_server.request.fields import GenerationRequest
from sdxl_server.request.uploads import Upload

MIN_PAINTED = 128  # of 255: this and more is repainted
MAX_JUDGED = 1024  # pixels of a side that are read to recognise a drawing
ONE_COLOUR = 32  # levels; lossy files and soft edges spread a colour
KEPT_DRAWING = "kept drawing"  # in a mask's info: strokes that were drawn are protected
BLEND_WIDTH = 4  # pixels


def read_mask(upload: Upload, *, is_inverted: bool = False) -> Any:
    """Return an uploaded mask in grey: transparent pixels are repainted, or white ones if none are transparent."""
    from PIL import ImageOps

    is_transparent = upload.alpha is not None
    mask = _read_opacity(upload.alpha) if is_transparent else upload.pixels.convert("L")
    return ImageOps.invert(mask) if is_inverted != is_transparent else mask


def _read_opacity(alpha: Any) -> Any:
    """Return the opacity of a mask. A brush may be half transparent: then its strokes are the opaque pixels."""
    low, high = alpha.getextrema()
    return alpha.point(lambda value: value * 255 // high) if low < high < MIN_PAINTED else alpha


def is_drawing(upload: Upload) -> bool:
    """Say whether a mask looks like strokes of one colour on a transparent canvas, as drawing programs make them.

    The edge of such a canvas is mostly transparent. Masks for OpenAI's API have holes in an opaque image.
    """
    import numpy as np

    if upload.alpha is None:
        return False
    step = max(upload.alpha.size) // MAX_JUDGED + 1
    layers = (upload.alpha, _read_opacity(upload.alpha), upload.pixels)
    alpha, opacity, pixels = (np.asarray(each)[::step, ::step] for each in layers)
    is_drawn = opacity >= MIN_PAINTED
    edge = np.concatenate([is_drawn[0], is_drawn[-1], is_drawn[:, 0], is_drawn[:, -1]])
    if not is_drawn.any() or edge.mean() > 0.5:
        return False
    share = alpha[is_drawn, None] / 255
    colours = 255 - (255 - pixels[is_drawn]) / share  # without the white behind
    return bool(np.ptp(colours, axis=0).max() <= ONE_COLOUR)


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
