"""Measure what controls cost: the UNet's step without them, with them unused, and with them. All in turns."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.turns import format_spread

STEPS = 4  # of an image. The first includes the prompt and the control's image, the last the VAE
KINDS = ("t2i_adapter", "controlnet", "ip_adapter")
PLAIN, UNUSED = "no controls", ", unused"
VIT_H = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}


@dataclass
class ControlRow:
    """Figures of one kind of control.

    Attributes:
        seconds: of a step.
        shares: seconds of a step without controls, divided by the seconds of this one, by pairs.
        memory: what the process grew by when a pipeline with it was loaded, in GB.
        first: seconds from the request to its first step, the first time; includes the control's image.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    memory: float | None = None
    first: float | None = None


def make_control(folder: Path, kind: str, unet: Any) -> Path:
    """Save a control of the published size with random weights, if there is none, and return its path."""
    import diffusers
    import torch
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    path = folder / (kind + (".safetensors" if kind == "ip_adapter" else ""))
    if path.exists():
        return path
    torch.manual_seed(0)
    if kind == "t2i_adapter":
        channels = tuple(unet.config.block_out_channels)
        channels += channels[-1:] if len(channels) > 2 else ()  # the middle has a map of its own
        adapter = diffusers.T2IAdapter(channels=channels, downscale_factor=16, adapter_type="full_adapter_xl")
        adapter.half().save_pretrained(path)
    elif kind == "controlnet":
        diffusers.ControlNetModel.from_unet(unet).half().save_pretrained(path)
    else:
        config = CLIPVisionConfig(**VIT_H, image_size=224, patch_size=14, projection_dim=1024)
        CLIPVisionModelWithProjection(config).half().save_pretrained(folder / "image_encoder")
        width, tensors = unet.config.cross_attention_dim, {}
        names = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
        for index, name in enumerate(names):
            for each in "kv":
                weight = unet.get_submodule(name).to_k.weight
                tensors[f"ip_adapter.{2 * index + 1}.to_{each}_ip.weight"] = torch.randn(weight.shape) / width**0.5
        tensors |= {
            "image_proj.proj.weight": torch.randn(4 * width, 1024) / 32,
            "image_proj.norm.bias": torch.zeros(width),
        }
        tensors |= {"image_proj.proj.bias": torch.zeros(4 * width), "image_proj.norm.weight": torch.ones(width)}
        save_file({name: each.half() for name, each in tensors.items()}, path)
    return path


def measure_controls(
    model: Path, folder: Path, *, sizes: Sequence[int], pt2: Any, kinds: Sequence[str], turns: int
) -> dict[int, list[ControlRow]]:
    """Return the figures of each size of image, in pixels.

    Args:
        folder: of the controls; they are made there.
        pt2: as in model-config.yaml.
    """
    import diffusers
    from PIL import Image

    from sdxl_server.config.compile_settings import CompileConfig
    from sdxl_server.config.settings import HandlerConfig
    from sdxl_server.loading import load_pipeline
    from sdxl_server.request.uploads import Upload

    unet = diffusers.UNet2DConditionModel.from_pretrained(model / "unet")
    paths = {kind: make_control(folder, kind, unet).resolve() for kind in kinds}
    del unet
    loaded, memory = {}, {}
    for name in (PLAIN, *kinds):
        before = psutil.Process().memory_info().rss
        controls = {} if name == PLAIN else {"controls": [{"name": name, "path": str(paths[name])}]}
        config = HandlerConfig.parse({"model_path": model.name, **controls})
        loaded[name] = load_pipeline(config, CompileConfig.parse(pt2), model_dir=model.parent)
        memory[name] = (psutil.Process().memory_info().rss - before) / 1e9
        print(f"{name}: loaded, process {psutil.Process().memory_info().rss / 1e9:.1f} GB", flush=True)
    figures = {}
    for size in sizes:
        variants = [(PLAIN, []), *((kind, used) for kind in kinds for used in ([], [kind]))]
        rows = [ControlRow(name + UNUSED * (name in kinds and not used)) for name, used in variants]
        for turn in range(turns):
            for row, (name, used) in zip(rows, variants, strict=True):
                image = Upload(Image.new("RGB", (size, size), "grey"))
                fields = {"prompt": "a fox", "seed": turn, "width": size, "height": size, "num_inference_steps": STEPS}
                control = [{"name": each, "image": image} for each in used]
                request = loaded[name].contract.check({**fields, "control": control})
                first, seconds = time_steps(loaded[name], request)
                row.memory, row.first = None if used else memory[name], row.first or first
                row.seconds += seconds
                plain = rows[0].seconds[-len(seconds) :]
                row.shares += [one / own for one, own in zip(plain, seconds, strict=True)]
                print(f"{size} {row.name}: {statistics.fmean(seconds):.2f} s", flush=True)
        figures[size] = rows
    return figures


def time_steps(loaded: Any, request: Any) -> tuple[float, list[float]]:
    """Return the seconds up to the first step, and of each further one but the last."""
    from sdxl_server.diffusion.generation import generate

    times = [time.perf_counter()]
    steps = generate(loaded, request)
    for _ in range(STEPS - 1):
        next(steps)
        times.append(time.perf_counter())
    steps.close()
    seconds = [after - before for before, after in zip(times, times[1:], strict=False)]
    return seconds[0], seconds[1:]


def format_controls(rows: Sequence[ControlRow]) -> list[dict[str, str]]:
    """Return the cells of a table."""
    return [
        {
            "controls": row.name,
            "s a step: median (least–most)": format_spread(row.seconds),
            "speed without ÷ with, of pairs": format_spread(row.shares),
            "first step, s": f"{row.first:.1f}",
            "GB more": "–" if row.memory is None else f"{row.memory:.1f}",
        }
        for row in rows
    ]
