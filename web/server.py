"""Serve the web UI on loopback and pass its requests to TorchServe and to jobs/api.py, so that all have one origin.

deploy/nginx.conf does the same for many users. This program adds nothing to a request: drawing needs a token.
"""

import contextlib
import http.client
import json
import os
import re
import socket
import ssl
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

PAGE = Path(__file__).resolve().parent / "page"
PORT = 8088
PREDICTIONS = "/predictions/diffusion_fast"
PASSED = (
    *(("POST", PREDICTIONS), ("POST", f"{PREDICTIONS}/1.0/metadata")),
    ("GET", f"{PREDICTIONS}/1.0/openapi.json"),
)
JOBS = re.compile(
    r"(GET|POST) /jobs|(GET|PUT|DELETE) /jobs/[\w-]{8,64}|GET /jobs/[\w-]{8,64}/(preview|pictures/\d{1,3}(/metadata)?)",
    re.ASCII,
)
MAX_REQUEST = 33_554_432  # bytes; max_request_size of config.properties
TO_SERVER = ("Authorization", "Content-Type", "Accept", "If-None-Match")
TO_CLIENT = ("Content-Type", "Retry-After", "X-Warning", "ETag", "Location")
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# As in deploy/nginx.conf. With trusted types no text can become HTML or a script.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class PageServer(ThreadingHTTPServer):
    """The web UI's server. It answers to 127.0.0.1 and localhost only.

    Args:
        upstream: the address of TorchServe's inference API, such as http://127.0.0.1:8080. With https:// the
            certificate is checked.
        address: to listen on. Others than 127.0.0.1 are for containers that publish the port on loopback.
        port: to listen on; 0 is any free one.
        jobs: the address of the jobs' API. Without it, their paths are closed.

    Raises:
        ValueError: an address is of another kind.
    """

    daemon_threads = True

    def __init__(self, upstream: str, *, address: str = "127.0.0.1", port: int = PORT, jobs: str | None = None) -> None:
        self.upstream = read_address("--url", upstream)
        self.jobs = None if jobs is None else read_address("--jobs", jobs)
        super().__init__((address, port), PageHandler)
        self.hosts = tuple(f"{name}:{self.server_address[1]}" for name in ("127.0.0.1", "localhost"))

    def find_target(self, method: str, path: str) -> SplitResult | None:
        """Return the address of the server that gets a request; None if the path is closed."""
        if (method, path) in PASSED:
            return self.upstream
        return self.jobs if JOBS.fullmatch(f"{method} {path}") else None

    def make_url(self, token: str) -> str:
        """Return the web UI's address. The token is in its fragment, which browsers do not send."""
        return f"http://{self.hosts[0]}/#token={token}"


def read_address(option: str, text: str) -> SplitResult:
    """Return the parts of a server's address.

    Raises:
        ValueError: it is of another kind.
    """
    parts = urlsplit(text.rstrip("/"))
    is_whole = parts.geturl() == f"{parts.scheme}://{parts.netloc}" and "@" not in parts.netloc
    if parts.scheme not in ("http", "https") or not parts.hostname or not is_whole or parts.port == 0:
        raise ValueError(f"{option} takes http://host:port or https://host:port, not {text}")
    return parts


def connect(address: SplitResult) -> http.client.HTTPConnection:
    """Return a connection, with TLS for https."""
    host, port = address.hostname or "", address.port
    if address.scheme == "http":
        return http.client.HTTPConnection(host, port)
    context = ssl.create_default_context(cafile=os.environ.get("REQUESTS_CA_BUNDLE"))
    return http.client.HTTPSConnection(host, port, context=context)


class PageHandler(BaseHTTPRequestHandler):
    """One connection, which ends with its response: HTTP/1.0."""

    server: PageServer
    timeout = 60  # seconds between two chunks of a request

    def do_GET(self) -> None:
        """Send a file of the web UI, or another server's response."""
        path = PAGE / (self.path[1:] or "index.html")
        if not self._is_own_host():
            return
        if target := self.server.find_target("GET", self.path):
            self._forward(target, None)
        elif path in PAGE.iterdir():
            self._send(HTTPStatus.OK, path.read_bytes(), f"{TYPES[path.suffix]}; charset=utf-8", HEADERS)
        else:
            self._refuse(
                HTTPStatus.NOT_FOUND, f"there is nothing at this path; the web UI is at http://{self.server.hosts[0]}/"
            )

    def do_POST(self) -> None:
        """Send another server's response."""
        length = self.headers.get("Content-Length", "0" if self.command == "DELETE" else "")
        if not self._is_own_host():
            return
        target = self.server.find_target(self.command, self.path)
        if target is None:
            taken = f"{PREDICTIONS} and /jobs take" if self.server.jobs else f"only {PREDICTIONS} takes"
            self._refuse(HTTPStatus.NOT_FOUND, f"{taken} requests")
        elif not length.isdecimal() or int(length) > MAX_REQUEST:
            message = f"a request takes a Content-Length of at most {MAX_REQUEST} bytes"
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)
        else:
            self._forward(target, self.rfile.read(int(length)))

    do_PUT = do_DELETE = do_POST

    def _is_own_host(self) -> bool:
        """Say whether a request names this host and comes from no other site; refuse others, such as DNS rebinding."""
        hosts = self.server.hosts
        origin = self.headers.get("Origin", f"http://{hosts[0]}")
        # A browser sends no Origin for another site's <img>. A link of another site may lead here.
        is_own_site = self.headers.get("Sec-Fetch-Site", "none") in ("none", "same-origin")
        is_wanted = is_own_site or self.headers.get("Sec-Fetch-Mode") == "navigate"
        if self.headers.get("Host") in hosts and origin in [f"http://{host}" for host in hosts] and is_wanted:
            return True
        self._refuse(HTTPStatus.FORBIDDEN, f"this web UI answers to {' and '.join(hosts)} only, not to other sites")
        return False

    def _forward(self, target: SplitResult, body: bytes | None) -> None:
        upstream = connect(target)
        kept = {name: self.headers[name] for name in TO_SERVER if self.headers[name]}
        self.connection.settimeout(None)  # a step may take minutes
        is_begun = False
        try:
            upstream.request(self.command, self.path, body, kept)
            threading.Thread(target=_hang_up, args=(self.connection, upstream.sock), daemon=True).start()
            answer = upstream.getresponse()
            is_begun = True
            self.send_response(answer.status)
            for name in TO_CLIENT:
                if value := answer.headers[name]:
                    self.send_header(name, value)
            self.end_headers()
            while chunk := answer.read1(65536):
                self.wfile.write(chunk)
        except (OSError, http.client.HTTPException) as error:
            if not is_begun:
                reason = f": {error}" if isinstance(error, ssl.SSLError) else ""
                name = "the API of the jobs" if self.path.startswith("/jobs") else "TorchServe"
                message = f"{name} does not answer at {target.netloc}{reason}"
                self._refuse(HTTPStatus.BAD_GATEWAY, message)
        finally:
            upstream.close()

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        error = {"message": message, "type": kind, "param": None, "code": status}
        self._send(status, json.dumps({"error": error}).encode(), "application/json", {})

    def _send(self, status: HTTPStatus, content: bytes, kind: str, headers: dict[str, str]) -> None:
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Log nothing: TorchServe logs its requests."""


def _hang_up(client: socket.socket, upstream: socket.socket) -> None:
    """End the connection to TorchServe when the client has left, so that TorchServe ends the work."""
    with contextlib.suppress(OSError):
        while client.recv(4096):  # ignore extra bytes, such as a GET's body
            pass
    with contextlib.suppress(OSError):
        upstream.shutdown(socket.SHUT_RDWR)
