"""Whole images under one configuration, from a prompt to a JPEG.

The demonstration model has the prompts, and an oracle that judges whether an image shows its prompt.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.peers import load_peer
from benchmarks.worker import Engine, Job, compute_error
from demo.measure import GUIDANCE, Prompt, choose_prompts, score_pictures
from tools.server import ROOT

PROMPTS = 16  # calls of higher numbers use them again
_QUALITY = 95


def load_images(job: Job) -> Engine:
    """Load the pipeline or its peer."""
    draw, describe = (_load_pipeline if job.configuration.peer is None else load_peer)(job)
    prompts = choose_prompts(PROMPTS)

    def call(number: int) -> Image.Image:
        image = draw(prompts[number % PROMPTS])
        image.save(io.BytesIO(), "jpeg", quality=_QUALITY)
        return image

    def judge(images: list[Any]) -> dict[str, Any]:
        for number, image in enumerate(images if job.images else ()):
            image.save(Path(job.images, f"{job.configuration.name} {number}.png"))
        figures = compute_error([torch.from_numpy(np.array(each)) for each in images], Path(job.reference))
        if Path(job.model) == ROOT / "demo/model":
            figures["score"] = score_pictures(prompts[: len(images)], images)["all"]
        return figures

    return Engine(call, describe, judge)


def _load_pipeline(job: Job) -> tuple[Callable[[Prompt], Image.Image], Callable[[], dict[str, Any]]]:
    """Load the model as the server does. Return a function that draws and one that describes what ran."""
    from benchmarks.engines import complete_compilation, describe_engine
    from sdxl_server.config.settings import HandlerConfig
    from sdxl_server.diffusion.generation import generate, run_to_end
    from sdxl_server.loading import load_pipeline

    compilation = complete_compilation(job.configuration, Path(job.cache))
    size = {"width": job.size, "height": job.size}
    config = HandlerConfig.parse({"model_path": job.model, "dtype": job.configuration.weights, **size})
    loaded = load_pipeline(config, compilation, model_dir=Path(job.model))

    def draw(prompt: Prompt) -> Image.Image:
        fields = {"prompt": prompt.text, "seed": prompt.seed, "guidance_scale": GUIDANCE}
        request = loaded.contract.check({**fields, "num_inference_steps": job.steps})
        image: Image.Image = run_to_end(generate(loaded, request))[0].image
        return image

    backends = [backend for backend in loaded.parts.values() if backend and backend.reports]
    return draw, lambda: describe_engine(compilation, loaded.dtype, backends)
