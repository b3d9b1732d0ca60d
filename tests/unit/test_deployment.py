"""The files for HAProxy, containers and Kubernetes, checked without a cluster."""

import os
import re
import signal
import socket
import socketserver
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from math import factorial
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml

from sdxl_server.metrics import REQUESTS_IN_FLIGHT, serve_metrics
from sdxl_server.serving import container
from sdxl_server.serving.rolling_restart import Haproxy
from tests.serving import InThread
from tests.unit.instances import UNKNOWN_USER, Instance, has_ipv6, wait_until
from tools.instances import NAMES, LocalBalancer, find_haproxy
from tools.server import ROOT, find_free_ports

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"


@pytest.mark.skipif(find_haproxy() is None, reason="haproxy is not installed")
@pytest.mark.parametrize("path", [DEPLOY / "haproxy.cfg", KUBERNETES / "base/haproxy.cfg"])
def test_haproxy_takes_its_configuration(path: Path) -> None:
    environment = {"NAMESPACE": "drawing", "POD_IP": "127.0.0.1"}  # balancer.yaml sets them
    command = [find_haproxy() or "", "-c", "-f", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def site() -> Iterator[tuple[dict[str, Instance], LocalBalancer]]:
    """Three instances behind the shipped HAProxy."""
    if find_haproxy() is None:
        pytest.skip("haproxy is not installed")
    with Instance() as one, Instance() as two, Instance() as three:
        instances = dict(zip(NAMES, (one, two, three), strict=True))
        with LocalBalancer(list(instances.values())) as balancer:
            wait_until(lambda: balancer.socket.exists())
            yield instances, balancer


def read_states(balancer: LocalBalancer) -> dict[str, str]:
    return {name: row["status"] for name, row in Haproxy(balancer.socket, "pictures").read_servers().items()}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up its rights")
def test_haproxy_gives_up_its_rights(site: tuple[dict[str, Instance], LocalBalancer]) -> None:
    """It logs and takes commands as before."""
    _, balancer = site
    requests.post(balancer.url, data="a red fox", timeout=30)
    process = psutil.Process(balancer.process.pid)
    assert (process.username(), os.readlink(f"/proc/{process.pid}/root")) == ("haproxy", "/var/lib/haproxy")
    wait_until(lambda: "entrance pictures/" in balancer.log)
    assert set(read_states(balancer)) == set(NAMES)


@pytest.mark.parametrize("status", [500, 504, 507])
def test_request_that_fails_removes_no_instance(site: tuple[dict[str, Instance], LocalBalancer], status: int) -> None:
    instances, balancer = site
    for each in instances.values():
        each.status = status
    for _ in NAMES:
        assert requests.post(balancer.url, data="a red fox", timeout=30).status_code == status
        assert set(read_states(balancer).values()) == {"UP"}
    assert sum(each.answered for each in instances.values()) == len(NAMES)  # none was asked twice


def test_instance_without_a_connection_is_removed(site: tuple[dict[str, Instance], LocalBalancer]) -> None:
    """At the first request, without waiting for the next check."""
    instances, balancer = site
    for name in ("one", "two"):
        instances[name].shutdown()
        instances[name].server_close()
        assert requests.post(balancer.url, data="a red fox", timeout=30).status_code == 200
    wait_until(lambda: list(read_states(balancer).values()) == ["DOWN", "DOWN", "UP"])


@pytest.mark.parametrize("path", ["/predictions/diffusion_fast", "/v1/images/generations"])
@pytest.mark.parametrize("status", [502, 503])
def test_haproxys_own_errors_are_json(site: tuple[dict[str, Instance], LocalBalancer], status: int, path: str) -> None:
    instances, balancer = site
    for each in instances.values():
        each.status, each.is_ready = 0, status == 502
    if status == 503:
        wait_until(lambda: set(read_states(balancer).values()) == {"DOWN"})
    answer = requests.post(f"http://127.0.0.1:{balancer.port}{path}", data="a red fox", timeout=30)
    error = answer.json()["error"]
    assert (answer.status_code, answer.headers["Content-Type"]) == (status, "application/json")
    assert (error["type"], error["code"]) == (
        {502: "server_error", 503: "server_busy"}[status],
        None if path.startswith("/v1") else status,
    )
    assert answer.headers["Retry-After"] == "10"


@pytest.mark.parametrize(
    ("path", "backend"),
    [
        *((f"sdapi/v1/{name}", "documents") for name in ("interrupt", "skip", "options", "png-info")),
        ("metadata", "documents"),
        *((f"sdapi/v1/{name}", "pictures") for name in ("txt2img", "img2img")),
        ("v1/images/edits", "pictures"),
    ],
)
def test_what_draws_nothing_does_not_wait_for_images(
    site: tuple[dict[str, Instance], LocalBalancer], path: str, backend: str
) -> None:
    """A POST, too: behind the images a command would come too late."""
    _, balancer = site
    requests.post(f"http://127.0.0.1:{balancer.port}/predictions/diffusion_fast/1.0/{path}", json={}, timeout=30)
    wait_until(lambda: re.search(rf" {backend}/\w+ .*/1\.0/{path} ", balancer.log))


@pytest.mark.skipif(find_haproxy() is None, reason="haproxy is not installed")
def test_drain_under_load_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that never pause. HAProxy sees the drain by the worker's /ready, within half a second."""
    monkeypatch.chdir(tmp_path)
    statuses, is_over, is_ready = [], threading.Event(), threading.Event()
    is_ready.set()
    drain_file = str(container.DRAIN_FILE.resolve())
    metrics_port = serve_metrics("127.0.0.1:0", is_ready, drain_file=drain_file)

    def keep_asking() -> None:
        while not is_over.is_set():
            statuses.append(requests.post(balancer.url, data="a red fox", timeout=30).status_code)

    with (
        Instance(metrics_port=metrics_port) as one,
        Instance() as two,
        Instance() as three,
        LocalBalancer([one, two, three]) as balancer,
        ThreadPoolExecutor(5) as pool,
        subprocess.Popen(["sleep", "60"]) as server,
        ExitStack() as stack,
    ):
        stack.callback(server.kill)
        stack.callback(is_over.set)
        for each in (one, two, three):
            each.seconds = 0.3
        one.count = REQUESTS_IN_FLIGHT.track_inprogress
        wait_until(lambda: balancer.socket.exists())
        asked = [pool.submit(keep_asking) for _ in range(4)]
        wait_until(lambda: one.answered > 2)
        started = time.monotonic()
        drained = pool.submit(container.drain, server, "127.0.0.1", one.metrics_port, seconds=25)
        haproxy = Haproxy(balancer.socket, "pictures")

        def is_left_alone() -> bool:
            row = haproxy.read_servers()["one"]
            return (row["status"], row["scur"]) == ("DOWN", "0")

        wait_until(is_left_alone)
        before, seen = one.answered, len(statuses)
        drained.result()
        seconds = time.monotonic() - started
        assert one.answered == before
        wait_until(lambda: len(statuses) > seen + 10)
    assert [each.result() for each in asked] == [None] * 4
    assert set(statuses) == {200}
    assert seconds < 20  # an image, and the seconds without one


def test_server_that_cannot_be_asked_is_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It drains until its limit, or until TorchServe has ended. A worker at another address is asked there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(container, "IDLE_SECONDS", 0)
    (port,) = find_free_ports(1)
    for command, is_cut in (("sleep 60", True), ("sleep 1", False)):
        with subprocess.Popen(command.split()) as server:
            started = time.monotonic()
            container.drain(server, "127.0.0.1", port, seconds=3)
            assert ("still in flight" in caplog.text) == is_cut
            assert (time.monotonic() - started > 2.5) == is_cut
            server.kill()
        caplog.clear()
    with Instance("127.0.0.2") as elsewhere, subprocess.Popen(["sleep", "60"]) as server:
        container.drain(server, "127.0.0.2", elsewhere.metrics_port, seconds=20)
        server.kill()
    assert "still in flight" not in caplog.text


class Dns(InThread, socketserver.ThreadingUDPServer):
    """A cluster's DNS: it knows complete names only, and answers with the addresses of all pods."""

    def __init__(self, name: str) -> None:
        super().__init__(("127.0.0.1", 0), DnsHandler)
        self.name, self.addresses = name, ["127.0.0.2"]


class DnsHandler(socketserver.BaseRequestHandler):
    server: Dns

    def handle(self) -> None:
        query, reply = self.request
        labels, end = [], 12
        while length := query[end]:
            labels.append(query[end + 1 : end + 1 + length].decode())
            end += 1 + length
        question, kind = query[12 : end + 5], query[end + 1 : end + 3]
        is_known = ".".join(labels) == self.server.name
        family, number = (socket.AF_INET6, 28) if kind == b"\0\x1c" else (socket.AF_INET, 1)
        asked = [each for each in self.server.addresses if (":" in each) == (number == 28)]
        addresses = [socket.inet_pton(family, each) for each in asked] if is_known else []
        flags = 0x8580 if is_known else 0x8583  # authoritative; no such name
        records = b"".join(
            b"\xc0\x0c" + struct.pack("!HHIH", number, 1, 5, len(address)) + address for address in addresses
        )
        head = query[:2] + struct.pack("!5H", flags, 1, len(addresses), 0, 0)
        reply.sendto(head + question + records, self.client_address)


@contextmanager
def balance_pods(dns: Dns, port: int, *, address: str = "127.0.0.1") -> Iterator[tuple[str, psutil.Process]]:
    """Run HAProxy with the cluster's configuration. Only ports and the DNS server differ.

    Where this is root, it runs as a user without a name.

    Args:
        port: of the pods.
        address: of HAProxy's own pod.

    Yields:
        The address of the predictions there, and the process that gets signals.
    """
    own, metrics_port = find_free_ports(2)
    text = (KUBERNETES / "base/haproxy.cfg").read_text()
    for shipped, changed in {
        "parse-resolv-conf": f"nameserver dns 127.0.0.1:{dns.server_address[1]}",
        "check port 9108": f"check port {port}",
        ":8080": f":{port}",
        ":8079": f":{own}",
        ":8405": f":{metrics_port}",
    }.items():
        assert shipped in text
        text = text.replace(shipped, changed)
    balancer = yaml.safe_load((KUBERNETES / "base/balancer.yaml").read_text().partition("---")[0])
    (container,) = balancer["spec"]["template"]["spec"]["containers"]
    fields = {"metadata.namespace": "drawing", "status.podIP": address}  # what the cluster would fill in
    environment = {
        each["name"]: fields[each["valueFrom"]["fieldRef"]["fieldPath"]] for each in container.get("env", [])
    }
    host = f"[{address}]" if ":" in address else address
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = Path(folder, "haproxy.cfg")
        path.write_text(text)
        command = [find_haproxy() or "haproxy", "-W", "-db", "-f", str(path)]  # -W: as its image runs it
        user = UNKNOWN_USER if os.geteuid() == 0 else None
        process = psutil.Popen(command, env=environment, user=user, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        try:
            yield f"http://{host}:{own}/predictions/diffusion_fast", process
        finally:
            if process.is_running():
                process.terminate()
                process.wait(timeout=30)


@pytest.mark.skipif(find_haproxy() is None, reason="haproxy is not installed")
def test_haproxy_finds_the_pods_of_its_namespace() -> None:
    """The first one, one that comes, and none that has gone."""
    (port,) = find_free_ports(1)

    def reaches(pod: Instance) -> bool:
        before = pod.answered
        return [ask(url) for _ in range(4)] == [200] * 4 and pod.answered > before

    with (
        Dns("instances.drawing.svc.cluster.local") as dns,
        Instance("127.0.0.2", port) as first,
        Instance("127.0.0.3", port) as second,
        balance_pods(dns, port) as (url, _),
    ):
        wait_until(lambda: reaches(first))
        assert ask(url, "GET") == 200  # the documents' backend finds it too
        dns.addresses = ["127.0.0.2", "127.0.0.3"]
        wait_until(lambda: reaches(second))
        dns.addresses = ["127.0.0.3"]
        wait_until(lambda: not reaches(first))
        assert reaches(second)


def ask(url: str, method: str = "POST") -> int:
    try:
        return requests.request(method, url, data="a red fox", timeout=60).status_code
    except requests.ConnectionError:  # HAProxy starts, or has stopped
        return 0


@pytest.mark.skipif(find_haproxy() is None, reason="haproxy is not installed")
@pytest.mark.parametrize(
    ("address", "pod"),
    [
        ("127.0.0.1", "127.0.0.2"),
        pytest.param(
            *("::1", "::1"), marks=pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6"), id="ipv6"
        ),
    ],
)
def test_haproxy_serves_clusters_of_either_family(address: str, pod: str) -> None:
    """At the pod's own address, and at 127.0.0.1 for `kubectl port-forward`."""
    (port,) = find_free_ports(1)
    with (
        Dns("instances.drawing.svc.cluster.local") as dns,
        Instance(pod, port) as instance,
        balance_pods(dns, port, address=address) as (url, process),
    ):
        dns.addresses = [pod]
        wait_until(lambda: ask(url) == 200)
        assert ask(url, "GET") == ask(url.replace("[::1]", "127.0.0.1")) == 200
        assert instance.answered == 2
        (worker,) = process.children()
        assert worker.num_threads() == 1  # not one for each core of the node


@pytest.mark.skipif(find_haproxy() is None, reason="haproxy is not installed")
def test_balancer_that_stops_finishes_its_queue() -> None:
    """SIGUSR1 is the stop signal of its image."""
    (port,) = find_free_ports(1)
    with (
        Dns("instances.drawing.svc.cluster.local") as dns,
        Instance("127.0.0.2", port) as pod,
        ThreadPoolExecutor(6) as pool,
        balance_pods(dns, port) as (url, process),
    ):
        wait_until(lambda: ask(url) == 200)
        pod.seconds, before = 0.5, pod.answered
        asked = [pool.submit(ask, url) for _ in range(6)]
        wait_until(lambda: pod.answered > before)
        process.send_signal(signal.SIGUSR1)
        wait_until(lambda: ask(url, "GET") == 0)  # it takes no more
        assert not all(each.done() for each in asked)
        assert [each.result() for each in asked] == [200] * 6
        assert process.wait(timeout=30) == 0


def test_erlang_c_in_the_docs_is_right() -> None:
    """One worker waits for its load, two at a load of 1 for a third; Erlang's sum gives the others."""
    scaling = (ROOT / "docs/scaling.md").read_text()
    (code,) = re.findall(r"```python\n(.+?)```", scaling, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)  # the formula as a reader runs it
    share = names["compute_waiting_share"]
    assert [share(1, 0.5), share(2, 1)] == pytest.approx([0.5, 1 / 3])
    for line in re.findall(r"^\| (\d+) \| ([\d. |]+) \|$", scaling, re.M):
        workers, cells = int(line[0]), list(map(float, line[1].split(" | ")))
        for busy, shown in zip((0.5, 0.7, 0.8, 0.9, 0.95), cells, strict=True):
            load = workers * busy
            queued = load**workers / factorial(workers) / (1 - busy)
            waiting = queued / (sum(load**n / factorial(n) for n in range(workers)) + queued)
            assert share(workers, load) == pytest.approx(waiting)
            assert shown == pytest.approx(waiting / (workers - load), abs=0.006)
