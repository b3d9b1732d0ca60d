"""Other libraries for the same images: optimum-intel, openvino-genai and stable-diffusion.cpp, by their documentation.

They need an environment of their own; `make peers` makes it. The first two run the model that optimum-intel exports.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.worker import Job
from demo.measure import GUIDANCE, Prompt

Draw = Callable[[Prompt], Any]
Describe = Callable[[], dict[str, Any]]


def load_peer(job: Job) -> tuple[Draw, Describe]:
    """Load the model for one size. Return a function that draws and one that describes what ran."""
    peer = job.configuration.peer or {}
    return _load_sdcpp(job, peer) if peer["library"] == "sdcpp" else _load_openvino(job, peer)


def _load_openvino(job: Job, peer: Mapping[str, Any]) -> tuple[Draw, Describe]:
    """Load the exported model. Export it first if it is missing."""
    cache = Path(job.cache)
    folder, compiled = cache / "model", str(cache / "compiled")
    precision = job.configuration.arithmetic
    properties = {"INFERENCE_PRECISION_HINT": precision, "CACHE_DIR": compiled, **peer.get("config", {})}
    is_kept = folder.exists()
    if not is_kept:
        _export(job.model, peer["weight_format"], folder)
    draw = {"optimum": _load_optimum, "genai": _load_genai}[peer["library"]](job, folder, properties)
    return draw, lambda: {"ran": f"OpenVINO in {precision}, as requested", "from_cache": is_kept}


def _export(model: str, weight_format: str, folder: Path) -> None:
    """Export the model with optimum-intel, in a process whose memory is no part of the record."""
    partial = folder.with_suffix(".incomplete")
    program = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino"]
    words = ["--task", "text-to-image", "--model", model, "--weight-format", weight_format, str(partial)]
    subprocess.run([*program, *words], env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True)
    partial.rename(folder)  # a folder of this name is complete


def _load_optimum(job: Job, folder: Path, properties: dict[str, Any]) -> Draw:
    import torch
    from optimum.intel import OVStableDiffusionXLPipeline

    pipeline = OVStableDiffusionXLPipeline.from_pretrained(folder, ov_config=properties, compile=False)
    pipeline.reshape(batch_size=1, height=job.size, width=job.size, num_images_per_prompt=1)
    pipeline.compile()
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompt: Prompt) -> Any:
        generator = torch.Generator().manual_seed(prompt.seed)
        return pipeline(prompt.text, generator=generator, **_list_arguments(job)).images[0]

    return draw


def _load_genai(job: Job, folder: Path, properties: dict[str, Any]) -> Draw:
    import openvino_genai
    from PIL import Image

    pipeline = openvino_genai.Text2ImagePipeline(str(folder))
    pipeline.reshape(1, job.size, job.size, GUIDANCE)
    pipeline.compile("CPU", **properties)

    def draw(prompt: Prompt) -> Any:
        generator = openvino_genai.TorchGenerator(prompt.seed)
        return Image.fromarray(pipeline.generate(prompt.text, generator=generator, **_list_arguments(job)).data[0])

    return draw


def _list_arguments(job: Job) -> dict[str, Any]:
    size = {"height": job.size, "width": job.size}
    return {"num_inference_steps": job.steps, "guidance_scale": GUIDANCE, **size}


def _load_sdcpp(job: Job, peer: Mapping[str, Any]) -> tuple[Draw, Describe]:
    """Load the folder. stable-diffusion.cpp converts the names and types of weights at each start."""
    from stable_diffusion_cpp import StableDiffusion

    # Version 0.4.7 mistakes a folder with both text encoders for Stable Diffusion 1, so one is named separately.
    model, folder, seconds = Path(job.model), Path(job.cache) / "model", list[float]()
    folder.mkdir(exist_ok=True)
    for part in ("unet", "vae", "text_encoder"):
        (folder / part).unlink(missing_ok=True)
        (folder / part).symlink_to(model / part)
    pipeline = StableDiffusion(
        model_path=str(folder),
        clip_g_path=str(model / "text_encoder_2/model.safetensors"),
        wtype=peer["weight_format"],
        n_threads=len(os.sched_getaffinity(0)),
        vae_decode_only=True,
        verbose=False,
        **peer.get("config", {}),
    )

    def draw(prompt: Prompt) -> Any:
        (image,) = pipeline.generate_image(
            prompt=prompt.text,
            width=job.size,
            height=job.size,
            cfg_scale=GUIDANCE,
            sample_method="euler",
            scheduler="discrete",
            sample_steps=job.steps,
            seed=prompt.seed,
            progress_callback=lambda step, _, passed: seconds.append(passed) if step else None,
        )
        return image.convert("RGB")  # from RGBA

    def describe() -> dict[str, Any]:
        step = f"{statistics.median(seconds):.2f} s a step by its own clock"
        ran = f"stable-diffusion.cpp, weights in {peer['weight_format']}, {step}"
        return {"ran": ran, "error": None}  # its noise differs from torch's

    return draw, describe
