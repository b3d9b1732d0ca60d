"""Metadata between programs: A1111's text, ComfyUI's graph, and our own in each kind of file."""

import base64
import contextlib
import dataclasses
import io
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from PIL import ExifTags, Image, PngImagePlugin

from sdxl_server.api.http import HttpRequest
from sdxl_server.api.image_encoding import encode_image
from sdxl_server.api.infotext import read_clip_skip, read_infotext, write_clip_skip, write_infotext
from sdxl_server.api.marking import Marker
from sdxl_server.api.metadata import read_metadata
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.errors import RequestError
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.request.adapters import RegisteredAdapter
from sdxl_server.request.fields import GenerationRequest
from sdxl_server.request.limits import Limits
from sdxl_server.request.sampler_names import name_sampler, read_sampler
from sdxl_server.request.samplers import ALIASES, SAMPLERS, SCHEDULES
from sdxl_server.service import Service

ALL_SAMPLERS = {name: row.options for name, row in SAMPLERS.items()}
INK = RegisteredAdapter(scale=0.5, rank=4, defaults={})
LIMITS = Limits(samplers=ALL_SAMPLERS, adapters={"ink": INK, "outline-2": INK})
EULER_A, KARRAS = "EulerAncestralDiscreteScheduler", read_sampler("DPM++ 2M Karras", ALL_SAMPLERS)
LAST = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 512x768"
LAST_FIELDS = {
    **{"num_inference_steps": 20, "scheduler": EULER_A, "guidance_scale": 7.0, "seed": 5, "width": 512, "height": 768}
}


def make_request(**fields: Any) -> GenerationRequest:
    return GenerationRequest(**{"prompt": "a red fox", "width": 512, "height": 768, "seed": 5, **fields})


def parse_like_a1111(text: str) -> dict[str, str]:
    """Parse a text by A1111's rules, as its page "PNG Info" does."""
    pair = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    *lines, last = text.strip().split("\n")
    if len(pair.findall(last)) < 3:
        lines, last = [*lines, last], ""
    prompts: dict[str, list[str]] = {"Prompt": [], "Negative prompt": []}
    current = "Prompt"
    for line in map(str.strip, lines):
        if line.startswith("Negative prompt:"):
            current, line = "Negative prompt", line[len("Negative prompt:") :].strip()
        prompts[current].append(line)
    found = {name: "\n".join(each) for name, each in prompts.items()}
    for name, value in pair.findall(last):
        quoted = value[:1] == value[-1:] == '"'
        found[name] = json.loads(value) if quoted else value
    return found


def read_or_refuse(read: Callable[[Any, Limits], dict[str, Any]], given: Any) -> dict[str, Any]:
    """Return the request that is read, empty after the clear error; any other error fails the test."""
    with contextlib.suppress(RequestError):
        described = read(given, LIMITS)
        json.dumps(described)
        return dict(described["request"])
    return {}


# A1111's text


FIELDS: list[dict[str, Any]] = [
    {},
    {"prompt": 'first line\n\nthird: line, with "quotes" and Steps: 3, Seed: 4\nSteps: 1, Sampler: x, Seed: 2'},
    {"negative_prompt": "snow,\nsleet: much"},
    {"negative_prompt": ""},
    {"guidance_scale": 7.123456789, "num_inference_steps": 1, "seed": 2**32 - 1, "guidance_rescale": 0.7},
    {"clip_skip": 2, "strength": 0.35, "denoising_end": 0.8},
    {"guidance_scale": 0.1 + 0.2, "guidance_rescale": 1e-5, "adapters": ({"name": "ink", "scale": 1.25e-7},)},
    {"prompt_2": '"a", b: c', "negative_prompt_2": "[1, 2]\nx"},
    {"original_size": (512, 256), "crops_coords_top_left": (0, 8), "target_size": (64, 64)},
    {"timesteps": (999, 500, 1), "unet_calls": 7, "guidance_interval": (0.0, 0.5)},
    {"sigmas": (14.5, 1.25, 0.0), "resize_mode": "pad", "invert_mask": True},
    {"schedule": "StableDiffusionXLSigmas"},
    {"adapters": ({"name": "ink", "scale": 0.8}, {"name": "outline-2", "scale": -1.0})},
    *({"scheduler": read_sampler(alias, ALL_SAMPLERS)} for alias in ALIASES),
    *({"scheduler": name} for name in SAMPLERS),
    {"scheduler": {"name": "EulerDiscreteScheduler", "use_beta_sigmas": True}},
    {"scheduler": {"name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "final_sigmas_type": "zero"}},
]


@pytest.mark.parametrize("is_xl", [True, False])
@pytest.mark.parametrize("fields", FIELDS, ids=range(len(FIELDS)))
def test_what_is_written_is_read(fields: dict[str, Any], is_xl: bool) -> None:
    request = make_request(**fields)
    text = write_infotext({"request": request.describe(), "made_with": {"is_xl": is_xl}})
    read = read_infotext(text, dataclasses.replace(LIMITS, is_xl=is_xl))
    assert "warnings" not in read
    tuples = {name: tuple(each) if isinstance(each, list) else each for name, each in read["request"].items()}
    assert make_request(**{"prompt": "", **tuples}) == request


def test_a1111_reads_what_is_written() -> None:
    adapters = ({"name": "ink", "scale": 0.8}, {"name": "outline-2", "scale": 1.0})
    more: dict[str, Any] = {"scheduler": KARRAS, "adapters": adapters, "clip_skip": 1, "strength": 0.5}
    request = make_request(prompt="a fox,\nred: 1", negative_prompt='"snow"', guidance_scale=6.5, **more)
    digests = [{"name": each["name"], "autov2": digit * 10} for each, digit in zip(adapters, "ab", strict=True)]
    made_with = {
        **{"model_name": "fox, v1: best", "model_autov2": "31e35c80fc", "is_xl": False, "adapters": digests},
        **{"vae": {"path": "models/vae-fix", "lossy": False}, "versions": {"sdxl_server": "1.2"}},
    }
    assert parse_like_a1111(write_infotext({"request": request.describe(), "made_with": made_with})) == {
        "Prompt": "a fox,\nred: 1 <lora:ink:0.8> <lora:outline-2:1>",
        "Negative prompt": '"snow"',
        **{"Steps": "30", "Sampler": "DPM++ 2M", "Schedule type": "Karras", "CFG scale": "6.5", "Seed": "5"},
        **{"Size": "512x768", "Model hash": "31e35c80fc", "Model": "fox, v1: best", "VAE": "vae-fix"},
        **{"Denoising strength": "0.5", "Clip skip": "2", "Version": "sdxl_server 1.2"},
        "Lora hashes": "ink: aaaaaaaaaa, outline-2: bbbbbbbbbb",
    }


@pytest.mark.parametrize("fields", FIELDS[2:], ids=range(2, len(FIELDS)))
def test_a1111_finds_all_parameters_of_each_text(fields: dict[str, Any]) -> None:
    found = parse_like_a1111(write_infotext({"request": make_request(**fields).describe()}))
    assert found["Prompt"].startswith("a red fox")
    assert (found["Size"], found["Seed"]) == ("512x768", str(fields.get("seed", 5)))


A1111: list[tuple[str, dict[str, Any], list[str]]] = [
    (f"a fox\n{LAST}, Model hash: 45dee52b", {"prompt": "a fox"}, []),
    (
        f"a fox\nNegative prompt: snow\nsleet\n{LAST}, Clip skip: 2, ENSD: 31337",
        {"negative_prompt": "snow\nsleet"},
        ["ENSD"],
    ),
    (
        "a fox\r\nNegative prompt: snow\r\nSteps: 25, Sampler: DPM++ 2M Karras, CFG scale: 5.5, Seed: 1, "
        "Size: 1024x1024, Model hash: 31e35c80fc, Model: sd_xl_base_1.0, Version: v1.6.0",
        {"scheduler": KARRAS, "guidance_scale": 5.5, "negative_prompt": "snow"},
        [],
    ),
    (
        "a fox\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Automatic, CFG scale: 7, Seed: 1, Size: 512x512, "
        "Denoising strength: 0.7, Hires upscale: 2, Hires steps: 10, Hires upscaler: Latent, RNG: CPU, Version: v1",
        {"scheduler": KARRAS, "hires": {"scale": 2, "strength": 0.7, "steps": 10}},
        ["Hires upscaler: Latent", "RNG: CPU"],
    ),
    (
        "a fox\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Automatic, CFG scale: 7, Seed: 1, Size: 512x512, "
        "Denoising strength: 0.7, Hires resize: 1024x1024, Hires steps: 10, RNG: CPU, Version: v1",
        {"scheduler": KARRAS},
        ["Hires resize: 1024x1024", "Hires denoising strength: 0.7", "RNG: CPU"],
    ),
    (
        "a fox <lora:ink:0.8>, <lora:other:1>\nSteps: 20, Sampler: Euler, Schedule type: SGM Uniform, CFG scale: 1, "
        'Size: 512x512, Lora hashes: "ink: 0123456789ab, other: 0123456789ab", Distilled CFG Scale: 3.5, Beta schedule '
        "alpha: 0.6, Version: f2.0.1v1.10.1-previous-665-gae278f79, Module 1: vae, Diffusion in Low Bits: Automatic",
        {"prompt": "a fox,", "adapters": [{"name": "ink", "scale": 0.8}]},
        ["adapters left out: 'other'; the adapters here are: ink, outline-2", "Distilled CFG Scale"],
    ),
    (
        "a fox <lora:ink:0.5:0.9>\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Schedule type: Karras",
        {
            "prompt": "a fox",
            "adapters": [{"name": "ink", "scale": 0.9}],
            "scheduler": {"name": EULER_A, "use_karras_sigmas": True},
        },
        ["one scale here, 0.9"],
    ),
    (
        "a fox\nNegative prompt: snow\nSteps: 20, Size: 1024x1024, Sampler: UniPC, Seed: 1, CFG scale: 6, "
        "CFG rescale: 0.7, App: SD.Next, Version: 9a1e8a6, Operations: txt2img, Model: base, Parser: native",
        {"guidance_rescale": 0.7, "scheduler": read_sampler("UniPC", ALL_SAMPLERS)},
        ["Parser: native"],
    ),
    (
        "a fox\nSteps: 20, Sampler: Restart, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 512x512, "
        'ADetailer prompt: "a face, Steps: 3, \\"so\\"", ADetailer model: face_yolov8n.pt, Tiling: True',
        {},
        ["takes no Restart", 'ADetailer prompt: a face, Steps: 3, "so"', "Tiling: True"],
    ),
    (
        "a fox\nSteps: 30, CFG scale: 7, Sampler: DPM++ 2M SDE, Seed: 99999999999, Size: 832x1216, Clip skip: 3, "
        'Created Date: 2024-10-29T1642:33Z, Civitai resources: [{"type":"model","modelVersionId":1, "x": "a, b: 5"}], '
        "Civitai metadata: {}",
        {"width": 832, "height": 1216, "clip_skip": 1, "num_inference_steps": 30},
        ["seeds here are whole numbers from 0 to 4294967295"],
    ),
    (
        f"a fox\nSteps: 3, a b: c, d e: f\n{LAST}\nTemplate: a {{fox|cat}}",
        {"prompt": "a fox\nSteps: 3, a b: c, d e: f"},
        [],
    ),
    (
        f"{LAST}, Schedule type: Align Your Steps",
        {"prompt": ""},
        ["Schedule type 'Align Your Steps': takes a schedule"],
    ),
    (f"a fox\n{LAST.replace('7', 'many')}", {"prompt": "a fox"}, ["CFG scale takes a number, not 'many'"]),
]


@pytest.mark.parametrize(("text", "fields", "warnings"), A1111, ids=range(len(A1111)))
def test_other_programs_texts_are_read(text: str, fields: dict[str, Any], warnings: list[str]) -> None:
    read = read_infotext(text, LIMITS)
    assert fields.items() <= read["request"].items()
    told = "\n".join(read.get("warnings", ()))
    assert bool(told) == bool(warnings)
    assert all(each in told for each in warnings), told
    assert not re.search("Civitai|Created|hash", told)


def test_the_plain_text_gives_exactly_its_fields() -> None:
    assert read_infotext(f"a fox\nNegative prompt: snow\n{LAST}, Model: x, Model hash: 1", LIMITS) == {
        "request": {"prompt": "a fox", "negative_prompt": "snow", **LAST_FIELDS},
        "made_with": {"model": "x", "model_hash": "1"},
    }


def test_clip_skip_is_counted_from_the_models_own_layer() -> None:
    """A1111's 1 is the last layer. SDXL reads the one before it, so there its 2 is nothing, too."""
    assert [read_clip_skip(number, is_xl=False) for number in (1, 2, 3)] == [None, 1, 2]
    assert [read_clip_skip(number, is_xl=True) for number in (1, 2, 3)] == [None, None, 1]
    for is_xl in (True, False):
        assert [write_clip_skip(number, is_xl=is_xl) for number in (None, 0)] == [None, None]
        assert all(read_clip_skip(write_clip_skip(each, is_xl=is_xl) or 0, is_xl=is_xl) == each for each in (1, 5))


def test_samplers_have_a1111s_names() -> None:
    """A plain name there means its automatic schedule, so the nearest to the model's own is named."""
    named = {alias: name_sampler(read_sampler(alias, ALL_SAMPLERS)) for alias in ALIASES}
    assert named["DPM++ 2M Karras"] == ("DPM++ 2M", "Karras")
    assert (named["DPM++ 2M"], named["Euler a"]) == (("DPM++ 2M", "Uniform"), ("Euler a", ""))
    assert named["uni_pc_bh2"] == ("UniPC", "")
    assert name_sampler("EDMEulerScheduler") == ("EDMEulerScheduler", "")
    for schedule in SCHEDULES:
        sampler = read_sampler({"name": "Euler", "schedule": schedule}, ALL_SAMPLERS)
        name, written = name_sampler(sampler)
        assert read_sampler({"name": name, "schedule": written}, ALL_SAMPLERS) == sampler


@pytest.mark.parametrize("text", ["", "a fox", "\0", "a: b, c: d, e: f", "{}", "Steps: 20", "x" * 1_000_001])
def test_other_texts_are_no_infotexts(text: str) -> None:
    with pytest.raises(RequestError, match="the text is not A1111's|at most 1000000 are read"):
        read_infotext(text, LIMITS)


def test_odd_texts_raise_nothing_else() -> None:
    """Pieces of real texts and of JSON in any order, and cut anywhere."""
    chance = random.Random(7)
    pieces = [
        *("Steps: 20, ", "Sampler: Euler a, ", "Seed: -1, ", "Seed: 1e9, ", "CFG scale: nan, ", "Size: 0x99999, "),
        *("Size: x, ", "Clip skip: -5, ", "Clip skip: 2.5, ", 'prompt_2: "', "target_size: [[[[, ", "scheduler: {}, "),
        *("scheduler: Infinity, ", "timesteps: [1e999], ", "seed: 5, ", "image: x, ", "stream: true, ", "timeout: x, "),
        *("\n", "Negative prompt:", "<lora:", ":", ">", "<lora:ink:x>", "<lora:ink:1:2:3:unet=4>", "<hypernet:ink:1>"),
        *(
            '"',
            "\\",
            ",",
            "[" * 3000,
            "{" * 50,
            "\ud800",
            "\0",
            "\ufeff",
            "é",
            " " * 500,
            "9" * 5000,
            "Schedule type: \n, ",
        ),
        *("Hires x: 1, ", "Denoising strength: , ", "Sampler: , ", "Schedule type: Karras, ", "Steps: 1.5, "),
    ]
    counts = {True: 0, False: 0}
    for _ in range(3000):
        text = "".join(chance.choices(pieces, k=chance.randrange(1, 25)))
        text = text[: chance.randrange(len(text) + 1)] + chance.choice(("", f"\n{LAST}"))
        read = read_or_refuse(read_infotext, text)
        assert {"image", "stream", "timeout"}.isdisjoint(read)
        counts[bool(read)] += 1
    assert min(counts.values()) > 300


@pytest.mark.parametrize(
    "part", ['aa: "', 'aa: "b", ', "aa: [", "aa: {} ", "a a", "\n", "Steps: 1, ", '"\\', "Negative prompt:\n", "<lora:"]
)
def test_the_work_grows_with_the_length_alone(part: str) -> None:
    script = f"""if True:
        import contextlib, time
        from sdxl_server.api.infotext import read_infotext
        from sdxl_server.errors import RequestError
        from sdxl_server.request.limits import Limits
        start = time.process_time()
        with contextlib.suppress(RequestError):
            read_infotext({part!r} * {900_000 // len(part)} + {LAST!r}, Limits())
        print(time.process_time() - start)"""
    taken = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout
    assert float(taken) < 5  # most take a tenth of a second


# Files


def save(
    kind: str, *, comment: bytes | None = None, texts: Mapping[str, str] | None = None, compress: bool = False
) -> bytes:
    """Return an image file of another program."""
    file, options = io.BytesIO(), dict[str, Any]()
    if comment is not None:
        exif = Image.Exif()
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
        options["exif"] = exif.tobytes()
    if kind == "png":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        for name, text in (texts or {}).items():
            options["pnginfo"].add_text(name, text, zip=compress)
    Image.new("RGB", (64, 64)).save(file, kind, **options)
    return file.getvalue()


INFOTEXT = f"ein Füchslein 狐\nNegative prompt: snow\n{LAST}"
COMMENTS = {
    "big": b"UNICODE\0" + INFOTEXT.encode("utf-16-be"),
    "little": b"UNICODE\0" + INFOTEXT.encode("utf-16-le"),
    "marked": b"UNICODE\0" + b"\xff\xfe" + INFOTEXT.encode("utf-16-le"),
    "ascii": b"ASCII\0\0\0" + INFOTEXT.encode(),
    "undefined": bytes(8) + INFOTEXT.encode(),
    "bare": INFOTEXT.encode(),
}


@pytest.mark.parametrize("kind", ["jpeg", "webp", "avif", "png"])
@pytest.mark.parametrize("comment", COMMENTS)
def test_comments_in_exif_are_read(kind: str, comment: str) -> None:
    request = read_metadata(save(kind, comment=COMMENTS[comment]), LIMITS)["request"]
    assert request == {"prompt": "ein Füchslein 狐", "negative_prompt": "snow", **LAST_FIELDS}


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("text", [INFOTEXT, f"ein Füchslein\n{LAST}"])  # iTXt, and tEXt or zTXt
def test_texts_of_png_are_read(text: str, compress: bool) -> None:
    read = read_metadata(save("png", texts={"parameters": text}, compress=compress), LIMITS)
    assert read["request"]["prompt"] == text.partition("\n")[0]


DESCRIBED = {
    "request": {
        "prompt": 'a "fox" 🦊 <b> & \x01\x7f\x85 \ufffe\uffff \u2028\tx\ny',
        "seed": 7,
        "width": 64,
        "height": 64,
    },
    "warnings": ["long"],
    "made_with": {"model": "a", "unet_calls": 7.5, "versions": {"sdxl_server": "1"}},
    "request_id": "order-7",
}


@pytest.mark.parametrize("marking", ["xmp", "none"])
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_own_files_hold_both(kind: str, marking: str) -> None:
    marker, request = Marker(HandlerConfig(marking=marking)), make_request(output_format=kind)
    file = encode_image(Image.new("RGB", (64, 64)), request, marker=marker, parameters=DESCRIBED)
    assert read_metadata(file, Limits()) == DESCRIBED
    image = Image.open(io.BytesIO(file))
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
    text = image.info["parameters"] if kind == "png" else comment.removeprefix(b"UNICODE\0").decode("utf-16-be")
    assert parse_like_a1111(text)["Seed"] == "7"
    assert (b"DigitalSourceType" in image.info["xmp"]) is (marking == "xmp")
    plain = encode_image(Image.new("RGB", (64, 64)), request, marker=marker)
    assert ("xmp" in Image.open(io.BytesIO(plain)).info) is (marking == "xmp")
    with pytest.raises(RequestError, match="holds no metadata"):
        read_metadata(plain, LIMITS)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_files_of_older_versions_are_read(kind: str) -> None:
    text = json.dumps(DESCRIBED, ensure_ascii=False)
    comment = b"UNICODE\0" + text.encode("utf-16-be")
    file = save("png", texts={"parameters": text}) if kind == "png" else save(kind, comment=comment)
    assert read_metadata(file, Limits()) == DESCRIBED


def test_a_program_may_write_the_property_as_an_element() -> None:
    packet = (
        "<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:RDF xmlns:rdf='http://www.w3.org/1999/02/22-rdf-syntax-ns#'>"
        '<rdf:Description xmlns:a=\'urn:sdxl_server\'><a:metadata>{"request": {"prompt": "&lt;b>"}}</a:metadata>'
        "</rdf:Description></rdf:RDF></x:xmpmeta>"
    )
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "webp", xmp=packet.encode())
    assert read_metadata(file.getvalue(), Limits()) == {"request": {"prompt": "<b>"}}


BOMB = b"<!DOCTYPE a [<!ENTITY b 'b'>]><a xmlns:s='urn:sdxl_server' s:metadata='&b;'/>"


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (b"", "this takes a whole image as JPEG"),
        (b"x" * 99, "this takes a whole image as JPEG"),
        (save("png")[:20], "this takes a whole image as JPEG"),
        (save("png"), "this image holds no metadata of a request"),
        (save("jpeg", comment=b"ASCII\0\0\0holiday"), "the text is not A1111's: it has no line such as Steps: 20"),
        (save("png", texts={"parameters": '{"a": [}'}), "the text is not A1111's"),
        (save("png", texts={"prompt": "a red fox"}), "the graph of ComfyUI is not JSON"),
        (save("png", texts={"prompt": "[" * 100_000}), "the graph of ComfyUI is not JSON"),
        (save("png", texts={"prompt": "{}"}), "none of the samplers that are read"),
        (save("png", texts={"XML:com.adobe.xmp": BOMB.decode()}), "this image holds no metadata of a request"),
        (save("png", texts={"XML:com.adobe.xmp": "<urn:sdxl_server"}), "this image holds no metadata of a request"),
        (b"\x89PNG\r\n\x1a\n" + b"\0\0\0\0tEXt\0\0\0\0" * 20_000, "more than 10000 chunks"),
    ],
)
def test_files_without_metadata_give_one_line(file: bytes, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        read_metadata(file, LIMITS)
    assert "\n" not in str(caught.value)


def test_damaged_files_raise_nothing_else() -> None:
    chance = random.Random(7)
    files = [
        save(kind, comment=COMMENTS["big"], texts={"parameters": INFOTEXT}) for kind in ("jpeg", "png", "webp", "avif")
    ]
    for number in range(800):
        file = bytearray(files[number % len(files)])
        for _ in range(chance.randrange(1, 6)):
            file[chance.randrange(len(file))] = chance.randrange(256)
        end = chance.choice((len(file), chance.randrange(len(file))))
        read_or_refuse(read_metadata, bytes(file[:end]))


def test_the_reader_needs_no_torch() -> None:
    code = "import sys, sdxl_server.api.metadata; print({'torch', 'diffusers', 'openvino'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"set()\n"


# ComfyUI's graph


def make_node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def make_graph(**nodes: Any) -> dict[str, Any]:
    """The graph that ComfyUI begins with; `nodes` replace some of its nodes."""
    given = {"seed": 5, "steps": 20, "cfg": 8.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1}
    links = {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
    return {
        "3": make_node("KSampler", **given, **links),
        "4": make_node("CheckpointLoaderSimple", ckpt_name="xl\\fox-v1.safetensors"),
        "5": make_node("EmptyLatentImage", width=1024, height=512, batch_size=1),
        "6": make_node("CLIPTextEncode", text="a fox", clip=["4", 1]),
        "7": make_node("CLIPTextEncode", text="snow", clip=["4", 1]),
        "8": make_node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": {**make_node("SaveImage", images=["8", 0]), "is_changed": [float("nan")]},
        **nodes,
    }


GRAPH_FIELDS = {
    **{"prompt": "a fox", "negative_prompt": "snow", "num_inference_steps": 20, "guidance_scale": 8.0, "seed": 5},
    **{"width": 1024, "height": 512, "scheduler": KARRAS},
}
LINKS = {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
LORA = make_node(
    "LoraLoader", lora_name="a/ink.safetensors", strength_model=0.8, strength_clip=0.8, model=["4", 0], clip=["4", 1]
)
ADVANCED = make_node(
    "KSamplerAdvanced",
    **{"noise_seed": 5, "steps": 20, "cfg": 8.0, "sampler_name": "euler", "scheduler": "normal", "start_at_step": 0},
    **{"end_at_step": 16, "add_noise": "enable", "return_with_leftover_noise": "enable"},
    **LINKS,
)
CUSTOM = make_node(
    "SamplerCustom",
    **{"noise_seed": 5, "cfg": 8.0, "add_noise": True, "sampler": ["20", 0], "sigmas": ["21", 0]},
    **LINKS,
)
XL_TEXT = {
    "clip": ["4", 1],
    "width": 512,
    "height": 256,
    "crop_w": 8,
    "crop_h": 0,
    "target_width": 64,
    "target_height": 32,
}
GRAPHS: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    ({}, GRAPH_FIELDS, []),
    ({"7": make_node("CLIPTextEncode", text="", clip=["4", 1])}, {"negative_prompt": ""}, []),
    ({"7": make_node("ConditioningZeroOut", conditioning=["6", 0])}, {"negative_prompt": None}, []),
    (
        {"4": LORA | {"inputs": LORA["inputs"] | {"model": ["14", 0]}}, "14": make_graph()["4"]},
        {"adapters": [{"name": "ink", "scale": 0.8}], "prompt": "a fox"},
        [],
    ),
    (
        {
            "4": make_node("ModelSamplingDiscrete", model=["14", 0]),
            "14": make_node("LoraLoaderModelOnly", lora_name="x", strength_model=1),
        },
        {},
        ["adapters left out: 'x'", "ModelSamplingDiscrete"],
    ),
    ({"3": ADVANCED}, {"seed": 5, "denoising_end": 0.8, "num_inference_steps": 20}, []),
    (
        {
            "3": CUSTOM,
            "20": make_node("KSamplerSelect", sampler_name="dpmpp_2m"),
            "21": make_node("BasicScheduler", model=["4", 0], scheduler="karras", steps=20, denoise=1.0),
        },
        GRAPH_FIELDS,
        [],
    ),
    (
        {"3": CUSTOM, "20": make_node("SamplerX"), "21": make_node("KarrasScheduler", steps=9)},
        {"num_inference_steps": 9},
        ["SamplerX"],
    ),
    (
        {"6": make_node("CLIPTextEncodeSDXL", text_l="a fox", text_g="red", **XL_TEXT)},
        {"prompt_2": "red", "original_size": [256, 512], "crops_coords_top_left": [0, 8], "target_size": [32, 64]},
        [],
    ),
    (
        {
            "6": make_node("CLIPTextEncode", text=["30", 0], clip=["31", 0]),
            "30": make_node("PrimitiveString", value="a cat"),
            "31": make_node("CLIPSetLastLayer", stop_at_clip_layer=-3, clip=["4", 1]),
        },
        {"prompt": "a cat", "clip_skip": 1},
        [],
    ),
    ({"5": make_node("VAEEncode", pixels=["40", 0])}, {"strength": 1.0, "width": None}, ["VAEEncode"]),
    (
        {"6": make_node("ControlNetApply", conditioning=["46", 0]), "46": make_graph()["6"]},
        {"prompt": "a fox"},
        ["ControlNetApply"],
    ),
    (
        {
            "2": make_node("KSampler", **{**LINKS, "seed": 9, "steps": 9, "latent_image": ["11", 0]}),
            "11": make_node("LatentUpscale", samples=["3", 0]),
        },
        {"seed": 5},
        ["second KSampler"],
    ),
    # Cycles, links to nothing, and values of other types
    ({"6": make_node("ConditioningCombine", conditioning_1=["6", 0])}, {"prompt": ""}, ["ConditioningCombine"]),
    ({"4": make_node("X", model=["44", 0]), "44": make_node("Y", model=["4", 0])}, {"seed": 5}, ["X, Y"]),
    (
        {"3": make_node("KSampler", latent_image=["3", 0], seed=["3", 0], positive=["99", 0], cfg=[1, 2], steps={})},
        {"prompt": ""},
        ["Steps takes"],
    ),
    (
        {"3": make_node("KSampler", seed=10**4000, cfg=float("nan"), steps=True, sampler_name=5)},
        {"prompt": ""},
        ["Seed takes a number", "CFG scale takes", "Steps takes"],
    ),
]


@pytest.mark.parametrize(("nodes", "fields", "warnings"), GRAPHS, ids=range(len(GRAPHS)))
def test_graphs_are_read(nodes: dict[str, Any], fields: dict[str, Any], warnings: list[str]) -> None:
    read = read_metadata(save("png", texts={"prompt": json.dumps(make_graph(**nodes)), "workflow": "{}"}), LIMITS)
    assert {name: read["request"].get(name) for name in fields} == fields
    told = "\n".join(read.get("warnings", ()))
    assert bool(told) == bool(warnings), told
    assert all(each in told for each in warnings), told
    assert warnings or read["made_with"]["model"] == "fox-v1"


def test_odd_graphs_raise_nothing_else() -> None:
    chance, values = (
        random.Random(7),
        [None, True, -1, 1e99, "x", [], ["3", 0], ["6"], [1, 2], {"a": 1}, float("inf"), "9" * 400],
    )
    for _ in range(500):
        graph = json.loads(
            json.dumps(make_graph(**dict([("3", chance.choice([ADVANCED, CUSTOM, make_graph()["3"]]))])))
        )
        for _ in range(chance.randrange(1, 8)):
            node = graph.get(chance.choice(list(graph)))
            if isinstance(node, dict) and isinstance(inputs := node.get("inputs"), dict) and inputs:
                inputs[chance.choice(list(inputs))] = chance.choice([*values, [chance.choice(list(graph)), 0]])
            if chance.random() < 0.1:
                graph[chance.choice(list(graph))] = chance.choice(values)
        read_or_refuse(read_metadata, save("png", texts={"prompt": json.dumps(graph)}))


# The path


def ask(eager: LoadedPipeline, values: Mapping[str, Any], content_type: str) -> dict[str, Any]:
    response = Service(eager).answer(HttpRequest(values, path="metadata", content_type=content_type))
    with pytest.raises(StopIteration) as end:
        next(response.steps)
    assert not response.waits
    answer: dict[str, Any] = json.loads(end.value.value)
    return answer


def test_the_path_takes_a_body_a_form_and_json(eager: LoadedPipeline) -> None:
    file = save("png", texts={"parameters": INFOTEXT})
    encoded = json.dumps({"image": base64.b64encode(file).decode()}).encode()
    for values, kind in (
        ({"body": file}, "image/png"),
        ({"data": file}, "application/octet-stream"),
        ({"image": file}, "multipart/form-data; boundary=x"),
        ({"body": encoded}, "application/json"),
    ):
        described = ask(eager, values, kind)
        assert eager.contract.check(described["request"]).seed == 5
    for values, kind in (
        ({}, ""),
        ({"body": b""}, "image/png"),
        ({"body": b"{}"}, "application/json"),
        ({"x": b"1"}, "multipart/form-data"),
    ):
        with pytest.raises(RequestError, match="image is missing: send an image file"):
            ask(eager, values, kind)
    with pytest.raises(RequestError, match="image takes one image in base64, not 2 in a list"):
        ask(eager, {"body": b'{"image": ["", ""]}'}, "application/json")
