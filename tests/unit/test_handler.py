"""TorchServe's protocol: `handle` called with made contexts, on a service whose steps each test writes."""

import codecs
import json
import runpy
import shutil
import socket
import sys
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import requests
from ts.utils.util import PredictionException

from sdxl_server import __version__
from sdxl_server.api import native
from sdxl_server.api.http import HttpRequest, Response, find_header
from sdxl_server.api.native import NativeApi
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.diffusion.previews import choose_preview_steps
from sdxl_server.errors import ConfigError, RequestError, VersionError
from sdxl_server.metrics import serve_metrics
from sdxl_server.service import load_service
from sdxl_server.serving.queue import Queue
from stable_diffusion_handler import MADE_FOR, StableDiffusionHandler
from tools.server import ROOT, read_shipped

KINDS = {"json": native.JSON, "events": native.EVENTS}


class Context:
    """The context that TorchServe passes for the requests of one call."""

    model_name = "diffusion_fast"
    path = ""

    def __init__(self, *ids: str, grpc: str = "") -> None:
        self.request_ids = dict(enumerate(ids))
        self.grpc = grpc
        self.statuses: dict[int, int] = {}
        self.headers: dict[int, dict[str, str]] = {index: {} for index in self.request_ids}
        self.stopping_criteria: list[Any] = []

    def get_request_id(self, index: int) -> str:
        return self.request_ids[index]

    def get_all_request_header(self, index: int) -> dict[str, Any]:
        given = (
            {"Content-Type": "application/json", "url_path": self.path} if self.request_ids[index] != self.grpc else {}
        )
        return {"body": {"content-type": ""}, **given}

    def set_response_status(self, code: int, phrase: str, index: int) -> None:
        self.statuses[index] = code

    def set_response_content_type(self, index: int, value: str) -> None:
        self.headers[index]["content-type"] = value

    def set_response_header(self, index: int, name: str, value: str) -> None:
        self.headers[index][name] = value


class Service:
    """Answers the body `n` with n steps, and fails as the body asks."""

    def __init__(self) -> None:
        self.closed: list[str] = []
        self.pieces = [b"end"]

    def answer(self, call: HttpRequest) -> Response:
        body = call.values["body"].decode()
        if body == "wrong":
            raise RequestError("width is wrong", param="width")
        kind, _, steps = body.rpartition(" in ")
        waits = steps != "document"
        made = self.make_steps(steps if waits else "1")
        return Response(KINDS.get(kind, "image/jpeg"), {"X-Seed": "7"}, NativeApi(), made, waits=waits)

    def make_steps(self, body: str) -> Generator[bytes, None, bytes]:
        try:
            if body == "fails at once":
                raise TimeoutError("too late")
            for step in range(1, 2 if "fails" in body else int(body)):
                yield f"step {step} ".encode()
            if body == "fails later":
                raise ZeroDivisionError("planted")
            yield from self.pieces[:-1]
            return self.pieces[-1]
        finally:
            self.closed.append(body)


def make_handler(*, is_continuous: bool = True, max_running: int = 3) -> StableDiffusionHandler:
    handler = StableDiffusionHandler()
    handler.is_continuous = is_continuous
    handler.service = Service()  # type: ignore[assignment]
    handler.finished, handler.described = set(), set()
    handler.queue = Queue(max_running=max_running, max_waiting=5)
    handler.log_times = lambda response: None  # type: ignore[method-assign]
    return handler


LEFT_OUT = b"left out: TorchServe sends it again"


def call(handler: StableDiffusionHandler, *, grpc: str = "", **bodies: str) -> tuple[list[bytes], list[Any], Context]:
    """Make one call for requests by their id; return the bodies, what TorchServe makes of them, and the context."""
    context = Context(*bodies, grpc=grpc)
    replies = handler.handle([{"body": body.encode()} for body in bodies.values()], context)
    assert len(replies) == len(bodies)  # TorchServe takes nothing else
    sent = [body if index in context.request_ids else LEFT_OUT for index, body in enumerate(replies)]
    return sent, [criterion(None) for criterion in context.stopping_criteria], context


def test_a_request_goes_one_step_a_call() -> None:
    handler = make_handler()
    replies, states, context = call(handler, a="3")
    assert (replies, states) == ([b"step 1 "], [False])
    assert context.headers == {0: {"content-type": "image/jpeg", "X-Seed": "7"}}
    assert call(handler, a="3")[:2] == ([b"step 2 "], [False])
    assert call(handler, a="3")[:2] == ([b"end"], [True])
    assert handler.queue.requests == {}


def test_headers_are_set_when_the_response_begins() -> None:
    """TorchServe sends the headers of that call. Another call has another context."""
    handler, told = make_handler(), {"content-type": "image/jpeg", "X-Seed": "7"}
    assert call(handler, a="3", b="2", c="json in 9", d="9")[2].headers == {0: told, 1: {}, 2: {}, 3: told}
    assert call(handler, a="3", b="2", c="json in 9", d="9")[2].headers == {0: {}, 1: told, 2: {}, 3: {}}
    *_, context = call(handler, a="3", b="2", c="json in 9", d="9")
    assert context.headers[2] == {**told, "content-type": "application/json"}


def test_the_oldest_is_finished_first_and_a_new_one_makes_its_first_step() -> None:
    handler = make_handler()
    assert call(handler, a="3")[:2] == ([b"step 1 "], [False])
    assert call(handler, a="3", b="2", c="9")[:2] == ([b"step 2 ", b"step 1 ", LEFT_OUT], [False, False, False])
    assert call(handler, a="3", b="2", c="9")[:2] == ([b"end", b"", b"step 1 "], [True, False, False])
    assert call(handler, b="2", c="9")[:2] == ([b"end", b""], [True, False])
    assert call(handler, c="9")[:2] == ([b"step 2 "], [False])


def test_a_client_that_leaves_gives_up_its_place() -> None:
    """TorchServe checks the connections after each reply. The next call lacks clients that have left."""
    handler = make_handler()
    call(handler, a="99")
    replies = call(handler, a="99", **{f"left-{i}": "9" for i in range(7)})[0]
    assert replies == [b"step 2 ", b"step 1 ", LEFT_OUT, *[b""] * 5]  # an empty reply begins a picture's response
    assert call(handler, a="99", **{"left-1": "9"}, other="2")[0] == [b"step 3 ", b"step 1 ", LEFT_OUT]
    assert call(handler, a="99", other="2")[0] == [b"step 4 ", b"step 1 "]
    assert handler.service.closed == ["9", "9"]  # type: ignore[attr-defined]  # the others had not begun
    assert list(handler.queue.requests) == ["a", "other"]


def test_the_queue_is_first_come_first_served_and_reports_positions() -> None:
    handler = make_handler()
    bodies = {"a": "3", "b": "events in 2", "c": "2", "d": "json in 2", "e": "events in 2"}
    assert call(handler, **bodies)[0] == [b"step 1 ", LEFT_OUT, LEFT_OUT, b" ", queue_event(4)]
    assert call(handler, **bodies)[0] == [b"step 2 ", b"step 1 ", LEFT_OUT, b"", b""]
    assert call(handler, **bodies)[:2] == (
        [b"end", b"", b"step 1 ", b" ", queue_event(3)],
        [True, False, False, False, False],
    )
    del bodies["a"]
    assert call(handler, **bodies)[0] == [b"end", b"", b"step 1 ", queue_event(2)]
    del bodies["b"]
    assert call(handler, **bodies)[0] == [b"end", b"", b"step 1 "]
    del bodies["c"]
    assert call(handler, **bodies)[:2] == ([b"end", b""], [True, False])
    assert call(handler, e=bodies["e"])[:2] == ([b"end"], [True])


def queue_event(place: int) -> bytes:
    return native.format_event("queue", {"place": place})


def test_a_full_queue_refuses_at_once() -> None:
    """The queue goes on, and a document does not wait."""
    handler = make_handler()
    bodies = {f"id-{i}": "2" for i in range(8)}
    replies, states, context = call(handler, **bodies, late="2", wrong="wrong", document="document")
    assert states == [*[False] * 8, None, None, False]
    assert (context.statuses, context.headers[8]["Retry-After"]) == ({8: 503, 9: 400}, "5")
    assert json.loads(replies[8])["error"]["type"] == "server_busy"
    assert (replies[10], list(handler.queue.requests)) == (b"end", list(bodies))
    assert call(handler, **bodies, document="document")[1][-1] is True


def test_a_wait_is_never_silent_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """White space before JSON, and comments in streams, before and during a request's own steps."""
    handler = make_handler()
    monkeypatch.setattr("sdxl_server.serving.queue.KEEP_ALIVE_SECONDS", 0.0)
    handler.service.make_steps = make_silent_steps  # type: ignore[attr-defined]
    bodies = {"a": "json in 3", "b": "picture in 3", "c": "events in 3"}
    assert call(handler, **bodies)[0] == [b" ", LEFT_OUT, LEFT_OUT]
    assert call(handler, **bodies)[0] == [b" ", b"", LEFT_OUT]
    assert call(handler, **bodies)[0] == [b"end", b"", b":\n\n"]
    del bodies["a"]
    assert call(handler, **bodies)[0] == [b"", queue_event(1)]
    assert call(handler, **bodies)[0] == [b"end", b":\n\n"]


def test_a_long_first_step_holds_the_status_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON and events begin then, so that no proxy gives up. An image file waits on, and can still have an error."""
    handler = make_handler()
    handler.service.make_steps = make_long_step  # type: ignore[attr-defined]
    for _ in range(3):
        assert call(handler, a="json in fails")[0] == [LEFT_OUT]
    monkeypatch.setattr("sdxl_server.serving.queue.HOLD_SECONDS", 0.0)
    assert call(handler, a="json in fails")[0] == [b" "]
    assert call(handler, a="json in fails")[0] == [b""]
    handler = make_handler()
    handler.service.make_steps = make_long_step  # type: ignore[attr-defined]
    for _ in range(5):
        assert call(handler, a="fails")[0] == [LEFT_OUT]
    replies, states, context = call(handler, a="fails")
    assert (states, context.statuses) == ([None], {0: 504}), replies


def test_no_step_begins_while_a_long_one_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that waits gets its keep-alives, and a document its answer. The next step follows at once."""
    monkeypatch.setattr("sdxl_server.serving.queue.KEEP_ALIVE_SECONDS", 0.0)
    handler = make_handler(max_running=2)
    call(handler, a="3", b="events in 2")  # a step of a
    assert call(handler, a="3", b="events in 2")[0] == [b"step 2 ", b"step 1 "]
    handler.queue.requests["a"].response.steps = make_long_step("2")
    bodies = {"a": "3", "b": "events in 2", "c": "json in 1", "d": "document"}
    assert call(handler, **bodies)[0] == [b"", queue_event(1), b" ", b"end"]
    del bodies["d"]
    for _ in range(4):
        assert call(handler, **bodies)[0] == [b"", b":\n\n", b" "]
    assert call(handler, **bodies)[:2] == ([b"end", b":\n\n", b"end"], [True, False, True])
    assert call(handler, b="events in 2")[:2] == ([b"end"], [True])


def test_a_client_that_leaves_during_a_long_step_makes_room() -> None:
    handler = make_handler()
    handler.service.make_steps = make_long_step  # type: ignore[attr-defined]
    assert call(handler, a="2", b="2")[0] == [LEFT_OUT, LEFT_OUT]
    for _ in range(5):
        assert call(handler, b="2")[0] == [LEFT_OUT]
    assert call(handler, b="2")[0] == [b"end"]


def make_long_step(body: str) -> Generator[bytes | None, None, bytes]:
    for _ in range(5):
        yield None
    if body == "fails":
        raise TimeoutError("too late")
    return b"end"


def make_silent_steps(body: str) -> Generator[bytes, None, bytes]:
    for _ in range(int(body) - 1):
        yield b""
    return b"end"


@pytest.mark.parametrize(("kind", "start"), [("json", b"{"), ("events", b"event: error\ndata: {"), ("picture", b"{")])
def test_an_error_after_a_wait_stands_in_the_body(kind: str, start: bytes) -> None:
    """The status was sent before, so the error holds the code."""
    handler = make_handler(max_running=1)
    call(handler, a="2", b=f"{kind} in fails at once")
    replies, states, context = call(handler, a="2", b=f"{kind} in fails at once")
    assert (replies[0], states, context.statuses) == (b"end", [True, True], {})
    assert replies[1].startswith(start)
    assert json.loads(replies[1].removeprefix(start.removesuffix(b"{")))["error"]["code"] == 504


def test_a_piece_of_an_answer_is_not_followed_by_white_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base64 that is cut by one is no base64."""
    handler = make_handler()
    monkeypatch.setattr("sdxl_server.serving.queue.KEEP_ALIVE_SECONDS", 0.0)
    call(handler, a="9", b="json in 2")
    call(handler, a="9", b="json in 2")
    handler.queue.requests["b"].response.may_pause = False  # as the service has it where a piece is not the last
    assert call(handler, a="9", b="json in 2")[0] == [b"step 3 ", b""]


def test_the_oldest_leaves() -> None:
    handler = make_handler()
    call(handler, a="5")
    call(handler, a="5", b="3")
    assert call(handler, b="3", c="2")[:2] == ([b"step 2 ", b"step 1 "], [False, False])
    assert handler.service.closed == ["5"]  # type: ignore[attr-defined]


def test_mistakes_do_not_wait() -> None:
    handler = make_handler()
    call(handler, a="5")
    replies, told, context = call(handler, a="5", b="wrong", c="wrong", d="3", e="wrong")
    assert told == [False, None, None, False, None]
    assert context.statuses == {1: 400, 2: 400, 4: 400}
    assert replies[3] == b"step 1 "


def test_an_end_in_the_first_call_is_sent_before_the_end_of_the_response() -> None:
    handler = make_handler()
    assert call(handler, a="1", b="2")[:2] == ([b"end", LEFT_OUT], [False, False])
    assert call(handler, a="1", b="2")[:2] == ([b"", b"step 1 "], [True, False])
    assert call(handler, b="2")[:2] == ([b"end"], [True])
    assert call(handler, b="2")[:2] == ([b"step 1 "], [False])  # an id may come again


def test_a_grpc_call_alone_gets_a_status() -> None:
    with pytest.raises(PredictionException) as caught:
        call(make_handler(), grpc="a", a="3")
    assert (caught.value.error_code, "ask over HTTP" in caught.value.message) == (501, True)


@pytest.mark.parametrize("is_continuous", [True, False])
def test_a_grpc_call_next_to_others_gets_an_error(is_continuous: bool) -> None:
    """It has the header for the last piece of a stream. TorchServe ends a worker that omits it."""
    handler = make_handler(is_continuous=is_continuous)
    if is_continuous:
        call(handler, a="2")
    replies, states, context = call(handler, a="2", b="wrong", grpc="b")
    assert replies[0] == (b"end" if is_continuous else b"step 1 end")
    assert json.loads(replies[1])["error"]["code"] == 501
    assert (context.headers[1]["ts_stream_next"], states) == ("false", [True, True] if is_continuous else [])


@pytest.mark.parametrize("path", ["v1/images/generations", "v1/images/edits", "v1/models/x"])
def test_an_error_on_openais_paths_has_no_number(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Typed clients read `code` as a text or null."""
    monkeypatch.setattr(Context, "path", path)
    handler = make_handler()
    bodies = {"wrong": "wrong", "fails": "fails at once", **{f"id-{i}": "2" for i in range(8)}, "late": "2"}
    replies, _, context = call(handler, **bodies)
    assert context.statuses == {0: 400, 1: 504, 10: 503}
    assert [json.loads(replies[index])["error"]["code"] for index in context.statuses] == [None] * 3
    begun = make_handler()
    call(begun, a="json in fails later")
    error = json.loads(call(begun, a="json in fails later")[0][0])["error"]
    assert (error["code"], error["type"]) == (None, "server_error")
    whole = make_handler(is_continuous=False)
    replies, _, context = call(whole, a="fails later")
    assert (json.loads(replies[0])["error"]["code"], context.statuses) == (None, {0: 500})


@pytest.mark.parametrize(("body", "code"), [("wrong", 400), ("fails at once", 504)])
def test_an_error_before_the_beginning_is_an_answer_of_its_own(body: str, code: int) -> None:
    handler = make_handler()
    call(handler, a="3")
    replies, states, context = call(handler, a="3", b=body)
    assert (replies[0], states) == (b"step 2 ", [False, None])
    assert (context.statuses, context.headers[1]["content-type"]) == ({1: code}, "application/json")
    assert json.loads(replies[1])["error"]["code"] == code


def test_an_error_after_the_beginning_ends_the_response() -> None:
    handler = make_handler()
    call(handler, a="fails later")
    replies, states, context = call(handler, a="fails later", b="4")
    assert json.loads(replies[0])["error"]["code"] == 500
    assert (replies[1], states, context.statuses) == (b"step 1 ", [True, False], {})
    assert call(handler, b="4")[1] == [False]


@pytest.mark.parametrize(
    ("body", "reply", "statuses"),
    [("3", b"step 1 step 2 end", {}), ("1", b"end", {}), ("wrong", None, {0: 400}), ("fails later", None, {0: 500})],
)
def test_without_continuous_batching_an_answer_is_all_in_one_piece(
    body: str, reply: bytes | None, statuses: dict[int, int]
) -> None:
    handler = make_handler(is_continuous=False)
    replies, _, context = call(handler, a=body, b="2")
    assert replies[1] == b"step 1 end"
    assert context.statuses == statuses
    if reply is not None:
        assert replies[0] == reply
    else:
        assert json.loads(replies[0])["error"]["code"] == statuses[0]


def test_fields_that_are_called_as_headers_are_none() -> None:
    """TorchServe adds the content types of form parts and query parameters to the headers."""
    told = {"content-type": {"content-type": "text/plain"}, "url_path": {"content-type": ""}, "Content-Type": "x/y"}
    assert [find_header(told, name) for name in ("content-type", "url_path", "accept")] == ["x/y", "", ""]


@pytest.mark.parametrize("given", ["", "a b", "a\r\nX-Seed: 7", "é", "a" * 65, "[METRICS]a.Count:1"])
def test_an_id_that_could_do_harm_is_replaced(given: str) -> None:
    assert HttpRequest.read({}, {"X-Request-ID": given}, model="m", own_id="own").request_id == "own"


def test_an_id_that_came_with_the_request_is_kept() -> None:
    read = HttpRequest.read({}, {"x-request-id": "job-7.a_B"}, model="m", own_id="own")
    assert (read.request_id, read.is_id_given) == ("job-7.a_B", True)


def test_answers_are_split_into_pieces_that_torchserve_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "MAX_CHUNK", 4)
    assert list(native.split_chunks(b"")) == [b""]
    assert list(native.split_chunks(b"abcd")) == [b"abcd"]
    assert list(native.split_chunks(b"0123456789")) == [b"0123", b"4567", b"89"]


def test_a_long_answer_goes_one_piece_a_call() -> None:
    """The next request makes its first step meanwhile."""
    handler = make_handler()
    handler.service.pieces = [b"one", b"two", b"three"]  # type: ignore[attr-defined]
    assert call(handler, a="1", b="2")[:2] == ([b"one", LEFT_OUT], [False, False])
    assert call(handler, a="1", b="2")[:2] == ([b"two", b"step 1 "], [False, False])
    assert call(handler, a="1", b="2")[:2] == ([b"three", b""], [True, False])
    assert call(handler, b="2")[:2] == ([b"one"], [False])
    call(handler, c="1")  # b has left
    assert handler.service.closed[:2] == ["1", "2"]  # type: ignore[attr-defined]
    whole = make_handler(is_continuous=False)
    whole.service.pieces = [b"one", b"two", b"three"]  # type: ignore[attr-defined]
    assert call(whole, a="2", b="1")[0] == [b"step 1 onetwothree", b"onetwothree"]


def test_handler_has_the_version_of_its_package() -> None:
    assert __version__ == MADE_FOR


@pytest.mark.parametrize(
    ("count", "steps", "due"),
    [(3, 2, [1, 1, 1]), (3, 1, []), (3, 4, [1, 2, 3]), (1, 30, [15]), (2, 3, [1, 2]), (0, 9, []), (3, 30, [8, 15, 22])],
)
def test_previews_are_as_many_as_asked_for(count: int, steps: int, due: list[int]) -> None:
    assert choose_preview_steps(count, steps=steps) == due


@pytest.mark.parametrize(
    ("text", "is_read"),
    [
        (codecs.BOM_UTF8 + "# Größe".encode(), True),
        ("# Größe".encode("utf-16"), False),
        ("minWorkers: 1".encode("utf-16-le"), False),
        ("# Größe".encode("latin-1"), False),
    ],
)
def test_an_unreadable_configuration_is_reported(tmp_path: Path, text: bytes, is_read: bool) -> None:
    """In one line. TorchServe builds the object before it reads the file next to the handler."""
    shutil.copy(ROOT / "stable_diffusion_handler.py", tmp_path)
    (tmp_path / "model-config.yaml").write_bytes(text)
    handler = runpy.run_path(str(tmp_path / "stable_diffusion_handler.py"))["StableDiffusionHandler"]
    if is_read:
        handler()
    else:
        with pytest.raises(ConfigError, match="model-config.yaml is not UTF-8 .* save it as UTF-8"):
            handler()


def test_an_archive_of_another_version_is_reported_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(VersionError) as caught:
        load_service({}, model_dir=tmp_path, gpu_id=None, archive="0.1.0")
    assert str(caught.value).startswith(
        f"this archive was made for sdxl_server 0.1.0, and {__version__} is installed: make the archive again"
    )


def test_a_missing_package_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchServe reports an import error of the handler's file as a missing handler."""
    monkeypatch.setitem(sys.modules, "sdxl_server.service", None)
    monkeypatch.delitem(sys.modules, "pipeline_utils", raising=False)
    with pytest.raises(RuntimeError, match=f"made for sdxl_server {MADE_FOR}, which cannot be imported.*pip install"):
        StableDiffusionHandler().initialize(Context())


@pytest.mark.parametrize(
    ("pt2", "changed", "message"),
    [
        ("openvino", {"width": 100}, "handler.width takes a whole number from 64 to 4096"),
        ({"backend": "openvino", "options": {"device": "GPU.7"}}, {}, "option 'device' takes CPU here"),
        ("openvino", {"is_xl": False}, "handler.is_xl: false takes a StableDiffusionPipeline"),
    ],
    ids=["setting", "device", "model"],
)
def test_wrong_configuration_stops_the_load(tiny_model: Path, pt2: Any, changed: dict[str, Any], message: str) -> None:
    """In a server, where this ends the start: test_backends."""
    settings = read_shipped()
    settings["handler"] |= {"model_path": tiny_model.name, **changed}
    context = Context()
    context.model_yaml_config = {**settings, "pt2": pt2}  # type: ignore[attr-defined]
    context.system_properties = {"model_dir": str(tiny_model.parent), "gpu_id": None}  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=message):
        StableDiffusionHandler().initialize(context)


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1"])
def test_an_unusable_metrics_address_is_reported(host: str) -> None:
    """A taken address, and one of another machine."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"{host}:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"metrics_address takes a free address .* not {address}"):
            serve_metrics(address, threading.Event())


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize(("address", "hosts"), [("[::]", {"127.0.0.1", "[::1]"}), ("[::1]", {"[::1]"})])
def test_metrics_are_served_over_ipv6(address: str, hosts: set[str]) -> None:
    """Brackets as in a URL. At :: they are served over IPv4 too."""
    HandlerConfig.parse({"metrics_address": f"{address}:9108"})
    with pytest.raises(ConfigError, match=r"metrics_address takes host:port, or \[IPv6 address\]:port"):
        HandlerConfig.parse({"metrics_address": f"{address.strip('[]')}:9108"})
    port = serve_metrics(f"{address}:0", threading.Event())
    assert {host for host in ("127.0.0.1", "[::1]") if is_served(f"http://{host}:{port}/metrics")} == hosts


def is_served(url: str) -> bool:
    try:
        return requests.get(url, timeout=10).status_code == 200
    except requests.ConnectionError:
        return False


def test_readiness_is_served_next_to_metrics() -> None:
    is_ready = threading.Event()
    port = serve_metrics("127.0.0.1:0", is_ready)
    assert requests.get(f"http://127.0.0.1:{port}/ready", timeout=10).status_code == 503
    is_ready.set()
    assert requests.get(f"http://127.0.0.1:{port}/ready", timeout=10).status_code == 200


def test_a_draining_worker_is_not_ready(tmp_path: Path) -> None:
    is_ready, drain_file = threading.Event(), tmp_path / "draining"
    is_ready.set()
    port = serve_metrics("127.0.0.1:0", is_ready, drain_file=str(drain_file))
    for expected in (200, 503, 200):
        assert requests.get(f"http://127.0.0.1:{port}/ready", timeout=10).status_code == expected
        assert requests.get(f"http://127.0.0.1:{port}/metrics", timeout=10).status_code == 200
        drain_file.touch() if expected == 200 else drain_file.unlink()
