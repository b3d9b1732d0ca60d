"""Adapters beyond plain LoRA, compared with the layers that lycoris-lora and PEFT compute from the same files."""

import contextlib
import copy
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import BOFTConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model
from safetensors.torch import save_file

from sdxl_server.api.image_metadata import describe_image
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.convert.ldm_names import list_ldm_names
from sdxl_server.convert.recognition import recognise_checkpoint
from sdxl_server.convert.weights_files import CheckpointError
from sdxl_server.errors import ConfigError
from sdxl_server.model.adapters.changes import FusedChange, LowRankChange
from sdxl_server.model.adapters.layer_names import (
    MATRIX_BY_SUFFIX,
    Layer,
    index_layers,
    list_layers,
    list_normalisations,
)
from sdxl_server.model.adapters.lora_files import load_lora
from sdxl_server.model.adapters.registry import fuse_adapter
from sdxl_server.model.describe import describe_pipeline
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from tests.unit.pipelines import load, make_picture
from tools.random_model import make_pipeline

SAMPLES = ("norm1", "conv1", "conv_shortcut", "attn1_to_q", "attn2_to_out_0", "ff_net_2")
ENCODERS = ("text_encoder", "text_encoder_2")
LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
CONVOLUTION = "lora_unet_down_blocks_0_resnets_0_conv1"
NORM = "lora_unet_mid_block_attentions_0_norm"
# LyCORIS's settings of each file. Those of a set are linear in LyCORIS's multiplier; others only at 0 and 1, if at all.
LINEAR: dict[str, dict[str, Any]] = {
    "LoCon": {"network_module": "locon"},
    "LoCon, Tucker": {"network_module": "locon", "use_tucker": True},
    "LoCon, rsLoRA": {"network_module": "locon", "rs_lora": True},
    "LoHa": {"network_module": "loha"},
    "LoHa, Tucker": {"network_module": "loha", "use_tucker": True},
    "LoKr": {"network_module": "lokr", "factor": 4},
    "LoKr, Tucker": {"network_module": "lokr", "factor": 4, "use_tucker": True},
    "LoKr, decompose_both": {"network_module": "lokr", "decompose_both": True, "lora_dim": 2, "conv_lora_dim": 2},
    "LoKr, full_matrix": {"network_module": "lokr", "full_matrix": True},
    "LoKr, unbalanced": {"network_module": "lokr", "factor": 2, "unbalanced_factorization": True},
    "GLoRA": {"network_module": "glora"},
    "(IA)³ of outputs": {"network_module": "ia3"},
    "(IA)³ of inputs": {"network_module": "ia3", "train_on_input": True},
    "full differences": {"network_module": "full"},
    "OFT": {"network_module": "diag-oft"},
    "OFT, constraint": {"network_module": "diag-oft", "constraint": 0.01},
}
OTHERS: dict[str, dict[str, Any]] = {
    "DoRA of outputs": {"network_module": "locon", "weight_decompose": True},
    "DoRA of inputs": {"network_module": "locon", "weight_decompose": True, "wd_on_out": False},
    "DoRA, Tucker": {"network_module": "locon", "weight_decompose": True, "use_tucker": True},
    "LoHa, DoRA": {"network_module": "loha", "weight_decompose": True, "wd_on_out": False},
    "LoKr, DoRA": {"network_module": "lokr", "factor": 4, "weight_decompose": True},
    "OFT, rescale": {"network_module": "diag-oft", "rescaled": True},
    "BOFT": {"network_module": "boft"},
    "BOFT, rescale": {"network_module": "boft", "rescaled": True, "constraint": 0.01},
}


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return make_pipeline("tiny")


@pytest.fixture(scope="module")
def layers(pipeline: Any) -> Mapping[str, Layer]:
    return index_layers(pipeline, ENCODERS)


def randomise(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for each in module.parameters():
        each.data = each.data + torch.randn(each.shape, generator=generator) * 0.2


def train(module: torch.nn.Module, path: Path, *, prefix: str, **settings: Any) -> Any:
    """Return LyCORIS's network on each layer of a module, with random weights, and write its file."""
    wrapper = pytest.importorskip("lycoris").LycorisNetwork
    settings = {"lora_dim": 4, "conv_lora_dim": 4, "alpha": 2.0, "conv_alpha": 1.0, "train_norm": True, **settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wrapper, "LORA_PREFIX", prefix)
        network = wrapper(module, 1.0, **settings)
    network.loras = [each for each in network.loras if each.lora_name.endswith(SAMPLES)]
    for each in network.loras:
        randomise(each)
    network.apply_to()
    network.save_weights(str(path), None, {})
    return network


@contextlib.contextmanager
def fuse(pipeline: Any, layers: Mapping[str, Layer], path: Path, scale: float) -> Iterator[Any]:
    """Fuse a file into the UNet for a block of code."""
    kept = [(each, each.data) for each in pipeline.unet.parameters()]
    fuse_adapter(pipeline, load_lora(path, layers)[1], scale=scale)
    yield pipeline.unet
    for parameter, data in kept:
        parameter.data = data


def run_layer(layer: Any) -> torch.Tensor:
    """Return a layer's output for random input. It shows every weight."""
    generator = torch.Generator().manual_seed(6)
    if isinstance(layer, torch.nn.Linear):
        shape: tuple[int, ...] = (7, layer.in_features)
    elif isinstance(layer, torch.nn.Conv2d):
        shape = (2, layer.in_channels, 6, 6)
    else:
        shape = (2, layer.num_channels, 3, 3) if isinstance(layer, torch.nn.GroupNorm) else (7, *layer.normalized_shape)
    output: torch.Tensor = layer(torch.randn(shape, generator=generator))
    return output


def check_close(actual: Any, expected: Any, where: str = "") -> None:
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=2e-4, msg=lambda text: f"{where}: {text}")


@pytest.mark.parametrize("name", [*LINEAR, *OTHERS])
@torch.no_grad()
def test_layers_equal_those_of_lycoris(pipeline: Any, layers: Mapping[str, Layer], tmp_path: Path, name: str) -> None:
    path, block = tmp_path / "file.safetensors", copy.deepcopy(pipeline.unet.down_blocks[1])
    network = train(block, path, prefix="lycoris_down_blocks_1", **(LINEAR | OTHERS)[name])
    places = {f"lycoris_down_blocks_1_{each.replace('.', '_')}": each for each, _ in block.named_modules()}
    trained = [places[each.lora_name] for each in network.loras]
    kinds = {type(block.get_submodule(each)) for each in trained}
    assert kinds == {torch.nn.Linear, torch.nn.Conv2d, torch.nn.GroupNorm, torch.nn.LayerNorm}
    before = {each: run_layer(pipeline.unet.down_blocks[1].get_submodule(each)) for each in trained}
    after = {each: run_layer(block.get_submodule(each)) for each in trained}
    for scale in (0.5, -1.0):
        network.set_multiplier(scale)
        with fuse(pipeline, layers, path, scale) as unet:
            fused = {each: run_layer(unet.down_blocks[1].get_submodule(each)) for each in trained}
        for each in trained:
            expected = before[each] + scale * (after[each] - before[each])
            check_close(fused[each], expected, f"{each} at {scale}")
            assert not torch.equal(expected, before[each])
            if name in LINEAR:
                check_close(run_layer(block.get_submodule(each)), expected, f"LyCORIS's own {each} at {scale}")


BLOCK = "down_blocks.1"
TARGETS = [
    *(f"{BLOCK}.attentions.0.{name}" for name in ("proj_in", "transformer_blocks.0.ff.net.2")),
    *(f"{BLOCK}.attentions.0.transformer_blocks.0.attn1.{name}" for name in ("to_q", "to_out.0")),
    *(f"{BLOCK}.resnets.0.{name}" for name in ("conv1", "conv_shortcut", "time_emb_proj")),
]
PEFT: dict[str, Any] = {
    "LoHa": LoHaConfig(r=4, alpha=2, init_weights=False),
    "LoHa, Tucker": LoHaConfig(r=4, alpha=2, init_weights=False, use_effective_conv2d=True),
    "LoKr": LoKrConfig(r=4, alpha=2, init_weights=False, alpha_pattern={"to_q": 8}),
    "LoKr, both": LoKrConfig(r=2, alpha=3, init_weights=False, decompose_both=True, use_effective_conv2d=True),
    "LoKr, whole": LoKrConfig(r=64, alpha=16, init_weights=False, rank_pattern={"to_q": 32}),
    "(IA)³": IA3Config(feedforward_modules=[f"{BLOCK}.attentions.0.transformer_blocks.0.ff.net.2", "conv1"]),
    "OFT": OFTConfig(oft_block_size=16, init_weights=False),
    "OFT, shared, exact": OFTConfig(oft_block_size=8, init_weights=False, block_share=True, use_cayley_neumann=False),
    "OFT, three terms": OFTConfig(oft_block_size=16, init_weights=False, num_cayley_neumann_terms=3),
    "OFT, two terms": OFTConfig(oft_block_size=16, init_weights=False, num_cayley_neumann_terms=2),
    "BOFT": BOFTConfig(boft_block_size=16, init_weights=False),
    "DoRA": LoraConfig(r=4, lora_alpha=2, use_dora=True, init_lora_weights=False),
    "DoRA, rsLoRA": LoraConfig(r=4, lora_alpha=2, use_dora=True, use_rslora=True, init_lora_weights=False),
    "biases": LoraConfig(r=4, lora_alpha=2, lora_bias=True, init_lora_weights=False),
}


def train_with_peft(pipeline: Any, folder: Path, config: Any) -> Any:
    """Write the folder of one of PEFT's adapters. Return the UNet with the adapter merged."""
    config = copy.deepcopy(config)
    config.target_modules = {
        each for each in TARGETS if not each.endswith("to_q") or not getattr(config, "lora_bias", False)
    }
    model = get_peft_model(copy.deepcopy(pipeline.unet), config)
    torch.manual_seed(7)
    for each in model.parameters():
        if each.requires_grad:
            each.data += torch.randn(each.shape) * 0.1
    model.save_pretrained(str(folder))
    return model.merge_and_unload()


@pytest.mark.filterwarnings("ignore::UserWarning")  # BOFT's extension for CUDA, and the shape of biases
@pytest.mark.parametrize("name", PEFT)
@torch.no_grad()
def test_weights_equal_those_of_peft(pipeline: Any, layers: Mapping[str, Layer], tmp_path: Path, name: str) -> None:
    merged = train_with_peft(pipeline, tmp_path, PEFT[name]).state_dict()
    before, path = pipeline.unet.state_dict(), tmp_path / "adapter_model.safetensors"
    with fuse(pipeline, layers, path, -0.5) as unet:
        fused = unet.state_dict()
    for parameter, value in fused.items():
        check_close(value, before[parameter] - 0.5 * (merged[parameter] - before[parameter]), parameter)
    changed = {each.rpartition(".")[0] for each in before if not torch.equal(merged[each], before[each])}
    assert changed >= {*TARGETS} - {f"{BLOCK}.attentions.0.transformer_blocks.0.attn1.to_q"}


def test_oft_with_the_rotation_itself(pipeline: Any, layers: Mapping[str, Layer], tmp_path: Path) -> None:
    rotations = torch.linalg.qr(torch.randn(8, 8, 8))[0]
    path = save({f"{LAYER}.oft_diag": rotations}, tmp_path / "old.safetensors")
    expected = torch.block_diag(*rotations).T @ find_weight(pipeline.unet)
    with fuse(pipeline, layers, path, 1.0) as unet:
        check_close(find_weight(unet), expected)


def test_glora_with_the_first_names(pipeline: Any, layers: Mapping[str, Layer], tmp_path: Path) -> None:
    a1, a2, b1, b2 = torch.randn(4, 64), torch.randn(64, 4), torch.randn(4, 64), torch.randn(64, 4)
    tensors = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2, "alpha": torch.tensor(2.0)}
    path = save({f"{LAYER}.{name}": each for name, each in tensors.items()}, tmp_path / "old.safetensors")
    weight = find_weight(pipeline.unet)
    with fuse(pipeline, layers, path, 0.5) as unet:
        check_close(find_weight(unet), weight + 0.25 * (b2 @ b1 + weight @ a2 @ a1))


def save(tensors: Mapping[str, torch.Tensor], path: Path) -> Path:
    save_file({name: each.contiguous() for name, each in tensors.items()}, path)
    return path


def find_weight(unet: Any) -> torch.Tensor:
    """Return the weights of LAYER."""
    weight: torch.Tensor = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.data
    return weight


# A file of mixed formats, as ComfyUI and OneTrainer write them too.
MIXED: dict[str, tuple[int, ...]] = {
    f"{LAYER}.lora_down.weight": (4, 64),
    f"{LAYER}.lora_up.weight": (64, 4),
    f"{CONVOLUTION}.lora_down.weight": (4, 32, 1, 1),
    f"{CONVOLUTION}.lora_mid.weight": (4, 4, 3, 3),
    f"{CONVOLUTION}.lora_up.weight": (32, 4, 1, 1),
    f"{CONVOLUTION}.diff_b": (32,),
    f"{NORM}.w_norm": (64,),
    f"{NORM}.b_norm": (64,),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.hada_w1_a": (64, 4),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.hada_w1_b": (4, 32),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.hada_w2_a": (64, 4),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.hada_w2_b": (4, 32),
    "lora_te2_text_model_encoder_layers_0_layer_norm1.diff": (32,),
    "diffusion_model.out.0.set_weight": (32,),
}


def make_mixed() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in MIXED.items()}


@pytest.mark.parametrize("naming", ["kohya", "kohya, original", "lycoris", "diffusers", "OneTrainer", "ComfyUI"])
@torch.no_grad()
def test_each_naming_finds_its_layers(pipeline: Any, layers: Mapping[str, Layer], tmp_path: Path, naming: str) -> None:
    flat = {
        "kohya": ("lora_unet_", "lora_te1_", "lora_te2_"),
        "lycoris": ("lycoris_unet_", "lycoris_te1_", "lycoris_te2_"),
    }
    dotted = {
        "diffusers": ("unet.", "text_encoder.", "text_encoder_2."),
        "OneTrainer": ("unet.", "clip_l.", "clip_g."),
        "ComfyUI": ("diffusion_model.", "text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer."),
    }
    tensors: dict[str, torch.Tensor] = {}
    expected: set[tuple[Layer, float]] = set()
    for component, prefix in zip(("unet", *ENCODERS), (dotted | flat)[naming.split(",")[0]], strict=True):
        named = list_layers(component, getattr(pipeline, component)) + list_normalisations(
            component, getattr(pipeline, component)
        )
        original = {}
        if component == "unet" and naming in ("kohya, original", "OneTrainer", "ComfyUI"):
            original = list_ldm_names([each.weight for each in named], 1)
        for layer in named:
            name = original.get(layer.weight, layer.weight).removesuffix(".weight")
            if component != "unet" and name != "text_projection":
                name = f"text_model.{name.removeprefix('text_model.')}"
            stem = prefix + (name.replace(".", "_") if prefix.endswith("_") else name)
            tensors[f"{stem}.{'diff' if len(layer.shape) > 1 else 'w_norm'}"] = torch.full(
                layer.shape, float(len(expected))
            )
            expected.add((layer, float(len(expected))))
    _, changes = load_lora(save(tensors, tmp_path / "names.safetensors"), layers)
    found = [(layer, each.tensors["diff"]) for layer, each in changes.items() if isinstance(each, FusedChange)]
    assert {(layer, float(each.flatten()[0])) for layer, each in found} == expected


def adapt(
    folder: Path, path: Path, pt2: Any = None, *, scale: float = 1.0, fuse: bool = True, **settings: Any
) -> LoadedPipeline:
    entry = {"name": "mixed", "path": str(path), "scale": scale, "fuse": fuse}
    return load(folder, pt2, adapters=HandlerConfig.parse({"adapters": [entry]}).adapters, **settings)


@torch.no_grad()
def test_a_mixed_file_is_fused_whole(tiny_model: Path, tmp_path: Path) -> None:
    tensors = make_mixed()
    path = save(tensors, tmp_path / "mixed.safetensors")
    plain, loaded = load(tiny_model), adapt(tiny_model, path, scale=0.5)
    before, after = plain.pipeline, loaded.pipeline
    name = "lora_te1_text_model_encoder_layers_0_mlp_fc1.hada_w"
    pairs = [tensors[f"{name}{each}_a"] @ tensors[f"{name}{each}_b"] for each in (1, 2)]
    core = torch.einsum(
        "pi,ijkl,jr->prkl",
        tensors[f"{CONVOLUTION}.lora_up.weight"].flatten(1),
        tensors[f"{CONVOLUTION}.lora_mid.weight"],
        tensors[f"{CONVOLUTION}.lora_down.weight"].flatten(1),
    )
    expected = {
        ("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"): tensors[f"{LAYER}.lora_up.weight"]
        @ tensors[f"{LAYER}.lora_down.weight"],
        ("unet", "down_blocks.0.resnets.0.conv1.weight"): core,
        ("unet", "down_blocks.0.resnets.0.conv1.bias"): tensors[f"{CONVOLUTION}.diff_b"],
        ("unet", "mid_block.attentions.0.norm.weight"): tensors[f"{NORM}.w_norm"],
        ("unet", "mid_block.attentions.0.norm.bias"): tensors[f"{NORM}.b_norm"],
        ("unet", "conv_norm_out.weight"): tensors["diffusion_model.out.0.set_weight"]
        - before.unet.conv_norm_out.weight,
        ("text_encoder", "encoder.layers.0.mlp.fc1.weight"): pairs[0] * pairs[1],
        ("text_encoder_2", "encoder.layers.0.layer_norm1.weight"): tensors[
            "lora_te2_text_model_encoder_layers_0_layer_norm1.diff"
        ],
    }
    for component in ("unet", *ENCODERS):
        old = dict(getattr(before, component).named_parameters())
        for parameter, value in getattr(after, component).named_parameters():
            added = expected.pop((component, parameter.removeprefix("text_model.")), None)
            check_close(value, old[parameter] if added is None else old[parameter] + 0.5 * added, parameter)
    assert not expected
    pictures = [make_picture(each, num_inference_steps=1) for each in (plain, loaded)]
    assert np.abs(pictures[0] - pictures[1]).max() > 3
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    told = {
        "name": "mixed",
        "sha256": digest,
        "autov2": digest[:10],
        "scale": 0.5,
        "fused": True,
        "rank": 4,
        "layers": 6,
    }
    assert describe_pipeline(loaded)["adapters"] == [told]
    request = loaded.contract.check({"prompt": "a fox"})
    assert describe_image(loaded, request, 0, unet_calls=1)["made_with"]["adapters"] == [told]


def test_the_digest_and_the_compiled_model_follow_the_file_and_the_scale(
    tiny_model: Path, tmp_path: Path, cached: Any
) -> None:
    """Only a normalisation of a text encoder changes. The digest is a part of the cache's keys."""
    name = "lora_te1_text_model_encoder_layers_0_layer_norm1"
    path, other = tmp_path / "norm.safetensors", tmp_path / "other.safetensors"
    save({f"{name}.w_norm": torch.full((32,), 0.5), f"{name}.b_norm": torch.full((32,), 0.5)}, path)
    save({f"{name}.b_norm": torch.full((32,), 0.5)}, other)
    plain, eager = load(tiny_model), adapt(tiny_model, path, scale=-1.0)
    digests = {adapt(tiny_model, file).weights_sha256 for file in (path, other)}
    assert len({plain.weights_sha256, eager.weights_sha256, *digests}) == 4
    assert adapt(tiny_model, path, scale=0.0).weights_sha256 == plain.weights_sha256
    assert describe_pipeline(eager)["adapters"][0]["rank"] is None
    expected = make_picture(eager, num_inference_steps=1)
    for scale in (1.0, -1.0):
        compiled = adapt(tiny_model, path, cached, scale=scale, compile_unet=False, compile_vae=False)
        picture = make_picture(compiled, num_inference_steps=1)
    assert np.abs(picture - expected).max() <= 1
    assert compiled.weights_sha256 == eager.weights_sha256


def test_a_file_for_stable_diffusion_1(tiny_sd_model: Path, tmp_path: Path) -> None:
    names = (f"{LAYER}.diff", "lora_te_text_model_encoder_layers_0_mlp_fc1.diff_b")
    pipeline = load(tiny_sd_model).pipeline
    shapes = (find_weight(pipeline.unet).shape, pipeline.text_encoder.encoder.layers[0].mlp.fc1.bias.shape)
    path = save(
        {name: torch.ones(shape) for name, shape in zip(names, shapes, strict=True)}, tmp_path / "sd.safetensors"
    )
    fused = adapt(tiny_sd_model, path, scale=0.5).pipeline
    check_close(find_weight(fused.unet), find_weight(pipeline.unet) + 0.5)
    check_close(
        fused.text_encoder.encoder.layers[0].mlp.fc1.bias, pipeline.text_encoder.encoder.layers[0].mlp.fc1.bias + 0.5
    )


def test_a_file_that_can_only_be_fused_says_so(tiny_model: Path, tmp_path: Path) -> None:
    decomposed = {**make_mixed(), f"{LAYER}.dora_scale": torch.ones(64, 1)}
    path = save(decomposed, tmp_path / "mixed.safetensors")
    told = (
        r"^handler\.adapters\[0\]\.fuse: false takes plain LoRA, and .*mixed\.safetensors holds DoRA, LoHa, LoRA, "
        "biases, differences of weights, whole weights, which can only be added to the weights: use fuse: true$"
    )
    with pytest.raises(ConfigError, match=told):
        adapt(tiny_model, path, "openvino", fuse=False)


def test_plain_lora_stays_low_rank(layers: Mapping[str, Layer], tmp_path: Path) -> None:
    tensors = {name: each for name, each in make_mixed().items() if "lora_" in name.partition(".")[2]}
    _, changes = load_lora(save(tensors, tmp_path / "plain.safetensors"), layers)
    assert [type(each) for each in changes.values()] == [LowRankChange] * 2


LORA = {f"{LAYER}.lora_down.weight": (4, 64), f"{LAYER}.lora_up.weight": (64, 4)}
LOHA = {f"{LAYER}.hada_{name}": (64, 4) if name.endswith("a") else (4, 64) for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
IA3 = {f"{LAYER}.weight": (64,), f"{LAYER}.on_input": (1,)}


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        ({**LOHA, f"{LAYER}.hada_w2_b": None}, r"lacks a matrix of unet\.mid_block.*to_k: hada_w2_b"),
        ({f"{LAYER}.lokr_w1": (8, 8)}, "lacks a matrix of unet.*: lokr_w2_a"),
        ({f"{LAYER}.weight": (64,)}, "lacks a matrix of unet.*: on_input"),
        ({**LORA, f"{CONVOLUTION}.weight": (32,)}, "lacks a matrix of unet.*: on_input"),
        ({**LOHA, **LORA}, r"holds LoRA and LoHa for one layer, unet\.mid_block"),
        ({**LOHA, f"{LAYER}.rescale": (64, 1)}, "holds LoHa and OFT or BOFT for one layer"),
        ({**LOHA, f"{LAYER}.hada_w3_a": (64, 4)}, "for which this model has no layer: .*hada_w3_a"),
        ({**LOHA, f"{LAYER}.scalar": (1,)}, "no layer: .*scalar"),
        ({f"{LAYER}.diff": (64, 64), f"{LAYER}.alpha": (1,)}, "that differences of weights does not have: alpha"),
        ({**IA3, f"{LAYER}.alpha": (1,)}, r"that \(IA\)³ does not have: alpha"),
        (
            {**LORA, f"{LAYER}.dora_scale": (64, 1), f"{LAYER}.lora_magnitude_vector": (64,)},
            "does not have: dora_scale",
        ),
        (
            {f"{LAYER}.lokr_w1": (8, 8), f"{LAYER}.lokr_w2": (8, 8), f"{LAYER}.lokr_w2_a": (8, 2)},
            "does not have: lokr_w2_a",
        ),
        ({f"{NORM}.b_norm": (64,), f"{NORM}.dora_scale": (64,)}, "does not have: dora_scale"),
        ({**LOHA, f"{LAYER}.hada_w1_b": (4, 768), f"{LAYER}.hada_w2_b": (4, 768)}, r"1\.x: unet.* 64×64, .*w1_b 4×768"),
        ({f"{LAYER}.diff": (64, 2048)}, "made for Stable Diffusion XL: unet"),
        ({f"{LAYER}.diff": (1,)}, "has weights of 64×64, and the file has diff 1"),
        ({f"{LAYER}.diff": (32, 128)}, "the file has diff 32×128"),
        ({f"{LAYER}.diff_b": (64,)}, "has weights of 64×64, no bias, and the file has diff_b 64"),
        ({f"{CONVOLUTION}.diff_b": (64,)}, "the file has diff_b 64"),
        ({f"{LAYER}.set_weight": ()}, "has weights of 64×64"),
        ({f"{LAYER}.lokr_w1": (8, 8), f"{LAYER}.lokr_w2": (8, 16)}, "lokr_w2 8×16"),
        ({f"{LAYER}.lokr_w1": (4, 16), f"{LAYER}.lokr_w2": (8, 8)}, "lokr_w1 4×16"),
        ({f"{LAYER}.weight": (32,), f"{LAYER}.on_input": (1,)}, "the file has on_input 1, weight 32"),
        ({f"{LAYER}.oft_blocks": (4, 8, 8)}, "oft_blocks 4×8×8"),
        ({f"{LAYER}.oft_blocks": (7, 3, 16, 16)}, "oft_blocks 7×3×16×16"),
        ({**LORA, f"{LAYER}.dora_scale": (1,)}, "dora_scale 1"),
        ({**{name: (0, 64) if "b" in name[-1] else (64, 0) for name in LOHA}}, "does not fit"),
        ({f"{LAYER}.{each}.weight": (64, 4) for each in ("a1", "a2", "b1", "b2")}, "does not fit"),
        ({f"{NORM}.lora_down.weight": (4, 64), f"{NORM}.lora_up.weight": (64, 4)}, "has weights of 64, and"),
        ({**LOHA, f"{LAYER}.alpha": (2,)}, "takes one number as the alpha"),
        ({f"{LAYER}.vera_lambda_b": (64,)}, "no layer: .*vera_lambda_b"),
        ({"decoder.conv_in.weight": (4, 4, 3, 3)}, "holds a VAE alone, no LoRA or other adapter"),
    ],
)
def test_a_file_that_does_not_fit_is_reported_in_a_line(
    layers: Mapping[str, Layer], tmp_path: Path, shapes: Mapping[str, Any], told: str
) -> None:
    tensors = {name: torch.ones(shape) for name, shape in shapes.items() if shape is not None}
    with pytest.raises(ConfigError, match=rf"wrong\.safetensors .*{told}") as error:
        load_lora(save(tensors, tmp_path / "wrong.safetensors"), layers)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*LOHA, f"{NORM}.w_norm"])
def test_unusable_numbers_are_refused(layers: Mapping[str, Layer], tmp_path: Path, name: str) -> None:
    shapes = {**LOHA, f"{NORM}.w_norm": (64,)}
    tensors = {each: torch.full(shape, torch.nan if each == name else 1.0) for each, shape in shapes.items()}
    with pytest.raises(ConfigError, match=rf"that are not finite: {MATRIX_BY_SUFFIX['.' + name.partition('.')[2]]}"):
        load_lora(save(tensors, tmp_path / "nan.safetensors"), layers)
    with pytest.raises(ConfigError, match="takes floating-point numbers for unet"):
        load_lora(
            save({**tensors, name: torch.ones(shapes[name], dtype=torch.int8)}, tmp_path / "int.safetensors"), layers
        )


def test_pickles_and_sums_that_are_too_large_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    torch.save({f"{LAYER}.diff": torch.ones(64, 64)}, tmp_path / "loha.pt")
    with pytest.raises(ConfigError, match=r"adapters\[0\]\.path: .*loha\.pt is a pickle, which can run code"):
        adapt(tiny_model, tmp_path / "loha.pt")
    path = save({f"{NORM}.b_norm": torch.full((64,), 3e38)}, tmp_path / "large.safetensors")
    with pytest.raises(ConfigError, match=r"at scale 100 unet\.mid_block\.attentions\.0\.norm\.bias is too large"):
        adapt(tiny_model, path, scale=100)


def test_peft_settings_that_are_not_served(pipeline: Any, layers: Mapping[str, Layer], tmp_path: Path) -> None:
    train_with_peft(pipeline, tmp_path, OFTConfig(oft_block_size=16, coft=True))
    with pytest.raises(ConfigError, match="holds OFT of PEFT with coft: true, which is not served"):
        load_lora(tmp_path / "adapter_model.safetensors", layers)
    tensors = {"boft_R": torch.ones(2, 4, 16, 16), "boft_s": torch.ones(64, 1)}
    path = save(
        {f"unet.mid_block.attentions.0.proj_in.{name}": each for name, each in tensors.items()},
        tmp_path / "b.safetensors",
    )
    with pytest.raises(ConfigError, match="holds BOFT of PEFT with 2 butterfly factors, and only one is served"):
        load_lora(path, layers)


def test_an_adapter_is_not_taken_for_a_model(tmp_path: Path) -> None:
    for name in (
        *MIXED,
        f"{LAYER}.oft_diag",
        "unet.x.ia3_l",
        "unet.x.boft_R",
        f"{LAYER}.a1.weight",
        f"{LAYER}.on_input",
    ):
        path = save({name: torch.ones(1)}, tmp_path / "adapter.safetensors")
        with pytest.raises(CheckpointError, match="holds a LoRA or another adapter of a model, not a whole model"):
            recognise_checkpoint(path)
