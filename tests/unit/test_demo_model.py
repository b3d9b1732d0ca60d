from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from demo.measure import (
    GUIDANCE,
    choose_prompts,
    draw_prompts,
    draw_with,
    load_eager_pipeline,
    score_pictures,
)
from demo.oracle import name_pixels
from demo.shapes import COLOURS

FOLDER = Path(__file__).parents[2] / "demo/model"
PROMPT = "a large red circle on a white background, left"
STEPS = 10
LEAST_RIGHT = {"background": 0.95, "position": 0.95, "size": 0.95, "colour": 0.85, "shape": 0.85, "all": 0.8}

Draw = Callable[..., Any]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return load_eager_pipeline(FOLDER)


@pytest.fixture(scope="module")
def draw(pipeline: Any) -> Draw:
    """Draw one prompt, by default always in the same way."""
    import torch

    def draw(prompt: str = PROMPT, *, seed: int = 0, **settings: Any) -> Any:
        generator = torch.Generator().manual_seed(seed)
        chosen = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, **settings}
        return np.asarray(pipeline(prompt, generator=generator, **chosen).images[0]).astype(int)

    return draw


@pytest.fixture(scope="module")
def plain(draw: Draw) -> Any:
    return draw()


def test_model_is_small() -> None:
    needed = [path for path in FOLDER.glob("**/*") if path.suffix in (".json", ".safetensors")]
    assert sum(path.stat().st_size for path in needed) <= 25e6
    assert {path.suffix for path in FOLDER.glob("**/*") if path.is_file()} <= {".json", ".safetensors", ".md", ".jpg"}


def test_weights_have_their_published_names(tiny_model: Path) -> None:
    for folder in (FOLDER, tiny_model):
        with safe_open(folder / "text_encoder/model.safetensors", "pt") as weights:
            assert {name.partition(".")[0] for name in weights.keys()} == {"text_model"}  # noqa: SIM118


@pytest.mark.parametrize("text", ["", "🎉 naïve 日本語", "\x01\t\x7f", "A LARGE Red\ncircle", "word " * 200, "ﷺ"])
@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_any_text_tokenises(pipeline: Any, name: str, text: str) -> None:
    tokenizer = getattr(pipeline, name)
    ids = tokenizer(text, padding="max_length", truncation=True, max_length=tokenizer.model_max_length).input_ids
    assert len(ids) == 77
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id in ids
    assert max(ids) < pipeline.text_encoder.config.vocab_size


def test_each_word_of_the_shapes_is_one_token(pipeline: Any) -> None:
    assert pipeline.tokenizer.tokenize("A Large red circle, left") == [
        *("a</w>", "large</w>", "red</w>", "circle</w>", ",</w>", "left</w>")
    ]


def test_held_out_prompts_are_drawn_as_asked(pipeline: Any) -> None:
    prompts = choose_prompts(16, seed=2)
    shares = score_pictures(prompts, list(draw_prompts(prompts, draw_with(pipeline, num_inference_steps=STEPS))))
    assert {name: shares[name] for name, least in LEAST_RIGHT.items() if shares[name] < least} == {}, shares


def test_default_size_is_that_of_training(plain: Any) -> None:
    assert plain.shape == (128, 128, 3)


def test_same_request_gives_the_same_picture(draw: Draw, plain: Any) -> None:
    assert (draw() == plain).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 1},
        {"guidance_scale": 1.0},
        {"num_inference_steps": 2},
        {"original_size": (32, 32)},
        {"crops_coords_top_left": (0, 48)},
        {"prompt": "a large blue circle on a white background, left"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_setting_changes_the_picture(draw: Draw, plain: Any, settings: dict[str, Any]) -> None:
    assert np.abs(draw(**settings) - plain).mean() > 0.3, "levels of 255"


def test_negative_prompt_is_avoided(draw: Draw) -> None:
    def find_background(**settings: Any) -> str:
        picture = draw("a large red circle, left", guidance_scale=3.0, **settings)
        colours = name_pixels(Image.fromarray(picture.astype(np.uint8)))
        return list(COLOURS)[np.bincount(colours[colours >= 0]).argmax()]

    background = find_background()
    assert find_background(negative_prompt=f"{background} background") != background


@pytest.mark.parametrize(("width", "height"), [(192, 128), (128, 192), (96, 96)])
def test_other_sizes_are_drawn(draw: Draw, width: int, height: int) -> None:
    picture = draw(width=width, height=height)
    assert picture.shape == (height, width, 3)
    corner = np.median(picture[-10:, -10:].reshape(-1, 3), axis=0)
    assert (corner > 200).all(), "the background is white"
