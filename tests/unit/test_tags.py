"""A1111's tags of adapters in prompts, and what an empty negative prompt means."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_server.api.native import NativeApi
from sdxl_server.api.openai import OpenAIApi
from sdxl_server.errors import RequestError
from sdxl_server.request.adapters import RegisteredAdapter
from sdxl_server.request.contract import Contract
from tests.unit.pipelines import load, make_picture
from tests.unit.test_request import CONFIG, LIMITS, make_contract

ADAPTERS = {
    "outline": RegisteredAdapter(0.5, 4, {"num_inference_steps": 3}),
    "noir.v2": RegisteredAdapter(1.0, 4, {}),
}


def make(*, adapters: dict[str, RegisteredAdapter] = ADAPTERS, **settings: Any) -> Contract:
    config = dataclasses.replace(CONFIG, **settings)
    return make_contract(dataclasses.replace(LIMITS, config=config, adapters=adapters))


APPLIED, LEFT_OUT = make(lora_tags=True), make()


def name(scale: float, adapter: str = "outline") -> dict[str, Any]:
    return {"name": adapter, "scale": scale}


@pytest.mark.parametrize(
    ("prompt", "words", "adapters"),
    [
        ("a fox <lora:outline:0.8>", "a fox", [name(0.8)]),
        ("a <lora:outline:0.8> fox", "a fox", [name(0.8)]),
        ("<lora:outline> a fox, <lyco:noir.v2:-1>, snow", "a fox,, snow", [name(1.0), name(-1.0, "noir.v2")]),
        ("a fox <LoRA: outline : .5 >", "a fox", [name(0.5)]),
        ("a fox<lora:outline:0.8:0.8><lora:outline:0.8>", "a fox", [name(0.8)]),
        ("a fox <hypernet:x:1>", "a fox", []),
        ("a fox <lora:outline:0.8", "a fox <lora:outline:0.8", []),
        ("a <b> fox <lora>", "a <b> fox <lora>", []),
    ],
)
def test_tags_are_adapters(prompt: str, words: str, adapters: list[dict[str, Any]]) -> None:
    request = APPLIED.check({"prompt": prompt, "seed": 1})
    assert request == APPLIED.check({"prompt": words, "seed": 1, "adapters": adapters})
    assert request.adapters == (tuple(adapters) or None)
    assert request.num_inference_steps == (3 if name(0.8) in adapters or "outline" in str(adapters) else 7)
    left = LEFT_OUT.check({"prompt": prompt, "seed": 1})
    assert (left.prompt, left.adapters) == (words, None)


def test_tags_join_the_field() -> None:
    both = {"prompt": "a fox <lora:outline:0.8>", "prompt_2": "snow <lora:outline:0.8>", "adapters": "noir.v2"}
    request = APPLIED.check(both)
    assert (request.prompt, request.prompt_2) == ("a fox", "snow")
    assert request.adapters == (name(1.0, "noir.v2"), name(0.8))
    assert APPLIED.check({**both, "adapters": [name(0.8)]}).adapters == (name(0.8),)
    negative = APPLIED.check({"prompt": "a fox", "negative_prompt": "blue <lora:outline:0.8>"})
    assert (negative.negative_prompt, negative.adapters) == ("blue", None)
    again = APPLIED.check(json.loads(json.dumps(request.describe())))
    assert again == request


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        (
            {"prompt": "<lora:outlin:1> a"},
            "prompt",
            "prompt names the adapter 'outlin'; the adapters are: outline, noir.v2",
        ),
        ({"prompt": "a", "prompt_2": "<lora:x>"}, "prompt_2", "prompt_2 names the adapter 'x'"),
        ({"prompt": "<lora:> a"}, "prompt", "prompt names the adapter ''"),
        ({"prompt": "<lora:outline:1:0.5> a"}, "prompt", "takes tags with one scale, such as <lora:outline:0.8>, not"),
        ({"prompt": "<lora:outline:much> a"}, "prompt", "takes tags with one scale"),
        ({"prompt": "<lora:outline:nan> a"}, "adapters", "each scale a number from -100 to 100"),
        ({"prompt": "<lora:outline:1e9> a"}, "adapters", "each scale a number from -100 to 100"),
        ({"prompt": "<lora:outline:1> a", "adapters": "outline"}, "adapters", "takes each adapter once"),
        ({"prompt": "<lora:outline:1>"}, "prompt", "prompt takes a text with more than spaces"),
    ],
)
def test_wrong_tags_are_refused_in_a_line(fields: dict[str, Any], param: str, told: str) -> None:
    with pytest.raises(RequestError) as caught:
        APPLIED.check(fields)
    assert (told in str(caught.value), caught.value.param) == (True, param)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("contract", "fields", "warnings"),
    [
        (
            LEFT_OUT,
            {"prompt": "a <lora:outline:0.8>"},
            ["prompt: '<lora:outline:0.8>' left out; name adapters in the field"],
        ),
        (LEFT_OUT, {"prompt": "a", "prompt_2": "b <lyco:x>"}, ["prompt_2: '<lyco:x>' left out; name adapters"]),
        (make(adapters={}), {"prompt": "a <lora:x:1>"}, ["prompt: '<lora:x:1>' left out; this server has no adapters"]),
        (APPLIED, {"prompt": "a <lora:outline:0.8>"}, []),
        (APPLIED, {"prompt": "a <hypernet:x:1>"}, ["prompt: '<hypernet:x:1>' left out"]),
        (
            APPLIED,
            {"prompt": "a", "negative_prompt": "b <lora:outline:1>"},
            ["negative_prompt: '<lora:outline:1>' left out"],
        ),
        (LEFT_OUT, {"prompt": "a < b > c"}, []),
    ],
)
@pytest.mark.parametrize("api", [NativeApi(), OpenAIApi()])
def test_tags_that_are_left_out_are_warned_of(
    api: NativeApi, contract: Contract, fields: dict[str, Any], warnings: list[str]
) -> None:
    body = {"body": json.dumps(fields).encode()}
    found = api.read(body, content_type="application/json", contract=contract)[1]
    assert len(found) == len(warnings)
    assert all(each.startswith(told) for each, told in zip(found, warnings, strict=True))


@pytest.mark.parametrize("fields", [{}, {"negative_prompt_2": ""}, {"negative_prompt": "<lora:x>"}])
def test_an_empty_negative_prompt_is_a_text_or_zeros(tiny_model: Path, fields: dict[str, Any]) -> None:
    text, zeros = (load(tiny_model, empty_negative_prompt=each) for each in ("text", "zeros"))
    empty = {"negative_prompt": "", **fields}
    left_out = make_picture(text)
    assert np.array_equal(make_picture(zeros), left_out)
    assert np.array_equal(make_picture(zeros, **empty), left_out)
    assert not np.array_equal(make_picture(text, **empty), left_out)
    for given in ({"negative_prompt": "blue"}, {"negative_prompt": "", "negative_prompt_2": "blue"}):
        assert np.array_equal(make_picture(zeros, **given), make_picture(text, **given))


def test_an_empty_negative_prompt_with_weights(tiny_model: Path) -> None:
    text, zeros = (load(tiny_model, empty_negative_prompt=each, weighted_prompts=True) for each in ("text", "zeros"))
    fields = {"prompt": "a (red:1.3) fox"}
    assert np.array_equal(make_picture(zeros, negative_prompt="", **fields), make_picture(text, **fields))
    assert not np.array_equal(make_picture(text, negative_prompt="", **fields), make_picture(text, **fields))
