"""VAEs from their own folder: each has its own scaling, and the tiny one is reported as lossy."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_server.api.image_metadata import describe_image
from sdxl_server.diffusion.generation import generate
from sdxl_server.diffusion.previews import draw_preview
from sdxl_server.errors import ConfigError
from sdxl_server.model.describe import describe_pipeline
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.model.vaes import is_tiny_vae
from sdxl_server.request.masks import cover_cells
from tests.unit.pipelines import encode, load, make_picture

SIDE = 128
PHOTO = Image.effect_noise((SIDE, SIDE), 90).convert("RGB")
MASK = Image.new("L", (SIDE, SIDE), 255)  # protects nothing, so that nothing is laid over what was drawn
FIELDS: dict[str, dict[str, Any]] = {
    "from text": {},
    "from a picture": {"image": encode(PHOTO), "strength": 0.6},
    "inpainting": {"image": encode(PHOTO), "mask_image": encode(MASK), "strength": 0.8},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny VAE with random weights. Its scaling differs from 1, so that a missing scaling shows."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    counts = {"num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}
    path = tmp_path_factory.mktemp("vaes") / "tiny"
    AutoencoderTiny(**blocks, **counts, scaling_factor=0.5).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def eager(tiny_model: Path, folder: Path) -> LoadedPipeline:
    return load(tiny_model, vae_path=str(folder))


@pytest.fixture(scope="module")
def compiled(tiny_model: Path, folder: Path) -> LoadedPipeline:
    only_vae = {"compile_unet": False, "compile_text_encoders": False}
    return load(tiny_model, "openvino", vae_path=str(folder), warm_up=True, **only_vae)


def draw_by_diffusers(model: Path, vae: Path, fields: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Return the image of diffusers' own pipeline with a tiny VAE."""
    import diffusers

    kind = "Inpaint" if "mask_image" in fields else "Img2Img" if fields else ""
    pipeline = getattr(diffusers, f"StableDiffusionXL{kind}Pipeline").from_pretrained(
        model, vae=diffusers.AutoencoderTiny.from_pretrained(vae)
    )
    pipeline.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0}
    if fields:
        given |= {"image": PHOTO, "strength": fields["strength"]}
    if "mask_image" in fields:
        given["mask_image"] = cover_cells(MASK, 8)
    generator = torch.Generator().manual_seed(1)
    return np.asarray(pipeline("a red fox", generator=generator, **given).images[0]).astype(int)


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_tiny_vae_draws_what_diffusers_draws(
    tiny_model: Path, folder: Path, eager: LoadedPipeline, compiled: LoadedPipeline, fields: dict[str, Any]
) -> None:
    expected = draw_by_diffusers(tiny_model, folder, fields)
    assert expected.std() > 1
    assert np.array_equal(make_picture(eager, **fields), expected)
    assert np.abs(make_picture(compiled, **fields) - expected).max() <= 1  # the last bit is rounded
    assert len(describe_pipeline(compiled)["openvino"]["vae"]) == 1


def test_exact_preview_has_the_tiny_vaes_scaling(tiny_model: Path, folder: Path) -> None:
    eager = load(tiny_model, vae_path=str(folder), preview="exact")
    progress = next(generate(eager, eager.contract.check({"prompt": "a red fox", "seed": 1})))
    vae = eager.pipeline.vae
    assert progress.denoiser is not None
    with torch.no_grad():
        pixels = vae.decode(progress.denoiser.predict() / 0.5, return_dict=False)[0]
    expected = eager.pipeline.image_processor.postprocess(pixels)[0]
    assert np.array_equal(np.asarray(draw_preview(eager, progress)), np.asarray(expected))


def test_lossy_vae_is_reported(tiny_model: Path, folder: Path, eager: LoadedPipeline, tmp_path: Path) -> None:
    told = {"class": "AutoencoderTiny", "path": str(folder), "lossy": True, "tile_side": None}
    assert describe_pipeline(eager)["vae"] == told
    request = eager.contract.check({"prompt": "x"})
    assert describe_image(eager, request, 0, unet_calls=4)["made_with"]["vae"] == told
    own = shutil.copytree(tiny_model, tmp_path / "model")
    shutil.rmtree(own / "vae")
    shutil.copytree(folder, own / "vae")
    index = json.loads((own / "model_index.json").read_text())
    (own / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderTiny"]}))
    loaded = load(own)
    assert describe_pipeline(loaded)["vae"] == {**told, "path": None}
    assert np.array_equal(make_picture(loaded), make_picture(eager))
    assert loaded.weights_sha256 == eager.weights_sha256


def test_full_vae_takes_the_place_of_the_models_own(tiny_model: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tiny_model / "vae")
    with torch.no_grad():
        vae.decoder.conv_out.bias += 1
    vae.save_pretrained(tmp_path / "other", variant="fp16")
    plain, loaded = load(tiny_model), load(tiny_model, vae_path=str(tmp_path / "other"))
    told = {"class": "AutoencoderKL", "lossy": False, "tile_side": None}
    assert describe_pipeline(loaded)["vae"] == {**told, "path": str(tmp_path / "other")}
    assert describe_pipeline(plain)["vae"] == {**told, "path": None}
    request = plain.contract.check({"prompt": "x"})
    assert "vae" not in describe_image(plain, request, 0, unet_calls=4)["made_with"]
    assert (make_picture(loaded) - make_picture(plain)).mean() > 50
    assert loaded.weights_sha256 != plain.weights_sha256


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"scaling_factor": 0.18215}, r"with scaling factor 0.13025 \(.*\), not 0.18215"),
        ({"latent_channels": 16}, "4 latent channels for this model, not 16"),
        (
            {"_class_name": "AutoencoderKLWan"},
            "the folder of an AutoencoderKL or AutoencoderTiny, but .* 'AutoencoderKLW",
        ),
        (None, "has no readable config.json; python Download_model.py --vae downloads one"),
    ],
)
def test_vae_of_another_model_is_refused(tiny_model: Path, tmp_path: Path, settings: Any, told: str) -> None:
    from diffusers import AutoencoderKL

    held = json.loads((tiny_model / "vae/config.json").read_text())
    vae = AutoencoderKL.from_config({**held, **(settings or {}), "_class_name": "AutoencoderKL"})
    vae.save_pretrained(tmp_path / "vae")
    path = tmp_path / "vae/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings) if settings else "")
    with pytest.raises(ConfigError, match=f"^handler.vae_path takes .*{told}"):
        load(tiny_model, vae_path=str(tmp_path / "vae"))


def test_vae_in_another_place_or_form_is_refused(tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    own = shutil.copytree(folder, tmp_path / "vae")
    (own / "x.bin").touch()
    assert is_tiny_vae(load(tiny_model, vae_path=str(own)).pipeline.vae)
    with pytest.raises(ConfigError, match=rf"^handler.vae_path takes .* it is in {tiny_model}/vae$"):
        load(tiny_model, vae_path=str(tiny_model))
    weights = own / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ConfigError, match=r"^handler.vae_path takes .* python Download_model.py --vae downloads one"):
        load(tiny_model, vae_path=str(weights))
    weights.rename(own / "diffusion_pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"diffusion_pytorch_model.bin is a pickle, which can run code"):
        load(tiny_model, vae_path=str(own))
