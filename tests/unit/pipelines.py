"""Small pipelines that the tests share, and what they draw."""

import base64
import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdxl_server.config.compile_settings import CompileConfig
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.diffusion.generation import generate, run_to_end
from sdxl_server.loading import load_pipeline
from sdxl_server.model.compiling import VAE_ENCODER
from sdxl_server.model.describe import describe_pipeline
from sdxl_server.model.loaded_pipeline import LoadedPipeline

EAGER = HandlerConfig(dtype="float32", num_inference_steps=4, warm_up=False)

UNET_ONLY = {"compile_vae": False, "compile_text_encoders": False}

PARTS = ["unet", "vae", VAE_ENCODER, "text_encoder", "text_encoder_2"]


def load(folder: Path, pt2: Any = None, **settings: Any) -> LoadedPipeline:
    """Load a pipeline; OpenVINO takes its models from the cache of the run, see conftest.py."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config, compilation = dataclasses.replace(EAGER, **settings), CompileConfig.parse(pt2)
    if compilation.backend == "openvino":
        compilation = dataclasses.replace(compilation, options={"model_caching": True, **(compilation.options or {})})
    return load_pipeline(dataclasses.replace(config, model_path=folder.name), compilation, model_dir=folder.parent)


def make_pictures(loaded: LoadedPipeline, **fields: Any) -> np.ndarray[Any, Any]:
    """Return the pictures of a request: count, height, width, colours, from 0 to 255."""
    request = loaded.contract.check({"prompt": "a red fox", "seed": 1, **fields})
    return np.stack([np.asarray(each.image) for each in run_to_end(generate(loaded, request))]).astype(int)


def make_picture(loaded: LoadedPipeline, **fields: Any) -> np.ndarray[Any, Any]:
    (picture,) = make_pictures(loaded, **fields)
    return picture


def encode(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def count_graphs(loaded: LoadedPipeline) -> list[int]:
    return [len(describe_pipeline(loaded)["openvino"][part]) for part in PARTS]
