"""The shipped nginx.conf before a real TorchServe, the ready check, and systemd's units."""

import base64
import http.client
import io
import itertools
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple, Self

import psutil
import pytest
import requests
import yaml
from openai import AuthenticationError, DefaultHttpxClient, OpenAI
from PIL import Image

from sdxl_server.serving import readiness
from tests.openai_clients import RECORDED
from tests.server.eager import LONG, wait_for
from tests.server.test_backends import make_settings
from tests.serving import InThread
from tools.proxy import MAKE_KEY, PASS_KEY, LocalProxy, find_nginx
from tools.server import ROOT, LocalServer, make_archive, read_shipped

DEPLOY = ROOT / "deploy"
needs_nginx = pytest.mark.skipif(find_nginx() is None, reason="nginx and openssl are not installed")
PREDICTIONS = "/predictions/diffusion_fast"
# Each test has an address of its own, since the limits are for each address.
addresses = (f"127.0.{i}.{j}" for i, j in itertools.product(range(1, 250), range(1, 250)))


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes
    path: str

    @property
    def error(self) -> dict[str, Any]:
        assert self.headers["Content-Type"] == "application/json", self
        error: dict[str, Any] = json.loads(self.body)["error"]
        is_openai = self.path.removeprefix(f"{PREDICTIONS}/1.0").startswith("/v1")
        assert error["code"] == (None if is_openai else self.status)  # typed clients take no number
        return error


class Nginx(LocalProxy):
    """The proxy, with clients of any address of this machine."""

    @property
    def headers(self) -> dict[str, str]:
        """Those of a request in JSON."""
        return {**self.get_headers(), "Content-Type": "application/json"}

    def read_log(self, address: str | None = None) -> list[str]:
        """Return the access log's lines, or those about a client's address."""
        return [line for line in self.log if address in (None, line.split(" ", 1)[0])]

    def connect(self, address: str) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(
            "127.0.0.1", self.port, context=self.tls, timeout=60, source_address=(address, 0)
        )

    def ask(self, method: str, path: str, *, address: str, body: Any = None, **headers: str) -> Answer:
        connection = self.connect(address)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read(), path)
        finally:
            connection.close()

    def open_request(self, address: str, length: int, sent: bytes, **headers: str) -> ssl.SSLSocket:
        """Return a connection over which the header of a request and the beginning of its body have been sent."""
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=60, source_address=(address, 0))
        connection = self.tls.wrap_socket(plain, server_hostname="localhost")
        lines = [f"{name}: {value}" for name, value in {"Host": "localhost", **headers}.items()]
        head = "\r\n".join([f"POST {PREDICTIONS} HTTP/1.1", *lines, f"Content-Length: {length}", "", ""])
        connection.sendall(head.encode() + sent)
        return connection


class Server(LocalServer):
    """One that knows the worker that it has started with: it must outlive every request."""

    worker = 0

    def __enter__(self) -> Self:
        super().__enter__()
        self.worker = self.find_worker()
        return self


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    """One request at a time, and two that wait."""
    folder = tmp_path_factory.mktemp("server")
    settings = yaml.safe_load(make_settings(None)) | {"batchSize": 1, "jobQueueSize": 2}
    make_archive(folder, tiny_model, yaml.safe_dump(settings, sort_keys=False))
    running = Server(folder)
    assert check(running) == 1
    with running:
        assert check(running) == 0
        yield running
        assert check(running, "--answer", "30") == 0
        assert running.find_worker() == running.worker
    assert check(running) == 1


@pytest.fixture(scope="module")
def nginx(server: LocalServer) -> Iterator[Nginx]:
    with Nginx(server.ports["inference_address"], key_file=server.key_file) as running:
        yield running


@pytest.fixture
def address() -> str:
    return next(addresses)


def check(server: LocalServer, *arguments: str) -> int:
    """Return the exit code of the ready check."""
    places = (
        "--ts-config",
        str(server.folder / "config.properties"),
        "--key-file",
        str(server.key_file),
    )
    return readiness.main([*places, *arguments])


def make_body(steps: int, **fields: Any) -> bytes:
    return json.dumps({"prompt": "a red fox", "num_inference_steps": steps, **fields}).encode()


def check_a1111_error(answer: Answer) -> str:
    """Return the message of an error in A1111's form."""
    error = json.loads(answer.body)
    assert list(error) == ["error", "detail", "body", "errors"]
    assert (error["error"], error["detail"]) == ("invalid_request_error", error["errors"])
    return str(error["detail"])


def check_picture(body: bytes) -> None:
    picture = Image.open(io.BytesIO(body))
    picture.load()
    assert picture.size == (128, 128)


def test_numbers_agree_with_the_servers_settings() -> None:
    text = (DEPLOY / "nginx.conf").read_text()
    properties = (ROOT / "config.properties").read_text()
    limits = re.findall(r"client_max_body_size (\d+);|takes at most (\d+) bytes", text)
    assert [max(found) for found in limits] == re.findall(r"^max_request_size=(\d+)$", properties, re.M) * 2
    settings = read_shipped()
    (timeout,) = re.findall(r"proxy_read_timeout (\d+)s;", text)
    queue = settings["handler"]["max_running"] + settings["handler"]["max_waiting"]
    assert int(timeout) >= settings["responseTimeout"] * queue
    assert re.findall(r"upstream torchserve \{\s+#.*\s+server (127\S+) ", text) == re.findall(
        r"^inference_address=http://(.+)$", properties, re.M
    )


CLOSED = [
    ("POST", "/"),
    ("OPTIONS", "/"),
    ("POST", "/main.js"),
    ("GET", "/other.js"),
    ("GET", "/web.server.py"),
    ("GET", "/page/main.js"),
    ("GET", "/..%2f..%2ftokens"),
    ("GET", "/api-description"),
    ("GET", "/ping"),
    ("GET", "/models"),
    ("POST", "/models?url=https://example.org/x.mar"),
    ("GET", "/metrics"),
    ("GET", "/ready"),
    ("PUT", "/jobs"),
    ("POST", "/jobs/a-long-id"),
    ("GET", "/jobs/short"),
    ("GET", "/jobs/a-long-id/request.json"),
    ("GET", "/jobs/a-long-id/pictures/../../../metrics"),
    ("GET", "/workflows"),
    ("POST", "/workflows"),
    ("POST", "/workflows?url=https://example.org/x.war"),
    ("POST", "/wf-predict/diffusion_fast"),
    ("POST", "/explanations/diffusion_fast"),
    ("POST", "/explanations/diffusion_fast/1.0"),
    ("POST", "/v1/models/diffusion_fast:predict"),
    ("POST", "/v2/models/diffusion_fast/infer"),
    ("POST", "/invocations"),
    ("POST", "/predictions"),
    ("POST", "/predictions/other"),
    ("GET", PREDICTIONS),
    ("PUT", PREDICTIONS),
    ("OPTIONS", PREDICTIONS),
    ("TRACE", PREDICTIONS),
    ("POST", f"{PREDICTIONS}/2.0"),
    ("POST", f"{PREDICTIONS}/1.0/describe"),
    ("GET", f"{PREDICTIONS}/1.0/metadata"),
    ("POST", f"{PREDICTIONS}/1.0/v1/images/variations"),
    ("GET", f"{PREDICTIONS}/1.0/v1/images/generations"),
    ("GET", f"{PREDICTIONS}/1.0/other"),
    ("POST", f"{PREDICTIONS}/../../workflows"),
    ("POST", f"{PREDICTIONS}/%2e%2e/%2E%2e/workflows"),
    ("POST", f"{PREDICTIONS}/..%2f..%2fworkflows"),
    ("POST", f"//{PREDICTIONS}/1.0%00"),
    ("POST", f"{PREDICTIONS}%0a"),
    ("GET", f"{PREDICTIONS}/1.0/describe%0A"),
    ("GET", f"{PREDICTIONS}/1.0/v1/models/a/b"),
    ("GET", "/v1"),
    ("GET", "/v1/images/generations"),
    ("POST", "/v1/images/variations"),
    ("POST", "/v1/images/edits%0a"),
    ("POST", "/v1/images/generations/../../../workflows"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/models"),
    ("DELETE", "/v1/models/diffusion_fast"),
    ("GET", "/v1/models/..%2f..%2fdescribe"),
    ("GET", "/v1/models/a%20b"),
    ("GET", "/sdapi"),
    ("GET", "/sdapi/v1"),
    ("GET", "/sdapi/v1/"),
    ("GET", "/sdapi/v2/options"),
    ("PUT", "/sdapi/v1/options"),
    ("DELETE", "/sdapi/v1/interrupt"),
    ("GET", "/sdapi/v1/options/x"),
    ("POST", "/sdapi/v1/txt2img%0a"),
    ("POST", "/sdapi/v1/..%2f..%2fworkflows"),
    ("POST", "/sdapi/v1/txt2img/../../../workflows"),
    ("GET", f"{PREDICTIONS}/1.0/sdapi/v1/samplers%20x"),
    ("GET", "/controlnet"),
    ("GET", "/controlnet/model_list/x"),
    ("GET", "/controlnet/x/..%2f..%2fworkflows"),
    ("POST", "/controlnet/model_list"),
    ("POST", f"{PREDICTIONS}/1.0/controlnet/detect"),
]


@needs_nginx
def test_all_but_the_listed_paths_are_closed(server: LocalServer, nginx: Nginx, address: str) -> None:
    direct = f"http://127.0.0.1:{server.ports['inference_address']}"
    assert requests.options(direct, timeout=60).status_code == 200  # what is closed here would be open, without a token
    for method, path in CLOSED:
        answer = nginx.ask(method, path, address=address, **nginx.get_headers())
        assert answer.status in (400, 404), (method, path)  # 400: nginx itself takes no NUL
        if "/sdapi" in path or "/controlnet" in path:
            check_a1111_error(answer)
        else:
            assert answer.error["type"] == "invalid_request_error"
    wait_for(lambda: len(nginx.read_log(address)) == len(CLOSED))
    assert [line for line in nginx.read_log(address) if not line.endswith("upstream=-")] == []


@needs_nginx
def test_listed_paths_are_open(server: LocalServer, nginx: Nginx, address: str) -> None:
    for path in (PREDICTIONS, f"{PREDICTIONS}/1.0"):
        headers = {**nginx.headers, "X-Request-Id": f"order{path.count('/')}"}
        answer = nginx.ask("POST", path, address=address, body=make_body(2), **headers)
        assert answer.status == 200, answer.body
        assert (answer.headers["Content-Type"], answer.headers["Server"]) == ("image/jpeg", "nginx")
        assert "X-Seed" in answer.headers
        assert answer.headers.get_all("X-Request-Id") == [f"order{path.count('/')}"]
        check_picture(answer.body)
    wait_for(lambda: all(f'Request: {{"id": "order{number}"' in server.log for number in (2, 3)))
    below = f"{PREDICTIONS}/1.0"
    for path in ("describe", "openapi.json", "v1/models", "v1/models/diffusion_fast"):
        answer = nginx.ask("GET", f"{below}/{path}", address=address, **nginx.get_headers())
        assert answer.status == 200, path
        if path.startswith("v1"):
            assert nginx.ask("GET", f"/{path}", address=address, **nginx.get_headers()).body == answer.body
        json.loads(answer.body)
    answer = nginx.ask("POST", f"{below}/metadata", address=address, body=answer.body, **nginx.headers)
    assert "image is missing" in answer.error["message"]
    for path in (f"{below}/v1/images/edits", "/v1/images/edits"):
        answer = nginx.ask("POST", path, address=address, body=b'{"prompt": "a red fox"}', **nginx.headers)
        assert "image is missing" in answer.error["message"]
    unknown = nginx.ask("GET", "/v1/models/gpt-image-1", address=address, **nginx.get_headers())
    assert (unknown.status, unknown.error["code"]) == (404, None)


@needs_nginx
def test_unknown_tokens_are_refused(server: LocalServer, nginx: Nginx, address: str) -> None:
    """TorchServe's own key too: it is nginx's."""
    own, inner = nginx.token, server.get_headers()["Authorization"]
    wrong = ("Bearer wrong", inner, f"Bearer {own[:-1]}", f"Bearer {own}0", f"Basic {own}", own, "Bearer ", "Bearer")
    answers = [nginx.ask("POST", PREDICTIONS, address=address, body=b"a", Authorization=each) for each in wrong]
    answers += [nginx.ask("POST", path, address=address, body=b"a") for path in (PREDICTIONS, "/v1/images/edits")]
    for answer in answers:
        assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert "unknown or revoked" in answer.error["message"]
    wait_for(lambda: len(nginx.read_log(address)) == len(answers))
    log = nginx.read_log(address)
    assert all(line.endswith("holder= upstream=-") for line in log)
    assert not any(each.split()[-1] in line for each in (own, inner, "wrong") for line in log)
    for scheme in ("bearer", "BEARER "):
        headers = {"Authorization": f"{scheme} {own}"}
        assert nginx.ask("GET", "/v1/models", address=address, **headers).status == 200
    wait_for(lambda: "holder=local upstream=200" in nginx.read_log(address)[-1])


@needs_nginx
def test_body_that_is_too_large_is_refused(nginx: Nginx, address: str) -> None:
    """With its length told and in chunks."""
    body = b" " * 33_600_000
    for sent in (body, (body[i : i + 2**20] for i in range(0, len(body), 2**20))):
        answer = nginx.ask("POST", PREDICTIONS, address=address, body=sent, **nginx.headers)
        assert answer.status == 413
        assert "at most 33554432 bytes" in answer.error["message"]
    wait_for(lambda: len(nginx.read_log(address)) == 2)
    assert all(line.endswith("upstream=-") for line in nginx.read_log(address))
    largest = make_body(2).ljust(33_554_432)
    assert nginx.ask("POST", PREDICTIONS, address=address, body=largest, **nginx.headers).status == 200


@needs_nginx
@pytest.mark.parametrize("is_chunked", [False, True])
def test_urlencoded_form_that_is_large_is_refused(nginx: Nginx, address: str, is_chunked: bool) -> None:
    body = b"&".join([b"a"] * 60_000)
    sent = (body[i : i + 2**14] for i in range(0, len(body), 2**14)) if is_chunked else body
    kind = "application/x-www-form-URLENCODED; charset=utf-8"
    answer = nginx.ask("POST", PREDICTIONS, address=address, body=sent, Content_Type=kind, **nginx.get_headers())
    assert answer.status == 413
    assert "an urlencoded form 99999" in answer.error["message"]
    small = nginx.ask("POST", PREDICTIONS, address=address, body="a=b", Content_Type=kind, **nginx.get_headers())
    assert small.error["param"] == "a"
    wait_for(lambda: [line.endswith("upstream=-") for line in nginx.read_log(address)] == [True, False])


@needs_nginx
def test_what_is_not_https_is_answered_with_json(nginx: Nginx) -> None:
    answer = requests.get(f"http://127.0.0.1:{nginx.port}/", timeout=60)
    assert answer.status_code == 400
    assert "HTTPS" in answer.json()["error"]["message"]
    for version in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
        old = ssl.create_default_context(cafile=nginx.certificate)
        old.set_ciphers("ALL:@SECLEVEL=0")  # this side would speak it
        with pytest.warns(DeprecationWarning, match="TLS"):
            old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, version
        with socket.create_connection(("127.0.0.1", nginx.port)) as plain, pytest.raises(OSError, match="SSL"):
            old.wrap_socket(plain, server_hostname="localhost")


class Stub(InThread, ThreadingHTTPServer):
    """A server that notes each request, and answers with `status`, or hangs up when that is 0."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), StubHandler)
        self.status = 200
        self.begun = 0
        self.seen: list[tuple[str, dict[str, str], bytes]] = []


class StubHandler(BaseHTTPRequestHandler):
    server: Stub

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        self.server.begun += 1
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.seen.append((self.requestline, dict(self.headers), body))
        if self.server.status:
            answer = json.dumps({"own": self.server.status}).encode()
            self.send_response(self.server.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def stubbed() -> Iterator[tuple[Stub, Nginx]]:
    with Stub() as stub, Nginx(stub.server_address[1]) as nginx:
        yield stub, nginx


def send_raw(nginx: Nginx, lines: list[str], body: bytes = b"") -> tuple[int, dict[str, Any]]:
    """Return the status and the error of a request that no client library sends."""
    headers = [f"Authorization: Bearer {nginx.token}", "Host: localhost", "Connection: close"]
    with socket.create_connection(("127.0.0.1", nginx.port), timeout=60, source_address=(next(addresses), 0)) as plain:
        connection = nginx.tls.wrap_socket(plain, server_hostname="localhost")
        connection.sendall("\r\n".join([lines[0], *headers, *lines[1:], "", ""]).encode() + body)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        assert (answer.headers["Content-Type"] or "").startswith("application/json"), answer.read()
        error: dict[str, Any] = json.loads(answer.read())["error"]
    return answer.status, error


V1 = "/v1/images/generations"


@needs_nginx
@pytest.mark.parametrize(
    ("lines", "body", "status"),
    [
        (["garbage"], b"", 400),
        ([f"GET /{'x' * 9000} HTTP/1.1"], b"", 400),
        (["GET / HTTP/1.1", f"X-Long: {'x' * 9000}"], b"", 400),
        ([f"POST {PREDICTIONS} HTTP/1.1", "Content-Length: x"], b"", 400),
        ([f"POST {PREDICTIONS} HTTP/1.1", "Transfer-Encoding: chunked"], b"zz\r\n", 400),
        ([f"POST {V1} HTTP/1.1", "Transfer-Encoding: chunked"], b"zz\r\n", 400),
        (["TRACE / HTTP/1.1"], b"", 404),
        (["GET /error HTTP/1.1"], b"", 404),
        (["GET /other.html HTTP/1.1"], b"", 404),
        (["GET /main.js HTTP/1.1", 'If-Match: "other"'], b"", 412),
        (["GET /main.js HTTP/1.1", "Range: bytes=99999999-"], b"", 416),
        ([f"POST {PREDICTIONS} HTTP/1.1", "Transfer-Encoding: gzip"], b"", 501),
        ([f"POST {V1} HTTP/1.1", "Transfer-Encoding: gzip"], b"", 501),
        (["GET / HTTP/9.9"], b"", 505),
    ],
)
def test_nginxs_own_errors_are_json(stubbed: tuple[Stub, Nginx], lines: list[str], body: bytes, status: int) -> None:
    answered, error = send_raw(stubbed[1], lines, body)
    kind = "invalid_request_error"
    assert (answered, error["type"], error["code"]) == (status, kind, None if V1 in lines[0] else status)
    assert error["message"]


def encode_basic(user: str, password: str) -> str:
    return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"


@needs_nginx
def test_basic_authentication_names_the_holder(stubbed: tuple[Stub, Nginx], address: str) -> None:
    """A key of deploy/make-key is also the password of its owner."""
    stub, nginx = stubbed
    made = subprocess.run([MAKE_KEY, "anna.b-1"], capture_output=True, text=True, check=True, timeout=10).stdout
    key, basic = (line.split()[0] for line in made.splitlines())
    assert re.fullmatch(rf"{key} anna.b-1;\n{re.escape(basic)} anna.b-1;\n", made)
    nginx.write_tokens({nginx.token: "local", key: "anna.b-1", basic: "anna.b-1"})
    nginx.command("-s", "reload")

    def send(authorization: str, path: str = "/sdapi/v1/txt2img", method: str = "POST") -> Answer:
        headers = {"Authorization": authorization, "X-Holder": "local", "x_holder": "local"}
        return nginx.ask(method, path, address=address, body=b"{}" if method == "POST" else None, **headers)

    wait_for(lambda: send(f"Bearer {key}").status == 200)
    for authorization in (
        f"Bearer {key}",
        encode_basic("anna.b-1", key),
        encode_basic("anna.b-1", key).replace("B", "b", 1),
    ):
        stub.seen.clear()
        assert send(authorization).status == 200
        ((line, headers, _),) = stub.seen
        assert line == f"POST {PREDICTIONS}/1.0/sdapi/v1/txt2img HTTP/1.1"
        assert {name: value for name, value in headers.items() if "holder" in name.lower()} == {"X-Holder": "anna.b-1"}
        assert send(authorization, PREDICTIONS).status == 200
        assert "X-Holder" not in stub.seen[-1][1]  # only where it has a meaning
    stub.seen.clear()
    coded = basic.removeprefix("basic:")
    wrong = [encode_basic("ben", key), encode_basic("anna.b-1", key[:-1]), encode_basic("anna.b-1", f"{key}0")]
    for authorization in (
        *wrong,
        encode_basic("", key),
        f"Basic {key}",
        f"Basic {basic}",
        f"Bearer {coded}",
        f"Bearer {basic}",
    ):
        answer = send(authorization)
        assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")  # no browser keeps a password
        assert "HTTP Basic with its holder's name and the API key" in check_a1111_error(answer)
    assert stub.seen == []


@needs_nginx
@pytest.mark.parametrize(
    ("query", "passed", "is_warned"),
    [
        ("", "", False),
        ("?skip_current_image=true", "/skip_current_image", False),
        ("?skip_current_image=True&url_path=x", "/skip_current_image", False),
        ("?skip_current_image=false", "", True),
        ("?X-Holder=anna", "", True),
    ],
)
def test_progress_has_its_query(
    stubbed: tuple[Stub, Nginx], address: str, query: str, passed: str, is_warned: bool
) -> None:
    stub, nginx = stubbed
    for below in ("", f"{PREDICTIONS}/1.0"):
        path = f"{below}/sdapi/v1/progress{query}"
        answer = nginx.ask("GET", path, address=address, **nginx.get_headers())
        assert answer.status == 200
        assert stub.seen[-1][0] == f"GET {PREDICTIONS}/1.0/sdapi/v1/progress{passed} HTTP/1.1"
        assert ("X-Warning" in answer.headers) is is_warned
    nginx.ask("POST", f"/sdapi/v1/interrupt{query}", address=address, body=b"", **nginx.get_headers())
    assert stub.seen[-1][0] == f"POST {PREDICTIONS}/1.0/sdapi/v1/interrupt HTTP/1.1"


@pytest.mark.parametrize("arguments", [[], [""], ["a b"], ["a;"], ["a\nb"], ["-n*"]])
def test_a_key_has_a_plain_name(arguments: list[str]) -> None:
    done = subprocess.run([MAKE_KEY, *arguments], capture_output=True, text=True, timeout=10)
    assert (done.returncode, done.stdout) == (1, "")
    assert "make-key takes the holder's name" in done.stderr


class Changed(Nginx):
    """The proxy with other texts in its configuration."""

    def __init__(self, upstream: int, changes: dict[str, str]) -> None:
        super().__init__(upstream)
        self.changes = changes

    def make_configuration(self) -> str:
        text = super().make_configuration()
        for shipped, changed in self.changes.items():
            assert shipped in text
            text = text.replace(shipped, changed)
        return text


@needs_nginx
@pytest.mark.parametrize("path", [PREDICTIONS, V1])
def test_server_that_does_not_answer_in_time_is_told(path: str, address: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        upstream = silent.getsockname()[1]
        with Changed(upstream, {"proxy_read_timeout 10800s": "proxy_read_timeout 1s"}) as nginx:
            answer = nginx.ask("POST", path, address=address, body=b"x", **nginx.get_headers())
    assert (answer.status, answer.error["type"], answer.headers["Retry-After"]) == (504, "server_error", "10")
    assert "in time" in answer.error["message"]


@needs_nginx
@pytest.mark.parametrize("path", [PREDICTIONS, V1])
def test_failure_of_nginx_itself_is_told(path: str, address: str) -> None:
    """It cannot write a large body down."""
    with Stub() as stub, Nginx(stub.server_address[1]) as nginx:
        shutil.rmtree(nginx.folder / "client_body")
        answer = nginx.ask("POST", path, address=address, body=b"x" * 300_000, **nginx.get_headers())
    assert (answer.status, answer.error["type"], stub.begun) == (500, "server_error", 0)


@needs_nginx
def test_large_body_may_wait_for_a_busy_server(address: str) -> None:
    """HAProxy reads 64 KB of it, and the rest when an instance is free. nginx's default is shortened from 60 s."""
    with socket.create_server(("127.0.0.1", 0)) as busy:
        upstream = busy.getsockname()[1]
        with (
            ThreadPoolExecutor(1) as pool,
            Changed(upstream, {"\nhttp {\n": "\nhttp {\nproxy_send_timeout 1s;\n"}) as nginx,
        ):
            asked = pool.submit(
                nginx.ask, "POST", PREDICTIONS, address=address, body=b"x" * 5_000_000, **nginx.get_headers()
            )
            connection, _ = busy.accept()
            with connection:
                time.sleep(2.5)
                assert not asked.done()
                received = 0
                while received < 5_000_000:
                    received += len(connection.recv(1 << 20))
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                assert asked.result().status == 200


@needs_nginx
def test_only_the_path_and_three_headers_are_passed_on(stubbed: tuple[Stub, Nginx], address: str) -> None:
    """The path as it was compared with the list, and without a query; an id that could do harm is replaced."""
    stub, nginx = stubbed
    passed = {"Content-Type": "text/plain", "Accept": "image/*"}
    dropped = ("describe", "explain", "url_path", "ts_request_sequence_id", "X-Forwarded-For", "Cookie", "Expect-CT")
    connection = nginx.connect(address)
    path = f"/workflows/..//{PREDICTIONS}?customized=true&prompt=a+cat"
    connection.request(
        "POST",
        path,
        b"a red fox",
        {**nginx.get_headers(), **passed, **dict.fromkeys(dropped, "True"), "X-Request-Id": "a b"},
    )
    answer = connection.getresponse()
    assert (answer.status, answer.headers["X-Warning"]) == (200, "the query of the address is ignored")
    connection.close()
    line, headers, body = stub.seen[-1]
    assert (line, body) == (f"POST {PREDICTIONS} HTTP/1.1", b"a red fox")
    request_id = headers.pop("X-Request-Id")
    assert re.fullmatch(r"[0-9a-f]{32}", request_id)
    assert answer.headers.get_all("X-Request-Id") == [request_id]
    assert headers == {**passed, "Host": "torchserve", "Connection": "close", "Content-Length": "9"}
    wait_for(lambda: nginx.read_log(address))
    assert "cat" not in nginx.read_log(address)[0]


@needs_nginx
def test_upload_arrives_whole(stubbed: tuple[Stub, Nginx], address: str) -> None:
    stub, nginx = stubbed
    before = stub.begun
    with nginx.open_request(address, 300_000, b"x" * 200_000, **nginx.get_headers()) as connection:
        time.sleep(0.5)
        assert stub.begun == before
        connection.sendall(b"x" * 100_000)
        assert connection.recv(12) == b"HTTP/1.1 200"
    assert len(stub.seen[-1][2]) == 300_000


@needs_nginx
@pytest.mark.parametrize("status", [400, 404, 500, 504, 507])
def test_errors_of_torchserve_pass_as_they_are(stubbed: tuple[Stub, Nginx], address: str, status: int) -> None:
    stub, nginx = stubbed
    stub.status = status
    answer = nginx.ask("POST", PREDICTIONS, address=address, body=b"x", **nginx.get_headers())
    assert (answer.status, json.loads(answer.body)) == (status, {"own": status})


@needs_nginx
@pytest.mark.parametrize(("status", "told", "kind"), [(503, 503, "server_busy"), (0, 502, "server_error")])
@pytest.mark.parametrize("path", [PREDICTIONS, "/v1/images/generations", f"{PREDICTIONS}/1.0/v1/images/edits"])
def test_busy_and_dead_servers_are_told_apart(
    stubbed: tuple[Stub, Nginx], address: str, path: str, status: int, told: int, kind: str
) -> None:
    stub, nginx = stubbed
    stub.status, before = status, len(stub.seen)
    answer = nginx.ask("POST", path, address=address, body=b"x", **nginx.get_headers())
    assert (answer.status, answer.error["type"]) == (told, kind)
    assert int(answer.headers["Retry-After"]) > 0
    assert len(stub.seen) == before + 1  # it was not tried twice


@needs_nginx
def test_full_queue_is_called_busy(server: LocalServer, nginx: Nginx, address: str) -> None:
    def ask(prompt: str, **fields: Any) -> Answer:
        body = json.dumps({"prompt": prompt, "num_inference_steps": 2, **fields})
        return nginx.ask("POST", PREDICTIONS, address=address, body=body, **nginx.headers)

    with ThreadPoolExecutor(6) as pool:
        long = pool.submit(ask, "to fill the worker", **{**LONG, "num_images_per_prompt": 1})
        wait_for(lambda: "to fill the worker" in server.log)
        answers = list(pool.map(ask, ["a red fox"] * 5))
        made = [answer for answer in (*answers, long.result()) if answer.status == 200]
    refused = [answer for answer in answers if answer.status != 200]
    assert len(made) == 3  # one in the worker and two in the queue
    for answer in made:
        check_picture(answer.body)
    for answer in refused:
        assert (answer.status, int(answer.headers["Retry-After"])) == (503, 10)
        message = "the server is busy, or its model is still loading; ask again later"
        assert answer.error == {"message": message, "type": "server_busy", "param": None, "code": 503}


@needs_nginx
def test_address_that_asks_too_often_is_refused(nginx: Nginx, address: str) -> None:
    answers = [nginx.ask("POST", PREDICTIONS, address=address, body=b"{", **nginx.headers) for _ in range(60)]
    assert {answer.status for answer in answers[:31]} == {400}
    refused = [answer for answer in answers if answer.status == 429]
    assert len(refused) > 5
    assert refused[0].error["type"] == "rate_limit_error"
    assert int(refused[0].headers["Retry-After"]) > 0
    other = nginx.ask("POST", PREDICTIONS, address=next(addresses), body=b"{", **nginx.headers)
    assert other.status == 400


@needs_nginx
def test_slow_clients_are_cut_off_and_hold_nobody(nginx: Nginx, address: str) -> None:
    start = time.monotonic()
    slow = [nginx.open_request(address, 100, b'{"prompt":', **nginx.headers) for _ in range(8)]
    plain = socket.create_connection(("127.0.0.1", nginx.port), timeout=60)  # not even TLS
    silent = nginx.tls.wrap_socket(
        socket.create_connection(("127.0.0.1", nginx.port), timeout=60), server_hostname="localhost"
    )
    silent.sendall(b"POST / HTTP/1.1\r\nX-Slow: ")
    time.sleep(0.5)
    body, headers = make_body(2), nginx.headers
    ninth = nginx.ask("POST", PREDICTIONS, address=address, body=body, **headers)
    assert (ninth.status, ninth.error["type"]) == (429, "rate_limit_error")
    other = nginx.ask("POST", PREDICTIONS, address=next(addresses), body=body, **headers)
    assert other.status == 200
    assert time.monotonic() - start < 8
    for connection in (*slow, silent, plain):
        with connection:
            try:
                assert connection.recv(1) == b""
            except (ConnectionResetError, ssl.SSLError):
                continue
    assert 9 < time.monotonic() - start < 20
    assert nginx.ask("POST", PREDICTIONS, address=address, body=body, **headers).status == 200


@needs_nginx
def test_stream_arrives_step_by_step(nginx: Nginx, address: str) -> None:
    connection = nginx.connect(address)
    connection.request("POST", PREDICTIONS, make_body(20, stream=True), nginx.headers)
    answer = connection.getresponse()
    assert answer.headers["Content-Type"] == "text/event-stream"
    arrived = []
    while line := answer.readline():
        if line.startswith(b"data:"):
            arrived.append((time.monotonic(), json.loads(line.removeprefix(b"data:"))))
    connection.close()
    assert [event["type"] for _, event in arrived] == ["progress"] * 19 + ["image_generation.completed"]
    check_picture(base64.b64decode(arrived[-1][1]["b64_json"]))
    (first, told), (last, told_last) = arrived[0], arrived[18]
    assert last - first > (told_last["seconds"] - told["seconds"]) / 2


@needs_nginx
def test_work_ends_when_the_client_leaves(server: LocalServer, nginx: Nginx, address: str) -> None:
    left = r"The client has left; its work has ended after step \d+ of 149"
    connection = nginx.open_request(address, len(make_body(149)), make_body(149), **nginx.headers)
    wait_for(lambda: '"num_inference_steps": 149' in server.log)
    time.sleep(0.5)
    connection.close()
    time.sleep(0.5)
    nginx.ask("POST", PREDICTIONS, address=address, body=make_body(1), **nginx.headers)
    wait_for(lambda: re.search(left, server.log))  # the handler learns of it with the next request


@needs_nginx
def test_openai_client_works_through_it(server: LocalServer, nginx: Nginx) -> None:
    with DefaultHttpxClient(verify=nginx.tls) as transport:
        url = f"https://localhost:{nginx.port}/v1"
        client = OpenAI(base_url=url, api_key=nginx.token, http_client=transport, max_retries=0)
        assert client.models.retrieve("diffusion_fast").owned_by == "user"
        assert [model.id for model in client.models.list()] == ["diffusion_fast"]
        answer = client.images.generate(prompt="a red fox", extra_body={"num_inference_steps": 2})
        assert answer.data is not None
        check_picture(base64.b64decode(answer.data[0].b64_json or ""))
        events = client.images.generate(prompt="a red fox", stream=True, partial_images=1)
        kinds = [event.type for event in events]
        assert kinds == ["image_generation.partial_image", "image_generation.completed"]
        with pytest.raises(AuthenticationError, match="unknown or revoked"):
            client.with_options(api_key=server.get_headers()["Authorization"].split()[1]).models.list()


@needs_nginx
@pytest.mark.parametrize("client", RECORDED)
def test_recorded_clients_get_their_pictures(client: str, nginx: Nginx, address: str) -> None:
    recorded = RECORDED[client]
    if recorded.files:
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
        files = {name: ("image.png", buffer.getvalue(), "image/png") for name in recorded.files}
        sent = requests.Request("POST", "http://x", data=dict(recorded.fields), files=files).prepare()
        body, kind = sent.body, sent.headers["Content-Type"]
    else:
        body, kind = recorded.make_body(), "application/json"
    path = f"/{recorded.path}?{recorded.query}".removesuffix("?")
    answer = nginx.ask("POST", path, address=address, body=body, Content_Type=kind, **nginx.get_headers())
    assert answer.status == 200, answer.body
    told = json.loads(answer.body)
    assert len(told["data"]) == int(recorded.fields.get("n", 1))
    for each in told["data"]:
        content = each[recorded.reads]
        head, _, encoded = content.rpartition(",")
        assert head in ("", "data:image/png;base64")
        Image.open(io.BytesIO(base64.b64decode(encoded))).load()
    warnings = told["warnings"] + (answer.headers.get_all("X-Warning") or [])
    assert ("the query of the address is ignored" in warnings) == bool(recorded.query)
    for part in recorded.warned:
        assert part in "; ".join(warnings)


def list_models(nginx: Nginx, token: str) -> int:
    """Return the status of the answer to who has this token."""
    return nginx.ask("GET", "/v1/models", address=next(addresses), Authorization=f"Bearer {token}").status


@pytest.mark.parametrize(
    "text",
    [
        '{"inference": {"key": "abc"}}',
        '  "inference": {\n    "key": "a\\"; } server { listen 81; } map x $y {",\n  }\n',
        '  "management": {\n    "key": "abcdefgh",\n  }\n',
        "",
    ],
)
def test_only_a_key_gets_into_nginx(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    done = subprocess.run([PASS_KEY, tmp_path / "keys", tmp_path / "to"], capture_output=True, text=True, timeout=10)
    assert (done.returncode, "holds no inference key" in done.stderr) == (1, True)
    assert not (tmp_path / "to").exists()


@needs_nginx
def test_nginx_needs_no_key_file(tmp_path: Path, address: str) -> None:
    """It starts before TorchServe has written a key, takes the key by a reload, and may lose it again."""

    def sends(key: str | None) -> bool:
        assert nginx.ask("POST", PREDICTIONS, address=address, body=b"x", **nginx.get_headers()).status == 200
        return stub.seen[-1][1].get("Authorization") == key

    with Stub() as stub, Nginx(stub.server_address[1]) as nginx:
        assert not list(nginx.folder.glob("torchserve_key*"))
        assert sends(None)
        for key in ("first", "second"):
            (tmp_path / "key_file.json").write_text(f'{{\n  "inference": {{\n    "key": "{key}",\n  }}\n}}')
            nginx.key_file = tmp_path / "key_file.json"
            nginx.pass_key()
            (nginx.folder / ".new-key").write_text("what an interrupted pass-key leaves")
            nginx.command("-s", "reload")
            wait_for(partial(sends, f"Bearer {key}"))
        (nginx.folder / "torchserve_key").unlink()
        nginx.command("-s", "reload")
        wait_for(partial(sends, None))


def test_key_may_come_through_a_pipe(tmp_path: Path) -> None:
    """As from `docker exec sdxl cat key_file.json`."""
    text = '{\n  "inference": {\n    "key": "abc",\n  }\n}'
    subprocess.run([PASS_KEY, "/dev/stdin", tmp_path / "torchserve_key"], input=text, text=True, check=True, timeout=10)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"torchserve_key": 'default "Bearer abc";\n'}


@needs_nginx
def test_stopped_worker_is_ready_but_does_not_answer(server: LocalServer, capsys: pytest.CaptureFixture[str]) -> None:
    worker = psutil.Process(server.find_worker())
    assert check(server, "--answer", "30") == 0
    worker.suspend()
    try:
        assert check(server) == 0  # TorchServe does not notice
        assert check(server, "--answer", "2") == 1
    finally:
        worker.resume()
    assert re.fullmatch(r"no answer from http://\S+/1.0/describe within 2 s\n", capsys.readouterr().err)
    assert check(server, "--answer", "10", "--wait", "30") == 0


def keep_asking(nginx: Nginx, headers: dict[str, str]) -> list[Answer]:
    """Ask for pictures, one after the other, until no new connection is taken; what a connection has been made for must
    be answered."""
    answers: list[Answer] = []
    while True:
        connection = nginx.connect(next(addresses))
        try:
            connection.connect()
        except OSError:
            return answers
        connection.request("POST", PREDICTIONS, make_body(30), headers)
        answer = connection.getresponse()
        answers.append(Answer(answer.status, answer.headers, answer.read(), PREDICTIONS))
        connection.close()


@needs_nginx
def test_drain_answers_what_has_been_accepted(server: LocalServer) -> None:
    body = make_body(2)
    # nginx ends before the pool waits for its clients.
    with ThreadPoolExecutor(5) as pool, Nginx(server.ports["inference_address"], key_file=server.key_file) as nginx:
        clients = [pool.submit(keep_asking, nginx, nginx.headers) for _ in range(5)]
        idle = nginx.connect(next(addresses))
        idle.request("GET", "/")
        idle.getresponse().read()
        wait_for(lambda: sum('" 200 ' in line for line in nginx.read_log()) > 1)
        with nginx.open_request(next(addresses), len(body), body[:9], **nginx.headers) as upload:
            nginx.command("-s", "quit")
            wait_for(lambda: is_refused(nginx.port), seconds=5)
            assert nginx.process.is_running()  # the worker is busy, and TorchServe's queue is full
            upload.sendall(body[9:])
            uploaded = upload.makefile("rb").read()
        assert idle.sock.recv(1) == b""  # it was closed
        answers = [answer for client in clients for answer in client.result(timeout=60)]
        nginx.process.wait(timeout=10)
    assert re.match(rb"HTTP/1.1 (200|503) ", uploaded)
    pictures = [answer.body for answer in answers if answer.status == 200]
    assert len(pictures) > 3
    for picture in pictures:
        check_picture(picture)
    for answer in answers:
        assert answer.status == 200 or answer.error["type"] == "server_busy"


def is_refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None or not Path("/lib/systemd/system/nginx.service").exists(),
    reason="systemd and nginx are not installed",
)
def test_units_are_understood(tmp_path: Path) -> None:
    """By systemd-analyze; what they do is not seen here."""
    shutil.copytree(DEPLOY, tmp_path, dirs_exist_ok=True)
    shutil.copy("/lib/systemd/system/nginx.service", tmp_path)
    for unit in (*tmp_path.glob("torchserve*.service"), *tmp_path.glob("sdxl*.service")):
        text = unit.read_text().replace("/opt/sdxl/.venv/", f"{sys.prefix}/").replace("/opt/sdxl", str(ROOT))
        unit.write_text(text.replace("User=sdxl", "User=daemon"))
    units = [*tmp_path.glob("torchserve*"), *tmp_path.glob("sdxl*"), tmp_path / "nginx.service"]
    assert len(units) == 11
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, units)],
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


@needs_nginx
def test_stored_token_works_after_a_restart(server: Server) -> None:
    """As a front end keeps it; TorchServe's own key is another one then. The other tests' nginx has the first key."""
    first = server.key_file.read_text()
    with Nginx(server.ports["inference_address"], key_file=server.key_file) as nginx:
        nginx.write_tokens({nginx.token: "open-webui", "f" * 64: "somebody-else"})
        nginx.command("-s", "reload")
        wait_for(lambda: list_models(nginx, "f" * 64) == 200)
        assert list_models(nginx, nginx.token) == 200
        assert server.find_worker() == server.worker
        server.__exit__(None, None, None)
        assert list_models(nginx, nginx.token) == 502
        server.__enter__()
        assert server.key_file.read_text() != first
        assert list_models(nginx, nginx.token) == 400  # TorchServe's: it has not been passed on yet
        nginx.pass_key()
        nginx.command("-s", "reload")
        wait_for(lambda: list_models(nginx, nginx.token) == 200)
        nginx.write_tokens({nginx.token: "open-webui"})
        nginx.command("-s", "reload")
        wait_for(lambda: list_models(nginx, "f" * 64) == 401)
        assert list_models(nginx, nginx.token) == 200
