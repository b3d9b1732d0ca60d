"""Inpainting models of nine channels: drawn as diffusers draws them, and good for nothing else."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_server.api.openai import OpenAIApi, OpenAIEditApi
from sdxl_server.diffusion.generation import generate
from sdxl_server.diffusion.previews import draw_preview
from sdxl_server.errors import RequestError
from sdxl_server.model.compiling import VAE_ENCODER
from sdxl_server.model.describe import describe_pipeline
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.request.masks import cover_cells, keep_protected
from tests.unit.pipelines import encode, load, make_picture
from tools.random_model import make_pipeline, save_pipeline

SIDE = 128
PHOTO = Image.effect_noise((SIDE, SIDE), 90).convert("RGB")
MASK = Image.new("L", (SIDE, SIDE), 0)
MASK.paste(255, (37, 13, 101, 115))  # on no edge of a latent
INSIDE = (slice(20, 108), slice(44, 94))  # where no seam is blended
FIELDS = {"image": encode(PHOTO), "mask_image": encode(MASK)}


def make_folder(size: str, folder: Path) -> Path:
    """Write a small inpainting pipeline of random weights as diffusers writes one."""
    import diffusers

    pipeline = make_pipeline(size)
    torch.manual_seed(1)
    pipeline.register_modules(unet=type(pipeline.unet).from_config(pipeline.unet.config, in_channels=9))
    kind = getattr(diffusers, type(pipeline).__name__.replace("Pipeline", "InpaintPipeline"))
    more = {} if size == "tiny" else {"requires_safety_checker": False}
    save_pipeline(kind(**pipeline.components, **more), folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("tiny", tmp_path_factory.mktemp("models") / "inpainting")


@pytest.fixture(scope="module")
def eager(folder: Path) -> LoadedPipeline:
    return load(folder)


def draw_by_diffusers(folder: Path, **arguments: Any) -> np.ndarray[Any, Any]:
    """Return the picture of diffusers' own pipeline, before what the mask protects is laid over it."""
    import diffusers

    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline).__name__.endswith("InpaintPipeline")
    pipeline.set_progress_bar_config(disable=True)
    given = {
        **{"prompt": "a red fox", "image": PHOTO, "mask_image": cover_cells(MASK, 8), "width": SIDE, "height": SIDE},
        **{"num_inference_steps": 4, "guidance_scale": 5.0, "strength": 1.0, **arguments},
    }
    picture = pipeline(generator=torch.Generator().manual_seed(1), **given).images[0]
    return np.asarray(picture).astype(int)


@pytest.fixture(scope="module")
def compiled(folder: Path) -> LoadedPipeline:
    return load(folder, "openvino", warm_up=True, graphs="static", compile_text_encoders=False)


@pytest.mark.parametrize("fields", [{}, {"strength": 0.6, "guidance_scale": 1.0}])
def test_draws_what_diffusers_draws(
    folder: Path, eager: LoadedPipeline, compiled: LoadedPipeline, fields: dict[str, Any]
) -> None:
    before = describe_pipeline(compiled)
    assert len(before["openvino"][VAE_ENCODER]) == 1  # no request does without it
    expected = draw_by_diffusers(folder, **fields)[INSIDE]
    assert np.array_equal(make_picture(eager, **FIELDS, **fields)[INSIDE], expected)
    assert np.abs(make_picture(compiled, **FIELDS, **fields)[INSIDE] - expected).max() <= 1  # the last bit is rounded
    assert describe_pipeline(compiled) == before


def test_stable_diffusion_1_too(tmp_path: Path) -> None:
    folder = make_folder("tiny-sd", tmp_path / "model")
    assert np.array_equal(make_picture(load(folder), **FIELDS)[INSIDE], draw_by_diffusers(folder)[INSIDE])


def test_what_the_mask_protects_is_kept_and_shows_the_model_its_surroundings(eager: LoadedPipeline) -> None:
    drawn, given, is_protected = make_picture(eager, **FIELDS), np.asarray(PHOTO), np.asarray(MASK) == 0
    assert np.array_equal(drawn[is_protected], given[is_protected])
    request = eager.contract.check({"prompt": "a red fox", "seed": 1, **FIELDS})
    preview = keep_protected(draw_preview(eager, next(generate(eager, request))), request)
    assert np.array_equal(np.asarray(preview)[is_protected], given[is_protected])
    other = make_picture(eager, **{**FIELDS, "image": encode(Image.new("RGB", (SIDE, SIDE), "red"))})
    assert np.abs(other - drawn)[INSIDE].mean() > 0.2  # at strength 1 nothing but the nine channels tells it


@pytest.mark.parametrize("given", [(), ("image",), ("mask_image",)])
def test_a_request_for_anything_else_is_refused(eager: LoadedPipeline, given: tuple[str, ...]) -> None:
    with pytest.raises(RequestError) as caught:
        eager.contract.check({"prompt": "a fox", **{name: FIELDS[name] for name in given}})
    missing = "mask_image" if "image" in given else "image"
    assert caught.value.param == missing
    assert str(caught.value) == f"{missing} is missing: this is an inpainting model; send image and mask_image"
    assert eager.contract.build_schema()["required"] == ["prompt", "image", "mask_image"]


def test_openais_edits_take_the_images_own_transparency(eager: LoadedPipeline) -> None:
    image = PHOTO.copy()
    image.putalpha(Image.eval(MASK, lambda value: 255 - value))

    def read(api: OpenAIApi, **fields: Any) -> Any:
        call = {"body": json.dumps({"prompt": "a red fox", **fields}).encode()}
        return api.read(call, content_type="application/json", contract=eager.contract)[0]

    assert read(OpenAIEditApi(), image=encode(image)).mask_image.tobytes() == MASK.tobytes()
    with pytest.raises(RequestError, match="image is missing: this is an inpainting model"):
        read(OpenAIApi())
