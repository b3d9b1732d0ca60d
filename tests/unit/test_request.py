"""Bodies of requests: which are accepted, with what in them, and what a mistake is told."""

import base64
import dataclasses
import io
import json
from typing import Any

import pytest
from PIL import Image

from generation_request import SDXL_FIELDS, Contract, GenerationRequest, Limits, RequestError, build_openapi
from tools.write_contract import build_shipped_contract

DEFAULTS: dict[str, Any] = {
    "width": 128,
    "height": 64,
    "num_inference_steps": 7,
    "guidance_scale": 2.5,
    "quality": 80,
    "scheduler": "EulerDiscreteScheduler",
}
LIMITS = Limits(max_prompt_characters=100, max_side=256, max_steps=20, max_images=3, max_megapixel_steps=1)
KEYWORDS: dict[str, Any] = {
    "defaults": DEFAULTS,
    "schedulers": ["DDIMScheduler", "EulerDiscreteScheduler"],
    "max_clip_skip": 2,
}
CONTRACT = Contract.build(LIMITS, **KEYWORDS)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return base64.b64encode(buffer.getvalue()).decode()


RED = encode(Image.new("RGB", (80, 72), "red"))


@pytest.mark.parametrize(
    ("body", "content_type", "prompt"),
    [
        (b"a red fox", "text/plain", "a red fox"),
        (b"a red fox", "", "a red fox"),
        ("ein Füchslein 🦊".encode(), "text/plain; charset=utf-8", "ein Füchslein 🦊"),
        (b'{"prompt": "a red fox"}', "application/json", "a red fox"),
        (b'{"prompt": "a red fox", "seed": null}', "application/json; charset=utf-8", "a red fox"),
        (b' {"prompt": "a red fox"}', "", "a red fox"),
        (b'{"prompt": "not JSON here"}', "text/plain", '{"prompt": "not JSON here"}'),
    ],
)
def test_prompt_is_read(body: bytes, content_type: str, prompt: str) -> None:
    request = CONTRACT.parse({"body": body}, content_type=content_type)
    expected = GenerationRequest(prompt, **DEFAULTS, seed=request.seed)
    assert request == expected


def test_form_is_read_as_json_is() -> None:
    form = {
        "prompt": b"12",
        "num_inference_steps": b"3",
        "guidance_scale": b"1.5",
        "original_size": b"[32, 64]",
        "seed": b"5",
        "image": base64.b64decode(RED),
    }
    fields = {
        **{"prompt": "12", "num_inference_steps": 3, "guidance_scale": 1.5},
        **{"original_size": [32, 64], "seed": 5, "image": RED},
    }
    assert CONTRACT.parse(form) == CONTRACT.parse(
        {"body": json.dumps(fields).encode()}, content_type="application/json"
    )
    assert CONTRACT.parse(form).original_size == (32, 64)


def test_seeds_are_random_unless_given() -> None:
    seeds = {CONTRACT.check({"prompt": "x"}).seed for _ in range(5)}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_description_makes_the_request_again() -> None:
    request = CONTRACT.check({"prompt": "x", "seed": 3, "num_images_per_prompt": 3, "original_size": [9, 8]})
    again = CONTRACT.check(json.loads(json.dumps(request.describe(2))))
    assert again == dataclasses.replace(request, seed=5, num_images_per_prompt=1)


@pytest.mark.parametrize(
    ("body", "content_type", "parts"),
    [
        (b"", "text/plain", ["prompt takes a text that says something"]),
        (b" \n", "text/plain", ["prompt takes a text that says something"]),
        (b"\xff\xfe", "text/plain", ["not UTF-8", "byte 0 is 0xff"]),
        (b"{", "application/json", ["not JSON"]),
        (b"", "application/json", ["not JSON"]),
        (b"[" * 100_000, "application/json", ["not JSON", "nested too deeply"]),
        (b'["a red fox"]', "application/json", ["no object"]),
        (b'{"prompt": "a", "guidance_scale": NaN}', "application/json", ["NaN is not a number"]),
        (b'{"prompt": "a", "guidance_scale": -Infinity}', "application/json", ["-Infinity is not a number"]),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "application/json", ["not JSON"]),
    ],
)
def test_body_that_is_no_request(body: bytes, content_type: str, parts: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        CONTRACT.parse({"body": body}, content_type=content_type)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "param", "parts"),
    [
        ({}, "prompt", ["prompt is missing"]),
        ({"prompt": None}, "prompt", ["prompt is missing"]),
        ({"prompt": ["a"]}, "prompt", ["takes a text", "['a']"]),
        ({"prompt": "x" * 101}, "prompt", ["at most 100 characters"]),
        ({"prompt": "a\0b"}, "prompt", ["without NUL"]),
        ({"prompt": "\ud800"}, "prompt", ["lone surrogate"]),
        ({"negative_prompt": "\udfff"}, "negative_prompt", ["lone surrogate"]),
        ({"promt": "a"}, "promt", ["'promt' is not a field", "did you mean 'prompt'?"]),
        ({"steps": 3}, "steps", ["'steps' is not a field", "num_inference_steps"]),
        ({"width": 100}, "width", ["a whole number from 64 to 256 that is a multiple of 8", "not 100"]),
        ({"width": 264}, "width", ["not 264"]),
        ({"height": "128"}, "height", ["not '128'"]),
        ({"height": True}, "height", ["not True"]),
        ({"num_inference_steps": 21}, "num_inference_steps", ["from 1 to 20", "not 21"]),
        ({"num_inference_steps": 2.5}, "num_inference_steps", ["not 2.5"]),
        ({"num_inference_steps": 1e400}, "num_inference_steps", ["not inf"]),
        ({"guidance_scale": float("inf")}, "guidance_scale", ["a number from 0 to 100", "not inf"]),
        ({"guidance_scale": False}, "guidance_scale", ["not False"]),
        ({"seed": -1}, "seed", ["from 0 to 4294967295", "not -1"]),
        ({"num_images_per_prompt": 4}, "num_images_per_prompt", ["from 1 to 3"]),
        ({"scheduler": "Euler"}, "scheduler", ["one of DDIMScheduler, EulerDiscreteScheduler"]),
        ({"clip_skip": 3}, "clip_skip", ["from 0 to 2"]),
        ({"denoising_end": 0}, "denoising_end", ["a number above 0 to 1"]),
        ({"original_size": [1]}, "original_size", ["two whole numbers from 0 to 65536"]),
        ({"output_format": "gif"}, "output_format", ["one of jpeg, png, webp"]),
        ({"timeout": 0}, "timeout", ["a number from 1 to 3600"]),
        ({"strength": 0.5}, "strength", ["strength needs an image"]),
        ({"mask_image": RED}, "mask_image", ["mask_image needs an image"]),
        ({"image": RED, "strength": 0.1}, "strength", ["strength times num_inference_steps must be 1 or more"]),
        ({"image": "no base64!"}, "image", ["image takes base64"]),
        ({"image": 3}, "image", ["image takes a picture in base64, not 3"]),
        ({"image": "AAAA"}, "image", ["cannot be read"]),
        ({"image": RED[:120]}, "image", ["image takes"]),
        ({"image": encode(Image.new("RGB", (600, 100)))}, "image", ["sides of 8 to 512 pixels, not 600x100"]),
        ({"image": encode(Image.new("RGB", (9, 9)), "GIF")}, "image", ["JPEG, PNG or WebP"]),
        (
            {"width": 256, "height": 256, "num_inference_steps": 20},
            "num_inference_steps",
            ["pictures times steps times megapixels may be 1 at most", "20 steps of 256x256"],
        ),
    ],
)
def test_mistake_names_field_limit_and_value(fields: dict[str, Any], param: str, parts: list[str]) -> None:
    given = {"prompt": "a"} if fields and "prompt" not in fields else {}
    with pytest.raises(RequestError) as caught:
        CONTRACT.check({**given, **fields})
    assert (caught.value.param, caught.value.status) == (param, 400)
    for part in parts:
        assert part in str(caught.value)
    assert str(caught.value).isascii()


def test_huge_picture_is_refused_before_its_pixels_are_read() -> None:
    bomb = encode(Image.new("1", (40_000, 20_000)))
    assert len(bomb) < 200_000
    with pytest.raises(RequestError, match="cannot be read|not 40000x20000"):
        CONTRACT.check({"prompt": "a", "image": bomb})


def test_photo_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # EXIF's orientation: a quarter turn
    request = CONTRACT.check({"prompt": "a", "image": encode(Image.new("RGB", (160, 80)), "JPEG", exif=exif)})
    assert (request.width, request.height, request.image.size) == (80, 160, (80, 160))


def test_field_given_twice_is_refused() -> None:
    with pytest.raises(RequestError, match="'prompt' is given twice"):
        CONTRACT.parse({"body": b'{"prompt": "a"}', "prompt": b"b"}, content_type="application/json")


def test_allowed_sizes() -> None:
    contract = Contract.build(Limits(allowed_sizes=((128, 64), (64, 64))), **KEYWORDS)
    assert contract.check({"prompt": "a", "width": 64}).width == 64
    with pytest.raises(RequestError, match="one of 128x64, 64x64 here, not 128x128"):
        contract.check({"prompt": "a", "height": 128})


def test_contract_has_the_requests_fields() -> None:
    assert {each.name for each in dataclasses.fields(GenerationRequest)} == set(CONTRACT.properties)
    plain = Contract.build(LIMITS, **KEYWORDS, is_xl=False)
    assert set(CONTRACT.properties) - set(plain.properties) == set(SDXL_FIELDS)
    with pytest.raises(RequestError, match="'prompt_2' is not a field"):
        plain.check({"prompt": "a", "prompt_2": "b"})


def test_document_is_openapi_and_is_the_committed_one() -> None:
    from openapi_spec_validator import validate

    from tools.write_contract import DOCUMENT, README, fill_readme

    document = build_openapi(build_shipped_contract())
    validate(document)
    assert json.loads(DOCUMENT.read_text()) == document
    assert fill_readme(README.read_text(), build_shipped_contract()) == README.read_text()
