"""Requests of OpenAI's images API in terms of the contract."""

import base64
import io
import json
from typing import Any

import pytest
from PIL import Image

from sdxl_server.errors import RequestError
from sdxl_server.openai import OpenAIEditFace, OpenAIFace
from tests.unit.test_request import CONTRACT, RED, encode

GENERATIONS, EDITS = OpenAIFace(), OpenAIEditFace()


def parse(face: OpenAIFace = GENERATIONS, **fields: Any) -> Any:
    body = {"body": json.dumps({"prompt": "a red fox", **fields}).encode()}
    return face.read(body, content_type="application/json", contract=CONTRACT)


def test_fields_have_their_meaning() -> None:
    request = parse(n=2, size="64x128", output_format="jpeg", output_compression=0, rng_seed=4, num_inference_steps=5)
    assert (request.num_images_per_prompt, request.width, request.height) == (2, 64, 128)
    assert (request.output_format, request.quality, request.seed) == ("jpeg", 1, 4)
    assert request.num_inference_steps == 5
    assert parse(quality=80).quality == 80
    plain = parse(size="auto", model="x", user="me", quality="hd", response_format="b64_json", stream=False)
    assert (plain.width, plain.height, plain.output_format) == (128, 64, "png")


def test_edit_as_a_form() -> None:
    mask = Image.new("RGBA", (80, 72), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 40, 72))
    form = {
        **{"prompt": b"a red fox", "image[]": base64.b64decode(RED), "mask": base64.b64decode(encode(mask))},
        **{"n": b"2", "stream": b"true", "size": b"auto", "partial_images": b"1"},
    }
    request = EDITS.read(form, content_type="multipart/form-data; boundary=x", contract=CONTRACT)
    assert (request.num_images_per_prompt, request.width, request.height) == (2, 136, 120)
    assert (request.stream, request.partial_images) == (True, 1)
    assert request.mask_image.getpixel((5, 5)) == 255  # transparent means anew there, white here
    assert request.mask_image.getpixel((100, 5)) == 0


def test_own_transparency_is_the_mask_of_an_edit_without_one() -> None:
    image = Image.new("RGBA", (128, 128), (255, 0, 0, 255))
    assert parse(EDITS, image=encode(image)).mask_image is None
    image.paste((0, 0, 0, 200), (0, 0, 128, 128))  # it shimmers through, and nothing would be painted anew
    assert parse(EDITS, image=encode(image)).mask_image is None
    image.paste((0, 0, 0, 0), (0, 0, 64, 128))
    request = parse(EDITS, image=encode(image))
    assert (request.mask_image.getpixel((5, 5)), request.mask_image.getpixel((100, 5))) == (255, 0)
    assert (request.strength, request.image.getpixel((5, 5))) == (1.0, (255, 255, 255))
    black = encode(Image.new("L", (128, 128)))
    assert parse(EDITS, image=encode(image), mask=black).mask_image.getextrema() == (0, 0)
    assert parse(GENERATIONS, image=encode(image)).mask_image is None


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": None}, "prompt", "prompt is missing"),
        ({"n": 9}, "n", "n takes a whole number from 1 to 3, not 9"),
        ({"size": "3x4"}, "size", "width takes a whole number from 64"),
        ({"size": "big"}, "size", "size takes auto or a size such as 1024x1024, not 'big'"),
        ({"size": 64}, "size", "not 64"),
        ({"output_compression": 101}, "output_compression", "output_compression takes a whole number from 1 to 100"),
        ({"stream": 0}, "stream", "stream takes true or false, not 0"),
        ({"partial_images": 4}, "partial_images", "partial_images takes a whole number from 0 to 3, not 4"),
        ({"response_format": "url"}, "response_format", 'response_format takes "b64_json" here'),
        ({"background": "transparent"}, "background", 'background takes "auto", "opaque" here'),
        ({"foo": 1}, "foo", "'foo' is not a field"),
        ({"n": 2, "num_images_per_prompt": 3}, "num_images_per_prompt", "num_images_per_prompt and n are one field"),
        ({"rng_seed": 2, "seed": 3}, "seed", "seed and rng_seed are one field"),
        ({"output_compression": 20, "quality": 80}, "quality", "quality and output_compression are one field"),
        ({"size": "64x64", "width": 128}, "size", "size and width are one field"),
        ({"quality": 101}, "quality", "quality takes a whole number from 1 to 100, not 101"),
        ({"quality": "80"}, "quality", 'quality takes "auto", "low"'),
    ],
)
def test_mistake_is_told_in_openais_names(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(**fields)
    assert message in str(caught.value)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({}, "image", "image is missing"),
        ({"image": [RED, RED]}, "image", "send one image"),
        (
            {"image": RED, "mask": encode(Image.new("L", (80, 40)))},
            "mask",
            "mask takes a picture of the image's",
        ),
        ({"image": RED, "mask": "AAAA"}, "mask", "cannot be read"),
        ({"image": RED, "mask": 3}, "mask", "mask takes a picture in base64"),
    ],
)
def test_edit_without_what_it_needs(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(EDITS, **fields)
    assert message in str(caught.value)
    assert caught.value.param == param


def test_huge_mask_is_refused_before_its_pixels_are_read() -> None:
    file = io.BytesIO()
    Image.new("LA", (9_000, 8_000)).save(file, "PNG")
    with pytest.raises(RequestError, match="mask takes sides .* at most 50 megapixels, not 9000x8000"):
        parse(EDITS, image=RED, mask=base64.b64encode(file.getvalue()).decode())
