"""Controls (T2I-Adapter), compared with diffusers' own pipelines in eager PyTorch."""

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from sdxl_server.config.settings import HandlerConfig
from sdxl_server.diffusion.generation import generate, run_to_end
from sdxl_server.model.describe import describe_pipeline
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from tests.unit.pipelines import UNET_ONLY, encode, load, make_picture, make_pictures
from tools.random_model import CONFIGURATIONS, make_pipeline, save_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"
BLOCKS = {  # as in SDXL three down blocks, with maps of the same places, one of them in the middle
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4, 4),
    "transformer_layers_per_block": (1, 1, 1),
}
Picture = np.ndarray[Any, Any]


def make_adapter(*, seed: int = 5, **config: Any) -> Any:
    """Return a T2I-Adapter whose maps change the image clearly."""
    torch.manual_seed(seed)
    default = {"channels": (32, 64, 64, 64), "downscale_factor": 16, "adapter_type": "full_adapter_xl"}
    adapter = diffusers.T2IAdapter(**{**default, **config}).eval()
    for each in adapter.parameters():
        each.data *= 2
    return adapter


def draw_outline(width: int = 128, height: int = 128, *, colour: str = "white") -> Image.Image:
    image = Image.new("RGB", (width, height))
    ImageDraw.Draw(image).ellipse((width // 4, height // 4, width // 2, height // 2), outline=colour, width=3)
    return image


OUTLINE = draw_outline()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small Stable Diffusion XL with the blocks of the real one."""
    pipeline, folder = make_pipeline("tiny"), tmp_path_factory.mktemp("controlled") / "model"
    torch.manual_seed(1)
    config = {**CONFIGURATIONS["tiny"]["unet"], **BLOCKS}
    pipeline.register_modules(unet=diffusers.UNet2DConditionModel(in_channels=4, out_channels=4, **config))
    save_pipeline(pipeline, folder)
    return folder


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


def name_as_original(name: str) -> str:
    """Return a tensor's name in TencentARC's layout, where all layers of the blocks are counted."""
    name = name.removeprefix("adapter.")
    name = re.sub(r"body\.(\d)\.resnets\.(\d)", lambda found: f"body.{int(found[1]) * 2 + int(found[2])}", name)
    return re.sub(r"body\.(\d)\.in_conv", lambda found: f"body.{int(found[1]) * 2}.in_conv", name)


def control(model: Path, pt2: Any, *paths: Path, **settings: Any) -> LoadedPipeline:
    """Load a model with controls `a`, `b` and so on."""
    entries = [{"name": name, "path": str(path)} for name, path in zip("abc", paths, strict=False)]
    return load(model, pt2, controls=HandlerConfig.parse({"controls": entries}).controls, **settings)


def name_control(name: str = "a", image: Image.Image = OUTLINE, **more: Any) -> dict[str, Any]:
    return {"name": name, "image": encode(image), **more}


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


def measure(one: Picture, other: Picture) -> int:
    return int(np.abs(one - other).max())


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
    second = make_picture(loaded, control=[name_control(**{"from": 0.5})])
    assert measure(second, first_half) > 20
    # no step is in this interval
    never = make_picture(loaded, control=[name_control(**{"from": 0.9, "to": 0.95})])
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
