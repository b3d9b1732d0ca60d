"""Loading, compiling and generating with real diffusers pipelines, without a server."""

import base64
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from demo.measure import choose_prompts
from demo.oracle import judge_picture
from openvino_backend import CompiledFunction, GraphLimitError
from sdxl_server.api.http import Call
from sdxl_server.api.image_files import encode_picture
from sdxl_server.api.image_metadata import describe_picture
from sdxl_server.api.warnings import list_warnings
from sdxl_server.config.settings import CompileConfig, HandlerConfig
from sdxl_server.diffusion.generation import finish, fork_pipeline, generate
from sdxl_server.diffusion.previews import draw_preview
from sdxl_server.diffusion.warm_up import choose_sizes
from sdxl_server.errors import ConfigError, NotFiniteError, RequestError
from sdxl_server.loading import load_pipeline
from sdxl_server.model.compiling import VAE_ENCODER, choose_graphs
from sdxl_server.model.describe import describe_pipeline
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.model.reading import check_files, choose_dtype
from sdxl_server.request.masks import keep_protected
from sdxl_server.service import Service
from tests.spoiled import spoil_model
from tests.unit.modules import HAS_BF16
from tests.unit.test_samplers import ALL, ZERO_SNR
from tools.server import ROOT

EAGER = HandlerConfig(dtype="float32", num_inference_steps=4, warm_up=False)
UNET_ONLY = {"compile_vae": False, "compile_text_encoders": False}
PARTS = ["unet", "vae", VAE_ENCODER, "text_encoder", "text_encoder_2"]


@pytest.fixture(scope="module")
def eager(tiny_model: Path) -> LoadedPipeline:
    """The small pipeline in eager PyTorch; tests leave it as it is."""
    return load(tiny_model)


@pytest.fixture(scope="module")
def demo() -> LoadedPipeline:
    """The project's own model, whose VAE has learnt pictures, with exact previews."""
    return load(ROOT / "demo/model", preview="exact")


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """OpenVINO with a cache, so that not each test traces the same parts anew."""
    options = {"model_caching": True, "cache_dir": str(tmp_path_factory.mktemp("cache"))}
    return {"backend": "openvino", "options": options}


@pytest.fixture(scope="module")
def compiled(tiny_model: Path, cached: dict[str, Any]) -> LoadedPipeline:
    """The same, compiled by OpenVINO."""
    return load(tiny_model, cached, warm_up=True)


def load(folder: Path, pt2: Any = None, **settings: Any) -> LoadedPipeline:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = dataclasses.replace(EAGER, **settings)
    return load_pipeline(
        dataclasses.replace(config, model_path=folder.name), CompileConfig.parse(pt2), model_dir=folder.parent
    )


def make_pictures(loaded: LoadedPipeline, **fields: Any) -> np.ndarray[Any, Any]:
    """Return the pictures of a request: count, height, width, colours, from 0 to 255."""
    request = loaded.contract.check({"prompt": "a red fox", "seed": 1, **fields})
    return np.stack([np.asarray(each.image) for each in finish(generate(loaded, request))]).astype(int)


def make_picture(loaded: LoadedPipeline, **fields: Any) -> np.ndarray[Any, Any]:
    (picture,) = make_pictures(loaded, **fields)
    return picture


START = """
import sys, torch
from pathlib import Path
from sdxl_server.loading import load_pipeline
from sdxl_server.config.settings import CompileConfig, HandlerConfig

folder, cache = map(Path, sys.argv[1:])
config = HandlerConfig(model_path=folder.name, compile_unet=False, compile_vae=False, warm_up=False)
pt2 = {"backend": "openvino", "options": {"model_caching": True, "cache_dir": str(cache)}}
loaded = load_pipeline(config, CompileConfig.parse(pt2), model_dir=folder.parent)
with torch.no_grad():
    for name, backend in loaded.parts.items():
        loaded.functions[name](torch.zeros(1, 77, dtype=torch.long), output_hidden_states=True)
        print([graph.traced for graph in backend.reports])
"""


@pytest.mark.parametrize("is_xl", [True, False])
def test_openvino_draws_eagers_picture(
    tiny_model: Path, tiny_sd_model: Path, cached: dict[str, Any], is_xl: bool
) -> None:
    folder = tiny_model if is_xl else tiny_sd_model
    reference = make_picture(load(folder, is_xl=is_xl))
    loaded = load(folder, cached, is_xl=is_xl, warm_up=True)
    report = describe_pipeline(loaded)
    assert reference.shape == (128, 128, 3)
    assert np.abs(make_picture(loaded) - reference).max() <= 1  # a rounding of the last bit
    assert describe_pipeline(loaded) == report  # nothing was compiled after the warm-up
    parts = PARTS if is_xl else PARTS[:4]
    assert list(report["openvino"]) == report["compiled_parts"] == parts
    assert report["openvino"].pop(VAE_ENCODER) == []  # waits for the first request with an image
    assert (report["graphs"], report["graph_breaks"]) == (len(parts) - 1, 0)
    for (graph,) in report["openvino"].values():
        assert {(model["devices"], model["precision"]) for model in graph["models"]} == {(("CPU",), "f32")}
        assert graph["operators_outside"] == ()


def test_auto_is_near_the_float32_picture(tiny_model: Path) -> None:
    reference = make_picture(load(tiny_model))
    loaded = load(tiny_model, "openvino", dtype="auto", graphs="static", warm_up=True)
    assert loaded.dtype == ("float16" if HAS_BF16 else "float32")
    (unet,) = describe_pipeline(loaded)["openvino"]["unet"]
    assert [model["precision"] for model in unet["models"]] == ["f32", "bf16" if HAS_BF16 else "f32"]
    assert np.abs(make_picture(loaded) - reference).mean() < 8  # of 255, in bfloat16; 0 in float32


@pytest.mark.parametrize("device", ["CPU", "AUTO", "HETERO:CPU"])
def test_auto_takes_the_devices_type(device: str) -> None:
    compilation = CompileConfig.parse({"backend": "openvino", "options": {"device": device}})
    dtype, chosen = choose_dtype(HandlerConfig(), compilation, device="cpu")
    assert dtype == ("float16" if HAS_BF16 else "float32")
    assert (chosen.options or {}).get("config") == ({"INFERENCE_PRECISION_HINT": "bf16"} if HAS_BF16 else None)
    mine = CompileConfig.parse({"backend": "openvino", "options": {"config": {"INFERENCE_PRECISION_HINT": "f32"}}})
    assert choose_dtype(HandlerConfig(), mine, device="cpu")[1] == mine
    assert choose_dtype(HandlerConfig(dtype="float32"), compilation, device="cpu") == ("float32", compilation)
    assert choose_dtype(HandlerConfig(), CompileConfig(), device="cuda:0") == ("float16", CompileConfig())


@pytest.mark.parametrize(("precision", "dtype"), [("f32", "float32"), ("int8", "float16"), ("fastest", "float16")])
def test_auto_leaves_the_arithmetic_to_precision(precision: str, dtype: str) -> None:
    compilation = CompileConfig.parse({"backend": "openvino", "options": {"precision": precision}})
    assert choose_dtype(HandlerConfig(), compilation, device="cpu") == (dtype, compilation)
    assert choose_dtype(HandlerConfig(dtype="bfloat16"), compilation, device="cpu") == ("bfloat16", compilation)


def test_a_picture_tells_the_arithmetic_that_made_it(tiny_model: Path) -> None:
    pt2 = {"backend": "openvino", "options": {"precision": "int8"}}
    loaded = load(tiny_model, pt2, dtype="auto", graphs="static", warm_up=True, **UNET_ONLY)
    request = loaded.contract.check({"prompt": "a fox"})
    told = describe_picture(loaded, request, 0, unet_calls=1)["made_with"]["arithmetic"]
    assert told == describe_pipeline(loaded)["arithmetic"]
    assert told["precision"] == "int8"
    assert told["lossy"]
    (unet,) = describe_pipeline(loaded)["openvino"]["unet"]
    assert sum(model["constants"].get("i8", 0) for model in unet["models"]) > 0


def test_float16_keeps_the_vae_in_float32(tiny_model: Path) -> None:
    reference = make_picture(load(tiny_model))
    loaded = load(tiny_model, dtype="float16")
    assert (loaded.pipeline.unet.dtype, loaded.pipeline.vae.dtype) == (torch.float16, torch.float32)
    assert np.abs(make_picture(loaded) - reference).mean() < 2
    assert loaded.pipeline.vae.dtype == torch.float32


def test_parts_can_be_left_out(tiny_model: Path) -> None:
    loaded = load(tiny_model, "openvino", compile_unet=False, compile_text_encoders=False, warm_up=True)
    assert list(loaded.parts) == ["vae", VAE_ENCODER]
    assert describe_pipeline(loaded)["graphs"] == 1


def test_size_and_steps_are_used(tiny_model: Path) -> None:
    loaded = load(tiny_model, width=64, height=192, num_inference_steps=3)
    assert make_picture(loaded).shape == (192, 64, 3)
    seen = [(each.done, each.total) for each in generate(loaded, loaded.contract.check({"prompt": "x"}))]
    assert seen == [(1, 3), (2, 3)]  # and the last one
    two = loaded.contract.check({"prompt": "x", "num_images_per_prompt": 2, "num_inference_steps": 2, "width": 128})
    steps = [(each.done, each.index, each.step) for each in generate(loaded, two)]
    assert steps == [(1, 0, 1), (2, 0, 2), (3, 1, 1)]


@pytest.fixture(scope="module")
def unscaled(tmp_path_factory: pytest.TempPathFactory) -> LoadedPipeline:
    """The same without zero terminal SNR, which seven schedulers cannot do."""
    folder = shutil.copytree(ROOT / "demo/model", tmp_path_factory.mktemp("models") / "unscaled")
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_betas_zero_snr": False}))
    return load(folder, preview="exact")


@pytest.mark.parametrize("scheduler", [name for name in ALL if name != "PNDMScheduler"])  # inexact with v-prediction
def test_previews_show_the_finished_picture(request: pytest.FixtureRequest, scheduler: str) -> None:
    """Euler's first is 1.8 levels away, and no sampler should be far from that: the sample itself is some 80 away."""
    demo = request.getfixturevalue("demo" if scheduler in ZERO_SNR else "unscaled")
    fields = {"prompt": "a large white star on a blue background, left", "num_inference_steps": 10, "seed": 1}
    asked = demo.contract.check({**fields, "guidance_scale": 1.5, "scheduler": scheduler})
    previews = []
    steps = generate(demo, asked)
    try:
        while True:
            previews.append(np.asarray(draw_preview(demo, next(steps))).astype(int))
    except StopIteration as end:
        picture = np.asarray(end.value[0].image).astype(int)
    apart = [np.abs(preview - picture).mean() for preview in previews]
    assert max(apart) < 8, apart
    assert apart[-1] < 4, apart


@pytest.mark.parametrize(
    ("fields", "calls"),
    [
        ({"scheduler": "HeunDiscreteScheduler", "num_inference_steps": 8}, 15),
        ({"scheduler": "KDPM2DiscreteScheduler", "num_inference_steps": 5}, 9),
        ({"scheduler": "PNDMScheduler", "num_inference_steps": 8}, 17),
        ({"scheduler": "EulerDiscreteScheduler", "num_inference_steps": 8}, 8),
        ({"scheduler": "EulerDiscreteScheduler", "num_inference_steps": 8, "denoising_end": 0.5}, 4),
    ],
)
def test_work_is_counted_in_calls_of_the_unet(eager: LoadedPipeline, fields: dict[str, Any], calls: int) -> None:
    request = eager.contract.check({"prompt": "x", "seed": 1, **fields})
    assert eager.contract.count_calls(request) == calls
    (picture,) = finish(generate(eager, request))
    assert picture.unet_calls == calls
    low = dataclasses.replace(eager.contract.bounds, max_megapixel_steps=(calls - 0.5) * 128 * 128 / 1e6)
    with pytest.raises(RequestError, match=f"not {calls} steps of 128x128"):
        dataclasses.replace(eager.contract, bounds=low).check({"prompt": "x", **fields})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"denoising_end": 0.01, "num_inference_steps": 8}, "denoising_end"),
        ({"denoising_end": 0.3, "strength": 0.5, "image": True}, "denoising_end"),
        ({"denoising_end": 0.05, "num_inference_steps": 4, "scheduler": "DDIMScheduler"}, "denoising_end"),
        ({"strength": 0.1, "num_inference_steps": 5, "image": True}, "strength"),
        ({"scheduler": "PNDMScheduler", "num_inference_steps": 1}, "num_inference_steps"),
    ],
)
def test_a_request_without_a_step_is_refused_before_any_work(
    eager: LoadedPipeline, fields: dict[str, Any], param: str
) -> None:
    given = {**fields, **({"image": encode(Image.new("RGB", (128, 128)))} if "image" in fields else {})}
    with pytest.raises(RequestError) as caught:
        eager.contract.check({"prompt": "x", **given})
    assert caught.value.param == param


def test_strength_without_an_image_is_told(eager: LoadedPipeline) -> None:
    request = eager.contract.check({"prompt": "x", "strength": 0.5})
    assert list_warnings(eager, request) == ["strength has no effect without an image"]
    request = eager.contract.check({"prompt": "x", "resize_mode": "pad"})
    assert list_warnings(eager, request) == ["resize_mode has no effect without an image"]
    assert np.array_equal(make_picture(eager, strength=0.5), make_picture(eager))


def test_prompts_too_long_for_a_jpeg_are_told_before_the_work(eager: LoadedPipeline) -> None:
    long = {name: "\x01" * 2000 for name in ("prompt_2", "negative_prompt", "negative_prompt_2")}
    for kind, is_held in (("jpeg", False), ("png", True), ("webp", True)):
        request = eager.contract.check({"prompt": "x", **long, "output_format": kind})
        assert any("too long for a JPEG" in each for each in list_warnings(eager, request)) is not is_held
        parameters = describe_picture(eager, request, 0, unet_calls=4)
        file = encode_picture(Image.new("RGB", (64, 64)), request, parameters=parameters)
        image = Image.open(io.BytesIO(file))
        assert bool(image.info.get("parameters") or image.getexif()) is is_held


def test_parts_have_what_diffusers_reads_of_them(eager: LoadedPipeline) -> None:
    forked = fork_pipeline(eager, eager.contract.check({"prompt": "x"}))
    assert forked.device == eager.pipeline.device
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        part, model = getattr(forked, name), getattr(eager.pipeline, name)
        assert (part.config, part.dtype, part.device) == (model.config, model.dtype, model.device)
        assert part is not model
    assert forked.unet.add_embedding.linear_1.in_features == eager.pipeline.unet.add_embedding.linear_1.in_features
    assert forked.vae.post_quant_conv is eager.pipeline.vae.post_quant_conv
    assert forked.scheduler is not eager.pipeline.scheduler


@pytest.mark.parametrize("pt2", ["openvino", {"backend": "openvino", "options": {"device": "CPU"}}])
def test_openvino_beside_cuda_is_refused(tiny_model: Path, pt2: Any) -> None:
    config = HandlerConfig(model_path=tiny_model.name)
    with pytest.raises(ConfigError, match="deviceType: gpu puts PyTorch's tensors on cuda:0"):
        load_pipeline(config, CompileConfig.parse(pt2), model_dir=tiny_model.parent, device="cuda:0")


def test_a_scheduler_that_needs_more_steps_is_warmed_up_with_them(tiny_model: Path, cached: dict[str, Any]) -> None:
    loaded = load(tiny_model, cached, warm_up=True, scheduler="PNDMScheduler")
    assert describe_pipeline(loaded)["scheduler"] == "PNDMScheduler"
    with pytest.raises(ConfigError, match="handler.num_inference_steps"):
        load(tiny_model, scheduler="PNDMScheduler", num_inference_steps=1)


def test_guidance_is_used(tiny_model: Path) -> None:
    weak, strong = (make_picture(load(tiny_model, guidance_scale=scale)) for scale in (1.0, 20.0))
    assert np.abs(weak - strong).mean() > 1


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a blue whale"},
        {"prompt_2": "a blue whale"},
        {"negative_prompt": "a blue whale"},
        {"negative_prompt_2": "a blue whale"},
        {"seed": 2},
        {"num_inference_steps": 5},
        {"guidance_scale": 9},
        {"guidance_rescale": 0.9},
        {"scheduler": "DDIMScheduler"},
        {"clip_skip": 1},
        {"denoising_end": 0.5},
        {"original_size": [32, 32]},
        {"crops_coords_top_left": [64, 64]},
        {"target_size": [512, 512]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_every_field_changes_the_picture(eager: LoadedPipeline, fields: dict[str, Any]) -> None:
    assert np.abs(make_picture(eager, **fields) - make_picture(eager)).max() > 0


@pytest.mark.parametrize("name", ["eager", "compiled"])
def test_a_seed_means_the_same_picture(request: pytest.FixtureRequest, name: str) -> None:
    loaded = request.getfixturevalue(name)
    alone = [make_picture(loaded, seed=5 + i) for i in range(4)]
    for count in (2, 4):
        assert np.array_equal(make_pictures(loaded, seed=5, num_images_per_prompt=count), alone[:count])
    for count in (2, 4):
        steps = {
            i: generate(loaded, loaded.contract.check({"prompt": "a red fox", "seed": 5 + i})) for i in range(count)
        }
        for i, picture in run_in_turns(steps).items():
            assert np.array_equal(picture, alone[i])
    assert torch.is_grad_enabled()


def run_in_turns(steps: dict[int, Any]) -> dict[int, np.ndarray[Any, Any]]:
    """Make a step of each request in turn, until all have their picture."""
    pictures = {}
    while steps:
        for name, each in list(steps.items()):
            try:
                next(each)
            except StopIteration as end:
                pictures[name] = np.asarray(end.value[0].image).astype(int)
                del steps[name]
    return pictures


def test_requests_in_flight_keep_their_parameters(eager: LoadedPipeline) -> None:
    many: list[dict[str, Any]] = [
        {"num_inference_steps": 2, "scheduler": "DPMSolverMultistepScheduler"},
        {"num_inference_steps": 5, "guidance_scale": 1},
        {"num_inference_steps": 3, "width": 64, "clip_skip": 1},
    ]
    alone = [make_picture(eager, **fields) for fields in many]
    requests = [eager.contract.check({"prompt": "a red fox", "seed": 1, **fields}) for fields in many]
    for i, picture in run_in_turns({i: generate(eager, request) for i, request in enumerate(requests)}).items():
        assert np.array_equal(picture, alone[i])


def test_a_picture_can_be_stopped(eager: LoadedPipeline) -> None:
    calls = []

    def count_calls(*inputs: Any, **options: Any) -> Any:
        calls.append(1)
        return eager.functions["unet"](*inputs, **options)

    counting = dataclasses.replace(eager, functions={**eager.functions, "unet": count_calls})

    steps = generate(counting, eager.contract.check({"prompt": "x", "num_inference_steps": 4}))
    assert next(steps).done == 1
    steps.close()
    assert len(calls) == 1
    assert list(steps) == []


def encode(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


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


@pytest.mark.parametrize(("value", "told"), [(0, "the mask protects all"), (255, "the mask protects nothing")])
def test_masks_that_mean_little_are_told(eager: LoadedPipeline, value: int, told: str) -> None:
    image, mask = encode(Image.new("RGB", (128, 128))), encode(Image.new("L", (128, 128), value))
    request = eager.contract.check({"prompt": "x", "image": image, "mask_image": mask})
    (warning,) = list_warnings(eager, request)
    assert warning.startswith(told)


def test_image_sets_the_size(eager: LoadedPipeline) -> None:
    image = encode(Image.new("RGB", (75, 130), "red"))
    assert make_picture(eager, image=image).shape == (160, 96, 3)
    assert make_picture(eager, image=image, width=64, height=64).shape == (64, 64, 3)


def test_every_scheduler_makes_pictures_or_says_what_it_needs(eager: LoadedPipeline) -> None:
    for name in eager.contract.bounds.schedulers:
        assert make_picture(eager, scheduler=name, num_inference_steps=5).std() > 0
        if name != "PNDMScheduler":
            assert make_picture(eager, scheduler=name, num_inference_steps=1).std() > 0
    with pytest.raises(RequestError, match="PNDMScheduler cannot make a picture in 1 steps"):
        make_picture(eager, scheduler="PNDMScheduler", num_inference_steps=1)


def test_schedulers_share_one_graph(compiled: LoadedPipeline) -> None:
    graphs = describe_pipeline(compiled)["graphs"]
    for name in ("DDIMScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"):
        make_picture(compiled, scheduler=name)
    assert describe_pipeline(compiled)["graphs"] == graphs


def test_one_graph_too_many_is_refused(eager: LoadedPipeline) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise GraphLimitError("4 graphs are compiled already")

    full = dataclasses.replace(eager, functions={**eager.functions, "unet": refuse})
    with pytest.raises(RequestError, match="64x64 would be one more graph.*allowed_sizes and max_graphs"):
        make_picture(full, width=64, height=64)


def count_graphs(loaded: LoadedPipeline) -> list[int]:
    return [len(describe_pipeline(loaded)["openvino"][part]) for part in PARTS]


def test_allowed_sizes_are_compiled_at_the_start(tiny_model: Path, cached: dict[str, Any]) -> None:
    sizes = ["128x128", "64x128"]
    loaded = load(tiny_model, cached, warm_up=True, allowed_sizes=sizes, graphs="static")
    report = describe_pipeline(loaded)
    assert count_graphs(loaded) == [2, 2, 0, 1, 1]
    make_picture(loaded, width=64, guidance_scale=1)
    assert describe_pipeline(loaded) == report
    with pytest.raises(RequestError, match="one of 128x128, 64x128 here, not 64x64"):
        make_picture(loaded, width=64, height=64)
    few = {**cached, "options": {**cached["options"], "max_graphs": 1}}
    with pytest.raises(ConfigError, match=r"handler.allowed_sizes names 2 sizes.*max_graphs.*is 1"):
        load(tiny_model, few, allowed_sizes=sizes, graphs="static")


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"width": 512, "height": 256}, [(128, 128)]),
        ({"width": 64, "height": 64, "max_side": 100}, [(96, 96)]),
        ({"allowed_sizes": ["256x256", "64x256", "128x256"], "width": 256, "height": 256}, [(64, 256)]),
        ({"graphs": "static"}, [(128, 128)]),
        ({"graphs": "both"}, [(128, 128), (128, 120)]),
        ({"graphs": "both", "width": 128, "height": 120}, [(128, 120), (120, 128)]),
        ({"graphs": "both", "vae_tile_side": 96}, [(128, 128), (96, 88)]),
        ({"graphs": "dynamic", "vae_tile_side": 64}, [(64, 64)]),
        ({"graphs": "both", "width": 64, "height": 64, "max_side": 64}, [(64, 64)]),
    ],
)
def test_the_warm_up_draws_as_little_as_compiles_every_graph(
    tiny_model: Path, cached: dict[str, Any], settings: dict[str, Any], sizes: list[tuple[int, int]]
) -> None:
    assert choose_sizes(load(tiny_model, cached, **settings)) == sizes


def test_no_size_takes_the_place_of_another(tiny_model: Path, cached: dict[str, Any], eager: LoadedPipeline) -> None:
    """One graph draws all sizes and kinds of guidance, and what was drawn before is no matter to a seed's bits."""
    one = {**cached, "options": {**cached["options"], "max_graphs": 1}}
    loaded = load(tiny_model, one, warm_up=True)
    before = make_picture(loaded)
    for width, height in ((64, 64), (72, 200), (256, 64), (104, 136), (120, 128)):
        for guidance in (5.0, 1.0):
            fields: dict[str, Any] = {"width": width, "height": height, "guidance_scale": guidance}
            assert np.abs(make_picture(loaded, **fields) - make_picture(eager, **fields)).max() <= 1
    assert count_graphs(loaded) == [1, 1, 0, 1, 1]
    assert np.array_equal(make_picture(loaded), before)
    again = load(tiny_model, one)
    assert np.array_equal(make_picture(again, width=72, height=200), make_picture(loaded, width=72, height=200))
    assert np.array_equal(make_picture(again), before)
    assert describe_pipeline(loaded)["graphs_for"] == "dynamic"


@pytest.mark.parametrize("configured", [5.0, 1.0])
def test_static_graph_serves_both_kinds_of_guidance(
    tiny_model: Path, cached: dict[str, Any], eager: LoadedPipeline, configured: float
) -> None:
    loaded = load(tiny_model, cached, warm_up=True, graphs="static", guidance_scale=configured)
    for guidance in (5.0, 1.0):
        picture, expected = (make_picture(each, guidance_scale=guidance) for each in (loaded, eager))
        assert np.abs(picture - expected).max() <= 1
    assert count_graphs(loaded) == [1, 1, 0, 1, 1]
    with pytest.raises(RequestError, match="width and height take one of 128x128 here, not 64x128"):
        make_picture(loaded, width=64)


def test_both_kinds_of_graphs(tiny_model: Path, cached: dict[str, Any], eager: LoadedPipeline) -> None:
    loaded = load(tiny_model, cached, warm_up=True, graphs="both", weighted_prompts=True)
    assert count_graphs(loaded) == [2, 2, 0, 1, 1]
    for fields in ({}, {"width": 64}, {"guidance_scale": 1.0}, {"width": 200, "height": 72}):
        assert np.abs(make_picture(loaded, **fields) - make_picture(eager, **fields)).max() <= 1
    long = "a red fox in the snow, " * 5  # 2 chunks of letters, which only the graph for any size takes
    weighted = load(tiny_model, weighted_prompts=True)
    prompts: list[dict[str, Any]] = [
        {"prompt": "a (red:1.4) fox", "negative_prompt": "[blue]"},
        {"prompt": long, "negative_prompt": "a (blue:2)"},
        {"prompt": "fox BREAK snow BREAK red", "width": 64, "prompt_2": long, "clip_skip": 1},
        {"prompt": long, "guidance_scale": 1.0},
    ]
    for fields in prompts:
        assert np.abs(make_picture(loaded, **fields) - make_picture(weighted, **fields)).max() <= 1
    assert count_graphs(loaded) == [2, 2, 0, 1, 1]


@pytest.mark.parametrize(
    ("pt2", "settings", "expected"),
    [
        ({"backend": "openvino"}, {}, "dynamic"),
        ({"backend": "openvino"}, {"allowed_sizes": ["128x128"]}, "static"),
        ({"backend": "openvino"}, {"allowed_sizes": ["128x128"], "graphs": "dynamic"}, "dynamic"),
        ({"backend": "openvino"}, {"allowed_sizes": ["128x128", "64x64"]}, "dynamic"),
        (None, {}, None),
    ],
)
def test_configuration_decides_which_graphs(pt2: Any, settings: dict[str, Any], expected: str | None) -> None:
    assert choose_graphs(dataclasses.replace(EAGER, **settings), CompileConfig.parse(pt2)) == expected


@pytest.mark.parametrize("pt2", [None, "inductor"])
def test_graphs_of_another_backend_are_refused(tiny_model: Path, pt2: Any) -> None:
    with pytest.raises(ConfigError, match=r"handler.graphs belongs to pt2.backend: openvino, not to (eager|inductor)"):
        load(tiny_model, pt2, graphs="static")


@pytest.mark.parametrize(
    ("kind", "pt2", "told"),
    [
        ("early", None, "in step 1: what the UNet returned"),
        ("late", None, "in step 3: what the UNet returned"),
        ("late", "openvino", "in step 3: what the UNet returned"),
        ("overflow", None, "in step 1: what the scheduler made of the step"),
        ("decoder", None, "in step 4: what the VAE decoded"),
        ("encoder", None, "in step 0: what the VAE made of the image"),
        ("text", None, "in step 1: what the UNet returned"),
    ],
)
def test_numbers_that_are_not_finite_are_no_picture(
    tiny_model: Path, tmp_path: Path, kind: str, pt2: Any, told: str
) -> None:
    settings = {} if pt2 is None else {"graphs": "static", **UNET_ONLY}
    loaded = load(spoil_model(tiny_model, tmp_path / "model", kind), pt2, preview="exact", **settings)
    fields = {"image": encode(Image.new("RGB", (128, 128)))} if kind == "encoder" else {}
    request = loaded.contract.check({"prompt": "a red fox", "seed": 7, **fields})
    with pytest.raises(NotFiniteError) as caught:
        finish(generate(loaded, request))
    assert str(caught.value) == f"the picture of seed 7 failed {told} holds numbers that are not finite"
    if kind == "decoder":
        with pytest.raises(NotFiniteError, match="seed 7 failed in step 1: what the VAE decoded"):
            draw_preview(loaded, next(generate(loaded, request)))


@pytest.mark.parametrize(
    ("kind", "pt2"), [("early", None), ("late", None), ("overflow", None), ("decoder", "openvino"), ("text", None)]
)
def test_numbers_that_are_not_finite_end_the_warm_up(tiny_model: Path, tmp_path: Path, kind: str, pt2: Any) -> None:
    folder = spoil_model(tiny_model, tmp_path / "model", kind)
    with pytest.raises(
        ConfigError, match="^handler.dtype: float32: at the warm-up the picture of seed .* not finite; eit"
    ):
        load(folder, pt2, compile_unet=pt2 is None, compile_text_encoders=False, warm_up=True)


@pytest.mark.parametrize(("path", "told"), [("", b"event: compiling\n"), ("v1/images/generations", b": vae_encoder ")])
def test_a_compilation_that_a_client_waits_for_is_told(
    tiny_model: Path, cached: dict[str, Any], path: str, told: bytes
) -> None:
    service = Service(load(tiny_model, cached, warm_up=True))
    fields = {"prompt": "a red fox", "stream": True, "num_inference_steps": 2, "strength": 1}

    def draw(**more: Any) -> list[bytes]:
        call = Call({"body": json.dumps({**fields, **more}).encode()}, path, "application/json", "", "*/*", "sdxl")
        return list(service.answer(call).steps)

    image = encode(Image.new("RGB", (128, 128), "red"))
    told_by = [[each.startswith(told) for each in draw(**more)] for more in ({"strength": None}, {"image": image}) * 2]
    assert told_by == [[False], [True, False], [False], [False]]


def test_long_prompts_are_told(eager: LoadedPipeline) -> None:
    fields = {"prompt": "fox " * 80, "negative_prompt": "blue"}
    (warning,) = list_warnings(eager, eager.contract.check(fields))
    assert "prompt has" in warning
    assert "the first 77" in warning


def test_prompts_in_other_programs_words_are_told_in_the_file(eager: LoadedPipeline) -> None:
    request = eager.contract.check({"prompt": "a (red:1.3) fox", "negative_prompt": "snow BREAK", "seed": 1})
    warnings = list_warnings(eager, request)
    assert [each.partition(":")[0] for each in warnings] == ["prompt", "negative_prompt"]
    assert describe_picture(eager, request, 0, unet_calls=4, warnings=warnings)["warnings"] == warnings
    assert "warnings" not in describe_picture(eager, request, 0, unet_calls=4)


@pytest.mark.parametrize("output_format", ["jpeg", "png", "webp"])
def test_file_holds_what_makes_the_picture_again(eager: LoadedPipeline, output_format: str) -> None:
    fields = {"prompt": "a fox 🦊", "seed": 3, "output_format": output_format, "num_images_per_prompt": 2}
    request = eager.contract.check(fields)
    pictures = [each.image for each in finish(generate(eager, request))]
    file = encode_picture(pictures[1], request, parameters=describe_picture(eager, request, 1, unet_calls=4))
    image = Image.open(io.BytesIO(file))
    assert image.format == output_format.upper()
    text = image.text["parameters"] if output_format == "png" else read_comment(image)  # type: ignore[attr-defined]
    parameters = json.loads(text)
    again = finish(generate(eager, eager.contract.check(parameters["request"])))
    assert again[0].image.tobytes() == pictures[1].tobytes()
    assert parameters["made_with"]["weights_sha256"] == eager.weights_sha256
    assert parameters["made_with"]["backend"] == "eager"
    plain = Image.open(io.BytesIO(encode_picture(pictures[1], request)))
    assert "parameters" not in plain.info
    assert not plain.getexif()


def read_comment(image: Image.Image) -> str:
    comment = image.getexif().get_ifd(0x8769)[0x9286]  # EXIF's UserComment
    return bytes(comment.removeprefix(b"UNICODE\0")).decode("utf-16-be")


def test_digest_tells_checkpoints_apart(tiny_model: Path, eager: LoadedPipeline, compiled: LoadedPipeline) -> None:
    assert compiled.weights_sha256 == eager.weights_sha256
    other = load(tiny_model)
    with torch.no_grad():
        next(iter(other.pipeline.unet.parameters())).add_(1)
    assert other.weights_sha256 != eager.weights_sha256


@pytest.mark.parametrize("is_compiled", [False, True])
def test_weights_can_be_pinned(
    tiny_model: Path, eager: LoadedPipeline, cached: dict[str, Any], is_compiled: bool
) -> None:
    digest, pt2 = eager.weights_sha256, cached if is_compiled else None
    assert load(tiny_model, pt2, weights_sha256=digest, warm_up=True).weights_sha256 == digest
    with pytest.raises(ConfigError, match=f"handler.weights_sha256 takes .* {digest}, not '0{{64}}'"):
        load(tiny_model, pt2, weights_sha256="0" * 64)


NETWORK_WATCH = """
import os, sys
def tell(event, _):  # in processes that are forked, too
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        os.write(1, event.encode())
sys.addaudithook(tell)
"""
LOAD = """
import pathlib, sys, time
from sdxl_server.loading import load_pipeline
from sdxl_server.config.settings import CompileConfig, HandlerConfig
pt2 = {"backend": "openvino", "options": {"weight_compression": "int8_sym"}}
folder = pathlib.Path(sys.argv[1])
config = HandlerConfig(model_path=folder.name, num_inference_steps=1, compile_text_encoders=False, graphs="static")
load_pipeline(config, CompileConfig.parse(pt2), model_dir=folder.parent)
time.sleep(1)
"""


@pytest.mark.parametrize(("program", "seen"), [(LOAD, False), ("import time, openvino; time.sleep(5)", True)])
def test_nothing_reaches_for_the_network(tiny_model: Path, tmp_path: Path, program: str, seen: bool) -> None:
    """Loading, compiling, compressing and drawing do not; OpenVINO by itself does, at its import."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "TF_BUILD", "JENKINS_URL")}
    done = subprocess.run(
        [sys.executable, "-c", NETWORK_WATCH + program, tiny_model],
        cwd=ROOT,
        env=environment | {"HOME": str(tmp_path)},  # where a user may have opted out
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert ("socket." in done.stdout) is seen


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_distilled_models_have_their_own_scheduler(tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(ROOT / "demo/model", tmp_path / "model")
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": name, "clip_sample": False}))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", name]}))
    loaded = load(folder, warm_up=True)
    assert list(loaded.contract.bounds.schedulers) == [describe_pipeline(loaded)["scheduler"]] == [name]
    prompt = choose_prompts(1, seed=3)[0]
    fields = {"prompt": prompt.text, "seed": prompt.seed, "guidance_scale": 1.5, "num_inference_steps": 8}
    request = loaded.contract.check({**fields, "scheduler": {"name": name, "original_inference_steps": 100}})
    (picture,) = finish(generate(loaded, request))
    assert judge_picture(picture.image, prompt.scene).is_right
    with pytest.raises(RequestError, match=f"scheduler takes one of {name}; one of ..., or|not 'Euler'"):
        loaded.contract.check({"prompt": "x", "scheduler": "Euler"})


def test_scheduler_with_options_is_used_and_told(tiny_model: Path) -> None:
    karras = {"name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}
    loaded = load(tiny_model, scheduler="dpm++ 2m karras")
    assert describe_pipeline(loaded)["scheduler"] == karras
    request = loaded.contract.check({"prompt": "x", "seed": 1})
    assert describe_picture(loaded, request, 0, unet_calls=4)["request"]["scheduler"] == karras
    plain = make_picture(loaded, scheduler="DPMSolverMultistepScheduler")  # has nothing of the configured options
    assert np.array_equal(plain, make_picture(load(tiny_model), scheduler={"name": "DPM++ 2M"}))
    assert not np.array_equal(plain, make_picture(loaded))
    with pytest.raises(RequestError, match="scheduler takes other options than these: UniPC.* ends with nan"):
        make_picture(loaded, scheduler={"name": "UniPC", "solver_type": "bh1"})


def test_scheduler_is_used(tiny_model: Path) -> None:
    loaded = load(tiny_model, scheduler="DPMSolverMultistepScheduler")
    assert describe_pipeline(loaded)["scheduler"] == "DPMSolverMultistepScheduler"
    assert np.abs(make_picture(loaded) - make_picture(load(tiny_model))).max() > 0


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"scheduler": "Eule"}, ["handler.scheduler", "EulerDiscreteScheduler", "'Eule'"]),
        ({"scheduler": {"name": "Euler", "solver_order": 2}}, ["handler.scheduler takes for Euler", "'solver_order'"]),
        ({"scheduler": {"name": "UniPC", "solver_type": "bh1"}}, ["handler.scheduler", "ends with nan"]),
        ({"max_side": 64}, ["handler.width", "width takes a whole number from 64 to 64", "not 128"]),
        ({"allowed_sizes": ["64x64"]}, ["handler.width", "take one of 64x64 here, not 128x128"]),
        ({"is_xl": False}, ["handler.is_xl: false", "StableDiffusionPipeline", "StableDiffusionXLPipeline"]),
    ],
)
def test_settings_that_do_not_fit_the_model(tiny_model: Path, settings: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tiny_model, **settings)
    for part in parts:
        assert part in str(caught.value)


def test_missing_model_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"handler.model_path.*Download_model.py"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize(
    "name",
    [
        *("unet/diffusion_pytorch_model.bin", "weights.ckpt", "unet/model.py", "x.pt", "unet/x.PT", "unet/weights"),
        *("x.pt2", ".pt", "unet/model.safetensors.pkl", "model.SAFETENSORS", "vae/a.so"),
    ],
)
def test_files_that_could_run_code_are_refused(tiny_model: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / name).write_bytes(b"")
    with pytest.raises(ConfigError, match=rf"{name} could run code"):
        load(folder)


def test_subfolders_that_are_links_are_looked_into(tiny_model: Path, tmp_path: Path) -> None:
    folder, elsewhere = shutil.copytree(tiny_model, tmp_path / "model"), tmp_path / "elsewhere"
    shutil.move(folder / "unet", elsewhere)
    (folder / "unet").symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(folder)
    check_files(folder, remedy="")
    (elsewhere / "x.bin").touch()
    with pytest.raises(ConfigError, match=r"unet/x.bin could run code"):
        check_files(folder, remedy="")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model_index.json", "[" * 100_000),
        ("model_index.json", json.dumps({"_class_name": ["StableDiffusionXLPipeline"]})),
        ("model_index.json", json.dumps({"_class_name": "StableDiffusionXLPipeline"})),
        ("model_index.json", json.dumps({"_class_name": "StableDiffusionXLPipeline", "unet": 5})),
        ("scheduler/scheduler_config.json", "[]"),
        ("unet/config.json", "{}"),
        ("unet/config.json", json.dumps({"sample_size": None})),
        ("unet/config.json", "\0"),
        ("vae/config.json", json.dumps({"block_out_channels": "x"})),
        ("text_encoder/config.json", json.dumps({"num_hidden_layers": -1})),
        ("tokenizer/tokenizer.json", "{}"),
    ],
)
def test_odd_files_of_a_pipeline_are_told(tiny_model: Path, tmp_path: Path, name: str, content: str) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=r"^(cannot read the pipeline in|handler.model_path takes)"):
        load(folder)


def test_truncated_weights_are_told(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot read the pipeline"):
        load(folder)


def test_inductor_needs_a_compiler(tiny_model: Path) -> None:
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ConfigError, match=r"inductor needs a C\+\+ compiler.*CXX"),
    ):
        load(tiny_model, "inductor")


@pytest.mark.parametrize(
    ("pt2", "message"),
    [
        ("tvm", "tvm cannot run this model"),
        ({"backend": "inductor", "options": {"no_such_option": 1}}, "inductor cannot run this model.*no_such_option"),
    ],
)
def test_backend_that_fails_is_named(tiny_model: Path, pt2: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tiny_model, pt2, compile_unet=False, compile_text_encoders=False, warm_up=True)


def test_part_that_did_not_reach_openvino_stops_the_load(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompiledFunction, "__call__", lambda self, *inputs, **_: self._function(self._module, *inputs))
    with pytest.raises(ConfigError, match="openvino did not compile vae"):
        load(tiny_model, "openvino", compile_unet=False, compile_text_encoders=False, warm_up=True)


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_quality(eager: LoadedPipeline, output_format: str) -> None:
    image = Image.effect_noise((256, 256), 50).convert("RGB")
    small, large = (
        encode_picture(image, eager.contract.check({"prompt": "x", "quality": quality, "output_format": output_format}))
        for quality in (10, 90)
    )
    assert len(small) < len(large)
    assert Image.open(io.BytesIO(large)).size == (256, 256)


def test_text_encoders_come_from_the_cache_in_each_process(tiny_model: Path, tmp_path: Path) -> None:
    """diffusers makes them in the order of a set, which these two numbers turn round."""
    printed = []
    for seed in ("1", "4"):
        command = [sys.executable, "-c", START, str(tiny_model), str(tmp_path)]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        printed.append(finished.stdout.split())
    assert printed == [["[True]", "[True]"], ["[False]", "[False]"]]
