"""The client against a real server on loopback whose answers each test scripts."""

import argparse
import base64
import codecs
import contextlib
import io
import json
import os
import pty
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

import query
from sdxl_server.api.image_encoding import encode_image
from sdxl_server.api.marking import Marker
from sdxl_server.api.metadata import read_metadata_request
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.errors import RequestError
from sdxl_server.request.fields import GenerationRequest
from sdxl_server.request.limits import Limits
from sdxl_server.request.samplers import SAMPLERS
from sdxl_server.service import describe_error
from tests.scripted import DONE, IMAGE, STREAM, Handler, Server, Step, answer, complete, make_event, make_image

MARKER = Marker(HandlerConfig())
LIMITS = Limits(samplers={name: row.options for name, row in SAMPLERS.items()})
QUERY = Path(query.__file__)
LIMIT = 60  # seconds, for a step that takes less than one
TOKEN_ERROR = {"code": 400, "type": "InvalidKeyException", "message": "Token Authorization failed."}


UNASKED = ", which was not asked for or came before"


def after(action: Callable[[], object], step: Step) -> Step:
    def act(handler: Handler) -> None:
        action()
        step(handler)

    return act


def hang(handler: Handler) -> None:
    handler.server.released.wait(LIMIT)


def drip(*, head: bytes, part: bytes) -> Step:
    """Send a head, and then parts for longer than a client may wait."""

    def send(handler: Handler) -> None:
        handler.wfile.write(head)
        for _ in range(1000):
            if handler.server.released.wait(0.02):
                return
            handler.wfile.write(part)

    return send


@pytest.fixture
def down_server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def server(down_server: Server) -> Server:
    down_server.listen()
    return down_server


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and nothing of the tester's own environment."""
    for name in ("TORCHSERVE_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@dataclass
class Client:
    server: Server
    capsys: pytest.CaptureFixture[str]
    options: list[str] = field(default_factory=lambda: ["--prompt", "a cat"])

    def run(self, *options: str) -> tuple[int, str, str]:
        status = query.main(["--url", self.server.url, *self.options, *options])
        out, err = self.capsys.readouterr()
        return status, out, err

    def save(self, *options: str) -> Path:
        status, out, err = self.run(*options)
        path = out.removesuffix("\n")
        assert (status, err) == (0, f"{path}: seed 7\n")
        return Path(path)

    def fail(self, *options: str, code: int = 1) -> str:
        """Run, expect exactly one line of failure and an unchanged folder, and return the line."""
        before = read_folder()
        status, out, err = self.run(*options)
        assert (status, out) == (code, "")
        assert re.fullmatch(r"query\.py: .*\n", err)
        assert err.rstrip("\n").isprintable()
        assert read_folder() == before
        return err


@pytest.fixture
def client(server: Server, capsys: pytest.CaptureFixture[str]) -> Client:
    return Client(server, capsys)


def read_folder() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path().iterdir()}


def write_key(key: str) -> None:
    keys = {"management": {"key": "m"}, "inference": {"key": key, "expiration time": "…"}, "API": {"key": "a"}}
    Path("key_file.json").write_text(json.dumps(keys))


def start_query(server: Server, *options: str, **popen: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-B", str(QUERY), "--url", server.url, "--prompt", "a cat", *options]
    return subprocess.Popen(command, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **popen})  # type: ignore[call-overload]


def get_tokens(server: Server) -> list[str | None]:
    return [request.headers["Authorization"] for request in server.requests]


# What is sent


def test_program_sends_prompt_and_saves_image(server: Server) -> None:
    write_key("from-file")
    out, err = start_query(server).communicate(timeout=LIMIT)
    name = out.decode().removesuffix("\n")
    assert re.fullmatch(r"output-\d{8}-\d{6}\.jpg", name)
    assert (Path(name).read_bytes(), err) == (IMAGE, f"{name}: seed 7\n".encode())
    (request,) = server.requests
    assert request.path == "/predictions/diffusion_fast"
    assert request.headers["Content-Type"] == "application/json"
    assert json.loads(request.body) == {"prompt": "a cat", "stream": True}


def test_token_order(client: Client, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.steps *= 5
    client.save("--filename", "0.jpg")
    write_key("elsewhere")
    Path("key_file.json").rename("other.json")
    client.save("--filename", "1.jpg", "--key-file", "other.json")
    write_key("from-file")
    client.save("--filename", "2.jpg")
    monkeypatch.setenv("TORCHSERVE_TOKEN", "from-variable")
    client.save("--filename", "3.jpg")
    client.save("--filename", "4.jpg", "--token", "from-option")
    places = ("elsewhere", "from-file", "from-variable", "from-option")
    assert get_tokens(server) == [None, *(f"Bearer {place}" for place in places)]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"inference": "key"}', '{"inference": {}}'])
def test_damaged_key_file(client: Client, server: Server, content: str) -> None:
    Path("key_file.json").write_text(content)
    assert "key_file.json holds no inference key" in client.fail()
    assert server.requests == []


@pytest.mark.parametrize("token", ["secret\r\nX-Other: 1", "secret€"])
def test_token_that_no_header_can_hold(client: Client, server: Server, token: str) -> None:
    assert client.fail("--token", token, code=2) == "query.py: the token holds a character that cannot be sent\n"
    assert server.requests == []


def test_refused_token_rereads_key_file_once(client: Client, server: Server) -> None:
    write_key("old")
    refuse = answer(TOKEN_ERROR, 400, "application/json")
    server.steps = [after(lambda: write_key("new"), refuse), answer()]
    client.save()
    assert get_tokens(server) == ["Bearer old", "Bearer new"]


def test_second_refusal_is_final(client: Client, server: Server) -> None:
    write_key("old")
    new_keys = iter(["new", "newer"])
    refuse = answer(TOKEN_ERROR, 400, "application/json")
    server.steps = [after(lambda: write_key(next(new_keys)), refuse)] * 3
    status, _, err = client.run()
    assert (status, get_tokens(server)) == (2, ["Bearer old", "Bearer new"])
    assert all(word in err for word in ("--token", "TORCHSERVE_TOKEN", "key_file.json"))


@pytest.mark.parametrize("options", [[], ["--token", "given"]])
def test_refused_token_is_not_sent_again(client: Client, server: Server, options: list[str]) -> None:
    write_key("same")
    server.steps = [answer(TOKEN_ERROR, 400, "application/json")] * 2
    assert "--token, then TORCHSERVE_TOKEN, then the inference key in key_file.json" in client.fail(*options, code=2)
    assert len(server.requests) == 1


def test_other_400_is_not_sent_again(client: Client, server: Server) -> None:
    write_key("old")
    server.steps = [after(lambda: write_key("new"), answer({"error": {"message": "no"}}, 400))] * 2
    status, _, err = client.run()
    assert (status, err) == (2, "query.py: the server answered 400: no\n")
    assert len(server.requests) == 1


@pytest.mark.parametrize("options", [[], ["--token", "own"]])
def test_no_netrc_and_no_proxy(
    client: Client, server: Server, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (netrc := tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    netrc.chmod(0o600)
    for name, value in {
        "NETRC": str(netrc),
        "HTTP_PROXY": "http://127.0.0.1:1",
        "http_proxy": "http://127.0.0.1:1",
    }.items():
        monkeypatch.setenv(name, value)
    client.save(*options)
    assert get_tokens(server) == ["Bearer own" if options else None]


def test_redirect_is_not_followed(client: Client, server: Server) -> None:
    server.steps = [answer(b"", 307, headers={"Location": "/other"}), answer()]
    assert "answered 307 (redirects are not followed)" in client.fail("--token", "t")
    assert len(server.requests) == 1


# What is answered


@pytest.mark.parametrize(
    ("status", "body", "line"),
    [
        (503, {"code": 503, "type": "InternalServerException", "message": "Prediction failed"}, "Prediction failed"),
        (400, {"error": {"message": "prompt is empty", "param": "prompt"}}, "prompt is empty"),
        (404, b"no such\npage", r"no such\npage"),
        (500, ["a", "list"], '["a", "list"]'),
        (500, b"[" * 100_000, "[" * 200),
        (502, b"x" * 500, "x" * 200),
        (502, b"", ""),
        (500, {"message": "y" * 5000}, "y" * 1000),
        (500, {"message": "\x1b[2J\r\u202ered\x9b"}, r"\x1b[2J\r\u202ered\x9b"),
        (500, b"\x1b]0;title\x07 \xff", r"\x1b]0;title\x07 " + "\ufffd"),
        (204, b"", ""),
        (413, b"", ""),
    ],
)
def test_error_answer_is_shown(client: Client, server: Server, status: int, body: object, line: str) -> None:
    server.steps = [answer(body, status, "application/json")]
    code = {400: 2, 404: 2, 413: 2, 503: 3}.get(status, 1)
    assert client.fail(code=code) == f"query.py: the server answered {status}: {line}\n"


@pytest.mark.parametrize(
    ("body", "kind", "line"),
    [
        (b"hello\n" * 100, "text/html", "answered with text/html instead of text/event-stream: hello\\nhello"),
        (IMAGE, "image/jpeg", "answered with image/jpeg instead of text/event-stream: "),
        (b"", STREAM, "the answer ended before the last image"),
        (make_event("progress", step=1, total=9), STREAM, "the answer ended before the last image"),
        (DONE[:-1], STREAM, "the answer ended before the last image"),
        (b"data: hello\n\n", STREAM, "the answer ended before the last image"),
        (make_event("progress", step=1), STREAM, "the server sends a damaged event: KeyError('total')"),
        (complete(index=3), STREAM, f"the server sends image 3{UNASKED}"),
        (make_event("image_generation.completed", b64_json="?", index=0), STREAM, "sends a damaged event: Error("),
        (make_event("image_generation.completed", index=0), STREAM, "sends a damaged event: KeyError('b64_json')"),
        *[
            (complete(file), STREAM, "the server sends a file that is no JPEG, PNG or WebP")
            for file in (b"hello", b"", make_image("GIF"), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
        ],
    ],
)
def test_answer_without_an_image(client: Client, server: Server, body: bytes, kind: str, line: str) -> None:
    server.steps = [answer(body, 200, kind)]
    assert line in (shown := client.fail())
    assert len(shown) < 1000


# A server that is hostile or broken


def preview(index: object = 0, number: object = 0) -> bytes:
    kind = "image_generation.partial_image"
    return make_event(kind, b64_json=base64.b64encode(IMAGE).decode(), index=index, partial_image_index=number)


@pytest.mark.parametrize(
    ("events", "line"),
    [
        ([preview()], f"preview 0 of image 0{UNASKED}"),
        ([complete(index=-1)], f"image -1{UNASKED}"),
        ([DONE.replace(b'"index": 0', b'"index": false')], f"image False{UNASKED}"),
        ([DONE.replace(b'"index": 0', b'"index": 0.0')], f"image 0.0{UNASKED}"),
        ([DONE.replace(b'"index": 0', b'"index": [' + b"0," * 999 + b"0]")], "image [0, 0, 0"),
        ([DONE.replace(b"completed", b"partial_image")], "a damaged event: KeyError('partial_image_index')"),
        *[
            ([make_event("progress", step=5, total=9), make_event("progress", step=step, total=9)], "after step 5")
            for step in (5, 4, -1, 10, 5.5, "6", None, True, float("nan"), float("inf"))
        ],
        *[
            ([make_event("queue", place=place)], "in its queue after place None")
            for place in (-1, 1.5, "1", None, True, float("nan"))
        ],
        ([make_event("queue")], "a damaged event: KeyError('place')"),
        ([make_event("progress", step=1, total=float("inf"))], "the server sends step 1 of inf after step 0"),
        ([b'data: {"type": "progress", "step": 1e999, "total": 9}\n\n'], "the server sends step inf of 9"),
        ([make_event("progress", step=1, total=10**9)], "the server sends step 1 of 1000000000"),
        ([b'data: {"type": "x", "a": [' + b"{}," * 99_999 + b"{}]}\n\n"], "an event of more than 50000 parts"),
        ([make_event("warning", message="x")] * 1000, "the answer ended before the last image"),
        ([make_event("error", error={"message": "x" * 9999})], f"the server says: {'x' * 1000}\n"),
    ],
)
def test_what_nobody_has_asked_for(client: Client, server: Server, events: list[bytes], line: str) -> None:
    server.steps = [answer(b"".join(events))]
    assert line in client.fail()


@pytest.mark.parametrize(
    ("events", "line", "files"),
    [
        ([complete(), complete()], f"image 0{UNASKED}", 1),
        ([complete(index=1), complete(index=1)], f"image 1{UNASKED}", 1),
        ([complete(index=1)], "the answer ended before the last image", 1),
        ([preview(), preview(number=1), preview()], f"preview 0 of image 0{UNASKED}", 2),
        ([complete(), preview()], f"preview 0 of image 0{UNASKED}", 1),
        ([preview(number=2)], f"preview 2 of image 0{UNASKED}", 0),
        ([preview(number=float("nan"))], f"preview nan of image 0{UNASKED}", 0),
    ],
)
def test_more_than_was_asked_for(client: Client, server: Server, events: list[bytes], line: str, files: int) -> None:
    """What has come before it is kept; the exit code says that it is not all."""
    server.steps = [answer(b"".join(events))]
    status, _, err = client.run("-n", "2", "--preview", "2")
    assert (status, line in err, len(read_folder())) == (1, True, files)


def test_endless_previews_fill_no_disk(client: Client, server: Server) -> None:
    server.steps = [drip(head=b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n", part=preview() * 9)]
    assert f"preview 0 of image 0{UNASKED}" in client.fail()


def test_endless_chunk_heads_end(client: Client, server: Server) -> None:
    head = b"HTTP/1.1 500 X\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n"
    server.steps = [drip(head=head, part=b"0" * 50_000)]
    assert "no answer from" in client.fail(code=3)


@pytest.mark.parametrize(("status", "code"), [(504, 3), (400, 2), (500, 1), (None, 1)])
def test_error_event_is_shown(client: Client, server: Server, status: object, code: int) -> None:
    event = make_event("error", error={"message": "no\x1b[2J more", "code": status})
    server.steps = [answer(make_event("progress", step=1, total=9) + event)]
    assert client.fail(code=code) == "query.py: the server says: no\\x1b[2J more\n"


def test_warning_is_shown(client: Client, server: Server) -> None:
    server.steps = [answer(headers={"X-Warning": "prompt: the text encoder reads the first 77"})]
    assert client.run()[2].startswith("query.py: warning: prompt: the text encoder reads the first 77\n")


@pytest.mark.parametrize(
    ("part", "place"),
    [(b"", "before the first step"), (make_event("progress", step=1, total=9), "after step 1 of 9")],
)
def test_answer_that_is_cut_short(client: Client, server: Server, part: bytes, place: str) -> None:
    server.steps = [answer(part, headers={"Content-Length": str(len(part) + 9)})]
    assert client.fail(code=3) == f"query.py: the connection broke {place}; the server's log says why\n"
    assert len(server.requests) == 1


class Answer(io.BytesIO):
    """Stands for a response of requests whose body arrives in small parts."""

    def __init__(self, body: bytes, *, size: int) -> None:
        super().__init__(body)
        self.size = size
        self.raw = self

    def read1(self, most: int | None = -1, /) -> bytes:
        return super().read1(self.size)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_whole_however_they_arrive(size: int) -> None:
    events = [{"type": "progress", "step": i} for i in range(3)]
    body = b"".join(f"event: progress\ndata: {json.dumps(event)}\n\n".encode() for event in events)
    assert list(query.read_events(Answer(body, size=size), make_job())) == events


def test_large_event_is_searched_once() -> None:
    image = "A" * 2**24
    body = f'data: {{"b64_json": "{image}"}}\n\n'.encode()
    start = time.thread_time()
    (event,) = query.read_events(Answer(body, size=2**13), make_job())
    assert event["b64_json"] == image
    assert time.thread_time() - start < 2


def test_answer_that_never_ends_is_refused(client: Client, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query, "MAX_EVENT_BYTES", 100_000)
    server.steps = [drip(head=b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n", part=bytes(50_000))]
    assert "an event of more than 100000 bytes" in client.fail()


def test_url_without_scheme(client: Client) -> None:
    assert "no answer from localhost/x: Invalid URL" in client.fail("--url", "localhost/x", code=3)


# Waiting


@pytest.mark.parametrize(
    "step",
    [
        hang,
        drip(head=b"HTTP/1.0 200 OK\r\n", part=b"X: y\r\n"),
        drip(head=b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n", part=b": step\n\n"),
    ],
    ids=["silence", "headers", "body"],
)
def test_timeout_is_for_the_whole_request(client: Client, server: Server, step: Step) -> None:
    server.steps = [step]
    late = f"query.py: no image from {server.url} within 0.4 s (--timeout)\n"
    assert client.fail("--timeout", "0.4", code=3) == late


def test_steps_are_shown_on_a_terminal(server: Server) -> None:
    steps = b"".join(make_event("progress", step=i, total=30) for i in range(1, 30))
    time_is_shown = threading.Event()
    server.steps = [after(lambda: time_is_shown.wait(LIMIT), answer(steps + DONE))]
    ours, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 100))
    with start_query(server, "--filename", "cat.jpg", stderr=its) as process:
        os.close(its)
        shown = b""
        with contextlib.suppress(OSError):  # EIO: the program has ended
            while part := os.read(ours, 1000):
                shown += part
                if re.search(rb"0step \[00:0[1-9]", shown):  # the time is shown before the first step
                    time_is_shown.set()
        assert process.stdout
        assert process.stdout.read() == b"cat.jpg\n"
    os.close(ours)
    assert time_is_shown.is_set()
    assert re.search(rb"29/30 \[\d\d:\d\d<\d\d:\d\d", shown)
    assert b"cat.jpg: seed 7\r\n" in shown


def test_interrupt(server: Server) -> None:
    server.steps = [hang]
    # A shell's background job ignores the signal, and so would its children.
    with start_query(server, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        assert server.asked.wait(LIMIT)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, out, err, read_folder()) == (130, b"", b"", {})


# Asking again

BUSY_ANSWER = {
    "code": 503,
    "type": "ServiceUnavailableException",
    "message": 'Model "diffusion_fast" has no worker to serve inference request. Please use scale workers API …',
}
BUSY = "query.py: the server is busy, or its model is still loading"
be_busy = answer(BUSY_ANSWER, 503, "application/json")


def refuse(status: int, *, retry_after: str | None = None, body: object = None) -> Step:
    """Answer as a proxy in front does."""
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return answer(body or {"error": {"message": "too many"}}, status, "application/json", headers)


def reset(handler: Handler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())


@dataclass
class Clock:
    """Stands for random.uniform and the module time in query.py.

    Each draw is a wait of 20 ms, during which the clock goes on by 30 s.
    """

    now: float = 1000.0
    ranges: list[tuple[float, float]] = field(default_factory=list)
    meanwhile: Callable[[], object] = lambda: None
    strftime = staticmethod(time.strftime)

    def monotonic(self) -> float:
        return self.now

    def draw(self, low: float, high: float) -> float:
        self.ranges.append((low, high))
        self.now += 30
        self.meanwhile()
        return 0.02


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(random, "uniform", clock.draw)
    monkeypatch.setattr(query, "time", clock)
    return clock


def test_busy_server_is_asked_again(client: Client, server: Server, clock: Clock) -> None:
    server.steps = [be_busy, be_busy, answer()]
    Path("list.txt").write_text("\na cat\n")
    client.options.clear()
    status, _, err = client.run("--prompts", "list.txt", "--filename", "cat.jpg")
    assert (status, read_folder()["cat-1.jpg"]) == (0, IMAGE)
    line = BUSY.replace("query.py: ", "query.py: line 2: ")
    assert err == f"{line}; asking again in 0 s\n" * 2 + "cat-1.jpg: seed 7\n"
    assert clock.ranges == [(0, 1), (0, 2)]
    assert [request.body for request in server.requests] == [server.requests[0].body] * 3


@pytest.mark.parametrize("step", [refuse(429, retry_after="1"), refuse(503, retry_after="1", body=BUSY_ANSWER)])
def test_retry_after_is_waited_for(client: Client, server: Server, clock: Clock, step: Step) -> None:
    times: list[float] = []
    server.steps = [after(lambda: times.append(time.monotonic()), each) for each in (step, answer())]
    status, _, err = client.run()
    assert (status, len(server.requests)) == (0, 2)
    assert "; asking again in 1 s\n" in err
    assert times[1] - times[0] >= 1


@pytest.mark.parametrize("retry_after", [formatdate(0, usegmt=True), "-5", "1.5", "²", "0", "soon", ""])
def test_retry_after_of_any_kind_tells_that_nothing_ran(
    client: Client, server: Server, clock: Clock, retry_after: str
) -> None:
    server.steps = [refuse(503, retry_after=retry_after), answer()]
    assert client.run()[0] == 0
    assert clock.ranges == [(0, 1)]


@pytest.mark.parametrize(
    ("options", "limit"), [("--retry 9", "--retry 9"), ("--timeout 29", "--timeout 29"), ("--timeout 99", "--retry 60")]
)
def test_retry_after_past_the_limit(client: Client, server: Server, clock: Clock, options: str, limit: str) -> None:
    wait = 30 if options == "--timeout 29" else 61
    server.steps = [refuse(429, retry_after=str(wait))]
    shown = client.fail(*options.split(), code=3)
    assert shown == f"query.py: the server answered 429: too many; given up after 0 s ({limit}, Retry-After: {wait})\n"
    assert len(server.requests) == 1


@pytest.mark.parametrize("options", [["--retry", "100"], ["--timeout", "100", "--retry", "1000"]])
def test_giving_up(client: Client, server: Server, clock: Clock, options: list[str]) -> None:
    server.steps = [be_busy] * 9
    status, out, err = client.run(*options)
    assert (status, out) == (3, "")
    assert f" s ({options[0]}" in err.splitlines()[-1]
    for thread in threading.enumerate():
        if thread.name.endswith("(follow)"):
            thread.join(LIMIT)
    assert 4 <= len(server.requests) <= 5  # at 0, 30, 60 and 90 s; one may have been under way


@pytest.mark.parametrize("step", [be_busy, refuse(503, retry_after="0")])
def test_no_retry(client: Client, server: Server, step: Step) -> None:
    server.steps = [step]
    assert client.fail("--retry", "0", code=3) in (f"{BUSY}\n", "query.py: the server answered 503: too many\n")
    assert len(server.requests) == 1


def describe(kind: str) -> dict[str, object]:
    """The answer of TorchServe to a request that a worker may have begun."""
    return {"code": 500, "type": kind, "message": "Worker died."}


@pytest.mark.parametrize(
    ("step", "code"),
    [
        (refuse(500, body=describe("InternalServerException")), 1),
        (refuse(500, body=describe("InternalServerException"), retry_after="0"), 1),
        (refuse(503, body=describe("InternalServerException"), retry_after="0"), 3),
        (refuse(500, body=describe("ServiceUnavailableException")), 1),
        (refuse(502, retry_after="0"), 1),
        (refuse(504, retry_after="0"), 3),
        (refuse(503), 3),
        (refuse(429), 3),
        (reset, 3),
        (lambda handler: None, 3),
        (answer(b""), 1),
        (answer(make_event("error", error={"code": 503})), 3),
    ],
)
def test_what_may_have_run_is_not_sent_again(
    client: Client, server: Server, clock: Clock, step: Step, code: int
) -> None:
    server.steps = [step] * 3
    client.fail(code=code)
    assert (len(server.requests), clock.ranges) == (1, [])


def make_options(server: Server, *, timeout: float = 9.0) -> argparse.Namespace:
    return query.parse_arguments(["--prompt", "a cat", "--url", server.url, "--timeout", str(timeout)])


def make_job() -> query.Job:
    return query.Job("", {"prompt": "a cat"}, [Path("cat.jpg")], deadline=time.monotonic() + 99)


def test_no_answer_in_time_is_not_sent_again(server: Server, clock: Clock) -> None:
    server.steps = [hang] * 3
    with pytest.raises(query.QueryError, match="no answer from .*timed out"):
        list(query.request_events(make_job(), make_options(server, timeout=0.2), query.follow_stream))
    assert (len(server.requests), clock.ranges) == (1, [])


def test_server_that_is_down(down_server: Server, capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    client = Client(down_server, capsys)
    line = f"query.py: no answer from {down_server.url}: Connection refused"
    assert client.fail("--retry", "0", code=3) == f"{line}\n"
    status, _, err = client.run("--retry", "100")
    assert status == 3
    assert err == f"{line}; asking again in 0 s\n" * 4 + f"{line}; given up after 120 s (--retry 100)\n"


@pytest.mark.parametrize("failure", [socket.gaierror(-2, "Name or service not known"), TimeoutError("timed out")])
def test_what_was_not_sent_is_sent_again(
    client: Client, server: Server, clock: Clock, monkeypatch: pytest.MonkeyPatch, failure: OSError
) -> None:
    from urllib3.util import connection

    connect, failures = connection.create_connection, [failure]

    def fail_once(*args: object, **keywords: object) -> object:
        if failures:
            raise failures.pop()
        return connect(*args, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(connection, "create_connection", fail_once)
    status, _, err = client.run()
    assert status == 0
    assert f"query.py: no answer from {server.url}: {failure.strerror or failure}; asking again in 0 s\n" in err


def test_server_that_starts_late_with_new_keys(
    down_server: Server, capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    """Its first answer is for the old token, and it is busy at first."""
    write_key("old")
    refuse_token = answer(TOKEN_ERROR, 400, "application/json")
    down_server.steps = [after(lambda: write_key("new"), refuse_token), be_busy, answer()]
    starts = iter([down_server.listen])
    clock.meanwhile = lambda: next(starts, lambda: None)()
    status, _, err = Client(down_server, capsys).run()
    assert (status, get_tokens(down_server)) == (0, ["Bearer old", "Bearer new", "Bearer new"])
    assert err.startswith(
        f"query.py: no answer from {down_server.url}: Connection refused; asking again in 0 s\n{BUSY}"
    )


def test_waits_grow_and_vary() -> None:
    def draw(tries: int) -> list[float]:
        waits = [query.choose_wait(None, tries=tries, left=1000) for _ in range(400)]
        return sorted(wait for wait in waits if wait is not None)

    for tries, most in enumerate([1, 2, 4, 8, 16, 30, 30], 1):
        waits = draw(tries)
        assert len(waits) == 400
        assert 0 <= waits[0] < most / 10
        assert most * 0.9 < waits[-1] <= most
    assert draw(10_000)[-1] <= 30


def test_wait_that_the_server_chooses() -> None:
    waits = [query.choose_wait(5, tries=20, left=6) for _ in range(100)]
    assert all(wait is not None and 5 <= wait <= 6 for wait in waits)
    assert len(set(waits)) > 50
    assert query.choose_wait(5, tries=1, left=5) == 5
    assert query.choose_wait(5, tries=1, left=4.9) is None


def test_last_wait_ends_with_the_time() -> None:
    assert max(query.choose_wait(None, tries=9, left=0.1) or 9 for _ in range(100)) == 0.1
    assert query.choose_wait(None, tries=9, left=0) is None
    assert query.choose_wait(0, tries=9, left=-1) is None


def test_interrupt_of_a_wait(server: Server) -> None:
    server.steps = [refuse(429, retry_after="30")]
    with start_query(server, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        assert process.stderr
        assert b"asking again in 3" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, out, err, len(server.requests)) == (130, b"", b"", 1)


def test_job_that_is_over_does_not_wait(server: Server) -> None:
    server.steps = [refuse(429, retry_after="40")] * 2
    job, start = make_job(), time.monotonic()
    for event in query.request_events(job, make_options(server), query.follow_stream):
        assert event["type"] == "warning"
        job.is_over.set()
    assert (len(server.requests), time.monotonic() - start < 30) == (1, True)


# The file


def test_filename(client: Client, folder: Path) -> None:
    (folder / "sub").mkdir()
    assert client.save("--filename", "sub/cat.jpg") == Path("sub/cat.jpg")
    assert Path("sub/cat.jpg").read_bytes() == IMAGE


def test_file_mode_follows_umask(client: Client) -> None:
    before = os.umask(0o026)
    try:
        assert client.save().stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_two_images_in_one_second(client: Client, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.steps *= 3
    now, strftime = time.strptime("2026-11-23 05:45:30", "%Y-%m-%d %H:%M:%S"), time.strftime
    monkeypatch.setattr(time, "strftime", lambda format: strftime(format, now))
    names = [str(client.save("--overwrite")) for _ in range(3)]
    stem = "output-20261123-054530"
    assert names == [f"{stem}.jpg", f"{stem}-1.jpg", f"{stem}-2.jpg"]


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_existing_name_is_refused_before_asking(
    client: Client, server: Server, make: Callable[[Path], object], tmp_path: Path
) -> None:
    make(path := tmp_path / "cat.jpg")
    assert f"{path} exists" in client.fail("--filename", str(path))
    assert server.requests == []


def test_overwrite(client: Client) -> None:
    Path("cat.jpg").write_bytes(b"old")
    client.save("--filename", "cat.jpg", "--overwrite")
    assert read_folder() == {"cat.jpg": IMAGE}


def test_overwrite_keeps_a_folder(client: Client, server: Server, tmp_path: Path) -> None:
    assert "is not a file" in client.fail("--filename", str(tmp_path), "--overwrite")
    assert server.requests == []


def test_failure_keeps_the_old_image(client: Client, server: Server) -> None:
    Path("cat.jpg").write_bytes(b"old")
    server.steps = [answer(complete(b"no image"))]
    client.fail("--filename", "cat.jpg", "--overwrite")
    assert read_folder() == {"cat.jpg": b"old"}


def test_name_that_is_taken_meanwhile(client: Client, server: Server) -> None:
    server.steps = [after(lambda: Path("cat.jpg").write_bytes(b"other"), answer())]
    assert client.save("--filename", "cat.jpg") == Path("cat-1.jpg")
    assert read_folder() == {"cat.jpg": b"other", "cat-1.jpg": IMAGE}


def test_folder_that_cannot_be_written(client: Client, server: Server) -> None:
    assert "cannot write into the folder missing" in client.fail("--filename", "missing/cat.jpg")
    assert server.requests == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_that_is_read_only(client: Client, server: Server, tmp_path: Path) -> None:
    (locked := tmp_path / "locked").mkdir(mode=0o500)
    assert f"cannot write into the folder {locked}" in client.fail("--filename", str(locked / "cat.jpg"))
    assert server.requests == []


def test_full_disk_leaves_nothing(server: Server) -> None:
    limit = (
        f"import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (99, 99)); runpy.run_path({str(QUERY)!r}"
    )
    code = f"{limit}, run_name='__main__')"
    command = [sys.executable, "-B", "-c", code, "--url", server.url, "--prompt", "a cat"]
    done = subprocess.run(command, capture_output=True, timeout=LIMIT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"query.py: [Errno 27] File too large\n")
    assert read_folder() == {}


# The command line


def test_help_imports_nothing_heavy() -> None:
    code = """if True:
        import contextlib, sys, query
        with contextlib.suppress(SystemExit):
            query.main(["--help"])
        sys.exit(" ".join({"PIL", "requests", "tqdm", "urllib3"} & set(sys.modules)))"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=LIMIT, cwd=QUERY.parent, check=False
    )
    assert done.stderr == b"\n"  # sys.exit("") prints an empty line
    assert b"--prompt" in done.stdout


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("", "one of --prompt, --prompts, --like and --job is needed"),
        ("--prompt x --prompts x", "--prompts goes without --prompt"),
        ("--prompts x --job 12345678", "--prompts goes without --prompt and without --job"),
        ("--prompt x --concurrency 0", "--concurrency must be 1 or more"),
        ("--prompt x --leave", "--leave needs --job"),
        ("--prompt x --job short", "--job takes 8 to 64 letters"),
        ("--prompt x --field a", "--field: takes NAME=VALUE, such as clip_skip=1, not 'a'"),
        ("--prompt x --image missing.png", "--image: cannot read missing.png: No such file"),
        *((f"--prompt x --timeout {seconds}", "--timeout must be more than 0") for seconds in ("0", "-1", "nan")),
        *((f"--prompt x --retry {seconds}", "--retry must be 0 or more") for seconds in ("-1", "nan")),
        *((f"--prompt x --{name} soon", f"--{name}: invalid float value") for name in ("timeout", "retry")),
    ],
)
def test_options_that_are_wrong(client: Client, server: Server, options: str, line: str) -> None:
    client.options.clear()
    with pytest.raises(SystemExit, match="2"):
        client.run(*options.split())
    assert line in client.capsys.readouterr().err
    assert server.requests == []


def read_contract() -> dict[str, Any]:
    document = json.loads((QUERY.parent / "docs/openapi.json").read_text())
    return document["components"]["schemas"]["GenerationRequest"]["properties"]


def test_options_are_fields_of_the_contract() -> None:
    assert set(query.FIELDS) < set(read_contract())


def test_every_field_can_be_sent(client: Client, server: Server) -> None:
    values = [7, 0.5, "text", 'a "quoted" = text', True, None, [512, 512], {"name": "Euler"}]
    given = {name: values[i % len(values)] for i, name in enumerate(read_contract()) if name != "stream"}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in given.items()}
    client.options.clear()
    client.run("--prompt", "x", *(word for name, text in texts.items() for word in ("--field", f"{name}={text}")))
    assert json.loads(server.requests[0].body) == {**given, "prompt": "x", "stream": True}


def test_fields_are_sent(client: Client, server: Server) -> None:
    Path("fox.png").write_bytes(b"an image")
    given = {"width": 64, "num_inference_steps": 9, "guidance_scale": 2.5, "seed": 7, "original_size": [64, 128]}
    options = "--width 64 --steps 9 --guidance-scale 2.5 --seed 7 --field original_size=[64,128] --image fox.png"
    adapters = [{"name": "ink", "scale": 0.5}]
    more = ["--preview", "--adapters", json.dumps(adapters), "--scheduler", "Euler a", "--field", "width=8"]
    client.save(*options.split(), *more, "--filename", "cat.webp")
    sent = json.loads(server.requests[0].body)
    image = base64.b64encode(b"an image").decode()
    rest = {"image": image, "output_format": "webp", "partial_images": 3, "prompt": "a cat", "stream": True}
    assert sent == given | rest | {"adapters": adapters, "scheduler": "Euler a"}


def test_images_in_objects_are_files(client: Client, server: Server) -> None:
    Path("edges.png").write_bytes(b"an image")
    named, image = {"name": "edges", "scale": 0.5}, base64.b64encode(b"an image").decode()
    client.save("--field", "control=" + json.dumps([{**named, "image": "edges.png"}]))
    assert json.loads(server.requests[0].body)["control"] == [{**named, "image": image}]
    given = json.dumps({**named, "image": "missing.png"})
    with pytest.raises(SystemExit, match="2"):
        client.run("--prompt", "x", "--field", f"control={given}")
    assert "--field: cannot read missing.png: No such file" in client.capsys.readouterr().err


def test_several_images_and_previews(client: Client, server: Server) -> None:
    events = [complete(index=i, partial_image_index=k) for i in (0, 1) for k in (0, 1)]
    server.steps = [answer(b"".join([*events, complete(index=0), complete(index=1)]))]
    status, out, _ = client.run("-n", "2", "--preview", "2", "--filename", "cat.jpg")
    assert (status, out) == (0, "cat-1.jpg\ncat-2.jpg\n")
    assert set(read_folder()) == {
        *("cat-1.jpg", "cat-2.jpg", "cat-1-preview-1.jpg", "cat-1-preview-2.jpg"),
        *("cat-2-preview-1.jpg", "cat-2-preview-2.jpg"),
    }


def embed(request: dict[str, object], kind: str) -> bytes:
    """An image that carries a request as the server embeds it."""
    size = {"width": 64, "height": 64, "seed": 0}
    image = GenerationRequest(prompt="", output_format=kind, **size)  # type: ignore[arg-type]
    return encode_image(Image.new("RGB", (64, 64)), image, marker=MARKER, parameters={"request": request})


def read_image(handler: Handler) -> None:
    """Answer as the server does, with its own reader."""
    body = {"body": handler.server.requests[-1].body}
    try:
        content, status = read_metadata_request(body, LIMITS, content_type="application/json"), 200
    except RequestError as error:
        status, content = describe_error(error, "id")
    answer(content, status, "application/json")(handler)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_like_repeats_an_image(client: Client, server: Server, kind: str) -> None:
    request: dict[str, object] = {"prompt": "ein Füchslein", "seed": 7, "target_size": [8, 8], "output_format": kind}
    Path("fox").write_bytes(embed(request, kind))
    client.options.clear()
    server.steps = [read_image, answer()] * 2
    client.save("--like", "fox")
    assert server.requests[0].path == "/predictions/diffusion_fast/1.0/metadata"
    assert json.loads(server.requests[1].body) == {**request, "stream": True}
    server.url += "/1.0/"
    client.save("--like", "fox", "--seed", "8", "--filename", "new.png")
    assert server.requests[2].path == "/predictions/diffusion_fast/1.0/metadata"
    assert json.loads(server.requests[3].body) == {**request, "seed": 8, "output_format": "png", "stream": True}


def test_like_repeats_an_image_of_a1111(client: Client, server: Server) -> None:
    text = "a fox\nSteps: 20, Sampler: Euler a, Schedule type: Automatic, CFG scale: 7, Seed: 5, Size: 64x64, RNG: CPU"
    texts = PngImagePlugin.PngInfo()
    texts.add_text("parameters", text)
    Image.new("RGB", (64, 64)).save("fox.png", pnginfo=texts)
    client.options.clear()
    server.steps = [read_image, answer()]
    status, _, err = client.run("--like", "fox.png", "--filename", "new.jpg")
    left = "query.py: --like: warning: without an equivalent here, left out: 'RNG: CPU'\n"
    assert (status, err) == (0, f"{left}new.jpg: seed 7\n")
    assert json.loads(server.requests[1].body) == {
        **{"prompt": "a fox", "num_inference_steps": 20, "guidance_scale": 7, "seed": 5, "width": 64, "height": 64},
        **{"scheduler": "EulerAncestralDiscreteScheduler", "output_format": "jpeg", "stream": True},
    }


@pytest.mark.parametrize(
    ("file", "step", "line", "code"),
    [
        (IMAGE, read_image, "the server answered 400: this image holds no metadata", 2),
        (b"x", read_image, "the server answered 400: this takes a whole image", 2),
        (IMAGE, refuse(404, body={"error": {"message": "there is no path"}}), "this server is older than --like", 2),
        (IMAGE, answer({"warnings": ["x"]}, 200, "application/json"), "a damaged event", 1),
        (IMAGE, answer({"request": [], "warnings": []}, 200, "application/json"), "a damaged event", 1),
    ],
)
def test_like_needs_an_image_that_tells(
    client: Client, server: Server, file: bytes, step: Step, line: str, code: int
) -> None:
    Path("fox").write_bytes(file)
    client.options.clear()
    server.steps = [step]
    status, out, err = client.run("--like", "fox")
    assert (status, out, line in err.splitlines()[-1]) == (code, "", True)
    assert len(server.requests) == 1


def test_like_is_sent_with_a_new_token_and_again_to_a_busy_server(client: Client, server: Server, clock: Clock) -> None:
    Path("fox").write_bytes(embed({"prompt": "a fox"}, "png"))
    write_key("a")
    client.options.clear()
    server.steps = [refuse(503, retry_after="1"), read_image, answer()]
    status, _, err = client.run("--like", "fox", "--filename", "new.png")
    assert (status, "asking again" in err) == (0, True)
    assert [each.headers["Authorization"] for each in server.requests] == ["Bearer a"] * 3


def test_like_without_a_file(client: Client, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        client.run("--like", "fox")
    assert "argument --like: cannot read fox: No such file or directory" in capsys.readouterr().err


# Alone

ALONE = """if True:
    import runpy, sys
    KNOWN = {"requests", "certifi", "charset_normalizer", "idna", "urllib3"}

    class Refuse:
        def find_spec(name, path=None, target=None):
            if path is None and name not in KNOWN | sys.stdlib_module_names and not name.endswith("__mypyc"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Refuse)
    runpy.run_path(sys.argv.pop(1), run_name="__main__")"""


def run_alone(*options: str, **popen: object) -> subprocess.Popen[bytes]:
    """Start the program, from a folder with nothing else, where it finds Python's library and requests."""
    shutil.copy(QUERY, "query.py")
    command = [sys.executable, "-B", "-c", ALONE, "query.py", *options]
    return subprocess.Popen(command, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **popen})  # type: ignore[call-overload]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_program_runs_with_requests_alone(server: Server, kind: str) -> None:
    image = make_image(kind)
    steps = make_event("progress", step=1, total=2) + make_event("progress", step=2, total=2)
    server.steps = [answer(steps + complete(image), headers={"X-Warning": "the prompt is long"})]
    process = run_alone("--url", server.url, "--prompt", "a cat", "--filename", "cat")
    out, err = process.communicate(timeout=LIMIT)
    assert (process.returncode, out) == (0, b"cat\n")
    assert err == b"query.py: warning: the prompt is long\ncat: seed 7\n"
    assert Path("cat").read_bytes() == image


@pytest.mark.parametrize("place", [2, 3])
def test_place_in_the_queue_only_falls(client: Client, server: Server, place: int) -> None:
    server.steps = [answer(make_event("queue", place=2) + make_event("queue", place=place) + DONE)]
    assert client.run()[2].splitlines()[1:] == [f"query.py: the server sends place {place} in its queue after place 2"]


def test_place_in_the_queue_is_shown(client: Client, server: Server) -> None:
    waits = b"".join(make_event("queue", place=place) for place in (4, 3, 1))
    server.steps = [answer(waits + b":\n\n" + DONE)]
    shown = "".join(f"query.py: waiting; requests before it: {place}\n" for place in (4, 3, 1))
    assert client.run("--filename", "cat.jpg") == (0, "cat.jpg\n", shown + "cat.jpg: seed 7\n")


def test_terminal_without_a_bar(server: Server) -> None:
    server.steps = [answer(make_event("progress", step=1, total=2) + DONE)]
    ours, its = pty.openpty()
    with run_alone("--url", server.url, "--prompt", "a cat", "--filename", "cat.jpg", stderr=its) as process:
        os.close(its)
        assert process.wait(LIMIT) == 0
    assert os.read(ours, 1000) == b"cat.jpg: seed 7\r\n"
    os.close(ours)


def test_like_needs_requests_alone(server: Server) -> None:
    Path("fox.png").write_bytes(embed({"prompt": "a fox"}, "png"))
    server.steps = [read_image, answer()]
    process = run_alone("--url", server.url, "--like", "fox.png", "--filename", "cat")
    assert (process.communicate(timeout=LIMIT), process.returncode) == ((b"cat\n", b"cat: seed 7\n"), 0)


# Jobs


def report(**state: object) -> Step:
    return answer(state, 202, "application/json")


def test_job_is_ordered_and_followed(client: Client, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query, "JOB_PAUSE_SECONDS", 0.01)
    write_key("key")
    done = report(state="done", pictures=["/jobs/my-fox-1/pictures/0", "/jobs/my-fox-1/pictures/1"])
    images = [answer(IMAGE, kind="image/jpeg"), answer(IMAGE, kind="image/jpeg")]
    waits = [report(state="waiting", place=1), report(state="running", step=1, total=2)]
    server.steps = [*waits, done, *images]
    status, out, err = client.run("--job", "my-fox-1", "-n", "2", "--filename", "fox.jpg")
    assert (status, out, err) == (0, "fox-1.jpg\nfox-2.jpg\n", "query.py: waiting; requests before it: 1\n")
    assert read_folder()["fox-2.jpg"] == IMAGE
    order = {"prompt": "a cat", "num_images_per_prompt": 2, "output_format": "jpeg"}
    assert json.loads(server.requests[0].body) == order
    paths = ["/jobs/my-fox-1"] * 3 + ["/jobs/my-fox-1/pictures/0", "/jobs/my-fox-1/pictures/1"]
    assert [request.path for request in server.requests] == paths
    assert set(get_tokens(server)) == {"Bearer key"}


@pytest.fixture
def job_client(client: Client, monkeypatch: pytest.MonkeyPatch) -> Client:
    """A client that orders a job and asks for its state without a pause."""
    monkeypatch.setattr(query, "JOB_PAUSE_SECONDS", 0.0)
    client.options += ["--job", "my-fox-1", "--filename", "fox.jpg"]
    return client


done = report(state="done", pictures=["/jobs/my-fox-1/pictures/0"])
send_image = answer(IMAGE, kind="image/jpeg")
NO_IMAGE = {"error": {"message": "there is no such image"}}


@pytest.mark.parametrize(
    ("steps", "line"),
    [
        ([report(state="failed", message="no memory")], "the job is failed: no memory"),
        ([report(state="cancelled", message=None)], "the job is cancelled: no reason is given"),
        ([report(state="failed", message=["x" * 5000])], "the job is failed: ['xxx"),
        ([answer({"error": {"message": "there is no job"}}, 404)], "the server answered 404: there is no job"),
        ([done, answer(NO_IMAGE, 404, "image/jpeg")], "the server answered 404: there is no such image"),
        ([done, answer(IMAGE, 410, "image/jpeg")], "the server answered 410: "),
        ([done, answer(IMAGE, 500, "image/jpeg")], "the server answered 500: "),
        ([done, answer(b"{}", 200, "application/json")], "instead of image/: {}"),
        ([done, answer(b"<html>", 200, "image/svg+xml")], "a file that is no JPEG, PNG or WebP"),
        ([done, answer(b"", 302, headers={"Location": "/other"})], "302 (redirects are not followed)"),
        ([answer(b"", 308, headers={"Location": "/other"})], "308 (redirects are not followed)"),
        ([report(state="done", pictures=[])], "the answer ended before the last image"),
        ([report(state="done", pictures=["/a", "/b"])], "the server sends 2 images, and 1 were ordered"),
    ],
)
def test_job_without_an_image(job_client: Client, server: Server, steps: list[Step], line: str) -> None:
    server.steps = steps
    status, out, err = job_client.run()
    assert (status in (1, 2), out, line in err, err.count("\n"), read_folder()) == (True, "", True, 1, {})
    assert len(err) < 1100
    assert len(server.requests) == len(steps)


@pytest.mark.parametrize(
    ("state", "line"),
    [
        *[({"state": state}, f"with state {state!r}\n") for state in (None, 7, ["done"], "lost", True)],
        *[({"state": "waiting", "place": place}, f"with place {place!r}\n") for place in ("1", -1, 1.5, True, "")],
        *[
            ({"state": "running", "step": step, "total": 9}, f"with step {step!r} of 9\n")
            for step in ("3", -1, 10, True, 1.5, [1], float("nan"))
        ],
        *[
            ({"state": "running", "step": 1, "total": total}, f"with step 1 of {total!r}\n")
            for total in ("9", None, 0, True, 10**9, 10.5)
        ],
        *[({"state": "done", "pictures": addresses}, "with pictures ") for addresses in (None, "/a", {"0": "/a"}, 1)],
        *[({"state": "done", "pictures": [address]}, f"the server sends {address!r}") for address in (None, 1, ["/a"])],
        ("waiting", "with state None\n"),
        ([], "with state None\n"),
    ],
)
def test_report_of_a_job_that_is_wrong(job_client: Client, server: Server, state: object, line: str) -> None:
    server.steps = [answer(state, 200, "application/json")]
    assert line in job_client.fail()


@pytest.mark.parametrize("what", ["pictures", "preview"])
@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:{port}/a",
        "//127.0.0.1:{port}/a",
        "https://{own}/a",
        "http://localhost:{own_port}/a",
        "http://{own}@127.0.0.1:{port}/a",
        "http://{own}\\@127.0.0.1:{port}/a",
        " http://127.0.0.1:{port}/a",
        "file:///etc/hostname",
        "http://[",
    ],
)
def test_addresses_on_another_server(job_client: Client, server: Server, what: str, address: str) -> None:
    with Server() as other:
        other.listen()
        own = f"127.0.0.1:{server.server_port}"
        address = address.format(port=other.server_port, own=own, own_port=server.server_port)
        running = report(state="running", step=1, total=2, preview=address)
        server.steps = [report(state="done", pictures=[address])] if what == "pictures" else [running, done, send_image]
        status, out, err = job_client.run("--preview", "--token", "key")
        if what == "pictures":
            assert (status, out, err.count("\n"), read_folder()) == (1, "", 1, {})
        else:
            assert (status, out, list(read_folder())) == (0, "fox.jpg\n", ["fox.jpg"])
        assert other.requests == []
        assert [request.path for request in server.requests][1:] == (
            [] if what == "pictures" else ["/jobs/my-fox-1", "/jobs/my-fox-1/pictures/0"]
        )


def test_address_on_the_same_server(job_client: Client, server: Server) -> None:
    server.steps = [report(state="done", pictures=[f"http://127.0.0.1:{server.server_port}/a?b"]), send_image]
    assert job_client.run()[0] == 0
    assert server.requests[1].path == "/a?b"


TRANSIENT = [
    refuse(429),
    refuse(502),
    refuse(503),
    refuse(504),
    refuse(503, body={"error": {"message": "the database is away", "type": "server_busy"}}),
    be_busy,
    reset,
    lambda handler: None,
]
CUT_REPORT = answer(b'{"state": ', kind="application/json", headers={"Content-Length": "99"})
CUT_IMAGE = answer(IMAGE[:9], kind="image/jpeg", headers={"Content-Length": "99"})


@pytest.mark.parametrize(
    ("at", "fault"),
    [(at, fault) for at in range(4) for fault in (*TRANSIENT, CUT_IMAGE if at == 3 else CUT_REPORT)],
)
def test_failure_of_any_request_of_a_job(
    job_client: Client, server: Server, clock: Clock, at: int, fault: Step
) -> None:
    """The order, both reports and the image are each asked for again; much time has passed before."""
    running = after(lambda: setattr(clock, "now", clock.now + 500), report(state="running", step=1, total=2))
    steps = [report(state="waiting", place=0), running, done, send_image]
    server.steps = [*steps[:at], fault, fault, *steps[at:]]
    status, out, err = job_client.run()
    assert (status, out, err.count("asking again")) == (0, "fox.jpg\n", 2)
    assert clock.ranges == [(0, 1), (0, 2)]
    paths = [request.path for request in server.requests]
    assert paths == ["/jobs/my-fox-1"] * (3 if at == 3 else 5) + ["/jobs/my-fox-1/pictures/0"] * (3 if at == 3 else 1)


@pytest.mark.parametrize("at", range(3))
def test_giving_up_on_a_job(job_client: Client, server: Server, clock: Clock, at: int) -> None:
    steps = [report(state="waiting", place=0), done, send_image]
    server.steps = [*steps[:at], *[refuse(503)] * 9]
    status, out, err = job_client.run("--retry", "100")
    assert (status, out, read_folder()) == (3, "", {})
    assert err.endswith("query.py: the server answered 503: too many; given up after 120 s (--retry 100)\n")
    assert len(server.requests) == at + 5


def test_job_waits_as_long_as_the_server_asks(job_client: Client, server: Server, clock: Clock) -> None:
    times: list[float] = []
    steps = [report(state="waiting"), refuse(502, retry_after="1"), done, refuse(503, retry_after="1"), send_image]
    server.steps = [after(lambda: times.append(time.monotonic()), step) for step in steps]
    status, _, err = job_client.run()
    assert (status, err.count("; asking again in 1 s\n")) == (0, 2)
    assert min(times[2] - times[1], times[4] - times[3]) >= 1
    server.requests.clear()
    server.steps = [report(state="waiting"), refuse(503, retry_after="61")]
    assert "given up after 0 s (--retry 60, Retry-After: 61)" in job_client.run("--overwrite")[2]


def test_silent_server_of_a_job(job_client: Client, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query, "MAX_WAIT_SECONDS", 0.2)
    server.steps = [hang, report(state="waiting"), hang, done, hang, send_image]
    status, out, err = job_client.run()
    assert (status, out, err.count("timed out; asking again")) == (0, "fox.jpg\n", 3)


@pytest.mark.parametrize("url", ["localhost/x", "nothing://localhost/x"])
def test_wrong_address_of_a_job_is_final(job_client: Client, url: str) -> None:
    assert "no answer from" in job_client.fail("--url", url, code=3)


def test_job_with_new_keys_more_than_once(job_client: Client, server: Server) -> None:
    write_key("one")
    keys = iter(["2", "3"])
    refuse_token = after(lambda: write_key(next(keys)), answer(TOKEN_ERROR, 400, "application/json"))
    server.steps = [refuse_token, report(state="waiting"), refuse_token, done, send_image]
    assert job_client.run()[0] == 0
    assert get_tokens(server) == [f"Bearer {key}" for key in ("one", "2", "2", "3", "3")]


def test_previews_of_a_job(job_client: Client, server: Server) -> None:
    """Each new preview is saved once, as far as it was asked for; a failure of one ends nothing."""
    previews = [make_image(), make_image(), make_image(), make_image()]
    steps: list[Step] = []
    gone = answer(NO_IMAGE, 404, "application/json")
    for number, step in [(0, 1), (None, 1), (0, 1), (1, 2), (2, 4), (3, 5)]:
        steps.append(report(state="running", step=step, total=6, preview="/jobs/my-fox-1/preview"))
        steps.append(gone if number is None else answer(previews[number], kind="image/jpeg"))
    both = report(state="done", pictures=["/jobs/my-fox-1/pictures/0", "/jobs/my-fox-1/pictures/1"])
    server.steps = [report(state="running", preview=None), *steps, both, send_image, send_image]
    status, out, _ = job_client.run("-n", "2", "--preview", "2")
    assert (status, out) == (0, "fox-1.jpg\nfox-2.jpg\n")
    saved = read_folder()
    assert [saved.pop(f"fox-{i}-preview-{k}.jpg") for i in (1, 2) for k in (1, 2)] == previews
    assert set(saved) == {"fox-1.jpg", "fox-2.jpg"}
    assert json.loads(server.requests[0].body)["partial_images"] == 2


def test_no_more_previews_of_a_job_than_asked_for(job_client: Client, server: Server) -> None:
    running = report(state="running", step=1, total=6, preview="/jobs/my-fox-1/preview")
    server.steps = [running, answer(make_image(), kind="image/jpeg"), running, running, done, send_image]
    assert job_client.run("--preview", "1")[0] == 0
    assert set(read_folder()) == {"fox.jpg", "fox-preview-1.jpg"}


def test_restarted_job_begins_again(job_client: Client, server: Server) -> None:
    states = [report(state="running", step=step, total=9) for step in (7, 0, 3)]
    server.steps = [states[0], report(state="waiting", place=0), *states[1:], done, send_image]
    assert job_client.run()[:2] == (0, "fox.jpg\n")


def test_return_to_a_job_of_several_images(job_client: Client, server: Server) -> None:
    job_client.options = ["--job", "my-fox-1", "--filename", "fox.jpg"]
    server.steps = [report(state="done", pictures=["/a", "/b", "/c"]), *[send_image] * 3]
    assert job_client.run()[:2] == (0, "fox.jpg\nfox-1.jpg\nfox-2.jpg\n")
    assert [request.path for request in server.requests] == ["/jobs/my-fox-1", "/a", "/b", "/c"]
    server.requests.clear()
    server.steps = [report(state="done", pictures=["/a"] * 100)]
    assert "the server sends 100 images" in job_client.run("--overwrite")[2]


def test_job_that_is_left(client: Client, server: Server) -> None:
    server.steps = [report(state="waiting", place=0)]
    status, out, err = client.run("--job", "my-fox-1", "--leave")
    assert (status, out, len(server.requests)) == (0, "", 1)
    assert err.endswith("/jobs/my-fox-1: waiting; --job my-fox-1 returns to it\n")


# Several prompts


def test_prompts_of_a_file(client: Client, server: Server) -> None:
    """Two at a time; the second one fails and the others do not."""
    Path("list.txt").write_text('a cat\n\n{"prompt": "a dog", "width": 3}\na fox\n')
    together = threading.Barrier(2)

    def reply(handler: Handler) -> None:
        fields = json.loads(server.requests[-1].body)
        together.wait(LIMIT)
        refusal = answer({"error": {"message": "width takes …"}}, 400, "application/json")
        (refusal if "width" in fields else answer())(handler)

    def reply_alone(handler: Handler) -> None:
        answer()(handler)

    server.steps = [reply, reply, reply_alone]
    client.options.clear()
    status, out, err = client.run("--prompts", "list.txt", "--concurrency", "2", "--filename", "a.jpg")
    assert status == 2
    assert "query.py: line 3: the server answered 400: width takes …\n" in err
    assert sorted(out.split()) == ["a-1.jpg", "a-3.jpg"]
    assert sorted(json.loads(request.body)["prompt"] for request in server.requests) == ["a cat", "a dog", "a fox"]


@pytest.mark.parametrize(
    ("mark", "codec"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),  # PowerShell's > and Out-File
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (b"", "utf-16-le"),
    ],
)
def test_prompts_file_as_editors_save_it(client: Client, server: Server, mark: bytes, codec: str) -> None:
    Path("list.txt").write_bytes(mark + '{"prompt": "ein Füchslein 🦊"}\r\n赤い狐\r\n'.encode(codec))
    server.steps = [answer(), answer()]
    client.options.clear()
    status, out, _ = client.run("--prompts", "list.txt", "--filename", "a.jpg")
    assert (status, sorted(out.split())) == (0, ["a-1.jpg", "a-2.jpg"])
    prompts = sorted(json.loads(request.body)["prompt"] for request in server.requests)
    assert prompts == ["ein Füchslein 🦊", "赤い狐"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"\n", "list.txt holds no prompt"),
        (b'a\n{"prompt":\n', "line 2 of list.txt is not a JSON"),
        ("a cat\nein Füchslein\n".encode("latin-1"), "line 2 of list.txt is not UTF-8: save it as UTF-8"),
        (codecs.BOM_UTF16_LE + b"abc", "is not UTF-16"),
    ],
)
def test_prompts_file_that_is_wrong(client: Client, server: Server, text: bytes, line: str) -> None:
    Path("list.txt").write_bytes(text)
    client.options.clear()
    assert line in client.fail("--prompts", "list.txt", code=2)
    assert server.requests == []
