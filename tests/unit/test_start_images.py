"""Images to start from, and masks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from sdxl_server.api.native import NativeApi
from sdxl_server.api.openai import OpenAIEditApi
from sdxl_server.api.warnings import list_warnings
from sdxl_server.diffusion.generation import generate
from sdxl_server.diffusion.previews import draw_preview
from sdxl_server.model.compiling import VAE_ENCODER
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.request.masks import keep_protected
from tests.unit.pipelines import encode, load, make_picture
from tools.server import ROOT


@pytest.fixture(scope="module")
def demo() -> LoadedPipeline:
    """The project's own model, whose VAE has learnt pictures, with exact previews."""
    return load(ROOT / "demo/model", preview="exact")


@pytest.mark.parametrize("name", ["eager", "compiled", "float16"])
def test_pictures_from_pictures(request: pytest.FixtureRequest, tiny_model: Path, name: str) -> None:
    loaded = load(tiny_model, dtype=name) if name == "float16" else request.getfixturevalue(name)
    dtypes = (loaded.pipeline.vae.dtype, loaded.pipeline.unet.dtype)
    red, blue = (encode(Image.new("RGB", (128, 128), colour)) for colour in ("red", "blue"))
    apart = [
        np.abs(np.subtract(*(make_picture(loaded, image=each, strength=strength) for each in (red, blue)))).mean()
        for strength in (0.5, 1.0)
    ]
    assert apart[0] > 2 * apart[1]  # the further it goes, the less is left of the image
    fields = {"image": red}
    mask = Image.new("L", (128, 128), 0)
    mask.paste(255, (64, 0, 128, 128))
    kept = make_picture(loaded, mask_image=encode(mask), **fields)
    whole = make_picture(loaded, mask_image=encode(Image.new("L", (128, 128), 255)), **fields)
    assert np.abs(kept - whole)[:, :32].mean() > 1  # where the mask is black the image shows through
    assert (loaded.pipeline.vae.dtype, loaded.pipeline.unet.dtype) == dtypes  # diffusers did not convert them
    if name == "compiled":
        assert len(loaded.parts[VAE_ENCODER].reports) == 1


@pytest.mark.parametrize("kind", ["rectangle", "stroke", "soft"])
def test_what_a_mask_protects_is_kept_bit_by_bit(demo: LoadedPipeline, kind: str) -> None:
    photo = Image.effect_noise((128, 128), 90).convert("RGB")
    mask = Image.new("L", (128, 128), 0)
    box = (61, 13, 63, 115) if kind == "stroke" else (37, 13, 101, 115)
    mask.paste(255, box)
    if kind == "soft":
        mask = mask.filter(ImageFilter.GaussianBlur(4))
    fields = {"image": encode(photo), "mask_image": encode(mask), "num_inference_steps": 2}
    drawn, given = make_picture(demo, **fields), np.asarray(photo)
    is_protected = np.asarray(mask) < 128
    assert np.array_equal(drawn[is_protected], given[is_protected])
    assert (drawn != given).any(axis=-1)[~is_protected].mean() > 0.9  # thin strokes and the seam are painted too
    other = make_picture(demo, **fields, prompt="a blue square", seed=2)
    assert np.abs(other - drawn)[~is_protected].mean() > 20  # anew, not decoded anew
    request = demo.contract.check({"prompt": "a red fox", "seed": 1, **fields})
    preview = keep_protected(draw_preview(demo, next(generate(demo, request))), request)
    assert np.array_equal(np.asarray(preview)[is_protected], given[is_protected])


@pytest.mark.parametrize(("value", "told"), [(0, "the mask protects everything"), (255, "the mask protects nothing")])
def test_masks_that_mean_little_are_told(eager: LoadedPipeline, value: int, told: str) -> None:
    image, mask = encode(Image.new("RGB", (128, 128))), encode(Image.new("L", (128, 128), value))
    request = eager.contract.check({"prompt": "x", "image": image, "mask_image": mask})
    (warning,) = list_warnings(eager, request)
    assert warning.startswith(told)


def draw_strokes(colour: Any, *, opacity: int = 255, kind: str = "PNG") -> Image.Image:
    """Return strokes with soft edges on a transparent canvas, as gradio and fabric.js make them."""
    shape = Image.new("L", (128, 128))
    ImageDraw.Draw(shape).line((20, 60, 100, 70), fill=opacity, width=20)
    strokes = Image.new("RGBA", (128, 128), colour)
    strokes.putalpha(shape.filter(ImageFilter.GaussianBlur(2)))
    return strokes


def cut_hole(picture: Image.Image, box: tuple[int, int, int, int] = (20, 20, 100, 100)) -> Image.Image:
    """Return a mask as OpenAI's users make them."""
    whole = picture.convert("RGBA")
    whole.paste((0, 0, 0, 0), box)
    return whole


NOISE = Image.effect_noise((128, 128), 90)
SPECKLED = draw_strokes("white")
SPECKLED.paste(NOISE.convert("RGB"), (0, 0), SPECKLED.getchannel("A"))
WHITE_ON_BLACK = Image.new("L", (128, 128))
WHITE_ON_BLACK.paste(255, (20, 20, 100, 100))


@pytest.mark.parametrize("api", [NativeApi(), OpenAIEditApi()], ids=["native", "edit"])
@pytest.mark.parametrize(
    ("mask", "is_warned"),
    [
        (draw_strokes("white"), True),
        (draw_strokes("black"), True),
        (draw_strokes("#ff2d78"), True),
        (draw_strokes("white", opacity=160), True),
        (draw_strokes("black", opacity=160), True),
        (draw_strokes("white", opacity=100), True),
        (draw_strokes("#ff2d78", opacity=60), True),
        (SPECKLED, False),  # a cut-out of a photo
        (cut_hole(NOISE), False),
        (cut_hole(Image.new("L", (128, 128))), False),
        (cut_hole(Image.new("L", (128, 128), 255), (4, 4, 124, 124)), False),
        (WHITE_ON_BLACK, False),  # of the web UI
    ],
)
def test_strokes_on_a_transparent_canvas_are_warned_of(
    eager: LoadedPipeline, api: NativeApi, mask: Image.Image, is_warned: bool
) -> None:
    fields = {"prompt": "x", "image": encode(NOISE), "mask_image": encode(mask)}

    def read(**more: Any) -> tuple[Any, list[str]]:
        body = {"body": json.dumps({**fields, **more}).encode()}
        request, warnings = api.read(body, content_type="application/json", contract=eager.contract)
        return np.asarray(request.mask_image), [*warnings, *list_warnings(eager, request)]

    (repainted, warnings), (inverted, none) = read(), read(invert_mask=True)
    assert ["invert_mask: true repaints the strokes" in each for each in warnings] == [True] * is_warned
    assert none == []
    assert np.array_equal(repainted, 255 - inverted)
    if is_warned:
        assert (inverted[65, 60], inverted[10, 10]) == (255, 0)  # the stroke is repainted
    assert np.array_equal(read(invert_mask=False)[0], repainted)


def test_an_inverted_mask_is_the_opposite(eager: LoadedPipeline) -> None:
    photo = NOISE.convert("RGB")
    mask, opposite = (encode(each) for each in (WHITE_ON_BLACK, ImageOps.invert(WHITE_ON_BLACK)))
    drawn = make_picture(eager, image=encode(photo), mask_image=mask, invert_mask=True)
    assert np.array_equal(drawn, make_picture(eager, image=encode(photo), mask_image=opposite))
    assert np.array_equal(drawn[30:90, 30:90], np.asarray(photo)[30:90, 30:90])
    wide = {"image": encode(photo), "width": 192, "height": 128, "resize_mode": "pad", "prompt": "x"}
    for is_inverted in (True, False):  # bars are repainted either way
        padded = eager.contract.check({**wide, "mask_image": mask, "invert_mask": is_inverted}).mask_image
        assert padded.getpixel((5, 60)) == 255


def test_image_sets_the_size(eager: LoadedPipeline) -> None:
    image = encode(Image.new("RGB", (75, 130), "red"))
    assert make_picture(eager, image=image).shape == (160, 96, 3)
    assert make_picture(eager, image=image, width=64, height=64).shape == (64, 64, 3)
