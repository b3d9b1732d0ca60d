"""Edges of a control's image: `preprocess: canny`, drawn by OpenCV."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw

from sdxl_server.config.settings import HandlerConfig
from sdxl_server.errors import RequestError
from sdxl_server.request.controls import RegisteredControl, build_control_schema, read_controls
from sdxl_server.request.preprocessing import load_opencv
from tests.unit.pipelines import encode
from tests.unit.test_request import LIMITS, make_contract

CONTROLS = {
    "edges": RegisteredControl(0.8),
    "sketch": RegisteredControl(0.5),
    "style": RegisteredControl(0.7, is_map=False),
}
CONTRACT = make_contract(dataclasses.replace(LIMITS, controls=CONTROLS))


def draw_disc(width: int = 128, height: int = 128) -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).ellipse((width // 4, height // 4, width // 2, height // 2), fill="navy")
    return image


def read(image: Image.Image, contract: Any = CONTRACT, **fields: Any) -> Any:
    """Return the control of a request as the contract reads it."""
    keys = ("preprocess", "low_threshold", "high_threshold")
    entry = {"name": "edges", "image": encode(image), **{key: fields.pop(key) for key in keys if key in fields}}
    request = contract.check(
        {"prompt": "a fox", "width": 128, "height": 128, **fields, "control": [{**entry, **fields.pop("control", {})}]}
    )
    (control,) = request.control
    return control


def find_edges(image: Image.Image, *thresholds: float) -> Any:
    return cv2.Canny(np.asarray(image), *(thresholds or (100, 200)))


def test_edges_replace_the_image() -> None:
    drawn = np.asarray(read(draw_disc(), preprocess="canny").image)
    assert drawn.shape == (128, 128, 3)
    assert np.array_equal(drawn, np.repeat(find_edges(draw_disc())[..., None], 3, axis=2))
    assert 50 < (drawn[..., 0] > 0).sum() < 500
    assert np.array_equal(np.asarray(read(draw_disc(), preprocess=None).image), np.asarray(draw_disc()))


def test_thresholds_choose_the_edges() -> None:
    faint = Image.new("RGB", (128, 128), (120, 120, 120))
    faint.paste((140, 140, 140), (32, 32, 96, 96))
    assert not np.asarray(read(faint, preprocess="canny").image).any()
    found = np.asarray(read(faint, preprocess="canny", low_threshold=10, high_threshold=30).image)[..., 0]
    assert np.array_equal(found, find_edges(faint, 10, 30))
    assert found.any()
    assert read(faint, preprocess="canny", high_threshold=150).thresholds == (100, 150)


@pytest.mark.parametrize(("mode", "is_inside"), [("crop", False), ("stretch", False), ("pad", True)])
@pytest.mark.parametrize("is_of_control", [False, True])
def test_edges_are_drawn_in_the_size_of_the_result(mode: str, is_inside: bool, is_of_control: bool) -> None:
    """Bars are added later: the border of a bar is no edge."""
    wide = draw_disc(256, 64)
    given: dict[str, Any] = {"control": {"resize_mode": mode}} if is_of_control else {"resize_mode": mode}
    drawn = np.asarray(read(wide, preprocess="canny", **given).image)[..., 0]
    resized = {
        "crop": wide.resize((512, 128), Image.Resampling.LANCZOS).crop((192, 0, 320, 128)),
        "stretch": wide.resize((128, 128), Image.Resampling.LANCZOS),
        "pad": wide.resize((128, 32), Image.Resampling.LANCZOS),
    }[mode]
    inside = drawn[48:80] if is_inside else drawn
    if mode == "crop":  # Pillow resizes the cut itself
        assert np.mean(inside != find_edges(resized)) < 0.01
    else:
        assert np.array_equal(inside, find_edges(resized))
    assert not is_inside or not drawn[:48].any() and not drawn[80:].any()


@pytest.mark.parametrize("mode", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("size", [(3000, 8), (8, 3000), (8, 8)])
def test_images_of_any_aspect_have_edges(size: tuple[int, int], mode: str) -> None:
    assert read(Image.new("RGB", size), preprocess="canny", resize_mode=mode).image.size == (128, 128)


def test_each_control_has_its_own_way() -> None:
    wide, red = draw_disc(256, 128), Image.new("RGB", (256, 128), "red")
    entries = [
        {"name": "edges", "image": encode(wide), "preprocess": "canny", "resize_mode": "stretch"},
        {"name": "sketch", "image": encode(red), "resize_mode": "pad"},
    ]
    request = CONTRACT.check({"prompt": "a fox", "width": 128, "height": 128, "control": entries})
    first, second = (np.asarray(each.image) for each in request.control or ())
    assert set(np.unique(first)) == {0, 255}
    assert second[0].max() == 0
    assert second[64, 64].tolist() == [255, 0, 0]
    both = request.describe()["control"]
    assert both[0] == {
        **{"name": "edges", "scale": 0.8, "from": 0.0, "to": 1.0, "resize_mode": "stretch"},
        **{"preprocess": "canny", "low_threshold": 100.0, "high_threshold": 200.0},
    }
    assert both[1] == {"name": "sketch", "scale": 0.5, "from": 0.0, "to": 1.0, "resize_mode": "pad"}
    again = [{**each, "image": entry["image"]} for each, entry in zip(both, entries, strict=True)]
    read_again = CONTRACT.check({**request.describe(), "control": json.loads(json.dumps(again))})
    assert read_again.describe() == request.describe()
    assert np.array_equal(np.asarray((read_again.control or ())[0].image), first)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"preprocess": "depth"}, r"preprocess takes one of canny, not 'depth'"),
        ({"preprocess": True}, r"preprocess takes one of canny, not True"),
        ({"preprocess": "canny", "low_threshold": -1}, r"low_threshold takes a number from 0 to 255, not -1"),
        ({"preprocess": "canny", "high_threshold": "9"}, r"high_threshold takes a number from 0 to 255, not '9'"),
        (
            {"preprocess": "canny", "low_threshold": 201},
            "low_threshold takes a number up to high_threshold, 200, not 201",
        ),
        (
            {"preprocess": "canny", "high_threshold": 50},
            "low_threshold takes a number up to high_threshold, 50, not 100",
        ),
        ({"low_threshold": 10}, "low_threshold needs preprocess: canny"),
        ({"preprocess": None, "high_threshold": 10}, "high_threshold needs preprocess: canny"),
        ({"name": "style", "preprocess": "canny"}, "preprocess is for controls that take a map, which style does not"),
        ({"resize_mode": "fit"}, "resize_mode takes one of crop, pad, stretch, not 'fit'"),
    ],
)
def test_wrong_keys_are_reported_in_a_line(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=rf"^control\[0\]\.{message}$"):
        read(draw_disc(), control=keys)


@pytest.fixture
def without_opencv(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "cv2", None)
    load_opencv.cache_clear()
    yield
    load_opencv.cache_clear()


@pytest.mark.usefixtures("without_opencv")
def test_without_opencv_the_package_is_named() -> None:
    for key, value in (("preprocess", "canny"), ("low_threshold", 10)):
        with pytest.raises(
            RequestError,
            match=rf"^control\[0\]\.{key} needs the package opencv-python-headless, which this server lacks",
        ):
            read(draw_disc(), control={key: value})
    assert read(draw_disc()).image.size == (128, 128)
    assert "preprocess" not in build_control_schema(CONTROLS, 2)["items"]["properties"]


def test_the_schema_names_what_is_served() -> None:
    properties = build_control_schema(CONTROLS, 2)["items"]["properties"]
    assert properties["preprocess"]["enum"] == ["canny"]
    assert read_controls([], CONTROLS, most=2, max_side=HandlerConfig().max_side) is None
