"""What a worker counts, against what its clients have counted; ids; and what the log says of steps: nothing."""

import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from sdxl_server.api.metadata import read_metadata
from sdxl_server.request.limits import Limits
from tests.server.eager import LONG, EagerServer, wait_for
from tools.server import ROOT

OUTCOMES = {200: "picture", 400: "refused", 503: "busy", 504: "timeout"}
# TorchServe's about a call of the handler
STEP_LINES = re.compile(r"Flushing req|Looping backend|Backend re|PredictionTime|WorkerThreadTime|HandlerTime")


def ask_for_kind(server: EagerServer, number: int) -> str:
    """Make the request of a number, one in four of them wrong; return the outcome that the client sees."""
    if number % 12 == 5:
        server.leave()
        return "left"
    fields: dict[int, dict[str, Any]] = {3: {"width": 65}, 7: {**LONG, "timeout": 1}}
    answer = server.ask(seed=number, **fields.get(number % 12, {}))
    error = answer.json().get("error") if answer.headers["Content-Type"] == "application/json" else None
    return OUTCOMES[error["code"] if error else answer.status_code]  # the status of a late error was 200


@pytest.mark.parametrize("count", [12, pytest.param(1000, marks=pytest.mark.soak)])
def test_metrics_are_what_clients_have_counted(server: EagerServer, count: int) -> None:
    before = server.wait_until_idle()
    with ThreadPoolExecutor(4) as pool:
        seen = Counter(pool.map(lambda number: ask_for_kind(server, number), range(count)))
    after = server.wait_until_idle()
    names = ("picture", "refused", "busy", "timeout", "failed", "left")
    counted = {name: after[f"sdxl_requests_total {name}"] - before[f"sdxl_requests_total {name}"] for name in names}
    assert counted == {name: seen[name] for name in names}
    assert min(seen["picture"], seen["refused"], seen["timeout"], seen["left"]) > 0
    assert after["sdxl_picture_seconds_count"] - before["sdxl_picture_seconds_count"] == seen["picture"]
    assert after["sdxl_requests_waiting"] == 0


def test_who_leaves_last_is_not_in_flight_for_ever(server: EagerServer) -> None:
    """TorchServe tells of it with the next call only."""
    assert ask_for_kind(server, 5) == "left"
    server.wait_until_idle()
    assert server.ask().status_code == 200


def test_calls_of_the_unet_are_those_that_were_made(server: EagerServer) -> None:
    before = server.wait_until_idle()
    assert server.ask(num_inference_steps=10, unet_calls=6).status_code == 200
    after = server.read_metrics()
    made, skipped = (
        after[name] - before[name] for name in ("sdxl_unet_calls_made_total", "sdxl_unet_calls_skipped_total")
    )
    assert (made, skipped) == (6, 4)
    assert after["sdxl_unet_call_seconds_count"] - before["sdxl_unet_call_seconds_count"] == 6


def test_an_id_is_in_log_answer_and_picture(server: EagerServer) -> None:
    """Through nginx the answer has it too: test_deploy."""
    answer = server.ask({"X-Request-Id": "order-7"}, output_format="png")
    assert read_metadata(answer.content, Limits())["request_id"] == "order-7"
    wait_for(lambda: 'Request: {"id": "order-7", "prompt": "a red fox"' in server.log)
    own = server.ask({"X-Request-Id": "a b"})
    wait_for(lambda: f'Request: {{"id": "{own.headers["X-Request-Id"]}"' in server.log)


def test_nothing_private_is_told(server: EagerServer) -> None:
    assert server.ask({"X-Request-Id": "planted-id"}, prompt="planted prompt").status_code == 200
    assert "planted" not in server.read().text
    assert (server.read("ready").text, server.read("other").status_code) == ("ready\n", 404)


def test_steps_leave_no_lines(server: EagerServer) -> None:
    assert server.ask({"X-Request-Id": "no-lines"}, num_inference_steps=50).status_code == 200
    assert server.ask({"X-Request-Id": "after"}).status_code == 200
    wait_for(lambda: '"after"' in server.log)
    lines = server.log.partition('"no-lines"')[2].partition('"after"')[0].splitlines()
    assert [line for line in lines if STEP_LINES.search(line)] == []
    assert len(lines) < 8, lines


def test_the_dashboard_names_what_there_is(server: EagerServer) -> None:
    text = (ROOT / "deploy/grafana.json").read_text()
    json.loads(text)
    asked = set(re.findall(r"\b(?:sdxl|process)_\w+", text))
    told = {name.split()[0] for name in server.read_metrics()} | set(
        re.findall(r"^# TYPE (\w+)", server.read().text, re.M)
    )
    assert len(asked) > 8
    assert asked <= told
