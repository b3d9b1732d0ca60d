"""IP-Adapters, compared with diffusers' own pipelines in eager PyTorch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from prometheus_client import REGISTRY
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from sdxl_server.api.image_metadata import describe_image
from sdxl_server.errors import ConfigError, RequestError
from sdxl_server.model.describe import describe_pipeline
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from tests.unit.controls import control, draw_outline, make_adapter, measure, name_control, write_model
from tests.unit.pipelines import UNET_ONLY, encode, make_picture, make_pictures
from tools.random_model import make_pipeline, save_pipeline

HIDDEN, PROJECTED, INNER = 32, 24, 64
REFERENCE = draw_outline(200, 120, colour="red")
SQUARE = {"width": 128, "height": 128}


def make_encoder(folder: Path, *, hidden: int = HIDDEN, projected: int = PROJECTED) -> None:
    """Save a small CLIP image encoder."""
    torch.manual_seed(3)
    sizes = {"hidden_size": hidden, "intermediate_size": 64, "projection_dim": projected, "num_hidden_layers": 3}
    config = CLIPVisionConfig(**sizes, num_attention_heads=4, image_size=32, patch_size=8)
    encoder = CLIPVisionModelWithProjection(config)
    for each in encoder.parameters():
        each.data = torch.randn_like(each) * 0.2
    encoder.save_pretrained(folder)


def make_layers(unet: Any, *, seed: int) -> dict[str, Any]:
    """Return the attention layers of an IP-Adapter, named as the published files name them."""
    torch.manual_seed(seed)
    paths = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    return {
        f"ip_adapter.{2 * i + 1}.to_{kind}_ip.weight": torch.randn_like(unet.get_submodule(path).to_k.weight) * 0.6
        for i, path in enumerate(paths)
        for kind in "kv"
    }


def make_projection(kind: str, width: int) -> dict[str, Any]:
    """Return the projection of an IP-Adapter: of the embedding, of all tokens (Full), or by a resampler (Plus)."""

    def norm(name: str, size: int) -> dict[str, Any]:
        return {f"{name}.weight": torch.rand(size) + 0.5, f"{name}.bias": torch.randn(size) * 0.1}

    def linear(name: str, outputs: int, inputs: int) -> dict[str, Any]:
        return {f"{name}.weight": torch.randn(outputs, inputs) * 0.3, f"{name}.bias": torch.randn(outputs) * 0.1}

    if kind == "base":
        return linear("proj", 4 * width, PROJECTED) | norm("norm", width)
    if kind == "full":
        return linear("proj.0", HIDDEN, HIDDEN) | linear("proj.2", width, HIDDEN) | norm("proj.3", width)
    tensors = {"latents": torch.randn(1, 6, INNER)} | linear("proj_in", INNER, HIDDEN)
    tensors |= linear("proj_out", width, INNER) | norm("norm_out", width)
    for layer in range(4):
        at = f"layers.{layer}"
        tensors |= norm(f"{at}.0.norm1", INNER) | norm(f"{at}.0.norm2", INNER) | norm(f"{at}.1.0", INNER)
        shapes = {"0.to_q": (64, INNER), "0.to_kv": (128, INNER), "0.to_out": (INNER, 64)}
        shapes |= {"1.1": (4 * INNER, INNER), "1.3": (INNER, 4 * INNER)}
        tensors |= {f"{at}.{name}.weight": torch.randn(*shape) * 0.3 for name, shape in shapes.items()}
    return tensors


def make_ip_adapter(path: Path, unet: Any, kind: str, *, seed: int = 7) -> Path:
    """Save an IP-Adapter whose image changes the result clearly."""
    tensors = make_layers(unet, seed=seed)
    projection = make_projection(kind, unet.config.cross_attention_dim)
    save_file(tensors | {f"image_proj.{name}": each for name, each in projection.items()}, path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small Stable Diffusion XL."""
    return write_model(tmp_path_factory.mktemp("prompted") / "model")


@pytest.fixture(scope="module")
def folder(model: Path) -> Path:
    """The folder of two IP-Adapters and their image encoder."""
    folder, unet = model.parent, diffusers.UNet2DConditionModel.from_pretrained(model / "unet")
    make_encoder(folder / "image_encoder")
    make_ip_adapter(folder / "base.safetensors", unet, "base")
    make_ip_adapter(folder / "plus.safetensors", unet, "plus", seed=8)
    return folder


@pytest.fixture(scope="module")
def eager_prompted(model: Path, folder: Path) -> LoadedPipeline:
    return control(model, None, folder / "base.safetensors", folder / "plus.safetensors")


@pytest.fixture(scope="module")
def compiled_prompted(model: Path, folder: Path) -> LoadedPipeline:
    """One graph for all sizes, with the layers of both IP-Adapters and a T2I-Adapter's inputs."""
    make_adapter().save_pretrained(folder / "edges")
    paths = (folder / "base.safetensors", folder / "plus.safetensors", folder / "edges")
    return control(model, "openvino", *paths, warm_up=True, **UNET_ONLY)


@pytest.fixture(params=["eager_prompted", "compiled_prompted"])
def loaded(request: pytest.FixtureRequest) -> LoadedPipeline:
    chosen: LoadedPipeline = request.getfixturevalue(request.param)
    return chosen


def draw_with_diffusers(model: Path, files: dict[str, float], **arguments: Any) -> Any:
    """Return the image of diffusers' own pipeline with IP-Adapters of these scales."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_ip_adapter(str(model.parent), subfolder="", weight_name=list(files))
    pipeline.set_ip_adapter_scale(list(files.values()))
    options = {"num_inference_steps": 4, "guidance_scale": 5.0, "ip_adapter_image": [REFERENCE] * len(files), **SQUARE}
    made = pipeline("a red fox", generator=torch.Generator().manual_seed(1), **{**options, **arguments})
    return np.asarray(made.images[0]).astype(int)


@pytest.mark.parametrize(
    ("scales", "fields"),
    [
        ({"a": 0.7}, {}),
        ({"b": 0.6}, {}),
        ({"a": 0.4, "b": 0.5}, {}),
        ({"a": 1.3}, {"guidance_scale": 1.0}),
        ({"b": 1.0}, {"width": 96, "height": 160}),
    ],
)
def test_the_image_equals_diffusers_own(
    loaded: LoadedPipeline,
    model: Path,
    folder: Path,
    scales: dict[str, float],
    fields: dict[str, Any],
) -> None:
    files = {{"a": "base.safetensors", "b": "plus.safetensors"}[name]: scale for name, scale in scales.items()}
    expected = draw_with_diffusers(model, files, **fields)
    controls = [name_control(name, REFERENCE, scale=scale) for name, scale in scales.items()]
    assert measure(make_picture(loaded, **SQUARE | fields, control=controls), expected) <= 1
    assert measure(make_picture(loaded, **SQUARE | fields), expected) > 20


def test_scale_0_and_an_empty_interval_are_no_control(loaded: LoadedPipeline) -> None:
    plain = make_picture(loaded, **SQUARE)
    for off in ({"scale": 0}, {"begin": 0.9, "to": 0.95}):
        assert np.array_equal(make_picture(loaded, **SQUARE, control=[name_control("a", REFERENCE, **off)]), plain)
    halves = [make_picture(loaded, **SQUARE, control=[name_control("a", REFERENCE, **each)]) for each in HALVES]
    assert measure(*halves) > 20
    assert min(measure(each, plain) for each in halves) > 20


HALVES: tuple[dict[str, Any], ...] = ({"to": 0.5}, {"begin": 0.5})


def test_unused_layers_change_nothing(loaded: LoadedPipeline, model: Path) -> None:
    assert measure(make_picture(loaded, **SQUARE), make_picture(control(model, None), **SQUARE)) <= 1


def test_the_reference_does_not_decide_the_size(loaded: LoadedPipeline) -> None:
    check = loaded.contract.check
    alone = check({"prompt": "a fox", "control": [name_control("a", REFERENCE)]})
    assert (alone.width, alone.height) == loaded.contract.size
    (read,) = alone.control or ()
    assert read.image.size == REFERENCE.size


@pytest.mark.parametrize(
    "fields",
    [
        {"guidance_interval": [0.2, 0.8], "num_inference_steps": 6},
        {"num_images_per_prompt": 2},
        {"image": encode(draw_outline(colour="blue")), "strength": 0.8},
        {"image": encode(draw_outline()), "mask_image": encode(draw_outline().convert("L")), "padding_mask_crop": 8},
    ],
)
def test_it_combines_with_other_fields(
    eager_prompted: LoadedPipeline, compiled_prompted: LoadedPipeline, fields: dict[str, Any]
) -> None:
    named = [name_control("b", REFERENCE)]
    drawn = make_pictures(compiled_prompted, **SQUARE | fields, control=named)
    assert measure(drawn, make_pictures(eager_prompted, **SQUARE | fields, control=named)) <= 1


def test_it_combines_with_a_t2i_adapter_without_compiling(compiled_prompted: LoadedPipeline) -> None:
    report = describe_pipeline(compiled_prompted)
    edges, prompt = name_control("c", draw_outline()), name_control("a", REFERENCE)
    kinds: list[list[Any]] = [[], [edges], [prompt], [edges, prompt]]
    drawn = [make_picture(compiled_prompted, **SQUARE, control=each) for each in kinds]
    assert min(measure(one, other) for i, one in enumerate(drawn) for other in drawn[:i]) > 10
    assert describe_pipeline(compiled_prompted) == report
    assert [len(report["openvino"][name]) for name in ("unet", "control_a", "control_b", "control_c")] == [1] * 4


def test_a_static_graph_takes_an_image_prompt(model: Path, folder: Path, eager_prompted: LoadedPipeline) -> None:
    path = folder / "base.safetensors"
    fixed = control(model, "openvino", path, allowed_sizes=["128x128"], warm_up=True, **UNET_ONLY)
    for fields in ({}, {"guidance_scale": 1.0}):
        named = [name_control("a", REFERENCE)]
        expected = make_picture(eager_prompted, **SQUARE | fields, control=named)
        assert measure(make_picture(fixed, **fields, control=named), expected) <= 1


def test_an_upscaler_is_registered_too(model: Path, folder: Path) -> None:
    """Its work is compared with a UNet call, which is counted without an image."""
    upscaler = Path(__file__).parents[2] / "demo/upscaler/double.safetensors"
    loaded = control(model, None, folder / "base.safetensors", upscaler_path=str(upscaler))
    assert loaded.contract.check({"prompt": "a fox", "upscale": 2, "control": [name_control("a", REFERENCE)]}).upscale


def test_stable_diffusion_1_takes_all_kinds(tmp_path: Path) -> None:
    pipeline = make_pipeline("tiny-sd")
    save_pipeline(pipeline, tmp_path / "model")
    make_encoder(tmp_path / "clip")
    path = make_ip_adapter(tmp_path / "full.safetensors", pipeline.unet, "full")
    loaded = control(tmp_path / "model", None, path, encoder=tmp_path / "clip")
    made = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
    made.set_progress_bar_config(disable=True)
    made.load_ip_adapter(str(tmp_path), subfolder="", weight_name="full.safetensors", image_encoder_folder="clip")
    made.set_ip_adapter_scale(0.8)
    steps = {"num_inference_steps": 4, "guidance_scale": 5.0, "generator": torch.Generator().manual_seed(1)}
    expected = np.asarray(made("a red fox", ip_adapter_image=REFERENCE, **steps, **SQUARE).images[0]).astype(int)
    assert measure(make_picture(loaded, **SQUARE, control=[name_control("a", REFERENCE)]), expected) <= 1


def test_reports_name_it(compiled_prompted: LoadedPipeline) -> None:
    request = compiled_prompted.contract.check(
        {"prompt": "a fox", "control": [name_control("b", REFERENCE, scale=0.5, to=0.75)]}
    )
    described = describe_image(compiled_prompted, request, 0, unet_calls=1)
    (applied,) = described["made_with"]["controls"]
    assert applied.items() >= {"name": "b", "kind": "ip_adapter", "scale": 0.5, "from": 0.0, "to": 0.75}.items()
    assert len(applied["sha256"]) == 64
    before = REGISTRY.get_sample_value("sdxl_controls_total", {"control": "b"}) or 0
    make_picture(compiled_prompted, **SQUARE, control=[name_control("b", REFERENCE)])
    assert REGISTRY.get_sample_value("sdxl_controls_total", {"control": "b"}) == before + 1


def test_it_takes_no_mode(loaded: LoadedPipeline) -> None:
    with pytest.raises(RequestError, match=r"^control\[0\]\.'mode' is not a key; the keys are name, image"):
        loaded.contract.check({"prompt": "a fox", "control": [name_control("a", REFERENCE, mode="canny")]})


def rename(tensors: Any, old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda each: each.update({"ip_adapter.1.to_k_lora.down.weight": torch.ones(1, 1)}), "an IP-Adapter FaceID"),
        (lambda each: each.update({"image_proj.perceiver_resampler.latents": torch.ones(1)}), "an IP-Adapter FaceID"),
        (lambda each: rename(each, "image_proj.proj.weight", "image_proj.proj.0.weight"), "an IP-Adapter FaceID"),
        (lambda each: each.pop("ip_adapter.1.to_k_ip.weight"), r"for another model \(\d+ layers of width \d+\)"),
        (
            lambda each: [each.update({name: torch.ones(320, 768)}) for name in each if name.startswith("ip_adapter")],
            r"for Stable Diffusion 1\.x \(\d+ layers of width 768\)\. This model's UNet has \d+ layers",
        ),
        (lambda each: each.pop("image_proj.norm.bias"), "holds no whole projection of an IP-Adapter: .*norm.bias"),
        (lambda each: each["image_proj.norm.bias"].fill_(torch.inf), "not finite in float32: image_proj.norm.bias"),
        (
            lambda each: each.update(
                {"image_proj.proj.weight": torch.ones_like(each["image_proj.proj.weight"])[:, :9]}
            ),
            "takes an image encoder of width 9, and .*image_encoder has 24",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_a_line(
    model: Path,
    folder: Path,
    tmp_path: Path,
    spoil: Callable[[Any], Any],
    told: str,
) -> None:
    tensors = load_file(folder / "base.safetensors")
    spoil(tensors)
    save_file({name: each.contiguous() for name, each in tensors.items()}, tmp_path / "wrong.safetensors")
    with pytest.raises(ConfigError, match=rf"^handler\.controls\[0\]\.path: .*wrong\.safetensors .*{told}") as error:
        control(model, None, tmp_path / "wrong.safetensors", encoder=folder / "image_encoder")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda path: path.rename(path.with_name("elsewhere")), "needs its CLIP image encoder, and .*image_encoder is"),
        (
            lambda path: (path / "model.safetensors").unlink(),
            "image_encoder holds no whole CLIP image encoder: .*model.safetensors",
        ),
        (
            lambda path: (path / "config.json").write_text(json.dumps({"model_type": "clip"})),
            "image_encoder holds no whole CLIP image enc",
        ),
        (lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"), "pickle"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused_in_a_line(
    model: Path,
    folder: Path,
    tmp_path: Path,
    spoil: Callable[[Path], Any],
    told: str,
) -> None:
    (tmp_path / "base.safetensors").write_bytes((folder / "base.safetensors").read_bytes())
    make_encoder(tmp_path / "image_encoder")
    spoil(tmp_path / "image_encoder")
    with pytest.raises(ConfigError, match=rf"^handler\.controls\[0\]\.path: .*{told}") as error:
        control(model, None, tmp_path / "base.safetensors")
    assert "\n" not in str(error.value)
