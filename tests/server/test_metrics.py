"""What a worker counts, against what its clients have counted; ids; and what the log says of steps: nothing."""

import contextlib
import io
import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.server.test_backends import make_settings
from tools.server import ROOT, LocalServer, find_free_ports, make_archive

OUTCOMES = {200: "picture", 400: "refused", 503: "busy", 504: "timeout"}
# TorchServe's about a call of the handler
STEP_LINES = re.compile(r"Flushing req|Looping backend|Backend re|PredictionTime|WorkerThreadTime|HandlerTime")


class Metered(LocalServer):
    """A server whose worker tells its metrics."""

    def __init__(self, folder: Path, model: Path, **handler: Any) -> None:
        (self.port,) = find_free_ports(1)
        settings = yaml.safe_load(make_settings(None))
        settings["handler"] |= {"metrics_address": f"127.0.0.1:{self.port}", **handler}
        make_archive(folder, model, yaml.safe_dump(settings, sort_keys=False))
        super().__init__(folder)

    def read(self, path: str = "metrics") -> requests.Response:
        return requests.get(f"http://127.0.0.1:{self.port}/{path}", timeout=10)

    def read_metrics(self) -> dict[str, float]:
        """Return each sample by its name and the value of its first label."""
        samples = (each for family in text_string_to_metric_families(self.read().text) for each in family.samples)
        return {" ".join([each.name, *list(each.labels.values())[:1]]): each.value for each in samples}

    def ask(self, headers: dict[str, str] | None = None, **fields: Any) -> requests.Response:
        body = {"prompt": "a red fox", "num_inference_steps": 2, **fields}
        return requests.post(self.url, json=body, headers={**self.get_headers(), **(headers or {})}, timeout=120)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Metered]:
    with Metered(tmp_path_factory.mktemp("server"), tiny_model) as running:
        yield running


def ask_for_kind(server: Metered, number: int) -> str:
    """Make the request of a number, one in four of them wrong; return the outcome that the client sees."""
    if number % 12 == 5:
        with contextlib.suppress(requests.Timeout, requests.ConnectionError):
            headers = server.get_headers()
            body = {"prompt": "a red fox", "num_inference_steps": 150}
            requests.post(server.url, json=body, headers=headers, timeout=(5, 0.3))
            pytest.fail("the client was to leave before the end")
        return "left"
    long = {"num_inference_steps": 150, "num_images_per_prompt": 10, "timeout": 1}
    fields: dict[int, dict[str, Any]] = {3: {"width": 65}, 7: long}
    answer = server.ask(seed=number, **fields.get(number % 12, {}))
    error = answer.json().get("error") if answer.headers["Content-Type"] == "application/json" else None
    return OUTCOMES[error["code"] if error else answer.status_code]  # the status of a late error was 200


def wait_until_idle(server: Metered) -> dict[str, float]:
    deadline = time.monotonic() + 60
    while (read := server.read_metrics())["sdxl_requests_in_flight"]:
        assert time.monotonic() < deadline, "somebody is in flight for ever"
        time.sleep(0.1)
    return read


@pytest.mark.parametrize("count", [12, pytest.param(1000, marks=pytest.mark.soak)])
def test_metrics_are_what_clients_have_counted(server: Metered, count: int) -> None:
    before = server.read_metrics()
    with ThreadPoolExecutor(4) as pool:
        seen = Counter(pool.map(lambda number: ask_for_kind(server, number), range(count)))
    after = wait_until_idle(server)
    names = ("picture", "refused", "busy", "timeout", "failed", "left")
    counted = {name: after[f"sdxl_requests_total {name}"] - before[f"sdxl_requests_total {name}"] for name in names}
    assert counted == {name: seen[name] for name in names}
    assert min(seen["picture"], seen["refused"], seen["timeout"], seen["left"]) > 0
    assert after["sdxl_picture_seconds_count"] - before["sdxl_picture_seconds_count"] == seen["picture"]
    assert after["sdxl_requests_waiting"] == 0


def test_who_leaves_last_is_not_in_flight_for_ever(server: Metered) -> None:
    """TorchServe tells of it with the next call only."""
    assert ask_for_kind(server, 5) == "left"
    wait_until_idle(server)
    assert server.ask().status_code == 200


def test_calls_of_the_unet_are_those_that_were_made(server: Metered) -> None:
    before = server.read_metrics()
    assert server.ask(num_inference_steps=10, unet_calls=6).status_code == 200
    after = server.read_metrics()
    made, skipped = (
        after[name] - before[name] for name in ("sdxl_unet_calls_made_total", "sdxl_unet_calls_skipped_total")
    )
    assert (made, skipped) == (6, 4)
    assert after["sdxl_unet_call_seconds_count"] - before["sdxl_unet_call_seconds_count"] == 6


def test_an_id_is_in_log_answer_and_picture(server: Metered) -> None:
    """Through nginx the answer has it too: test_deploy."""
    answer = server.ask({"X-Request-Id": "order-7"}, output_format="png")
    with Image.open(io.BytesIO(answer.content)) as picture:
        assert json.loads(picture.text["parameters"])["request_id"] == "order-7"  # type: ignore[attr-defined]
    assert 'Request: {"id": "order-7", "prompt": "a red fox"' in server.log
    own = server.ask({"X-Request-Id": "a b"})
    assert f'Request: {{"id": "{own.headers["X-Request-Id"]}"' in server.log


def test_nothing_private_is_told(server: Metered) -> None:
    assert server.ask({"X-Request-Id": "planted-id"}, prompt="planted prompt").status_code == 200
    assert "planted" not in server.read().text
    assert (server.read("ready").text, server.read("other").status_code) == ("ready\n", 404)


def test_steps_leave_no_lines(server: Metered) -> None:
    before = len(server.log)
    assert server.ask(num_inference_steps=50).status_code == 200
    lines = server.log[before:].splitlines()
    assert [line for line in lines if STEP_LINES.search(line)] == []
    assert len(lines) < 8, lines


def test_the_dashboard_names_what_there_is(server: Metered) -> None:
    text = (ROOT / "deploy/grafana.json").read_text()
    json.loads(text)
    asked = set(re.findall(r"\b(?:sdxl|process)_\w+", text))
    told = {name.split()[0] for name in server.read_metrics()} | set(
        re.findall(r"^# TYPE (\w+)", server.read().text, re.M)
    )
    assert len(asked) > 8
    assert asked <= told
