"""The lines of ordinary clients: for a long time, of all kinds, many at once, and those that leave."""

import asyncio
import http.client
import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from scorecard.clients import (
    IMAGE_SIZES,
    PATIENCE,
    Watch,
    count_outcomes,
    judge_growth,
    keep_requesting,
    make_any_fields,
    measure_server,
    request_at_once,
    request_image,
)
from scorecard.site import Line, Scale, Site, add_models, find_workers
from sdxl_server.serving.client import send_request
from tools.server import read_shipped

FEWEST_FOR_GROWTH = 500  # requests: fewer do not show whether memory grows


def check_soak(site: Site, scale: Scale) -> list[Line]:
    """Images for a long time, from as many clients as query.py runs at once."""
    with site.serve() as server:
        for width, height in IMAGE_SIZES:  # compile what will be asked for
            request_image(server, width=width, height=height)
        start = time.monotonic()

        def is_enough(done: int) -> bool:
            passed = time.monotonic() - start
            return passed > scale.soak_time and (done >= scale.soak_requests or passed > 2 * scale.soak_time)

        with Watch(partial(measure_server, server)) as watch:
            outcomes, seconds = keep_requesting(server, is_enough, clients=4)
    times = sorted(outcome.seconds for outcome in outcomes)
    p50, p99 = (times[min(int(len(times) * share), len(times) - 1)] for share in (0.5, 0.99))
    passed = len(outcomes) >= scale.soak_requests and {outcome.kind for outcome in outcomes} == {"image"}
    detail = f"{len(outcomes)} requests in {seconds:.0f} s: {count_outcomes(outcomes)}; "
    detail += f"p50 {p50:.2f} s, p99 {p99:.2f} s, p99/p50 {p99 / p50:.1f}"
    is_flat, growth = judge_growth(watch.samples)
    return [Line("soak", passed, detail), Line("memory", is_flat, growth)]


def check_kinds(site: Site, scale: Scale) -> list[Line]:
    """Requests of random kinds, as many at once as the queue takes.

    Memory must not grow. A request gets the same pixels next to others as alone.
    """
    handler, site = read_shipped()["handler"], add_models(site)
    make = partial(make_any_fields, has_adapter=bool(site.settings["adapters"]))
    with site.serve() as server:
        before = [process.pid for process in find_workers(server)]
        clients = handler["max_running"] + handler["max_waiting"]
        # OpenVINO keeps the kernels of earlier sizes up to a bound; the first requests reach the bound.
        warm_up = max(scale.kinds // 5, 1)
        first, _ = keep_requesting(server, lambda done: done >= warm_up, clients=clients, make=make)
        with Watch(partial(measure_server, server)) as watch:
            outcomes, seconds = keep_requesting(
                server,
                lambda done: done >= scale.kinds,
                clients=clients,
                make=lambda number: make(scale.kinds + number),
            )
        repeated = outcomes[: scale.repeated]
        alone = [request_image(server, **make(scale.kinds + each.number)) for each in repeated]
        survived = before == [process.pid for process in find_workers(server)]
    is_flat, growth = judge_growth(watch.samples)
    same = sum(one.pixels == other.pixels for one, other in zip(repeated, alone, strict=True))
    passed = survived and {outcome.kind for outcome in [*first, *outcomes, *alone]} == {"image"} and same == len(alone)
    detail = f"{len(first)} and {len(outcomes)} requests of any kind of {clients} clients in {seconds:.0f} s: "
    detail += f"{count_outcomes(outcomes)}; {same} of {len(alone)} with the same pixels alone; {growth}"
    return [Line("kinds", passed and (is_flat or scale.kinds < FEWEST_FOR_GROWTH), detail)]


def check_crowd(site: Site, scale: Scale) -> list[Line]:
    """More clients at once than the queue has room for."""
    with site.serve() as server:
        answers = asyncio.run(request_at_once(server, scale.crowd))
        after = request_image(server)
    accepted = [seconds for status, seconds in answers if status == 200]
    refused = [seconds for status, seconds in answers if status == 503]
    shipped = read_shipped()
    queue = shipped["handler"]["max_running"] + shipped["handler"]["max_waiting"]
    room = queue + shipped["jobQueueSize"] + 1  # the worker's, TorchServe's, which may find places there, and one more
    passed = (
        len(accepted) + len(refused) == scale.crowd
        and 0 < len(accepted) <= room
        and max(refused, default=float("inf")) < 1
        and after.kind == "image"
    )
    detail = f"{scale.crowd} clients: {len(accepted)} accepted, {len(refused)} refused"
    detail += f" within {max(refused):.2f} s" if refused else ""
    return [Line("crowd", passed, f"{detail}; then {after.kind}")]


def check_leavers(site: Site, scale: Scale) -> list[Line]:
    """Clients that leave during an image."""
    steps = 150
    with site.serve() as server:

        def leave(seed: int) -> None:
            fields = {"prompt": "a red circle", "num_inference_steps": steps, "seed": seed}
            with send_request(
                "POST", server.url, json=fields, headers=server.get_headers(), stream=True, timeout=PATIENCE
            ) as answer:
                answer.raise_for_status()  # the headers come with the first step, or with a place in the queue

        alone = request_image(server, num_inference_steps=steps)
        start = time.monotonic()
        with ThreadPoolExecutor(5) as pool:
            list(pool.map(leave, range(scale.leavers)))
        after = request_image(server)
        seconds = time.monotonic() - start
        ended = server.log.count("The client has left")  # while it was drawn, or while it waited
    passed = ended >= scale.leavers and after.kind == "image" and seconds < scale.leavers * alone.seconds / 4
    detail = (
        f"{scale.leavers} clients left images of {alone.seconds:.1f} s: {ended} ended early, {seconds:.1f} s in all"
    )
    return [Line("leavers", passed, f"{detail}; then {after.kind}")]


def check_queue(site: Site, scale: Scale) -> list[Line]:
    """Requests that are given up while an image is under way, and one from another address."""
    fields = {"prompt": "a red circle", "num_inference_steps": 150}
    with site.serve() as server:
        place = ("127.0.0.1", server.ports["inference_address"])
        headers = {**server.get_headers(), "Content-Type": "application/json"}

        def send(address: str, body: Mapping[str, Any]) -> http.client.HTTPConnection:
            connection = http.client.HTTPConnection(*place, timeout=PATIENCE, source_address=(address, 0))
            connection.request("POST", f"/predictions/{server.model}", json.dumps(body), headers)
            return connection

        with ThreadPoolExecutor(1) as pool:
            under_way = pool.submit(request_image, server, num_inference_steps=150, num_images_per_prompt=2)
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
    detail = f"9 requests of one address were given up; another's was answered with {status} after {seconds:.2f} s"
    return [Line("queue", passed, f"{detail}, {'after' if has_waited else 'before'} the end of the image under way")]
