"""A model hub on loopback: the part of the hub's protocol that a download uses."""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

LARGE = ".safetensors"  # as on the hub, large files are listed with their sha256 and served from another address


@dataclass
class Hub:
    """One model at one revision.

    Args:
        stated_sizes: sizes in the listing that are not the true ones, in bytes.
        token: what a request for a file must bear, if anything.
        stop_at: a file's name and the number of bytes after which its next answer stops.
        hang: whether that answer then hangs, until the hub stops, instead of breaking off.
        requests: the paths asked for so far, each with its Range header.
    """

    model: str
    revision: str
    files: dict[str, bytes]
    stated_sizes: dict[str, int] = field(default_factory=dict)
    token: str | None = None
    stop_at: tuple[str, int] | None = None
    hang: bool = False
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Hub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self  # type: ignore[attr-defined]
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def describe(self) -> dict[str, Any]:
        """Return the listing that /api/models answers with."""
        siblings = []
        for name, content in self.files.items():
            size = self.stated_sizes.get(name, len(content))
            lfs = {"size": size, "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 134}
            siblings.append({"rfilename": name, "size": size, "blobId": "0", "lfs": lfs if LARGE in name else None})
        return {"id": self.model, "sha": self.revision, "siblings": siblings}

    def get_fetched(self) -> list[str]:
        """Return the names of the files asked for, in that order."""
        start = f"/{self.model}/resolve/{self.revision}/"
        return [path.removeprefix(start) for path, _ in self.requests if path.startswith(start)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return cast(Hub, self.server.hub)  # type: ignore[attr-defined]

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        hub, (path, _, query) = self.hub, self.path.partition("?")
        hub.requests.append((path, self.headers.get("Range")))
        listing, resolve = f"/api/models/{hub.model}/revision/", f"/{hub.model}/resolve/{hub.revision}/"
        if path.startswith(listing):
            if path not in (listing + hub.revision, listing + "main"):
                self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
            else:
                self.answer(200, json.dumps(hub.describe()).encode() if query == "blobs=true" else b"{}")
        elif path.startswith("/storage/"):
            self.send_file(path.removeprefix("/storage/"))
        elif not path.startswith(resolve):
            self.answer(404, headers={"X-Error-Code": "RepoNotFound"})
        elif hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.answer(401, headers={"X-Error-Code": "GatedRepo"})
        elif path.endswith(LARGE):
            self.answer(302, headers={"Location": "/storage/" + path.removeprefix(resolve)})
        else:
            self.send_file(path.removeprefix(resolve))

    def answer(self, status: int, body: bytes = b"", *, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, name: str) -> None:
        content, hub = self.hub.files[name], self.hub
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        if hub.stop_at is None or hub.stop_at[0] != name:
            return self.answer(206 if start else 200, content[start:], headers=headers)
        end, hub.stop_at = hub.stop_at[1], None
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[start:end])
        if hub.hang:
            hub.stopped.wait(60)
        self.close_connection = True
        return None
