"""The commands of systemd's units, run without systemd: instances on OpenVINO, a watchdog, one cache; jobs."""

import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import psutil
import pytest
import requests

from tests.server.test_backends import ask_for_array, check_pictures, make_settings
from tests.server.units import Instance, Process, Unit
from tools.postgres import LocalPostgres, find_postgres
from tools.server import ROOT, find_free_ports

NAMES = ("one", "two")
PARTS = ["unet", "vae", "vae_encoder", "text_encoder", "text_encoder_2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Two instances as docs/deployment.md sets them up, with the cache of model-config.yaml on."""
    folder = tmp_path_factory.mktemp("units")
    for each in ("etc/sdxl", "var/lib/sdxl"):
        (folder / each).mkdir(parents=True)
    (folder / "var/lib/sdxl/Base_Diffusion_model").symlink_to(tiny_model)
    settings = make_settings({"backend": "openvino", "options": {"model_caching": True}})
    (folder / "model-config.yaml").write_text(settings)
    for name in NAMES:
        ports = find_free_ports(3)
        options = "--port {} --management-port {} --metrics-port {}".format(*ports)
        places = f"--source {ROOT} --settings {folder / 'model-config.yaml'}"
        text = f"OPTIONS={options} {places}\nMETRICS_PORT={ports[2]}\n"
        (folder / f"etc/sdxl/{name}").write_text(text)
    return folder


@pytest.fixture(scope="module")
def instances(folder: Path) -> Iterator[dict[str, Process]]:
    """torchserve@one, and then torchserve@two."""
    started: dict[str, Process] = {}
    try:
        for name in NAMES:
            process = started[name] = Unit(f"torchserve@{name}.service", folder).start()
            wait_until(partial(read_metrics, folder, name, "ready"), process)
        yield started
    finally:
        for process in started.values():  # a test may have started another one
            kill(process)


def kill(process: Process) -> None:
    """Kill all processes of a unit, as `systemctl kill --signal=SIGKILL` does."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for each in (*family, psutil.Process(process.pid)):
        each.kill()
    process.wait(timeout=30)


def wait_until(condition: Callable[[], object], process: Process | None = None) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert process is None or process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)


def read_metrics(folder: Path, name: str, path: str = "metrics") -> str:
    """Return what an instance answers on its metrics port, nothing when it is not ready."""
    port = Unit(f"torchserve@{name}.service", folder).make_environment()["METRICS_PORT"]
    try:
        answer = requests.get(f"http://127.0.0.1:{port}/{path}", timeout=5)
    except requests.RequestException:
        return ""
    return answer.text if answer.ok else ""


def check_health(folder: Path, name: str) -> list[str]:
    """Run a check as the timer does, without waiting for long; return the commands that systemctl gets after it."""
    health = Unit(f"torchserve-health@{name}.service", folder)
    (command,) = health.read("ExecStart")
    assert command.endswith(" --wait 600")
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    (programs / "systemctl").write_text(f'#!/bin/sh\necho "$@" >> {folder}/systemctl.log\n')
    (programs / "systemctl").chmod(0o755)
    (folder / "systemctl.log").write_text("")
    done = subprocess.run(
        [*command.removesuffix(" 600").split(), "1"],
        cwd=health.read("WorkingDirectory")[0],
        env=health.make_environment(),
        timeout=60,
        check=False,
    )
    result = "success" if done.returncode == 0 else "exit-code"
    assert health.start("ExecStopPost", SERVICE_RESULT=result, PATH=str(programs)).wait(timeout=30) == 0
    return (folder / "systemctl.log").read_text().splitlines()


def test_instances_draw_and_share_the_cache(folder: Path, instances: dict[str, Process]) -> None:
    """The second reads the models of the first. No other account can write there."""
    drawn = []
    for name, is_cached in (("one", False), ("two", True)):
        instance = Instance(Unit(f"torchserve@{name}.service", folder))
        report = check_pictures(instance)
        assert (report["backend"], report["graphs"], report["graph_breaks"]) == ("openvino", 4, 0)
        assert report["compiled_parts"] == list(report["openvino"]) == PARTS
        for part in PARTS:
            if part == "vae_encoder":  # waits for the first request with an image
                continue
            (graph,) = report["openvino"][part]
            assert {model["loaded_from_cache"] for model in graph["models"]} == {is_cached}
        drawn.append(ask_for_array(instance, seed=7))
    assert drawn[0] == drawn[1]
    found = {name: read_metrics(folder, name) for name in instances}
    cached = {
        name: sum(float(n) for n in re.findall(r"^sdxl_graphs_from_cache\S* (\S+)$", text, re.M))
        for name, text in found.items()
    }
    assert cached["one"] == 0
    assert cached["two"] > 0
    cache = folder / "var/cache/sdxl/openvino_backend"
    assert cache.stat().st_mode & 0o777 == 0o700
    assert not list(folder.glob("var/lib/sdxl/*/.cache/openvino_backend"))


def test_instances_have_a_watchdog_each(folder: Path, instances: dict[str, Process]) -> None:
    """It kills the instance that hangs, and no other."""
    assert [check_health(folder, name) for name in NAMES] == [[], []]
    (java,) = (each for each in psutil.Process(instances["one"].pid).children(True) if each.name() == "java")
    java.suspend()
    assert check_health(folder, "one") == ["kill --signal=SIGKILL torchserve@one.service"]
    assert check_health(folder, "two") == []
    kill(instances["one"])
    assert check_health(folder, "one") == ["kill --signal=SIGKILL torchserve@one.service"]
    instances["one"] = Unit("torchserve@one.service", folder).start()
    wait_until(lambda: read_metrics(folder, "one", "ready"), instances["one"])
    assert check_health(folder, "one") == []


def test_stopped_instance_drains(folder: Path, instances: dict[str, Process]) -> None:
    """SIGTERM goes to the main process alone (KillMode)."""
    unit = Unit("torchserve@two.service", folder)
    assert unit.read("KillMode") == ["mixed"]
    family = psutil.Process(instances["two"].pid).children(recursive=True)
    assert len(family) >= 2  # TorchServe and its worker
    instances["two"].send_signal(signal.SIGTERM)
    assert instances["two"].wait(timeout=60) == 0
    assert psutil.wait_procs(family, timeout=10)[1] == []
    assert "the requests in flight are finished first" in (folder / f"{unit.name}.log").read_text()
    assert not list(folder.glob("var/lib/sdxl/two/logs/*"))  # the journal has them


def test_numbers_of_the_instances_agree() -> None:
    """docs/deployment.md gives the instances the ports that HAProxy asks."""
    text = (ROOT / "docs/deployment.md").read_text() + (ROOT / "deploy/torchserve@.service").read_text()
    balancer = (ROOT / "deploy/haproxy.cfg").read_text()
    servers = {port: metrics for port, metrics in re.findall(r"server \w+ 127\S+:(\d+) port (\d+)", balancer)}
    told = re.findall(r"OPTIONS=--port (\d+) --management-port (\d+) --metrics-port (\d+)", text)
    assert len(told) == 3
    for port, management, metrics in told:
        assert (servers[port], int(management)) == (metrics, int(port) + 1)


def test_instances_are_confined_like_the_single_server(folder: Path) -> None:
    """Both units have the same rights, limits and cache."""
    one, single = (Unit(name, folder) for name in ("torchserve@one.service", "torchserve.service"))
    own = {"ExecStart", "ExecStop", "TimeoutStopSec", "KillMode", "EnvironmentFile", "Environment", "StateDirectory"}
    keys = set(re.findall(r"^(\w+)=", (ROOT / "deploy/torchserve.service").read_text().partition("[Service]")[2], re.M))
    for key in keys - own - {"WorkingDirectory"}:
        assert one.read(key) == single.read(key), key
    for unit in (one, single):
        assert unit.make_environment()["XDG_CACHE_HOME"] == f"{folder}/var/cache/{unit.read('CacheDirectory')[0]}"


@pytest.mark.skipif(find_postgres() is None, reason="postgresql is not installed")
def test_jobs_units_start(folder: Path) -> None:
    """The API makes its tables and answers. A worker waits for TorchServe. Both have the images' folder."""
    api, worker = Unit("sdxl-jobs-api.service", folder), Unit("sdxl-jobs-worker@one.service", folder)
    (port,) = find_free_ports(1)
    with LocalPostgres() as database, ExitStack() as stack:
        (folder / "etc/sdxl/jobs").write_text(f"JOBS_DATABASE={database.address}\n")
        assert api.start("ExecStartPre").wait(timeout=60) == 0
        (command,) = api.read("ExecStart")
        assert command.endswith(" --port 8090")
        process = subprocess.Popen(
            [*command.removesuffix("8090").split(), str(port)], cwd=ROOT, env=api.make_environment()
        )
        stack.callback(process.kill)
        drawing = worker.start()
        stack.callback(drawing.kill)

        def answers() -> bool:
            try:
                return requests.get(f"http://127.0.0.1:{port}/jobs", timeout=5).status_code == 200
            except requests.RequestException:
                return False

        wait_until(answers)
        assert drawing.poll() is None
        own, others = (
            {name: value for name, value in unit.make_environment().items() if name.startswith("JOBS_")}
            for unit in (api, worker)
        )
        assert own == others
        assert Path(own["JOBS_RESULTS"]).is_dir()
