"""The lines of those who mean ill: what they send, how much of it, and without a token."""

import contextlib
import itertools
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from random import Random

import psutil
import requests

from scorecard.clients import PATIENCE, ask, count, read_body
from scorecard.fuzz import PAIRS, Hostile, make_attacks, make_bytes, make_jpeg, make_request, make_upload
from scorecard.site import Line, Scale, Site, connect, find_workers, is_open
from tools.proxy import LocalProxy, find_nginx
from tools.server import LocalServer

MOST_SECONDS, MOST_CHARACTERS = 5, 10_000  # of a refusal of an attack
# TorchServe decodes forms before the handler sees them, and calls one that it cannot read its own error.
FORM_ERROR = "500 of TorchServe's to forms that cannot be read"
FORM_EXCEPTIONS = ("ErrorDataDecoderException", "StringIndexOutOfBoundsException")


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
            with connect(server, timeout=3) as connection:
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
        silent = [connect(server) for _ in range(500)]
        with ThreadPoolExecutor(4) as pool:
            kinds = Counter(pool.map(lambda seed: send_hostile(server, Random(seed)), range(scale.fuzzed)))
        after = ask(server)
        for connection in silent:
            connection.close()
        survived = before == [process.pid for process in find_workers(server)]
        forged = "result=[METRICS]forged" in server.log
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


def check_bodies(site: Site, scale: Scale) -> list[Line]:
    """Bodies that are never finished, for which nobody needs a token: what Java takes for them."""
    size, limit = 31 * 2**20, 2300
    head = f"POST /predictions/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size + 1}\r\n\r\n".encode()
    with site.serve() as server, contextlib.ExitStack() as held:
        java, most, closed = server.find_processes()[0], 0.0, 0
        before = java.memory_info().rss / 1e6
        for _ in range(scale.bodies):
            connection = held.enter_context(connect(server, timeout=5))
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
        metrics_closed = not is_open(server.ports["metrics_address"])
    told = f"{len(CLOSED)} paths, without a token and with a wrong one: {', '.join(answered) or 'all refused'}"
    told += f"; the {len(OPEN)} that docs/security.md lists answer {sorted(set(opened))}"
    return [Line("tokens", not answered and metrics_closed, told)]
