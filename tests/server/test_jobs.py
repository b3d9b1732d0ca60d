"""Jobs with a real PostgreSQL, real workers and a real TorchServe; kills of each of them."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openapi_spec_validator
import psutil
import pytest
import requests
import yaml
from PIL import Image

from jobs.upkeep import LOST
from tests.server import waiting_handler
from tests.server.test_backends import make_settings
from tools.instances import Instance
from tools.postgres import LocalPostgres, find_postgres
from tools.proxy import LocalProxy, find_nginx
from tools.server import ROOT, find_free_ports, make_archive

pytestmark = pytest.mark.skipif(find_postgres() is None, reason="postgresql is not installed")
HANDLER = Path(waiting_handler.__file__)
ENDED = {"done", "failed", "cancelled"}


class Site:
    """PostgreSQL, the API, and workers, each with a TorchServe."""

    def __init__(self, folder: Path, instances: list[Instance], database: LocalPostgres) -> None:
        self.folder, self.instances, self.database = folder, instances, database
        (self.api_port,) = find_free_ports(1)
        self.processes: dict[str, psutil.Popen] = {}
        self.environment = {
            **os.environ,
            "JOBS_DATABASE": database.address,
            "JOBS_RESULTS": str(folder / "results"),
            "JOBS_LOST_SECONDS": "4",
            "JOBS_SILENT_SECONDS": "10",
            "JOBS_PREDICTIONS": instances[0].url,
            "PYTHONPATH": str(ROOT),
        }

    @property
    def names(self) -> list[str]:
        return [f"worker{index}" for index in range(len(self.instances))]

    def make_tables(self) -> None:
        command = [sys.executable, "-m", "jobs", "setup"]
        subprocess.run(command, cwd=self.folder, env=self.environment, check=True, timeout=60)

    def start(self, name: str, **variables: str) -> None:
        """Start one of its programs."""
        command = [sys.executable, "-m", "uvicorn", "jobs.api:app", "--port", str(self.api_port)]
        if name != "api":
            command = [sys.executable, "-m", "jobs", "worker"]
            variables["JOBS_PREDICTIONS"] = self.instances[int(name[-1])].url
        with (self.folder / f"{name}.log").open("a") as log:
            self.processes[name] = psutil.Popen(
                command, cwd=self.folder, env={**self.environment, **variables}, stdout=log, stderr=log
            )

    def kill(self, name: str) -> None:
        """Kill one of its programs as the kernel does."""
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes[name].wait(timeout=10)

    def kill_and_start(self, name: str) -> None:
        """Kill one of its programs, or the TorchServe of this number, and start it again."""
        if not name.startswith("torchserve"):
            self.kill(name)
            self.start(name)
            return
        instance = self.instances[int(name[-1])]
        for process in instance.find_processes():
            process.kill()
        instance.__exit__(None, None, None)
        instance.__enter__()

    @contextlib.contextmanager
    def take_database_away(self, kind: str) -> Iterator[None]:
        """Crash PostgreSQL, or let it refuse changes, until exit."""
        if kind == "crash":
            self.database.stop("immediate")
            yield
            self.database.start()
        else:
            change = "ALTER SYSTEM SET default_transaction_read_only ="
            self.database.run_sql(f"{change} on", "SELECT pg_reload_conf()")
            yield
            self.database.run_sql(f"{change} off", "SELECT pg_reload_conf()")

    def ask(self, method: str, path: str = "", body: Any = None) -> requests.Response:
        return requests.request(method, f"http://127.0.0.1:{self.api_port}/jobs{path}", json=body, timeout=120)

    def order(self, job: str = "", *, steps: int = 5, **fields: Any) -> dict[str, Any]:
        body = {"prompt": "a red fox", "num_inference_steps": steps, **fields}
        answer = self.ask("PUT", f"/{job}", body) if job else self.ask("POST", "", body)
        assert answer.status_code == 202, answer.text
        told: dict[str, Any] = answer.json()
        return told

    def read(self, job: str) -> dict[str, Any]:
        told: dict[str, Any] = self.ask("GET", f"/{job}").json()
        return told

    def wait(self, condition: Callable[[], Any], *, seconds: float = 60) -> Any:
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, "it has not come about in time"
            time.sleep(0.1)
        return value

    def wait_for(self, job: str, *states: str, seconds: float = 60) -> dict[str, Any]:
        def find() -> dict[str, Any] | None:
            told = self.read(job)
            return told if told.get("state") in states else None

        told: dict[str, Any] = self.wait(find, seconds=seconds)
        return told

    def fetch(self, job: str) -> bytes:
        (address,) = self.read(job)["pictures"]
        answer = requests.get(f"http://127.0.0.1:{self.api_port}{address}", timeout=30)
        with Image.open(io.BytesIO(answer.content)) as picture:
            picture.load()
        return answer.content


def serve(folder: Path, model: Path, count: int) -> Iterator[Site]:
    with contextlib.ExitStack() as stack:
        instances = []
        for index in range(count):
            place, (port,) = folder / str(index), find_free_ports(1)
            place.mkdir()
            settings = yaml.safe_load(make_settings(None))
            settings["handler"]["metrics_address"] = f"127.0.0.1:{port}"
            make_archive(place, model, yaml.safe_dump(settings, sort_keys=False), handler=HANDLER)
            instances.append(stack.enter_context(Instance(place, metrics_port=port)))
        database = stack.enter_context(LocalPostgres())
        site = Site(folder, instances, database)
        site.make_tables()
        try:
            for name in ("api", *site.names):
                site.start(name)
            site.wait(lambda: is_up(site))
            yield site
        finally:
            for process in site.processes.values():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def make_query(site: Site, job: str, *more: str) -> list[str]:
    """Return query.py's command for a job."""
    url = f"http://127.0.0.1:{site.api_port}/predictions/diffusion_fast"
    return [sys.executable, str(ROOT / "query.py"), "--url", url, "--job", job, *more]


def is_up(site: Site) -> bool:
    with contextlib.suppress(requests.RequestException):
        return site.ask("GET", "/no-such-job").status_code == 404
    return False


def test_a_job_becomes_a_picture(site: Site) -> None:
    told = site.order(seed=7)
    assert site.wait_for(told["id"], "done")["step"] == 4  # the last step is the picture itself
    site.fetch(told["id"])
    assert f'"id": "{told["id"]}"' in site.instances[0].log


def test_the_same_id_twice_is_one_job(site: Site) -> None:
    job = uuid.uuid4().hex
    site.order(job, seed=1)
    site.order(job, seed=1)
    site.wait_for(job, "done")
    assert site.order(job, seed=1)["state"] == "done"
    assert site.instances[0].log.count(f'"id": "{job}"') == 1
    other = site.ask("PUT", f"/{job}", {"prompt": "something else"})
    assert (other.status_code, other.json()["error"]["param"]) == (409, "id")


def test_a_client_leaves_and_comes_back(site: Site, tmp_path: Path) -> None:
    job = uuid.uuid4().hex
    order = make_query(site, job, "--prompt", "a red fox", "--filename", "fox.jpg")
    for more, saved in ((["--leave"], False), ([], True)):
        done = subprocess.run([*order, *more], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "fox.jpg").exists() == saved
    back = subprocess.run(make_query(site, job), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    (name,) = back.stdout.split()
    assert (tmp_path / name).read_bytes() == (tmp_path / "fox.jpg").read_bytes() == site.fetch(job)
    lost = subprocess.run(make_query(site, "no-such-job"), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (lost.returncode, "there is no job" in lost.stderr) == (2, True)


@pytest.mark.skipif(find_nginx() is None, reason="nginx and openssl are not installed")
def test_jobs_through_nginx_belong_to_the_holder_of_the_key(site: Site) -> None:
    with LocalProxy(site.instances[0].ports["inference_address"], jobs=site.api_port) as proxy:
        tokens = {"anna": "a" * 32, "ben": "b" * 32}
        proxy.write_tokens({token: holder for holder, token in tokens.items()})
        proxy.command("-s", "reload")
        anna, ben = ({"Authorization": f"Bearer {token}"} for token in tokens.values())
        address = f"https://127.0.0.1:{proxy.port}/jobs"
        given: dict[str, Any] = {"verify": str(proxy.certificate), "timeout": 30}
        order: dict[str, Any] = {"json": {"prompt": "a red fox"}, **given}
        accepted = site.wait(lambda: ordered if (ordered := requests.post(address, headers=anna, **order)).ok else None)
        assert requests.post(address, **order).status_code == 401
        job = f"{address}/{accepted.json()['id']}"

        def find_end() -> requests.Response | None:
            read = requests.get(job, headers=anna, **given)
            return read if read.json().get("state") == "done" else None  # an old process of nginx may answer

        ended = site.wait(find_end)
        known = {**anna, "If-None-Match": ended.headers["ETag"]}
        assert requests.get(job, headers=known, **given).status_code == 304
        assert requests.get(f"{job}/pictures/0", headers=anna, **given).headers["Content-Type"] == "image/jpeg"
        described = requests.get(f"{job}/pictures/0/metadata", headers=anna, **given).json()
        assert described["request"]["prompt"]
        spoofed = {**ben, "X-Holder": "anna"}
        for path in ("", "/pictures/0", "/pictures/0/metadata"):
            assert requests.get(f"{job}{path}", **given).status_code == 401
            assert requests.get(f"{job}{path}", headers=spoofed, **given).status_code == 404
        assert [each["id"] for each in requests.get(address, headers=anna, **given).json()] == [accepted.json()["id"]]
        assert requests.get(address, headers=spoofed, **given).json() == []


def test_the_document_is_openapi(site: Site) -> None:
    document = requests.get(f"http://127.0.0.1:{site.api_port}/openapi.json", timeout=30).json()
    openapi_spec_validator.validate(document)
    assert set(document["paths"]["/jobs/{job}"]) == {"get", "put", "delete"}


def test_mistakes_are_told_at_once(site: Site) -> None:
    for body, words in (
        ({"prompt": "a", "width": 65}, "width takes"),
        ({}, "prompt is missing"),
        ({"x": 1}, "'x' is not"),
    ):
        answer = site.ask("POST", "", body)
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]


def test_jobs_wait_in_order_and_are_cancelled(site: Site) -> None:
    first, *others = [site.order(steps=150, seed=seed, num_images_per_prompt=10)["id"] for seed in range(4)]
    site.wait_for(first, "running")
    assert [site.read(job)["place"] for job in others] == [0, 1, 2]
    assert site.ask("DELETE", f"/{others[0]}").json()["state"] == "cancelled"
    assert [site.read(job)["place"] for job in others[1:]] == [0, 1]
    site.wait(lambda: site.read(first)["step"])
    for job in (first, *others[1:]):
        site.ask("DELETE", f"/{job}")
    for job in (first, *others):
        site.wait_for(job, "cancelled", seconds=10)
    site.wait_for(site.order()["id"], "done")  # TorchServe tells of who has left with the next call
    assert "The client has left" in site.instances[0].log


@pytest.mark.parametrize(
    ("kills", "state", "message"),
    [(1, "done", None), pytest.param(2, "failed", f"{LOST}; this was attempt 2", marks=pytest.mark.soak)],
)
def test_a_job_whose_worker_is_killed_is_taken_up_once(site: Site, kills: int, state: str, message: str | None) -> None:
    job = site.order(steps=30, num_images_per_prompt=2)["id"]
    for attempt in range(1, kills + 1):
        site.wait(lambda: site.read(job)["state"] == "running" and site.read(job)["attempt"] == attempt)  # noqa: B023
        site.kill("worker0")
        site.start("worker0")
    told = site.wait_for(job, "done", "failed")
    assert (told["state"], told["attempt"], told["message"]) == (state, 2, message)


@pytest.mark.parametrize("seconds", [12, pytest.param(120, marks=pytest.mark.soak)])
@pytest.mark.parametrize("kind", ["crash", pytest.param("read-only", marks=pytest.mark.soak)])
def test_a_worker_delivers_after_an_outage(site: Site, kind: str, seconds: float) -> None:
    first, second = (site.order(steps=50, seed=seed)["id"] for seed in (1, 2))
    site.wait(lambda: site.read(first)["step"])
    with site.take_database_away(kind):
        time.sleep(seconds)
    assert [site.wait_for(job, "done", "failed")["attempt"] for job in (first, second)] == [1, 1]
