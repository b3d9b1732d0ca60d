"""Clients that ask a server for pictures, what becomes of their requests, and what the server holds meanwhile."""

import asyncio
import contextlib
import io
import itertools
import json
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import psutil
import requests
from PIL import Image

from tools.proxy import LocalProxy
from tools.server import LocalServer

PATIENCE = 90  # seconds after which a request counts as hung
SIZES = ((128, 128), (96, 128))
FORMATS = ("jpeg", "png", "webp")


@dataclass(frozen=True)
class Outcome:
    """What became of a request.

    Attributes:
        kind: picture; busy; refused (4xx); failed (5xx in JSON); cut, when the answer broke off; hung; wrong, when the
            answer is none of these or another picture than was asked for.
    """

    kind: str
    seconds: float
    told: str = ""


def ask(server: LocalServer, *, proxy: LocalProxy | None = None, **fields: Any) -> Outcome:
    """Ask for a picture, through a proxy where there is one, and judge the answer."""
    fields = {"prompt": "a red circle on a blue background", "width": 128, "height": 128, **fields}
    start = time.monotonic()
    kind, told = "cut", ""
    place, verify = proxy or server, str(proxy.certificate) if proxy else True
    try:
        with requests.post(
            place.url, json=fields, headers=place.get_headers(), timeout=PATIENCE, verify=verify, stream=True
        ) as answer:
            kind, told = judge(answer, read_body(answer, start + PATIENCE), fields)
    except requests.Timeout:
        kind = "hung"
    except requests.ConnectionError as error:
        kind, told = ("hung" if "timed out" in str(error) else "cut"), str(error)[:200]
    except requests.RequestException as error:
        told = str(error)[:200]
    seconds = time.monotonic() - start
    return Outcome("hung" if seconds > PATIENCE else kind, seconds, told)


def read_body(answer: requests.Response, deadline: float) -> bytes:
    """Return the body of an answer; requests itself only bounds the time between two pieces.

    Args:
        deadline: by time.monotonic().

    Raises:
        requests.Timeout: it is not complete by then.
    """
    body = b""
    for piece in answer.iter_content(65536):
        body += piece
        if time.monotonic() > deadline:
            raise requests.Timeout(f"{len(body)} bytes so far, and no end")
    return body


def judge(answer: requests.Response, body: bytes, fields: Mapping[str, Any]) -> tuple[str, str]:
    """Return an outcome's kind, and what is to be told of it."""
    if answer.status_code == 200:
        try:
            with Image.open(io.BytesIO(body)) as picture:
                picture.load()
                wanted = (fields["width"], fields["height"])
                return ("picture", "") if picture.size == wanted else ("wrong", f"{picture.size}, not {wanted}")
        except OSError as error:
            return "wrong", str(error)
    try:
        told = str(json.loads(body))[:200]
    except ValueError:
        return "wrong", f"{answer.status_code} without JSON: {body[:200]!r}"
    if answer.status_code == 503 and any(kind in told for kind in ("ServiceUnavailable", "server_busy")):
        return "busy", told
    return ("refused" if answer.status_code < 500 else "failed"), f"{answer.status_code} {told}"


def keep_asking(server: LocalServer, until: Callable[[int], bool], *, clients: int) -> tuple[list[Outcome], float]:
    """Let several clients ask for pictures of all sizes and formats, one after another each, until the time is up.

    Args:
        until: is given the number of answers so far and says whether that is enough.

    Returns:
        The outcomes, and the seconds that it took.
    """
    outcomes: list[Outcome] = []
    numbers = itertools.count()
    start = time.monotonic()

    def work() -> None:
        while not until(len(outcomes)):
            number = next(numbers)
            width, height = SIZES[number % len(SIZES)]
            output_format = FORMATS[number % len(FORMATS)]
            outcome = ask(server, width=width, height=height, seed=number, output_format=output_format)
            outcomes.append(outcome)
            if outcome.kind not in ("picture", "refused"):
                time.sleep(0.2)  # as a client does that has been sent away

    with ThreadPoolExecutor(clients) as pool:
        for each in [pool.submit(work) for _ in range(clients)]:
            each.result()
    return outcomes, time.monotonic() - start


def count(outcomes: Sequence[Outcome]) -> str:
    """Return how many there were of each kind, with an example of each that is no picture."""
    counts = Counter(outcome.kind for outcome in outcomes)
    examples = {outcome.kind: outcome.told for outcome in outcomes if outcome.told}
    return ", ".join(
        f"{number} {kind}" + (f" ({examples[kind]})" if kind in examples else "") for kind, number in counts.items()
    )


def measure(server: LocalServer) -> dict[str, float]:
    """Return what the server and its workers hold: resident megabytes, file handles, threads, entries in /tmp."""
    held = {"MB resident": 0.0, "file handles": 0.0, "threads": 0.0, "temporary files": 0.0}
    for process in server.find_processes():
        with contextlib.suppress(psutil.Error):
            held["MB resident"] += process.memory_info().rss / 1e6
            held["file handles"] += process.num_fds()
            held["threads"] += process.num_threads()
    with contextlib.suppress(FileNotFoundError):  # the server is tidying up
        held["temporary files"] += sum(1 for _ in server.temporary.rglob("*"))
    return held


class Watch(threading.Thread):
    """Measure the server each second; the samples are kept in their order."""

    def __init__(self, server: LocalServer) -> None:
        super().__init__(daemon=True)
        self.samples: list[dict[str, float]] = []
        self._server, self._stopped = server, threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(1):
            self.samples.append(measure(self._server))

    def __enter__(self) -> "Watch":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self.join()


def judge_growth(samples: Sequence[Mapping[str, float]]) -> tuple[bool, str]:
    """Compare the second tenth of the samples, past the first pictures, with the last tenth."""
    tenth = max(len(samples) // 10, 1)
    passed, told = True, []
    for name in samples[0]:
        first, last = (
            statistics.median(sample[name] for sample in part)
            for part in (samples[tenth : 2 * tenth] or samples[:1], samples[-tenth:])
        )
        # A thread pool that had not yet all its threads, or a connection more, is no leak.
        slack = 0.05 * first if name == "MB resident" else max(0.05 * first, 4)
        passed &= last <= first + slack
        told.append(f"{first:.0f} to {last:.0f} {name}")
    return passed, ", ".join(told)


async def ask_at_once(server: LocalServer, clients: int) -> list[tuple[int, float]]:
    """Ask for a picture from many clients; return the status of each, and the seconds until it came.

    Each keeps its connection until all have an answer.
    """
    body = b'{"prompt": "a red circle", "num_inference_steps": 25}'
    head = (
        f"POST /predictions/{server.model} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Authorization: {server.get_headers()['Authorization']}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writers = []

    async def ask_once() -> tuple[int, float]:
        start = time.monotonic()
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.ports["inference_address"])
            writers.append(writer)
            writer.write(head.encode() + body)
            line = await asyncio.wait_for(reader.readline(), PATIENCE)
            return int(line.split()[1]), time.monotonic() - start
        except (TimeoutError, OSError, IndexError):
            return 0, time.monotonic() - start

    answers = await asyncio.gather(*(ask_once() for _ in range(clients)))
    for writer in writers:
        writer.close()
    return answers
