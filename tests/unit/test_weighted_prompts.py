"""Prompts with weights, BREAK and more than 77 tokens, against compel's and diffusers' own results."""

import base64
import contextlib
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compel import CompelForSD, CompelForSDXL
from PIL import Image

from demo.oracle import list_components, name_pixels
from demo.shapes import COLOURS
from sdxl_server.api.image_metadata import describe_image
from sdxl_server.api.warnings import list_warnings
from sdxl_server.config.compile_settings import CompileConfig
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.diffusion.generation import build_image_pipeline, generate, run_to_end
from sdxl_server.diffusion.prompt_embedding import MAX_CHUNKS, choose_chunks, embed_prompts
from sdxl_server.errors import RequestError
from sdxl_server.loading import load_pipeline
from sdxl_server.model.describe import describe_pipeline
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.request.prompt_weights import parse_weights
from tools.server import ROOT

LONG = "a red fox in the snow, " * 5 + "blue"  # 2 chunks of letters
SCENE = "a large {} star on a blue background, left"


def load(folder: Path, pt2: Any = None, **settings: Any) -> LoadedPipeline:
    torch._dynamo.reset()
    settings = {"weighted_prompts": True, "warm_up": pt2 is not None, **settings}
    config = HandlerConfig(model_path=folder.name, dtype="float32", num_inference_steps=4, **settings)
    return load_pipeline(config, CompileConfig.parse(pt2), model_dir=folder.parent)


@pytest.fixture(scope="module")
def eager(tiny_model: Path) -> LoadedPipeline:
    return load(tiny_model)


@pytest.fixture(scope="module")
def eager_sd(tiny_sd_model: Path) -> LoadedPipeline:
    return load(tiny_sd_model)


@pytest.fixture(scope="module")
def demo() -> LoadedPipeline:
    return load(ROOT / "demo/model")


@pytest.fixture(scope="module")
def plain_demo() -> LoadedPipeline:
    return load(ROOT / "demo/model", weighted_prompts=False)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    options = {"model_caching": True, "cache_dir": str(tmp_path_factory.mktemp("cache"))}
    return {"backend": "openvino", "options": options}


def embed(loaded: LoadedPipeline, **fields: Any) -> dict[str, Any]:
    request = loaded.contract.check({"seed": 1, **fields})
    pipeline = build_image_pipeline(loaded, request, loaded.functions)
    return embed_prompts(pipeline, request, loaded.family, chunks=choose_chunks(loaded))


def draw(loaded: LoadedPipeline, **fields: Any) -> Any:
    request = loaded.contract.check({"prompt": "a red fox", "seed": 3, **fields})
    return run_to_end(generate(loaded, request))[0].image


def encode(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def subtract(one: Image.Image, other: Image.Image) -> Any:
    return np.abs(np.asarray(one).astype(int) - np.asarray(other)).max()


def read_weights(prompt: str) -> list[list[tuple[str, float]]]:
    return [[(each.text, round(each.weight, 3)) for each in part] for part in parse_weights(prompt)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red fox", [("a red fox", 1)]),
        ("", [("", 1)]),
        ("a (red:1.3) fox", [("a ", 1), ("red", 1.3), (" fox", 1)]),
        ("(red : .5 )", [("red ", 0.5)]),
        ("a (red) fox", [("a ", 1), ("red", 1.1), (" fox", 1)]),
        ("a [red] fox", [("a ", 1), ("red", 0.909), (" fox", 1)]),
        ("((red)) [[fox]]", [("red", 1.21), (" ", 1), ("fox", 0.826)]),
        ("(a (red:2) fox:1.5)", [("a ", 1.5), ("red", 3), (" fox", 1.5)]),
        ("(red:-1) (fox:0)", [("red", -1), (" ", 1), ("fox", 0)]),
        # unbalanced
        ("a (red fox", [("a ", 1), ("red fox", 1.1)]),
        ("a [red (fox", [("a ", 1), ("red ", 0.909), ("fox", 1.0)]),
        ("a red) fox] :1.3)", [("a red) fox] :1.3)", 1)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.0), (" c", 0.909)]),
        # plain brackets, and what is no number
        (r"a \(red:1.3\) \[fox\] \\ \x", [("a (red:1.3) [fox] \\ x", 1)]),
        ("(a:nan) (b:1e9) (c:)", [("a:nan", 1.1), (" ", 1), ("b:1e9", 1.1), (" ", 1), ("c:", 1.1)]),
        # other programs' words stay words
        ("a [fox:cat:0.5] (<ti:x:0.8>:1.2)", [("a [fox:cat:0.5] ", 1), ("<ti:x:0.8>", 1.2)]),
        ("a [fox|cat] AND break", [("a [fox|cat] AND break", 1)]),
    ],
)
def test_weights_are_read_as_a1111_reads_them(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert read_weights(prompt) == [expected]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a fox BREAK snow", [[("a fox ", 1)], [(" snow", 1)]]),
        ("A FOX BREAK SNOW", [[("A FOX ", 1)], [(" SNOW", 1)]]),
        ("(a fox BREAK snow:1.2)", [[("a fox ", 1.2)], [(" snow", 1.2)]]),
        ("BREAK a fox BREAK BREAK", [[(" a fox ", 1)]]),
        ("BREAK", [[("", 1)]]),
        ("a BREAKFAST", [[("a BREAKFAST", 1)]]),
    ],
)
def test_break_begins_a_part(prompt: str, expected: list[list[tuple[str, float]]]) -> None:
    assert read_weights(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("a (red:1000000000) fox", "takes weights from -10 to 10 (nested weights multiply), not 1e+09 for 'red'"),
        ("a clock (at 10:30)", r"not 30 for 'at 10'; write plain brackets as \( and \)"),
        ("(" * 1000 + "a", "not 2.46993e+41 for 'a'"),
        (f"(a:{'9' * 400})", "not inf for 'a'"),
        (f"((a:{'9' * 400}):0)", "not nan for 'a'"),
        ("a (red:1.2.3) fox", "takes weights such as (word:1.3), not '1.2.3'"),
    ],
)
def test_weights_that_cannot_be_are_refused(eager: LoadedPipeline, prompt: str, told: str) -> None:
    with pytest.raises(RequestError) as caught:
        eager.contract.check({"prompt": "a fox", "negative_prompt_2": prompt})
    assert str(caught.value).startswith("negative_prompt_2 ")
    assert told in str(caught.value)
    assert caught.value.param == "negative_prompt_2"


@pytest.mark.parametrize(
    "piece", ["(", "[", "(:", "[:", "[|", "(a", "<lora:", "[::", "a[", "(a:1)", "[a]", "BREAK ", "\\"]
)
def test_no_prompt_takes_long(piece: str) -> None:
    start = time.process_time()
    with contextlib.suppress(ValueError):  # too large a weight
        parse_weights(piece * (3000 // len(piece)))
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    ("mine", "theirs", "tokens"),
    [
        ("a (red:1.5) fox", "a (red)1.5 fox", 77),
        ("((red)) fox, (snow:2)", "(red)1.21 fox, (snow)2", 77),
        (LONG, LONG, 154),
        ("a fox BREAK (snow:1.3)", '("a fox", "(snow)1.3").and()', 154),
        (f"(blue:1.2) BREAK {LONG} BREAK snow", f'("(blue)1.2", "{LONG}", "snow").and()', 4 * 77),
    ],
)
@pytest.mark.parametrize("negative", ["blue", "(blue:1.3)"])
@pytest.mark.parametrize("kind", ["eager", "eager_sd"])
def test_embeddings_are_compels(
    request: pytest.FixtureRequest, kind: str, mine: str, theirs: str, tokens: int, negative: str
) -> None:
    loaded: LoadedPipeline = request.getfixturevalue(kind)
    compel = (CompelForSDXL if loaded.family.is_xl else CompelForSD)(loaded.pipeline)
    expected = compel(theirs, negative_prompt=negative.replace(":1.3)", ")1.3"))
    found = embed(loaded, prompt=mine, negative_prompt=negative)
    for side, embeds in (("", expected.embeds), ("negative_", expected.negative_embeds)):
        assert found[f"{side}prompt_embeds"].shape[1] == tokens
        torch.testing.assert_close(found[f"{side}prompt_embeds"], embeds, rtol=0, atol=0)
    if loaded.family.is_xl and mine == LONG:  # compel pools the syntax itself with the words
        torch.testing.assert_close(found["pooled_prompt_embeds"], expected.pooled_embeds, rtol=0, atol=0)


def test_lighter_words_stand_between_the_prompt_and_an_empty_one(eager: LoadedPipeline) -> None:
    """As in ComfyUI; compel itself would mask them beside that, which takes text encoders of their own."""
    whole, half, less = (embed(eager, prompt=f"(red fox:{each})")["prompt_embeds"][0] for each in ("1.0", "0.5", "-1"))
    empty = embed(eager, prompt="()")["prompt_embeds"][0]
    words = slice(1, 7)  # a token for each letter
    torch.testing.assert_close(half[words], (whole[words] + empty[words]) / 2)
    torch.testing.assert_close(less[words], 2 * empty[words] - whole[words])
    torch.testing.assert_close(half[7:], whole[7:], rtol=0, atol=0)


@pytest.mark.parametrize(("skip", "guidance"), [(None, 5.0), (0, 1.0), (1, 5.0)])
@pytest.mark.parametrize("kind", ["eager", "eager_sd"])
def test_weights_of_one_are_diffusers_own_picture(
    request: pytest.FixtureRequest, kind: str, guidance: float, skip: int | None
) -> None:
    loaded: LoadedPipeline = request.getfixturevalue(kind)
    fields: dict[str, Any] = {"clip_skip": skip, "guidance_scale": guidance, "num_inference_steps": 2}
    fields |= {"width": 64, "height": 64}
    image, mask = Image.linear_gradient("L").resize((64, 64)), Image.new("L", (64, 64), 255)
    sides: list[dict[str, Any]] = [{"negative_prompt": "blue"}, {}, {"image": encode(image)}]
    sides.append({"negative_prompt": "blue", "image": encode(image), "mask_image": encode(mask)})
    if loaded.family.is_xl:
        sides.append({"prompt_2": "snow", "negative_prompt_2": "red"})
    for side in sides:
        pictures = [draw(loaded, prompt=each, **side, **fields) for each in ("a red fox", "a (red:1) fox")]
        assert subtract(*pictures) == 0


def test_plain_prompts_go_diffusers_way(plain_demo: LoadedPipeline, demo: LoadedPipeline) -> None:
    fields = {"prompt": SCENE.format("red"), "negative_prompt": "a ring", "num_inference_steps": 2}
    assert embed(demo, prompt="a star", negative_prompt="a ring") == {}
    assert subtract(draw(demo, **fields), draw(plain_demo, **fields)) == 0
    assert plain_demo.contract.check({"prompt": "(a:99)"}).prompt == "(a:99)"  # plain words there


def find_thing(picture: Image.Image) -> str:
    """Return the colour of the largest thing that is not the background."""
    names = name_pixels(picture)
    background = np.bincount(names[names >= 0]).argmax()
    thing = list_components((names >= 0) & (names != background))[0]
    return list(COLOURS)[np.bincount(names[thing]).argmax()]


@pytest.mark.parametrize("colour", ["green", "yellow"])
def test_what_stands_beyond_77_tokens_is_drawn(demo: LoadedPipeline, plain_demo: LoadedPipeline, colour: str) -> None:
    fields = {"guidance_scale": 1.5, "num_inference_steps": 8}
    prompts = [", " * 75 + SCENE.format(each) for each in (colour, "white")]
    assert find_thing(draw(demo, prompt=prompts[0], **fields)) == colour
    assert subtract(*(draw(plain_demo, prompt=each, num_inference_steps=1) for each in prompts)) == 0


@pytest.mark.parametrize(("weight", "colour"), [(0.5, "red"), (2, "yellow")])
def test_a_weight_decides_between_two_parts(demo: LoadedPipeline, weight: float, colour: str) -> None:
    prompt = f"{SCENE.format('red')} BREAK ({SCENE.format('yellow')}:{weight})"
    assert find_thing(draw(demo, prompt=prompt, guidance_scale=1.5, num_inference_steps=8)) == colour


def count_graphs(loaded: LoadedPipeline) -> list[int]:
    return [len(each.reports) for each in loaded.parts.values() if each is not None]


def test_compiled_sd_needs_no_other_text_encoder(
    tiny_sd_model: Path, eager_sd: LoadedPipeline, cached: dict[str, Any]
) -> None:
    loaded = load(tiny_sd_model, cached, compile_unet=False, compile_vae=False)
    for fields in ({"prompt": LONG}, {"prompt": "a (red:1.4) fox", "negative_prompt": LONG}):
        assert subtract(draw(loaded, **fields), draw(eager_sd, **fields)) <= 1
    assert count_graphs(loaded) == [1]


def test_static_graphs_weigh_one_chunk(tiny_model: Path, eager: LoadedPipeline, cached: dict[str, Any]) -> None:
    loaded = load(tiny_model, cached, graphs="static", compile_vae=False)
    short = {"prompt": "a (red:1.4) fox", "negative_prompt": "(blue)"}
    assert subtract(draw(loaded, **short), draw(eager, **short)) <= 1
    assert subtract(draw(loaded, prompt="a fox BREAK (snow)"), draw(eager, prompt="a fox (snow)")) <= 1
    assert subtract(draw(loaded, prompt=f"(a:1.2) {LONG}"), draw(loaded, prompt=f"(a:1.2) {LONG} red")) == 0
    assert count_graphs(loaded) == [1, 1, 1]
    request = loaded.contract.check({"prompt": "a fox BREAK (snow)", "negative_prompt": f"({LONG})"})
    count = len(loaded.pipeline.tokenizer(LONG).input_ids)
    assert list_warnings(loaded, request) == [
        "prompt: BREAK starts no new chunk here: graphs for one size read one chunk",
        f"negative_prompt has {count} tokens; the text encoder reads the first 77",
    ]


def test_what_is_read_is_not_warned_of(eager: LoadedPipeline) -> None:
    fields = {"prompt": f"a (red:1.3) ((fox)) BREAK {LONG}", "negative_prompt": "[fox:cat:0.5], (a)1.3 AND b"}
    (warning,) = list_warnings(eager, eager.contract.check(fields))
    assert warning == (
        "negative_prompt: '[fox:cat:0.5]', '(a)1.3', 'AND' have no special meaning here and are read as plain words"
    )


def test_chunks_are_bounded(eager: LoadedPipeline) -> None:
    fields = {"prompt": "a BREAK " * 100, "output_format": "png"}
    (warning,) = list_warnings(eager, eager.contract.check(fields))
    assert warning == f"prompt makes 100 chunks of 77 tokens; the first {MAX_CHUNKS} are read"
    assert embed(eager, **fields)["prompt_embeds"].shape[1] == MAX_CHUNKS * 77


def test_requests_in_flight_do_not_meet(eager: LoadedPipeline) -> None:
    many = [{"prompt": "a (red:2) fox"}, {"prompt": LONG}, {"prompt": "a red fox"}, {"prompt": "a BREAK (fox)"}]
    alone = [draw(eager, **each) for each in many]
    running = [generate(eager, eager.contract.check({"seed": 3, **each})) for each in many]
    made: dict[int, Any] = {}
    while len(made) < len(many):
        for index, each in enumerate(running):
            try:
                next(each)
            except StopIteration as end:
                made.setdefault(index, end.value and end.value[0].image)
    assert [subtract(made[index], alone[index]) for index in range(len(many))] == [0] * len(many)


def test_the_setting_is_told(eager: LoadedPipeline, plain_demo: LoadedPipeline) -> None:
    request = eager.contract.check({"prompt": "a (red:2) fox"})
    assert describe_image(eager, request, 0, unet_calls=4)["made_with"]["weighted_prompts"] is True
    assert "weighted_prompts" not in describe_image(plain_demo, request, 0, unet_calls=4)["made_with"]
    assert [describe_pipeline(each)["weighted_prompts"] for each in (eager, plain_demo)] == [True, False]
