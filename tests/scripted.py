"""A server on loopback whose responses each test scripts: a TorchServe, or the receiver of a webhook."""

import base64
import contextlib
import io
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image


def make_image(kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, kind, **options)
    return file.getvalue()


IMAGE = make_image()


@dataclass
class Request:
    path: str
    headers: Message
    body: bytes


class Handler(BaseHTTPRequestHandler):
    server: "Server"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.requests.append(Request(self.path, self.headers, body))
        self.server.asked.set()
        with contextlib.suppress(OSError):  # the client may have left
            self.server.steps[len(self.server.requests) - 1](self)

    do_GET = do_PUT = do_POST

    def log_message(self, format: str, *args: object) -> None:
        pass


Step = Callable[[Handler], None]


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler, bind_and_activate=False)
        self.server_bind()  # the port is ours, and refuses connections until listen()
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self.steps: list[Step] = [answer()]
        self.requests: list[Request] = []
        self.asked = threading.Event()
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/predictions/diffusion_fast"

    def listen(self) -> None:
        self.server_activate()
        self.thread.start()

    def server_close(self) -> None:
        self.released.set()
        if self.thread.ident:
            self.shutdown()
            self.thread.join()
        super().server_close()


def make_event(kind: str, **data: object) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode()


def complete(image: bytes = IMAGE, *, index: int = 0, **data: object) -> bytes:
    """The event of a finished image, or of a preview that has a number."""
    kind = "image_generation.partial_image" if "partial_image_index" in data else "image_generation.completed"
    return make_event(kind, b64_json=base64.b64encode(image).decode(), seed=7 + index, index=index, **data)


DONE = complete()
STREAM = "text/event-stream"


def answer(body: object = DONE, status: int = 200, kind: str = STREAM, headers: dict[str, str] | None = None) -> Step:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()

    def send(handler: Handler) -> None:
        handler.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(data)

    return send
