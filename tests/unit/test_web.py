"""The web UI's server on one machine: its files, its clients and the requests that it forwards."""

import contextlib
import http.client
import json
import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from sdxl_server.request.upload_limits import IMAGE_FORMATS
from tests.newer_browsers import find_newer
from tools.server import ROOT, find_free_ports
from web.__main__ import main
from web.server import HEADERS, MAX_REQUEST, PAGE, PASSED, PREDICTIONS, PageServer

MAX_PAGE = 100_000  # bytes of all its files
SENT = {"Retry-After": "3", "ETag": '"a"', "Location": "/jobs/12345678"}
JOB_REQUESTS = (
    *(("GET", "/jobs"), ("POST", "/jobs"), ("GET", "/jobs/my-fox_1"), ("PUT", "/jobs/my-fox_1")),
    *(("DELETE", "/jobs/my-fox_1"), ("GET", "/jobs/my-fox_1/preview"), ("GET", "/jobs/my-fox_1/pictures/12")),
    ("GET", "/jobs/my-fox_1/pictures/12/metadata"),
)


class Upstream(ThreadingHTTPServer):
    """Stands for TorchServe or the jobs' API: records requests and a client that leaves, answers with one event."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), UpstreamHandler)
        self.seen: list[tuple[str, dict[str, str], bytes]] = []
        self.is_left = threading.Event()


class UpstreamHandler(BaseHTTPRequestHandler):
    server: Upstream

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
        time.sleep(0.05)  # in which a client that is still there could be taken for one that has left
        self.send_response(200)
        for name, value in {"Content-Type": "text/event-stream", **SENT, "X-Other": "1"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"event: progress\ndata: {}\n\n")
        if b"long" in body and self.connection.recv(1) == b"":
            self.server.is_left.set()

    do_GET = do_PUT = do_DELETE = do_POST

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def run(server: ThreadingHTTPServer) -> Iterator[None]:
    with server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield
        server.shutdown()


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    server = Upstream()
    with run(server):
        yield server


@pytest.fixture
def page(upstream: Upstream) -> Iterator[PageServer]:
    server = PageServer(f"http://127.0.0.1:{upstream.server_address[1]}", port=0)
    with run(server):
        yield server


@pytest.fixture
def jobs() -> Iterator[Upstream]:
    server = Upstream()
    with run(server):
        yield server


@pytest.fixture
def page_with_jobs(upstream: Upstream, jobs: Upstream) -> Iterator[PageServer]:
    addresses = [f"http://127.0.0.1:{server.server_address[1]}" for server in (upstream, jobs)]
    server = PageServer(addresses[0], port=0, jobs=addresses[1])
    with run(server):
        yield server


def test_page_is_small_and_comes_with_its_headers(page: PageServer) -> None:
    assert sum(path.stat().st_size for path in PAGE.iterdir()) <= MAX_PAGE
    for path in PAGE.iterdir():
        answer = requests.get(f"http://{page.hosts[0]}/{path.name}", timeout=10)
        assert answer.content == path.read_bytes()
        assert HEADERS.items() <= dict(answer.headers).items()
    assert requests.get(f"http://{page.hosts[1]}/", timeout=10).content == (PAGE / "index.html").read_bytes()
    for closed in ("/server.py", "/../server.py", "/page", "/..", "/%2e%2e/server.py", "/ping", "/models"):
        connection = http.client.HTTPConnection(page.hosts[0])
        connection.request("GET", closed)
        assert connection.getresponse().status == 404, closed


def test_page_in_a_container() -> None:
    """It listens on the container's address. Browsers use the port that is published on loopback."""
    (port,) = find_free_ports(1)
    with run(PageServer("http://sdxl:8080", address="0.0.0.0", port=port)):
        for host, status in ((f"127.0.0.1:{port}", 200), (f"localhost:{port}", 200), (f"127.0.0.2:{port}", 403)):
            answer = requests.get(f"http://127.0.0.2:{port}/", headers={"Host": host}, timeout=10)
            assert answer.status_code == status
    with run(PageServer("http://sdxl:8080", port=port)), pytest.raises(requests.ConnectionError):
        requests.get(f"http://127.0.0.2:{port}/", timeout=10)


def test_page_holds_nothing_inline_and_nothing_from_elsewhere() -> None:
    for path in PAGE.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|innerHTML|\bstyle=|<script>|\son\w+=\"|eval\(", text), path


@pytest.mark.parametrize("path", sorted(PAGE.iterdir()), ids=lambda path: path.name)
def test_page_needs_no_newer_browser_than_it_names(path: Path) -> None:
    assert find_newer(path.name, path.read_text()) == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.js", "const { promise } = Promise.withResolvers();"),
        ("a.js", "names.toSorted()"),
        ("a.js", "class A {\n  static {\n"),
        ("a.js", "text.match(/(?<=a)b/)"),
        ("a.js", "for await (const chunk of answer.body) {"),
        ("a.css", "color: light-dark(red, blue);"),
        ("a.css", "#drop:has(input) {"),
        ("a.css", "height: 58dvh;"),
        ("a.html", "<div popover>"),
    ],
)
def test_newer_features_are_found(name: str, text: str) -> None:
    assert find_newer(name, text)


def test_page_knows_the_formats_that_the_server_takes() -> None:
    (listed,) = re.findall(r"ACCEPTED = (\[.*\]);", (PAGE / "uploads.js").read_text())
    assert tuple(json.loads(listed)) == IMAGE_FORMATS


def test_nginx_sends_the_same_headers_and_passes_on_as_much() -> None:
    text = (ROOT / "deploy/nginx.conf").read_text()
    sent = re.findall(r'add_header (Content-Security-Policy|X-Content\S+|Referrer\S+|Cache\S+) "?([^"\n]+?)"?;\n', text)
    assert dict(sent) == HEADERS
    assert re.findall(r"client_max_body_size (\d+);", text) == [str(MAX_REQUEST)]


def test_only_known_headers_are_passed_on_and_none_is_added(page: PageServer, upstream: Upstream) -> None:
    for method, path in PASSED:
        told = {"Authorization": "Bearer a", "Content-Type": "application/json", "Cookie": "b", "explain": "1"}
        answer = requests.request(method, f"http://{page.hosts[0]}{path}", headers=told, data=b"{}", timeout=10)
        assert (answer.status_code, answer.headers["Content-Type"]) == (200, "text/event-stream")
    requests.post(f"http://{page.hosts[0]}{PREDICTIONS}", data=b"{}", timeout=10)
    paths, headers, bodies = zip(*upstream.seen, strict=True)
    assert paths == (*(path for _, path in PASSED), PREDICTIONS)
    assert bodies == (b"{}", b"{}", b"", b"{}")
    assert headers[0]["authorization"] == "Bearer a"
    assert not any({"cookie", "explain"} & each.keys() for each in headers)
    assert "authorization" not in headers[-1]


@pytest.mark.parametrize(
    "told",
    [
        {"Host": "example.org"},
        {"Host": "127.0.0.1"},
        {"Origin": "http://example.org"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"},
    ],
)
def test_other_names_and_other_pages_are_refused(
    page_with_jobs: PageServer, upstream: Upstream, jobs: Upstream, told: dict[str, str]
) -> None:
    """The jobs' API of this machine asks for no API key."""
    for method, path in (("GET", "/"), *PASSED, *JOB_REQUESTS):
        address = f"http://{page_with_jobs.hosts[0]}{path}"
        answer = requests.request(method, address, headers=told, data=b"{}", timeout=10)
        assert answer.status_code == 403
        assert "answers to 127.0.0.1:" in answer.json()["error"]["message"]
    assert upstream.seen == jobs.seen == []


def test_link_of_another_site_leads_to_the_page(page: PageServer) -> None:
    told = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert requests.get(f"http://{page.hosts[0]}/", headers=told, timeout=10).status_code == 200


def test_jobs_are_passed_on_with_their_headers(page_with_jobs: PageServer, upstream: Upstream, jobs: Upstream) -> None:
    told = {"Content-Type": "application/json", "If-None-Match": '"a"', "X-Holder": "ann", "Cookie": "b"}
    for method, path in JOB_REQUESTS:
        address = f"http://{page_with_jobs.hosts[0]}{path}"
        answer = requests.request(method, address, headers=told, data=b"{}", timeout=10)
        assert answer.status_code == 200
        assert SENT.items() <= dict(answer.headers).items()
        assert "X-Other" not in answer.headers
    assert [path for path, _, _ in jobs.seen] == [path for _, path in JOB_REQUESTS]
    assert [body for _, _, body in jobs.seen] == [b"" if method == "GET" else b"{}" for method, _ in JOB_REQUESTS]
    assert all(headers["if-none-match"] == '"a"' for _, headers, _ in jobs.seen)
    assert not any({"x-holder", "cookie"} & headers.keys() for _, headers, _ in jobs.seen)
    assert requests.delete(f"http://{page_with_jobs.hosts[0]}/jobs/my-fox_1", timeout=10).status_code == 200
    assert upstream.seen == []


def test_other_paths_of_the_jobs_are_closed(page: PageServer, page_with_jobs: PageServer, jobs: Upstream) -> None:
    """Without --jobs all of them are."""
    closed = [
        *(("GET", path) for path in ("/jobs/", "/jobs?a", "/jobs/short", "/jobs/my-fox_1/", "/openapi.json")),
        *(("GET", f"/jobs/my-fox_1/{rest}") for rest in ("pictures/1000", "pictures/a", "preview/1", "%2e%2e/x")),
        *((method, "/jobs") for method in ("PUT", "DELETE")),
        *(("POST", "/jobs/my-fox_1"), ("DELETE", "/jobs/my-fox_1/preview"), ("PUT", "/main.js")),
    ]
    for server, requested in ((page, JOB_REQUESTS), (page_with_jobs, closed)):
        for method, path in requested:
            connection = http.client.HTTPConnection(server.hosts[0])
            connection.request(method, path, b"" if method == "GET" else b"{}")
            assert connection.getresponse().status == 404, (method, path)
    assert requests.options(f"http://{page_with_jobs.hosts[0]}/jobs", timeout=10).status_code == 501
    assert jobs.seen == []


def test_client_that_leaves_ends_the_work(page: PageServer, upstream: Upstream) -> None:
    with socket.create_connection(("127.0.0.1", page.server_address[1])) as client:
        head = f"POST {PREDICTIONS} HTTP/1.1\r\nHost: {page.hosts[0]}\r\nContent-Length: 4\r\n\r\n"
        client.sendall(head.encode() + b"long")
        while b"progress" not in client.recv(4096):
            pass
        assert not upstream.is_left.is_set()
    assert upstream.is_left.wait(timeout=5)


def test_extra_bytes_of_a_client_do_not_end_its_request(page: PageServer) -> None:
    with socket.create_connection(("127.0.0.1", page.server_address[1])) as client:
        client.sendall(f"GET {PREDICTIONS}/1.0/openapi.json HTTP/1.1\r\nHost: {page.hosts[0]}\r\n\r\n".encode())
        time.sleep(0.02)
        client.sendall(b"{}")
        assert client.recv(4096).startswith(b"HTTP/1.0 200 ")


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for localhost that no authority has signed. Its key is next to it."""
    path = tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(tmp_path / "key.pem"), "-out", str(path)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return path


@pytest.mark.parametrize("is_trusted", [True, False])
def test_key_goes_to_a_https_address_with_tls_only(
    upstream: Upstream, certificate: Path, monkeypatch: pytest.MonkeyPatch, is_trusted: bool
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_name("key.pem"))
    upstream.socket = context.wrap_socket(upstream.socket, server_side=True, do_handshake_on_connect=False)
    if is_trusted:
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    page = PageServer(f"https://localhost:{upstream.server_address[1]}", port=0)
    with run(page):
        headers = {"Authorization": "Bearer key"}
        answer = requests.post(f"http://{page.hosts[0]}{PREDICTIONS}", data=b"{}", headers=headers, timeout=10)
    assert answer.status_code == (200 if is_trusted else 502)
    assert [seen["authorization"] for _, seen, _ in upstream.seen] == ["Bearer key"] * is_trusted
    assert is_trusted or "certificate verify failed" in answer.json()["error"]["message"]


@pytest.mark.parametrize("option", ["--url", "--jobs"])
@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.org",
        "example.org:8080",
        "https://example.org/sdxl",
        "http://",
        "http://a:b@example.org",
        "http://x:y",
    ],
)
def test_other_addresses_are_refused(
    url: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("web.__main__.serve", lambda *_: None)
    (tmp_path / "keys").write_text('{"inference": {"key": "one"}}')
    assert main([option, url, "--key-file", str(tmp_path / "keys"), "--port", "0"]) == 1
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert f"{option} takes http://host:port or https://host:port, not {url}" in printed.err or "Port" in printed.err


def test_requests_that_cannot_be_forwarded_get_the_reason(page: PageServer) -> None:
    address = f"http://{page.hosts[0]}"
    assert requests.post(f"{address}/workflows", data=b"{}", timeout=10).status_code == 404
    for body in (iter([b"{}"]), None):  # in chunks, and nothing at all but for a length that is a lie
        length = {} if body else {"Content-Length": str(MAX_REQUEST + 1)}
        answer = requests.post(f"{address}{PREDICTIONS}", data=body, headers=length, timeout=10)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, 413)
    (port,) = find_free_ports(1)
    alone = PageServer(f"http://127.0.0.1:{port}", port=0, jobs=f"http://127.0.0.1:{port}")
    with run(alone):
        for path, name in ((PREDICTIONS, "TorchServe"), ("/jobs", "the API of the jobs")):
            answer = requests.post(f"http://{alone.hosts[0]}{path}", data=b"{}", timeout=10)
            assert answer.status_code == 502
            assert json.loads(answer.content)["error"]["message"] == f"{name} does not answer at 127.0.0.1:{port}"
