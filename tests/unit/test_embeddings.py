"""Embeddings (textual inversion) in each published form, in prompts and through the compiled text encoders."""

import hashlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from demo.measure import GUIDANCE, Prompt, choose_prompts, score_pictures
from demo.training.embeddings import NAME, UNSEEN, choose_named_prompts
from sdxl_server.api.image_metadata import describe_image
from sdxl_server.api.warnings import list_warnings
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.diffusion.generation import build_image_pipeline
from sdxl_server.diffusion.prompt_embedding import choose_chunks, embed_prompts
from sdxl_server.errors import ConfigError
from sdxl_server.model.describe import describe_pipeline
from sdxl_server.model.embedding_files import CONVERT, read_embedding
from sdxl_server.model.embeddings import Embedding, expand, expand_prompts, replace_names
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from tests.unit.pipelines import load, make_picture
from tools.random_model import make_pipeline, save_pipeline

WIDTH, VECTORS = 32, 3
XL, SD = {"text_encoder": WIDTH, "text_encoder_2": WIDTH}, {"text_encoder": WIDTH}
TEXT_ONLY = {"compile_unet": False, "compile_vae": False}
FAST: dict[str, Any] = {"num_inference_steps": 1, "width": 64, "height": 64}
DEMO = Path(__file__).parents[2] / "demo/model"
LODESTAR = Path(__file__).parents[2] / f"demo/embeddings/{NAME}/{NAME}.safetensors"
LONG = "a red fox in the snow, " * 3


def make_rows(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (VECTORS, WIDTH)), generator=torch.Generator().manual_seed(seed))


L, G, ONE = make_rows(1), make_rows(2), make_rows(3, WIDTH)
ROWS = {"clip_l": L, "clip_g": G}


def save(tensors: Mapping[str, torch.Tensor], path: Path) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return path


def register(*paths: Path, names: tuple[str, ...] = ("Zork", "owl-2")) -> Any:
    """Return the setting for files, one name each."""
    entries = [{"name": name, "path": str(path)} for name, path in zip(names, paths, strict=False)]
    return HandlerConfig.parse({"embeddings": entries}).embeddings


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(ROWS, tmp_path_factory.mktemp("embeddings") / "zork.safetensors")


@pytest.fixture(scope="module")
def named(tiny_model: Path, file: Path) -> LoadedPipeline:
    """The small pipeline with an embedding, in eager PyTorch."""
    return load(tiny_model, embeddings=register(file), weighted_prompts=True)


def read(path: Path, widths: Mapping[str, int], name: str = "zork") -> dict[str, Any]:
    return read_embedding(path, name, widths, most=75)[1]


LORA = {"lora_unet_mid_block.lora_up.weight": torch.ones(4, 4)}


@pytest.mark.parametrize(
    "tensors",
    [
        ROWS,
        {"text_encoders_0": L, "text_encoders_1": G},
        {f"bundle_emb.<tok>.{part}": rows for part, rows in ROWS.items()} | LORA,
        {f"bundle_emb.<Zork>.{part}": rows for part, rows in ROWS.items()}
        | {f"bundle_emb.zork.2.{part}": G for part in ROWS},
    ],
)
def test_forms_for_sdxl(tmp_path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    vectors = read(save(tensors, tmp_path / "zork.safetensors"), XL)
    assert torch.equal(vectors["text_encoder"], L)
    assert torch.equal(vectors["text_encoder_2"], G)


@pytest.mark.parametrize(
    "name", ["emb_params", "<zork>", "*", "clip_l", "bundle_emb.x.string_to_param.*", "bundle_emb.x.clip_l"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_forms_for_one_text_encoder(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    path = tmp_path / "zork.safetensors"
    assert torch.equal(read(save({name: L.to(dtype)}, path), SD)["text_encoder"].float(), L.to(dtype).float())
    assert torch.equal(read(save({name: ONE}, path), SD)["text_encoder"], ONE[None])


def test_two_files_of_diffusers_are_one_embedding(tmp_path: Path) -> None:
    path = save({"<zork>": L}, tmp_path / "learned_embeds-steps-500.safetensors")
    with pytest.raises(ConfigError, match=r"it has <zork> 3×32, and this model takes clip_l N×32 and clip_g N×32"):
        read(path, XL)
    digest, _ = read_embedding(path, "zork", SD, most=75)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    save({"<zork>": G}, tmp_path / "learned_embeds_2-steps-500.safetensors")
    vectors = read(path, XL)
    assert [torch.equal(vectors[name], rows) for name, rows in zip(XL, (L, G), strict=True)] == [True, True]


WIDE = {"text_encoder": 768, "text_encoder_2": 1280}


@pytest.mark.parametrize(
    ("tensors", "widths", "told"),
    [
        ({}, SD, "holds no tensor of a textual inversion"),
        ({"emb_params": (2, 768)}, WIDE, r"was made for Stable Diffusion 1\.x, not for this model: it has emb_params"),
        ({"<cat>": (2, 1024)}, WIDE, r"was made for Stable Diffusion 2\.x.* takes clip_l N×768 and clip_g N×1280"),
        (
            {"emb_params": (1024,)},
            {"text_encoder": 768},
            r"made for Stable Diffusion 2\.x.*1024, .* takes vectors N×768",
        ),
        ({"emb_params": (2, 768)}, {"text_encoder": 1024}, r"made for Stable Diffusion 1\.x"),
        ({"clip_l": (2, 768), "clip_g": (2, 1280)}, {"text_encoder": 768}, "made for Stable Diffusion XL"),
        ({"clip_l": (2, 32), "clip_g": (3, 32)}, XL, "clip_l 2×32, clip_g 3×32, and this model takes"),
        ({"clip_g": (2, 32)}, XL, "does not fit this model: it has clip_g 2×32"),
        ({"emb_params": (0, 32)}, SD, "it has emb_params 0×32"),
        ({"emb_params": ()}, SD, "it has emb_params one number"),
        ({"emb_params": (1, 2, 32)}, SD, "it has emb_params 1×2×32"),
        ({"emb_params": (76, 32)}, SD, "holds 76 vectors, and a prompt has room for 75"),
        ({"clip_l": (2, 32), "clip_g": (2, 32), "t5xxl": (2, 64)}, XL, "for other text encoders than this.*t5xxl"),
        ({"clip_l": (2, 32), "clip_g": (2, 32), "clip_l_out": (2, 32)}, XL, "not served: clip_l_out"),
        (
            {"lora_unet_x.lora_up.weight": (2, 32), "lora_unet_x.lora_down.weight": (2, 32)},
            XL,
            "holds a LoRA or another adapter of a model, and only a textual inversion is read here",
        ),
        ({"bundle_emb.a.clip_l": (2, 32), "bundle_emb.b.clip_l": (2, 32)}, SD, "embeddings 'a, b'; name takes one of"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(
    tmp_path: Path, tensors: Mapping[str, tuple[int, ...]], widths: Mapping[str, int], told: str
) -> None:
    path = save({name: torch.ones(shape) for name, shape in tensors.items()}, tmp_path / "wrong.safetensors")
    with pytest.raises(ConfigError, match=rf"wrong\.safetensors .*{told}") as error:
        read(path, widths)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (torch.full((2, WIDTH), torch.nan), "holds numbers that are not finite: emb_params"),
        (torch.full((2, WIDTH), -torch.inf), "not finite"),
        (torch.ones(2, WIDTH, dtype=torch.int8), r"takes floating-point numbers, not torch\.int8"),
        (torch.full((2, WIDTH), 1e30), r"too large for torch\.float16"),
    ],
)
def test_unusable_numbers_are_refused(tiny_sd_model: Path, tmp_path: Path, rows: torch.Tensor, told: str) -> None:
    path = save({"emb_params": rows}, tmp_path / "zork.safetensors")
    with pytest.raises(ConfigError, match=rf"handler\.embeddings\[0\]\.path: .*{told}"):
        load(tiny_sd_model, embeddings=register(path), dtype="float16")


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "zork.safetensors"
    with pytest.raises(ConfigError, match="cannot be read"):
        read(path, SD)
    for content, told in ((b"", "is damaged"), (b"<html>", "a web page"), (b"PK\x03\x04", "is a pickle")):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=told):
            read(path, SD)


@pytest.mark.parametrize(
    ("content", "widths"),
    [
        ({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.nn.Parameter(L)}, "name": "x", "step": 9}, SD),
        ({"<zork>": L}, SD),
        ({**ROWS, "step": 3}, XL),
    ],
)
def test_pickles_are_refused_with_a_command_that_converts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, widths: Mapping[str, int]
) -> None:
    path = tmp_path / "my zork.pt"
    torch.save(content, path)
    with pytest.raises(ConfigError, match="can run code when it is read. Convert it: python -c") as error:
        read(path, widths)
    *_, flag, code, source, target = shlex.split(str(error.value).partition("Convert it: ")[2])
    monkeypatch.setattr(sys, "argv", [flag, source, target])
    exec(code)
    assert f"{CONVERT} zork.pt zork.safetensors" in (DEMO.parents[1] / "docs/models.md").read_text()
    assert torch.equal(read(Path(target), widths)["text_encoder"], L)


# Names in prompts

KNOWN = [Embedding(name, "", 1, {}, "") for name in ("cat", "bad-hands", "bad", "EasyNegative", "v1.5", "été")]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", "a {cat}"),
        ("cat, (cat:1.2) [cat] cat's cat.", "{cat}, ({cat}:1.2) [{cat}] {cat}'s {cat}."),
        ("CAT Cat", "{cat} {cat}"),
        ("embedding:cat, <cat>, (embedding:Cat:1.2)", "{cat}, {cat}, ({cat}:1.2)"),
        ("embedding:cat.pt embedding:cat.safetensors, cat.pt", "{cat} {cat}, {cat}.pt"),
        ("category wildcat cats cat2 cat_2 _cat", "category wildcat cats cat2 cat_2 _cat"),
        ("embedding:category <category> <cat, my-embedding:cat", "embedding:category <category> <{cat}, my-{cat}"),
        ("bad-hands, bad-hand, bad", "{bad-hands}, {bad}-hand, {bad}"),
        ("easynegative EasyNegativeV2", "{EasyNegative} EasyNegativeV2"),
        ("v1.5 v1x5", "{v1.5} v1x5"),
        ("ÉTÉ", "{été}"),
        ("", ""),
    ],
)
def test_names_are_whole_words(prompt: str, expected: str) -> None:
    assert replace_names(prompt, KNOWN, lambda each: f"{{{each.name}}}") == expected
    assert replace_names(prompt, [], lambda each: "?") == prompt


@pytest.mark.parametrize("name", ["zork", "Zork_2", "2zork", "my-zork.v1.5", "été", "z", "x" * 64])
def test_names_that_are_accepted(name: str) -> None:
    assert register(Path("x"), names=(name,))[0].name == name


@pytest.mark.parametrize(
    "name", ["", "a cat", "a,b", "zork\n", "12", "1.5", ".", "-zork", "zork.", "(zork)", "<zork>", "BREAK", "x" * 65, 3]
)
def test_names_that_are_refused(name: Any) -> None:
    with pytest.raises(ConfigError, match=r"handler\.embeddings\[0\]\.name takes one word of at most 64 letters"):
        register(Path("x"), names=(name,))


def test_names_differ_in_more_than_capitals() -> None:
    with pytest.raises(ConfigError, match=r"embeddings\[1\]\.name takes a name that no other embedding has.*'ZORK'"):
        register(Path("x"), Path("y"), names=("zork", "ZORK"))
    with pytest.raises(ConfigError, match=r"handler\.embeddings\[0\]\.path is missing"):
        HandlerConfig.parse({"embeddings": [{"name": "zork"}]})


def test_a_word_of_the_model_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = save({part: torch.ones(1, 128) for part in ROWS}, tmp_path / "star.safetensors")
    load(DEMO, embeddings=register(file, file, names=("Star", "zork")))
    assert [each.getMessage() for each in caplog.records if "embeddings" in each.getMessage()] == [
        "handler.embeddings[0].name: Star is also a word of the model; in prompts it means the embedding"
    ]


# The text encoders


def add_to_diffusers(pipeline: Any, token: str, rows: Mapping[str, torch.Tensor]) -> Any:
    for part, suffix in (("clip_l", ""), ("clip_g", "_2")):
        if part in rows:
            encoder, tokenizer = (getattr(pipeline, kind + suffix) for kind in ("text_encoder", "tokenizer"))
            pipeline.load_textual_inversion(rows[part], token=token, text_encoder=encoder, tokenizer=tokenizer)
    return pipeline


def encode(pipeline: Any, prompt: str) -> list[torch.Tensor]:
    with torch.no_grad():
        encoded = pipeline.encode_prompt(
            prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    return [each for each in encoded if each is not None]


@pytest.mark.parametrize("count", [1, VECTORS])
@pytest.mark.parametrize("size", ["tiny", "tiny-sd"])
def test_text_encoders_give_what_diffusers_gives(
    tiny_model: Path, tiny_sd_model: Path, tmp_path: Path, size: str, count: int
) -> None:
    rows = {part: each[:count] for part, each in ROWS.items()}
    folder = tiny_model
    if size == "tiny-sd":
        folder, rows = tiny_sd_model, {"clip_l": rows["clip_l"]}
    loaded = load(folder, embeddings=register(save(rows, tmp_path / "zork.safetensors")))
    reference = add_to_diffusers(make_pipeline(size), "zork", rows)
    for prompt in ("a zork, red fox", "zork zork", "a red fox", ""):
        found = encode(loaded.pipeline, expand(prompt, loaded.embeddings))
        for one, other in zip(found, encode(reference, prompt), strict=True):
            assert torch.equal(one, other)


def test_the_end_of_a_prompt_is_found_as_in_published_models(tiny_model: Path, tmp_path: Path, file: Path) -> None:
    """Their text encoders name token 2 as the end, and transformers takes the highest token then."""
    pipeline = make_pipeline("tiny")
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        encoder.config.eos_token_id = 2
    save_pipeline(pipeline, tmp_path / "published")
    plain = load(tmp_path / "published")
    assert plain.pipeline.text_encoder_2.config.eos_token_id == 2
    loaded = load(tmp_path / "published", embeddings=register(file))
    right = load(tiny_model, embeddings=register(file))
    prompt = expand("a zork fox", loaded.embeddings)
    assert all(map(torch.equal, encode(loaded.pipeline, prompt), encode(right.pipeline, prompt)))
    assert all(map(torch.equal, encode(loaded.pipeline, "a fox"), encode(plain.pipeline, "a fox")))


@pytest.mark.parametrize("is_compiled", [False, True])
def test_other_prompts_draw_the_same_image(
    tiny_model: Path, cached: dict[str, Any], file: Path, is_compiled: bool
) -> None:
    pt2 = cached if is_compiled else None
    plain, loaded = (load(tiny_model, pt2, embeddings=each, **TEXT_ONLY) for each in (None, register(file)))
    for fields in ({}, {"prompt": "zorks", "negative_prompt": "a Zork_2", "prompt_2": "zo rk"}):
        assert np.array_equal(make_picture(loaded, **fields, **FAST), make_picture(plain, **fields, **FAST))
    assert (make_picture(loaded, prompt="a zork fox", **FAST) != make_picture(plain, prompt="a zork fox", **FAST)).any()
    assert loaded.weights_sha256 != plain.weights_sha256
    if is_compiled:
        for part in XL:
            (with_rows,), (without,) = loaded.parts[part].reports, plain.parts[part].reports
            assert with_rows.weights_sha256 != without.weights_sha256


def test_openvino_draws_the_image_of_eager_pytorch(
    tiny_model: Path, cached: dict[str, Any], named: LoadedPipeline, file: Path
) -> None:
    loaded = load(tiny_model, cached, embeddings=register(file), weighted_prompts=True, **TEXT_ONLY)
    for prompt in ("a Zork fox", f"{LONG}(zork:1.3)"):
        assert np.abs(make_picture(loaded, prompt=prompt) - make_picture(named, prompt=prompt)).max() <= 1
    changed = {part: rows + 1 for part, rows in ROWS.items()}
    other = load(
        tiny_model, cached, embeddings=register(save(changed, file.with_name("other.safetensors"))), **TEXT_ONLY
    )
    assert (make_picture(other, prompt="a zork fox") != make_picture(loaded, prompt="a zork fox")).any()


# Weights and long prompts


def embed(loaded: LoadedPipeline, **fields: Any) -> dict[str, Any]:
    request = expand_prompts(loaded.contract.check({"seed": 1, **fields}), loaded.embeddings)
    pipeline = build_image_pipeline(loaded, request, loaded.functions)
    return embed_prompts(pipeline, request, loaded.family, chunks=choose_chunks(loaded))


def test_a_weight_applies_to_all_vectors_of_a_name(named: LoadedPipeline) -> None:
    whole, heavy, same = (
        embed(named, prompt=each)["prompt_embeds"][0]
        for each in ("a (zork:1.0001)", "a (Zork:2)", "a (embedding:zork:2)")
    )
    empty = embed(named, prompt="()")["prompt_embeds"][0]
    vectors = slice(2, 2 + VECTORS)
    torch.testing.assert_close(heavy[vectors], 2 * whole[vectors] - empty[vectors], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(heavy[2 + VECTORS :], whole[2 + VECTORS :])
    assert torch.equal(heavy, same)


@pytest.mark.parametrize("letters", range(70, 76))
def test_no_chunk_cuts_an_embedding(named: LoadedPipeline, letters: int) -> None:
    """Each letter is a token, and a chunk has 75."""
    found = embed(named, prompt=f"{'a ' * letters}zork {'b ' * 5}")["prompt_embeds"]
    chunk = letters + VECTORS <= 75
    split = f"{'a ' * letters}zork {'b ' * (75 - letters - VECTORS)}BREAK {'b ' * (letters + VECTORS - 70)}"
    expected = embed(named, prompt=split if chunk else f"{'a ' * letters}BREAK zork {'b ' * 5}")["prompt_embeds"]
    assert torch.equal(found, expected)


def test_vectors_count_as_tokens(tiny_model: Path, file: Path) -> None:
    loaded = load(tiny_model, embeddings=register(file))
    for letters, told in ((72, []), (73, ["prompt has 78 tokens; the text encoder reads the first 77"])):
        request = loaded.contract.check({"prompt": f"{'a ' * letters}zork"})
        assert list_warnings(loaded, request) == told


def test_a_registered_name_is_not_foreign(named: LoadedPipeline) -> None:
    request = named.contract.check({"prompt": "embedding:zork, (zork)1.3 embedding:fox", "negative_prompt": "<zork>"})
    (warning,) = list_warnings(named, request)
    assert warning.startswith("prompt: '(Zork)1.3', 'embedding:fox' have no special meaning here")


# Reports


def test_reports(tiny_model: Path, file: Path, tmp_path: Path) -> None:
    second = save({part: rows[:1] for part, rows in ROWS.items()}, tmp_path / "owl.safetensors")
    loaded = load(tiny_model, embeddings=register(file, second))
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (file, second)]
    entries = [
        {"name": name, "sha256": digest, "autov2": digest[:10], "vectors": count}
        for name, digest, count in zip(("Zork", "owl-2"), digests, (VECTORS, 1), strict=True)
    ]
    assert describe_pipeline(loaded)["embeddings"] == entries
    assert [each.widths for each in loaded.embeddings] == [XL, XL]
    for fields, used in (
        ({"prompt": "a zork", "negative_prompt": "OWL-2 and zork"}, entries),
        ({"prompt": "a fox", "negative_prompt_2": "<owl-2>"}, entries[1:]),
        ({"prompt": "a fox zorkowl-2"}, None),
    ):
        request = loaded.contract.check(fields)
        assert describe_image(loaded, request, 0, unet_calls=4)["made_with"].get("embeddings") == used
        assert request.describe()["prompt"] == fields["prompt"]
    for name in ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2"):
        assert loaded.contract.properties[name]["description"].endswith("; it may name the embeddings Zork, owl-2")


# The demonstration model


def test_a_learnt_name_is_drawn() -> None:
    loaded = load(DEMO, embeddings=register(LODESTAR, names=(NAME,)), num_inference_steps=6, guidance_scale=GUIDANCE)
    plain = load(DEMO, num_inference_steps=6, guidance_scale=GUIDANCE)

    def score(pipeline: LoadedPipeline, prompts: Sequence[Prompt]) -> float:
        drawn = [make_picture(pipeline, prompt=each.text, seed=each.seed) for each in prompts]
        return score_pictures(prompts, [Image.fromarray(each.astype(np.uint8)) for each in drawn])["all"]

    prompts = choose_named_prompts(1, ["red", "blue", "black", *UNSEEN])
    assert score(loaded, prompts) >= 0.8
    assert score(plain, prompts[:1]) == 0
    other = choose_prompts(1, seed=3)[0]
    one, same = (make_picture(each, prompt=other.text, seed=1) for each in (loaded, plain))
    assert np.array_equal(one, same)


def test_the_learnt_file_is_small() -> None:
    assert LODESTAR.stat().st_size <= 4096
