"""What a container runs: SIGTERM lets the requests under way finish."""

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests

from tools.server import ROOT, find_free_ports, make_environment


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
    """Started where nothing else may be written, on TorchServe's own ports for management but others for the rest.

    The user has no name and no home, as one whom a cluster chooses.
    """
    port, metrics_port = find_free_ports(2)
    (tmp_path / "tmp").mkdir(mode=0o700)
    environment = {**make_environment(), "TEMP": str(tmp_path / "tmp"), "PYTHONPATH": str(ROOT), "HOME": "/"}
    environment.pop("USER", None)
    command = [sys.executable, "-m", "sdxl_server.serving.container", "--source", str(ROOT), "--model", str(tiny_model)]
    command += ["--address", address, "--port", str(port), "--metrics-port", str(metrics_port)]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        wait_until_ready(f"http://{host}:{metrics_port}/ready", process)
        children = psutil.Process(process.pid).children(recursive=True)
        homes = {(own.get("USER"), own["HOME"]) for own in (each.environ() for each in children)}
        assert homes == {("sdxl", str(tmp_path))}
        with ThreadPoolExecutor(3) as pool:
            body = {"prompt": "a red fox", "num_inference_steps": 150, "num_images_per_prompt": 3}
            url = f"http://{host}:{port}/predictions/diffusion_fast"
            asked = [pool.submit(requests.post, url, json=body, timeout=120) for _ in range(3)]
            time.sleep(1)
            os.kill(process.pid, signal.SIGTERM)
            time.sleep(1.5)
            assert requests.get(f"http://{host}:{metrics_port}/ready", timeout=5).status_code == 503
            assert [each.result().status_code for each in asked] == [200] * 3
            assert all("data" in each.result().json() for each in asked)
        assert process.wait(timeout=60) == 0
        assert psutil.wait_procs(children, timeout=10)[1] == []
    finally:
        process.kill()


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
