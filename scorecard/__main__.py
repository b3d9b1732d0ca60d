"""Put a server under load, faults and hostile input, and print a scorecard; exit with 1 when a line falls short.

It serves the demonstration model with the shipped settings, but for those that a line names. Each line starts a server
of its own. `--quick` makes the same in minutes, with lower counts.
"""

import argparse
import asyncio
import contextlib
import http.client
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import psutil
import requests
import yaml

from demo.measure import GUIDANCE
from scorecard.clients import (
    PATIENCE,
    SIZES,
    Outcome,
    Watch,
    ask,
    ask_at_once,
    count,
    judge_growth,
    keep_asking,
    read_body,
)
from scorecard.fuzz import PAIRS, Hostile, make_attacks, make_bytes, make_jpeg, make_request, make_upload
from tools.proxy import LocalProxy, find_nginx
from tools.server import ROOT, LocalServer, ServerError, make_archive, make_environment

STEPS = 5
MOST_SECONDS, MOST_CHARACTERS = 5, 10_000  # of a refusal of an attack
# TorchServe decodes forms before the handler sees them, and calls one that it cannot read its own error.
FORM_ERROR = "500 of TorchServe's to forms that cannot be read"
FORM_EXCEPTIONS = ("ErrorDataDecoderException", "StringIndexOutOfBoundsException")


@dataclass(frozen=True)
class Scale:
    """How much each line asks for; times in seconds."""

    soak_time: float = 30 * 60
    soak_requests: int = 3000
    kill_time: float = 15 * 60
    kill_interval: float = 20
    loads: int = 8  # before the kills, with nobody asking
    requests_after: int = 100
    crowd: int = 200
    fuzzed: int = 10_000
    leavers: int = 50
    bodies: int = 90
    cycles: int = 20


QUICK = Scale(
    soak_time=30,
    soak_requests=50,
    kill_time=40,
    loads=2,
    requests_after=20,
    crowd=200,
    fuzzed=600,
    leavers=10,
    bodies=60,
    cycles=2,
)


@dataclass(frozen=True)
class Line:
    """One line of the scorecard."""

    name: str
    passed: bool
    told: str


@dataclass(frozen=True)
class Site:
    """What is served; the tests plant their faults here.

    Attributes:
        keys: TorchServe's keys of model-config.yaml that differ from the shipped ones.
        settings: those of its handler section.
        properties: those of config.properties.
        cache: the folder of the compiled models.
    """

    cache: Path
    model: Path = ROOT / "demo/model"
    handler: Path = ROOT / "stable_diffusion_handler.py"
    keys: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    properties: Mapping[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def serve(self, **keys: Any) -> Iterator[LocalServer]:
        """Run a server until the block ends."""
        shipped = yaml.safe_load((ROOT / "model-config.yaml").read_text())
        shipped["handler"] |= {"guidance_scale": GUIDANCE, "num_inference_steps": STEPS, **self.settings}
        pt2 = {"backend": "openvino", "options": {"model_caching": True, "cache_dir": str(self.cache)}}
        with tempfile.TemporaryDirectory(prefix="soak-") as name:
            folder = Path(name)
            settings = yaml.safe_dump({**shipped, "pt2": pt2, **keys, **self.keys}, sort_keys=False)
            make_archive(folder, self.model, settings, handler=self.handler)
            with LocalServer(folder, properties=self.properties) as server:
                yield server


def check_soak(site: Site, scale: Scale) -> list[Line]:
    """Pictures for a long time, from as many clients as query.py has at a time."""
    with site.serve() as server:
        for width, height in SIZES:  # compile what will be asked for
            ask(server, width=width, height=height)
        start = time.monotonic()

        def is_enough(done: int) -> bool:
            passed = time.monotonic() - start
            return passed > scale.soak_time and (done >= scale.soak_requests or passed > 2 * scale.soak_time)

        with Watch(server) as watch:
            outcomes, seconds = keep_asking(server, is_enough, clients=4)
    times = sorted(outcome.seconds for outcome in outcomes)
    p50, p99 = (times[min(int(len(times) * share), len(times) - 1)] for share in (0.5, 0.99))
    passed = len(outcomes) >= scale.soak_requests and {outcome.kind for outcome in outcomes} == {"picture"}
    told = f"{len(outcomes)} requests in {seconds:.0f} s: {count(outcomes)}; "
    told += f"p50 {p50:.2f} s, p99 {p99:.2f} s, p99/p50 {p99 / p50:.1f}"
    is_flat, growth = judge_growth(watch.samples)
    return [Line("soak", passed, told), Line("memory", is_flat, growth)]


def find_workers(server: LocalServer) -> list[psutil.Process]:
    """Return the processes that hold the model, ready or not."""
    found = []
    for process in server.find_processes():
        with contextlib.suppress(psutil.Error):
            if "--sock-type" in process.cmdline():
                found.append(process)
    return found


def wait_for_another(server: LocalServer, old: Sequence[psutil.Process], *, seconds: float) -> float:
    """Return the seconds until the model is ready in other workers than the old ones.

    Raises:
        ServerError: it is not in that time.
    """
    start = time.monotonic()
    while not ({each.pid for each in find_workers(server)} - {each.pid for each in old} and server.is_ready()):
        if time.monotonic() - start > seconds:
            raise ServerError(f"no worker is ready within {seconds:.0f} s")
        time.sleep(0.1)
    return time.monotonic() - start


def measure_recovery(server: LocalServer) -> float:
    """Kill the worker; return the seconds until another is ready."""
    workers = find_workers(server)
    workers[0].kill()
    return wait_for_another(server, workers, seconds=600)


def kill_workers(server: LocalServer, *, seconds: float, interval: float) -> tuple[int, list[float]]:
    """Kill what holds the model at each interval; return how often, and each time until it was ready again."""
    start, kills, recoveries = time.monotonic(), 0, []
    while time.monotonic() - start < seconds:
        began = time.monotonic()
        workers = find_workers(server)
        for each in workers:
            each.kill()
        kills += len(workers)
        with contextlib.suppress(ServerError):
            recoveries.append(wait_for_another(server, workers, seconds=interval))
        time.sleep(max(0.0, began + interval - time.monotonic()))
    return kills, recoveries


def check_kills(site: Site, scale: Scale) -> list[Line]:
    """A worker that is killed again and again, whatever it does.

    It loses the requests that it holds: their answers have begun, or TorchServe would not tell it who has left. What
    waits in TorchServe's own queue is not lost, so two more ask than it holds.
    """
    held = yaml.safe_load((ROOT / "model-config.yaml").read_text())["batchSize"]
    with site.serve() as server:
        loads = [measure_recovery(server) for _ in range(scale.loads)]  # nobody asks meanwhile
        with ThreadPoolExecutor(1) as pool:
            killer = pool.submit(kill_workers, server, seconds=scale.kill_time, interval=scale.kill_interval)
            outcomes, _ = keep_asking(server, lambda _: killer.done(), clients=held + 2)
        kills, recoveries = killer.result()
        wait_for_another(server, [], seconds=600)
        after = [ask(server) for _ in range(scale.requests_after)]
    lost = [outcome for outcome in outcomes if outcome.kind != "picture"]
    slowest = max(recoveries, default=float("inf"))
    passed = (
        {outcome.kind for outcome in lost} <= {"failed", "cut"}
        and len(lost) <= held * kills
        and len(recoveries) >= kills
        and slowest <= max(loads) + 3  # of each the slowest, for the same load takes a third longer at times
        and {outcome.kind for outcome in after} == {"picture"}
    )
    told = (
        f"{kills} kills; {count(outcomes)}; ready after {statistics.median(recoveries or [slowest]):.1f} s, at most "
        f"{slowest:.1f} s; without load {statistics.median(loads):.1f} s, at most {max(loads):.1f} s; "
        f"then {count(after)}"
    )
    return [Line("kills", passed, told)]


def check_stopped_worker(site: Site, _scale: Scale) -> list[Line]:
    """A worker that hangs: TorchServe gives it up after responseTimeout."""
    limit = 5
    with site.serve(responseTimeout=limit) as server:
        workers = find_workers(server)
        workers[0].suspend()
        outcome = ask(server)
        recovery = wait_for_another(server, workers, seconds=120)
        after = ask(server)
    passed = outcome.kind == "failed" and outcome.seconds < limit + 3 and after.kind == "picture"
    told = f"responseTimeout {limit} s: {outcome.kind} after {outcome.seconds:.1f} s ({outcome.told}); "
    return [Line("stopped worker", passed, told + f"ready {recovery:.1f} s later, then {after.kind}")]


def check_crowd(site: Site, scale: Scale) -> list[Line]:
    """More clients at once than the queue has room for."""
    with site.serve() as server:
        answers = asyncio.run(ask_at_once(server, scale.crowd))
        after = ask(server)
    accepted = [seconds for status, seconds in answers if status == 200]
    refused = [seconds for status, seconds in answers if status == 503]
    shipped = yaml.safe_load((ROOT / "model-config.yaml").read_text())
    room = shipped["batchSize"] + shipped["jobQueueSize"] + 1  # the worker, the queue, and one that took a place
    passed = (
        len(accepted) + len(refused) == scale.crowd
        and 0 < len(accepted) <= room
        and max(refused, default=float("inf")) < 1
        and after.kind == "picture"
    )
    told = f"{scale.crowd} clients: {len(accepted)} accepted, {len(refused)} refused"
    told += f" within {max(refused):.2f} s" if refused else ""
    return [Line("crowd", passed, f"{told}; then {after.kind}")]


def send(server: LocalServer, hostile: Hostile, *, proxy: LocalProxy | None = None) -> tuple[requests.Response, str]:
    """Send a request as it is; return the answer and its body.

    Raises:
        requests.RequestException: there is none, or not all of it in time.
    """
    address = (proxy.url if proxy else server.url).rpartition("/predictions")[0]
    with requests.Session() as session:
        session.trust_env = False
        prepared = session.prepare_request(requests.Request(hostile.method, address, data=hostile.body))
        prepared.url = address + hostile.path  # as it is: requests would tidy it
        prepared.headers.update({**hostile.headers, **(proxy or server).get_headers()})
        verify = str(proxy.certificate) if proxy else True
        start = time.monotonic()
        answer = session.send(prepared, timeout=PATIENCE, allow_redirects=False, stream=True, verify=verify)
        return answer, read_body(answer, start + PATIENCE).decode(errors="replace")


def send_hostile(server: LocalServer, random: Random) -> str:
    """Send one hostile request; return the first digit of the status, or `closed`."""
    if random.random() < 0.05:
        token = server.get_headers()["Authorization"].removeprefix("Bearer ")
        try:
            with socket.create_connection(("127.0.0.1", server.ports["inference_address"]), timeout=3) as connection:
                connection.sendall(make_bytes(random, token))
                connection.shutdown(socket.SHUT_WR)
                return connection.recv(20).decode("latin-1").partition(" ")[2][:1] or "closed"
        except OSError:
            return "closed"
    hostile = make_request(random)
    try:
        answer, text = send(server, hostile)
    except requests.Timeout:
        return f"hung: {hostile.method} {hostile.path[:60]} {hostile.headers} {hostile.body[:200]!r}"
    except requests.ConnectionError:
        return "closed"
    if answer.status_code < 500:
        return str(answer.status_code)[0]
    if hostile.is_form and (hostile.method == "HEAD" or any(name in text for name in FORM_EXCEPTIONS)):
        return FORM_ERROR  # the answer to HEAD has no body that would tell
    shown = f"{hostile.method} {hostile.path[:60]} {hostile.headers} {hostile.body[:300]!r}"
    return f"{answer.status_code} {text[:200]!r} to {shown}"


def check_fuzz(site: Site, scale: Scale) -> list[Line]:
    """Hostile requests, and hundreds of connections that send nothing."""
    small = replace(site, settings={"num_inference_steps": 1, "max_steps": 3, "max_side": 128, **site.settings})
    with small.serve() as server:
        before = [process.pid for process in find_workers(server)]
        silent = [socket.create_connection(("127.0.0.1", server.ports["inference_address"])) for _ in range(500)]
        with ThreadPoolExecutor(4) as pool:
            kinds = Counter(pool.map(lambda seed: send_hostile(server, Random(seed)), range(scale.fuzzed)))
        after = ask(server)
        for connection in silent:
            connection.close()
        survived = before == [process.pid for process in find_workers(server)]
        forged = "forged.Count" in (server.folder / "logs/model_metrics.log").read_text()
    bad = [kind for kind in kinds if kind not in ("2", "4", "closed", FORM_ERROR)]
    passed = not bad and kinds["closed"] <= 0.06 * scale.fuzzed and survived and not forged and after.kind == "picture"
    told = f"{scale.fuzzed} requests: {kinds['2']} 2xx, {kinds['4']} 4xx, {kinds['closed']} closed without an answer"
    told += f", {kinds[FORM_ERROR]} {FORM_ERROR}"
    told += f", {len(bad)} others, such as {bad[0]}" if bad else ""
    return [Line("fuzz", passed, f"{told}; worker {'the same' if survived else 'another'}; then {after.kind}")]


@dataclass(frozen=True)
class Blow:
    """What one attack did.

    Attributes:
        told: the status of the answer, or why there is none.
        size: of the answer, in characters.
        seconds: until the answer.
        peak, growth: of the worker's and of Java's resident memory in MB, meanwhile and afterwards.
        survived: the worker is the same.
    """

    name: str
    told: str
    size: int
    seconds: float
    peak: tuple[float, float]
    growth: tuple[float, float]
    survived: bool

    @property
    def is_bad(self) -> bool:
        is_refused = self.told[0] in "24" or self.told == FORM_ERROR
        return not (
            self.survived
            and is_refused
            and (self.told[0] == "2" or self.size < MOST_CHARACTERS)
            and self.seconds < MOST_SECONDS
        )

    def __str__(self) -> str:
        memory = ", ".join(
            f"{name} {peak:+.0f} MB, then {growth:+.0f}"
            for name, peak, growth in zip(("worker", "Java"), self.peak, self.growth, strict=True)
        )
        worker = "" if self.survived else "; another worker"
        return f"{self.name}: {self.told} of {self.size} characters after {self.seconds:.1f} s; {memory}{worker}"


class MemoryWatch(threading.Thread):
    """Keep the highest resident memory of some processes, in MB."""

    def __init__(self, processes: Sequence[psutil.Process]) -> None:
        super().__init__(daemon=True)
        self.processes, self.ended = processes, threading.Event()
        self.peaks = self.first = self.measure()

    def measure(self) -> tuple[float, ...]:
        return tuple(each.memory_info().rss / 1e6 if each.is_running() else 0.0 for each in self.processes)

    def run(self) -> None:
        while not self.ended.wait(0.02):
            with contextlib.suppress(psutil.Error):
                self.peaks = tuple(map(max, self.peaks, self.measure()))


def strike(server: LocalServer, name: str, hostile: Hostile, *, proxy: LocalProxy | None = None) -> Blow:
    """Send an attack, and wait until the server answers again; return what it did."""
    workers, java = find_workers(server), server.find_processes()[:1]
    watch = MemoryWatch([*workers, *java])
    watch.start()
    start = time.monotonic()
    try:
        answer, text = send(server, hostile, proxy=proxy)
        is_form_error = answer.status_code == 500 and any(each in text for each in FORM_EXCEPTIONS)
        told, size = FORM_ERROR if is_form_error else str(answer.status_code), len(text)
    except requests.RequestException as error:
        told, size = f"{type(error).__name__}", 0
    seconds = time.monotonic() - start
    while ask(server, num_inference_steps=1).kind != "picture" and time.monotonic() - start < 2 * PATIENCE:
        time.sleep(0.2)
    watch.ended.set()
    survived = [each.pid for each in workers] == [each.pid for each in find_workers(server)]
    peak, growth = (
        tuple(now - first for now, first in zip(each, watch.first, strict=True))
        for each in (watch.peaks, watch.measure())
    )
    return Blow(name, told, size, seconds, (peak[0], peak[-1]), (growth[0], growth[-1]), survived)


def check_attacks(site: Site, _scale: Scale) -> list[Line]:
    """Requests that cost far more than their bytes, if they may; then the same through nginx."""
    lines = []
    with site.serve() as server, contextlib.ExitStack() as stack:
        ways: dict[str, LocalProxy | None] = {"attacks": None}
        if find_nginx() is not None:
            ways["attacks through nginx"] = stack.enter_context(
                LocalProxy(server.ports["inference_address"], key_file=server.key_file)
            )
        for way, proxy in ways.items():
            send(server, make_upload("image", make_jpeg()))  # compiles the VAE's encoder
            blows = []
            for name, make in make_attacks().items():
                if name == PAIRS and proxy is None:
                    continue
                blows.append(strike(server, name, make(), proxy=proxy))
                print(f"      {blows[-1]}", flush=True)
            bad = [str(blow) for blow in blows if blow.is_bad]
            slowest = max(blows, key=lambda blow: blow.seconds)
            most = max(blow.peak[0] for blow in blows)
            told = f"{len(blows)} kinds: all answered by the same worker within {slowest.seconds:.1f} s, which took "
            told += f"{most:.0f} MB more"
            lines.append(Line(way, not bad, "; ".join(bad) or told))
    return lines


def check_leavers(site: Site, scale: Scale) -> list[Line]:
    """Clients that leave in mid-picture."""
    steps = 150
    with site.serve() as server:

        def leave(seed: int) -> None:
            fields = {"prompt": "a red circle", "num_inference_steps": steps, "seed": seed}
            with requests.post(
                server.url, json=fields, headers=server.get_headers(), stream=True, timeout=PATIENCE
            ) as answer:
                answer.raise_for_status()  # the headers come after the first step

        alone = ask(server, num_inference_steps=steps)
        start = time.monotonic()
        with ThreadPoolExecutor(5) as pool:
            list(pool.map(leave, range(scale.leavers)))
        after = ask(server)
        seconds = time.monotonic() - start
        ended = server.log.count("its work has ended after step")
    passed = ended >= scale.leavers and after.kind == "picture" and seconds < scale.leavers * alone.seconds / 4
    told = (
        f"{scale.leavers} clients left pictures of {alone.seconds:.1f} s: {ended} ended early, {seconds:.1f} s in all"
    )
    return [Line("leavers", passed, f"{told}; then {after.kind}")]


def check_queue(site: Site, scale: Scale) -> list[Line]:
    """Requests that are given up while a picture is under way, and one of another address."""
    fields = {"prompt": "a red circle", "num_inference_steps": 150}
    with site.serve() as server:
        place = ("127.0.0.1", server.ports["inference_address"])
        headers = {**server.get_headers(), "Content-Type": "application/json"}

        def send(address: str, body: Mapping[str, Any]) -> http.client.HTTPConnection:
            connection = http.client.HTTPConnection(*place, timeout=PATIENCE, source_address=(address, 0))
            connection.request("POST", f"/predictions/{server.model}", json.dumps(body), headers)
            return connection

        with ThreadPoolExecutor(1) as pool:
            under_way = pool.submit(ask, server, num_inference_steps=150, num_images_per_prompt=2)
            time.sleep(0.5)
            for _ in range(9):
                left = send("127.0.0.2", fields)
                time.sleep(0.05)  # TorchServe has read it
                left.close()
            start, status = time.monotonic(), 0
            while status != 200 and time.monotonic() - start < PATIENCE:
                answer = send("127.0.0.3", {**fields, "num_inference_steps": 1}).getresponse()
                status = answer.status
                answer.read()
            seconds, has_waited = time.monotonic() - start, under_way.done()
    passed = status == 200 and not has_waited
    told = f"9 requests of one address were given up; another's was answered with {status} after {seconds:.2f} s"
    return [Line("queue", passed, f"{told}, {'after' if has_waited else 'before'} the end of the picture under way")]


def check_bodies(site: Site, scale: Scale) -> list[Line]:
    """Bodies that are never finished, for which nobody needs a token: what Java takes for them."""
    size, limit = 31 * 2**20, 2300
    head = f"POST /predictions/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size + 1}\r\n\r\n".encode()
    with site.serve() as server, contextlib.ExitStack() as held:
        java, most, closed = server.find_processes()[0], 0.0, 0
        before = java.memory_info().rss / 1e6
        for _ in range(scale.bodies):
            place = ("127.0.0.1", server.ports["inference_address"])
            connection = held.enter_context(socket.create_connection(place, timeout=5))
            try:
                connection.sendall(head + b"x" * size)
            except OSError:  # a time-out too: it is not read any further
                closed += 1
            most = max(most, java.memory_info().rss / 1e6)
        beside = ask(server)
        held.close()
        after = ask(server)
    # While they are held Java may have no room for another; what matters is that it ends with them.
    passed = most < limit and beside.kind != "hung" and after.kind == "picture"
    told = f"{scale.bodies} unfinished bodies of 31 MiB: {before:.0f} MB before, {most:.0f} MB at most"
    return [Line("bodies", passed, f"{told}; {closed} cut off; meanwhile {count([beside])}, then {after.kind}")]


def drain_once(site: Site) -> tuple[list[Outcome], int, list[str]]:
    """Start a server behind nginx, ask for pictures until nginx takes no more requests, stop.

    Returns:
        The outcomes, how many requests nginx accepted, and what is left of the server.
    """
    outcomes: list[Outcome] = []

    def keep_on(proxy: LocalProxy) -> None:
        while True:
            outcome = ask(server, proxy=proxy, num_inference_steps=20)
            if outcome.kind == "cut" and outcome.seconds < 0.2:
                return  # nginx takes no more
            outcomes.append(outcome)

    with site.serve() as server:
        port, key_file = server.ports["inference_address"], server.key_file
        with LocalProxy(port, key_file=key_file) as proxy, ThreadPoolExecutor(3) as pool:
            clients = [pool.submit(keep_on, proxy) for _ in range(3)]
            time.sleep(3)
            proxy.drain()
            for client in clients:
                client.result()
            accepted = sum(not line.endswith("upstream=-") for line in proxy.log)
        processes = server.find_processes()
    left = [f"process {process.pid}" for process in processes if process.is_running()]
    for port in (*server.ports.values(), proxy.port):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                left.append(f"port {port}")
    return outcomes, accepted, left


def check_cycles(site: Site, scale: Scale) -> list[Line]:
    """Start, drain and stop under load: behind nginx, as it is shipped."""
    if find_nginx() is None:
        return [Line("cycles", False, "nginx or openssl is not installed")]
    outcomes, accepted, left = [], 0, []
    for _ in range(scale.cycles):
        cycle = drain_once(site)
        outcomes += cycle[0]
        accepted += cycle[1]
        left += cycle[2]
    pictures = sum(outcome.kind == "picture" for outcome in outcomes)
    passed = 0 < accepted == pictures == len(outcomes) and not left
    told = (
        f"{scale.cycles} cycles: {accepted} requests accepted, {count(outcomes)}; left: {', '.join(left) or 'nothing'}"
    )
    return [Line("cycles", passed, told)]


CLOSED = (
    *(("inference", method, path) for method, path in (("GET", "/ping"), ("GET", "/models"), ("GET", "/metrics"))),
    *(("inference", "POST", f"/predictions/diffusion_fast{end}") for end in ("", "/1.0", "/1.0/v1/images/generations")),
    *(("inference", "GET", f"/predictions/diffusion_fast/1.0/{end}") for end in ("describe", "openapi.json")),
    *(("inference", "POST", path) for path in ("/invocations", "/explanations/diffusion_fast", "/wf-predict/x")),
    *(
        ("inference", "POST", path)
        for path in ("/v1/models/diffusion_fast:predict", "/workflows", "/v2/models/x/infer")
    ),
    *(("management", method, "/models/diffusion_fast") for method in ("GET", "PUT", "DELETE")),
    *(("management", "POST", path) for path in ("/models?url=x.mar", "/workflows?url=x.war")),
    *(("management", "GET", path) for path in ("/models", "/workflows", "/token?type=inference", "/metrics", "/ping")),
)
OPEN = (("OPTIONS", "/"), ("GET", "/api-description"))  # TorchServe's description of its own API


def check_tokens(site: Site, _scale: Scale) -> list[Line]:
    """Every path without a token, and with a wrong one."""
    answered = []
    with site.serve() as server:
        for (api, method, path), headers in itertools.product(CLOSED, ({}, {"Authorization": "Bearer wrong"})):
            url = f"http://127.0.0.1:{server.ports[f'{api}_address']}{path}"
            answer = requests.request(method, url, headers=headers, timeout=10)
            if answer.status_code != 400 or answer.json().get("type") != "InvalidKeyException":
                answered.append(f"{method} {path}: {answer.status_code}")
        opened = [
            requests.request(method, f"http://127.0.0.1:{server.ports[f'{api}_address']}{path}", timeout=10).status_code
            for api in ("inference", "management")
            for method, path in OPEN
        ]
        with socket.socket() as probe:
            metrics_closed = probe.connect_ex(("127.0.0.1", server.ports["metrics_address"])) != 0
    told = f"{len(CLOSED)} paths, without a token and with a wrong one: {', '.join(answered) or 'all refused'}"
    told += f"; the {len(OPEN)} that docs/operations.md lists answer {sorted(set(opened))}"
    return [Line("tokens", not answered and metrics_closed, told)]


def check_disk(site: Site, _scale: Scale) -> list[Line]:
    """What goes wrong with files and ports: each with a message that says what it is."""
    wrong = []

    def fail_to_start(changed: Site, message: str) -> None:
        try:
            with changed.serve():
                wrong.append(f"it started, without {message!r}")
        except ServerError as error:
            if message not in str(error):
                wrong.append(f"no {message!r} in: …{str(error)[-300:]}")

    with tempfile.TemporaryDirectory() as name:
        broken = Path(name) / "model"
        subprocess.run(["cp", "-r", site.model, broken], check=True)
        weights = broken / "unet/diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
        fail_to_start(replace(site, model=broken), "ConfigError: cannot read the pipeline")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        fail_to_start(replace(site, properties={"inference_address": address}), "Address already in use")
    with tempfile.TemporaryDirectory() as name:
        cache = Path(name) / "cache"
        # A limit for the size of files stands in for a full disk.
        for limit, message in ((20_000, "what is compiled is not kept"), (None, "")):
            done = fill_cache(site, cache, limit)
            if message not in done.stderr or done.returncode != 0:
                wrong.append(f"files of at most {limit} bytes: {done.stderr[-300:]}")
    with replace(site, cache=site.cache / "gone").serve() as server:
        subprocess.run(["rm", "-rf", site.cache / "gone"], check=True)
        outcome = ask(server, width=96, height=96)
        if outcome.kind != "picture":
            wrong.append(f"cache folder gone: {outcome.told}")
    told = (
        "; ".join(wrong)
        or "a message each for: a model cut short, a port taken; a full disk is a warning, and nothing is cached; "
        "a cache that is gone is made anew"
    )
    return [Line("disk and ports", not wrong, told)]


def fill_cache(site: Site, cache: Path, limit: int | None) -> "subprocess.CompletedProcess[str]":
    """Load the model in a process that may write files of at most so many bytes."""
    program = (
        "import resource, sys, pathlib; limit = eval(sys.argv[3])\n"
        "from pipeline_utils import CompileConfig, HandlerConfig, load_pipeline\n"
        "options = {'model_caching': True, 'cache_dir': sys.argv[2]}\n"
        "pt2 = CompileConfig.parse({'backend': 'openvino', 'options': options}); folder = pathlib.Path(sys.argv[1])\n"
        "if limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
        "load_pipeline(HandlerConfig(model_path=folder.name), pt2, model_dir=folder.parent)\n"
    )
    command = [sys.executable, "-c", program, str(site.model), str(cache), repr(limit)]
    return subprocess.run(command, cwd=ROOT, env=make_environment(), capture_output=True, text=True)


LINES: dict[str, Callable[[Site, Scale], list[Line]]] = {
    "soak": check_soak,
    "kills": check_kills,
    "stopped": check_stopped_worker,
    "crowd": check_crowd,
    "fuzz": check_fuzz,
    "attacks": check_attacks,
    "leavers": check_leavers,
    "queue": check_queue,
    "bodies": check_bodies,
    "cycles": check_cycles,
    "tokens": check_tokens,
    "disk": check_disk,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the same with lower counts, in minutes")
    parser.add_argument("--only", nargs="+", choices=LINES, default=list(LINES), metavar="LINE", help=", ".join(LINES))
    options = parser.parse_args(argv)
    scale = QUICK if options.quick else Scale()
    print(f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB", flush=True)
    all_passed = True
    with tempfile.TemporaryDirectory(prefix="soak-cache-") as cache:
        for name in options.only:
            try:
                lines = LINES[name](Site(Path(cache)), scale)
            except (ServerError, requests.RequestException, OSError) as error:
                lines = [Line(name, False, f"{type(error).__name__}: {error}"[-2000:])]
            for line in lines:
                print(f"{'pass' if line.passed else 'FAIL'}  {line.name}: {line.told}", flush=True)
                all_passed &= line.passed
    return 0 if all_passed else 1


if __name__ == "__main__":
    sys.exit(main())
