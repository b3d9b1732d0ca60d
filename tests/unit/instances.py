"""What HAProxy and nginx see of a TorchServe, for tests of the files in deploy."""

import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.serving import InThread

UNKNOWN_USER = 1234567  # as OpenShift chooses one: no account has it


class Instance(InThread, ThreadingHTTPServer):
    """What HAProxy sees of a TorchServe: it answers each POST with `status`, or hangs up when that is 0."""

    def __init__(self, address: str = "127.0.0.1", port: int = 0, *, metrics_port: int | None = None) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, port), InstanceHandler)
        self.metrics_port = metrics_port or self.server_port
        self.ports = {"inference_address": self.server_port}
        self.status, self.is_ready, self.seconds, self.answered = 200, True, 0.0, 0
        self.count: Callable[[], AbstractContextManager[Any]] = nullcontext


class InstanceHandler(BaseHTTPRequestHandler):
    server: Instance

    def do_GET(self) -> None:
        self.send_response(200 if self.server.is_ready else 503)
        self.end_headers()
        if self.path == "/metrics":
            self.wfile.write(b"sdxl_requests_in_flight 0.0\n")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.count():
            time.sleep(self.server.seconds)
        self.server.answered += 1
        if self.server.status:
            self.send_response(self.server.status)
            self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_ipv6() -> bool:
    """Say whether ::1 is an address of this machine."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False
