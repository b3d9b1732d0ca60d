"""Judge from pixels whether an image shows the requested colours, shape, size and position."""

from dataclasses import astuple, dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from demo.shapes import COLOURS, POSITIONS, SHAPES, Scene, Thing, draw_shape

FARTHEST_COLOUR = 75.0  # in RGB; beyond it a pixel has no colour
LEAST_BACKGROUND = 0.5  # share of the image
LEAST_THING = 0.004  # share of the image; less is a speck
LARGEST_SECOND = 0.2  # of the thing; more is a second thing
BOUNDS = {"small": (0.075, 0.157), "large": (0.157, 0.29)}  # half the extent, in shorter sides
FARTHEST_POSITION = 0.12  # share of width and height
LEAST_OVERLAP = 0.65
LEAST_ASPECT = 0.7
GRID = 32

Pixels = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Verdict:
    """Say for each feature of an image whether it is as requested."""

    background: bool
    colour: bool
    shape: bool
    size: bool
    position: bool

    @property
    def is_right(self) -> bool:
        return all(astuple(self))


NOTHING = Thing("", "", "", "")


def name_pixels(image: Image.Image) -> Pixels:
    """Return each pixel's colour as an index into COLOURS; -1: near none."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    palette = np.array(list(COLOURS.values()), dtype=np.float32)
    distances = np.linalg.norm(pixels[:, :, None] - palette, axis=-1)
    return np.where(distances.min(-1) < FARTHEST_COLOUR, distances.argmin(-1), -1)


def list_components(mask: Pixels) -> list[Pixels]:
    """Return the connected parts of a mask as masks, the biggest first."""
    numbers = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # each pixel takes its neighbours' greatest number until nothing changes
        spread = numbers.copy()
        for axis in (0, 1):
            for one, other in ((slice(1, None), slice(None, -1)), (slice(None, -1), slice(1, None))):
                to, source = (one, other) if axis == 0 else ((slice(None), one), (slice(None), other))
                spread[to] = np.maximum(spread[to], spread[source])
        spread = np.where(mask, spread, 0)
        if (spread == numbers).all():
            break
        numbers = spread
    found = [numbers == number for number in np.unique(numbers[mask])]
    return sorted(found, key=lambda part: -int(part.sum()))


def fit_grid(mask: Pixels) -> Pixels:
    """Return a mask's bounding box stretched to the grid."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    image = Image.fromarray((box * 255).astype(np.uint8))
    return np.asarray(image.resize((GRID, GRID), Image.Resampling.BOX)) > 127


@cache
def draw_template(shape: str) -> Pixels:
    image = Image.new("L", (256, 256))
    draw_shape(image, shape, centre=(128, 128), radius=100, fill=255)
    return fit_grid(np.asarray(image) > 127)


def name_shape(mask: Pixels) -> str:
    """Return the shape whose template the mask overlaps best, or nothing."""
    grid = fit_grid(mask)
    overlaps = {}
    for shape in SHAPES:
        template = draw_template(shape)
        overlaps[shape] = (grid & template).sum() / (grid | template).sum()
    best = max(overlaps, key=lambda shape: overlaps[shape])
    return best if overlaps[best] >= LEAST_OVERLAP else ""


def find_thing(colours: Pixels, background: int, *, columns: slice) -> Thing:
    """Return the thing in some columns of an image. Unclear features are empty."""
    height, width = colours.shape
    mask = np.zeros(colours.shape, dtype=bool)
    mask[:, columns] = colours[:, columns] != background
    components = list_components(mask)
    if not components or components[0].mean() < LEAST_THING:
        return NOTHING
    thing = components[0]
    named = colours[thing]
    counts = np.bincount(named[named >= 0], minlength=len(COLOURS))
    colour = list(COLOURS)[counts.argmax()] if counts.max() > named.size / 2 else ""
    ys, xs = np.nonzero(thing)
    extents = (xs.max() - xs.min() + 1, ys.max() - ys.min() + 1)
    x, y = (xs.max() + xs.min() + 1) / 2 / width, (ys.max() + ys.min() + 1) / 2 / height
    offsets = {name: max(abs(x - at[0]), abs(y - at[1])) for name, at in POSITIONS.items()}
    nearest = min(offsets, key=lambda name: offsets[name])
    radius = max(extents) / 2 / min(width, height)
    is_alone = len(components) == 1 or components[1].sum() < LARGEST_SECOND * thing.sum()
    is_regular = min(extents) >= LEAST_ASPECT * max(extents)
    return Thing(
        colour,
        name_shape(thing) if is_alone and is_regular else "",
        next((size for size, (least, most) in BOUNDS.items() if least <= radius < most), ""),
        nearest if offsets[nearest] <= FARTHEST_POSITION else "",
    )


def judge_picture(image: Image.Image, scene: Scene) -> Verdict:
    """Compare an image with the requested scene. An empty feature accepts any value.

    A scene of two things has one in each half of the image.
    """
    colours = name_pixels(image)
    counts = np.bincount(colours[colours >= 0], minlength=len(COLOURS))
    background = int(counts.argmax())
    if counts[background] < LEAST_BACKGROUND * colours.size:
        return Verdict(*[False] * 5)
    middle = colours.shape[1] // 2
    halves = [slice(None)] if len(scene.things) == 1 else [slice(middle), slice(middle, None)]
    found = [find_thing(colours, background, columns=half) for half in halves]
    pairs = [(astuple(asked), astuple(seen)) for asked, seen in zip(scene.things, found, strict=True)]
    return Verdict(
        scene.background in ("", list(COLOURS)[background]),
        *(all(asked[i] in ("", seen[i]) and seen != astuple(NOTHING) for asked, seen in pairs) for i in range(4)),
    )
