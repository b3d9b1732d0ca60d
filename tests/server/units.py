"""Run the commands of deploy's systemd units without systemd."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from tools.server import ROOT

DEPLOY = ROOT / "deploy"
FOLDERS = ("/etc/sdxl", "/var/lib/sdxl", "/var/cache/sdxl")
Process = subprocess.Popen[str]


@dataclass(frozen=True)
class Unit:
    """A unit of deploy, whose folders are below another one.

    Attributes:
        name: such as torchserve@one.service.
        folder: holds etc/sdxl, var/lib/sdxl and var/cache/sdxl.
    """

    name: str
    folder: Path

    def read(self, key: str) -> list[str]:
        """Return the values of a key as systemd expands them."""
        prefix, _, suffix = self.name.partition("@")
        path = DEPLOY / self.name
        instance, dot, kind = suffix.rpartition(".")
        if dot:
            path = DEPLOY / f"{prefix}@.{kind}"
        text = path.read_text().replace("\\\n", " ").replace("%i", instance)
        text = text.replace("/opt/sdxl/.venv", sys.prefix).replace("/opt/sdxl", str(ROOT))
        for each in FOLDERS:
            text = text.replace(each, f"{self.folder}{each}")
        return re.findall(rf"^{key}=(.*)$", text, re.MULTILINE)

    def make_environment(self, **variables: str) -> dict[str, str]:
        """Return what its programs get from systemd, and these variables."""
        lines = [pair for value in self.read("Environment") for pair in shlex.split(value)]
        for value in self.read("EnvironmentFile"):
            path = Path(value.removeprefix("-"))
            if path.exists() or not value.startswith("-"):
                lines += path.read_text().splitlines()
        temporary = self.folder / "tmp" / self.name  # for PrivateTmp
        temporary.mkdir(parents=True, exist_ok=True)
        environment = {"PATH": os.environ["PATH"], "TMPDIR": str(temporary), "TEMP": str(temporary)}
        environment |= {**dict(line.split("=", 1) for line in lines), **variables}
        return {**environment, "PATH": f"{environment['PATH']}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def start(self, key: str = "ExecStart", **variables: str) -> Process:
        """Start the command of a key in the unit's folder; make the folders that systemd would make."""
        for kind, parent in (("StateDirectory", "/var/lib"), ("CacheDirectory", "/var/cache")):
            for name in self.read(kind):
                Path(f"{self.folder}{parent}/{name}").mkdir(mode=0o700, parents=True, exist_ok=True)
        (command,) = self.read(key)
        environment = self.make_environment(**variables)
        words = shlex.split(command.lstrip("+-"))
        given = [each for word in words for each in (environment[word[1:]].split() if word[0] == "$" else [word])]
        (folder,) = self.read("WorkingDirectory")
        with (self.folder / f"{self.name}.log").open("a") as log:
            return subprocess.Popen(given, cwd=folder, env=environment, stdout=log, stderr=log, text=True)


@dataclass(frozen=True)
class Instance:
    """The server of a unit torchserve@NAME.service that runs. It asks for no token."""

    unit: Unit

    @property
    def url(self) -> str:
        options = self.unit.make_environment()["OPTIONS"].split()
        return f"http://127.0.0.1:{options[options.index('--port') + 1]}/predictions/diffusion_fast"

    @property
    def log(self) -> str:
        return (self.unit.folder / f"{self.unit.name}.log").read_text()

    def get_headers(self) -> dict[str, str]:
        return {}

    def read_document(self) -> dict[str, Any]:
        report: dict[str, Any] = requests.get(f"{self.url}/1.0/describe", timeout=60).json()
        return report
