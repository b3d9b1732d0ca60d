"""The adapters of the demonstration model, drawn with through what serves them."""

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from demo.measure import GUIDANCE, Prompt, choose_prompts, load_eager_pipeline, score_pictures
from demo.shapes import COLOURS, INVERTED, POSITIONS, Scene, Thing, describe_scene, invert_scene, iterate_scenes
from demo.training.adapters import Pool, list_asked
from demo.training.data import number_features
from demo.training.low_rank import add_low_rank, load_low_rank, save_low_rank
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from tests.unit.pipelines import UNET_ONLY, load, make_picture

ROOT = Path(__file__).parents[2]
ADAPTERS = ROOT / "demo/adapters"
FEW = {"num_inference_steps": 4, "guidance_scale": 0.0}
COUNT = 4


def load_demo(pt2: Any = None, **are_fused: bool) -> LoadedPipeline:
    """Load the demonstration model with adapters by name."""
    entries = [
        {"name": name, "path": str(ADAPTERS / name / f"{name}.safetensors"), "fuse": is_fused}
        for name, is_fused in are_fused.items()
    ]
    if entries and not entries[0]["fuse"]:
        entries[0] |= FEW
    adapters = HandlerConfig.parse({"adapters": entries}).adapters
    settings = {"num_inference_steps": 10, "guidance_scale": GUIDANCE}
    return load(ROOT / "demo/model", pt2, adapters=adapters, **settings, **UNET_ONLY)


@pytest.fixture(scope="module")
def served() -> LoadedPipeline:
    """The model compiled for OpenVINO, with both adapters for requests to choose."""
    return load_demo("openvino", **{"few-steps": False, "inverted": False})


def draw(loaded: LoadedPipeline, prompt: Prompt, *names: str, **fields: Any) -> np.ndarray[Any, Any]:
    adapters = {"adapters": [{"name": name} for name in names]} if names else {}
    return make_picture(loaded, prompt=prompt.text, seed=prompt.seed, **adapters, **fields)


def score(loaded: LoadedPipeline, prompts: list[Prompt], *names: str, **fields: Any) -> float:
    """Return the share of prompts of which everything is drawn as asked."""
    drawn = [draw(loaded, prompt, *names, **fields).astype(np.uint8) for prompt in prompts]
    return score_pictures(prompts, [Image.fromarray(each) for each in drawn])["all"]


def test_files_are_small() -> None:
    sizes = {path.stem: path.stat().st_size for path in ADAPTERS.glob("*/*.safetensors")}
    assert sizes.keys() == {"few-steps", "inverted"}
    assert max(sizes.values()) <= 3e6
    assert {path.suffix for path in ADAPTERS.glob("**/*") if path.is_file()} <= {".safetensors", ".md", ".jpg"}


def test_few_steps_draw_what_is_asked(served: LoadedPipeline) -> None:
    small = [each for each in choose_prompts(24) if each.scene.things[0].size == "small"][3:9]  # the hard ones
    right = score(served, small, "few-steps")  # four calls without guidance, as the adapter's entry says
    assert right >= 0.8
    assert right > score(served, small, **FEW)


def test_colours_are_inverted(served: LoadedPipeline) -> None:
    prompts = choose_prompts(COUNT, seed=3)
    inverted = [replace(each, scene=invert_scene(each.scene)) for each in prompts]
    assert score(served, inverted, "inverted", num_inference_steps=6) >= 0.6
    assert score(served, inverted, "few-steps", "inverted") >= 0.5  # both at once
    assert score(served, prompts, "inverted", num_inference_steps=6) <= 0.1
    nothing = draw(served, prompts[0], adapters=[{"name": "inverted", "scale": 0}], num_inference_steps=2)
    assert np.array_equal(nothing, draw(served, prompts[0], num_inference_steps=2))


def test_openvino_draws_eagers_picture(served: LoadedPipeline) -> None:
    (prompt,) = choose_prompts(1, seed=4)
    fused = {"few-steps": True, "inverted": True}
    reference = draw(load_demo(**fused), prompt, **FEW)
    assert np.abs(draw(served, prompt, *fused) - reference).max() <= 1
    assert np.abs(draw(load_demo("openvino", **fused), prompt, **FEW) - reference).max() <= 1


def test_what_is_trained_is_what_is_served(tiny_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = load_eager_pipeline(tiny_model).unet
    inputs = (torch.randn(2, 4, 8, 8), 500, torch.randn(2, 7, 64))
    added = {"text_embeds": torch.randn(2, 32), "time_ids": torch.randn(2, 6)}
    path = tmp_path / "some.safetensors"
    with torch.no_grad():
        before = unet(*inputs, added_cond_kwargs=added).sample
        changes = add_low_rank(unet, 4)
        assert torch.equal(unet(*inputs, added_cond_kwargs=added).sample, before)
        for change in changes.values():
            change.up.weight.normal_(std=0.1)
        save_low_rank(changes, path)
        load_low_rank(changes, path)  # rounded to float16
        trained = unet(*inputs, added_cond_kwargs=added).sample
        served = load_eager_pipeline(tiny_model, adapters=[{"path": str(path), "scale": 1.0}]).unet
        assert (trained - before).abs().max() > 0.1
        torch.testing.assert_close(served(*inputs, added_cond_kwargs=added).sample, trained, atol=1e-4, rtol=1e-4)


def test_inverting_twice_changes_nothing() -> None:
    assert INVERTED.keys() == set(INVERTED.values()) == COLOURS.keys()
    assert all(invert_scene(invert_scene(scene)) == scene for scene in iterate_scenes())


def test_noise_finds_the_nearest_drawing_of_what_is_asked() -> None:
    scenes = [Scene(ground, (Thing("red", "star", "small", at),)) for ground in ("blue", "white") for at in POSITIONS]
    latents = torch.randn(len(scenes), 4, 2, 2, generator=torch.Generator().manual_seed(0))
    pool = Pool(latents, scenes, torch.tensor([number_features(scene) for scene in scenes]))
    asked = Scene("white", (Thing("red", "star", "small", ""),))
    assert list_asked(scenes[1]).tolist() == number_features(scenes[1])
    for i in range(len(scenes)):
        found = pool.find_nearest(asked, 3 * latents[i])
        assert torch.equal(found, latents[i]) == (i >= len(POSITIONS))
        assert any(torch.equal(found, each) for each in latents[len(POSITIONS) :])
    assert torch.equal(pool.find_nearest(scenes[1], latents[0]), latents[1])


def test_what_a_scene_leaves_open_goes_unsaid() -> None:
    scene = Scene("", (Thing("red", "star", "", ""),))
    assert {describe_scene(scene, random=Random(i)) for i in range(20)} == {"a red star", "red star"}
