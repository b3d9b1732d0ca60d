"""Models and controls that the tests of controls share."""

import json
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image, ImageDraw

from sdxl_server.config.settings import HandlerConfig
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from tests.unit.pipelines import encode, load
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


def write_model(folder: Path, *, in_channels: int = 4) -> Path:
    """Write a small Stable Diffusion XL with the blocks of the real one."""
    pipeline = make_pipeline("tiny")
    torch.manual_seed(1)
    config = {**CONFIGURATIONS["tiny"]["unet"], **BLOCKS, "in_channels": in_channels}
    pipeline.register_modules(unet=diffusers.UNet2DConditionModel(out_channels=4, **config))
    save_pipeline(pipeline, folder)
    return folder


def control(model: Path, pt2: Any, *paths: Path, encoder: Any = None, **settings: Any) -> LoadedPipeline:
    """Load a model with controls `a`, `b` and so on.

    Args:
        encoder: the folder of IP-Adapters' image encoder.
    """
    more = {} if encoder is None else {"image_encoder": str(encoder)}
    entries = [{"name": name, "path": str(path), **more} for name, path in zip(ascii_lowercase, paths, strict=False)]
    return load(model, pt2, controls=HandlerConfig.parse({"controls": entries}).controls, **settings)


def name_control(name: str = "a", image: Image.Image = OUTLINE, **more: Any) -> dict[str, Any]:
    """Return a control of a request; `begin` is its `from`, a word of Python."""
    return {"name": name, "image": encode(image), **{"from" if key == "begin" else key: more[key] for key in more}}


def measure(one: Picture, other: Picture) -> int:
    return int(np.abs(one - other).max())


def change(folder: Path, **config: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
