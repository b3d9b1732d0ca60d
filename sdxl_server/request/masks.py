"""What a mask is: which pixels are painted anew, where that is blended, and what a client is told of it.

A mask as a request holds it is a Pillow image in grey, as large as the picture: 255 where the image is painted anew, 0
where it is protected.
"""

from typing import Any

from sdxl_server.request.fields import GenerationRequest
from sdxl_server.request.uploads import Upload

HALF = 128  # of 255: from here on a pixel is painted anew
BLEND = 4  # pixels


def read_mask(upload: Upload) -> Any:
    """Return an uploaded mask in grey: one with any transparency tells by that, else white is painted anew."""
    from PIL import ImageOps

    return upload.pixels.convert("L") if upload.alpha is None else ImageOps.invert(upload.alpha)


def has_holes(upload: Upload) -> bool:
    """Say whether a picture's own transparency would be a mask under which something is painted anew."""
    return upload.alpha is not None and upload.alpha.getextrema()[0] <= 255 - HALF


def decide_pixels(mask: Any) -> Any:
    """Return a mask without what lies between: soft edges, and what JPEG leaves around hard ones."""
    return mask.point(lambda value: 255 if value >= HALF else 0)


def cover_cells(mask: Any, cell: int) -> Any:
    """Return a mask of whole latents: each of whose pixels the mask touches any; diffusers looks at one of them."""
    from PIL import Image

    small = mask.resize((mask.width // cell, mask.height // cell), Image.Resampling.BOX)
    return small.point(lambda value: 255 if value else 0).resize(mask.size, Image.Resampling.NEAREST)


def blend(picture: Any, image: Any, mask: Any) -> Any:
    """Return what was drawn where the mask says so, and everywhere else the image, bit by bit.

    The seam is blended within the mask, over some pixels along its edge. Where the mask is too thin for that it is not,
    nor where the image is white: so is what was transparent, and bars, of which a line would be left.
    """
    import numpy as np
    from PIL import Image, ImageFilter

    layers = [mask]
    for _ in range(BLEND - 1):
        layers.append(layers[-1].filter(ImageFilter.MinFilter(3)))
    thick = layers[-1]
    for _ in range(BLEND - 1):
        thick = thick.filter(ImageFilter.MaxFilter(3))
    ramp = np.mean([np.asarray(layer) for layer in layers], axis=0).astype(np.uint8)
    is_blended = (np.asarray(thick) > 0) & (np.asarray(image).min(axis=-1) < 255)
    share = np.where(is_blended, ramp, np.asarray(mask))
    return Image.composite(picture, image, Image.fromarray(share))


def keep_protected(picture: Any, request: GenerationRequest) -> Any:
    """Return a picture, or a preview, in which what the request's mask protects is the image as it was."""
    return picture if request.mask_image is None else blend(picture, request.image, request.mask_image)
