"""Judge what leaves out calls of the UNet: how near the full picture it comes, beside plain fewer steps."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from demo.measure import Prompt, choose_prompts, save_sheet, score_pictures
from sdxl_server.diffusion.stand_ins import fork_vae
from sdxl_server.sampling.few_steps import FEW_STEPS
from tools.server import ROOT

Fields = Mapping[str, Any]
DEMO = ROOT / "demo/model"
INTERVAL = [0.2, 0.8]
SHEET = 8  # prompts shown
SAMPLERS = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")


@dataclass(frozen=True)
class Row:
    """What came of one way to draw all prompts.

    Attributes:
        calls: of the UNet for a picture.
        seconds: for a picture, the median.
        psnr, low: in dB to the full picture: the mean, and what 19 of 20 pictures reach.
        latents: how far the VAE's latents of the pictures are from those of the full ones, as a share; the mean.
        score: share of prompts drawn right, where the model has an oracle.
    """

    name: str
    calls: float
    seconds: float
    psnr: float
    low: float
    latents: float
    score: float | None

    def write(self) -> str:
        """Return its line of a Markdown table."""
        score = "" if self.score is None else f"{self.score:.1%}"
        distance = " | | " if self.psnr == np.inf else f"{self.psnr:.1f} | {self.low:.1f} | {self.latents:.3f}"
        return f"| {self.name} | {self.calls:g} | {self.seconds:.2f} | {distance} | {score} |"


def list_ways(steps: int, calls: Sequence[int]) -> dict[str, Fields]:
    """Return by their names the ways to draw, the full one first, each as fields of a request."""
    ways: dict[str, Fields] = {"full": {"num_inference_steps": steps}}
    for count in calls:
        ways[f"{count} plain steps"] = {"num_inference_steps": count}
        for name in SAMPLERS:
            ways[f"{count} plain steps, {name}"] = {"num_inference_steps": count, "scheduler": name}
        ways[f"unet_calls: {count}"] = {"num_inference_steps": steps, "unet_calls": count}
    interval = {"num_inference_steps": steps, "guidance_interval": INTERVAL}
    ways[f"guidance_interval: {INTERVAL}"] = interval
    ways[f"both, unet_calls: {calls[0]}"] = {**interval, "unet_calls": calls[0]}
    ways[f"{FEW_STEPS} steps without guidance"] = {"num_inference_steps": FEW_STEPS, "guidance_scale": 0}
    return ways


def judge_ways(
    model: Path, ways: Mapping[str, Fields], *, settings: Mapping[str, Any], pt2: Any, count: int, output: Path
) -> list[Row]:
    """Draw all prompts in each way; write the table after each, and a sheet of pictures.

    Args:
        ways: as `list_ways` has them; distances are to the first.
        settings: of the handler section.
        pt2: as model-config.yaml has it.
        count: of prompts.
    """
    from sdxl_server.config.settings import CompileConfig, HandlerConfig
    from sdxl_server.loading import load_pipeline

    config = HandlerConfig.parse({"model_path": model.name, **settings})
    loaded = load_pipeline(config, CompileConfig.parse(pt2), model_dir=model.parent)
    prompts, rows = choose_prompts(count), list[Row]()
    title = f"{model.name}, {count} prompts, {settings}, pt2: {pt2}"
    reference: list[tuple[Any, Any]] = []
    for name, fields in (bar := tqdm(ways.items(), disable=None)):
        bar.set_postfix_str(name)
        pictures, seconds, made = _draw_prompts(loaded, prompts, fields)
        drawn = [(picture, _encode(loaded, picture)) for picture in pictures]
        reference = reference or drawn
        pairs = list(zip(drawn, reference, strict=True))
        distances = [measure_psnr(one, other) for (one, _), (other, _) in pairs]
        latents = statistics.fmean(float((one - other).norm() / other.norm()) for (_, one), (_, other) in pairs)
        score = score_pictures(prompts, pictures)["all"] if model == DEMO else None
        low = float(np.percentile(distances, 5, method="lower"))
        rows.append(Row(name, made, statistics.median(seconds), statistics.fmean(distances), low, latents, score))
        _write_table(output / "shortcuts.md", rows, title=title)
        save_sheet(output / f"{name.replace(':', '')}.jpg", prompts[:SHEET], pictures[:SHEET])
    return rows


def _draw_prompts(loaded: Any, prompts: Sequence[Prompt], fields: Fields) -> tuple[list[Any], list[float], float]:
    """Return the pictures, the seconds that each took, and the calls of the UNet for one."""
    from sdxl_server.diffusion.generation import finish, generate

    pictures, seconds, calls = [], [], 0.0
    for prompt in prompts:
        request = loaded.contract.check({"prompt": prompt.text, "seed": prompt.seed, **fields})
        start = time.perf_counter()
        (picture,) = finish(generate(loaded, request))
        seconds.append(time.perf_counter() - start)
        pictures.append(picture.image)
        calls = picture.unet_calls
    return pictures, seconds, calls


def measure_psnr(one: Any, other: Any) -> float:
    """Return the distance of two pictures in dB, infinite where they are equal."""
    apart = np.asarray(one, dtype=float) - np.asarray(other, dtype=float)
    error = float((apart**2).mean())
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def _encode(loaded: Any, picture: Any) -> Any:
    """Return the latents of a picture."""
    import torch
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img import retrieve_latents

    pixels = loaded.pipeline.image_processor.preprocess(picture)
    with torch.no_grad():
        return retrieve_latents(fork_vae(loaded).encode(pixels), sample_mode="argmax").float()


def _write_table(path: Path, rows: Sequence[Row], *, title: str) -> None:
    head = "| way | UNet calls | s a picture | PSNR, mean dB | PSNR, 5th percentile | latents apart | drawn right |"
    lines = [title, "", head, "|---|---|---|---|---|---|---|", *(row.write() for row in rows)]
    path.write_text("\n".join(lines) + "\n")
