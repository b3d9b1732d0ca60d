"""Images to start from, and masks."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from sdxl_server.api.warnings import list_warnings
from sdxl_server.diffusion.generation import generate
from sdxl_server.diffusion.previews import draw_preview
from sdxl_server.model.compiling import VAE_ENCODER
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.request.masks import keep_protected
from tests.unit.pipelines import encode, load, make_picture
from tools.server import ROOT


@pytest.fixture(scope="module")
def demo() -> LoadedPipeline:
    """The project's own model, whose VAE has learnt pictures, with exact previews."""
    return load(ROOT / "demo/model", preview="exact")


@pytest.mark.parametrize("name", ["eager", "compiled", "float16"])
def test_pictures_from_pictures(request: pytest.FixtureRequest, tiny_model: Path, name: str) -> None:
    loaded = load(tiny_model, dtype=name) if name == "float16" else request.getfixturevalue(name)
    dtypes = (loaded.pipeline.vae.dtype, loaded.pipeline.unet.dtype)
    red, blue = (encode(Image.new("RGB", (128, 128), colour)) for colour in ("red", "blue"))
    apart = [
        np.abs(np.subtract(*(make_picture(loaded, image=each, strength=strength) for each in (red, blue)))).mean()
        for strength in (0.5, 1.0)
    ]
    assert apart[0] > 2 * apart[1]  # the further it goes, the less is left of the image
    fields = {"image": red}
    mask = Image.new("L", (128, 128), 0)
    mask.paste(255, (64, 0, 128, 128))
    kept = make_picture(loaded, mask_image=encode(mask), **fields)
    whole = make_picture(loaded, mask_image=encode(Image.new("L", (128, 128), 255)), **fields)
    assert np.abs(kept - whole)[:, :32].mean() > 1  # where the mask is black the image shows through
    assert (loaded.pipeline.vae.dtype, loaded.pipeline.unet.dtype) == dtypes  # diffusers did not convert them
    if name == "compiled":
        assert len(loaded.parts[VAE_ENCODER].reports) == 1


@pytest.mark.parametrize("kind", ["rectangle", "stroke", "soft"])
def test_what_a_mask_protects_is_kept_bit_by_bit(demo: LoadedPipeline, kind: str) -> None:
    photo = Image.effect_noise((128, 128), 90).convert("RGB")
    mask = Image.new("L", (128, 128), 0)
    box = (61, 13, 63, 115) if kind == "stroke" else (37, 13, 101, 115)
    mask.paste(255, box)
    if kind == "soft":
        mask = mask.filter(ImageFilter.GaussianBlur(4))
    fields = {"image": encode(photo), "mask_image": encode(mask), "num_inference_steps": 2}
    drawn, given = make_picture(demo, **fields), np.asarray(photo)
    is_protected = np.asarray(mask) < 128
    assert np.array_equal(drawn[is_protected], given[is_protected])
    assert (drawn != given).any(axis=-1)[~is_protected].mean() > 0.9  # thin strokes and the seam are painted too
    other = make_picture(demo, **fields, prompt="a blue square", seed=2)
    assert np.abs(other - drawn)[~is_protected].mean() > 20  # anew, not decoded anew
    request = demo.contract.check({"prompt": "a red fox", "seed": 1, **fields})
    preview = keep_protected(draw_preview(demo, next(generate(demo, request))), request)
    assert np.array_equal(np.asarray(preview)[is_protected], given[is_protected])


@pytest.mark.parametrize(("value", "told"), [(0, "the mask protects everything"), (255, "the mask protects nothing")])
def test_masks_that_mean_little_are_told(eager: LoadedPipeline, value: int, told: str) -> None:
    image, mask = encode(Image.new("RGB", (128, 128))), encode(Image.new("L", (128, 128), value))
    request = eager.contract.check({"prompt": "x", "image": image, "mask_image": mask})
    (warning,) = list_warnings(eager, request)
    assert warning.startswith(told)


def test_image_sets_the_size(eager: LoadedPipeline) -> None:
    image = encode(Image.new("RGB", (75, 130), "red"))
    assert make_picture(eager, image=image).shape == (160, 96, 3)
    assert make_picture(eager, image=image, width=64, height=64).shape == (64, 64, 3)
