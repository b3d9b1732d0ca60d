"""Masks for inpainting: how they are read, and how the result is blended into the image.

A request's mask is a grey Pillow image of the result's size. 255 is repainted, 0 is protected.
"""

from collections.abc import Callable
from typing import Any

from sdxl_server.request.fields import GenerationRequest
from sdxl_server.request.uploads import Upload

MIN_PAINTED = 128  # of 255: this and more is repainted
MAX_JUDGED = 1024  # pixels of a side that are read to recognise a drawing
ONE_COLOUR = 32  # levels; lossy files and soft edges spread a colour
KEPT_DRAWING = "kept drawing"  # in a mask's info: strokes that were drawn are protected
BLEND_WIDTH = 4  # pixels, by default


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


def fill_mask(image: Any, mask: Any) -> Any:
    """Return an image whose masked pixels have colours from around the mask; nearer pixels weigh more.

    Both are halved until no cell is empty, and each empty cell then takes the colour of the next coarser one.
    """
    import numpy as np
    from PIL import Image

    weights = (np.asarray(mask)[..., None] == 0).astype(np.float32)
    if not weights.any():
        return image
    pixels, levels = np.asarray(image) * weights, []
    while not weights.all():
        levels.append((pixels, weights))
        pixels, weights = _sum_blocks(pixels), _sum_blocks(weights)
    filled = pixels / weights
    for pixels, weights in reversed(levels):
        coarse = Image.fromarray(filled.round().astype(np.uint8))
        larger = np.asarray(coarse.resize(weights.shape[1::-1], Image.Resampling.BILINEAR))
        filled = np.where(weights > 0, pixels / np.maximum(weights, 1), larger)
    return Image.fromarray(filled.round().astype(np.uint8))


def _sum_blocks(values: Any) -> Any:
    """Return the sums of blocks of 2×2 cells: height, width, channels."""
    import numpy as np

    height, width, channels = values.shape
    even = np.pad(values, ((0, height % 2), (0, width % 2), (0, 0)))
    return even.reshape(-(-height // 2), 2, -(-width // 2), 2, channels).sum(axis=(1, 3))


def blend(generated: Any, image: Any, mask: Any, *, width: int = BLEND_WIDTH) -> Any:
    """Return the generated pixels inside the mask, and the exact pixels of the image outside.

    The seam is blended inside the mask. Parts of the mask that are thinner are not blended. White pixels of the image
    are not blended either: they were transparent or bars, and a line would stay visible.

    Args:
        width: of the seam, in pixels.
    """
    import numpy as np
    from PIL import Image

    layers = [np.asarray(mask)]
    for _ in range(width - 1):
        layers.append(_filter_neighbours(layers[-1], np.minimum))
    thick = layers[-1]
    for _ in range(width - 1):
        thick = _filter_neighbours(thick, np.maximum)
    ramp = (np.sum(layers, axis=0, dtype=np.uint16) // len(layers)).astype(np.uint8)
    is_blended = (thick > 0) & (np.asarray(image).min(axis=-1) < 255)
    share = np.where(is_blended, ramp, layers[0])
    return Image.composite(generated, image, Image.fromarray(share))


def _filter_neighbours(values: Any, choose: Callable[[Any, Any], Any]) -> Any:
    """Return the minimum or maximum of each pixel and its eight neighbours; Pillow's filters are much slower."""
    import numpy as np

    padded = np.pad(values, 1, mode="edge")
    rows = choose(choose(padded[:-2], padded[1:-1]), padded[2:])
    return choose(choose(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])


def choose_crop(request: GenerationRequest) -> tuple[int, int, int, int]:
    """Return the box to draw: the mask's box with its padding, enlarged to the aspect that is drawn.

    It lies inside the image, with less padding if necessary, unless the mask's box itself does not fit. Its numbers are
    left, top, right and bottom, in pixels.
    """
    mask, padding, drawn = request.mask_image, request.padding_mask_crop or 0, (request.width, request.height)
    left, top, right, bottom = mask.getbbox() or (0, 0, *mask.size)
    axes = list(zip((left, top), (right, bottom), mask.size, drawn, strict=True))
    wanted = max((min(high + padding, end) - max(low - padding, 0)) / side for low, high, end, side in axes)
    needed = max((high - low) / side for low, high, _, side in axes)
    scale = min(wanted, max(needed, min(end / side for _, _, end, side in axes)))
    starts, sides = [], [max(round(scale * side), 1) for side in drawn]
    for (low, high, end, _), side in zip(axes, sides, strict=True):
        start = (low + high - side) // 2
        starts.append(min(max(start, 0), end - side) if side <= end else (end - side) // 2)
    return starts[0], starts[1], starts[0] + sides[0], starts[1] + sides[1]


def prepare_drawing(request: GenerationRequest) -> tuple[Any, Any]:
    """Return the image and the mask that the pipeline gets, cropped and filled as the request says."""
    image, mask = request.image, request.mask_image
    if request.is_crop:
        box, size = choose_crop(request), (request.width, request.height)
        image, mask = (resize_image(_cut(each, box, "white"), size) for each in (image, mask))
        mask = binarize_mask(mask)
    return fill_mask(image, mask) if request.mask_fill == "surroundings" else image, mask


def crop_map(map_image: Any, request: GenerationRequest) -> Any:
    """Return the part of a control's image that belongs to what is drawn; black outside of the image."""
    if not request.is_crop:
        return map_image
    return resize_image(_cut(map_image, choose_crop(request), "black"), (request.width, request.height))


def _cut(image: Any, box: tuple[int, int, int, int], colour: str) -> Any:
    """Return a part of an image, of one colour where the box is outside of the image."""
    from PIL import Image

    left, top, right, bottom = box
    cut = Image.new(image.mode, (right - left, bottom - top), colour)
    cut.paste(image, (-left, -top))
    return cut


def resize_image(image: Any, size: tuple[int, int]) -> Any:
    """Return an image of another size; it is stretched if the aspect differs."""
    return image if image.size == size else image.resize(size, choose_filter(image))


def choose_filter(image: Any) -> Any:
    """Return Pillow's filter for resizing: LANCZOS rings at a mask's edges."""
    from PIL import Image

    return Image.Resampling.BILINEAR if image.mode == "L" else Image.Resampling.LANCZOS


def keep_protected(generated: Any, request: GenerationRequest) -> Any:
    """Return a result, or a preview, with the protected pixels of the uploaded image."""
    if request.mask_image is None:
        return generated
    if request.is_crop:
        left, top, right, bottom = choose_crop(request)
        whole = request.image.copy()
        whole.paste(resize_image(generated, (right - left, bottom - top)), (left, top))
        generated = whole
    return blend(generated, request.image, request.mask_image, width=request.mask_blur or 0)
