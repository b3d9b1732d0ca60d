"""Judge step plans: how near they come to the full image, compared with plain fewer steps."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.turns import format_number, format_spread
from demo.measure import choose_prompts, score_pictures
from sdxl_server.diffusion.stand_ins import build_vae
from sdxl_server.sampling.few_steps import FEW_STEPS
from tools.server import ROOT

Fields = Mapping[str, Any]
_INTERVAL = [0.2, 0.8]
_SAMPLERS = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")


@dataclass
class PlanRow:
    """Figures of one step plan over all prompts.

    Attributes:
        calls: UNet calls for an image.
        ratios: seconds of the full image, divided by the seconds of this one.
        psnr: in dB to the full image, for each image that differs.
        latents: relative distances of the VAE's latents to the full image's.
        score: share of prompts drawn right, on the demonstration model.
    """

    name: str
    calls: float = 0
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    latents: list[float] = field(default_factory=list)
    score: float | None = None


def list_plans(steps: int, calls: Sequence[int]) -> dict[str, Fields]:
    """Return the fields of a request for each plan by its name. The full one is first."""
    plans: dict[str, Fields] = {"full": {"num_inference_steps": steps}}
    for count in calls:
        plans[f"{count} plain steps"] = {"num_inference_steps": count}
        for name in _SAMPLERS:
            plans[f"{count} plain steps, {name}"] = {"num_inference_steps": count, "scheduler": name}
        plans[f"unet_calls: {count}"] = {"num_inference_steps": steps, "unet_calls": count}
    interval = {"num_inference_steps": steps, "guidance_interval": _INTERVAL}
    plans[f"guidance_interval: {_INTERVAL}"] = interval
    plans[f"both, unet_calls: {calls[0]}"] = {**interval, "unet_calls": calls[0]}
    plans[f"{FEW_STEPS} steps without guidance"] = {"num_inference_steps": FEW_STEPS, "guidance_scale": 0}
    return plans


def judge_plans(
    model: Path, plans: Mapping[str, Fields], *, settings: Fields, pt2: Any, count: int, images: Path | None
) -> list[PlanRow]:
    """Draw each prompt by all plans in turn.

    Args:
        plans: as `list_plans` returns them; distances are to the first.
        settings: of the handler section.
        pt2: as in model-config.yaml.
        count: of prompts.
        images: a folder to save the images in.
    """
    from sdxl_server.config.compile_settings import CompileConfig
    from sdxl_server.config.settings import HandlerConfig
    from sdxl_server.diffusion.generation import generate, run_to_end
    from sdxl_server.loading import load_pipeline

    config = HandlerConfig.parse({"model_path": model.name, **settings})
    loaded = load_pipeline(config, CompileConfig.parse(pt2), model_dir=model.parent)
    prompts, rows = choose_prompts(count), [PlanRow(name) for name in plans]
    drawn: dict[str, list[Any]] = {name: [] for name in plans}
    for prompt in tqdm(prompts, disable=None):
        full: Any = None
        for row, fields in zip(rows, plans.values(), strict=True):
            request = loaded.contract.check({"prompt": prompt.text, "seed": prompt.seed, **fields})
            started = time.perf_counter()
            (result,) = run_to_end(generate(loaded, request))
            row.seconds.append(time.perf_counter() - started)
            row.ratios.append(rows[0].seconds[-1] / row.seconds[-1])
            row.calls = result.unet_calls
            drawn[row.name].append(result.image)
            latents = _encode(loaded, result.image)
            full = full or (result.image, latents)
            row.psnr.append(compute_psnr(result.image, full[0]))
            row.latents.append(float((latents - full[1]).norm() / full[1].norm()))
    for row in rows:
        row.score = score_pictures(prompts, drawn[row.name])["all"] if model == ROOT / "demo/model" else None
        for prompt, image in zip(prompts, drawn[row.name] if images else (), strict=False):
            image.save(f"{images}/{row.name.replace(':', '')} {prompt.seed}.png")
    return rows


def compute_psnr(one: Any, other: Any) -> float:
    """Return the distance of two images in dB. It is infinite for equal ones."""
    error = float(((np.asarray(one, dtype=float) - np.asarray(other, dtype=float)) ** 2).mean())
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def _encode(loaded: Any, image: Any) -> Any:
    """Return the latents of an image."""
    import torch
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img import retrieve_latents

    pixels = loaded.pipeline.image_processor.preprocess(image)
    with torch.no_grad():
        return retrieve_latents(build_vae(loaded).encode(pixels), sample_mode="argmax").float()


def format_plans(rows: Sequence[PlanRow]) -> list[dict[str, str]]:
    """Return the cells of a table. The 5th percentile is what 19 of 20 images reach."""
    return [
        {
            "plan": row.name,
            "UNet calls": f"{row.calls:g}",
            "s an image: median (least–most)": format_spread(row.seconds),
            "× full, of pairs": format_spread(row.ratios),
            "PSNR, mean dB": f"{statistics.fmean(row.psnr):.1f}",
            "PSNR, 5th percentile": f"{np.percentile(row.psnr, 5, method='lower'):.1f}",
            "latents apart": f"{statistics.fmean(row.latents):.3f}",
            "drawn right": format_number(row.score, ".1%"),
        }
        for row in rows
    ]
