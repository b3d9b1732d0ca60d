"""Servers of the tests that run in a thread."""

import threading
from socketserver import BaseServer
from typing import Self


class InThread(BaseServer):
    """A server that runs in a thread of its own during a `with` block."""

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
