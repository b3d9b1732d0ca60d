"""A1111's API: its requests in terms of the contract, its answers, and commands to a drawing."""

import base64
import dataclasses
import gc
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdxl_server.api.a1111 import NO_EQUIVALENT, A1111Api, A1111Img2ImgApi
from sdxl_server.api.a1111_documents import A1111_DOCUMENTS
from sdxl_server.api.http import HttpRequest, Response
from sdxl_server.api.metadata import read_metadata
from sdxl_server.errors import RequestError
from sdxl_server.model.embeddings import Embedding
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.request.adapters import RegisteredAdapter
from sdxl_server.service import Service, describe_error
from tests.a1111_clients import OPEN_WEBUI, SILLY_TAVERN, SILLY_TAVERN_ASKS
from tests.unit.pipelines import encode, load, make_picture
from tests.unit.test_request import CONTRACT, LIMITS, RED, make_contract

MODEL = {"model_name": "foxes", "model_sha256": "ab" * 32, "model_autov2": "ab" * 5}
PHOTO = Image.effect_noise((96, 64), 90).convert("RGB")
MASK = Image.new("L", PHOTO.size)
MASK.paste(255, (40, 20, 60, 40))


@pytest.fixture(scope="module")
def loaded(tiny_model: Path) -> LoadedPipeline:
    return load(tiny_model, num_inference_steps=3, width=64, height=64, max_images=4)


def read(is_img2img: Any = False, contract: Any = CONTRACT, **fields: Any) -> tuple[Any, list[str]]:
    """Return the request and its warnings."""
    api = (A1111Img2ImgApi if is_img2img else A1111Api)(MODEL)
    body = {"body": json.dumps({"prompt": "a red fox", **fields}).encode()}
    return api.read(body, content_type="application/json", contract=contract)


def ask(service: Service, path: str, body: Any = None, **about: Any) -> Response:
    values = {} if body is None else {"body": json.dumps(body).encode()}
    kind = "" if body is None else "application/json"
    return service.answer(HttpRequest(values, path=f"sdapi/v1/{path}", content_type=kind, **about))


def finish(response: Response) -> Any:
    """Return the JSON of a response, from here to its end."""
    return json.loads(b"".join(_list_replies(response)))


def _list_replies(response: Response) -> Iterator[bytes]:
    while True:
        try:
            yield next(response.steps) or b""
        except StopIteration as end:
            yield end.value
            return


def step(response: Response) -> bytes:
    """Make one step."""
    while (sent := next(response.steps)) is None:
        pass
    return sent


def open_images(answer: Any) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(each))) for each in answer["images"]]


# Requests.


def test_fields_have_their_meaning() -> None:
    request, warnings = read(
        **{"negative_prompt": "blurry", "steps": 5, "cfg_scale": 7.5, "width": 64, "height": 128, "seed": 9},
        **{"sampler_name": "Euler", "scheduler": "Karras", "n_iter": 3, "override_settings": {}},
    )
    assert warnings == []
    assert (request.num_inference_steps, request.guidance_scale, request.seed) == (5, 7.5, 9)
    assert (request.width, request.height, request.negative_prompt) == (64, 128, "blurry")
    assert request.scheduler == {"name": "EulerDiscreteScheduler", "use_karras_sigmas": True}
    assert (request.num_images_per_prompt, request.output_format, request.clip_skip) == (3, "png", None)


def test_absent_fields_have_the_servers_defaults() -> None:
    request, warnings = read(
        **{"steps": None, "cfg_scale": "", "width": None, "negative_prompt": "", "seed": -1, "sampler_name": ""},
        **{"scheduler": "Automatic", "styles": [], "script_name": None, "alwayson_scripts": {}, "eta": None},
        **{"override_settings": {"CLIP_stop_at_last_layers": None, "sd_vae": ""}},
    )
    assert warnings == []
    assert (request.num_inference_steps, request.guidance_scale, request.width, request.height) == (7, 2.5, 128, 64)
    assert request.scheduler == "EulerDiscreteScheduler"
    assert read(seed=-1)[0].seed != request.seed


def test_numbers_and_switches_may_be_text() -> None:
    request, warnings = read(steps="6", cfg_scale="3.5", width="64.0", seed="-1", batch_size="2", enable_hr="false")
    assert (request.num_inference_steps, request.guidance_scale, request.width) == (6, 3.5, 64)
    assert request.num_images_per_prompt == 2
    assert warnings == []


@pytest.mark.parametrize(
    ("fields", "scheduler"),
    [
        ({"sampler_name": "Euler"}, "EulerDiscreteScheduler"),
        ({"sampler_index": "DDIM"}, "DDIMScheduler"),
        ({"sampler_name": "DDIM", "sampler_index": "Euler"}, "DDIMScheduler"),
        ({"sampler_name": "DDIM", "scheduler": "Automatic"}, "DDIMScheduler"),
        ({"scheduler": "karras"}, {"name": "EulerDiscreteScheduler", "use_karras_sigmas": True}),
        (
            {"sampler_name": "k_euler", "scheduler": "Karras"},
            {"name": "EulerDiscreteScheduler", "use_karras_sigmas": True},
        ),
        ({"sampler_name": "Euler Karras"}, {"name": "EulerDiscreteScheduler", "use_karras_sigmas": True}),
        (
            {"sampler_name": "Euler Karras", "scheduler": "Karras"},
            {"name": "EulerDiscreteScheduler", "use_karras_sigmas": True},
        ),
        (
            {"sampler_name": "Euler Karras", "scheduler": "automatic"},
            {"name": "EulerDiscreteScheduler", "use_karras_sigmas": True},
        ),
    ],
)
def test_samplers_and_schedules(fields: dict[str, Any], scheduler: Any) -> None:
    assert read(**fields)[0].scheduler == scheduler


@pytest.mark.parametrize("schedule", [None, "Automatic", "automatic"])
def test_without_a_schedule_the_sampler_has_a1111s_own(loaded: LoadedPipeline, schedule: str | None) -> None:
    request = read(contract=loaded.contract, sampler_name="DPM++ 2M", scheduler=schedule)[0]
    assert request.scheduler["use_karras_sigmas"] is True
    assert request.scheduler["name"] == "DPMSolverMultistepScheduler"


@pytest.mark.parametrize(
    ("is_xl", "number", "clip_skip"), [(True, 1, None), (True, 2, None), (True, 3, 1), (False, 1, None), (False, 2, 1)]
)
def test_clip_skip_counts_from_the_last_layer(is_xl: bool, number: int, clip_skip: int | None) -> None:
    contract = make_contract(dataclasses.replace(LIMITS, is_xl=is_xl))
    settings = {"CLIP_stop_at_last_layers": number}
    assert read(contract=contract, override_settings=settings, clip_skip=4)[0].clip_skip == clip_skip
    assert read(contract=contract, clip_skip=number)[0].clip_skip == clip_skip


@pytest.mark.parametrize(
    ("name", "fields"),
    [("png", {}), ("jpeg", {"quality": 70}), ("jpg", {}), ("webp", {})],
)
def test_settings_choose_the_file(name: str, fields: dict[str, Any]) -> None:
    settings = {"samples_format": name, **({"jpeg_quality": 70} if fields else {})}
    request, warnings = read(override_settings=settings)
    assert (request.output_format, request.quality) == (name.replace("jpg", "jpeg"), fields.get("quality", 80))
    assert warnings == []


@pytest.mark.parametrize(
    "name", ["foxes", "Foxes.safetensors", "foxes [ababababab]", "a\\b\\foxes.ckpt", "ab" * 5, "ab" * 32]
)
def test_this_model_is_known_by_its_names(name: str) -> None:
    assert read(override_settings={"sd_model_checkpoint": name})[1] == []


@pytest.mark.parametrize(
    ("fields", "warning"),
    [
        ({"restore_faces": True}, "restore_faces has no effect here, and True is ignored"),
        ({"tiling": True}, "tiling has no effect here"),
        ({"styles": ["photo"]}, "styles has no effect here, and ['photo'] is ignored"),
        ({"subseed": 4, "subseed_strength": 0.5}, "subseed_strength has no effect here"),
        ({"refiner_checkpoint": "x", "refiner_switch_at": 0.8}, "refiner_checkpoint has no effect here"),
        ({"script_name": "X/Y/Z plot", "script_args": [1]}, "script_name has no effect here"),
        (
            {"alwayson_scripts": {"ADetailer": {"args": [True]}}},
            "alwayson_scripts has no effect here, and {'ADetailer'",
        ),
        ({"alwayson_scripts": "x"}, "alwayson_scripts has no effect here"),
        ({"eta": 0.5}, "eta has no effect here, and 0.5 is ignored"),
        ({"foo": 1}, "ignored, since there is no such field: 'foo'"),
        ({"override_settings": {"foo": 1}}, "ignored, since there is no such field: 'override_settings.foo'"),
        ({"override_settings": {"sd_vae": "x.pt"}}, "sd_vae has no effect here, and 'x.pt' is ignored"),
        (
            {"override_settings": {"sd_model_checkpoint": "x"}},
            "sd_model_checkpoint: 'x' is ignored; the only model is foxes",
        ),
        ({"prompt": "a fox <hypernet:x:1>"}, "prompt: <hypernet:x:1> left out"),
    ],
)
def test_fields_without_an_effect_are_warned_of(fields: dict[str, Any], warning: str) -> None:
    (found,) = read(**fields)[1]
    assert found.startswith(warning) or found.startswith(warning.replace("<hypernet:x:1>", "'<hypernet:x:1>'"))


def test_values_without_an_effect_need_no_warning() -> None:
    fields = {name: accepted[0] for name, accepted in NO_EQUIVALENT.items() if accepted}
    fields |= {"subseed": -1, "seed_resize_from_h": -1, "hr_scale": 2, "hr_upscaler": "Latent", "save_images": True}
    fields |= {"denoising_strength": 0.7, "s_tmax": 0, "override_settings_restore_afterwards": True, "eta": 1.0}
    assert read(**fields)[1] == []


def test_tags_of_adapters_are_applied() -> None:
    """Also without lora_tags: A1111's API has no other way to name them."""
    limits = dataclasses.replace(LIMITS, adapters={"outline": RegisteredAdapter(1.0, 4, {})})
    request, warnings = read(contract=make_contract(limits), prompt="a fox <lora:outline:0.5>")
    assert (request.prompt, request.adapters) == ("a fox", ({"name": "outline", "scale": 0.5},))
    assert warnings == []
    with pytest.raises(RequestError, match="^prompt names the adapter 'owl'; the adapters are: outline$"):
        read(contract=make_contract(limits), prompt="a fox <lora:owl:0.5>")
    request, warnings = read(prompt="a fox <lora:owl:0.5>")
    assert (request.prompt, request.adapters) == ("a fox", None)
    assert warnings == ["prompt: '<lora:owl:0.5>' left out; this server has no adapters"]


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"prompt": ""}, "prompt", "prompt is missing"),
        ({"steps": 0}, "steps", "steps takes a whole number from 1 to 20, not 0"),
        ({"steps": "many"}, "steps", "steps takes a whole number from 1 to 20, not 'many'"),
        ({"cfg_scale": 101}, "cfg_scale", "cfg_scale takes a number from 0 to 100, not 101"),
        ({"width": 65}, "width", "width takes a whole number from 64 to 256 that is a multiple of 8, not 65"),
        ({"seed": -2}, "seed", "seed takes a whole number from -1 to 4294967295, not -2"),
        ({"batch_size": 0}, "batch_size", "batch_size takes a whole number from 1 to 3, not 0"),
        ({"n_iter": 4}, "n_iter", "n_iter takes a whole number from 1 to 3, not 4"),
        ({"batch_size": 2, "n_iter": 2}, "n_iter", "batch_size x n_iter may be 3 at most, not 2 x 2"),
        ({"batch_size": True}, "batch_size", "batch_size takes a whole number"),
        ({"sampler_name": "Foo"}, "sampler_name", "sampler_name takes a sampler"),
        ({"sampler_name": 3}, "sampler_name", "sampler_name takes a sampler"),
        ({"sampler_index": "Foo"}, "sampler_name", "sampler_name takes a sampler"),
        ({"sampler_name": "Euler", "scheduler": "Foo"}, "scheduler", "takes a schedule, one of automatic, karras"),
        ({"scheduler": 4}, "scheduler", "takes a schedule"),
        ({"enable_hr": True, "hr_scale": 1}, "hr_scale", "hr_scale takes a number above 1 to 4, not 1"),
        ({"enable_hr": "maybe"}, "enable_hr", "enable_hr takes true or false, not 'maybe'"),
        ({"send_images": 3}, "send_images", "send_images takes true or false, not 3"),
        ({"override_settings": 3}, "override_settings", "override_settings takes an object, not 3"),
        (
            {"override_settings": {"CLIP_stop_at_last_layers": 5}},
            "CLIP_stop_at_last_layers",
            "CLIP_stop_at_last_layers takes a whole number from 1 to 4, not 5",
        ),
        (
            {"override_settings": {"samples_format": "gif"}},
            "samples_format",
            "samples_format takes one of png, jpg, jpeg",
        ),
        ({"override_settings": {"jpeg_quality": 0}}, "jpeg_quality", "jpeg_quality takes a whole number from 1 to 100"),
        ({"steps": 20, "batch_size": 3, "width": 256, "height": 256}, "steps", "reduce steps or batch_size or width"),
        ({"prompt": "x" * 101}, "prompt", "prompt takes a text with more than spaces, of at most 100 characters"),
    ],
)
def test_mistakes_are_told_in_a1111s_names(fields: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        read(**fields)
    assert message in str(caught.value)
    status, described = describe_error(caught.value, "id", path="sdapi/v1/txt2img")
    (detail,) = described["detail"]
    assert (status, detail["loc"], detail["msg"]) == (422, ["body", field], str(caught.value))


# Image to image.


def read_image(**fields: Any) -> Any:
    return read(is_img2img=True, **{"init_images": [RED], **fields})[0]


def test_an_image_to_start_from() -> None:
    for value in ([RED], RED, [f"data:image/png;base64,{RED}"]):
        request, warnings = read(is_img2img=True, init_images=value, inpaint_full_res=True, mask_blur=4)
        assert (request.image.getpixel((5, 5)), request.mask_image, request.strength) == ((255, 0, 0), None, 0.75)
        assert warnings == []
        assert not request.is_crop
    assert read_image(denoising_strength="0.5").strength == 0.5
    assert read(init_images=[RED])[1] == ["ignored, since there is no such field: 'init_images'"]


@pytest.mark.parametrize(
    ("number", "mode"), [(None, "stretch"), (0, "stretch"), (1, "crop"), ("2", "pad"), (3, "stretch")]
)
def test_resize_modes(number: Any, mode: str) -> None:
    assert read_image(resize_mode=number, width=128, height=64).resize_mode == mode


def read_mask(mask: Image.Image, **fields: Any) -> Any:
    return read_image(init_images=[encode(PHOTO)], mask=encode(mask), width=96, height=64, **fields)


def test_masks() -> None:
    whole = read_mask(MASK, inpaint_full_res=False)
    assert (whole.mask_image.getpixel((50, 30)), whole.mask_image.getpixel((5, 5))) == (255, 0)
    assert (whole.padding_mask_crop, whole.mask_blur) == (None, 4)
    inverted = read_mask(MASK, inpaint_full_res=0, inpainting_mask_invert=1)
    assert (inverted.mask_image.getpixel((50, 30)), inverted.mask_image.getpixel((5, 5))) == (0, 255)
    assert read_mask(MASK).padding_mask_crop == 0  # A1111's default
    assert read_mask(MASK, inpaint_full_res_padding=32).padding_mask_crop == 32
    assert read_mask(MASK, mask_blur=7, mask_blur_x=3).mask_blur == 7
    assert read_mask(MASK, mask_blur_x=3, mask_blur_y=3).mask_blur == 3


@pytest.mark.parametrize("is_inverted", [False, True])
def test_opaque_strokes_are_repainted(is_inverted: bool) -> None:
    """A1111 repaints what is opaque, and other APIs what is transparent."""
    strokes = Image.new("RGBA", PHOTO.size)
    strokes.paste((255, 255, 255, 255), (40, 20, 60, 40))
    request = read_mask(strokes, inpaint_full_res=False, inpainting_mask_invert=is_inverted)
    assert (request.mask_image.getpixel((50, 30)) == 255) is not is_inverted
    assert (request.mask_image.getpixel((5, 5)) == 255) is is_inverted


def test_the_fill_of_a_mask() -> None:
    body: dict[str, Any] = {"init_images": [encode(PHOTO)], "mask": encode(MASK), "width": 96, "height": 64}
    for number, fill in ((None, "surroundings"), (0, "surroundings"), ("1", "original")):
        request, warnings = read(is_img2img=True, **body, inpainting_fill=number)
        assert (request.mask_fill, warnings) == (fill, [])
    request, (warning,) = read(is_img2img=True, **body, inpainting_fill=2)
    assert (request.mask_fill, warning) == (
        "surroundings",
        "inpainting_fill is 0 here, colours from around the mask, and not 2",
    )
    del body["mask"]
    assert read(is_img2img=True, **body, inpainting_fill=0)[1] == []


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"init_images": None}, "init_images", "init_images takes a list of one image in base64, not 0"),
        ({"init_images": []}, "init_images", "not 0"),
        ({"init_images": [RED, RED]}, "init_images", "not 2"),
        ({"init_images": ["AAAA"]}, "init_images", "init_images takes a whole image"),
        ({"init_images": [None]}, "init_images", "init_images takes an image in base64, not None"),
        ({"init_images": ["https://x/y.png"]}, "init_images", "send the file, not its URL"),
        ({"mask": "AAAA"}, "mask", "mask takes a whole image"),
        ({"mask": encode(Image.new("L", (80, 8)))}, "mask", "mask takes the aspect of the image"),
        ({"resize_mode": 4}, "resize_mode", "resize_mode takes a whole number from 0 to 3, not 4"),
        ({"denoising_strength": 2}, "denoising_strength", "denoising_strength takes a number from 0 to 1, not 2"),
        ({"mask": RED, "mask_blur": 65}, "mask_blur", "mask_blur takes a whole number from 0 to 64, not 65"),
        (
            {"mask": RED, "inpaint_full_res_padding": -1},
            "inpaint_full_res_padding",
            "inpaint_full_res_padding takes a whole number from 0 to 1024, not -1",
        ),
        ({"mask": RED, "inpainting_mask_invert": 2}, "inpainting_mask_invert", "takes true or false, not 2"),
        ({"mask": RED, "inpainting_fill": 4}, "inpainting_fill", "takes a whole number from 0 to 3, not 4"),
        ({"mask": RED, "inpaint_full_res": "x"}, "inpaint_full_res", "takes true or false, not 'x'"),
    ],
)
def test_mistakes_with_images(fields: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_image(**fields)
    assert message in str(caught.value)
    assert caught.value.param == field


# Answers.


def test_the_answer_has_a1111s_shape(loaded: LoadedPipeline) -> None:
    body = {"prompt": "a red fox", "seed": 5, "batch_size": 2, "foo": 1, "steps": 2, "override_settings": {"x": 1}}
    response = ask(Service(loaded), "txt2img", body)
    answer = finish(response)
    assert response.content_type == "application/json"
    assert list(answer) == ["images", "parameters", "info"]
    images, info = open_images(answer), json.loads(answer["info"])
    for index, image in enumerate(images):
        assert (image.format, image.size) == ("PNG", (64, 64))
        assert np.array_equal(np.asarray(image), make_picture(loaded, seed=5 + index, num_inference_steps=2))
        assert info["infotexts"][index] == image.info["parameters"]
    assert {"steps": 2, "cfg_scale": 5.0, "batch_size": 2, "n_iter": 1, "seed": 5}.items() <= answer[
        "parameters"
    ].items()
    assert "foo" not in answer["parameters"]
    expected = {"all_seeds": [5, 6], "all_prompts": ["a red fox"] * 2, "all_negative_prompts": ["", ""], "seed": 5}
    expected |= {"width": 64, "steps": 2, "sampler_name": "Euler", "sd_model_name": "tiny", "clip_skip": 1}
    assert expected.items() <= info.items()
    assert info["warnings"] == response.headers["X-Warning"].split("; ")
    assert len(info["warnings"]) == 2


def test_images_are_sent_on_request_only(loaded: LoadedPipeline) -> None:
    answer = finish(ask(Service(loaded), "txt2img", {"prompt": "a", "n_iter": 2, "steps": 1, "send_images": False}))
    assert answer["images"] == []
    assert len(json.loads(answer["info"])["all_seeds"]) == 2
    photo = {"prompt": "a", "init_images": [encode(PHOTO)], "mask": encode(MASK), "steps": 2, "inpaint_full_res": False}
    for is_included in (False, True):
        body = {**photo, "include_init_images": is_included, "width": 96, "height": 64}
        answer = finish(ask(Service(loaded), "img2img", body))
        assert (answer["parameters"]["init_images"] is not None) is is_included
        assert (answer["parameters"]["mask"] is not None) is is_included
        assert len(answer["images"]) == 1


def test_only_masked_draws_a_crop(loaded: LoadedPipeline) -> None:
    photo = Image.effect_noise((200, 120), 90).convert("RGB")
    mask = Image.new("L", photo.size)
    mask.paste(255, (60, 40, 90, 70))
    body = {"prompt": "a", "init_images": [encode(photo)], "mask": encode(mask), "inpaint_full_res_padding": 8}
    answer = finish(ask(Service(loaded), "img2img", {**body, "width": 64, "height": 64, "steps": 2}))
    (image,) = open_images(answer)
    assert image.size == photo.size
    is_kept = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(image)[is_kept], np.asarray(photo)[is_kept])
    assert not np.array_equal(np.asarray(image), np.asarray(photo))
    described = read_metadata(base64.b64decode(answer["images"][0]), loaded.contract.limits)
    assert {"padding_mask_crop": 8, "mask_blur": 4}.items() <= described["request"].items()


@pytest.mark.parametrize("body", [SILLY_TAVERN, OPEN_WEBUI], ids=["SillyTavern", "Open WebUI"])
def test_recorded_requests_are_drawn(loaded: LoadedPipeline, body: dict[str, Any]) -> None:
    answer = finish(ask(Service(loaded), "txt2img", body))
    assert len(answer["images"]) == body.get("batch_size", 1)
    assert not {"url", "auth"} & answer["parameters"].keys()  # the key stays where it was
    assert "name:key" not in json.dumps(answer)
    warnings = json.loads(answer["info"])["warnings"]
    assert [each for each in warnings if not each.startswith("ignored, since there is no such field")] == []


# Documents.


@pytest.mark.parametrize("path", A1111_DOCUMENTS)
def test_every_document_is_json(loaded: LoadedPipeline, path: str) -> None:
    service = Service(loaded)
    body = {"image": encode(PHOTO)} if path == "png-info" else None
    finish(ask(service, path, body))
    assert not ask(service, path, body).waits


def test_lists_name_what_requests_accept(loaded: LoadedPipeline) -> None:
    service = Service(loaded)
    for each in finish(ask(service, "samplers")):
        read(contract=loaded.contract, sampler_name=each["name"], scheduler="automatic")
        read(contract=loaded.contract, sampler_name=each["aliases"][0])
    for each in finish(ask(service, "schedulers")):
        for name in (each["name"], each["label"]):
            read(contract=loaded.contract, sampler_name="Euler", scheduler=name)
    (model,), options = finish(ask(service, "sd-models")), finish(ask(service, "options"))
    assert (model["model_name"], model["title"], options["sd_model_checkpoint"]) == ("tiny", "tiny", "tiny")
    assert model["filename"] == "tiny"  # no path of this machine
    assert finish(ask(service, "embeddings")) == {"loaded": {}, "skipped": {}}
    zork = Embedding("zork", "ab" * 32, 2, {"text_encoder": 768, "text_encoder_2": 1280}, "")
    (named,) = finish(ask(Service(dataclasses.replace(loaded, embeddings=(zork,))), "embeddings"))["loaded"].items()
    assert named == (
        "zork",
        {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None, "shape": 2048, "vectors": 2},
    )
    assert set(SILLY_TAVERN_ASKS) <= A1111_DOCUMENTS.keys()


def test_options_stay_as_they_are(loaded: LoadedPipeline) -> None:
    service = Service(loaded)
    options = finish(ask(service, "options"))
    assert finish(ask(service, "options", options)) is None
    assert finish(ask(service, "options", {"sd_model_checkpoint": "TINY.safetensors", "sd_vae": None})) is None
    for body, message in (
        ({"sd_model_checkpoint": "other"}, "sd_model_checkpoint is tiny on this server and stays so, not 'other'"),
        ({**options, "samples_format": "jpg"}, "samples_format is png on this server and stays so, not 'jpg'"),
        ({"foo": 1}, "'foo' is no option here; the options are sd_model_checkpoint"),
    ):
        with pytest.raises(RequestError) as caught:
            ask(service, "options", body)
        assert message in str(caught.value)
        status, described = describe_error(caught.value, "id", path="sdapi/v1/options")
        assert (status, described["detail"][0]["loc"][1]) == (422, caught.value.param)


def test_png_info_is_the_text_of_an_image(loaded: LoadedPipeline) -> None:
    service = Service(loaded)
    answer = finish(ask(service, "txt2img", {"prompt": "a red fox", "steps": 2, "seed": 3}))
    for image in (answer["images"][0], f"data:image/png;base64,{answer['images'][0]}"):
        read_back = finish(ask(service, "png-info", {"image": image}))
        assert read_back["info"] == json.loads(answer["info"])["infotexts"][0]
        assert {"Prompt": "a red fox", "Seed": "3", "Steps": "2"}.items() <= read_back["parameters"].items()
    assert finish(ask(service, "png-info", {"image": RED})) == {"info": "", "items": {}, "parameters": {}}
    for body in ({"image": "AAAA"}, {}, {"image": None}):
        with pytest.raises(RequestError) as caught:
            ask(service, "png-info", body)
        assert caught.value.param == "image"


def test_unknown_paths_are_told(loaded: LoadedPipeline) -> None:
    with pytest.raises(RequestError) as caught:
        ask(Service(loaded), "interrogate")
    status, described = describe_error(caught.value, "id", path="sdapi/v1/interrogate")
    assert status == 404
    assert described["detail"].startswith("there is no path 'sdapi/v1/interrogate'; the paths are sdapi/v1/")
    assert list(described) == ["error", "detail", "body", "errors"]
    with pytest.raises(RequestError, match="the paths are v1/models, v1/models/diffusion_fast, v1/images/generations"):
        Service(loaded).answer(HttpRequest({}, path="v1/foo"))


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (RequestError("the queue is full", status=503), 503, "server_busy"),
        (TimeoutError("the timeout has passed"), 504, "timeout_error"),
        (ValueError("x"), 500, "server_error"),
    ],
)
def test_other_errors_have_a1111s_form(error: Exception, status: int, kind: str) -> None:
    found, described = describe_error(error, "id", path="sdapi/v1/txt2img")
    assert (found, described["error"], described["body"]) == (status, kind, "")
    assert described["detail"] == described["errors"] != ""
    assert describe_error(error, "id")[1]["error"]["type"] == kind  # the native form is as it was


# Commands to a drawing.


def draw(service: Service, *, holder: str = "", **fields: Any) -> Response:
    """Begin a drawing, and make its first step."""
    response = ask(service, "txt2img", {"prompt": "a red fox", "steps": 3, "seed": 1, **fields}, holder=holder)
    step(response)
    return response


def test_progress_follows_the_drawing(loaded: LoadedPipeline) -> None:
    service = Service(loaded)
    idle = finish(ask(service, "progress"))
    assert (idle["progress"], idle["state"]["job_count"], idle["current_image"]) == (0.0, 0, None)
    response = draw(service, batch_size=2)
    first = finish(ask(service, "progress"))
    assert 0 < first["progress"] < 0.3
    assert first["eta_relative"] > 0
    assert (first["state"]["sampling_step"], first["state"]["sampling_steps"], first["state"]["job_count"]) == (1, 3, 2)
    step(response)  # it draws the preview that the client has asked for
    second = finish(ask(service, "progress"))
    assert second["progress"] > first["progress"]
    preview = Image.open(io.BytesIO(base64.b64decode(second["current_image"])))
    assert (preview.format, preview.size) == ("PNG", (64, 64))
    assert len(finish(response)["images"]) == 2
    assert finish(ask(service, "progress")) == idle


def test_previews_are_drawn_on_request_only(loaded: LoadedPipeline) -> None:
    service = Service(loaded)
    response = draw(service)
    assert finish(ask(service, "progress/skip_current_image"))["progress"] > 0
    step(response)
    (drawing,) = [service.drawings.find_oldest("")]
    assert drawing is not None
    assert (drawing.preview, drawing.is_watched) == (None, False)
    assert finish(ask(service, "progress/skip_current_image"))["current_image"] is None
    finish(response)


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_an_interrupt_ends_the_drawing(loaded: LoadedPipeline, steps: int) -> None:
    """The answer has the images that are finished, three steps each."""
    service = Service(loaded)
    response = ask(service, "txt2img", {"prompt": "a red fox", "steps": 3, "n_iter": 3, "seed": 1})
    sent = b"".join([step(response) for _ in range(steps)])
    assert finish(ask(service, "interrupt", {})) == {}
    answer = json.loads(sent + b"".join(_list_replies(response)))
    finished = [1][: steps // 3]
    assert len(answer["images"]) == len(finished)
    assert json.loads(answer["info"])["all_seeds"] == finished
    assert answer["parameters"]["n_iter"] == 3
    assert finish(ask(service, "progress"))["state"]["job_count"] == 0


def test_a_skipped_image_is_left_out(loaded: LoadedPipeline) -> None:
    service = Service(loaded)
    response = draw(service, n_iter=3)
    assert finish(ask(service, "skip", {})) == {}
    answer = finish(response)
    assert json.loads(answer["info"])["all_seeds"] == [2, 3]
    expected = [make_picture(loaded, seed=seed, num_inference_steps=3) for seed in (2, 3)]
    assert all(np.array_equal(*pair) for pair in zip(expected, map(np.asarray, open_images(answer)), strict=True))
    response = draw(service)
    finish(ask(service, "skip", {}))
    assert finish(response)["images"] == []


def test_commands_act_on_the_clients_own_drawing(loaded: LoadedPipeline) -> None:
    service = Service(loaded)
    first, second = draw(service, holder="anna"), draw(service, holder="ben", steps=3)
    for command in ("interrupt", "skip"):
        finish(ask(service, command, {}, holder="carl"))
        finish(ask(service, command, {}))
    assert finish(ask(service, "progress", holder="carl"))["state"]["job_count"] == 0
    finish(ask(service, "progress", holder="anna"))
    step(first)
    assert finish(ask(service, "progress", holder="ben"))["current_image"] is None
    assert finish(ask(service, "progress", holder="anna"))["current_image"] is not None
    finish(ask(service, "interrupt", {}, holder="ben"))
    assert [len(finish(each)["images"]) for each in (first, second)] == [1, 0]


def test_a_client_that_leaves_takes_its_drawing_along(loaded: LoadedPipeline) -> None:
    service = Service(loaded)
    for steps in (0, 1):
        response = ask(service, "txt2img", {"prompt": "a red fox", "steps": 3})
        for _ in range(steps):
            step(response)
        assert finish(ask(service, "progress"))["state"]["job_count"] == 1
        gc.disable()
        try:
            response.steps.close()
            assert service.drawings.find_oldest("") is None
        finally:
            gc.enable()


def test_other_apis_have_no_commands(loaded: LoadedPipeline) -> None:
    service = Service(loaded)
    body = {"body": json.dumps({"prompt": "a", "num_inference_steps": 2}).encode()}
    native = service.answer(HttpRequest(body, content_type="application/json", accept="application/json"))
    step(native)
    finish(ask(service, "interrupt", {}))
    assert finish(ask(service, "progress"))["state"]["job_count"] == 0
    assert len(finish(native)["data"]) == 1


def test_a_late_failure_is_part_of_the_answer() -> None:
    api = A1111Api(MODEL)
    _, described = describe_error(TimeoutError("the timeout has passed"), "id", path="sdapi/v1/txt2img")
    assert json.loads(api.write_failure(described, kind="application/json", images=0)) == described


def test_the_header_names_the_holder() -> None:
    for headers in ({"X-Holder": "anna"}, {"x-holder": "anna"}):
        assert HttpRequest.read({}, headers, model="m", own_id="i").holder == "anna"
    assert HttpRequest.read({"X-Holder": b"anna"}, {"X-Holder": {"anna": 1}}, model="m", own_id="i").holder == ""
