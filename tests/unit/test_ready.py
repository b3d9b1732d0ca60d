"""The readiness check on servers in all states. tests/server/test_deploy.py runs it on a real one."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from jobs.drawing import is_ready
from jobs.settings import Settings
from sdxl_server.serving import container, readiness, rolling_restart
from tools.server import ROOT

REFUSED = {"code": 400, "type": "InvalidKeyException", "message": "Token Authorization failed."}


class Server(ThreadingHTTPServer):
    """A server that answers each path with a status and JSON, after `seconds`."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, tuple[int, Any]] = {
            "/models/diffusion_fast": (200, describe("READY")),
            "/predictions/diffusion_fast/1.0/describe": (200, {}),
        }
        self.seconds = 0.0
        self.tokens: list[tuple[str, str]] = []


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        time.sleep(self.server.seconds)
        self.server.tokens.append((self.path, self.headers["Authorization"]))
        status, answer = self.server.answers.get(self.path, (404, {}))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_: object) -> None:
        pass


def describe(*statuses: str) -> list[dict[str, Any]]:
    return [{"modelName": "diffusion_fast", "workers": [{"status": status} for status in statuses]}]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that is ready; the current folder holds its settings and keys."""
    monkeypatch.chdir(tmp_path)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        address = f"http://127.0.0.1:{running.server_address[1]}"
        Path("config.properties").write_text(
            f"# a comment\ninference_address={address}\nmanagement_address={address}\n"
        )
        Path("key_file.json").write_text(json.dumps({"inference": {"key": "one"}, "management": {"key": "two"}}))
        yield running
        running.shutdown()
        thread.join()


def test_ready_model_is_asked_with_the_right_tokens(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert readiness.main([]) == 0
    assert server.tokens == [("/models/diffusion_fast", "Bearer two")]
    assert readiness.main(["--answer", "5"]) == 0
    assert server.tokens[2:] == [("/predictions/diffusion_fast/1.0/describe", "Bearer one")]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("line", ["disable_token_authorization=true", "disable_token_authorization = TRUE "])
def test_server_without_keys_needs_no_key_file(server: Server, capsys: pytest.CaptureFixture[str], line: str) -> None:
    Path("key_file.json").unlink()
    with Path("config.properties").open("a") as file:
        file.write(f"{line}\n")
    assert readiness.main(["--answer", "5"]) == 0
    assert [token for _, token in server.tokens] == [None, None]
    server.answers["/models/diffusion_fast"] = (200, describe("STOPPED"))
    assert readiness.main([]) == 1
    assert "STOPPED" in capsys.readouterr().err


def test_server_with_keys_needs_the_key_file(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    Path("key_file.json").unlink()
    with Path("config.properties").open("a") as file:
        file.write("#disable_token_authorization=true\ndisable_token_authorization=false\n")
    assert readiness.main([]) == 1
    assert "key_file.json is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (200, describe("READY", "LOADING"), "diffusion_fast's workers: READY, LOADING"),
        (200, describe("STOPPED"), "diffusion_fast's workers: STOPPED"),
        (200, describe(), "diffusion_fast has no worker"),
        (200, {}, "does not answer like TorchServe"),
        (400, REFUSED, "the token is refused"),
        (404, {}, "there is no model at http://"),
        (500, {"message": "oh"}, "answers 500"),
    ],
)
def test_the_reason_is_printed(
    server: Server, capsys: pytest.CaptureFixture[str], status: int, answer: Any, message: str
) -> None:
    server.answers["/models/diffusion_fast"] = (status, answer)
    assert readiness.main([]) == 1
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_files_that_are_missing_are_named(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (("config.properties", None), ("key_file.json", None), ("key_file.json", "{}")):
        path = Path(name)
        kept = path.read_text()
        path.unlink() if content is None else path.write_text(content)
        assert readiness.main([]) == 1
        assert name in capsys.readouterr().err
        path.write_text(kept)
    assert readiness.main([]) == 0


def test_slow_answer_is_no_answer(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.seconds = 0.5
    assert readiness.main(["--answer", "0.2"]) == 1
    assert "/1.0/describe within 0.2 s" in capsys.readouterr().err
    server.answers["/predictions/diffusion_fast/1.0/describe"] = (503, {})
    assert readiness.main(["--answer", "5"]) == 1


def test_it_waits_until_the_model_is_ready(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    loading = {"/models/diffusion_fast": (200, describe("LOADING"))}
    loaded, server.answers = server.answers, loading
    start = time.monotonic()
    assert readiness.main(["--wait", "1"]) == 1
    assert 0.5 <= time.monotonic() - start < 5
    assert capsys.readouterr().err.count("\n") == 1
    threading.Timer(0.7, lambda: setattr(server, "answers", loaded)).start()
    assert readiness.main(["--wait", "30"]) == 0


@pytest.fixture
def elsewhere(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The server's address, in an environment with a proxy that nobody runs, and a key for the address in .netrc."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{holder.getsockname()[1]}")
    monkeypatch.delenv("no_proxy", raising=False)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_servers_are_asked_directly(server: Server, elsewhere: str) -> None:
    """By the readiness check, a drain, a rolling restart, and the jobs' workers."""
    server.answers["/metrics"] = (200, {})
    server.answers["/ready"] = (200, {})
    server.answers["/here/1.0/v1/models"] = (200, {})
    assert readiness.main([]) == 0
    assert container.is_busy(f"{elsewhere}/metrics")
    assert rolling_restart.is_instance_ready(f"{elsewhere}/ready")
    assert is_ready(Settings(predictions=f"{elsewhere}/here"))
    assert [key for _, key in server.tokens] == ["Bearer two", None, None, None]


def test_program_without_a_server(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))  # nobody listens here
        address = f"http://127.0.0.1:{holder.getsockname()[1]}"
        (tmp_path / "config.properties").write_text(f"management_address={address}\n")
        (tmp_path / "key_file.json").write_text('{"management": {"key": "x"}}')
        done = subprocess.run(
            [
                *(sys.executable, "-m", "sdxl_server.serving.readiness"),
                *("--ts-config", tmp_path / "config.properties", "--key-file", tmp_path / "key_file.json"),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
    expected = f"no server at {address}/models/diffusion_fast\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)
