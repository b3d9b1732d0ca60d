"""Adapters beyond plain LoRA, compared with the layers that lycoris-lora and PEFT compute from the same files."""

import copy
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lycoris import LycorisNetwork
from peft import BOFTConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model
from safetensors.torch import save_file

from sdxl_server.model.adapters.layer_names import Layer, index_layers
from sdxl_server.model.adapters.lora_files import load_lora
from sdxl_server.model.adapters.registry import fuse_adapter
from tools.random_model import make_pipeline

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


def train(module: torch.nn.Module, path: Path, *, prefix: str, **settings: Any) -> LycorisNetwork:
    """Return LyCORIS's network on each layer of a module, with random weights, and write its file."""
    settings = {"lora_dim": 4, "conv_lora_dim": 4, "alpha": 2.0, "conv_alpha": 1.0, "train_norm": True, **settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LycorisNetwork, "LORA_PREFIX", prefix)
        network = LycorisNetwork(module, 1.0, **settings)
    for each in network.loras:
        randomise(each)
    network.apply_to()
    network.save_weights(str(path), None, {})
    return network


@torch.no_grad()
def fuse(pipeline: Any, layers: Mapping[str, Layer], path: Path, scale: float) -> Any:
    """Return a copy of the UNet with a file fused."""
    copied = SimpleNamespace(unet=copy.deepcopy(pipeline.unet))
    fuse_adapter(copied, load_lora(path, layers)[1], scale=scale)
    return copied.unet


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
    for scale in (1.0, 0.5, -1.0):
        fused = fuse(pipeline, layers, path, scale).down_blocks[1]
        network.set_multiplier(scale)
        for each in trained:
            expected = before[each] + scale * (after[each] - before[each])
            check_close(run_layer(fused.get_submodule(each)), expected, f"{each} at {scale}")
            assert not torch.equal(expected, before[each])
            if name in LINEAR:
                check_close(run_layer(block.get_submodule(each)), expected, f"LyCORIS's own {each} at {scale}")


ATTENTION = ["to_q", "to_out.0", "ff.net.2", "proj_in", "time_emb_proj"]
CONVOLUTIONS = ["conv1", "conv_shortcut"]
PEFT: dict[str, Any] = {
    "LoHa": LoHaConfig(r=4, alpha=2, init_weights=False),
    "LoHa, Tucker": LoHaConfig(r=4, alpha=2, init_weights=False, use_effective_conv2d=True),
    "LoKr": LoKrConfig(r=4, alpha=2, init_weights=False, alpha_pattern={"to_q": 8}),
    "LoKr, both": LoKrConfig(r=2, alpha=3, init_weights=False, decompose_both=True, use_effective_conv2d=True),
    "LoKr, whole": LoKrConfig(r=64, alpha=16, init_weights=False, rank_pattern={"to_q": 32}),
    "(IA)³": IA3Config(feedforward_modules=["ff.net.2", "conv1"]),
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
    config.target_modules = {*ATTENTION, *CONVOLUTIONS}
    model = get_peft_model(copy.deepcopy(pipeline.unet), config)
    torch.manual_seed(7)
    for each in model.parameters():
        if each.requires_grad:
            each.data += torch.randn(each.shape) * 0.1
    model.save_pretrained(str(folder))
    return model.merge_and_unload()


@pytest.mark.parametrize("name", PEFT)
@torch.no_grad()
def test_weights_equal_those_of_peft(pipeline: Any, layers: Mapping[str, Layer], tmp_path: Path, name: str) -> None:
    merged = train_with_peft(pipeline, tmp_path, PEFT[name]).state_dict()
    before, path = pipeline.unet.state_dict(), tmp_path / "adapter_model.safetensors"
    for scale in (1.0, -0.5):
        for parameter, value in fuse(pipeline, layers, path, scale).state_dict().items():
            check_close(value, before[parameter] + scale * (merged[parameter] - before[parameter]), parameter)
    assert sum(not torch.equal(merged[each], before[each]) for each in before) > 20


def test_oft_with_the_rotation_itself(pipeline: Any, layers: Mapping[str, Layer], tmp_path: Path) -> None:
    rotations = torch.linalg.qr(torch.randn(8, 8, 8))[0]
    path = save({f"{LAYER}.oft_diag": rotations}, tmp_path / "old.safetensors")
    expected = torch.block_diag(*rotations).T @ find_weight(pipeline.unet)
    check_close(find_weight(fuse(pipeline, layers, path, 1.0)), expected)


def test_glora_with_the_first_names(pipeline: Any, layers: Mapping[str, Layer], tmp_path: Path) -> None:
    a1, a2, b1, b2 = torch.randn(4, 64), torch.randn(64, 4), torch.randn(4, 64), torch.randn(64, 4)
    tensors = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2, "alpha": torch.tensor(2.0)}
    path = save({f"{LAYER}.{name}": each for name, each in tensors.items()}, tmp_path / "old.safetensors")
    weight = find_weight(pipeline.unet)
    check_close(find_weight(fuse(pipeline, layers, path, 0.5)), weight + 0.25 * (b2 @ b1 + weight @ a2 @ a1))


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
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.hada_w1_a": (37, 4),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.hada_w1_b": (4, 32),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.hada_w2_a": (37, 4),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.hada_w2_b": (4, 32),
    "lora_te2_text_model_encoder_layers_0_layer_norm1.diff": (32,),
    "diffusion_model.out.0.set_weight": (32,),
}


def make_mixed() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in MIXED.items()}
