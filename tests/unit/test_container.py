"""The container image and compose, checked without docker."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from tools.server import ROOT

FILES = ROOT / "deploy/container"


def read_copied() -> dict[str, Path]:
    """Return what the image gets: the source's name, and its path below /opt/sdxl."""
    lines = re.findall(r"^COPY (.*) (\S+)$", (FILES / "Dockerfile").read_text(), re.M)
    return {name: Path(name if target == "./" else target) for names, target in lines for name in names.split()}


def test_the_image_is_made_of_what_there_is() -> None:
    let_in = re.findall(r"^!(\S+)$", (FILES / "Dockerfile.dockerignore").read_text(), re.M)
    assert sorted(read_copied()) == sorted(let_in)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of /opt/sdxl in the image, without packages."""
    folder = tmp_path_factory.mktemp("image")
    for name, target in read_copied().items():
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        is_folder = (ROOT / name).is_dir()
        (shutil.copytree if is_folder else shutil.copy)(ROOT / name, folder / target)
    return folder


def run_in_image(image: Path, command: Sequence[str]) -> str:
    """Run a command of the image's Python in a folder of its own; return what it prints."""
    words = [sys.executable if word == "python" else word.replace("/opt/sdxl", str(image)) for word in command]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(image), "HOME": "/"}
    done = subprocess.run(words, cwd=image, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["web", "jobs", "sdxl_server.serving.container"])
def test_the_image_runs_the_programs(image: Path, name: str) -> None:
    assert f"usage: python -m {name}" in run_in_image(image, ["python", "-m", name, "--help"])


def test_the_image_downloads_models(image: Path, tmp_path: Path) -> None:
    """The demonstration model here: no hub is asked."""
    command = ["python", "/opt/sdxl/Download_model.py", "--model", "demo", "--output-dir", str(tmp_path / "model")]
    run_in_image(image, command)
    assert (tmp_path / "model/model_index.json").exists()


def test_torch_is_built_for_cpus() -> None:
    """Unless another index is given. The build of PyPI brings 6 GB for CUDA."""
    text = (FILES / "Dockerfile").read_text()
    assert "\nARG TORCH_INDEX=https://download.pytorch.org/whl/cpu\n" in text
    (command,) = re.findall(r"pip install --no-cache-dir (.+?) -r requirements.txt", text)
    for index, words in (("https://example.org/cpu", "--extra-index-url https://example.org/cpu"), ("", "")):
        done = subprocess.run(
            ["sh", "-c", f"echo {command}"], env={"TORCH_INDEX": index}, capture_output=True, text=True
        )
        assert done.stdout.strip() == words


COMPOSE = yaml.safe_load((FILES / "compose.yaml").read_text())["services"]


@pytest.mark.parametrize("name", COMPOSE)
def test_services_of_compose_are_bounded_and_restarted(name: str) -> None:
    """They listen on loopback only, and keep no logs or state in memory."""
    service = COMPOSE[name]
    assert service["restart"] == ("no" if name == "jobs-setup" else "unless-stopped")
    assert service["mem_limit"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    assert all(each.startswith("/tmp:") for each in service.get("tmpfs", ()))
    assert set(service.get("depends_on", ())) <= set(COMPOSE)
    assert ("profiles" in service) == (name not in ("sdxl", "web"))
    if service["image"] == "sdxl":
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert "--open" not in service.get("command", ())


def test_web_ui_of_compose_starts(image: Path, tmp_path: Path) -> None:
    (tmp_path / "key_file.json").write_text('{"inference": {"key": "one"}}')
    _, *words = (word.replace("/var/lib/sdxl", str(tmp_path)) for word in COMPOSE["web"]["entrypoint"])
    command = [sys.executable, *words, "--port", "0"]
    with subprocess.Popen(command, cwd=image, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert re.fullmatch(r"The web UI is at http://127.0.0.1:\d+/#token=one\n", process.stdout.readline())
        process.kill()


def test_only_the_cluster_runs_the_image_open() -> None:
    """HAProxy has no key for its instances. The network policy lets nobody else in."""
    resources = yaml.safe_load_all((ROOT / "deploy/kubernetes/base/instances.yaml").read_text())
    (container,) = next(each for each in resources if each["kind"] == "Deployment")["spec"]["template"]["spec"][
        "containers"
    ]
    assert container["args"] == ["--open"]
