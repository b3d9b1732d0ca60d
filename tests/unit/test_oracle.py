import io
from dataclasses import asdict, replace
from itertools import product
from random import Random

import numpy as np
import pytest
from PIL import Image

from demo.oracle import Verdict, judge_picture
from demo.shapes import (
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    choose_move,
    choose_scene,
    draw_scene,
    iterate_scenes,
)
from demo.training.decoder import find_moves

ASKED = Scene("blue", (Thing("red", "circle", "large", "left"),))


def compress(image: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90)  # the server's default
    return Image.open(io.BytesIO(stream.getvalue()))


def list_wrong(image: Image.Image, scene: Scene) -> set[str]:
    return {name for name, is_right in asdict(judge_picture(image, scene)).items() if not is_right}


def change_thing(scene: Scene, **changes: str) -> Scene:
    return Scene(scene.background, (replace(scene.things[0], **changes), *scene.things[1:]))


@pytest.mark.parametrize(("shape", "size", "position"), [*product(SHAPES, SIZES, POSITIONS)])
def test_drawn_scene_is_right(shape: str, size: str, position: str) -> None:
    random = Random(f"{shape} {size} {position}")
    for background, colour in zip(COLOURS, random.sample(list(COLOURS), len(COLOURS)), strict=True):
        if colour == background:
            continue
        scene = Scene(background, (Thing(colour, shape, size, position),))
        image = draw_scene(scene, random=random)
        if background in list(COLOURS)[:2]:  # compressed, it is harder to judge
            assert list_wrong(image, scene) == set(), scene
        assert list_wrong(compress(image), scene) == set(), f"{scene} as JPEG"


def test_any_pair_of_colours_is_told() -> None:
    for background, colour in product(COLOURS, COLOURS):
        if colour != background:
            scene = Scene(background, (Thing(colour, "star", "small", "top"),))
            assert judge_picture(compress(draw_scene(scene)), scene).is_right, scene


@pytest.mark.parametrize("size", [(192, 128), (128, 192), (96, 96), (256, 256)])
def test_picture_of_another_size_is_right(size: tuple[int, int]) -> None:
    random = Random(0)
    for scene in random.sample(list(iterate_scenes()), 20):
        image = draw_scene(scene, width=size[0], height=size[1], random=random)
        assert judge_picture(image, scene).is_right, scene


def test_two_things_are_right_each_in_its_half() -> None:
    random = Random(0)
    for _ in range(40):
        scene = choose_scene(random, share_of_two=1)
        assert judge_picture(compress(draw_scene(scene)), scene).is_right, scene
        first, second = scene.things
        if (first.colour, first.shape) != (second.colour, second.shape):
            swapped = Scene(scene.background, (replace(second, position="left"), replace(first, position="right")))
            assert not judge_picture(draw_scene(scene), swapped).is_right


@pytest.mark.parametrize(
    ("feature", "value"),
    [
        *(("colour", colour) for colour in COLOURS if colour not in ("red", "blue")),
        *(("shape", shape) for shape in SHAPES if shape != "circle"),
        ("size", "small"),
        *(("position", position) for position in POSITIONS if position != "left"),
    ],
)
def test_wrong_feature_is_told_and_no_other(feature: str, value: str) -> None:
    image = draw_scene(change_thing(ASKED, **{feature: value}), random=Random(0))
    assert list_wrong(compress(image), ASKED) == {feature}


@pytest.mark.parametrize("background", [colour for colour in COLOURS if colour not in ("red", "blue")])
def test_wrong_background_is_told_and_no_other(background: str) -> None:
    assert list_wrong(draw_scene(replace(ASKED, background=background)), ASKED) == {"background"}


@pytest.mark.parametrize("shape", SHAPES)
def test_no_shape_passes_for_another(shape: str) -> None:
    scene = change_thing(ASKED, shape=shape, size="small")
    for other in SHAPES:
        expected = set() if other == shape else {"shape"}
        assert list_wrong(compress(draw_scene(scene)), change_thing(scene, shape=other)) == expected


def test_second_thing_that_was_not_asked_for_is_wrong() -> None:
    both = Scene("blue", (*ASKED.things, Thing("red", "circle", "small", "right")))
    assert list_wrong(draw_scene(both), ASKED) == {"shape"}


def test_missing_second_thing_is_wrong() -> None:
    asked = Scene("blue", (*ASKED.things, Thing("red", "circle", "small", "right")))
    assert list_wrong(draw_scene(ASKED), asked) == {"colour", "shape", "size", "position"}


def test_empty_picture_shows_only_its_background() -> None:
    blank = Image.new("RGB", (128, 128), COLOURS["blue"])
    assert list_wrong(blank, ASKED) == {"colour", "shape", "size", "position"}


@pytest.mark.parametrize("seed", range(3))
def test_noise_is_wrong(seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    verdict = judge_picture(Image.fromarray(noise), ASKED)
    assert verdict == Verdict(*[False] * 5)


def test_feature_that_was_not_asked_for_may_be_any() -> None:
    scene = Scene("", (Thing("red", "", "", ""),))
    assert judge_picture(draw_scene(ASKED), scene).is_right
    assert not judge_picture(draw_scene(change_thing(ASKED, colour="green")), scene).is_right


def test_a_move_that_a_picture_shows_is_found_again() -> None:
    random = Random(0)
    for share_of_two in (0, 1):
        scene = choose_scene(random, share_of_two=share_of_two)
        moves = [choose_move(random) for _ in scene.things]
        found, overlap = find_moves(scene, draw_scene(scene, moves=moves))
        assert overlap > 0.9, scene
        assert np.abs(np.array(found) - moves).max() < 0.6, scene


def test_another_thing_overlaps_little() -> None:
    other = change_thing(ASKED, shape="cross", position="right")
    assert find_moves(ASKED, draw_scene(other))[1] < 0.1
