"""What a container runs: it asks for a key, and SIGTERM lets the requests under way finish."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import requests

from sdxl_server.serving.readiness import read_token
from tests.server.test_backends import make_settings
from tools.server import ROOT, find_free_ports, make_environment


class Container(NamedTuple):
    process: "subprocess.Popen[bytes]"
    url: str
    ready_url: str
    log: Path


@contextmanager
def run_container(folder: Path, model: Path, *arguments: str, host: str = "127.0.0.1") -> Iterator[Container]:
    """Run the entry point in a folder until it is ready. Nothing else may be written.

    The user has no name and no home, as one whom a cluster chooses.
    """
    port, management_port, metrics_port = find_free_ports(3)
    (folder / "tmp").mkdir(mode=0o700)
    environment = {**make_environment(), "TEMP": str(folder / "tmp"), "PYTHONPATH": str(ROOT), "HOME": "/"}
    environment.pop("USER", None)
    command = [sys.executable, "-m", "sdxl_server.serving.container", "--source", str(ROOT), "--model", str(model)]
    command += ["--port", str(port), "--management-port", str(management_port), "--metrics-port", str(metrics_port)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, *arguments], cwd=folder, env=environment, stdout=log, stderr=log)
    ready_url = f"http://{host}:{metrics_port}/ready"
    try:
        wait_until_ready(ready_url, process)
        yield Container(process, f"http://{host}:{port}/predictions/diffusion_fast", ready_url, folder / "log")
    finally:
        if process.poll() is None:
            for each in psutil.Process(process.pid).children(recursive=True):
                each.kill()
            process.kill()
            process.wait(timeout=30)


def make_source(folder: Path) -> str:
    """Copy what the entry point reads of the project, with eager PyTorch, which is ready sooner."""
    folder.mkdir()
    for name in ("stable_diffusion_handler.py", "pipeline_utils.py", "config.properties", "log4j2.xml"):
        shutil.copy(ROOT / name, folder)
    (folder / "model-config.yaml").write_text(make_settings(None))
    return str(folder)


def test_key_is_needed_and_logs_go_to_standard_output(tmp_path: Path, tiny_model: Path) -> None:
    with run_container(tmp_path, tiny_model, "--source", make_source(tmp_path / "source")) as container:
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            answer = requests.post(container.url, data="a red fox", headers=headers, timeout=60)
            assert (answer.status_code, answer.json()["type"]) == (400, "InvalidKeyException")
        headers = {"Authorization": f"Bearer {read_token(tmp_path / 'key_file.json', 'inference')}"}
        assert requests.post(container.url, data="a red fox", headers=headers, timeout=60).status_code == 200
        assert (tmp_path / "key_file.json").stat().st_mode & 0o77 == 0
        log = container.log.read_text()
    assert f"Key file located at {tmp_path / 'key_file.json'}" in log
    for line in (r"ACCESS_LOG - .*POST /predictions", r"MODEL_LOG - Ready: ", r"MODEL_LOG - .*a red fox"):
        assert re.search(line, log), line
    assert not (tmp_path / "logs").exists()


@pytest.mark.soak
@pytest.mark.parametrize(
    ("address", "host"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.2", "127.0.0.2"),
        ("0.0.0.0", "127.0.0.1"),
        pytest.param(
            *("0.0.0.0", "[::1]"),
            marks=pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6"),
        ),
    ],
)
def test_sigterm_drains(tmp_path: Path, tiny_model: Path, address: str, host: str) -> None:
    with run_container(tmp_path, tiny_model, "--open", "--address", address, host=host) as container:
        process = container.process
        children = psutil.Process(process.pid).children(recursive=True)
        homes = {(own.get("USER"), own["HOME"]) for own in (each.environ() for each in children)}
        assert homes == {("sdxl", str(tmp_path))}
        with ThreadPoolExecutor(3) as pool:
            body = {"prompt": "a red fox", "num_inference_steps": 150, "num_images_per_prompt": 3}
            asked = [pool.submit(requests.post, container.url, json=body, timeout=120) for _ in range(3)]
            time.sleep(1)
            os.kill(process.pid, signal.SIGTERM)
            time.sleep(1.5)
            assert requests.get(container.ready_url, timeout=5).status_code == 503
            assert [each.result().status_code for each in asked] == [200] * 3
            assert all("data" in each.result().json() for each in asked)
        assert process.wait(timeout=60) == 0
        assert psutil.wait_procs(children, timeout=10)[1] == []


def wait_until_ready(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            if requests.get(url, timeout=5).status_code == 200:
                return
        except requests.RequestException:
            pass
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.3)


def test_model_that_cannot_be_read_ends_the_start(tmp_path: Path, tiny_model: Path) -> None:
    """A snapshot without its blobs, a mount that is missing, and a file. The reason comes once."""
    snapshot, single = tmp_path / "snapshot", tmp_path / "model.safetensors"
    snapshot.mkdir()
    single.touch()
    for path in tiny_model.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    for model, message in (
        (snapshot, f"{snapshot}/model_index.json is a link to ../../blobs/model_index.json, which is not there."),
        (tmp_path / "missing", "python Download_model.py downloads one"),
        (single, "is a model in one file"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "sdxl_server.serving.container", "--model", model],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 1
        assert done.stderr.startswith("ConfigError: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_addresses_and_folders_of_no_use_are_refused(tmp_path: Path) -> None:
    """One that TorchServe cannot read, and a folder that this user may not write."""
    for arguments, message in ((("--address", "::1"), "0.0.0.0 means all of IPv6 too"), ((), "cannot write into")):
        done = subprocess.run(
            [sys.executable, "-m", "sdxl_server.serving.container", *arguments],
            cwd=tmp_path if arguments else "/proc",
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 2
        assert message in done.stderr
