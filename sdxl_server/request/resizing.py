"""How a picture to start from is brought to the size to draw, and which that is where the request does not say."""

import functools
import math
from collections.abc import Mapping
from typing import Any

from sdxl_server.config.settings import MIN_SIDE
from sdxl_server.errors import RequestError
from sdxl_server.request.declaration import Bounds
from sdxl_server.request.masks import decide_pixels, read_mask
from sdxl_server.request.uploads import MASK

# What Stable Diffusion XL was trained on (arXiv 2307.01952, appendix I): short and long side, each way round.
TRAINED_SIDE = 1024
TRAINED = (
    *((512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600)),
    *((640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152)),
    *((896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024)),
)
SAME_ASPECT = 0.02  # of the logarithm: 10 pixels of 500
Size = tuple[int, int]  # width, height


def fit_images(used: dict[str, Any], given: Mapping[str, Any], bounds: Bounds) -> None:
    """Bring the image and its mask to the picture's size, never stretched.

    Args:
        used: the fields of the request, checked; its sizes and images are replaced.
        given: those that the client gave.

    Raises:
        RequestError: the mask has the aspect of neither the image nor the picture.
    """
    image = used["image"].pixels
    width, height = given.get("width"), given.get("height")
    if width is None or height is None:
        used["width"], used["height"] = choose_size(image.size, bounds, width=width, height=height)
    size, how = (used["width"], used["height"]), used.setdefault("resize_mode", "crop")
    used["image"] = _fit(image, size, how, bars="white")
    if MASK in used:
        mask = read_mask(used[MASK])
        if min(abs(measure_aspect(mask.size) - measure_aspect(other)) for other in (image.size, size)) > SAME_ASPECT:
            raise RequestError(
                f"{MASK} takes a picture of the image's aspect, such as one of its {image.width}x{image.height} "
                f"pixels, not {mask.width}x{mask.height}",
                param=MASK,
            )
        used[MASK] = decide_pixels(_fit(mask, size, how, bars="white"))  # no mask protects the bars


def _fit(image: Any, size: Size, how: str, *, bars: str) -> Any:
    from PIL import Image, ImageOps

    if image.size == size:
        return image
    method = Image.Resampling.BILINEAR if image.mode == "L" else Image.Resampling.LANCZOS  # which rings at edges
    if how == "pad":
        return ImageOps.pad(image, size, method, color=bars)
    return ImageOps.fit(image, size, method)


def choose_size(image: Size, bounds: Bounds, *, width: int | None = None, height: int | None = None) -> Size:
    """Return the size to draw at that suits an image's aspect, of those that are allowed, with a side that is given."""
    sizes = bounds.allowed_sizes or list_sizes(bounds.own_side, bounds.multiple, bounds.max_side)
    if width is not None or height is not None:
        fitting = [each for each in bounds.allowed_sizes if width in (None, each[0]) and height in (None, each[1])]
        sizes = tuple(fitting) or (_follow_aspect(image, bounds, width=width, height=height),)
    wanted = measure_aspect(image)
    return min(sizes, key=lambda size: (round(abs(measure_aspect(size) - wanted), 6), -size[0] * size[1]))


def measure_aspect(size: Size) -> float:
    """Return the logarithm of width by height: as far from 0 for a tall picture as for a wide one."""
    return math.log(size[0] / size[1])


def _follow_aspect(image: Size, bounds: Bounds, *, width: int | None, height: int | None) -> Size:
    if width is not None:
        return width, _round_side(width * image[1] / image[0], bounds.multiple, bounds.max_side)
    other = 0 if height is None else height
    return _round_side(other * image[0] / image[1], bounds.multiple, bounds.max_side), other


@functools.cache
def list_sizes(own_side: int, multiple: int, max_side: int) -> tuple[Size, ...]:
    """Return the sizes of about a model's own area, a square and others.

    Args:
        own_side: of the model's own square, in pixels.
        multiple: what the sides are multiples of.
        max_side: what no side exceeds; a longer size is made smaller, and keeps its aspect.
    """
    sizes: list[Size] = []
    for short, long in TRAINED:
        scale = min(own_side / TRAINED_SIDE, max_side / long)
        low, high = (_round_side(side * scale, multiple, max_side) for side in (short, long))
        sizes += [(low, high), (high, low)]
    return tuple(dict.fromkeys(sizes))


def _round_side(side: float, multiple: int, max_side: int) -> int:
    """Return the nearest multiple that a side may be, or where none may be, the nearest of eight."""
    step = multiple if max_side // multiple * multiple >= MIN_SIDE else 8
    least, most = math.ceil(MIN_SIDE / step) * step, max_side // step * step
    return min(max(round(side / step) * step, least), most)
