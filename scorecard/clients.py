"""Clients that request images, the outcomes of their requests, and the resources that the server holds meanwhile."""

import asyncio
import base64
import contextlib
import hashlib
import io
import itertools
import json
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import psutil
import requests
from PIL import Image

from sdxl_server.request.preprocessing import CANNY, load_opencv
from sdxl_server.serving.client import send_request
from tools.proxy import LocalProxy
from tools.server import LocalServer

PATIENCE = 90  # seconds after which a request counts as hung
IMAGE_SIZES = ((128, 128), (96, 128))
IMAGE_FORMATS = ("jpeg", "png", "webp")
CONTROL, ADAPTER = "edges", "inverted"  # the names of those that are registered


@dataclass(frozen=True)
class Outcome:
    """The outcome of a request.

    Attributes:
        kind: image; busy; refused (4xx); failed (5xx in JSON); cut, when the answer broke off; hung; wrong, when the
            answer is none of these or not the requested image.
        pixels: the digest of an image's pixels.
        number: of the request.
    """

    kind: str
    seconds: float
    detail: str = ""
    pixels: str = ""
    number: int = 0


def request_image(server: LocalServer, *, proxy: LocalProxy | None = None, **fields: Any) -> Outcome:
    """Request an image, through a proxy if there is one, and judge the answer."""
    fields = {"prompt": "a red circle on a blue background", "width": 128, "height": 128, **fields}
    start = time.monotonic()
    kind, detail, pixels = "cut", "", ""
    place, verify = proxy or server, str(proxy.certificate) if proxy else True
    try:
        with send_request(
            "POST", place.url, json=fields, headers=place.get_headers(), timeout=PATIENCE, verify=verify, stream=True
        ) as answer:
            kind, detail, pixels = judge_answer(answer, read_body(answer, start + PATIENCE), fields)
    except requests.Timeout:
        kind = "hung"
    except requests.ConnectionError as error:
        kind, detail = ("hung" if "timed out" in str(error) else "cut"), str(error)[:200]
    except requests.RequestException as error:
        detail = str(error)[:200]
    seconds = time.monotonic() - start
    return Outcome("hung" if seconds > PATIENCE else kind, seconds, detail, pixels)


def read_body(answer: requests.Response, deadline: float) -> bytes:
    """Return the body of an answer; requests itself only bounds the time between two chunks.

    Args:
        deadline: by time.monotonic().

    Raises:
        requests.Timeout: it is not complete by then.
    """
    body = b""
    for chunk in answer.iter_content(65536):
        body += chunk
        if time.monotonic() > deadline:
            raise requests.Timeout(f"{len(body)} bytes so far, and no end")
    return body


def judge_answer(answer: requests.Response, body: bytes, fields: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return an outcome's kind, detail and pixels."""
    if answer.status_code == 200:
        try:
            with Image.open(io.BytesIO(body)) as image:
                image.load()
                wanted = (fields["width"], fields["height"])
                if image.size == wanted:
                    return "image", "", hashlib.sha256(image.tobytes()).hexdigest()
                return "wrong", f"{image.size}, not {wanted}", ""
        except OSError as error:
            return "wrong", str(error), ""
    try:
        detail = str(json.loads(body))[:200]
    except ValueError:
        return "wrong", f"{answer.status_code} without JSON: {body[:200]!r}", ""
    if answer.status_code == 503 and any(kind in detail for kind in ("ServiceUnavailable", "server_busy")):
        return "busy", detail, ""
    return ("refused" if answer.status_code < 500 else "failed"), f"{answer.status_code} {detail}", ""


def make_fields(number: int) -> dict[str, Any]:
    """Return the fields of a request by its number; sizes and formats alternate."""
    (width, height), kind = IMAGE_SIZES[number % len(IMAGE_SIZES)], IMAGE_FORMATS[number % len(IMAGE_FORMATS)]
    return {"width": width, "height": height, "seed": number, "output_format": kind}


def make_any_fields(number: int, *, has_adapter: bool) -> dict[str, Any]:
    """Return the fields of a request by its number: of any size and format, with or without guidance.

    Some have an image, and some of these a mask. Some have a control, whose edges the server draws where it can.

    Args:
        has_adapter: whether some name the adapter of the demonstration model.
    """
    random = Random(number)
    width, height, *size = (8 * random.randint(8, 64) for _ in range(4))
    fields = {
        **{"width": width, "height": height, "seed": number, "output_format": random.choice(IMAGE_FORMATS)},
        **{"num_inference_steps": random.randint(1, 4), "guidance_scale": random.choice((1.0, 5.0))},
    }
    if random.random() < 0.3:
        fields |= {"image": _encode(Image.linear_gradient("L").resize((size[0], size[1]))), "strength": 1}
        if random.random() < 0.5:
            fields["mask_image"] = _encode(Image.radial_gradient("L").resize((size[0], size[1])))
    if random.random() < 0.4:
        shape = Image.radial_gradient("L").point(lambda value: 255 * (value > 90)).resize((size[1], size[0]))
        preprocess = random.choice((None, CANNY)) if load_opencv() else None
        edges = {"name": CONTROL, "image": _encode(shape), "scale": random.choice((0.5, 1.0))}
        fields["control"] = [
            {**edges, "to": random.choice((0.5, 1)), **({"preprocess": preprocess} if preprocess else {})}
        ]
    if has_adapter and random.random() < 0.4:
        fields["adapters"] = [{"name": ADAPTER, "scale": random.choice((0.5, 1.0))}]
    return fields


def _encode(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def keep_requesting(
    server: LocalServer,
    until: Callable[[int], bool],
    *,
    clients: int,
    make: Callable[[int], Mapping[str, Any]] = make_fields,
) -> tuple[list[Outcome], float]:
    """Let several clients request images until it is enough. Each client sends one request at a time.

    Args:
        until: says from the number of answers so far whether it is enough.
        make: returns the fields of a request by its number.

    Returns:
        The outcomes, and the seconds that it took.
    """
    outcomes: list[Outcome] = []
    numbers = itertools.count()
    start = time.monotonic()

    def work() -> None:
        while not until(len(outcomes)):
            number = next(numbers)
            outcome = replace(request_image(server, **make(number)), number=number)
            outcomes.append(outcome)
            if outcome.kind not in ("image", "refused"):
                time.sleep(0.2)  # as a refused client does

    with ThreadPoolExecutor(clients) as pool:
        for each in [pool.submit(work) for _ in range(clients)]:
            each.result()
    return outcomes, time.monotonic() - start


def count_outcomes(outcomes: Sequence[Outcome]) -> str:
    """Return the number of outcomes of each kind, with an example of each kind that is no image."""
    counts = Counter(outcome.kind for outcome in outcomes)
    examples = {outcome.kind: outcome.detail for outcome in outcomes if outcome.detail}
    return ", ".join(
        f"{number} {kind}" + (f" ({examples[kind]})" if kind in examples else "") for kind, number in counts.items()
    )


def measure_server(server: LocalServer) -> dict[str, float]:
    """Return the resources of the server and its workers: memory in MB, file handles, threads, temporary files."""
    held = {"MB resident": 0.0, "file handles": 0.0, "threads": 0.0, "temporary files": 0.0}
    for process in server.find_processes():
        with contextlib.suppress(psutil.Error):
            held["MB resident"] += process.memory_info().rss / 1e6
            held["file handles"] += process.num_fds()
            held["threads"] += process.num_threads()
    with contextlib.suppress(FileNotFoundError):  # the server removes them
        held["temporary files"] += sum(1 for _ in server.temporary.rglob("*"))
    return held


def measure_memory(processes: Mapping[str, psutil.Process]) -> dict[str, float]:
    """Return the resident memory of processes in MB by their names; that of a dead one is 0."""
    memory = dict.fromkeys(processes, 0.0)
    for name, process in processes.items():
        with contextlib.suppress(psutil.Error):
            memory[name] = process.memory_info().rss / 1e6
    return memory


class Watch(threading.Thread):
    """Measure at an interval and keep the samples in their order."""

    def __init__(self, measure: Callable[[], dict[str, float]], *, seconds: float = 1) -> None:
        super().__init__(daemon=True)
        self.samples: list[dict[str, float]] = []
        self._measure, self._seconds, self._stopped = measure, seconds, threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(self._seconds):
            self.samples.append(self._measure())

    def __enter__(self) -> "Watch":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self.join()


def judge_growth(samples: Sequence[Mapping[str, float]]) -> tuple[bool, str]:
    """Compare the second tenth of the samples, after the first images, with the last tenth."""
    tenth = max(len(samples) // 10, 1)
    passed, details = True, []
    for name in samples[0]:
        first, last = (
            statistics.median(sample[name] for sample in part)
            for part in (samples[tenth : 2 * tenth] or samples[:1], samples[-tenth:])
        )
        # A thread pool that still grows, or one more connection, is no leak.
        slack = 0.05 * first if name == "MB resident" else max(0.05 * first, 4)
        passed &= last <= first + slack
        details.append(f"{first:.0f} to {last:.0f} {name}")
    return passed, ", ".join(details)


async def request_at_once(server: LocalServer, clients: int) -> list[tuple[int, float]]:
    """Request an image from many clients at once; return the status for each and the seconds until it came.

    Each client keeps its connection until all have an answer.
    """
    body = b'{"prompt": "a red circle", "num_inference_steps": 25}'
    head = (
        f"POST /predictions/{server.model} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Authorization: {server.get_headers()['Authorization']}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writers = []

    async def request_once() -> tuple[int, float]:
        start = time.monotonic()
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.ports["inference_address"])
            writers.append(writer)
            writer.write(head.encode() + body)
            line = await asyncio.wait_for(reader.readline(), PATIENCE)
            return int(line.split()[1]), time.monotonic() - start
        except (TimeoutError, OSError, IndexError):
            return 0, time.monotonic() - start

    answers = await asyncio.gather(*(request_once() for _ in range(clients)))
    for writer in writers:
        writer.close()
    return answers
