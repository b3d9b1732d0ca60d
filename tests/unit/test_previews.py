"""Fast previews: colours fitted to the VAE, beside what it decodes."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from demo.measure import choose_prompts
from sdxl_server.diffusion import previews
from sdxl_server.diffusion.generation import generate
from sdxl_server.diffusion.previews import build_mosaics, draw_preview, fit_colour_map, fit_preview
from sdxl_server.diffusion.progress import Progress
from sdxl_server.errors import ConfigError
from sdxl_server.model.describe import describe_pipeline
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from tests.spoiled import spoil_model
from tests.unit.pipelines import load, make_picture
from tests.unit.test_autoencoders import folder
from tools.server import ROOT

__all__ = ["folder"]  # a tiny VAE
MOST_APART = 16
STEPS = (1, 3, 6)


@pytest.fixture(scope="module")
def demo() -> LoadedPipeline:
    return load(ROOT / "demo/model", num_inference_steps=8, guidance_scale=1.5)


def show(loaded: LoadedPipeline, progress: Progress) -> np.ndarray[Any, Any]:
    return np.asarray(draw_preview(loaded, progress)).astype(int)


def choose_kind(loaded: LoadedPipeline, kind: str) -> LoadedPipeline:
    """Return the pipeline with previews of a kind, which are fitted anew."""
    return dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, preview=kind))


def test_fast_previews_are_near_the_exact_ones(demo: LoadedPipeline) -> None:
    exact, apart, of_grey = choose_kind(demo, "exact"), [], []
    for prompt in choose_prompts(4, seed=3):
        for progress in generate(demo, demo.contract.check({"prompt": prompt.text, "seed": 5})):
            if progress.step in STEPS:
                expected = show(exact, progress)
                apart.append(np.abs(show(demo, progress) - expected).mean())
                of_grey.append(np.abs(expected - expected.mean(axis=(0, 1, 2))).mean())
    assert np.mean(apart) < MOST_APART, apart
    assert max(apart) < 2.5 * MOST_APART, apart
    assert np.mean(of_grey) > 3 * MOST_APART, of_grey


def test_a_preview_takes_ten_milliseconds_at_512(demo: LoadedPipeline) -> None:
    progress = next(generate(demo, demo.contract.check({"prompt": "x", "width": 512, "height": 512})))
    threads, seconds = torch.get_num_threads(), [1.0]
    torch.set_num_threads(1)  # the time of this thread is all there is then, whatever else runs here
    try:
        for _ in range(20):
            start = time.thread_time()
            assert draw_preview(demo, progress).size == (512, 512)
            seconds.append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    assert min(seconds) < 0.010, seconds


def test_a_preview_depends_on_nothing_that_was_asked_before(demo: LoadedPipeline) -> None:
    before, again = choose_kind(demo, "fast"), choose_kind(demo, "fast")
    make_picture(again, prompt="a blue square", seed=3, num_inference_steps=1)
    torch.rand(7)
    request = demo.contract.check({"prompt": "a red star on a white background", "seed": 1})
    shown = show(before, next(generate(before, request)))
    assert np.array_equal(show(again, next(generate(again, request))), shown)
    pictures = [make_picture(each, num_inference_steps=2) for each in (demo, choose_kind(demo, "exact"))]
    assert np.array_equal(pictures[0], pictures[1])


@pytest.mark.parametrize(("pt2", "graphs"), [(None, None), ("openvino", "static"), ("openvino", "dynamic")])
def test_the_warm_up_fits_a_tiny_vae_without_another_graph(
    tiny_model: Path, folder: Path, pt2: Any, graphs: str | None
) -> None:
    others = {"compile_unet": False, "compile_text_encoders": False, "warm_up": True}
    loaded = load(tiny_model, pt2, vae_path=str(folder), graphs=graphs, **others)
    fits = fit_preview.cache_info().misses
    fit_preview(loaded)
    assert fit_preview.cache_info().misses == fits  # the warm-up has fitted it
    assert describe_pipeline(loaded)["preview"] == {"kind": "fast", "lossy": True}
    sheet = loaded.pipeline.image_processor.preprocess(Image.open(ROOT / "demo/model/sheet.jpg"), 256, 256)
    with torch.no_grad():  # of a picture: what a UNet of random weights makes is far from all that this VAE ever sees
        latents = loaded.pipeline.vae.encoder(sheet)
        decoded = loaded.pipeline.vae.decoder(latents)
    apart = (fit_preview(loaded).draw(latents) - decoded.clamp(-1, 1)).abs().mean()
    assert apart < decoded.std() / 5
    if pt2 is not None:
        assert [len(describe_pipeline(loaded)["openvino"][name]) for name in ("vae", "vae_encoder")] == [1, 0]


def test_a_warm_start_takes_what_was_fitted(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[Any] = []

    def fit(*args: Any, **kwargs: Any) -> Any:
        fits.append(fit_colour_map(*args, **kwargs))
        return fits[-1]

    monkeypatch.setattr(previews, "fit_colour_map", fit)
    pt2 = {"backend": "openvino", "options": {"model_caching": True, "cache_dir": str(tmp_path)}}
    others = {"compile_unet": False, "compile_text_encoders": False, "warm_up": True}
    cold, warm = fit_preview(load(tiny_model, pt2, **others)), fit_preview(load(tiny_model, pt2, **others))
    assert len(fits) == 1
    assert torch.equal(cold.weights, fits[0].weights)
    for name, value in vars(cold).items():
        assert torch.equal(torch.as_tensor(getattr(warm, name)), torch.as_tensor(value)), name
    load(tiny_model, pt2, width=192, **others)  # of another size, by another graph
    assert len(fits) == 2


def test_stable_diffusion_1_and_any_size(tiny_sd_model: Path) -> None:
    loaded = load(tiny_sd_model, is_xl=False)
    assert "colours" not in vars(loaded)  # without a warm-up the first preview has them fitted
    for width, height in ((128, 128), (64, 200)):
        request = loaded.contract.check({"prompt": "x", "width": width, "height": height})
        assert draw_preview(loaded, next(generate(loaded, request))).size == (width, height)


def test_the_scaling_of_the_latents_is_taken_back(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(tiny_model)
    progress = next(generate(loaded, loaded.contract.check({"prompt": "x"})))
    assert progress.denoiser is not None
    plain = fit_preview(loaded).draw(progress.denoiser.predict() / 0.13025 * 2 + 0.5)
    config = loaded.pipeline.vae.config
    monkeypatch.setattr(loaded.pipeline.vae, "_internal_dict", type(config)({**config, **MOVED}))
    expected = loaded.pipeline.image_processor.postprocess(plain)[0]
    assert np.array_equal(show(loaded, progress), np.asarray(expected))


MOVED = {"latents_mean": [0.5] * 4, "latents_std": [2.0] * 4}


def test_mosaics_hold_every_tile() -> None:
    tiles = torch.arange(5).view(5, 1, 1, 1).expand(5, 1, 2, 2)
    wide = build_mosaics(tiles, height=2, width=5)
    assert wide[:, 0, 0].tolist() == [[0, 0, 1, 1, 2], [3, 3, 4, 4, 0]]
    assert build_mosaics(tiles, height=1, width=1).flatten().tolist() == [0, 1, 2, 3, 4]


def test_an_encoder_that_is_damaged_is_told_at_the_warm_up(tiny_model: Path, tmp_path: Path) -> None:
    folder = spoil_model(tiny_model, tmp_path / "model", "encoder")
    with pytest.raises(ConfigError, match="^handler.dtype: float32: at the warm-up the VAE's encoding of the image"):
        load(folder, warm_up=True)
    load(folder, warm_up=True, preview="exact")
