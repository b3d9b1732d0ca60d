"""Run several TorchServes behind deploy/haproxy.cfg on this machine, for the tests."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import psutil
import requests

from sdxl_server.serving.client import send_request
from tools.server import ROOT, LocalServer, find_free_ports

HAPROXY_CONFIGURATION = ROOT / "deploy" / "haproxy.cfg"
NAMES = ("one", "two", "three")


def find_haproxy() -> str | None:
    """Return the program's path, None where it is missing."""
    return shutil.which("haproxy", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/usr/local/sbin")


class Instance(LocalServer):
    """A server of several. It asks for no token: HAProxy would need a workaround to send each its own.

    Args:
        folder: see LocalServer.
        metrics_port: of the metrics_address in its archive's settings.
    """

    def __init__(self, folder: Path, *, metrics_port: int) -> None:
        super().__init__(folder, properties={"disable_token_authorization": "true"})
        self.metrics_port = metrics_port

    def is_ready(self) -> bool:
        """Say whether its worker has loaded the model."""
        try:
            return send_request("GET", f"http://127.0.0.1:{self.metrics_port}/ready", timeout=5).status_code == 200
        except requests.RequestException:
            return False


class Balanced(Protocol):
    """What a balancer sees of an instance."""

    ports: dict[str, int]
    metrics_port: int


class LocalBalancer:
    """HAProxy with deploy/haproxy.cfg before these instances, started on entry and stopped on exit.

    Only the ports, the socket's path and the log's target differ. Without root, so does the account.

    Attributes:
        port: of its front end.
        socket: of its admin commands.
    """

    def __init__(self, instances: Sequence[Balanced]) -> None:
        self.port, self.metrics_port = find_free_ports(2)
        self.folder = Path(tempfile.mkdtemp(prefix="haproxy-"))
        self.socket = self.folder / "admin.sock"
        text = HAPROXY_CONFIGURATION.read_text().replace("127.0.0.1:8079", f"127.0.0.1:{self.port}")
        text = text.replace("127.0.0.1:8405", f"127.0.0.1:{self.metrics_port}")
        text = text.replace("/run/haproxy/admin.sock", str(self.socket)).replace(
            "log /dev/log local0", "log stdout format raw local0"
        )
        if os.geteuid():
            text = re.sub(r"^    (user|group|chroot) .*\n", "", text, flags=re.MULTILINE)
        for name, instance in zip(NAMES, instances, strict=True):
            port = instance.ports["inference_address"]
            text = re.sub(
                rf"server {name} \S+ port \d+", f"server {name} 127.0.0.1:{port} port {instance.metrics_port}", text
            )
            text = re.sub(rf"server {name} \S+ track", f"server {name} 127.0.0.1:{port} track", text)
        (self.folder / "haproxy.cfg").write_text(text)

    @property
    def url(self) -> str:
        """The address of the model's predictions."""
        return f"http://127.0.0.1:{self.port}/predictions/diffusion_fast"

    @property
    def log(self) -> str:
        """The access log: one line for each finished request."""
        return (self.folder / "log").read_text()

    def __enter__(self) -> Self:
        with (self.folder / "log").open("w") as log:
            command = (find_haproxy() or "haproxy", "-db", "-f", str(self.folder / "haproxy.cfg"))
            self.process = psutil.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)
        shutil.rmtree(self.folder)
