"""What one would take instead of this project: optimum-intel, openvino-genai and stable-diffusion.cpp, as documented.

They need an environment of their own, which `make peers` makes; the first two take what optimum-intel exports.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import Describe, Job
from demo.measure import GUIDANCE, Prompt

Draw = Callable[[Prompt], Any]


def load(job: Job) -> tuple[Draw, Describe]:
    """Load the model for pictures of one size; see pictures.load."""
    peer = job.configuration.peer or {}
    return _load_sdcpp(job, peer) if peer["library"] == "sdcpp" else _load_openvino(job, peer)


def _load_openvino(job: Job, peer: Mapping[str, Any]) -> tuple[Draw, Describe]:
    """Export the model unless that has been done, and load what it was exported to."""
    cache = Path(job.cache)
    folder, compiled = cache / "model", str(cache / "compiled")
    precision = job.configuration.arithmetic
    properties = {"INFERENCE_PRECISION_HINT": precision, "CACHE_DIR": compiled, **peer.get("config", {})}
    is_kept = folder.exists()
    if not is_kept:
        export(Path(job.model), peer["weight_format"], folder)
    draw = {"optimum": _load_optimum, "genai": _load_genai}[peer["library"]](job, folder, properties)
    return draw, lambda: {"ran": f"OpenVINO in {precision}, as asked for", "from_cache": is_kept}


def export(model: Path, weight_format: str, folder: Path) -> None:
    """Write the model as optimum-intel does; the folder is there only when all of it is.

    It runs in a process of its own, whose memory the record leaves out.
    """
    partial = folder.with_suffix(".incomplete")
    program = str(Path(sys.executable).with_name("optimum-cli"))
    words = ["--task", "text-to-image", "--model", str(model), "--weight-format", weight_format, str(partial)]
    # Its messages would stand where the record is expected.
    done = subprocess.run(
        [program, "export", "openvino", *words],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=sys.stderr,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"optimum-cli export ended with {done.returncode}")
    partial.rename(folder)


def _load_optimum(job: Job, folder: Path, properties: dict[str, Any]) -> Draw:
    import torch
    from optimum.intel import OVStableDiffusionXLPipeline

    pipeline = OVStableDiffusionXLPipeline.from_pretrained(folder, ov_config=properties, compile=False)
    pipeline.reshape(batch_size=1, height=job.size, width=job.size, num_images_per_prompt=1)
    pipeline.compile()
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompt: Prompt) -> Any:
        return pipeline(
            prompt.text,
            num_inference_steps=job.num_inference_steps,
            guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(prompt.seed),
            height=job.size,
            width=job.size,
        ).images[0]

    return draw


def _load_genai(job: Job, folder: Path, properties: dict[str, Any]) -> Draw:
    import openvino_genai
    from PIL import Image

    pipeline = openvino_genai.Text2ImagePipeline(str(folder))
    pipeline.reshape(1, job.size, job.size, GUIDANCE)
    pipeline.compile("CPU", **properties)

    def draw(prompt: Prompt) -> Any:
        tensor = pipeline.generate(
            prompt.text,
            num_inference_steps=job.num_inference_steps,
            guidance_scale=GUIDANCE,
            generator=openvino_genai.TorchGenerator(prompt.seed),
            height=job.size,
            width=job.size,
        )
        return Image.fromarray(tensor.data[0])

    return draw


def _load_sdcpp(job: Job, peer: Mapping[str, Any]) -> tuple[Draw, Describe]:
    """Load the folder as it is: stable-diffusion.cpp converts the weights' names and types at each start."""
    from stable_diffusion_cpp import StableDiffusion

    # A folder with both text encoders it takes for Stable Diffusion 1 (0.4.7), so that one of them is named by itself.
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
        verbose=False,  # the record is expected on stdout
        **peer.get("config", {}),
    )

    def draw(prompt: Prompt) -> Any:
        (picture,) = pipeline.generate_image(
            prompt=prompt.text,
            width=job.size,
            height=job.size,
            cfg_scale=GUIDANCE,
            sample_method="euler",
            scheduler="discrete",
            sample_steps=job.num_inference_steps,
            seed=prompt.seed,
            progress_callback=lambda step, _, passed: seconds.append(passed) if step else None,
        )
        return picture.convert("RGB")  # from RGBA

    def tell() -> dict[str, Any]:
        told = f"{statistics.median(seconds):.2f} s a step by its own clock"
        ran = f"stable-diffusion.cpp, weights in {peer['weight_format']}, {told}"
        return {"ran": ran, "from_cache": False, "error": None}  # its noise is other than torch's

    return draw, tell
