"""Several instances behind the shipped haproxy.cfg: one queue, a kill, a rolling restart."""

import contextlib
import http.client
import json
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
import requests
import yaml

from sdxl_server.serving import rolling_restart
from tests.server import waiting_handler
from tests.server.eager import wait_for
from tests.server.test_backends import make_settings
from tools.instances import NAMES, Instance, LocalBalancer, find_haproxy
from tools.proxy import LocalProxy, find_nginx
from tools.server import ROOT, find_free_ports, make_archive

pytestmark = pytest.mark.skipif(find_haproxy() is None, reason="haproxy is not installed")
# accepted, where it went, and ms: reading, waiting, connecting, until the answer's header, in all; the status
LINE = re.compile(r"\[(\S+)\] entrance pictures/(\S+) \d+/(\d+)/-?\d+/-?\d+/\+?(\d+) (\d+)")


class Site(NamedTuple):
    instances: dict[str, Instance]
    balancer: LocalBalancer

    def ask(self, seed: int, *, steps: int = 10) -> int:
        """Return the status of a request, 0 where the connection broke."""
        body = {"prompt": "a red fox", "seed": seed, "num_inference_steps": steps}
        try:
            return requests.post(self.balancer.url, json=body, timeout=120).status_code
        except requests.RequestException:
            return 0

    def ask_in_pieces(self, seed: int) -> int:
        """Return the status of a request whose body comes some time after its header."""
        body = json.dumps({"prompt": "a red fox", "seed": seed}).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.balancer.port, timeout=120)
        connection.putrequest("POST", urlsplit(self.balancer.url).path)
        for name, value in (("Content-Type", "application/json"), ("Content-Length", str(len(body)))):
            connection.putheader(name, value)
        connection.endheaders()
        time.sleep(0.2)
        connection.send(body)
        with contextlib.closing(connection):
            return connection.getresponse().status


class Logged(NamedTuple):
    server: str
    accepted: float
    begun: float
    ended: float
    status: int


@contextmanager
def serve(
    folder: Path,
    model: Path,
    settings: str,
    *,
    handler: Path | None = None,
    cores: Sequence[Sequence[int]] | None = None,
) -> Iterator[Site]:
    """Run HAProxy before three instances, each on its cores, or on all."""
    instances = {}
    for name in NAMES:
        (folder / name).mkdir()
        (port,) = find_free_ports(1)
        own = yaml.safe_load(settings)
        own["handler"]["metrics_address"] = f"127.0.0.1:{port}"
        make_archive(folder / name, model, yaml.safe_dump(own, sort_keys=False), handler=handler)
        instances[name] = Instance(folder / name, metrics_port=port)

    def start(instance: Instance, its_cores: Sequence[int]) -> Instance:
        os.sched_setaffinity(0, its_cores)  # of this thread, and of what it starts
        return instance.__enter__()

    with ThreadPoolExecutor(len(NAMES)) as pool, ExitStack() as stack:
        stack.callback(lambda: list(pool.map(lambda instance: instance.__exit__(None, None, None), instances.values())))
        every = list(os.sched_getaffinity(0))
        list(pool.map(start, instances.values(), cores or [every] * len(NAMES)))
        site = Site(instances, stack.enter_context(LocalBalancer(list(instances.values()))))
        wait_until_up(site)
        yield site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Site]:
    handler = Path(waiting_handler.__file__)
    with serve(tmp_path_factory.mktemp("instances"), tiny_model, make_settings(None), handler=handler) as running:
        yield running


@pytest.fixture
def whole(site: Site) -> Site:
    """The site with all its instances: one that a test has killed is started again."""
    restart_dead(site)
    return site


def restart_dead(site: Site) -> None:
    for instance in site.instances.values():
        if not instance.find_processes():
            instance.__exit__(None, None, None)  # what is left of it
            instance.__enter__()
    wait_until_up(site)


def wait_until_up(site: Site) -> None:
    """Wait until HAProxy sends requests to all."""
    haproxy, deadline = rolling_restart.Haproxy(site.balancer.socket, "pictures"), time.monotonic() + 60
    while True:
        try:
            if {each["status"] for each in haproxy.read_servers().values()} == {"UP"}:
                return
        except rolling_restart.RestartError:
            pass
        assert time.monotonic() < deadline, site.balancer.log
        time.sleep(0.1)


def read_log(site: Site) -> list[Logged]:
    found = []
    for at, server, waited, total, status in LINE.findall(site.balancer.log):
        accepted = datetime.strptime(at, "%d/%b/%Y:%H:%M:%S.%f").timestamp()
        begun, ended = accepted + int(waited) / 1000, accepted + int(total) / 1000
        found.append(Logged(server, accepted, begun, ended, int(status)))
    return found


def test_nobody_waits_while_an_instance_is_idle(whole: Site) -> None:
    site = whole
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(site.ask, seed, steps=20) for seed in range(18)]
        wait_for(lambda: is_told(site, waiting=3, sessions=6))
        assert {each.result() for each in asked} == {200}
    logged = read_log(site)[-18:]
    assert min(Counter(each.server for each in logged).values()) > 3
    waited = [each for each in logged if each.begun - each.accepted > 0.5]
    assert len(waited) > 6
    for each in waited:
        for name in NAMES:
            spans = [
                (max(one.begun, each.accepted), min(one.ended, each.begun)) for one in logged if one.server == name
            ]
            busy = sum(max(end - start, 0) for start, end in spans)
            assert busy > (each.begun - each.accepted) - 0.3, (name, each)


def is_told(site: Site, *, waiting: int, sessions: int) -> bool:
    """Say whether the metrics that docs/scaling.md and KEDA's query read are these: those that wait, and all."""
    told = requests.get(f"http://127.0.0.1:{site.balancer.metrics_port}/metrics", timeout=30).text
    expected = (("queue", waiting), ("sessions", sessions))
    return all(f'haproxy_backend_current_{name}{{proxy="pictures"}} {value}\n' in told for name, value in expected)


@pytest.mark.soak
def test_documents_wait_for_no_picture(site: Site) -> None:
    with ThreadPoolExecutor(6) as pool:
        pictures = [pool.submit(site.ask, seed, steps=40) for seed in range(6)]
        time.sleep(0.3)
        assert requests.get(f"{site.balancer.url}/1.0/v1/models", timeout=30).status_code == 200
        assert not all(each.done() for each in pictures)
    assert {each.result() for each in pictures} == {200}


@pytest.mark.soak
def test_a_worker_that_is_killed_loses_its_picture_only(site: Site) -> None:
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(site.ask, seed, steps=20) for seed in range(60)]
        time.sleep(0.5)
        (worker,) = (each for each in site.instances["one"].find_processes() if "--sock-type" in each.cmdline())
        worker.kill()
        statuses = Counter(each.result() for each in asked)
    assert sum(statuses.values()) - statuses[200] <= 1, statuses
    wait_until_up(site)


def test_each_instance_is_drained_and_put_back(whole: Site, tmp_path: Path) -> None:
    """The command restarts none here, and shows for half a second whose turn it is."""
    site = whole
    command = f"touch {tmp_path}/{{}} && sleep 0.5 && mv {tmp_path}/{{}} {tmp_path}/{{}}-was"
    haproxy, seen = rolling_restart.Haproxy(site.balancer.socket, "pictures"), set()
    with ThreadPoolExecutor(6) as pool:
        done = pool.submit(
            rolling_restart.main, ["--socket", str(site.balancer.socket), "--restart", command, "--wait", "60"]
        )
        asked = [pool.submit(site.ask, seed) for seed in range(20)]
        while not done.done():
            turn = [name for name in NAMES if (tmp_path / name).exists()]
            states = {name: row["status"] for name, row in haproxy.read_servers().items()}
            seen |= {(name, states[name]) for name in turn if (tmp_path / name).exists()}
            time.sleep(0.1)
        assert {each.result() for each in asked} == {200}
    assert done.result() == 0
    assert seen == {(name, "DRAIN") for name in NAMES}
    assert {each["status"] for each in haproxy.read_servers().values()} == {"UP"}


@contextmanager
def restart_wanted(site: Site, folder: Path) -> Iterator[str]:
    """Yield a command that restarts an instance: it leaves a file with its name, and waits until that has gone."""
    is_over = threading.Event()

    def restart() -> None:
        while not is_over.wait(0.05):
            for path in folder.iterdir():
                instance = site.instances[path.name]
                instance._stop()
                instance.__enter__()
                path.unlink()

    watcher = threading.Thread(target=restart)
    watcher.start()
    yield f"touch {folder}/{{}}; while [ -e {folder}/{{}} ]; do sleep 0.1; done"
    is_over.set()
    watcher.join()


@pytest.mark.soak
def test_a_rolling_restart_loses_none_of_300(whole: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = whole
    before = {name: each.find_processes()[0].pid for name, each in site.instances.items()}
    with restart_wanted(site, tmp_path) as command, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(site.ask, seed, steps=20) for seed in range(300)]
        code = rolling_restart.main(["--socket", str(site.balancer.socket), "--restart", command, "--wait", "120"])
        under_load = sum(not each.done() for each in asked)
        statuses = Counter(each.result() for each in asked)
    assert (code, capsys.readouterr().out.split()[::2]) == (0, [f"{name}:" for name in NAMES])
    assert under_load > 0
    assert statuses == {200: 300}
    assert not {each.find_processes()[0].pid for each in site.instances.values()} & set(before.values())


@pytest.mark.soak
@pytest.mark.skipif(find_nginx() is None, reason="nginx and openssl are not installed")
def test_600_requests_through_nginx_lose_the_killed_image_only(whole: Site, tmp_path: Path) -> None:
    """Each instance is drained and restarted; then one is killed."""
    site = whole
    body = {"prompt": "a red fox", "num_inference_steps": 20}
    with LocalProxy(site.balancer.port) as proxy:

        def ask(seed: int) -> int:
            # nginx limits the requests of an address.
            source = (f"127.0.0.{seed % 8 + 2}", 0)
            address = ("127.0.0.1", proxy.port)
            connection = http.client.HTTPSConnection(*address, timeout=120, source_address=source, context=proxy.tls)
            headers = {**proxy.get_headers(), "Content-Type": "application/json"}
            with contextlib.closing(connection):
                while True:
                    path = urlsplit(proxy.url).path
                    try:
                        connection.request("POST", path, json.dumps({**body, "seed": seed}), headers)
                        answer = connection.getresponse()
                        answer.read()
                    except (OSError, http.client.HTTPException):
                        return 0
                    if answer.status != HTTPStatus.TOO_MANY_REQUESTS:
                        return answer.status
                    time.sleep(1)

        with restart_wanted(site, tmp_path) as command, ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(ask, seed) for seed in range(600)]
            assert not rolling_restart.main(
                ["--socket", str(site.balancer.socket), "--restart", command, "--wait", "120"]
            )
            for process in site.instances["two"].find_processes():
                process.kill()
            under_load = sum(not each.done() for each in asked)
            statuses = Counter(each.result() for each in asked)
    assert under_load > 8
    assert statuses[200] >= 599, statuses


@pytest.mark.soak
def test_instances_on_a_core_each_share_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures of the demonstration model a second, by one, two and three; where there are two cores, two share one."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    cores = sorted(os.sched_getaffinity(0))
    (tmp_path / "cache").mkdir()
    settings = make_settings(
        {"backend": "openvino", "options": {"model_caching": True, "cache_dir": str(tmp_path / "cache")}}
    )
    rates = {}
    for bound in (True, False):
        (tmp_path / str(bound)).mkdir()
        place = [[cores[index % len(cores)]] for index in range(len(NAMES))] if bound else None
        with serve(tmp_path / str(bound), ROOT / "demo/model", settings, cores=place) as site:
            haproxy = rolling_restart.Haproxy(site.balancer.socket, "pictures")
            for count in (3, 2, 1):
                for name in NAMES[count:]:
                    haproxy.set_state(name, "drain")
                with ThreadPoolExecutor(6) as pool:
                    started = time.monotonic()
                    assert set(pool.map(lambda seed: site.ask(seed, steps=20), range(60))) == {200}
                rates[bound, count] = 60 / (time.monotonic() - started)
    with capsys.disabled():
        for (bound, count), rate in rates.items():
            sys.stdout.write(f"\n{count} {'on a core each' if bound else 'on all cores'}: {rate:.2f} pictures a second")
    assert rates[True, 2] > 1.5 * rates[True, 1] or len(cores) < 2


@pytest.mark.parametrize("kills", [1, pytest.param(12, marks=pytest.mark.soak)])
def test_an_instance_that_is_killed_loses_its_picture_only(site: Site, kills: int) -> None:
    """It is started again by the test that needs it."""
    instance, lost = site.instances["two"], []
    for _ in range(kills):
        restart_dead(site)
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(site.ask, seed, steps=20) for seed in range(12)]
            time.sleep(0.5)
            for process in instance.find_processes():
                process.kill()
            statuses = Counter(each.result() for each in asked)
        lost.append(12 - statuses[200])
        assert sum(each.server == "two" for each in read_log(site)[-12:]) < 4
    assert max(lost) <= 1, lost


def test_what_comes_to_an_instance_in_the_moment_of_its_death_is_made_by_another(site: Site) -> None:
    """The kernel still accepts a connection for one that is stopped, as it does for one that is about to end."""
    others = [name for name in ("one", "two") if site.instances[name].find_processes()]
    processes = site.instances["three"].find_processes()
    processes[0].suspend()
    with ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(site.ask_in_pieces, seed) for seed in range(len(others) + 1)]
        while not any(each.done() for each in asked):
            time.sleep(0.1)
        for process in processes:
            process.kill()
        assert {each.result() for each in asked} == {200}
    assert {each.server for each in read_log(site)[-len(asked) :]} == set(others)
