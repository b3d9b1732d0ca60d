"""Run deploy/nginx.conf on a free port of this machine, for the tests and the scorecard."""

import contextlib
import os
import secrets
import shutil
import ssl
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import psutil

from tools.server import ROOT, find_free_ports
from web.server import PAGE

NGINX_CONFIGURATION = ROOT / "deploy" / "nginx.conf"
PASS_KEY = ROOT / "deploy" / "pass-key"
MAKE_KEY = ROOT / "deploy" / "make-key"


def find_nginx() -> str | None:
    """Return the program's path, None where it or openssl, which makes the certificate, is missing."""
    path = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/usr/local/sbin"
    return shutil.which("nginx", path=path) if shutil.which("openssl") else None


class LocalProxy:
    """nginx with deploy/nginx.conf, started on entry and stopped on exit.

    Only the ports, the certificate's paths and the folders that nginx writes into differ.

    Args:
        upstream: the port of TorchServe's inference API.
        jobs: the port of the jobs' API; the default is a port without a listener.
        key_file: TorchServe's key file; without it, TorchServe asks for no key.

    Attributes:
        token: the token that it accepts from clients; see `write_tokens`.
        certificate: the file of its self-signed certificate.
        tls: a context that trusts that certificate.
    """

    def __init__(self, upstream: int, *, key_file: Path | None = None, jobs: int | None = None) -> None:
        self.upstream, self.key_file = upstream, key_file
        self.jobs = jobs or find_free_ports(1)[0]
        self.token = secrets.token_hex(32)
        (self.port,) = find_free_ports(1)
        # Other temporary folders, such as pytest's, are closed to the account that nginx's workers run as.
        self.folder = Path(tempfile.mkdtemp(prefix="nginx-"))
        self.folder.chmod(0o755)
        self.certificate = self.folder / "fullchain.pem"

    @property
    def url(self) -> str:
        """The address of the model's predictions."""
        return f"https://127.0.0.1:{self.port}/predictions/diffusion_fast"

    def get_headers(self) -> dict[str, str]:
        """Return the header with a token that it accepts."""
        return {"Authorization": f"Bearer {self.token}"}

    def write_tokens(self, holders: Mapping[str, str]) -> None:
        """Write the file of tokens, each with the name of its holder; the next start or reload reads it."""
        lines = "".join(f"{token} {holder};\n" for token, holder in holders.items())
        (self.folder / "tokens").write_text(lines)

    def pass_key(self) -> None:
        """Copy TorchServe's key, if it asks for one; the next start or reload reads it."""
        if self.key_file is not None:
            subprocess.run([PASS_KEY, self.key_file, self.folder / "torchserve_key"], check=True, timeout=30)

    @property
    def log(self) -> list[str]:
        """The lines of the access log."""
        return (self.folder / "access.log").read_text().splitlines()

    def __enter__(self) -> Self:
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
                *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
                *("-keyout", self.folder / "privkey.pem", "-out", self.certificate),
            ],
            check=True,
            stderr=subprocess.DEVNULL,
        )
        self.tls = ssl.create_default_context(cafile=self.certificate)
        (self.folder / "nginx.conf").write_text(self.make_configuration())
        shutil.copytree(PAGE, self.folder / "page")  # nginx's account need not see where this project lies
        self.write_tokens({self.token: "local"})
        self.pass_key()
        self.command()
        self.process = psutil.Process(int((self.folder / "nginx.pid").read_text()))
        while not self.process.children():  # a signal to reload that comes earlier waits for the next one
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.process.terminate()
            self.process.wait(timeout=10)
        shutil.rmtree(self.folder)

    def make_configuration(self) -> str:
        """Return the configuration with ports and paths replaced.

        Raises:
            ValueError: a port or path is not in it exactly once.
        """
        text = NGINX_CONFIGURATION.read_text()
        temporary = "".join(
            f"{kind}_temp_path {kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        for shipped, changed in {
            "server 127.0.0.1:8080 ": f"server 127.0.0.1:{self.upstream} ",
            "server 127.0.0.1:8090;": f"server 127.0.0.1:{self.jobs};",
            "        listen 443 ": f"        listen 127.0.0.1:{self.port} ",
            "/etc/nginx/tls/fullchain.pem": str(self.certificate),
            "/etc/nginx/tls/privkey.pem": str(self.folder / "privkey.pem"),
            "/etc/nginx/sdxl/tokens": str(self.folder / "tokens"),
            "include /etc/nginx/sdxl/torchserve_key": f"include {self.folder / 'torchserve_key'}",
            "/opt/sdxl/web/page": str(self.folder / "page"),
            "/var/log/nginx/access.log": str(self.folder / "access.log"),
            "/var/log/nginx/error.log": str(self.folder / "error.log"),
            "\nhttp {\n": f"\nhttp {{\n{temporary}",
        }.items():
            if text.count(shipped) != 1:
                raise ValueError(f"{shipped!r} is {text.count(shipped)} times in {NGINX_CONFIGURATION}")
            text = text.replace(shipped, changed)
        return text

    def command(self, *arguments: str) -> None:
        """Start nginx, or send a signal to the running one."""
        places = ("-p", self.folder, "-c", "nginx.conf", "-e", "error.log", "-g", f"pid {self.folder}/nginx.pid;")
        subprocess.run([find_nginx() or "nginx", *places, *arguments], check=True, timeout=30)

    def drain(self, *, timeout: float = 600) -> None:
        """Take no more connections, answer every request that has been accepted, and end.

        Raises:
            psutil.TimeoutExpired: it has not ended within so many seconds.
        """
        self.command("-s", "quit")
        self.process.wait(timeout=timeout)
