"""The scenes, images and prompts that the demonstration model learns from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

from demo import shapes

CROP_SIZE = 64  # of the VAE's first images
BLURRED_SHARE = 0.2
CROPPED_SHARE = 0.1
HARD_SHARE = 0.2  # of the scenes have a small star, which is learnt last
ABSENT = "nothing"
_COLOURS, _SIZES = tuple(shapes.COLOURS), tuple(shapes.SIZES)
FEATURES = (_COLOURS, *(_COLOURS, shapes.SHAPES, _SIZES) * 2, tuple(shapes.POSITIONS))


def choose_training_scene(random: Random) -> shapes.Scene:
    """Return a scene to learn from. Hard ones come more often than by chance."""
    is_hard = random.random() < HARD_SHARE
    while True:
        scene = shapes.choose_scene(random)
        if not is_hard or any((thing.shape, thing.size) == ("star", "small") for thing in scene.things):
            return scene


def choose_training_prompt(scene: shapes.Scene, random: Random) -> str | None:
    """Return a prompt to learn from.

    Most prompts are whole. Some are short, as negative prompts are. Some are empty, and for some scenes there is none.
    """
    kind = random.random()
    if kind < 0.1:
        return None  # a pipeline without a negative prompt takes zeros
    if kind < 0.12:
        return ""
    if kind < 0.18:
        return shapes.describe_part(scene, random=random)
    return shapes.describe_scene(scene, random=random, drop=0.1)


def number_features(scene: shapes.Scene) -> list[int]:
    """Return what a scene shows as class numbers, one for each of FEATURES."""
    things = [*scene.things, None][:2]
    features = [scene.background]
    for thing in things:
        features += [thing.colour, thing.shape, thing.size] if thing else [ABSENT] * 3
    features.append(scene.things[0].position)
    return [(*options, ABSENT).index(feature) for options, feature in zip(FEATURES, features, strict=True)]


def read_scene(fields: tuple[Any, ...]) -> shapes.Scene:
    """Return the scene that astuple took apart; torch.load reads tuples and no classes."""
    background, things = fields
    return shapes.Scene(background, tuple(shapes.Thing(*each) for each in things))


def blur_image(image: Image.Image, random: Random) -> tuple[Image.Image, tuple[int, int]]:
    """Return an image as enlarged from a smaller original, and the original's height and width.

    The VAE sharpens it again. Corners and small things are lost. Only the smallest originals show it. So they come as
    often as larger ones.
    """
    scale = math.exp(random.uniform(math.log(0.06), math.log(0.5)))
    original = (round(image.height * scale), round(image.width * scale))
    small = image.resize(original[::-1], Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.BICUBIC), original


@dataclass(frozen=True)
class Sample:
    """An image with SDXL's micro-conditioning.

    Args:
        conditions: in pixels: original height and width, top and left, target height and width.
    """

    scene: shapes.Scene
    image: Image.Image
    conditions: tuple[int, ...]


def draw_sample(random: Random, *, width: int, height: int) -> Sample:
    """Draw a scene. Some are blurred as from a smaller original, and some are cropped."""
    scene = choose_training_scene(random)
    image = shapes.draw_scene(scene, width=width, height=height, random=random)
    original, top, left = (height, width), 0, 0
    kind = random.random()
    if kind < BLURRED_SHARE:
        image, original = blur_image(image, random)
    elif kind < BLURRED_SHARE + CROPPED_SHARE:
        top, left = random.choice(
            ((random.randrange(65), 0), (0, random.randrange(65)), (random.randrange(65), random.randrange(65)))
        )
        cropped = Image.new("RGB", image.size, shapes.COLOURS[scene.background])
        cropped.paste(image, (-left, -top))
        image = cropped
    return Sample(scene, image, (*original, top, left, height, width))


def draw_training_image(random: Random) -> Image.Image:
    return shapes.draw_scene(choose_training_scene(random), random=random)


def draw_crop(random: Random) -> Image.Image:
    """Draw a scene and cut out one thing. The background would hide small ones."""
    scene = choose_training_scene(random)
    moves = [shapes.choose_move(random) for _ in scene.things]
    thing, move = random.choice(list(zip(scene.things, moves, strict=True)))
    middle, _ = shapes.place_thing(thing, move, width=shapes.IMAGE_SIZE, height=shapes.IMAGE_SIZE)
    last = shapes.IMAGE_SIZE - CROP_SIZE
    left, top = (min(max(round(at + random.uniform(-16, 16)) - CROP_SIZE // 2, 0), last) for at in middle)
    return shapes.draw_scene(scene, moves=moves).crop((left, top, left + CROP_SIZE, top + CROP_SIZE))


def to_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """Return images as one tensor from -1 to 1."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 127.5 - 1


def to_image(tensor: torch.Tensor) -> Image.Image:
    """Return a tensor from -1 to 1 as an image."""
    return Image.fromarray(((tensor.clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0).cpu().numpy())


def save_grid(path: Path, images: Sequence[Any], *, columns: int) -> None:
    """Write images, or tensors from -1 to 1, side by side."""
    images = [image if isinstance(image, Image.Image) else to_image(image) for image in images]
    width, height = max(each.width for each in images) + 4, max(each.height for each in images) + 4
    grid = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), (128, 128, 128))
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * width + 2, i // columns * height + 2))
    grid.save(path)
