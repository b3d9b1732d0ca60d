"""What clients get when an image fails or takes long: no wrong image, no lost image, no long silence."""

import io
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest
import requests
from PIL import Image

from tests.openai_clients import RECORDED, ReportedError
from tests.server import slow_handler
from tests.server.eager import wait_for
from tests.server.test_backends import make_settings
from tests.spoiled import spoil_model
from tools.server import LocalServer, make_archive

FIRST = {"num_inference_steps": 1}  # the spoiled model fails at this step's timestep, 1
LATER = {"num_inference_steps": 4}  # it fails at the third
GOOD = {"num_inference_steps": 4, "denoising_end": 0.5}  # ends before
TOLD = "holds numbers that are not finite"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("server")
    spoiled = spoil_model(tiny_model, folder / "tiny", "late")
    make_archive(folder, spoiled, make_settings(None, warm_up=False), handler=Path(slow_handler.__file__))
    with LocalServer(folder) as running:
        worker = running.find_worker()
        yield running
        assert running.find_worker() == worker


def ask(server: LocalServer, path: str = "", **fields: Any) -> requests.Response:
    body = {"prompt": "a red fox", "seed": 7, **fields}
    return requests.post(f"{server.url}{path}", json=body, headers=server.get_headers(), timeout=60)


@pytest.mark.parametrize("path", ["", "/1.0/v1/images/generations"])
@pytest.mark.parametrize("fields", [{}, {"stream": True, "partial_images": 1}, {"output_format": "png"}])
def test_the_first_step_fails_with_status_500(server: LocalServer, path: str, fields: dict[str, Any]) -> None:
    told = server.log.count("seed 7 failed in step 1")
    answer = ask(server, path, **fields, **FIRST)
    assert (answer.status_code, answer.headers["Content-Type"]) == (500, "application/json")
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == (None if path else 500, "server_error")
    assert error["message"] == f"the image of seed 7 failed in step 1: the UNet's output {TOLD}"
    wait_for(lambda: server.log.count(error["message"]) > told)  # TorchServe writes its log later


@pytest.mark.parametrize("path", ["", "/1.0/v1/images/generations"])
def test_a_later_step_ends_the_answer_with_the_error(server: LocalServer, path: str) -> None:
    plain = ask(server, path, **LATER)
    assert plain.status_code == 200  # sent after the first step
    code = None if path else 500
    assert (plain.json()["error"]["code"], "data" in plain.json()) == (code, False)
    assert "seed 7 failed in step 3" in plain.json()["error"]["message"]
    name, data = re.findall(r"event: (\S+)\ndata: (.+)\n\n", ask(server, path, stream=True, **LATER).text)[-1]
    assert (name, json.loads(data)["error"]["code"]) == ("error", code)
    second = ask(server, path, **LATER, num_images_per_prompt=2)
    assert "seed 7 failed" in second.json()["error"]["message"]


def make_red() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    return buffer.getvalue()


def get_pictures(server: LocalServer, client: str, more: dict[str, Any]) -> Any:
    """Send a client's recorded body, with more fields, and read the answer as the client does."""
    recorded = RECORDED[client]
    token = server.get_headers()["Authorization"].removeprefix("Bearer ")
    fields = {**recorded.fields, **more}
    if recorded.takes_sdk:
        with openai.OpenAI(base_url=f"{server.url}/1.0/v1", api_key=token, max_retries=0) as sdk:
            made = sdk.images.generate(prompt=fields.pop("prompt"), extra_body=fields)
        return recorded.read(made.model_dump())
    files = {name: ("image.png", make_red(), "image/png") for name in recorded.files}
    sent: Any = {"data": fields, "files": files} if files else {"json": fields}
    answer = requests.post(f"{server.url}/1.0/{recorded.path}", **sent, headers=server.get_headers(), timeout=60)
    answer.raise_for_status()  # as aiohttp, axios and the SDKs do
    return recorded.read(answer.json())


TOLD_BY: dict[str, tuple[type[Exception], str]] = {
    "LangChain": (TypeError, "'NoneType' object is not iterable"),
    "LibreChat's edit": (ReportedError, "No image data"),
    "LiteLLM": (ReportedError, TOLD),
    "LiteLLM's edit": (pydantic.ValidationError, "valid integer"),
    "OpenAI's SDK for Python": (TypeError, "'NoneType' object is not iterable"),
}


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # of a time that is none
@pytest.mark.parametrize("client", RECORDED)
def test_clients_report_a_failure(server: LocalServer, client: str) -> None:
    """And no client takes it for an answer without pictures."""
    strength = {"strength": 1.0} if RECORDED[client].files else {}
    assert len(get_pictures(server, client, {**GOOD, **strength})) >= 1
    with pytest.raises((requests.HTTPError, openai.InternalServerError), match="500"):
        get_pictures(server, client, {**FIRST, **strength})
    kind, message = TOLD_BY.get(client, (KeyError, "'data'"))
    with pytest.raises(kind, match=message):
        get_pictures(server, client, {**LATER, **strength})


def test_official_sdk_tells_the_error(server: LocalServer) -> None:
    token = server.get_headers()["Authorization"].removeprefix("Bearer ")
    with openai.OpenAI(base_url=f"{server.url}/1.0/v1", api_key=token, max_retries=0) as sdk:
        with pytest.raises(openai.InternalServerError, match=TOLD):
            sdk.images.generate(prompt="a red fox", extra_body=FIRST)
        with pytest.raises(openai.APIError, match=TOLD):
            list(sdk.images.generate(prompt="a red fox", stream=True, extra_body=LATER))
        made = sdk.images.generate(prompt="a red fox", extra_body=LATER)
        assert made.data is None  # not an empty list: whoever reads pictures from it gets a TypeError
        assert TOLD in made.error["message"]  # type: ignore[attr-defined]
        with pytest.raises(openai.APIError, match=TOLD):
            list(sdk.images.edit(prompt="a fox", image=make_red(), stream=True, extra_body={**LATER, "strength": 1.0}))


def test_no_client_meets_silence_while_an_image_is_decoded(server: LocalServer) -> None:
    """Neither the client of that image nor one that waits behind it. Proxies give up after 60 s."""
    heard: dict[str, tuple[float, bytes]] = {}

    def listen(name: str, **fields: Any) -> None:
        body = {"prompt": "a red fox", "width": slow_handler.SLOW_WIDTH, **GOOD, **fields}
        headers = {**server.get_headers(), "Accept": "application/json"}
        with requests.post(server.url, json=body, headers=headers, stream=True, timeout=60) as answer:
            before, longest, parts = time.monotonic(), 0.0, []
            for part in answer.iter_content(None):
                longest, before = max(longest, time.monotonic() - before), time.monotonic()
                parts.append(part)
        heard[name] = longest, b"".join(parts)

    kinds: dict[str, dict[str, Any]] = {"events": {"stream": True}, "json": {}, "behind": {"width": 64}}
    clients = [threading.Thread(target=listen, args=(name,), kwargs=fields) for name, fields in kinds.items()]
    for each in clients:
        each.start()
        time.sleep(0.2)
    for each in clients:
        each.join()
    assert max(longest for longest, _ in heard.values()) < 7, heard
    assert b".completed\ndata" in heard["events"][1]
    assert all(len(json.loads(heard[name][1])["data"]) == 1 for name in ("json", "behind"))
