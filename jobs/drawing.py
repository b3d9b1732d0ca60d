"""Make one attempt at a job: request the images as a stream, with steps and previews."""

import base64
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

import requests

from jobs.results import Results
from jobs.settings import Settings
from jobs.store import Claim, Store
from sdxl_server.serving.client import send_request
from sdxl_server.serving.readiness import NotReadyError, read_token

logger = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
PAUSE_SECONDS = 1.0
# Between two bytes of a stream. TorchServe ends its worker earlier, after responseTimeout.
SILENT_SECONDS = 3600


class JobError(RuntimeError):
    """A job has failed, and would fail again."""


class LostError(RuntimeError):
    """TorchServe did not finish the request. Another attempt may succeed."""


class StoppedError(RuntimeError):
    """The job was cancelled or has passed to another worker."""


class Pulse:
    """Sends a job's heartbeat during its work, also in steps that take minutes."""

    def __init__(self, store: Store, claim: Claim) -> None:
        self._store, self._claim, self._is_over = store, claim, threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def _beat(self) -> None:
        while not self._is_over.wait(BEAT_SECONDS):
            self._store.beat(self._claim)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._is_over.set()


def make_headers(settings: Settings) -> dict[str, str]:
    """Return the header with TorchServe's token, which changes at each start.

    Raises:
        LostError: there is none.
    """
    if not settings.key_file:
        return {}
    try:
        return {"Authorization": f"Bearer {read_token(Path(settings.key_file), 'inference')}"}
    except NotReadyError as error:
        raise LostError(str(error)) from error


def is_free(settings: Settings) -> bool:
    """Say whether TorchServe answers. Its worker may be busy with other requests."""
    try:
        answer = send_request(
            "GET", f"{settings.predictions}/1.0/v1/models", headers=make_headers(settings), timeout=30
        )
    except (requests.RequestException, LostError):
        return False
    return answer.status_code == HTTPStatus.OK


def work_on(claim: Claim, store: Store, results: Results, settings: Settings) -> None:
    """Make one attempt at a job and store its outcome."""
    with Pulse(store, claim):
        try:
            images = draw(claim, store, results, settings)
            results.write_images(claim.job, claim.attempt, images)
            store.end(claim, "done")
        except JobError as error:
            store.end(claim, "failed", str(error))
        except (LostError, requests.RequestException) as error:
            logger.warning("Job %s, attempt %d: %s", claim.job, claim.attempt, error)
            store.end(claim, "again", f"TorchServe was lost, twice: {error}")
        except StoppedError:
            store.end(claim, "cancelled")
        except Exception as error:  # the job must end, and its worker continue
            logger.exception("Job %s failed", claim.job)
            store.end(claim, "failed", f"{type(error).__name__} in the worker, whose log says more")


def draw(claim: Claim, store: Store, results: Results, settings: Settings) -> list[bytes]:
    """Return the images of a job.

    Raises:
        JobError, LostError, StoppedError, requests.RequestException: there are none.
    """
    fields = {**results.read_request(claim.job, store.read(claim.job)["digest"]), "stream": True}
    headers = {"X-Request-Id": claim.job, **make_headers(settings)}
    while True:
        if not store.beat(claim):
            raise StoppedError
        with send_request(
            "POST", settings.predictions, json=fields, headers=headers, stream=True, timeout=(10, SILENT_SECONDS)
        ) as answer:
            if answer.status_code == HTTPStatus.OK:
                return follow(answer, claim, store, results)
            if answer.status_code != HTTPStatus.SERVICE_UNAVAILABLE:
                refuse(answer)
        time.sleep(PAUSE_SECONDS)


def follow(answer: requests.Response, claim: Claim, store: Store, results: Results) -> list[bytes]:
    """Read a stream to its end; return the images.

    Raises:
        JobError, LostError, StoppedError, requests.RequestException: there are none.
    """
    images: dict[int, bytes] = {}
    for event in read_events(answer):
        kind = str(event["type"])
        if kind == "error":
            raise JobError(event["error"]["message"])
        if kind.endswith(".completed"):
            images[event["index"]] = base64.b64decode(event["b64_json"])
        elif kind.endswith(".partial_image"):
            results.write_preview(claim.job, base64.b64decode(event["b64_json"]))
        figures = {name: event[name] for name in ("step", "total", "seconds_left") if kind == "progress"}
        if not store.beat(claim, figures):
            raise StoppedError
    if not images:
        raise LostError("the stream ended before the image")
    return [images[index] for index in sorted(images)]


def read_events(answer: requests.Response) -> Iterator[Mapping[str, Any]]:
    """Yield a stream's events. Each has one line of data."""
    for line in answer.iter_lines(chunk_size=2**20):
        if line.startswith(b"data: "):
            yield json.loads(line.removeprefix(b"data: "))


def refuse(answer: requests.Response) -> None:
    """Raise the error of a response without a stream.

    Raises:
        JobError: the job is wrong, or took too long.
        LostError: TorchServe lost it.
    """
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = f"TorchServe answered {answer.status_code}"
    is_final = answer.status_code < 500 or answer.status_code == HTTPStatus.GATEWAY_TIMEOUT
    raise JobError(message) if is_final else LostError(message)
