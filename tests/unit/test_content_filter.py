"""The operator's content filter: what it sees, what it refuses, and its own failures."""

import base64
import importlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdxl_server import metrics
from sdxl_server.api.content_filter import ContentFilter
from sdxl_server.api.http import HttpRequest
from sdxl_server.errors import ConfigError, FlaggedError
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.service import Service, describe_error
from tools.server import ROOT

Check = Callable[[dict[str, Any], Any], Any]
FIELDS = {"prompt": "a fox", "num_inference_steps": 2, "height": 64, "width": 64, "seed": 1}
HOOK: list[Check] = []


def check(fields: dict[str, Any], image: Any) -> Any:
    return HOOK[-1](fields, image)


@pytest.fixture
def send(eager: LoadedPipeline) -> Iterator[Callable[..., bytes]]:
    """Send a request to a service whose filter is the given function; return all that it sends."""

    def run(function: Check, **fields: Any) -> bytes:
        HOOK.append(function)
        service = Service(eager, content_filter=ContentFilter("tests.unit.test_content_filter:check"))
        body = json.dumps({**FIELDS, **fields}).encode()
        steps = service.answer(HttpRequest({"body": body}, content_type="application/json")).steps
        sent = b""
        try:
            while True:
                sent += next(steps) or b""
        except StopIteration as end:
            return sent + bytes(end.value)

    yield run
    HOOK.clear()


def test_it_sees_the_request_then_previews_then_the_image(send: Callable[..., bytes]) -> None:
    upload = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(upload, "png")
    seen: list[tuple[str, Any, Any]] = []
    given = base64.b64encode(upload.getvalue()).decode()
    send(
        lambda fields, image: seen.append((fields["prompt"], fields["image"].size, image and image.size)),
        **{"stream": True, "partial_images": 1, "num_images_per_prompt": 2, "image": given, "strength": 1.0},
    )
    request, *images = seen
    assert request == ("a fox", (64, 64), None)
    assert images == [("a fox", (64, 64), (64, 64))] * 4


def test_a_refused_request_draws_nothing(send: Callable[..., bytes]) -> None:
    images: list[Any] = []

    def refuse(fields: dict[str, Any], image: Any) -> str | None:
        images.append(image)
        return "no foxes here"

    before = metrics.FILTERED._value.get()
    with pytest.raises(FlaggedError, match="the content filter refuses this request: no foxes here") as caught:
        send(refuse)
    assert images == [None]
    assert metrics.FILTERED._value.get() == before + 1
    status, error = describe_error(caught.value, "id", path="v1/images/generations")
    assert (status, error["error"]["code"]) == (400, "content_policy_violation")


@pytest.mark.parametrize("refused", [2, 3], ids=["preview", "image"])
def test_a_refused_image_is_not_sent(send: Callable[..., bytes], refused: int) -> None:
    calls: list[Any] = []

    def refuse(fields: dict[str, Any], image: Any) -> str | None:
        calls.append(image)
        return "no such image" if len(calls) == refused else None

    with pytest.raises(FlaggedError, match="no such image"):
        send(refuse, stream=True, partial_images=1)
    assert len(calls) == refused


@pytest.mark.parametrize("result", [True, 0, ["no"], ZeroDivisionError], ids=str)
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_filter_that_fails_passes_nothing(send: Callable[..., bytes], result: Any, call: int) -> None:
    calls: list[Any] = []

    def fail(fields: dict[str, Any], image: Any) -> Any:
        calls.append(image)
        if len(calls) < call:
            return None
        if isinstance(result, type):
            raise result("with a secret")
        return result

    with pytest.raises(RuntimeError, match="the content filter") as caught:
        send(fail, stream=True, partial_images=1)
    status, error = describe_error(caught.value, "id")
    assert (status, error["error"]["message"]) == (500, "the image failed; the server's log says why")


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("no_such_module:check", "No module named 'no_such_module'"),
        ("json:no_such_function", "no attribute 'no_such_function'"),
        ("json:__doc__", "is no function"),
        ("broken_filter:check", "SyntaxError"),
        ("exiting_filter:check", "OSError"),
    ],
)
def test_a_wrong_filter_ends_the_start(
    place: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_filter.py").write_text("def check(:")
    (tmp_path / "exiting_filter.py").write_text("raise OSError('no words')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="handler.filter takes package.module:function") as caught:
        ContentFilter(place)
    assert reason in str(caught.value)


def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, send: Callable[..., bytes]) -> None:
    shutil.copy(ROOT / "examples/word_list.py", tmp_path)
    (tmp_path / "words.txt").write_text("Wolf\n\nbear trap\nbär\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    example = importlib.import_module("word_list").check
    assert send(example, prompt="a wolfhound in a forest")
    for prompt in ("a WOLF, howling", "ein Bär"):
        with pytest.raises(FlaggedError, match="this server draws nothing with (wolf|bär)"):
            send(example, prompt=prompt)
