"""Resizing of an uploaded image and its mask, and the size of the result if the request names none."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from sdxl_server.config.settings import MIN_SIDE
from sdxl_server.errors import RequestError
from sdxl_server.request.controls import RequestControl
from sdxl_server.request.limits import Limits
from sdxl_server.request.masks import (
    BLEND_WIDTH,
    KEPT_DRAWING,
    binarize_mask,
    choose_filter,
    is_drawing,
    read_mask,
    resize_image,
)
from sdxl_server.request.uploads import MASK

# The training sizes of Stable Diffusion XL (arXiv 2307.01952, appendix I): short and long side, in both orientations.
TRAINED_SIDE = 1024
TRAINED = (
    *((512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600)),
    *((640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152)),
    *((896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024)),
)
MAX_PASTED = 2  # an image to paste a crop into has sides of this many times max_side
SAME_ASPECT = 0.02  # difference of logarithms: 10 pixels of 500
Size = tuple[int, int]  # width, height


def resize_images(used: dict[str, Any], given: Mapping[str, Any], limits: Limits, named: Mapping[str, str]) -> None:
    """Resize the image and its mask to the size of the result. An image to paste into keeps its size up to a limit.

    Args:
        used: the checked fields of the request; sizes and images are replaced.
        given: the checked fields that the client sent.
        named: each field's name in the client's API.

    Raises:
        RequestError: the mask has neither the aspect of the image nor the aspect of the result.
    """
    image = used["image"].pixels
    size, how = _set_size(used, given, limits, image.size)
    if MASK in used and used.get("padding_mask_crop") is not None:
        size = _limit_size(image.size, MAX_PASTED * limits.config.max_side)
    used["image"] = _resize(image, size, how, bars="white")
    if MASK in used:
        is_inverted = bool(used.get("invert_mask"))
        mask = read_mask(used[MASK], is_inverted=is_inverted)
        if min(abs(compute_aspect(mask.size) - compute_aspect(other)) for other in (image.size, size)) > SAME_ASPECT:
            raise RequestError(
                f"{named[MASK]} takes the aspect of the image, such as its {image.width}x{image.height} pixels, "
                f"not {mask.width}x{mask.height}",
                param=named[MASK],
            )
        is_kept = not is_inverted and is_drawing(used[MASK])
        used[MASK] = binarize_mask(_resize(mask, size, how, bars="white"))  # the bars are never protected
        used[MASK].info[KEPT_DRAWING] = is_kept
        used.setdefault("mask_blur", BLEND_WIDTH)


def resize_controls(used: dict[str, Any], given: Mapping[str, Any], limits: Limits) -> None:
    """Resize the maps of controls to the size of the uploaded image or of the result.

    Without an image to start from the first map decides the size of the result.

    Args:
        used, given: see `resize_images`.
    """
    controls = used["control"]
    maps = [each.name for each in controls if limits.controls[each.name].is_map]
    if maps and "image" not in used:
        _set_size(used, given, limits, next(each.image.pixels.size for each in controls if each.name == maps[0]))
    size = used["image"].size if "image" in used else (used["width"], used["height"])
    how = used.get("resize_mode", "crop")
    used["control"] = tuple(
        dataclasses.replace(
            each, image=_make_map(each, size, each.resize_mode or how) if each.name in maps else each.image.pixels
        )
        for each in controls
    )


def _make_map(control: RequestControl, size: Size, how: str) -> Any:
    """Return the map of a control in this size. It is made before black bars are added, which are no edges."""
    from PIL import ImageOps

    image = control.image.pixels
    if how != "pad":
        return control.preprocess(_resize(image, size, how, bars="black"))
    scale = min(size[0] / image.width, size[1] / image.height)
    inside = max(round(scale * image.width), 1), max(round(scale * image.height), 1)
    return ImageOps.pad(control.preprocess(resize_image(image, inside)), size, color="black")


def _set_size(used: dict[str, Any], given: Mapping[str, Any], limits: Limits, image: Size) -> tuple[Size, str]:
    """Set the size of the result by the size of an image, where the client gave none. Return it and the resize mode."""
    width, height = given.get("width"), given.get("height")
    if width is None or height is None:
        used["width"], used["height"] = choose_size(image, limits, width=width, height=height)
    return (used["width"], used["height"]), used.setdefault("resize_mode", "crop")


def _resize(image: Any, size: Size, how: str, *, bars: str) -> Any:
    from PIL import ImageOps

    if image.size == size or how == "stretch":
        return resize_image(image, size)
    if how == "pad":
        return ImageOps.pad(image, size, choose_filter(image), color=bars)
    return ImageOps.fit(image, size, choose_filter(image))


def _limit_size(size: Size, most: int) -> Size:
    """Return a size of the same aspect with sides of at most `most` pixels."""
    scale = min(most / max(size), 1)
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def choose_size(image: Size, limits: Limits, *, width: int | None = None, height: int | None = None) -> Size:
    """Return the allowed size with the aspect nearest to an image's; a given side is kept."""
    sizes = limits.allowed_sizes or list_sizes(limits.own_side, limits.multiple, limits.config.max_side)
    if width is not None or height is not None:
        fitting = [each for each in limits.allowed_sizes if width in (None, each[0]) and height in (None, each[1])]
        sizes = tuple(fitting) or (_follow_aspect(image, limits, width=width, height=height),)
    wanted = compute_aspect(image)
    return min(sizes, key=lambda size: (round(abs(compute_aspect(size) - wanted), 6), -size[0] * size[1]))


def compute_aspect(size: Size) -> float:
    """Return the logarithm of width / height; tall and wide images are equally far from 0."""
    return math.log(size[0] / size[1])


def _follow_aspect(image: Size, limits: Limits, *, width: int | None, height: int | None) -> Size:
    if width is not None:
        return width, _round_side(width * image[1] / image[0], limits.multiple, limits.config.max_side)
    other = 0 if height is None else height
    return _round_side(other * image[0] / image[1], limits.multiple, limits.config.max_side), other


@functools.cache
def list_sizes(own_side: int, multiple: int, max_side: int) -> tuple[Size, ...]:
    """Return sizes with about the area of the model's own square.

    Args:
        own_side: side of the model's own square, in pixels.
        multiple: all sides are multiples of this.
        max_side: the largest side. A longer size gets smaller and keeps its aspect.
    """
    sizes: list[Size] = []
    for short, long in TRAINED:
        scale = min(own_side / TRAINED_SIDE, max_side / long)
        low, high = (_round_side(side * scale, multiple, max_side) for side in (short, long))
        sizes += [(low, high), (high, low)]
    return tuple(dict.fromkeys(sizes))


def _round_side(side: float, multiple: int, max_side: int) -> int:
    """Return the nearest allowed multiple, or the nearest multiple of 8 if none is allowed."""
    step = multiple if max_side // multiple * multiple >= MIN_SIDE else 8
    least, most = math.ceil(MIN_SIDE / step) * step, max_side // step * step
    return min(max(round(side / step) * step, least), most)
