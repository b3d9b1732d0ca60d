"""Whole pictures under one configuration in a process of its own: `python -m benchmarks.pictures JOB` prints a record.

The prompts are those of the demonstration model, which alone can be told whether it drew what they ask for.
"""

import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import peers
from benchmarks.machine import read_peak_memory
from benchmarks.measure import Describe, Job, compare, describe, run, settle_compilation, time_call
from demo.measure import GUIDANCE, Prompt, choose_prompts, score_pictures
from tools.server import ROOT

Draw = Callable[[Prompt], Image.Image]

_SHOWN = 4  # pictures of the sheet
_QUALITY = 95


def measure(job: Job) -> dict[str, Any]:
    """Load the pipeline and draw; return the times in seconds, what ran, and the share of prompts drawn right.

    `first` is from nothing loaded to the first picture. A picture's time includes its JPEG.
    """
    prompts, started = choose_prompts(job.steps), time.perf_counter()
    draw, tell = (load if job.configuration.peer is None else peers.load)(job)
    encode(draw(prompts[0]))
    first, pictures, steps, encoding = time.perf_counter() - started, [], [], []
    for prompt in prompts:
        picture, seconds = time_call(lambda prompt=prompt: draw(prompt))  # type: ignore[misc]
        _, more = time_call(lambda picture=picture: encode(picture))  # type: ignore[misc]
        pictures.append(picture)
        steps.append(round(seconds + more, 4))
        encoding.append(more)
    save_sheet(Path(job.sheet), pictures[:_SHOWN])
    record = {"first": round(first, 2), "steps": steps, "peak_gigabytes": read_peak_memory(), **tell()}
    record["ran"] += f"; JPEG {1000 * statistics.median(encoding):.1f} ms"
    if Path(job.model) == ROOT / "demo/model":
        record["score"] = score_pictures(prompts, pictures)["all"]
    if "error" in record:  # told already
        return record
    return record | compare([torch.from_numpy(np.array(each)) for each in pictures], Path(job.reference))


def load(job: Job) -> tuple[Draw, Describe]:
    """Load the model as the server does; return what draws, and what tells what ran."""
    from sdxl_server.config.settings import HandlerConfig
    from sdxl_server.diffusion.generation import finish, generate
    from sdxl_server.loading import load_pipeline

    configuration = job.configuration
    settings = {"model_path": job.model, "dtype": configuration.weights, "width": job.size, "height": job.size}
    compilation = settle_compilation(configuration, Path(job.cache))
    config = HandlerConfig.parse(settings)
    loaded = load_pipeline(config, compilation, model_dir=Path(job.model))

    def draw(prompt: Prompt) -> Image.Image:
        fields = {"prompt": prompt.text, "seed": prompt.seed, "guidance_scale": GUIDANCE}
        request = loaded.contract.check({**fields, "num_inference_steps": job.num_inference_steps})
        picture: Image.Image = finish(generate(loaded, request))[0].image
        return picture

    backends = [backend for backend in loaded.parts.values() if backend and backend.reports]
    return draw, lambda: describe(compilation, loaded.dtype, backends)


def encode(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "jpeg", quality=_QUALITY)
    return buffer.getvalue()


def save_sheet(path: Path, pictures: list[Image.Image]) -> None:
    """Write pictures side by side."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", (width * len(pictures), height))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i * width, 0))
    sheet.save(path, quality=90)


if __name__ == "__main__":
    run(measure)
