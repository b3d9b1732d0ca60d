"""The demonstration model's world: coloured shapes on coloured backgrounds, drawn and put into words."""

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 30, 40),
    "green": (30, 150, 50),
    "blue": (35, 60, 220),
    "yellow": (250, 220, 40),
    "purple": (150, 40, 170),
    "pink": (255, 140, 190),
    "cyan": (60, 205, 225),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
INVERTED = {  # the nearest of COLOURS to a colour's inverse; purple stays, for its inverse is no green of COLOURS
    **{"red": "cyan", "green": "pink", "blue": "yellow", "yellow": "blue", "purple": "purple", "pink": "green"},
    **{"cyan": "red", "white": "black", "black": "white"},
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 0.12, "large": 0.22}  # half the extent, as a share of the image's shorter side
POSITIONS = {  # the middle of the shape, as a share of width and height
    "left": (0.27, 0.5),
    "right": (0.73, 0.5),
    "top": (0.5, 0.27),
    "bottom": (0.5, 0.73),
    "centre": (0.5, 0.5),
}
LARGEST_SHIFT = 0.03  # of a drawn thing from its position, as a share of width and height
LARGEST_GROWTH = 0.08  # of its size
IMAGE_SIZE = 128
SUPERSAMPLING = 4
RING_HOLE = 0.55
HELD_OUT_SHARE = 0.15
SYNONYMS = {"small": ("small", "tiny"), "large": ("large", "big"), "centre": ("centre", "center", "middle")}
WORDS = (
    *COLOURS,
    *SHAPES,
    *(word for name in (*SIZES, *POSITIONS) for word in SYNONYMS.get(name, (name,))),
    *("a", "and", "at", "background", "in", "on", "the", "with", ","),
)

Move = tuple[float, float, float]  # right, down and larger, each from -1 to 1 of what is allowed


@dataclass(frozen=True)
class Thing:
    """One shape of a scene."""

    colour: str
    shape: str
    size: str
    position: str


@dataclass(frozen=True)
class Scene:
    """The content of an image: one thing, or two with the first on the left and the second on the right."""

    background: str
    things: tuple[Thing, ...]


def invert_scene(scene: Scene) -> Scene:
    """Return a scene in inverted colours."""
    things = tuple(replace(thing, colour=INVERTED[thing.colour]) for thing in scene.things)
    return Scene(INVERTED.get(scene.background, ""), things)


def is_held_out(background: str, thing: Thing) -> bool:
    """Say whether this combination is kept from training."""
    key = " ".join((background, thing.colour, thing.shape, thing.size, thing.position))
    return hashlib.sha256(key.encode()).digest()[0] < 256 * HELD_OUT_SHARE


def iterate_scenes() -> Iterator[Scene]:
    """Yield every scene of one thing, held out or not."""
    for background, colour, shape, size, position in itertools.product(COLOURS, COLOURS, SHAPES, SIZES, POSITIONS):
        if colour != background:
            yield Scene(background, (Thing(colour, shape, size, position),))


def choose_scene(random: Random, *, share_of_two: float = 0.25) -> Scene:
    """Return a random scene without held-out things."""
    positions = ("left", "right") if random.random() < share_of_two else (random.choice(list(POSITIONS)),)
    while True:
        background = random.choice(list(COLOURS))
        others = [colour for colour in COLOURS if colour != background]
        things = tuple(
            Thing(random.choice(others), random.choice(SHAPES), random.choice(list(SIZES)), position)
            for position in positions
        )
        if not any(is_held_out(background, thing) for thing in things):
            return Scene(background, things)


def list_corners(shape: str) -> list[tuple[float, float]]:
    """Return the corners of a shape with straight sides that fills the square from -1 to 1."""
    if shape == "square":
        return [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]
    if shape == "triangle":
        return [(0, -0.95), (1, 0.85), (-1, 0.85)]
    if shape == "cross":
        quarter = [(0.34, -1.0), (0.34, -0.34), (1.0, -0.34)]
        return [
            corner
            for x, y in ((1, 0), (0, 1), (-1, 0), (0, -1))
            for corner in [(a * x - b * y, a * y + b * x) for a, b in quarter]
        ]
    angles = [math.pi * (i / 5 - 0.5) for i in range(10)]
    radii = itertools.cycle((1.05, 0.45))
    return [
        (radius * math.cos(angle), radius * math.sin(angle) + 0.08)
        for angle, radius in zip(angles, radii, strict=False)
    ]


def draw_shape(image: Image.Image, shape: str, *, centre: tuple[float, float], radius: float, fill: object) -> None:
    """Draw one shape into an image, in its pixels."""
    draw = ImageDraw.Draw(image)
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=fill)  # type: ignore[arg-type]
    elif shape == "ring":
        draw.ellipse(box, outline=fill, width=round(radius * (1 - RING_HOLE)))  # type: ignore[arg-type]
    else:
        draw.polygon([(x + radius * a, y + radius * b) for a, b in list_corners(shape)], fill=fill)  # type: ignore[arg-type]


def choose_move(random: Random) -> Move:
    return random.uniform(-1, 1), random.uniform(-1, 1), random.uniform(-1, 1)


def place_thing(thing: Thing, move: Move, *, width: int, height: int) -> tuple[tuple[float, float], float]:
    """Return a thing's middle and radius in pixels."""
    (x, y), (dx, dy, scale) = POSITIONS[thing.position], move
    centre = (x + LARGEST_SHIFT * dx) * width, (y + LARGEST_SHIFT * dy) * height
    return centre, SIZES[thing.size] * (1 + LARGEST_GROWTH * scale) * min(width, height)


def draw_scene(
    scene: Scene,
    *,
    width: int = IMAGE_SIZE,
    height: int = IMAGE_SIZE,
    random: Random | None = None,
    moves: Sequence[Move] = (),
) -> Image.Image:
    """Draw a scene.

    Args:
        random: moves and scales each thing a little, within what its words allow.
        moves: how to move and scale each thing instead.
    """
    canvas_size = (width * SUPERSAMPLING, height * SUPERSAMPLING)
    canvas = Image.new("RGB", canvas_size, COLOURS[scene.background])
    moves = moves or [choose_move(random) if random else (0.0, 0.0, 0.0) for _ in scene.things]
    for thing, move in zip(scene.things, moves, strict=True):
        centre, radius = place_thing(thing, move, width=canvas_size[0], height=canvas_size[1])
        draw_shape(canvas, thing.shape, centre=centre, radius=radius, fill=COLOURS[thing.colour])
    return canvas.reduce(SUPERSAMPLING)


def name_thing(thing: Thing, *, random: Random, drop: float) -> str:
    size = "" if not thing.size or random.random() < drop else random.choice(SYNONYMS[thing.size]) + " "
    return f"{size}{thing.colour} {thing.shape}"


def describe_scene(scene: Scene, *, random: Random, drop: float = 0.0) -> str:
    """Put a scene into words; its empty features go unsaid.

    Args:
        random: chooses among the wordings.
        drop: how likely each of size, position and background goes unsaid.
    """
    things = [name_thing(thing, random=random, drop=drop) for thing in scene.things]
    ground = "" if not scene.background or random.random() < drop else f"{scene.background} background"
    if len(things) == 2:
        pair = f"a {things[0]} and a {things[1]}"
        if not ground:
            return pair
        return random.choice((f"{pair} on a {ground}", f"{pair}, {ground}", f"a {ground} with {pair}"))
    position = scene.things[0].position
    place = "" if not position or random.random() < drop else random.choice(SYNONYMS.get(position, (position,)))
    at = f"{'in' if position == 'centre' else 'at'} the {place}"
    if ground and place:
        return random.choice(
            (
                f"a {things[0]} on a {ground}, {place}",
                f"a {things[0]} {at} on a {ground}",
                f"a {things[0]} on a {ground}, {at}",
                f"{things[0]}, {place}, {ground}",
                f"a {ground} with a {things[0]} {at}",
            )
        )
    if ground:
        return random.choice(
            (f"a {things[0]} on a {ground}", f"{things[0]}, {ground}", f"a {ground} with a {things[0]}")
        )
    if place:
        return random.choice((f"a {things[0]}, {place}", f"a {things[0]} {at}"))
    return random.choice((f"a {things[0]}", things[0]))


def describe_part(scene: Scene, *, random: Random) -> str:
    """Name one or two features of a scene, as a negative prompt does."""
    thing = random.choice(scene.things)
    return random.choice(
        (
            thing.colour,
            thing.shape,
            random.choice(SYNONYMS[thing.size]),
            random.choice(SYNONYMS.get(thing.position, (thing.position,))),
            f"{thing.colour} {thing.shape}",
            f"{scene.background} background",
        )
    )
