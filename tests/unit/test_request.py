"""Bodies of requests: which are accepted, with what in them, and what a mistake is told."""

import base64
import codecs
import dataclasses
import io
import itertools
import json
import re
from typing import Any

import pytest
from PIL import Image

from sdxl_server.api.native import NativeApi
from sdxl_server.api.openai import OpenAIEditApi
from sdxl_server.api.openapi import build_openapi
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.errors import RequestError
from sdxl_server.model.families import FAMILIES
from sdxl_server.request.contract import Contract
from sdxl_server.request.fields import DECLARATIONS, MAX_SEED, GenerationRequest, build_properties
from sdxl_server.request.limits import Limits
from sdxl_server.schemas import switch
from sdxl_server.service import APIS
from tools.write_generated import build_shipped_contract, make_all

DEFAULTS: dict[str, Any] = {
    "width": 128,
    "height": 64,
    "num_inference_steps": 7,
    "guidance_scale": 2.5,
    "quality": 80,
    "scheduler": "EulerDiscreteScheduler",
}
CONFIG = HandlerConfig(max_prompt_characters=100, max_side=256, max_steps=20, max_images=3, max_megapixel_steps=1)
LIMITS = Limits(
    config=CONFIG,
    own_side=128,
    multiple=8,
    samplers={"DDIMScheduler": {}, "EulerDiscreteScheduler": {"use_karras_sigmas": switch()}},
    max_clip_skip=2,
)


def make_contract(limits: Limits, *, lacking: tuple[str, ...] = ()) -> Contract:
    properties = build_properties(limits, defaults=DEFAULTS, lacking=lacking)
    return Contract(properties, limits, lambda request: request.num_inference_steps)


CONTRACT = make_contract(LIMITS)


def parse(values: dict[str, Any], content_type: str = "") -> GenerationRequest:
    return NativeApi().read(values, content_type=content_type, contract=CONTRACT)[0]


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
        (b'{"prompt": "a red fox"}', "Application/JSON", "a red fox"),
        (b'{"prompt": "a red fox"}', "text/json", "a red fox"),
        (b'{"json"}', "text/plain; format=json", '{"json"}'),
        (b"a red fox", "text/\xe9; a*=\\;==", "a red fox"),
        (codecs.BOM_UTF8 + b'{"prompt": "a red fox"}', "", "a red fox"),
        (codecs.BOM_UTF8 + b"a red fox", "text/plain", "a red fox"),
        ('{"prompt": "Füchslein 🦊"}'.encode("utf-16"), "", "Füchslein 🦊"),
        ('{"prompt": "Füchslein 🦊"}'.encode("utf-16"), "application/json", "Füchslein 🦊"),
        ('{"prompt": "Füchslein 🦊"}'.encode("utf-16-be"), "application/json", "Füchslein 🦊"),
        ('{"prompt": "Füchslein 🦊"}'.encode("utf-32"), "application/json", "Füchslein 🦊"),
        ('{"prompt": "Füchslein"}'.encode("latin-1"), 'application/json; charset="ISO-8859-1"', "Füchslein"),
        ("赤い狐".encode("shift_jis"), "text/plain;charset=Shift_JIS", "赤い狐"),
        ("Füchslein".encode("utf-16"), "text/plain; charset=utf-8", "Füchslein"),
        (codecs.BOM_UTF16_BE + "Füchslein".encode("utf-16-be"), "text/plain", "Füchslein"),
    ],
)
def test_prompt_is_read(body: bytes, content_type: str, prompt: str) -> None:
    request = parse({"body": body}, content_type)
    expected = GenerationRequest(prompt, **DEFAULTS, seed=request.seed)
    assert request == expected


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            {'{"prompt": "a red fox"}': b""},
            "the body is JSON that was sent as a form: send Content-Type: application/json",
        ),
        ({'\ufeff {"prompt": "a': b'b", "seed": 3}'}, "send Content-Type: application/json"),
        ({}, "the form has no field: send Content-Type: application/json, or text/plain"),
        ({"[1,2]": b""}, "send Content-Type: application/json"),
        ({'seed": 3}': b"", '{"prompt": "cats ': b""}, "send Content-Type: application/json"),  # cut at an ampersand
        ({"a red fox": b""}, "send Content-Type: text/plain"),
    ],
)
@pytest.mark.parametrize("face", APIS.values())
def test_body_that_a_shell_sent_as_a_form(form: dict[str, bytes], message: str, face: NativeApi) -> None:
    """`curl -d` and PowerShell say that a body is an urlencoded form, unless they are told otherwise."""
    with pytest.raises(RequestError, match=re.escape(message)):
        face.read(form, content_type="application/x-www-form-urlencoded; charset=UTF-8", contract=CONTRACT)


def test_json_that_is_sent_as_text_is_told() -> None:
    body, kind = {"body": b'{"prompt": "a red fox"}'}, "text/plain;charset=UTF-8"
    (warning,) = NativeApi().read(body, content_type=kind, contract=CONTRACT)[1]
    assert warning == "the prompt looks like JSON but is used as text; for JSON send Content-Type: application/json"
    assert NativeApi().read({"body": b"{a} fox"}, content_type=kind, contract=CONTRACT)[1] == []


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
    assert parse(form) == parse({"body": json.dumps(fields).encode()}, "application/json")
    assert parse(form).original_size == (32, 64)


VALUES = (
    *("null", "true", "0", "-0.0", "-1", "1.0", "64.0", "64.5", "1e3", "1e400", "-1e400", "9" * 400, "4e9", "0.3"),
    *('""', '"64"', '"x"', '"None"', "[]", "[1.0, 0]", "[64.0, 1e400]", "[null]", "[[1]]", "{}", '{"name": 1.0}'),
    *('{"name": "Euler", "use_karras_sigmas": 1.0}', '{"name": "DPM++ 2M", "solver_order": 2.0}', '[{"name": "a"}]'),
)


@pytest.fixture(scope="module")
def real() -> Contract:
    """A contract with real schedulers."""
    return build_shipped_contract()


def read_or_refuse(api: NativeApi, values: dict[str, bytes], kind: str, contract: Contract) -> Any:
    try:
        return api.read(values, content_type=kind, contract=contract)[0]
    except RequestError as error:
        return error


@pytest.mark.parametrize("name", DECLARATIONS)
def test_value_of_any_kind_is_read_or_refused(real: Contract, name: str) -> None:
    """As JSON and as a form's text."""
    fields = {"prompt": '"a red fox"', "num_inference_steps": "2", "width": "64", "image": f'"{RED}"'}
    for value, api in itertools.product(VALUES, (NativeApi(), OpenAIEditApi())):
        every = {**fields, name: value}
        body = {"body": f"{{{', '.join(f'{json.dumps(name)}: {value}' for name, value in every.items())}}}".encode()}
        form = {name: value.strip('"').encode() for name, value in every.items()}
        for values, kind in ((body, "application/json"), (form, "multipart/form-data; boundary=x")):
            read = read_or_refuse(api, values, kind, real)
            if isinstance(read, RequestError):
                assert str(read).isascii()
                assert read.param is not None
            else:
                assert {type(read.width), type(read.seed), type(read.num_inference_steps)} == {int}
                assert type(read.guidance_scale) is float


@pytest.mark.parametrize("image", [{}, {"image": RED}])
def test_whole_number_with_a_point_is_that_number(image: dict[str, Any]) -> None:
    body = json.dumps({"prompt": "a", **image}).removesuffix("}")
    numbers = '"seed": 1e3, "clip_skip": 1.0, "num_images_per_prompt": 2.0, "original_size": [64.0, 32], "strength": 1'
    given = f'{body}, "width": 64.0, "num_inference_steps": 6.0, {numbers}}}'
    plain = f'{body}, "width": 64, "num_inference_steps": 6, {numbers.replace("1e3", "1000").replace(".0", "")}}}'
    read = [parse({"body": each.encode()}, "application/json") for each in (given, plain)]
    assert read[0].describe() == read[1].describe()
    assert json.dumps(read[0].describe()) == json.dumps(read[1].describe())  # equal requests get equal files
    assert (read[0].width, read[0].height) == (64, 64)


def test_whole_option_of_a_scheduler(real: Contract) -> None:
    body = b'{"prompt": "a", "scheduler": {"name": "DPMSolverMultistepScheduler", "solver_order": 3.0}}'
    request = NativeApi().read({"body": body}, content_type="application/json", contract=real)[0]
    assert isinstance(request.scheduler, dict)
    assert type(request.scheduler["solver_order"]) is int


def test_seeds_are_random_unless_given() -> None:
    seeds = {CONTRACT.check({"prompt": "x", **seed}).seed for seed in ({}, {"seed": -1}, {"seed": None}) * 2}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_media_types_have_no_case() -> None:
    request = CONTRACT.check({"prompt": "x"})
    for accepted in ("application/json", "Application/JSON, */*;q=0.5"):
        assert NativeApi().choose_type(request, accepted) == "application/json"
    assert NativeApi().choose_type(request, "image/*") == "image/jpeg"


def test_description_makes_the_request_again() -> None:
    request = CONTRACT.check({"prompt": "x", "seed": 3, "num_images_per_prompt": 3, "original_size": [9, 8]})
    again = CONTRACT.check(json.loads(json.dumps(request.describe(2))))
    assert again == dataclasses.replace(request, seed=5, num_images_per_prompt=1)


@pytest.mark.parametrize(
    ("body", "content_type", "parts"),
    [
        (b"", "text/plain", ["prompt takes a text with more than spaces"]),
        (b" \n", "text/plain", ["prompt takes a text with more than spaces"]),
        (b"\xff\xf0", "text/plain", ["not UTF-8", "byte 0 is 0xff", "; charset=iso-8859-1"]),
        (b"\xff\xfea", "text/plain", ["not utf-16", "byte 2 is 0x61"]),
        ("Füchslein".encode("latin-1"), "text/plain; charset=utf-8", ["the body is not UTF-8: byte 1 is 0xfc"]),
        (b"a red fox", "text/plain; charset=punycode", ["charset takes one of utf-8, ", "not 'punycode'"]),
        (b"a red fox", "text/plain; charset=\xff", ["charset takes one of utf-8, "]),
        (b'{"prompt": "a"}', "application/json; charset=utf-16", ["not utf-16"]),
        (b'["a red fox"]', "", ["no object"]),
        (b'{"prompt": "\xfc"}', "application/json", ["byte 12 is 0xfc; name another charset"]),
        (b"{", "application/json", ["not JSON"]),
        (b"", "application/json", ["not JSON"]),
        (b"[" * 40_000, "application/json", ["not JSON", "nested too deeply"]),
        (b"[" * 100_000, "application/json", ["not JSON", "more than 50000 commas and brackets"]),
        (b'["a red fox"]', "application/json", ["no object"]),
        (b'{"prompt": "a", "guidance_scale": NaN}', "application/json", ["NaN is not a number"]),
        (b'{"prompt": "a", "guidance_scale": -Infinity}', "application/json", ["-Infinity is not a number"]),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "application/json", ["not JSON"]),
    ],
)
def test_body_that_is_no_request(body: bytes, content_type: str, parts: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        parse({"body": body}, content_type)
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
        ({"seed": -2}, "seed", ["from -1 to 4294967295", "not -2"]),
        ({"num_images_per_prompt": 4}, "num_images_per_prompt", ["from 1 to 3"]),
        (
            {"scheduler": "Heun"},
            "scheduler",
            ["such as DDIM, not 'Heun'; openapi.json lists all"],
        ),
        ({"scheduler": {"name": "Euler", "beta_end": 1}}, "scheduler", ["options use_karras_sigmas, not 'beta_end'"]),
        ({"scheduler": '{"name"'}, "scheduler", ["scheduler takes a name or JSON such as", "not '{\"name\"'"]),
        ({"clip_skip": 3}, "clip_skip", ["from 0 to 2"]),
        ({"denoising_end": 0}, "denoising_end", ["a number above 0 to 1"]),
        ({"original_size": [1]}, "original_size", ["two whole numbers from 0 to 65536"]),
        ({"output_format": "gif"}, "output_format", ["one of jpeg, png, webp"]),
        ({"timeout": 0}, "timeout", ["a number from 1 to 3600"]),
        ({"mask_image": RED}, "mask_image", ["mask_image needs an image"]),
        ({"image": "no base64!"}, "image", ["image takes base64"]),
        ({"image": 3}, "image", ["image takes an image in base64, not 3"]),
        ({"image": "AAAA"}, "image", ["cannot be read"]),
        ({"image": RED[:120]}, "image", ["image takes"]),
        ({"image": encode(Image.new("1", (20_008, 8)))}, "image", ["sides of 8 to 20000 pixels", "not 20008x8"]),
        ({"image": encode(Image.new("RGB", (9, 9)), "PPM")}, "image", ["as JPEG, PNG, WebP, AVIF, GIF, TIFF or BMP"]),
        ({"image": "https://example.org/a.png"}, "image", ["takes base64", "send the file, not its URL"]),
        ({"image": "data:image/png,%89PNG"}, "image", ["takes a data URL in base64, not 'data:image/png'"]),
        ({"image": [RED, RED]}, "image", ["not 2 in a list; send one image"]),
        ({"image": RED, "resize_mode": "fill"}, "resize_mode", ["one of crop, pad"]),
        (
            {"width": 256, "height": 256, "num_inference_steps": 20},
            "num_inference_steps",
            ["images x UNet calls x megapixels may be 1 at most", "20 UNet calls of 256x256"],
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
    assert (request.width, request.height, request.image.size) == (88, 176, (88, 176))


def test_field_given_twice_is_refused() -> None:
    with pytest.raises(RequestError, match="'prompt' is given twice"):
        parse({"body": b'{"prompt": "a"}', "prompt": b"b"}, "application/json")


def test_allowed_sizes() -> None:
    contract = make_contract(dataclasses.replace(LIMITS, allowed_sizes=((128, 64), (64, 64))))
    assert contract.check({"prompt": "a", "width": 64}).width == 64
    with pytest.raises(RequestError, match="one of 128x64, 64x64 here, not 128x128"):
        contract.check({"prompt": "a", "height": 128})


def test_contract_has_the_requests_fields() -> None:
    assert {each.name for each in dataclasses.fields(GenerationRequest)} == set(CONTRACT.properties)
    lacking = FAMILIES["sd"].lacks
    plain = make_contract(LIMITS, lacking=lacking)
    assert set(CONTRACT.properties) - set(plain.properties) == set(lacking)
    with pytest.raises(RequestError, match="'prompt_2' is not a field"):
        plain.check({"prompt": "a", "prompt_2": "b"})


def test_description_holds_what_makes_the_picture_and_nothing_of_its_delivery() -> None:
    request = CONTRACT.check(
        {"prompt": "x", "seed": MAX_SEED, "num_images_per_prompt": 2, "timeout": 3000, "stream": True, "image": RED}
    )
    low = make_contract(dataclasses.replace(LIMITS, config=dataclasses.replace(CONFIG, max_timeout=5)))
    again = low.check(json.loads(json.dumps(request.describe(1))))
    assert (again.seed, again.timeout, again.stream, again.strength) == (0, 5, False, 0.8)
    assert again.num_images_per_prompt == 1


def test_what_is_generated_is_what_is_committed() -> None:
    from openapi_spec_validator import validate

    validate(build_openapi(build_shipped_contract()))
    for path, content in make_all().items():
        assert path.read_text() == content, f"{path.name}: python -m tools.write_generated"


def test_every_field_has_words() -> None:
    assert all(declaration.words for declaration in DECLARATIONS.values())
