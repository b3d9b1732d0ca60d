"""Bodies of requests: which are a prompt, and what a mistake is told."""

import json

import pytest

from pipeline_utils import GenerationRequest, HandlerConfig, RequestError

CONFIG = HandlerConfig(num_inference_steps=7, guidance_scale=2.5, width=128, height=64)


@pytest.mark.parametrize(
    ("body", "content_type", "prompt"),
    [
        (b"a red fox", "text/plain", "a red fox"),
        (b"a red fox", "", "a red fox"),
        ("ein Füchslein 🦊".encode(), "text/plain; charset=utf-8", "ein Füchslein 🦊"),
        (b'{"prompt": "a red fox"}', "application/json", "a red fox"),
        (b'{"prompt": "a red fox"}', "application/json; charset=utf-8", "a red fox"),
        (b' {"prompt": "a red fox"}', "", "a red fox"),
        (b'{"prompt": "not JSON here"}', "text/plain", '{"prompt": "not JSON here"}'),
    ],
)
def test_prompt_is_read(body: bytes, content_type: str, prompt: str) -> None:
    assert GenerationRequest.parse(body, content_type, CONFIG) == GenerationRequest(prompt, 7, 2.5, 128, 64)


@pytest.mark.parametrize(
    ("body", "content_type", "parts"),
    [
        (b"", "text/plain", ["prompt is empty"]),
        (b" \n", "text/plain", ["prompt is empty"]),
        (b"\xff\xfe", "text/plain", ["not UTF-8", "byte 0 is 0xff"]),
        (b"{", "application/json", ["not JSON"]),
        (b"", "application/json", ["not JSON"]),
        (b"[" * 100_000, "application/json", ["not JSON"]),
        (b'["a red fox"]', "application/json", ["no object"]),
        (b"{}", "application/json", ["prompt is missing"]),
        (b'{"prompt": null}', "application/json", ["prompt takes a text", "None"]),
        (b'{"prompt": ["a"]}', "application/json", ["prompt takes a text", "['a']"]),
        (b'{"prompt": "a", "promt": 1}', "application/json", ["'promt' is not a field", "'prompt'"]),
        (b'{"prompt": "\\ud800"}', "application/json", ["lone surrogate"]),
        (json.dumps({"prompt": "x" * 10_001}).encode(), "application/json", ["10000", "10001"]),
    ],
)
def test_mistake_is_told(body: bytes, content_type: str, parts: list[str]) -> None:
    with pytest.raises(RequestError) as caught:
        GenerationRequest.parse(body, content_type, CONFIG)
    message = str(caught.value)
    assert message.isascii()
    assert message.isprintable()
    for part in parts:
        assert part in message
