"""Models whose weights make numbers that are not finite, each in another place; nothing of them is a mock."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
LATE = 376  # the timestep below which `late` overflows: of four leading ones, 751, 501, 251 and 1, at the third


def spoil_model(source: Path, target: Path, kind: str) -> Path:
    """Copy a small pipeline and spoil it; return the copy's folder.

    Args:
        kind: `early`, the UNet returns NaN; `late`, it does at small timesteps only; `overflow`, the scheduler's sum is
            infinite; `decoder` and `encoder`, the VAE's halves; `text`, the second text encoder.
    """
    folder = shutil.copytree(source, target)
    name = {"decoder": VAE, "encoder": VAE, "text": "text_encoder_2/model.safetensors"}.get(kind, UNET)
    weights = load_file(folder / name)
    if kind == "late":
        _overflow_late(weights)
    else:
        key = {
            **{"early": "conv_out.bias", "overflow": "conv_out.bias", "decoder": "decoder.conv_out.bias"},
            **{"encoder": "encoder.conv_out.bias", "text": "text_model.final_layer_norm.bias"},
        }[kind]
        weights[key] = torch.full_like(weights[key], 3e38 if kind == "overflow" else torch.nan)
    save_file(weights, folder / name, metadata={"format": "pt"})
    return folder


def _overflow_late(weights: dict[str, Any]) -> None:
    """Let the embedding of a timestep overflow below LATE, by the slowest of its sines, which grows all the way."""
    first, bias = (weights[f"time_embedding.linear_1.{name}"] for name in ("weight", "bias"))
    half = first.shape[1] // 2
    turned = torch.sin(torch.tensor(LATE * 10000 ** (-(half - 1) / half)))
    first[0], bias[0] = 0, turned * 1e30
    first[0, -1] = -1e30  # the sines stand behind the cosines
    weights["time_embedding.linear_2.weight"][:, 0] = 1e30
