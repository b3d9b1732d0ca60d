"""The guide's commands, one after another, as a reader types them; only the ports are others."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests
from PIL import Image

import Download_model
from sdxl_server import __version__
from tests.hub import Hub
from tools.server import ROOT, find_free_ports, make_environment, write_properties

SHIPPED = (
    *("stable_diffusion_handler.py", "pipeline_utils.py", "Download_model.py", "query.py"),
    *("model-config.yaml", "config.properties", "log4j2.xml", "requirements.txt", "constraints.txt"),
)
ARCHIVER = (
    "torch-model-archiver --model-name diffusion_fast --version 1.0 --handler stable_diffusion_handler.py"
    " --config-file model-config.yaml"
)
PROMPT = '--prompt "a photo of an astronaut riding a horse on mars"'


class Reader:
    """Somebody at a shell in a folder with the shipped files."""

    def __init__(self, folder: Path, hub: str) -> None:
        for name in SHIPPED:
            shutil.copy(ROOT / name, folder)
        self.folder = folder
        self.ports = write_properties(ROOT / "config.properties", folder / "config.properties")
        self.url = f"http://localhost:{self.ports['inference_address']}/predictions/diffusion_fast"
        self.temporary = folder / "tmp"  # README's
        # TMP counts until TEMP is made: the archiver's folder has one name in it, also for two tests at a time.
        (folder / "archiver").mkdir()
        own = {
            "TMP": str(folder / "archiver"),
            "TEMP": str(self.temporary),
            "HF_ENDPOINT": hub,
            "HF_HOME": str(folder),
            "NO_PROXY": "127.0.0.1",
        }
        self.environment = {**make_environment(), **own}
        self.environment.pop("TMPDIR", None)

    def run(self, command: str, *, status: int = 0) -> str:
        """Run a line and return what it printed."""
        done = subprocess.run(
            command, shell=True, cwd=self.folder, env=self.environment, text=True, stdout=-1, stderr=-2, timeout=300
        )
        assert done.returncode == status, done.stdout
        return done.stdout

    def leave_uncompiled(self) -> None:
        """Take pt2 out of the settings, so that the server starts sooner."""
        path = self.folder / "model-config.yaml"
        path.write_text(re.sub("(?m)^pt2:.*", "", path.read_text()))

    def start_server(self, archive: str) -> None:
        """Start the server with its log in a file, as `… > server.log` does, and wait for the model."""
        text = (ROOT / "README.md").read_text().partition("### 3. Start the server")[2]
        commands = text.split("```")[1].removeprefix("bash").replace("--models diffusion_fast", f"--models {archive}")
        self.run(f"exec > server.log 2>&1\n{commands}")
        deadline = time.monotonic() + 180
        while "Ready: {" not in self.read_log():
            assert time.monotonic() < deadline, self.read_log()[-5000:]
            time.sleep(0.5)

    def read_log(self) -> str:
        return (self.folder / "server.log").read_text()

    def find_server(self) -> list[psutil.Process]:
        path = self.temporary / ".model_server.pid"
        if not path.exists():
            return []
        server = psutil.Process(int(path.read_text()))
        return [server, *server.children(recursive=True)]


@pytest.fixture
def reader(tmp_path: Path, tiny_model: Path) -> Iterator[Reader]:
    files = {path.relative_to(tiny_model).as_posix(): path.read_bytes() for path in tiny_model.glob("**/*.*")}
    with Hub(Download_model.DEFAULT_MODEL, Download_model.DEFAULT_REVISION, files) as hub:
        reader = Reader(tmp_path, hub.url)
        yield reader
        for process in reader.find_server():
            process.kill()


def check_private(folder: Path) -> None:
    """Check that what the server has written, its keys and logs, is for this account only."""
    for name in ("key_file.json", "logs/model_log.log", "logs/ts_log.log"):
        assert (folder / name).stat().st_mode & 0o077 == 0, name
    temporary = folder / "tmp"
    assert (temporary.stat().st_mode & 0o077, temporary.stat().st_uid) == (0, os.getuid())
    assert {path.name for path in temporary.iterdir()} >= {"models", ".model_server.pid", ".ts.sock.9000"}


def find_started(folder: Path) -> list[psutil.Process]:
    """Return the processes that look for programs in a folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if str(folder) in process.environ().get("PATH", "").split(os.pathsep):
                found.append(process)
    return found


def check_picture(path: Path) -> None:
    with Image.open(path) as picture:
        picture.load()
        assert (picture.format, picture.size) == ("JPEG", (128, 128))


def test_requirements_are_installed_by_the_guides_command(tmp_path: Path) -> None:
    """Into an environment that sees what this one has installed, so that only the project itself is left to install.

    pip still reads the requirements and the constraints, and would fetch what is missing here or of another version.
    """
    venv.create(tmp_path)
    python = tmp_path / "bin" / "python"
    own = sysconfig.get_path("purelib", scheme="venv", vars={"base": str(tmp_path)})
    Path(own, "seen.pth").write_text(sysconfig.get_path("purelib"))
    done = subprocess.run(
        [python, "-m", "pip", "install", "-r", "requirements.txt"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"Successfully installed torchserve-sdxl-openvino-{__version__}"
    code = "import sdxl_server, openvino_backend as backend; print(sdxl_server.__file__, backend.__file__)"
    done = subprocess.run([python, "-c", code], cwd=tmp_path, text=True, capture_output=True, check=True)
    assert done.stdout.split() == [str(ROOT / name / "__init__.py") for name in ("sdxl_server", "openvino_backend")]


def test_every_step_of_the_guide(reader: Reader) -> None:
    reader.run('echo "    profile: true" >> model-config.yaml')
    reader.run("python Download_model.py")
    reader.run(f'{ARCHIVER} --extra-files "./pipeline_utils.py" --archive-format no-archive')
    reader.run("mv Base_Diffusion_model diffusion_fast/")
    reader.run("mkdir model_store && mv diffusion_fast model_store")
    reader.start_server("diffusion_fast")

    printed = reader.run(f'python query.py --url "{reader.url}" {PROMPT}').strip()
    (name,) = re.findall(r"^output-\d{8}-\d{6}\.jpg$", printed, re.MULTILINE)
    assert re.search(rf"^{name}: seed \d+$", printed, re.MULTILINE)
    check_picture(reader.folder / name)
    reader.run(f'python query.py --url "{reader.url}" {PROMPT} --filename astronaut.jpg')
    check_picture(reader.folder / "astronaut.jpg")
    told = reader.run(f'python query.py --url "{reader.url}" --prompt " "', status=2)
    assert "400: prompt takes a text" in told

    for stage in ("preprocess", "inference", "postprocess"):
        times = re.findall(rf"\[METRICS\]ts_handler_{stage}\.Milliseconds:([\d.e-]+)\|", reader.read_log())
        assert len(times) == 2  # one for each request that was answered with a picture

    check_private(reader.folder)
    running = reader.find_server()
    assert len(running) >= 2  # the server and its worker
    assert "TorchServe has stopped." in reader.run("torchserve --stop")
    assert psutil.wait_procs(running, timeout=30)[1] == []


@pytest.mark.parametrize(
    ("name", "form"),
    [("diffusion_fast.mar", "default"), pytest.param("diffusion_fast.tar.gz", "tgz", marks=pytest.mark.soak)],
)
def test_archive_with_the_model_packed_in(reader: Reader, name: str, form: str) -> None:
    reader.leave_uncompiled()
    reader.run("python Download_model.py --output-dir packed/Base_Diffusion_model")
    reader.run("mkdir model_store")
    files = "./pipeline_utils.py,./packed"
    reader.run(f'{ARCHIVER} --extra-files "{files}" --archive-format {form} --export-path model_store')
    reader.start_server(f"diffusion_fast={name}")
    check_private(reader.folder)
    (unpacked,) = (reader.temporary / "models").iterdir()
    assert (unpacked / "stable_diffusion_handler.py").is_file()
    reader.run(f'python query.py --url "{reader.url}" {PROMPT} --filename picture.jpg')
    check_picture(reader.folder / "picture.jpg")
    reader.run("torchserve --stop")


def test_demo_on_a_machine_without_java(tmp_path: Path) -> None:
    """`make demo`'s program, with nothing but this environment's programs to be found."""
    environment = {name: value for name, value in os.environ.items() if name != "JAVA_HOME"}
    environment["PATH"] = str(tmp_path)
    before = set(ROOT.glob("output-*.jpg"))
    done = subprocess.run(
        [sys.executable, "-m", "demo"], cwd=ROOT, env=environment, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "make page serves the model to a browser, at http://127.0.0.1:8088/" in done.stdout
    path = Path(done.stdout.split()[-1])
    assert path.parent == ROOT
    assert path not in before
    check_picture(path)
    path.unlink()
    assert find_started(tmp_path) == []


def test_make_sdxl_serves_a_model_of_the_hub(tmp_path: Path, tiny_model: Path) -> None:
    """`make sdxl`'s program: its example request and its web UI work, and Ctrl-C ends it."""
    files = {path.relative_to(tiny_model).as_posix(): path.read_bytes() for path in tiny_model.glob("**/*.*")}
    model = f"somebody/{tmp_path.name}"
    with Hub(model, "main", files) as hub:
        process = subprocess.Popen(
            [sys.executable, "-m", "tools.serve", "--model", model, "--port", str(find_free_ports(1)[0])],
            cwd=ROOT,
            env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"},
            text=True,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            printed = ""
            while "Ctrl-C ends it" not in printed:
                line = process.stdout.readline()
                assert line, printed
                printed += line
            example = next(line for line in printed.splitlines() if line.startswith("python query.py"))
            arguments = shlex.split(f"{example} --filename {tmp_path / 'image.jpg'}")[1:]
            subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, timeout=120)
            check_picture(tmp_path / "image.jpg")
            page = re.search(r"http://127.0.0.1:\d+/(?=#token)", printed)
            assert page is not None
            assert requests.get(page[0], timeout=10).ok
            process.send_signal(signal.SIGINT)
            assert process.wait(180) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            shutil.rmtree(ROOT / "build/models" / model.replace("/", "--"), ignore_errors=True)
