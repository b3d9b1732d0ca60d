"""Low-rank changes (LoRA) of a UNet's layers during training, and their file."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sdxl_server.model.adapters.layer_names import UNET, list_layers


class LowRankChange(torch.nn.Module):
    """The term that is added to a layer's result: up · (down · x), in float32."""

    def __init__(self, layer: Any, rank: int) -> None:
        super().__init__()
        is_linear = isinstance(layer, torch.nn.Linear)
        self.down = (
            torch.nn.Linear(layer.in_features, rank, bias=False)
            if is_linear
            else torch.nn.Conv2d(layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, bias=False)
        )
        self.up = (
            torch.nn.Linear(rank, layer.out_features, bias=False)
            if is_linear
            else torch.nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        )
        torch.nn.init.normal_(self.down.weight, std=layer.weight[0].numel() ** -0.5)
        torch.nn.init.zeros_(self.up.weight)  # so that it changes nothing at first

    def change(self, layer: Any, inputs: tuple[torch.Tensor], result: torch.Tensor) -> torch.Tensor:
        """Return a layer's result with the added term, as a forward hook does."""
        # On a CPU without AMX a convolution's gradients take ten times as long in bfloat16
        with torch.autocast(result.device.type, enabled=False):
            return result + self.up(self.down(inputs[0].float())).to(result.dtype)


def add_low_rank(unet: Any, rank: int) -> dict[str, LowRankChange]:
    """Let a UNet learn only low-rank changes. Return them by the layer's name."""
    unet.requires_grad_(False)
    changes = {}
    for layer in list_layers(UNET, unet):
        module = unet.get_submodule(layer.name)
        changes[layer.name] = LowRankChange(module, rank).to(module.weight.device)
        module.register_forward_hook(changes[layer.name].change)
    return changes


def name_matrices(changes: dict[str, LowRankChange]) -> dict[str, torch.Tensor]:
    """Return the matrices by diffusers' names. Without an alpha their strength is 1."""
    tensors = {}
    for name, change in changes.items():
        tensors[f"{UNET}.{name}.lora_A.weight"] = change.down.weight
        tensors[f"{UNET}.{name}.lora_B.weight"] = change.up.weight
    return tensors


@torch.no_grad()
def save_low_rank(changes: dict[str, LowRankChange], path: Path) -> None:
    """Write changes as an adapter, in float16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.half().contiguous().cpu() for name, tensor in name_matrices(changes).items()}
    save_file(tensors, path, {"format": "pt"})


@torch.no_grad()
def load_low_rank(changes: dict[str, LowRankChange], path: Path) -> None:
    """Start changes from an adapter that save_low_rank wrote."""
    saved = load_file(path)
    for name, tensor in name_matrices(changes).items():
        tensor.copy_(saved[name])
