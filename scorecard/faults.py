"""The lines of faults below a server: workers, starts and stops, files and ports."""

import contextlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from scorecard.clients import Outcome, count_outcomes, keep_requesting, request_image
from scorecard.site import Line, Scale, Site, find_workers, is_open, wait_for_another
from tools.proxy import LocalProxy, find_nginx
from tools.server import ROOT, LocalServer, ServerError, make_environment, read_shipped


def measure_recovery(server: LocalServer) -> float:
    """Kill the worker; return the seconds until another is ready."""
    workers = find_workers(server)
    workers[0].kill()
    return wait_for_another(server, workers, seconds=600)


def kill_workers(server: LocalServer, *, seconds: float, interval: float) -> tuple[int, list[float]]:
    """Kill the workers at each interval; return how often, and each time until one was ready again."""
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
    """A worker that is killed again and again, also during its work.

    It loses the requests that it holds, the waiting ones too. Their answers have begun, because TorchServe reports a
    client that has left only then. Requests in TorchServe's own queue are not lost. There are as many clients as it
    holds requests.
    """
    shipped = read_shipped()["handler"]
    held = shipped["max_running"] + shipped["max_waiting"]
    with site.serve() as server:
        loads = [measure_recovery(server) for _ in range(scale.loads)]  # nobody asks meanwhile
        with ThreadPoolExecutor(1) as pool:
            killer = pool.submit(kill_workers, server, seconds=scale.kill_time, interval=scale.kill_interval)
            outcomes, _ = keep_requesting(server, lambda _: killer.done(), clients=held)
        kills, recoveries = killer.result()
        wait_for_another(server, [], seconds=600)
        after = [request_image(server) for _ in range(scale.requests_after)]
    lost = [outcome for outcome in outcomes if outcome.kind != "image"]
    slowest = max(recoveries, default=float("inf"))
    passed = (
        {outcome.kind for outcome in lost} <= {"failed", "cut"}
        and len(lost) <= held * kills
        and len(recoveries) >= kills
        and slowest <= max(loads) + 3  # of each the slowest, for the same load takes a third longer at times
        and {outcome.kind for outcome in after} == {"image"}
    )
    detail = (
        f"{kills} kills; {count_outcomes(outcomes)}; "
        f"ready after {statistics.median(recoveries or [slowest]):.1f} s, at most "
        f"{slowest:.1f} s; without load {statistics.median(loads):.1f} s, at most {max(loads):.1f} s; "
        f"then {count_outcomes(after)}"
    )
    return [Line("kills", passed, detail)]


def check_stopped_worker(site: Site, _scale: Scale) -> list[Line]:
    """A worker that hangs: TorchServe gives it up after responseTimeout."""
    limit = 5
    with site.serve(responseTimeout=limit) as server:
        workers = find_workers(server)
        workers[0].suspend()
        outcome = request_image(server)
        recovery = wait_for_another(server, workers, seconds=120)
        after = request_image(server)
    passed = outcome.kind == "failed" and outcome.seconds < limit + 3 and after.kind == "image"
    detail = f"responseTimeout {limit} s: {outcome.kind} after {outcome.seconds:.1f} s ({outcome.detail}); "
    return [Line("stopped worker", passed, detail + f"ready {recovery:.1f} s later, then {after.kind}")]


def drain_once(site: Site) -> tuple[list[Outcome], int, list[str]]:
    """Start a server behind nginx, request images until nginx takes no more requests, stop.

    Returns:
        The outcomes, how many requests nginx accepted, and what is left of the server.
    """
    outcomes: list[Outcome] = []

    def keep_on(proxy: LocalProxy) -> None:
        while True:
            outcome = request_image(server, proxy=proxy, num_inference_steps=20)
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
    left += [f"port {port}" for port in (*server.ports.values(), proxy.port) if is_open(port)]
    return outcomes, accepted, left


def check_cycles(site: Site, scale: Scale) -> list[Line]:
    """Start, drain and stop under load: behind nginx, with its shipped configuration."""
    if find_nginx() is None:
        return [Line("cycles", False, "nginx or openssl is not installed")]
    outcomes, accepted, left = [], 0, []
    for _ in range(scale.cycles):
        cycle = drain_once(site)
        outcomes += cycle[0]
        accepted += cycle[1]
        left += cycle[2]
    images = sum(outcome.kind == "image" for outcome in outcomes)
    passed = 0 < accepted == images == len(outcomes) and not left
    detail = f"{scale.cycles} cycles: {accepted} requests accepted, {count_outcomes(outcomes)}"
    detail += f"; left: {', '.join(left) or 'nothing'}"
    return [Line("cycles", passed, detail)]


def check_disk(site: Site, _scale: Scale) -> list[Line]:
    """Faults of files and ports: each has a message that names it."""
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
        # A limit for the size of files acts as a full disk.
        for limit, message in ((20_000, "what is compiled is not kept"), (None, "")):
            done = fill_cache(site, cache, limit)
            if message not in done.stderr or done.returncode != 0:
                wrong.append(f"files of at most {limit} bytes: {done.stderr[-300:]}")
    with replace(site, cache=site.cache / "gone").serve() as server:
        subprocess.run(["rm", "-rf", site.cache / "gone"], check=True)
        outcome = request_image(server, width=96, height=96)
        if outcome.kind != "image":
            wrong.append(f"cache folder gone: {outcome.detail}")
    detail = (
        "; ".join(wrong)
        or "a message each for: a model cut short, a port taken; a full disk is a warning, and nothing is cached; "
        "a cache that is gone is made anew"
    )
    return [Line("disk and ports", not wrong, detail)]


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
