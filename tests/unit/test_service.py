"""A service with a real pipeline: steps run in a thread, and each image is sent when it is finished."""

import base64
import dataclasses
import io
import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdxl_server import service
from sdxl_server.api.http import HttpRequest, Response
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.service import Service
from tests.unit.pipelines import load

SLOW_SECONDS = 0.5


@pytest.fixture(scope="module")
def eager(tiny_model: Path) -> LoadedPipeline:
    return load(tiny_model, num_inference_steps=2, width=64, height=64, preview="exact")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "PAUSE_SECONDS", 0.05)


def slow_down(loaded: LoadedPipeline, part: str) -> LoadedPipeline:
    """Return a pipeline whose calls of one part take longer."""
    run = loaded.functions[part]

    def run_slowly(*inputs: Any, **options: Any) -> Any:
        time.sleep(SLOW_SECONDS)
        return run(*inputs, **options)

    return dataclasses.replace(loaded, functions={**loaded.functions, part: run_slowly})


def answer(loaded: LoadedPipeline, *, path: str = "", **fields: Any) -> Response:
    body = json.dumps({"prompt": "a red fox", "seed": 1, **fields}).encode()
    request = HttpRequest({"body": body}, path=path, content_type="application/json", accept="application/json")
    return Service(loaded).answer(request)


def list_replies(response: Response) -> Iterator[bytes | None]:
    """Yield what the handler gets from each call, with the last."""
    last = yield from response.steps
    yield last


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder", "vae_encoder"])
def test_a_long_computation_leaves_the_handler_free(eager: LoadedPipeline, part: str) -> None:
    """Its calls return now and then, so that every client hears from the server. The image stays the same."""
    image = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(image, "PNG")
    fields = {"image": base64.b64encode(image.getvalue()).decode()} if part == "vae_encoder" else {}
    quick = b"".join(each or b"" for each in list_replies(answer(eager, **fields)))
    before, pauses, sent = time.monotonic(), [], []
    for reply in list_replies(answer(slow_down(eager, part), **fields)):
        pauses.append(time.monotonic() - before)
        before = time.monotonic()
        sent.append(reply)
    assert sent.count(None) >= SLOW_SECONDS / 0.05 / 2
    assert sorted(pauses)[-2] < SLOW_SECONDS / 2  # a busy machine can make one of them longer
    assert json.loads(b"".join(each or b"" for each in sent))["data"] == json.loads(quick)["data"]


def test_a_computation_that_hangs_is_left_to_torchserve(eager: LoadedPipeline) -> None:
    """After `patience` seconds a call of the handler lasts as long as the computation."""
    slow = Service(slow_down(eager, "vae"), patience=0.2)
    body = json.dumps({"prompt": "a red fox"}).encode()
    replies = list_replies(slow.answer(HttpRequest({"body": body}, content_type="application/json")))
    before, longest = time.monotonic(), 0.0
    for _ in replies:
        longest, before = max(longest, time.monotonic() - before), time.monotonic()
    assert longest > SLOW_SECONDS / 2


def test_each_image_is_sent_when_it_is_finished(eager: LoadedPipeline) -> None:
    response = answer(eager, num_images_per_prompt=3)
    sent, counts = b"", []
    for reply in list_replies(response):
        sent += reply or b""
        counts.append((response.images, sent.count(b'"b64_json"')))
    assert {shown for _, shown in counts} == {0, 1, 2, 3}
    assert all(images == shown for images, shown in counts)
    assert [each["seed"] for each in json.loads(sent)["data"]] == [1, 2, 3]


@pytest.mark.parametrize("path", ["", "v1/images/generations"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("failing", [0, 2])
def test_an_error_follows_the_finished_images(eager: LoadedPipeline, path: str, stream: bool, failing: int) -> None:
    """A failure in the third of three images loses that one alone."""
    run, calls = eager.functions["unet"], iter(range(9))

    def fail(*inputs: Any, **options: Any) -> Any:
        if next(calls) // 2 == failing:
            raise TimeoutError("planted")
        return run(*inputs, **options)

    broken = dataclasses.replace(eager, functions={**eager.functions, "unet": fail})
    response = answer(broken, path=path, num_images_per_prompt=3, stream=stream)
    parts: list[bytes | None] = []
    with pytest.raises(TimeoutError, match="planted") as failed:
        parts.extend(list_replies(response))
    (_, error), sent = service.describe_error(failed.value, "id"), b"".join(each or b"" for each in parts)
    sent += response.api.write_failure(error, kind=response.content_type, images=response.images)
    assert response.images == failing
    if stream:
        assert sent.count(b".completed\ndata") == failing
        assert sent.rsplit(b"\n\n", 2)[-2].startswith(b"event: error\n")
    else:
        document = json.loads(sent)
        assert len(document.get("data", [])) == failing
        assert document["error"]["type"] == "timeout_error"


def test_a_failed_preview_costs_no_image(eager: LoadedPipeline, caplog: pytest.LogCaptureFixture) -> None:
    """The exact preview is the VAE's first call."""
    run, calls = eager.functions["vae"], iter(range(9))

    def fail_once(*inputs: Any, **options: Any) -> Any:
        if not next(calls):
            raise RuntimeError("out of memory")
        return run(*inputs, **options)

    broken = dataclasses.replace(eager, functions={**eager.functions, "vae": fail_once})
    with caplog.at_level(logging.INFO):
        sent = b"".join(each or b"" for each in list_replies(answer(broken, stream=True, partial_images=1)))
    assert (sent.count(b"partial_image\n"), sent.count(b".completed\ndata")) == (0, 1)
    assert "A preview failed" in caplog.text
    assert "out of memory" in caplog.text
    assert "client has left" not in caplog.text


def test_a_client_that_leaves_during_a_long_step_ends_the_work(eager: LoadedPipeline) -> None:
    """The step ends; the next one does not begin. Another request is drawn afterwards."""
    calls, entered = [], threading.Event()

    def run(*inputs: Any, **options: Any) -> Any:
        calls.append(1)
        entered.set()
        time.sleep(SLOW_SECONDS)
        return eager.functions["unet"](*inputs, **options)

    drawing = Service(dataclasses.replace(eager, functions={**eager.functions, "unet": run}))
    body = json.dumps({"prompt": "a red fox", "num_inference_steps": 4}).encode()
    request = HttpRequest({"body": body}, content_type="application/json")
    steps = drawing.answer(request).steps
    assert next(steps) is None
    assert entered.wait(5)
    steps.close()
    *_, last = list_replies(drawing.answer(request))
    assert last is not None
    assert last.startswith(b"\xff\xd8")
    assert len(calls) == 1 + 4


def test_time_of_another_requests_step_does_not_count(eager: LoadedPipeline) -> None:
    """A request waits for the step of a client that has left. Its own timeout has not begun."""
    calls, entered = [], threading.Event()

    def run(*inputs: Any, **options: Any) -> Any:
        calls.append(1)
        entered.set()
        if len(calls) == 1:
            time.sleep(4 * SLOW_SECONDS)
        return eager.functions["unet"](*inputs, **options)

    drawing = Service(dataclasses.replace(eager, functions={**eager.functions, "unet": run}))
    body = json.dumps({"prompt": "a red fox", "timeout": 1}).encode()
    request = HttpRequest({"body": body}, content_type="application/json")
    left = drawing.answer(request).steps
    next(left)
    assert entered.wait(5)
    left.close()
    response, before = drawing.answer(request), time.monotonic()
    *_, last = list_replies(response)
    assert last is not None
    assert last.startswith(b"\xff\xd8")
    assert response.seconds["inference"] < time.monotonic() - before - SLOW_SECONDS
