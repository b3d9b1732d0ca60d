"""The server under test, the number of requests of each line, and the search for workers."""

import contextlib
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import yaml

from demo.measure import GUIDANCE
from scorecard.clients import ADAPTER, CONTROL
from tools.random_model import save_controlnet
from tools.server import ROOT, LocalServer, ServerError, make_archive, read_shipped

STEPS = 5
ADAPTER_FILE = ROOT / "demo/adapters/inverted/inverted.safetensors"


@dataclass(frozen=True)
class Scale:
    """The size of each line; times in seconds."""

    soak_time: float = 30 * 60
    soak_requests: int = 3000
    kill_time: float = 15 * 60
    kill_interval: float = 20
    loads: int = 8  # before the kills, with nobody asking
    requests_after: int = 100
    crowd: int = 200
    kinds: int = 1000
    repeated: int = 300  # of these, drawn again alone
    fuzzed: int = 1000  # examples of schemathesis
    leavers: int = 50
    bodies: int = 90
    cycles: int = 20


QUICK = Scale(
    soak_time=30,
    soak_requests=50,
    kill_time=40,
    loads=2,
    requests_after=20,
    crowd=200,
    kinds=100,
    repeated=50,
    fuzzed=60,
    leavers=10,
    bodies=60,
    cycles=2,
)


@dataclass(frozen=True)
class Line:
    """One line of the scorecard."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Site:
    """The server's model and settings; the tests plant their faults here.

    Attributes:
        keys: TorchServe's keys of model-config.yaml that differ from the default ones.
        settings: the settings of its handler section that differ.
        properties: the settings of config.properties that differ.
        cache: the folder of the compiled models.
    """

    cache: Path
    model: Path = ROOT / "demo/model"
    handler: Path = ROOT / "stable_diffusion_handler.py"
    keys: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    properties: Mapping[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def serve(self, **keys: Any) -> Iterator[LocalServer]:
        """Run a server until the block ends."""
        shipped = read_shipped()
        shipped["handler"] |= {"guidance_scale": GUIDANCE, "num_inference_steps": STEPS, **self.settings}
        pt2 = {"backend": "openvino", "options": {"model_caching": True, "cache_dir": str(self.cache)}}
        with tempfile.TemporaryDirectory(prefix="soak-") as name:
            folder = Path(name)
            settings = yaml.safe_dump({**shipped, "pt2": pt2, **keys, **self.keys}, sort_keys=False)
            make_archive(folder, self.model, settings, handler=self.handler)
            with LocalServer(folder, properties=self.properties) as server:
                yield server


def add_models(site: Site) -> Site:
    """Return the site with a random ControlNet, and with an adapter of the demonstration model."""
    folder = site.cache / site.model.name / CONTROL
    if not folder.exists():
        save_controlnet(site.model, folder)
    adapters = [{"name": ADAPTER, "path": str(ADAPTER_FILE)}] if site.model == ROOT / "demo/model" else None
    models = {"controls": [{"name": CONTROL, "path": str(folder)}], "adapters": adapters}
    return replace(site, settings={**models, **site.settings})


def find_workers(server: LocalServer) -> list[psutil.Process]:
    """Return the worker processes, ready or not."""
    found = []
    for process in server.find_processes():
        with contextlib.suppress(psutil.Error):
            if "--sock-type" in process.cmdline():
                found.append(process)
    return found


def wait_for_another(server: LocalServer, old: Sequence[psutil.Process], *, seconds: float) -> float:
    """Return the seconds until the model is ready in other workers than the old ones.

    Raises:
        ServerError: it is not in that time.
    """
    start = time.monotonic()
    while not ({each.pid for each in find_workers(server)} - {each.pid for each in old} and server.is_ready()):
        if time.monotonic() - start > seconds:
            raise ServerError(f"no worker is ready within {seconds:.0f} s")
        time.sleep(0.1)
    return time.monotonic() - start


def connect(server: LocalServer, *, timeout: float | None = None) -> socket.socket:
    """Return a connection to the inference API."""
    return socket.create_connection(("127.0.0.1", server.ports["inference_address"]), timeout=timeout)


def is_open(port: int) -> bool:
    """Say whether a server listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
