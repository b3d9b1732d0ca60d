"""The files for HAProxy, containers and Kubernetes, checked without a cluster."""

import os
import re
import shutil
import socket
import socketserver
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import factorial
from pathlib import Path
from typing import Any, Self

import jsonschema
import kubernetes_validate
import psutil
import pytest
import requests
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject

from sdxl_server.metrics import REQUESTS_IN_FLIGHT, serve_metrics
from sdxl_server.serving import container
from sdxl_server.serving.rolling_restart import Haproxy
from tools.instances import NAMES, LocalBalancer, find_haproxy
from tools.server import ROOT, find_free_ports, read_shipped

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
VERSION = "1.37"


def read_resources() -> list[dict[str, Any]]:
    """Return the resources of the base."""
    names = yaml.safe_load((KUBERNETES / "base/kustomization.yaml").read_text())["resources"]
    return [each for name in names for each in yaml.safe_load_all((KUBERNETES / "base" / name).read_text())]


@pytest.mark.parametrize("resource", read_resources(), ids=lambda each: f"{each['kind']}-{each['metadata']['name']}")
def test_resources_are_as_kubernetes_takes_them(resource: dict[str, Any]) -> None:
    kubernetes_validate.validate(resource, VERSION, strict=True)


def test_a_misspelt_key_is_refused() -> None:
    resource = read_resources()[0]
    resource["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(resource, VERSION, strict=True)


def make_strict(schema: Any) -> Any:
    """Return a schema that refuses the keys that it does not name."""
    if isinstance(schema, dict):
        known = {"additionalProperties": False} if "properties" in schema else {}
        return {**known, **{key: make_strict(value) for key, value in schema.items()}}
    return [make_strict(each) for each in schema] if isinstance(schema, list) else schema


def test_keda_takes_what_scales() -> None:
    """By the schema of KEDA 2.16, the newest packaged one."""
    schema = jsonschema.Draft202012Validator(make_strict(ScaledObject.model_json_schema()))
    scaled = yaml.safe_load((KUBERNETES / "keda/scaledobject.yaml").read_text())
    schema.validate(scaled)
    scaled["spec"]["pollInterval"] = scaled["spec"].pop("pollingInterval")
    with pytest.raises(jsonschema.ValidationError, match="'pollInterval' was unexpected"):
        schema.validate(scaled)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("name", ["base", "keda"])
def test_kustomize_puts_them_together(name: str) -> None:
    done = subprocess.run(["kubectl", "kustomize", KUBERNETES / name], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    made = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(done.stdout)}
    assert ("replicas" in made["Deployment", "instances"]["spec"]) == (name == "base")
    assert (("ScaledObject", "instances") in made) == (name == "keda")


def test_probes_ask_for_readiness() -> None:
    (instances,) = (
        each for each in read_resources() if each["metadata"]["name"] == "instances" and "replicas" in each["spec"]
    )
    (container,) = instances["spec"]["template"]["spec"]["containers"]
    probes = {name: container[name] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {each["httpGet"]["path"] for each in probes.values()} == {"/ready"}
    startup = probes["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= read_shipped()["startupTimeout"]


def test_numbers_of_the_balancers_agree() -> None:
    balancer = (KUBERNETES / "base/haproxy.cfg").read_text()
    scaled = yaml.safe_load((KUBERNETES / "keda/scaledobject.yaml").read_text())
    assert set(re.findall(r"server-template sdxl (\d+)", balancer)) == {str(scaled["spec"]["maxReplicaCount"])}
    (query,) = (each["metadata"]["query"] for each in scaled["spec"]["triggers"])
    assert set(re.findall(r'proxy="(\w+)"', query)) <= set(re.findall(r"^backend (\w+)", balancer, re.M))
    limit = re.findall(r"queue\(pictures\) ge (\d+)", balancer)
    assert limit == re.findall(r"queue\(pictures\) ge (\d+)", (DEPLOY / "haproxy.cfg").read_text())


@pytest.mark.skipif(find_haproxy() is None, reason="haproxy is not installed")
@pytest.mark.parametrize("path", [DEPLOY / "haproxy.cfg", KUBERNETES / "base/haproxy.cfg"])
def test_haproxy_takes_its_configuration(path: Path) -> None:
    environment = {"NAMESPACE": "drawing"}  # balancer.yaml sets it
    command = [find_haproxy() or "", "-c", "-f", str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")


class Instance(ThreadingHTTPServer):
    """What HAProxy sees of a TorchServe: it answers each POST with `status`, or hangs up when that is 0."""

    def __init__(self, address: str = "127.0.0.1", port: int = 0, *, metrics_port: int | None = None) -> None:
        super().__init__((address, port), InstanceHandler)
        self.metrics_port = metrics_port or self.server_port
        self.ports = {"inference_address": self.server_port}
        self.status, self.is_ready, self.seconds, self.answered = 200, True, 0.0, 0
        self.count: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class InstanceHandler(BaseHTTPRequestHandler):
    server: Instance

    def do_GET(self) -> None:
        self.send_response(200 if self.server.is_ready else 503)
        self.end_headers()
        if self.path == "/metrics":
            self.wfile.write(b"sdxl_requests_in_flight 0.0\n")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.count():
            time.sleep(self.server.seconds)
        self.server.answered += 1
        if self.server.status:
            self.send_response(self.server.status)
            self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


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


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


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


class Dns(socketserver.ThreadingUDPServer):
    """A cluster's DNS: it knows complete names only, and answers with the addresses of all pods."""

    def __init__(self, name: str) -> None:
        super().__init__(("127.0.0.1", 0), DnsHandler)
        self.name, self.addresses = name, ["127.0.0.2"]

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


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
        addresses = self.server.addresses if is_known and kind == b"\0\1" else []
        flags = 0x8580 if is_known else 0x8583  # authoritative; no such name
        records = b"".join(
            b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 5, 4) + socket.inet_aton(address) for address in addresses
        )
        head = query[:2] + struct.pack("!5H", flags, 1, len(addresses), 0, 0)
        reply.sendto(head + question + records, self.client_address)


@contextmanager
def balance_pods(folder: Path, dns: Dns, port: int) -> Iterator[str]:
    """Run HAProxy with the cluster's configuration; yield its address. Only ports and the DNS server differ."""
    own, metrics_port = find_free_ports(2)
    text = (KUBERNETES / "base/haproxy.cfg").read_text()
    for shipped, changed in {
        "parse-resolv-conf": f"nameserver dns 127.0.0.1:{dns.server_address[1]}",
        "check port 9108": f"check port {port}",
        ":8080": f":{port}",
        "bind :8079": f"bind 127.0.0.1:{own}",
        "bind :8405": f"bind 127.0.0.1:{metrics_port}",
    }.items():
        assert shipped in text
        text = text.replace(shipped, changed)
    (folder / "haproxy.cfg").write_text(text)
    balancer = yaml.safe_load((KUBERNETES / "base/balancer.yaml").read_text().partition("---")[0])
    (container,) = balancer["spec"]["template"]["spec"]["containers"]
    fields = {"metadata.namespace": "drawing"}  # what the cluster would fill in
    environment = {
        each["name"]: fields[each["valueFrom"]["fieldRef"]["fieldPath"]] for each in container.get("env", [])
    }
    command = [find_haproxy() or "haproxy", "-db", "-f", str(folder / "haproxy.cfg")]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process,
    ):
        try:
            yield f"http://127.0.0.1:{own}/predictions/diffusion_fast"
        finally:
            process.kill()


@pytest.mark.skipif(find_haproxy() is None, reason="haproxy is not installed")
def test_haproxy_finds_the_pods_of_its_namespace(tmp_path: Path) -> None:
    """The first one, one that comes, and none that has gone."""
    (port,) = find_free_ports(1)

    def ask(method: str = "POST") -> int:
        try:
            return requests.request(method, url, data="a red fox", timeout=30).status_code
        except requests.ConnectionError:  # HAProxy is starting
            return 0

    def reaches(pod: Instance) -> bool:
        before = pod.answered
        return [ask() for _ in range(4)] == [200] * 4 and pod.answered > before

    with (
        Dns("instances.drawing.svc.cluster.local") as dns,
        Instance("127.0.0.2", port) as first,
        Instance("127.0.0.3", port) as second,
        balance_pods(tmp_path, dns, port) as url,
    ):
        wait_until(lambda: reaches(first))
        assert ask("GET") == 200  # the documents' backend finds it too
        dns.addresses = ["127.0.0.2", "127.0.0.3"]
        wait_until(lambda: reaches(second))
        dns.addresses = ["127.0.0.3"]
        wait_until(lambda: not reaches(first))
        assert reaches(second)


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
