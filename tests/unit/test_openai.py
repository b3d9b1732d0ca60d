"""Requests of OpenAI's images API in terms of the contract."""

import base64
import dataclasses
import io
import json
from typing import Any

import pytest
from openai.types import ImagesResponse
from PIL import Image

from sdxl_server.api.native import JSON, EncodedImage
from sdxl_server.api.openai import OpenAIApi, OpenAIEditApi
from sdxl_server.errors import RequestError
from tests.openai_clients import RECORDED
from tests.unit.test_request import CONTRACT, LIMITS, RED, encode, make_contract

GENERATIONS, EDITS = OpenAIApi(), OpenAIEditApi()


def parse(api: OpenAIApi = GENERATIONS, **fields: Any) -> Any:
    body = {"body": json.dumps({"prompt": "a red fox", **fields}).encode()}
    return api.read(body, content_type="application/json", contract=CONTRACT)[0]


def find_warnings(api: OpenAIApi = GENERATIONS, **fields: Any) -> list[str]:
    body = {"body": json.dumps({"prompt": "a red fox", **fields}).encode()}
    return api.read(body, content_type="application/json", contract=CONTRACT)[1]


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
    request, warnings = EDITS.read(form, content_type="multipart/form-data; boundary=x", contract=CONTRACT)
    assert warnings == []
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
    ("fields", "warnings"),
    [
        ({"background": "opaque", "style": None, "user": "me", "model": "dall-e-3", "seed": -1}, []),
        ({"foo": 1, "\r\nX-Injected: 1": 2}, [r"ignored, since there is no such field: 'foo', '\r\nX-Injected: 1'"]),
        (
            {"background": "transparent"},
            ["background has no effect here with 'transparent', but with auto, opaque; the image is opaque"],
        ),
        ({"style": ["x"] * 99, "quality": 80}, ["style has no effect here with ['x', 'x', "]),
        ({"quality": "80"}, ["quality has no effect here with '80', but with auto, low, medium, high, standard, hd"]),
        ({"prompt": " " * 150 + "fox"}, ["prompt has 153 characters; the first 100 are read"]),
        ({"negative_prompt": "x" * 101}, ["negative_prompt has 101 characters; the first 100 are read"]),
    ],
)
def test_what_has_no_effect_is_told(fields: dict[str, Any], warnings: list[str]) -> None:
    found = find_warnings(**fields)
    assert len(found) == len(warnings)
    for each, beginning in zip(found, warnings, strict=True):
        assert each.startswith(beginning)


def test_many_unknown_fields_are_told_in_short() -> None:
    unknown: dict[str, Any] = {f"{i}" * 1000: i for i in range(40)}
    (warning,) = find_warnings(**unknown)
    assert warning.endswith("and 30 more")
    assert len(warning) < 700


def test_long_prompts_are_cut() -> None:
    assert parse(prompt="fox " * 2000).prompt == "fox " * 25
    assert parse(prompt=" " * 4000 + "fox").prompt == "fox"


@pytest.mark.parametrize(("model", "kind"), [("dall-e-3", "url"), ("gpt-image-1", "b64_json"), (3, "b64_json")])
def test_pictures_come_as_the_clients_of_a_model_expect_them(model: Any, kind: str) -> None:
    assert parse(model=model).response_format == kind
    assert parse(model=model, response_format="url").response_format == "url"
    assert parse(model=model, response_format="b64_json").response_format == "b64_json"


@pytest.mark.parametrize("client", RECORDED)
def test_recorded_request_is_read(client: str) -> None:
    recorded = RECORDED[client]
    api = EDITS if recorded.files else GENERATIONS
    values = recorded.make_form(base64.b64decode(RED)) if recorded.files else {"body": recorded.make_body()}
    kind = "multipart/form-data; boundary=x" if recorded.files else "application/json"
    request, warnings = api.read(values, content_type=kind, contract=CONTRACT)
    assert recorded.fields["prompt"].startswith(request.prompt)
    assert request.response_format == recorded.reads
    for part in recorded.warned:
        assert part in "; ".join(warnings) or "77" in part  # tokens are counted by the pipeline
    assert warnings == [] or recorded.warned


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": None}, "prompt", "prompt is missing"),
        ({"n": 9}, "n", "n takes a whole number from 1 to 3, not 9"),
        (
            {"size": "3x4"},
            "size",
            "size: each side takes a whole number from 64 to 256 that is a multiple of 8, not 3x4",
        ),
        ({"size": "64x65"}, "size", "size: each side takes a whole number"),
        ({"width": 3}, "width", "width takes a whole number from 64"),
        ({"rng_seed": -2}, "rng_seed", "rng_seed takes a whole number from -1 to 4294967295, not -2"),
        ({"num_images_per_prompt": 9}, "num_images_per_prompt", "num_images_per_prompt takes a whole number"),
        ({"output_compression": False}, "output_compression", "output_compression takes a whole number from 1 to 100"),
        ({"mask": RED}, "mask", "mask needs an image; send image too"),
        ({"mask_image": RED}, "mask_image", "mask_image needs an image; send image too"),
        ({"n": 3, "size": "256x256"}, "n", "= 1.376; reduce n or size"),
        ({"size": "256x256", "num_inference_steps": 20}, "num_inference_steps", "reduce num_inference_steps or size"),
        ({"width": 256, "height": 256, "num_images_per_prompt": 3}, "num_images_per_prompt", "or width or height"),
        ({"size": "big"}, "size", "size takes auto or a size such as 1024x1024, not 'big'"),
        ({"size": 64}, "size", "not 64"),
        ({"output_compression": 101}, "output_compression", "output_compression takes a whole number from 1 to 100"),
        ({"stream": 0}, "stream", "stream takes true or false, not 0"),
        ({"partial_images": 4}, "partial_images", "partial_images takes a whole number from 0 to 3, not 4"),
        ({"response_format": "file"}, "response_format", "response_format takes one of b64_json, url, not 'file'"),
        ({"n": 2, "num_images_per_prompt": 3}, "num_images_per_prompt", "num_images_per_prompt and n are one field"),
        ({"rng_seed": 2, "seed": 3}, "seed", "seed and rng_seed are one field"),
        ({"output_compression": 20, "quality": 80}, "quality", "quality and output_compression are one field"),
        ({"size": "64x64", "width": 128}, "size", "size and width are one field"),
        ({"quality": 101}, "quality", "quality takes a whole number from 1 to 100, not 101"),
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
            "mask takes the aspect of the image",
        ),
        ({"image": RED, "mask": "AAAA"}, "mask", "cannot be read"),
        ({"image": RED, "mask": 3}, "mask", "mask takes an image in base64"),
        ({"image": RED, "mask_image": 3}, "mask_image", "mask_image takes an image in base64"),
        ({"image[]": 3}, "image[]", "image[] takes an image in base64"),
        ({"image[]": "AAAA"}, "image[]", "image[] takes a whole image as JPEG"),
    ],
)
def test_edit_without_what_it_needs(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse(EDITS, **fields)
    assert message in str(caught.value)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"size": "128x128"}, "size", "size takes one of 128x64, 64x64 here, not 128x128"),
        ({"height": 128, "width": 128}, "width", "width and height take one of 128x64, 64x64 here, not 128x128"),
    ],
)
def test_size_that_is_not_allowed(fields: dict[str, Any], param: str, message: str) -> None:
    contract = make_contract(dataclasses.replace(LIMITS, allowed_sizes=((128, 64), (64, 64))))
    body = {"body": json.dumps({"prompt": "a red fox", **fields}).encode()}
    with pytest.raises(RequestError) as caught:
        GENERATIONS.read(body, content_type="application/json", contract=contract)
    assert (str(caught.value), caught.value.param) == (message, param)


def test_mask_that_an_inpainting_model_needs() -> None:
    contract = dataclasses.replace(CONTRACT, needs=("image", "mask_image"))
    with pytest.raises(
        RequestError, match="mask is missing: this is an inpainting model; send image and mask"
    ) as caught:
        EDITS.read(
            {"prompt": b"a", "image": base64.b64decode(RED)}, content_type="multipart/form-data", contract=contract
        )
    assert caught.value.param == "mask"


@pytest.mark.parametrize("fields", [{"model": "dall-e-2"}, {"response_format": "url", "n": 2}])
def test_url_has_base64_next_to_it(fields: dict[str, Any]) -> None:
    """Most programs cannot fetch a data: URL."""
    request, written = parse(**fields), b""
    for index in range(request.num_images_per_prompt):
        image = EncodedImage(f"file {index}".encode(), index, {}, "1 of 1")
        written += GENERATIONS.write_image(request, image, index, kind=JSON, warnings=[])
    for index, item in enumerate(ImagesResponse.model_validate_json(written).data or ()):
        assert base64.b64decode(item.b64_json or "") == f"file {index}".encode()
        assert item.url == f"data:image/png;base64,{item.b64_json}"


def test_huge_mask_is_refused_before_its_pixels_are_read() -> None:
    file = io.BytesIO()
    Image.new("LA", (9_000, 8_000)).save(file, "PNG")
    with pytest.raises(RequestError, match="mask takes sides .* at most 50 megapixels, not 9000x8000"):
        parse(EDITS, image=RED, mask=base64.b64encode(file.getvalue()).decode())
