"""What one would take instead of this project: optimum-intel and openvino-genai, each as its documentation has it.

Both need an environment of their own, which `make peers` makes, and the model as optimum-intel exports it.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import Describe, Job
from demo.measure import GUIDANCE, Prompt

Draw = Callable[[Prompt], Any]


def load(job: Job) -> tuple[Draw, Describe]:
    """Export the model unless that has been done, and load it for pictures of one size; see pictures.load."""
    peer, cache = job.configuration.peer or {}, Path(job.cache)
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
