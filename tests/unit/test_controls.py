"""Controls (T2I-Adapter), compared with diffusers' own pipelines in eager PyTorch."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sdxl_server.api.bodies import read_fields
from sdxl_server.api.image_metadata import describe_image
from sdxl_server.api.openai import OpenAIApi
from sdxl_server.api.warnings import list_warnings
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.diffusion.generation import generate, run_to_end
from sdxl_server.errors import ConfigError, RequestError
from sdxl_server.model.describe import describe_pipeline, list_uncompiled_components
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.sampling.step_plan import build_step_plan, is_inside
from tests.unit.controls import (
    OUTLINE,
    WEIGHTS,
    Picture,
    change,
    control,
    draw_outline,
    make_adapter,
    measure,
    name_control,
    write_model,
)
from tests.unit.pipelines import UNET_ONLY, encode, make_picture, make_pictures
from tools.random_model import CONFIGURATIONS, make_pipeline, save_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("controlled") / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a T2I-Adapter."""
    folder = tmp_path_factory.mktemp("adapters") / "edges"
    make_adapter().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another T2I-Adapter, for grey images, as a file in TencentARC's naming."""
    adapter = make_adapter(seed=6, in_channels=1)
    path = tmp_path_factory.mktemp("files") / "sketch.safetensors"
    save_file({name_as_original(name): each for name, each in adapter.state_dict().items()}, path)
    return path


def name_as_original(name: str, *, is_light: bool = False) -> str:
    """Return a tensor's name in TencentARC's layout, where the layers of all blocks are counted, but for light ones."""
    name = name.removeprefix("adapter.")
    if is_light:
        return name.replace("resnets", "body")
    name = re.sub(r"body\.(\d)\.resnets\.(\d)", lambda found: f"body.{int(found[1]) * 2 + int(found[2])}", name)
    return re.sub(r"body\.(\d)\.in_conv", lambda found: f"body.{int(found[1]) * 2}.in_conv", name)


@pytest.fixture(scope="module")
def eager_controlled(model: Path, folder: Path, file: Path) -> LoadedPipeline:
    return control(model, None, folder, file)


@pytest.fixture(scope="module")
def compiled_controlled(model: Path, folder: Path, file: Path) -> LoadedPipeline:
    """One graph for all sizes."""
    return control(model, "openvino", folder, file, warm_up=True, **UNET_ONLY)


@pytest.fixture(params=["eager_controlled", "compiled_controlled"])
def loaded(request: pytest.FixtureRequest) -> LoadedPipeline:
    chosen: LoadedPipeline = request.getfixturevalue(request.param)
    return chosen


def draw_with_diffusers(model: Path, adapters: Any, image: Any, *, scale: Any, **arguments: Any) -> Picture:
    """Return the image of diffusers' own pipeline for T2I-Adapters."""
    kind = diffusers.StableDiffusionXLAdapterPipeline
    if "text_encoder_2" not in json.loads((model / "model_index.json").read_text()):
        kind = diffusers.StableDiffusionAdapterPipeline
    pipeline = kind.from_pretrained(model, adapter=adapters)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        "a red fox",
        image=image,
        adapter_conditioning_scale=scale,
        generator=torch.Generator().manual_seed(1),
        **{"num_inference_steps": 4, "guidance_scale": 5.0, **arguments},
    )
    return np.asarray(made.images[0]).astype(int)


@pytest.mark.parametrize("size", [(128, 128), (96, 160)])
def test_the_image_equals_diffusers_own(loaded: LoadedPipeline, model: Path, folder: Path, size: Any) -> None:
    image = draw_outline(*size)
    sizes = {"width": size[0], "height": size[1]}
    expected = draw_with_diffusers(model, diffusers.T2IAdapter.from_pretrained(folder), image, scale=0.7, **sizes)
    drawn = make_picture(loaded, control=[name_control(image=image, scale=0.7)])  # its aspect decides
    assert drawn.shape == (size[1], size[0], 3)
    assert measure(drawn, expected) <= 1
    assert measure(make_picture(loaded, **sizes), expected) > 20


def test_two_controls_add_up_as_in_diffusers(loaded: LoadedPipeline, model: Path, folder: Path) -> None:
    both = diffusers.MultiAdapter([diffusers.T2IAdapter.from_pretrained(folder), make_adapter(seed=6, in_channels=1)])
    other = draw_outline(colour="grey").rotate(90)
    expected = draw_with_diffusers(model, both, [OUTLINE, other.convert("L")], scale=[0.7, 0.4])
    controls = [name_control(scale=0.7), name_control("b", other, scale=0.4)]
    assert measure(make_picture(loaded, control=controls), expected) <= 1


def test_scale_0_is_no_control(loaded: LoadedPipeline) -> None:
    plain = make_picture(loaded)
    assert np.array_equal(make_picture(loaded, control=[name_control(scale=0)]), plain)
    assert np.array_equal(make_picture(loaded, control=[]), plain)
    assert not np.array_equal(make_picture(loaded, control=name_control()), plain)


def test_from_and_to_are_shares_of_the_denoising(loaded: LoadedPipeline, model: Path, folder: Path) -> None:
    adapter = diffusers.T2IAdapter.from_pretrained(folder)
    first_half = draw_with_diffusers(model, adapter, OUTLINE, scale=0.8, adapter_conditioning_factor=0.5)
    assert measure(make_picture(loaded, control=[name_control(to=0.5)]), first_half) <= 1
    second = make_picture(loaded, control=[name_control(begin=0.5)])
    assert measure(second, first_half) > 20
    # no step is in this interval
    never = make_picture(loaded, control=[name_control(begin=0.9, to=0.95)])
    assert np.array_equal(never, make_picture(loaded))


@pytest.mark.parametrize(
    "fields",
    [
        {"guidance_scale": 1.0},
        {"guidance_interval": [0.2, 0.8], "num_inference_steps": 6},
        {"num_images_per_prompt": 2},
        {"unet_calls": 4, "num_inference_steps": 6},
        {"width": 120, "height": 136},
        {"image": encode(draw_outline(colour="blue")), "strength": 0.8},
        {"image": encode(draw_outline()), "mask_image": encode(Image.new("L", (128, 128), 255))},
    ],
)
def test_controls_combine_with_other_fields(
    eager_controlled: LoadedPipeline, compiled_controlled: LoadedPipeline, fields: dict[str, Any]
) -> None:
    drawn = make_pictures(compiled_controlled, control=[name_control()], **fields)
    assert measure(drawn, make_pictures(eager_controlled, control=[name_control()], **fields)) <= 1
    assert measure(drawn, make_pictures(compiled_controlled, **fields)) > 20


def test_a_crop_around_a_mask_gets_its_part_of_the_map(eager_controlled: LoadedPipeline) -> None:
    """The crop alone, as an image with its part of the map, draws the same."""
    start, mask = draw_outline(256, 256, colour="blue"), Image.new("L", (256, 256))
    mask.paste(255, (64, 64, 128, 128))
    cropped, places = draw_outline(256, 256), (32, 32, 160, 160)
    drawn = make_picture(
        eager_controlled,
        image=encode(start),
        mask_image=encode(mask),
        padding_mask_crop=32,
        width=128,
        height=128,
        mask_blur=0,
        control=[name_control(image=cropped)],
    )
    alone = make_picture(
        eager_controlled,
        image=encode(start.crop(places)),
        mask_image=encode(mask.crop(places)),
        mask_blur=0,
        control=[name_control(image=cropped.crop(places))],
    )
    assert measure(drawn[32:160, 32:160], alone) <= 1
    assert np.array_equal(drawn[160:], np.asarray(start).astype(int)[160:])


def test_image_to_image_equals_diffusers_own_with_the_maps_added(eager_controlled: LoadedPipeline, model: Path) -> None:
    """diffusers has no such pipeline for T2I-Adapters. Its image-to-image gets a UNet that adds the maps."""
    pipeline = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pixels = torch.from_numpy(np.asarray(OUTLINE).astype(np.float32) / 255).permute(2, 0, 1)[None]
        maps = make_adapter()(pixels)
    forward, start = pipeline.unet.forward, draw_outline(colour="blue")

    def add(*inputs: Any, **options: Any) -> Any:
        return forward(
            *inputs, **options, down_intrablock_additional_residuals=[0.6 * each.repeat(2, 1, 1, 1) for each in maps]
        )

    pipeline.unet.forward = add
    made = pipeline(
        "a red fox",
        image=start,
        strength=0.75,
        num_inference_steps=4,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(1),
    )
    fields = {"image": encode(start), "strength": 0.75, "control": [name_control(scale=0.6)]}
    assert measure(make_picture(eager_controlled, **fields), np.asarray(made.images[0]).astype(int)) <= 1


def test_requests_in_flight_do_not_see_each_others(compiled_controlled: LoadedPipeline) -> None:
    other = name_control("b", draw_outline(colour="red"), scale=2.0)
    kinds: list[list[Any]] = [[], [name_control()], [other], [name_control(to=0.6), other], [name_control(scale=0)]]
    report = describe_pipeline(compiled_controlled)
    expected = [make_picture(compiled_controlled, control=each) for each in kinds]
    fields = [{"prompt": "a red fox", "seed": 1, "control": each} for each in kinds]
    running = [generate(compiled_controlled, compiled_controlled.contract.check(each)) for each in fields]
    for steps in running * 3:
        next(steps)
    for steps, picture in zip(running, expected, strict=True):
        assert np.array_equal(np.asarray(run_to_end(steps)[0].image).astype(int), picture)
    assert describe_pipeline(compiled_controlled) == report  # nothing was compiled for them


def test_a_static_graph_takes_controls(model: Path, folder: Path, eager_controlled: LoadedPipeline) -> None:
    fixed = control(model, "openvino", folder, allowed_sizes=["128x128"], warm_up=True, **UNET_ONLY)
    assert describe_pipeline(fixed)["graphs_for"] == "static"
    wide = name_control(image=draw_outline(192, 128))  # cropped to the allowed size
    for fields in ({"control": [wide]}, {"control": [wide], "guidance_scale": 1.0}, {}):
        assert (
            measure(make_picture(fixed, **fields), make_picture(eager_controlled, width=128, height=128, **fields)) <= 1
        )
    assert describe_pipeline(fixed)["graphs"] == 2  # of the UNet and of the control


@pytest.mark.parametrize(
    "config",
    [
        {"channels": (32, 64), "downscale_factor": 8, "adapter_type": "full_adapter"},
        {"channels": (32, 64), "downscale_factor": 8, "adapter_type": "full_adapter", "in_channels": 1},
        {"channels": (32,), "downscale_factor": 8, "adapter_type": "light_adapter", "num_res_blocks": 3},
    ],
)
def test_adapters_of_stable_diffusion_1(tmp_path: Path, config: dict[str, Any]) -> None:
    """Their first map has the size of the latents, because the first block has attention."""
    pipeline = make_pipeline("tiny-sd")
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    unet = {**CONFIGURATIONS["tiny-sd"]["unet"], **blocks}
    if config["adapter_type"] == "light_adapter":
        unet |= {"block_out_channels": (32, 32)}
    pipeline.register_modules(unet=diffusers.UNet2DConditionModel(in_channels=4, out_channels=4, **unet))
    save_pipeline(pipeline, tmp_path / "model")
    adapter = make_adapter(**config)
    adapter.save_pretrained(tmp_path / "folder")
    is_light = config["adapter_type"] == "light_adapter"
    named = {name_as_original(name, is_light=is_light): each for name, each in adapter.state_dict().items()}
    save_file(named, tmp_path / "original.safetensors")
    copy = tmp_path / "diffusers.safetensors"
    copy.write_bytes((tmp_path / "folder" / WEIGHTS).read_bytes())
    loaded = control(tmp_path / "model", None, tmp_path / "folder", tmp_path / "original.safetensors", copy)
    image = OUTLINE.convert("L") if adapter.config.in_channels == 1 else OUTLINE
    expected = draw_with_diffusers(tmp_path / "model", adapter, image, scale=0.8)
    for name in "abc":
        assert measure(make_picture(loaded, control=[name_control(name)]), expected) <= 1
    assert measure(make_picture(loaded), expected) > 5


def test_reports_name_the_controls(
    compiled_controlled: LoadedPipeline, folder: Path, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    digests = [hashlib.sha256(each.read_bytes()).hexdigest() for each in (folder / WEIGHTS, file)]
    told = [
        {"name": name, "kind": "t2i_adapter", "sha256": digest, "scale": 0.8}
        for name, digest in zip("ab", digests, strict=True)
    ]
    report = describe_pipeline(compiled_controlled)
    assert report["controls"] == told
    assert [len(report["openvino"][part]) for part in ("unet", "control_a", "control_b")] == [1, 1, 1]
    request = compiled_controlled.contract.check(
        {"prompt": "a fox", "resize_mode": "pad", "control": [name_control("b", scale=0.5, to=0.75)]}
    )
    described = describe_image(compiled_controlled, request, 0, unet_calls=1)
    applied = {"scale": 0.5, "from": 0.0, "to": 0.75}
    assert described["made_with"]["controls"] == [told[1] | applied]
    assert described["request"]["control"] == [{"name": "b", **applied}]
    assert list_warnings(compiled_controlled, request) == []
    with pytest.raises(RequestError, match=r"^control\[0\]\.image is missing"):  # the metadata has no images
        compiled_controlled.contract.check(json.loads(json.dumps(described["request"])))
    plain = compiled_controlled.contract.check({"prompt": "a fox"})
    described = describe_image(compiled_controlled, plain, 0, unet_calls=1)
    assert "controls" not in described["made_with"]
    assert "control" not in described["request"]


def test_the_plain_file_of_two_variants_is_read(model: Path, folder: Path, tmp_path: Path) -> None:
    half = {name: each.half() for name, each in load_file(folder / WEIGHTS).items()}
    save_file(half, tmp_path / WEIGHTS.replace("safetensors", "fp16.safetensors"))
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    digests = []
    for _ in range(2):
        digests += [control(model, None, tmp_path).controls[0].sha256]
        (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    assert digests[1] == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest() != digests[0]


def test_only_named_controls_wait_for_compilation(model: Path, folder: Path, file: Path) -> None:
    loaded = control(model, "openvino", folder, file, **UNET_ONLY)
    check = loaded.contract.check
    assert list_uncompiled_components(loaded, check({"prompt": "a fox"})) == ["unet"]
    named = check({"prompt": "a fox", "control": [name_control("b")]})
    assert list_uncompiled_components(loaded, named) == ["unet", "control_b"]


def test_forms_and_other_apis_take_controls(eager_controlled: LoadedPipeline) -> None:
    contract, given = eager_controlled.contract, [name_control(scale=0.5)]
    for text in (json.dumps(given), json.dumps(given[0])):
        values = {"prompt": b"a fox", "seed": b"1", "control": text.encode()}
        fields = read_fields(values, content_type="multipart/form-data", properties=contract.properties, aliases={})
        (read,) = contract.check(fields).control or ()
        assert (read.name, read.scale, read.image.size) == ("a", 0.5, (128, 128))
    body = {"body": json.dumps({"prompt": "a fox", "control": given}).encode()}
    request, warnings = OpenAIApi().read(body, content_type="application/json", contract=contract)
    assert [each.name for each in request.control or ()] == ["a"]
    assert warnings == []


def test_the_images_of_controls_are_resized(eager_controlled: LoadedPipeline) -> None:
    check, wide = eager_controlled.contract.check, name_control(image=draw_outline(256, 128, colour="red"))
    request = check({"prompt": "a fox", "width": 128, "height": 128, "control": [wide, name_control("b")]})
    assert [each.image.size for each in request.control or ()] == [(128, 128)] * 2
    padded = check({"prompt": "a fox", "width": 128, "height": 128, "control": [wide], "resize_mode": "pad"})
    (read,) = padded.control or ()
    assert read.image.getpixel((64, 0)) == (0, 0, 0)  # bars hold no edges
    started = check({"prompt": "a fox", "image": encode(OUTLINE), "control": [wide]})  # the image decides
    assert (started.width, started.height) == started.image.size == (128, 128)
    url = {**wide, "image": "data:image/png;base64," + wide["image"]}
    assert check({"prompt": "a fox", "control": [url]}).width > 128


BROKEN = encode(OUTLINE)[:200]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (name_control("z"), r"control\[0\]\.name takes one of a, b, not 'z'"),
        (["a"], r"control takes a list of at most 2 such as .*, of the controls a, b, not 'a'"),
        ("a", r"control takes a list of at most 2 such as .*, not 'a'"),
        ("[{", r"control takes a list of at most 2 such as .*, not '\[\{'"),
        (7, "control takes a list .*, not 7"),
        ([name_control()] * 3, r"control takes a list of at most 2 .*, not 3"),
        ([name_control()] * 2, "control takes each control once, not a, a"),
        (name_control(scale=11), r"control\[0\]\.scale takes a number from 0 to 10, not 11"),
        (name_control(scale=float("nan")), r"control\[0\]\.scale takes a number from 0 to 10, not nan"),
        (name_control(scale="1"), r"control\[0\]\.scale takes a number from 0 to 10, not '1'"),
        (name_control(scale=True), r"control\[0\]\.scale takes a number from 0 to 10, not True"),
        ([name_control(), name_control("b", to=1.5)], r"control\[1\]\.to takes a number from 0 to 1, not 1\.5"),
        (name_control(begin=0.5, to=0.5), r"control\[0\]\.to takes a share above from, 0\.5, not 0\.5"),
        (name_control(weight=1), r"control\[0\]\.'weight' is not a key; the keys are name, image, scale, from, to"),
        ({"name": "a"}, r"control\[0\]\.image is missing"),
        ({"name": "a", "image": None}, r"control\[0\]\.image is missing"),
        ({"image": encode(OUTLINE)}, r"control\[0\]\.name is missing"),
        ({"name": "a", "image": BROKEN}, r"control\[0\]\.image takes a whole image as JPEG"),
        ({"name": "a", "image": "http://host/a.png"}, r"control\[0\]\.image takes base64, not 'http:"),
        ({"name": "a", "image": 3}, r"control\[0\]\.image takes an image in base64, not 3"),
        ({"name": "a", "image": encode(Image.new("RGB", (4, 4)))}, r"control\[0\]\.image takes sides of 8 to"),
    ],
)
def test_wrong_controls_of_a_request_are_reported_in_a_line(
    eager_controlled: LoadedPipeline, given: Any, told: str
) -> None:
    with pytest.raises(RequestError, match=f"^{told}") as error:
        eager_controlled.contract.check({"prompt": "a fox", "control": given})
    assert error.value.param == "control"
    assert "\n" not in str(error.value)


def test_a_server_without_controls_says_so(eager: LoadedPipeline) -> None:
    for given in ([name_control()], name_control()):
        with pytest.raises(RequestError, match="control takes an empty list: this server has no controls, not 1"):
            eager.contract.check({"prompt": "a fox", "control": given})
    assert eager.contract.check({"prompt": "a fox", "control": []}).control is None


def test_a_schedule_without_training_timesteps_takes_no_interval(eager_controlled: LoadedPipeline) -> None:
    def plan(**interval: Any) -> Any:
        request = eager_controlled.contract.check({"prompt": "a fox", "control": name_control(**interval)})
        scheduler = diffusers.EDMEulerScheduler()
        scheduler.set_timesteps(4)
        return build_step_plan(scheduler, request, unet_config={}, half=0.5)

    assert plan().total == 4
    assert is_inside(-1.2, (0, 1), trained=1000)
    with pytest.raises(RequestError, match="^control takes shares of the training timesteps, and EulerDis.* has none"):
        plan(to=0.5)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda each: each.pop("adapter.conv_in.bias"), r"lacks 1 tensors of its T2IAdapter, such as adapter\.conv_in"),
        (lambda each: each.update({"adapter.more": torch.ones(1)}), "not of a T2IAdapter: adapter.more"),
        (lambda each: each["adapter.conv_in.bias"].fill_(torch.nan), "not finite in float32: adapter.conv_in.bias"),
        (
            lambda each: each.update({"adapter.conv_in.bias": torch.ones(33)}),
            "takes 32 numbers for adapter.conv_in.bias, not 33",
        ),
        (
            lambda each: (each.clear(), each.update({"lora_controlnet": torch.ones(1)})),
            "holds a Control-LoRA; a control is a T2I",
        ),
        (lambda each: (each.clear(), each.update({"ip_adapter.1.a": torch.ones(1)})), "holds an IP-Adapter"),
        (lambda each: (each.clear(), each.update({"lora_unet_a.alpha": torch.ones(1)})), "holds a LoRA .*; a control"),
        (lambda each: (each.clear(), each.update({"a": torch.ones(1)})), "tensors of unknown kind, such as a; a contr"),
        (
            lambda each: each.update({"adapter.conv_in.weight": torch.ones(32, 7, 3, 3)}),
            "192, 256, 768 channels, not 7",
        ),
    ],
)
def test_a_spoiled_file_is_refused_in_a_line(
    model: Path, folder: Path, tmp_path: Path, spoil: Callable[[Any], Any], told: str
) -> None:
    path, tensors = tmp_path / "wrong.safetensors", load_file(folder / WEIGHTS)
    spoil(tensors)
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=rf"^handler\.controls\[0\]\.path: .*wrong\.safetensors .*{told}") as error:
        control(model, None, path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (
            {"downscale_factor": 8, "adapter_type": "full_adapter"},
            r"holds a T2I-Adapter \(full_adapter\) for Stable Diffusion 1.x or 2.x",
        ),
        (
            {"channels": (32, 64, 128, 128)},
            "does not fit this model: for 512x512 pixels its UNet takes feature maps of 32",
        ),
        ({"channels": (32, 64, 64, 64, 64)}, "does not fit this model"),
        ({"downscale_factor": 8}, "does not fit this model"),
    ],
)
def test_an_adapter_of_another_model_is_refused_in_a_line(
    model: Path, tmp_path: Path, config: dict[str, Any], told: str
) -> None:
    make_adapter(**config).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=rf"^handler\.controls\[0\]\.path: .*other {told}"):
        control(model, None, tmp_path / "other")


def test_an_xl_adapter_is_refused_by_stable_diffusion_1(tiny_sd_model: Path, folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"a T2I-Adapter \(full_adapter_xl\) for Stable Diffusion XL, and this model is Stable Diffu"
    ):
        control(tiny_sd_model, None, folder)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda path: (path / WEIGHTS).rename(path / "model.bin"), "pickle"),
        (lambda path: (path / WEIGHTS).unlink(), "has no weights, such as diffusion_pytorch_model"),
        (lambda path: (path / WEIGHTS).write_bytes(b"PK\x03\x04"), "is a pickle of PyTorch's"),
        (
            lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-9]),
            "is damaged, or was not fetched",
        ),
        (lambda path: (path / "config.json").unlink(), "has no readable config.json of a control"),
        (
            lambda path: change(path, _class_name="AutoencoderKL"),
            "holds 'AutoencoderKL'; a control is a T2I-Adapter or",
        ),
        (lambda path: change(path, adapter_type="big"), "spoiled does not describe a T2IAdapter: Unsupported"),
        (lambda path: change(path, channels="many"), "spoiled does not describe a T2IAdapter: not all"),
        (lambda path: change(path, quantization_config={}), "quantised"),
    ],
)
def test_a_spoiled_folder_is_refused_in_a_line(
    model: Path, folder: Path, tmp_path: Path, spoil: Callable[[Path], Any], told: str
) -> None:
    path = tmp_path / "spoiled"
    path.mkdir()
    for each in folder.iterdir():
        (path / each.name).write_bytes(each.read_bytes())
    spoil(path)
    with pytest.raises(ConfigError, match=rf"^handler\.controls\[0\]\.path: .*{told}") as error:
        control(model, None, path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["none", "none.safetensors", "adapter.pth"])
def test_a_missing_file_or_a_pickle_is_refused_in_a_line(model: Path, tmp_path: Path, path: str) -> None:
    (tmp_path / "adapter.pth").write_bytes(b"\x80")
    told = "use the model's .safetensors file" if path.endswith(".pth") else "cannot be read"
    with pytest.raises(ConfigError, match=rf"^handler\.controls\[0\]\.path: .*{path}.* {told}"):
        control(model, None, tmp_path / path)


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ([{}], r"controls\[0\]\.name is missing; it takes a name of letters"),
        ([{"name": "a"}], r"controls\[0\]\.path is missing; it takes a folder or a \.safetensors file"),
        (
            [{"name": "a", "path": "a", "kind": "lora"}],
            r"controls\[0\]\.kind takes one of t2i_adapter, controlnet, ip_adapter, or null .* 'lora'",
        ),
        ([{"name": "a", "path": "a", "scale": -1}], r"controls\[0\]\.scale takes a number from 0 to 10, not -1"),
        ([{"name": "a", "path": "a"}] * 2, r"controls\[1\]\.name takes a name that no other control has, not 'a'"),
        ([3], r"controls\[0\] takes keys and values, not 3"),
        ("edges", "controls takes a list of controls"),
    ],
)
def test_wrong_settings_are_reported_in_a_line(entries: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"^handler\.{told}"):
        HandlerConfig.parse({"controls": entries})
