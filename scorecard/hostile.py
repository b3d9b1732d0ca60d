"""The lines of hostile clients: broken requests, costly requests, unfinished requests, requests without a token."""

import contextlib
import itertools
import socket
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import requests

from scorecard.clients import PATIENCE, Watch, count_outcomes, measure_memory, read_body, request_image
from scorecard.fuzz import (
    FORM_PAIRS,
    Hostile,
    list_connections,
    list_requests,
    make_attacks,
    make_jpeg,
    make_upload,
)
from scorecard.generated import run_schemathesis
from scorecard.site import Line, Scale, Site, add_models, connect, find_workers, is_open
from sdxl_server.serving.client import send_request
from tools.proxy import LocalProxy, find_nginx
from tools.server import LocalServer

MOST_SECONDS, MOST_CHARACTERS = 5, 10_000  # of a refusal of an attack
# TorchServe decodes forms before the handler sees them, and calls one that it cannot read its own error.
FORM_ERROR = "500 of TorchServe's to forms that cannot be read"
FORM_EXCEPTIONS = ("ErrorDataDecoderException", "StringIndexOutOfBoundsException")


def send_as_is(
    server: LocalServer, hostile: Hostile, *, proxy: LocalProxy | None = None
) -> tuple[requests.Response, str]:
    """Send a request unchanged; return the answer and its body.

    Raises:
        requests.RequestException: there is none, or not all of it in time.
    """
    address = (proxy.url if proxy else server.url).rpartition("/predictions")[0]
    with requests.Session() as session:
        session.trust_env = False
        prepared = session.prepare_request(requests.Request(hostile.method, address, data=hostile.body))
        prepared.url = address + hostile.path  # unchanged: requests would tidy it
        prepared.headers.update({**hostile.headers, **(proxy or server).get_headers()})
        verify = str(proxy.certificate) if proxy else True
        start = time.monotonic()
        answer = session.send(prepared, timeout=PATIENCE, allow_redirects=False, stream=True, verify=verify)
        return answer, read_body(answer, start + PATIENCE).decode(errors="replace")


def send_connection(server: LocalServer, content: bytes) -> str:
    """Send the bytes of a whole connection; return the first digit of the status, or `closed`."""
    try:
        with connect(server, timeout=3) as connection:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(20).decode("latin-1").partition(" ")[2][:1] or "closed"
    except OSError:
        return "closed"


def send_hostile(server: LocalServer, hostile: Hostile) -> str:
    """Send a hostile request; return the first digit of the status, or a description of a wrong answer."""
    shown = f"{hostile.method} {hostile.path[:60]} {hostile.headers} {hostile.body[:200]!r}"
    try:
        answer, text = send_as_is(server, hostile)
    except requests.RequestException as error:
        return f"{type(error).__name__} to {shown}"
    if answer.status_code < 500:
        return str(answer.status_code)[0]
    if hostile.is_form and (hostile.method == "HEAD" or any(name in text for name in FORM_EXCEPTIONS)):
        return FORM_ERROR  # the answer to HEAD has no body
    return f"{answer.status_code} {text[:200]!r} to {shown}"


def check_fuzz(site: Site, scale: Scale) -> list[Line]:
    """Hostile and generated requests, next to hundreds of connections that send nothing."""
    small = add_models(
        replace(site, settings={"num_inference_steps": 1, "max_steps": 3, "max_side": 128, **site.settings})
    )
    with small.serve() as server, contextlib.ExitStack() as silent:
        before = [process.pid for process in find_workers(server)]
        for _ in range(500):
            silent.enter_context(connect(server))
        connections = list_connections(server.get_headers()["Authorization"].removeprefix("Bearer "))
        with ThreadPoolExecutor(4) as pool:
            kinds = Counter(pool.map(partial(send_hostile, server), list_requests()))
            kinds += Counter(pool.map(partial(send_connection, server), connections))
        generated = run_schemathesis(server, examples=scale.fuzzed, most_steps=3, patience=PATIENCE)
        after = request_image(server)
        silent.close()
        survived = before == [process.pid for process in find_workers(server)]
        forged = "result=[METRICS]forged" in server.log
    bad = [kind for kind in kinds if kind not in ("2", "4", "closed", FORM_ERROR)]
    passed = not bad and generated.passed and survived and not forged and after.kind == "image"
    detail = f"{kinds.total()} hostile requests: {kinds['2']} 2xx, {kinds['4']} 4xx, "
    detail += f"{kinds['closed']} closed without an answer, {kinds[FORM_ERROR]} {FORM_ERROR}"
    detail += f", {len(bad)} others, such as {bad[0]}" if bad else ""
    detail += f"; {generated.count} generated requests"
    detail += "" if generated.passed else f" with failures: {generated.output[-1500:]}"
    return [Line("fuzz", passed, f"{detail}; worker {'the same' if survived else 'another'}; then {after.kind}")]


@dataclass(frozen=True)
class Blow:
    """The effect of one attack.

    Attributes:
        status: the status of the answer, or the name of the error.
        size: of the answer, in characters.
        seconds: until the answer.
        peak, growth: of the resident memory of the worker and of Java in MB, meanwhile and afterwards.
        survived: the worker is the same.
    """

    name: str
    status: str
    size: int
    seconds: float
    peak: Mapping[str, float]
    growth: Mapping[str, float]
    survived: bool

    @property
    def is_bad(self) -> bool:
        is_answered = self.status[0] in "24" or self.status == FORM_ERROR
        is_short = self.status[0] == "2" or self.size < MOST_CHARACTERS
        return not (self.survived and is_answered and is_short and self.seconds < MOST_SECONDS)

    def __str__(self) -> str:
        memory = ", ".join(f"{name} {peak:+.0f} MB, then {self.growth[name]:+.0f}" for name, peak in self.peak.items())
        worker = "" if self.survived else "; another worker"
        return f"{self.name}: {self.status} of {self.size} characters after {self.seconds:.1f} s; {memory}{worker}"


def strike(server: LocalServer, name: str, hostile: Hostile, *, proxy: LocalProxy | None = None) -> Blow:
    """Send an attack and wait until the server answers again; return the effect."""
    workers = find_workers(server)
    processes = {"worker": workers[0], "Java": server.find_processes()[0]}
    before, start = measure_memory(processes), time.monotonic()
    with Watch(lambda: measure_memory(processes), seconds=0.02) as watch:
        try:
            answer, text = send_as_is(server, hostile, proxy=proxy)
            is_form_error = answer.status_code == 500 and any(each in text for each in FORM_EXCEPTIONS)
            status, size = FORM_ERROR if is_form_error else str(answer.status_code), len(text)
        except requests.RequestException as error:
            status, size = type(error).__name__, 0
        seconds = time.monotonic() - start
        while request_image(server, num_inference_steps=1).kind != "image" and time.monotonic() - start < 2 * PATIENCE:
            time.sleep(0.2)
    survived = [each.pid for each in workers] == [each.pid for each in find_workers(server)]
    after = measure_memory(processes)
    peak = {name: max(sample[name] for sample in [before, *watch.samples]) - before[name] for name in before}
    growth = {name: after[name] - before[name] for name in before}
    return Blow(name, status, size, seconds, peak, growth, survived)


def check_attacks(site: Site, _scale: Scale) -> list[Line]:
    """Requests that would cost far more than their bytes; then the same through nginx."""
    lines = []
    with site.serve() as server, contextlib.ExitStack() as stack:
        ways: dict[str, LocalProxy | None] = {"attacks": None}
        if find_nginx() is not None:
            ways["attacks through nginx"] = stack.enter_context(
                LocalProxy(server.ports["inference_address"], key_file=server.key_file)
            )
        for way, proxy in ways.items():
            send_as_is(server, make_upload("image", make_jpeg()))  # compiles the VAE's encoder
            blows = []
            for name, make in make_attacks().items():
                if name == FORM_PAIRS and proxy is None:
                    continue
                blows.append(strike(server, name, make(), proxy=proxy))
                print(f"      {blows[-1]}", flush=True)
            bad = [str(blow) for blow in blows if blow.is_bad]
            slowest = max(blows, key=lambda blow: blow.seconds)
            most = max(blow.peak["worker"] for blow in blows)
            detail = f"{len(blows)} kinds: all answered by the same worker within {slowest.seconds:.1f} s, which took "
            detail += f"{most:.0f} MB more"
            lines.append(Line(way, not bad, "; ".join(bad) or detail))
    return lines


def check_bodies(site: Site, scale: Scale) -> list[Line]:
    """Bodies that are never finished, which need no token; Java must bound the memory that they take."""
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
        meanwhile = request_image(server)
        held.close()
        after = request_image(server)
    # While they are held, Java may refuse other requests; afterwards it must answer again.
    passed = most < limit and meanwhile.kind != "hung" and after.kind == "image"
    detail = f"{scale.bodies} unfinished bodies of 31 MiB: {before:.0f} MB before, {most:.0f} MB at most; "
    detail += f"{closed} cut off; meanwhile {count_outcomes([meanwhile])}, then {after.kind}"
    return [Line("bodies", passed, detail)]


CLOSED = (
    *(("inference", method, path) for method, path in (("GET", "/ping"), ("GET", "/models"), ("GET", "/metrics"))),
    *(("inference", "POST", f"/predictions/diffusion_fast{end}") for end in ("", "/1.0", "/1.0/v1/images/generations")),
    *(("inference", "POST", f"/predictions/diffusion_fast/1.0/sdapi/v1/{end}") for end in ("txt2img", "interrupt")),
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
            answer = send_request(method, url, headers=headers, timeout=10)
            if answer.status_code != 400 or answer.json().get("type") != "InvalidKeyException":
                answered.append(f"{method} {path}: {answer.status_code}")
        opened = [
            send_request(method, f"http://127.0.0.1:{server.ports[f'{api}_address']}{path}", timeout=10).status_code
            for api in ("inference", "management")
            for method, path in OPEN
        ]
        metrics_closed = not is_open(server.ports["metrics_address"])
    detail = f"{len(CLOSED)} paths, without a token and with a wrong one: {', '.join(answered) or 'all refused'}"
    detail += f"; the {len(OPEN)} that docs/security.md lists answer {sorted(set(opened))}"
    return [Line("tokens", not answered and metrics_closed, detail)]
