"""Adapters (LoRA) in each naming, compared with diffusers and PEFT in eager PyTorch."""

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sdxl_server.api.image_metadata import describe_image
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.convert.ldm_names import list_ldm_names
from sdxl_server.diffusion.generation import generate, run_to_end
from sdxl_server.errors import ConfigError, RequestError
from sdxl_server.model.adapters.changes import LowRankChange
from sdxl_server.model.adapters.layer_names import ATTENTION_PROCESSORS, Layer, index_layers, list_layers
from sdxl_server.model.adapters.lora_files import DIFFUSERS_KEY, PEFT_FILE, load_lora
from sdxl_server.model.describe import describe_pipeline
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from tests.unit.pipelines import load, make_picture
from tools.random_model import make_pipeline

RANK, ALPHA = 4, 2.0
LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
DOWN, UP = f"{LAYER}.lora_down.weight", f"{LAYER}.lora_up.weight"
GOOD = {DOWN: (4, 64), UP: (64, 4)}
PARTS = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
Matrices = Mapping[Layer, tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def matrices() -> Matrices:
    """Return matrices for every layer of the small pipeline, convolutions among them: down and up."""
    generator = torch.Generator().manual_seed(3)
    pipeline = make_pipeline("tiny")
    layers = [layer for part in PARTS for layer in list_layers(part, getattr(pipeline, part))]
    return {
        layer: (
            torch.randn(RANK, *layer.shape[1:], generator=generator) / torch.tensor(layer.shape[1:]).prod() ** 0.5,
            torch.randn(layer.shape[0], RANK, *[1] * (len(layer.shape) - 2), generator=generator) * 0.2,
        )
        for layer in layers
    }


def get_name(layer: Layer) -> str:
    """Return a layer's name in files, independent of transformers' version."""
    name = layer.name.removeprefix("text_model.")
    return name if layer.component == "unet" or name == "text_projection" else f"text_model.{name}"


def write_kohya(matrices: Matrices, *, is_original: bool) -> dict[str, torch.Tensor]:
    originals = list_ldm_names([each.weight for each in matrices if each.component == "unet"], 1)
    tensors: dict[str, torch.Tensor] = {}
    for layer, (down, up) in matrices.items():
        name = get_name(layer)
        if is_original and layer.component == "unet":
            name = originals[layer.weight].removesuffix(".weight")
        flat = PARTS[layer.component] + name.replace(".", "_")
        tensors |= {
            f"{flat}.lora_down.weight": down,
            f"{flat}.lora_up.weight": up,
            f"{flat}.alpha": torch.tensor(ALPHA),
        }
    return tensors


def write_diffusers(matrices: Matrices) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for layer, (down, up) in matrices.items():
        name = f"{layer.component}.{get_name(layer)}"
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return tensors


def write_processors(matrices: Matrices) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for layer, (down, up) in matrices.items():
        if "attn" in layer.name.rpartition(".to_")[0] or "self_attn" in layer.name:
            name = f"{layer.component}.{get_name(layer)}"
            for new, old in ATTENTION_PROCESSORS.items():
                name = name.replace(new, old)
            tensors |= {f"{name}_lora.down.weight": down, f"{name}_lora.up.weight": up}
    return tensors


def write_settings(matrices: Matrices) -> dict[str, str]:
    """Return PEFT's settings as diffusers writes them into the metadata."""
    settings: dict[str, Any] = {}
    for part in PARTS:
        names = [layer.name for layer in matrices if layer.component == part]
        settings |= {f"{part}.r": RANK, f"{part}.lora_alpha": ALPHA, f"{part}.target_modules": names}
    return {DIFFUSERS_KEY: json.dumps(settings)}


def save(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def describe(path: Path, settings: Any) -> None:
    """Write a file with PEFT's settings in its metadata."""
    tensors = {f"unet.mid_block.attentions.0.proj_in.lora_{each}.weight": torch.ones(64, 64) for each in "AB"}
    save(tensors, path, {DIFFUSERS_KEY: json.dumps(settings)})


@pytest.fixture(scope="module")
def files(matrices: Matrices, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the file of each naming."""
    folder = tmp_path_factory.mktemp("adapters")
    peft = {
        f"base_model.model.{get_name(layer)}.lora_{kind}.weight": matrix
        for layer, pair in matrices.items()
        if layer.component == "unet"
        for kind, matrix in zip("AB", pair, strict=True)
    }
    (folder / PEFT_FILE).write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA, "peft_type": "LORA"}))
    return {
        "kohya": save(write_kohya(matrices, is_original=False), folder / "kohya.safetensors"),
        "kohya, original": save(write_kohya(matrices, is_original=True), folder / "original.safetensors"),
        "diffusers": save(write_diffusers(matrices), folder / "diffusers.safetensors", write_settings(matrices)),
        "processors": save(write_processors(matrices), folder / "processors.safetensors"),
        "PEFT": save(peft, folder / "peft.safetensors"),
    }


def adapt(tiny_model: Path, path: Path, pt2: Any = None, *, scale: float = 1.0, **settings: Any) -> LoadedPipeline:
    entry = {"name": "outline", "path": str(path), "scale": scale, "fuse": True}
    return load(tiny_model, pt2, adapters=HandlerConfig.parse({"adapters": [entry]}).adapters, **settings)


def draw_reference(tiny_model: Path, matrices: Matrices, *, scale: float) -> np.ndarray[Any, Any]:
    """Return eager PyTorch's image with the formula written out: W + scale · up · down."""
    loaded = load(tiny_model)
    for layer, (down, up) in matrices.items():
        weight = getattr(loaded.pipeline, layer.component).get_submodule(layer.name).weight
        weight.data += scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return make_picture(loaded)


def choose(matrices: Matrices, naming: str) -> Matrices:
    """Return the matrices that the file of a naming holds."""
    if naming == "processors":
        return {layer: each for layer, each in matrices.items() if "attn" in layer.name}
    return {layer: each for layer, each in matrices.items() if naming != "PEFT" or layer.component == "unet"}


NAMINGS = ("kohya", "kohya, original", "diffusers", "processors", "PEFT")


@pytest.mark.parametrize("naming", NAMINGS)
def test_each_naming_is_read_whole(
    tiny_model: Path, matrices: Matrices, files: Mapping[str, Path], naming: str
) -> None:
    held = choose(matrices, naming)
    strength = 1.0 if naming == "processors" else ALPHA / RANK  # such files have no alpha
    reference = draw_reference(tiny_model, held, scale=0.8 * strength)
    loaded = adapt(tiny_model, files[naming], scale=0.8)
    assert np.abs(make_picture(loaded) - reference).max() <= 1  # a rounding of the last bit
    assert np.abs(make_picture(load(tiny_model)) - reference).mean() > 1  # and it does change the picture
    digest = hashlib.sha256(files[naming].read_bytes()).hexdigest()
    told = {"name": "outline", "sha256": digest, "autov2": digest[:10], "scale": 0.8}
    told |= {"fused": True, "rank": RANK, "layers": len(held)}
    assert describe_pipeline(loaded)["adapters"] == [told]
    request = loaded.contract.check({"prompt": "a fox"})
    assert describe_image(loaded, request, 0, unet_calls=1)["made_with"]["adapters"] == [told]


@pytest.fixture(scope="module")
def layers() -> Mapping[str, Layer]:
    return index_layers(make_pipeline("tiny"), ("text_encoder", "text_encoder_2"))


ONETRAINER = {"unet": "unet.", "text_encoder": "clip_l.", "text_encoder_2": "clip_g."}
COMFYUI = {
    "unet": "diffusion_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
}


def write_original_names(
    matrices: Matrices, prefixes: Mapping[str, str], *, ends: tuple[str, str] = ("lora_down", "lora_up")
) -> dict[str, torch.Tensor]:
    """Return tensors with dots and the UNet's names in the original layout; without prefix the UNet's only."""
    originals = list_ldm_names([each.weight for each in matrices if each.component == "unet"], 1)
    tensors: dict[str, torch.Tensor] = {}
    for layer, pair in matrices.items():
        if layer.component in prefixes:
            name = originals.get(layer.weight, "").removesuffix(".weight") if layer.component == "unet" else ""
            stem = prefixes[layer.component] + (name or get_name(layer))
            tensors |= {f"{stem}.{end}.weight": each for end, each in zip(ends, pair, strict=True)}
            tensors[f"{stem}.alpha"] = torch.tensor(int(ALPHA))
    return tensors


def write_compiled(matrices: Matrices) -> dict[str, torch.Tensor]:
    """Return kohya's names of a compiled UNet and diffusers' of compiled text encoders, one of them in parallel."""
    unet = {layer: each for layer, each in matrices.items() if layer.component == "unet"}
    flat = {
        name.replace("lora_unet_", "lora_unet__orig_mod_"): each
        for name, each in write_kohya(unet, is_original=False).items()
    }
    dotted = write_diffusers({layer: each for layer, each in matrices.items() if layer not in unet})
    for new, old in {
        "encoder.": "encoder._orig_mod.",
        "encoder_2.": "encoder_2.module.",
        ".mlp.": "._orig_mod.mlp.",
    }.items():
        dotted = {name.replace(new, old, 1): each for name, each in dotted.items()}
    return {**flat, **dotted}


def write_by_diffusers_for_kohya(matrices: Matrices) -> dict[str, torch.Tensor]:
    from diffusers.utils import convert_state_dict_to_kohya

    return dict(convert_state_dict_to_kohya(write_diffusers(matrices)))


OTHER_NAMINGS: dict[str, tuple[Callable[[Matrices], dict[str, torch.Tensor]], float]] = {
    "OneTrainer": (lambda each: write_original_names(each, ONETRAINER), ALPHA),
    "OneTrainer for ComfyUI": (lambda each: write_original_names(each, COMFYUI, ends=("lora_A", "lora_B")), ALPHA),
    "model.diffusion_model": (lambda each: write_original_names(each, {"unet": "model.diffusion_model."}), ALPHA),
    "no prefix": (lambda each: write_original_names(each, {"unet": ""}), ALPHA),
    "compiled": (write_compiled, RANK),
    "diffusers for kohya": (write_by_diffusers_for_kohya, RANK),
}


@pytest.mark.parametrize("naming", OTHER_NAMINGS)
def test_other_namings_give_each_layer_its_matrices(
    layers: Mapping[str, Layer], matrices: Matrices, tmp_path: Path, naming: str
) -> None:
    write, alpha = OTHER_NAMINGS[naming]
    tensors = write(matrices)
    _, changes = load_lora(save(tensors, tmp_path / "lora.safetensors"), layers)
    is_whole = naming not in ("model.diffusion_model", "no prefix")
    assert changes.keys() == {layer for layer in matrices if is_whole or layer.component == "unet"}
    for layer, change in changes.items():
        down, up = matrices[layer]
        assert isinstance(change, LowRankChange)
        assert torch.equal(change.down, down)
        assert torch.equal(change.up, up.flatten(1))
        stated = ALPHA if naming == "compiled" and layer.component == "unet" else alpha
        assert change.factor == stated / RANK


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float16, torch.float8_e5m2])
def test_alpha_is_any_number(
    layers: Mapping[str, Layer], tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    assert load_one(layers, tmp_path, {f"{LAYER}.alpha": torch.ones(shape).to(dtype)}).factor == 1 / RANK


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scale", [None, torch.tensor(0.5), torch.arange(1.0, RANK + 1)])
def test_fp8_matrices_become_wider(
    layers: Mapping[str, Layer], tmp_path: Path, dtype: torch.dtype, scale: torch.Tensor | None
) -> None:
    down = torch.randn(RANK, 64).to(dtype)
    scales = {} if scale is None else {f"{LAYER}.lora_down.weight_scale": scale}
    change = load_one(layers, tmp_path, {DOWN: down, UP: torch.ones(64, RANK).to(dtype), **scales})
    assert torch.equal(change.down, down.float() * (1 if scale is None else scale.reshape(-1, 1)))
    assert torch.isfinite(change.up @ change.down).all()


def load_one(layers: Mapping[str, Layer], folder: Path, tensors: Mapping[str, torch.Tensor]) -> LowRankChange:
    """Return the change by a file for one layer."""
    good = {name: torch.ones(shape) for name, shape in GOOD.items()}
    _, changes = load_lora(save({**good, **tensors}, folder / "lora.safetensors"), layers)
    (change,) = changes.values()
    assert isinstance(change, LowRankChange)
    return change


def test_textual_inversions_are_set_aside(
    layers: Mapping[str, Layer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    embeddings = {f"bundle_emb.{each}": torch.ones(2, 64) for each in ("fox.clip_l", "fox.clip_g", "<owl>.clip_l")}
    load_one(layers, tmp_path, embeddings)
    assert (
        "lora.safetensors: its textual inversions need an entry in handler.embeddings, too: '<owl>, fox'" in caplog.text
    )
    with pytest.raises(ConfigError, match="holds no tensor of a LoRA"):
        load_lora(save(embeddings, tmp_path / "alone.safetensors"), layers)


def test_patterns_of_a_compiled_model_find_their_layers(layers: Mapping[str, Layer], tmp_path: Path) -> None:
    name = "mid_block.attentions.0._orig_mod.transformer_blocks.0.attn2.to_k"
    tensors = {f"unet.{name}.lora_{end}.weight": torch.ones(shape) for end, shape in (("A", (4, 64)), ("B", (64, 4)))}
    settings = {"unet.r": RANK, "unet.lora_alpha": RANK, "unet.alpha_pattern": {name: 8}}
    path = save(tensors, tmp_path / "lora.safetensors", {DIFFUSERS_KEY: json.dumps(settings)})
    assert [each.factor for each in load_lora(path, layers)[1].values()] == [8 / RANK]


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({DOWN: torch.ones(RANK, 64, dtype=torch.int8)}, "takes floating-point numbers for unet.mid_block"),
        ({f"{LAYER}.alpha": torch.ones(2)}, "takes one number as the alpha of unet.mid_block"),
        ({f"{LAYER}.alpha": torch.tensor(torch.nan)}, "not finite: alpha"),
        ({UP: torch.full((64, RANK), torch.nan).to(torch.float8_e4m3fn)}, "not finite: up"),
        ({f"{LAYER}._orig_mod.lora_down.weight": torch.ones(RANK, 64)}, "two tensors for one name"),
    ],
)
def test_unusable_numbers_are_refused(
    layers: Mapping[str, Layer], tmp_path: Path, tensors: Mapping[str, torch.Tensor], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        load_one(layers, tmp_path, tensors)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5])
def test_the_image_equals_diffusers_with_peft(tiny_model: Path, files: Mapping[str, Path], scale: float) -> None:
    own = load(tiny_model)
    own.pipeline.load_lora_weights(files["diffusers"], adapter_name="outline")
    own.pipeline.set_adapters(["outline"], [scale])
    loaded = adapt(tiny_model, files["diffusers"], scale=scale)
    assert np.abs(make_picture(loaded) - make_picture(own)).max() <= 1
    assert (loaded.weights_sha256 == load(tiny_model).weights_sha256) == (scale == 0)


def test_openvino_draws_the_image_of_eager_pytorch(tiny_model: Path, files: Mapping[str, Path]) -> None:
    reference = make_picture(adapt(tiny_model, files["kohya"]))
    loaded = adapt(tiny_model, files["kohya"], "openvino", graphs="static", compile_vae=False, warm_up=True)
    assert np.abs(make_picture(loaded) - reference).max() <= 1


def test_a_convolution_in_three_steps(tiny_model: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    down, mid, up = (torch.randn(*shape, generator=generator) for shape in ((4, 32, 1, 1), (4, 4, 3, 3), (32, 4, 1, 1)))
    flat = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = {f"{flat}.lora_{name}.weight": each for name, each in {"down": down, "mid": mid, "up": up}.items()}
    before = load(tiny_model).pipeline.unet.down_blocks[0].resnets[0].conv1
    after = adapt(tiny_model, save(tensors, tmp_path / "locon.safetensors"), scale=0.5).pipeline.unet
    x = torch.randn(1, 32, 8, 8, generator=generator)
    steps = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down), mid, padding=1)
    expected = before(x) + 0.5 * torch.nn.functional.conv2d(steps, up)
    torch.testing.assert_close(after.down_blocks[0].resnets[0].conv1(x), expected, atol=1e-3, rtol=1e-4)


def test_two_are_added_in_turn(tiny_model: Path, matrices: Matrices, files: Mapping[str, Path]) -> None:
    entries = [
        {"name": name, "path": str(files[name]), "scale": scale, "fuse": True}
        for name, scale in (("kohya", 0.75), ("diffusers", -0.25))
    ]
    loaded = load(tiny_model, adapters=HandlerConfig.parse({"adapters": entries}).adapters)
    reference = draw_reference(tiny_model, matrices, scale=0.5 * ALPHA / RANK)
    assert np.abs(make_picture(loaded) - reference).max() <= 1
    assert [each["name"] for each in describe_pipeline(loaded)["adapters"]] == ["kohya", "diffusers"]


def test_distilled_schedulers_are_offered_with_adapters(tiny_model: Path, files: Mapping[str, Path]) -> None:
    loaded = adapt(tiny_model, files["kohya"], scheduler="LCM", guidance_scale=0.0)
    assert describe_pipeline(loaded)["scheduler"] == "LCMScheduler"
    assert make_picture(loaded).shape == (128, 128, 3)
    assert "TCDScheduler" in loaded.contract.limits.samplers


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        ({}, "holds no tensor"),
        ({DOWN: (4, 64)}, r"lacks a matrix of unet\.mid_block.*attn2\.to_k: up"),
        ({**GOOD, "lora_unet_down_blocks_9.lora_up.weight": (1, 1)}, r"no layer: lora_unet_down_blocks_9\.lora_up"),
        ({**GOOD, f"{LAYER}.scale": (1,)}, rf"this model has no layer: {LAYER}\.scale"),
        ({"clip_l": (2, 32), "clip_g": (2, 32)}, "holds a textual inversion, no LoRA or other adapter"),
        ({"decoder.conv_in.weight": (4, 4, 3, 3)}, "holds a VAE alone"),
        (
            {f"{each}.x.weight": (4, 4) for each in ("model.diffusion_model", "first_stage_model")},
            "holds a whole model, no LoRA or other adapter",
        ),
        ({f"diffusion_model.{LAYER}.lora_down.weight": (4, 64)}, "no layer: diffusion_model"),
        ({DOWN: (4, 768), UP: (64, 4)}, r"made for Stable Diffusion 1\.x: unet.* has weights of 64×64, .* down 4×768"),
        (
            {DOWN: (4, 768), UP: (64, 4), "lora_te_text_model_encoder_layers_9_mlp_fc1.lora_up.weight": (4, 4)},
            r"made for Stable Diffusion 1\.x: lora_te_",
        ),
        ({DOWN: (4, 64), UP: (64, 8)}, "down 4×64, up 64×8"),
        ({**GOOD, f"unet.{LAYER}": (1,)}, "no layer"),
        (
            {**GOOD, "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (4, 64)},
            "two tensors for one matrix",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_reported_in_a_line(
    tiny_model: Path, tmp_path: Path, shapes: Mapping[str, tuple[int, ...]], told: str
) -> None:
    path = save({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "wrong.safetensors")
    with pytest.raises(ConfigError, match=rf"handler\.adapters\[0\]\.path: .*wrong\.safetensors .*{told}") as error:
        adapt(tiny_model, path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is damaged, or was not fetched whole"),
        (lambda path: path.write_bytes(b"PK\x03\x04"), "pickle"),
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: (path.unlink(), path.mkdir()), r"is a folder: name a \.safetensors file in it \(it has none\)"),
        (lambda path: describe(path, []), r"the metadata of .* takes a JSON object with PEFT's settings, not \[\]"),
        (
            lambda path: describe(path, {"unet.alpha_pattern": {"(": 1}}),
            r"as alpha_pattern, not \{'\(': 1\}: missing \)",
        ),
        (lambda path: describe(path, {"unet.alpha_pattern": [8]}), r"as alpha_pattern, not \[8\]"),
        (lambda path: save({DOWN: torch.full((4, 64), torch.nan), UP: torch.ones(64, 4)}, path), "not finite: down"),
        (lambda path: save({DOWN: torch.ones(4, 64), UP: torch.full((64, 4), 1e38)}, path), "is too large for torch"),
    ],
)
def test_an_unusable_file_is_reported_in_a_line(
    tiny_model: Path, tmp_path: Path, spoil: Callable[[Path], Any], told: str
) -> None:
    path = save({name: torch.ones(shape) for name, shape in GOOD.items()}, tmp_path / "wrong.safetensors")
    spoil(path)
    with pytest.raises(ConfigError, match=rf"handler\.adapters\[0\]\.path: .*{told}") as error:
        adapt(tiny_model, path, scale=100)
    assert "\n" not in str(error.value)


def test_a_file_of_peft_needs_its_settings(tiny_model: Path, files: Mapping[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(files["PEFT"].read_bytes())
    with pytest.raises(ConfigError, match="needs PEFT's settings: put its adapter_config.json next to it"):
        adapt(tiny_model, path)
    (tmp_path / PEFT_FILE).write_text(json.dumps({"r": RANK, "lora_alpha": 8, "use_dora": True}))
    with pytest.raises(ConfigError, match=r"lacks the magnitudes of unet\..*, and its settings have use_dora"):
        adapt(tiny_model, path)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({}, r"adapters\[0\]\.name is missing; it takes a name of letters"),
        ({"name": "a"}, r"adapters\[0\]\.path is missing; it takes a \.safetensors file"),
        ({"name": "a b", "path": "a"}, r"adapters\[0\]\.name takes a name of letters, digits, - _ and \., not 'a b'"),
        ({"name": "a", "path": "a", "scale": float("nan")}, r"adapters\[0\]\.scale takes a number from -100 to 100"),
        ({"name": "a", "path": "a", "strength": 1}, r"adapters\[0\]\.strength is not a key; the keys are name, path"),
        (3, r"adapters\[0\] takes keys and values, not 3"),
    ],
)
def test_a_wrong_entry_is_reported_in_a_line(entry: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"^handler\.{told}"):
        HandlerConfig.parse({"adapters": [entry]})


def test_names_are_given_once() -> None:
    entry = {"name": "a", "path": "a", "fuse": True}
    with pytest.raises(
        ConfigError, match=r"^handler\.adapters\[1\]\.name takes a name that no other adapter has, not 'a'"
    ):
        HandlerConfig.parse({"adapters": [entry, entry]})


# Chosen by each request.


@pytest.fixture(scope="module")
def chosen(tiny_model: Path, files: Mapping[str, Path], matrices: Matrices, tmp_path_factory: Any) -> LoadedPipeline:
    """The small pipeline with two adapters for all layers, and one for few layers with defaults."""
    other = save(
        {DOWN: torch.ones(4, 64) * 0.1, UP: torch.ones(64, 4)}, tmp_path_factory.mktemp("other") / "few.safetensors"
    )
    entries = [
        {"name": "a", "path": str(files["kohya"]), "scale": 0.75},
        {"name": "b", "path": str(files["diffusers"])},
        {"name": "few", "path": str(other), "num_inference_steps": 2, "guidance_scale": 0.0, "scheduler": "LCM"},
    ]
    adapters = HandlerConfig.parse({"adapters": entries}).adapters
    return load(tiny_model, "openvino", adapters=adapters, max_adapter_rank=11, compile_vae=False, warm_up=True)


ONE = {"name": "a", "scale": 0.75}


def name_adapters(**scales: float) -> list[dict[str, Any]]:
    return [{"name": name, "scale": scale} for name, scale in scales.items()]


@pytest.mark.parametrize("scales", [{}, {"a": 0.8}, {"a": -0.5}, {"a": 1.0, "b": -0.25}])
def test_a_request_draws_with_its_adapters(
    tiny_model: Path, matrices: Matrices, chosen: LoadedPipeline, scales: dict[str, float]
) -> None:
    reference = draw_reference(tiny_model, matrices, scale=sum(scales.values()) * ALPHA / RANK)
    report = describe_pipeline(chosen)
    assert np.abs(make_picture(chosen, adapters=name_adapters(**scales)) - reference).max() <= 1
    assert describe_pipeline(chosen) == report  # nothing was compiled for it
    request = chosen.contract.check({"prompt": "a fox", "adapters": name_adapters(**scales)})
    told = describe_image(chosen, request, 0, unet_calls=1)
    applied = told["made_with"].get("adapters", [])
    assert {each["name"]: each["scale"] for each in applied} == scales
    assert all(len(each["sha256"]) == 64 for each in applied)
    assert chosen.contract.check(json.loads(json.dumps(told["request"]))) == request  # the picture can be made again


def test_requests_in_flight_do_not_see_each_others(chosen: LoadedPipeline) -> None:
    kinds = [{}, {"a": 1.0}, {"b": 0.5}, {"a": 0.3, "b": 0.3}, {"few": 1.0}]
    fields = [{"adapters": name_adapters(**each), "seed": 1} for each in kinds]
    expected = [make_picture(chosen, **each) for each in fields]
    requests = [chosen.contract.check({"prompt": "a red fox", **each}) for each in fields]
    running = [generate(chosen, request) for request in requests]
    for steps in running * 2:  # of the shortest there is but one more
        next(steps, None)
    for steps, request, picture in zip(running[:4], requests, expected, strict=False):
        assert np.array_equal(np.asarray(run_to_end(steps)[0].image).astype(int), picture), request.adapters


@pytest.mark.soak
def test_two_hundred_mixed_requests(chosen: LoadedPipeline) -> None:
    kinds: list[dict[str, float]] = [{}, {"a": 1.0}, {"b": 0.5}, {"a": 0.3, "b": 0.3}, {"a": -0.7}, {"few": 1.0}]
    fields = [{"adapters": name_adapters(**each), "seed": 1} for each in kinds]
    expected = [make_picture(chosen, **each) for each in fields]
    generator = random.Random(0)
    waiting = [generator.randrange(len(kinds)) for _ in range(200)]
    running: list[tuple[int, Any]] = []
    while waiting or running:
        while waiting and len(running) < 4:
            kind = waiting.pop()
            running.append((kind, generate(chosen, chosen.contract.check({"prompt": "a red fox", **fields[kind]}))))
        kind, steps = running.pop(generator.randrange(len(running)))
        ended = object()
        if generator.random() < 0.8 and next(steps, ended) is not ended:
            running.append((kind, steps))
            continue
        if steps.gi_frame is not None:
            picture = np.asarray(run_to_end(steps)[0].image).astype(int)
            assert np.array_equal(picture, expected[kind]), kinds[kind]


def test_an_adapter_brings_defaults(chosen: LoadedPipeline) -> None:
    plain = chosen.contract.check({"prompt": "a fox"})
    request = chosen.contract.check({"prompt": "a fox", "adapters": [{"name": "few"}]})
    assert (request.num_inference_steps, request.guidance_scale, request.scheduler) == (2, 0.0, "LCMScheduler")
    assert (plain.num_inference_steps, plain.guidance_scale) == (4, 5.0)
    assert request.adapters == ({"name": "few", "scale": 1.0},)
    assert chosen.contract.check({"prompt": "a fox", "adapters": '[{"name": "a"}]'}).adapters == (ONE,)
    for name in ("a", ["a"], '["a"]', {"name": "a"}, '{"name": "a"}'):
        assert chosen.contract.check({"prompt": "a fox", "adapters": name}).adapters == (ONE,)
    own = chosen.contract.check({"prompt": "a fox", "adapters": [{"name": "few"}], "num_inference_steps": 3})
    assert own.num_inference_steps == 3


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("c", r"a list of names and scales such as .*, of the adapters a, b, few, .* not \{'name': 'c'\}"),
        ("[a]", r"a list of names and scales such as .*, of the adapters a, b, few, not '\[a\]'"),
        ('{"name": a}', "of the adapters a, b, few, not"),
        ("a, b", "not {'name': 'a, b'}"),
        ([{"name": "c"}], r"of the adapters a, b, few, .* not \{'name': 'c'\}"),
        ([{"scale": 1}], r"not \{'scale': 1\}"),
        ([{"name": "a", "scale": float("nan")}], "each scale a number from -100 to 100, not .*nan"),
        ([{"name": "a", "scale": 101}], "not .*101"),
        ([{"name": "a", "path": "/etc/passwd"}], "not .*passwd"),
        ([{"name": "a"}, {"name": "a"}], "takes each adapter once, not a, a"),
        ([{"name": "a"}, {"name": "b"}, {"name": "few"}], "with a sum of ranks of at most 11, not 12: a, b, few"),
        ([7], "not 7"),
    ],
)
def test_wrong_adapters_of_a_request_are_reported_in_a_line(chosen: LoadedPipeline, given: Any, told: str) -> None:
    with pytest.raises(RequestError, match=f"^adapters .*{told}") as error:
        chosen.contract.check({"prompt": "a fox", "adapters": given})
    assert error.value.param == "adapters"
    assert "\n" not in str(error.value)


def test_where_requests_cannot_choose_the_load_fails(tiny_model: Path, files: Mapping[str, Path]) -> None:
    def attempt(pt2: Any, **settings: Any) -> None:
        entry = {"name": "a", "path": str(files["kohya"])}
        load(tiny_model, pt2, adapters=HandlerConfig.parse({"adapters": [entry]}).adapters, **settings)

    with pytest.raises(ConfigError, match=r"adapters\[0\]\.fuse: false takes a model that openvino compiles"):
        attempt(None)
    with pytest.raises(ConfigError, match="does not compile text_encoder, text_encoder_2: use fuse: true"):
        attempt("openvino", compile_text_encoders=False)
    with pytest.raises(ConfigError, match="its rank is 4, and handler.max_adapter_rank is 3"):
        attempt("openvino", max_adapter_rank=3)
    with pytest.raises(ConfigError, match=r"adapters\[0\]\.guidance_scale is for requests that name"):
        HandlerConfig.parse({"adapters": [{"name": "a", "path": "a", "fuse": True, "guidance_scale": 0}]})
