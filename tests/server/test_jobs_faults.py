"""Jobs while their programs, their database and their connections fail: none is lost, and none is doubled."""

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from jobs.database import AwayError, Database
from jobs.settings import Settings
from jobs.store import Order, Store
from sdxl_server.api.metadata import read_metadata
from sdxl_server.request.limits import Limits
from tests.server.test_jobs import ENDED, Site, is_up, make_query, serve
from tools.instances import Instance
from tools.postgres import LocalPostgres, find_postgres

pytestmark = pytest.mark.skipif(find_postgres() is None, reason="postgresql is not installed")

STEPS = 50  # 2 s
PAUSE_SECONDS = 3
# Both holders use the same ids:
ORDERS = {(holder, f"order-{k:03d}"): 2 * k + len(holder) for k in range(98) for holder in ("", "b")}
ACCEPTED = 15  # orders before the first fault; more follow with each fault
CLIENTS = tuple(f"client-{k}" for k in range(4))  # query.py --job orders these, is killed, and returns.
# A fault, its target, and its seconds.
FAULTS = (
    ("kill", "worker0", 0),
    ("kill", "client-0", 0),
    ("crash", "database", 0),
    ("freeze", "worker1", 8),
    ("kill", "api", 0),
    ("kill", "torchserve0", 0),
    ("silence", "worker0", 15),
    ("kill", "worker1", 0),
    ("crash", "database", 5),
    ("silence", "api", 15),
    ("read-only", "database", 60),
    ("kill", "client-1", 0),
    ("freeze", "torchserve1", 15),
    ("kill", "worker0", 0),
    ("kill", "worker1", 0),
    ("freeze", "api", 8),
    ("kill", "torchserve1", 0),
    ("crash", "database", 20),
    ("freeze", "worker0", 3),
    ("silence", "worker1", 6),
    ("kill", "api", 0),
    ("kill", "client-2", 0),
    ("read-only", "database", 10),
    ("kill", "worker1", 0),
    ("crash", "database", 0),
    ("crash", "database", 3),
    ("kill", "torchserve0", 0),
    ("freeze", "torchserve0", 4),
    ("freeze", "worker1", 15),
    ("kill", "client-3", 0),
    ("silence", "api", 6),
    ("kill", "worker0", 0),
    ("kill", "api", 0),
    ("read-only", "database", 3),
    ("crash", "database", 40),
    ("kill", "torchserve1", 0),
    ("silence", "worker0", 8),
    ("freeze", "api", 15),
    ("kill", "worker1", 0),
    ("crash", "database", 1),
)

Key = tuple[str, str]  # a job's holder and id


class FaultRun:
    """Orders, faults and what the API reports, each in its own thread."""

    def __init__(self, site: Site, folder: Path) -> None:
        self.site, self.folder = site, folder
        self.is_over = threading.Event()
        self.faults = 0  # that have begun
        self.accepted: list[Key] = []
        self.told: dict[Key, dict[str, Any]] = {}  # of the jobs that have ended
        self.places: dict[Key, int] = {}
        self.to_cancel = set(list(ORDERS)[7::13])
        self.cancelled: set[Key] = set()
        self.clients: dict[str, subprocess.Popen[bytes]] = {}

    def ask(self, method: str, key: Key, body: Any = None) -> dict[str, Any]:
        holder, job = key
        address = f"http://127.0.0.1:{self.site.api_port}/jobs/{job}"
        answer = requests.request(method, address, json=body, headers={"X-Holder": holder}, timeout=60)
        assert answer.ok or answer.status_code == HTTPStatus.SERVICE_UNAVAILABLE, answer.text
        answer.raise_for_status()
        told: dict[str, Any] = answer.json()
        return told

    def insist(self, method: str, key: Key, body: Any = None) -> dict[str, Any]:
        """Ask until the API answers, as a client does."""
        while True:
            with contextlib.suppress(requests.RequestException):
                return self.ask(method, key, body)
            assert not self.is_over.wait(0.5)

    def order(self, key: Key) -> dict[str, Any]:
        return self.insist("PUT", key, {"prompt": "a red fox", "num_inference_steps": STEPS, "seed": ORDERS[key]})

    def order_all(self) -> None:
        for count, key in enumerate(ORDERS):
            while count > ACCEPTED + (len(ORDERS) - ACCEPTED) * self.faults / len(FAULTS):
                assert not self.is_over.wait(0.1)
            self.order(key)
            self.accepted.append(key)
            if count % 2 and key in self.to_cancel:
                self.cancel(key)

    def cancel(self, key: Key) -> None:
        self.to_cancel.discard(key)
        if self.insist("DELETE", key)["state"] == "cancelled":
            self.cancelled.add(key)

    def start_client(self, name: str) -> None:
        more = ["--prompt", "a red fox", "--steps", str(STEPS), "--filename", f"{name}.jpg", "--overwrite"]
        with (self.folder / f"{name}.log").open("a") as log:
            self.clients[name] = subprocess.Popen(
                make_query(self.site, name, *more), cwd=self.folder, stdout=log, stderr=log
            )

    def cause_all(self) -> None:
        for kind, target, seconds in FAULTS:
            assert not self.is_over.wait(PAUSE_SECONDS)
            self.faults += 1
            with self.cause(kind, target):
                time.sleep(seconds)

    @contextlib.contextmanager
    def cause(self, kind: str, target: str) -> Iterator[None]:
        """Cause a fault, and end it on exit."""
        if target in CLIENTS:
            self.start_client(target)
            self.site.wait(lambda: is_up(self.site) and self.site.ask("GET", f"/{target}").ok)
            self.accepted.append(("", target))
            self.clients[target].kill()
            self.start_client(target)
            yield
        elif kind == "kill":
            self.site.kill_and_start(target)
            yield
        elif target == "database":
            with self.site.take_database_away(kind):
                yield
        else:
            processes = self.find_connections(target) if kind == "silence" else [self.find_process(target)]
            for process in processes:
                process.suspend()
            yield
            for process in processes:
                process.resume()

    def find_process(self, target: str) -> psutil.Process:
        if target.startswith("torchserve"):
            return self.site.instances[int(target[-1])].find_processes()[0]
        return self.site.processes[target]

    def find_connections(self, target: str) -> list[psutil.Process]:
        """Return the processes of PostgreSQL that serve a program."""
        found = self.find_process(target).net_connections("tcp")
        ports = [str(each.laddr.port) for each in found if each.raddr and each.raddr.port == self.site.database.port]
        query = f"SELECT pid FROM pg_stat_activity WHERE client_port IN ({', '.join(ports)})"
        return [psutil.Process(int(pid)) for pid in self.site.database.run_sql(query).split()]

    def watch(self) -> None:
        """Look at each open job once."""
        for key in [key for key in self.accepted if key not in self.told]:
            each = self.ask("GET", key)
            if each["state"] == "waiting":
                assert each["place"] <= self.places.get(key, each["place"]), key
                self.places[key] = each["place"]
            if each["state"] == "running" and key in self.to_cancel:
                self.cancel(key)
            if each["state"] in ENDED:
                self.told[key] = each

    def check(self) -> None:
        """Check that each job has ended once, and that files and rows agree."""
        database, results = self.site.database, self.folder / "results"
        assert len(self.told) == len(ORDERS) + len(CLIENTS)
        for key, each in self.told.items():
            assert (each["state"] == "cancelled") == (key in self.cancelled), each
            assert each["state"] != "failed" or "this was attempt 2" in each["message"], each
            assert key not in ORDERS or self.order(key) == each  # the same order is the same job
        assert database.run_sql("SELECT count(*) FROM image_jobs") == str(len(self.told))
        self.site.wait(lambda: database.run_sql("SELECT count(*) FROM procrastinate_jobs") == "0")
        rows = database.run_sql("SELECT holder, id, unnest(results) FROM image_jobs").split()
        names = {(holder, job): name for holder, job, name in (row.split("|") for row in rows)}
        assert len(rows) == len(names)
        assert set(names) == {key for key, each in self.told.items() if each["state"] == "done"}
        self.site.wait(lambda: sorted(path.name for path in results.iterdir()) == sorted(names.values()))
        images = {key: (results / name).read_bytes() for key, name in names.items()}
        assert len(set(images.values())) == len(images)
        for key in images:
            if key in ORDERS:
                assert read_metadata(images[key], Limits())["request"]["seed"] == ORDERS[key]
            else:
                assert self.clients[key[1]].wait(timeout=60) == 0
                assert (self.folder / f"{key[1]}.jpg").read_bytes() == images[key]


def test_the_api_ends_while_the_database_is_away(tmp_path: Path) -> None:
    with LocalPostgres() as database:
        site = Site(tmp_path, [Instance(tmp_path, metrics_port=1)], database)  # this TorchServe is down
        site.make_tables()
        site.start("api")
        site.wait(lambda: is_up(site))
        database.stop()
        try:
            site.processes["api"].terminate()
            site.processes["api"].wait(timeout=40)
        finally:
            database.start()


def test_a_silent_program_frees_its_locks() -> None:
    async def order_meanwhile(address: str) -> bool:
        is_accepted = False
        async with Database(address) as silent, Database(address) as other:
            await other.make_tables()
            with contextlib.suppress(AwayError):
                async with silent.transact() as connection:
                    await connection.execute("LOCK image_jobs")
                    order = Order(holder="", id="order-001", digest="", fields="")
                    is_accepted = await Store(other, Settings()).submit(order)
        return is_accepted

    with LocalPostgres() as database:
        assert asyncio.run(order_meanwhile(database.address))


@pytest.mark.soak
def test_each_job_ends_once_whatever_fails(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """200 jobs on two workers."""
    for site in serve(tmp_path, tiny_model, 2):
        started, run = time.monotonic(), FaultRun(site, tmp_path)
        with ThreadPoolExecutor() as pool:
            threads = [pool.submit(run.order_all), pool.submit(run.cause_all)]
            try:
                while len(run.told) < len(ORDERS) + len(CLIENTS) or not all(thread.done() for thread in threads):
                    for thread in threads:
                        if thread.done():
                            thread.result()
                    with contextlib.suppress(requests.RequestException):
                        run.watch()
                    time.sleep(0.3)
                    assert time.monotonic() - started < 1800
            finally:
                run.is_over.set()
        seconds = time.monotonic() - started
        run.check()
        ended = Counter(each["state"] for each in run.told.values())
        attempts = Counter(each["attempt"] for each in run.told.values())
        with capsys.disabled():
            faults = Counter(f"{kind} {target.rstrip('-0123')}" for kind, target, _ in FAULTS)
            sys.stdout.write(
                f"\n{dict(ended)} in {seconds:.0f} s; {len(FAULTS)} faults: {dict(faults)}; attempts {dict(attempts)}\n"
            )
