"""Make one attempt at a job: request the images as a stream, with steps and previews."""

import base64
import contextlib
import functools
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

import requests
from asgiref.sync import async_to_sync

from jobs.database import AwayError, Result, wait_for_database
from jobs.results import Results
from jobs.settings import Settings
from jobs.store import Store
from sdxl_server.serving.client import send_request
from sdxl_server.serving.readiness import NotReadyError, read_token

logger = logging.getLogger(__name__)

BUSY_SECONDS = 1  # between two requests to a busy TorchServe
AWAY_SECONDS = 10  # without reports, so that a silent database does not delay the stream


class JobError(RuntimeError):
    """A job has failed, and would fail again."""


class LostError(RuntimeError):
    """TorchServe did not finish the request. Another attempt may succeed."""


class StoppedError(RuntimeError):
    """The job was cancelled, or another attempt has it."""


def make_headers(settings: Settings) -> dict[str, str]:
    """Return the header with TorchServe's API key, which changes at each start.

    Raises:
        LostError: there is none.
    """
    if not settings.key_file:
        return {}
    try:
        return {"Authorization": f"Bearer {read_token(Path(settings.key_file), 'inference')}"}
    except NotReadyError as error:
        raise LostError(str(error)) from error


def is_ready(settings: Settings) -> bool:
    """Say whether TorchServe answers. Its worker may be busy with other requests."""
    address = f"{settings.predictions}/1.0/v1/models"
    with contextlib.suppress(requests.RequestException, LostError):
        return send_request("GET", address, headers=make_headers(settings), timeout=30).status_code == HTTPStatus.OK
    return False


class Attempt:
    """An attempt at a job, in a thread of the worker.

    Args:
        lease: the attempt's, see `Store`.
    """

    def __init__(self, lease: int, *, store: Store, results: Results, settings: Settings) -> None:
        self._lease, self._store, self._results, self._settings = lease, store, results, settings
        self._silent_until = 0.0

    def run(self) -> None:
        """Draw the job's images, and end the job or give it to another attempt."""
        job = self._keep(self._store.start)
        if job is None:
            return
        try:
            images = self._request(job["id"], json.loads(job["fields"]))
            names = [self._results.write(self._lease, index, *image) for index, image in enumerate(images)]
            size = sum(len(image) for image, _ in images)
            if not self._keep(self._store.end, "done", results=names, size=size):
                for name in names:
                    self._results.remove(name)
        except StoppedError:
            logger.info("Job %s was cancelled, or another attempt has it", job["id"])
        except JobError as error:
            self._keep(self._store.end, "failed", str(error))
        except (LostError, requests.RequestException, OSError) as error:
            logger.warning("Job %s: %s", job["id"], error)
            self._keep(self._store.restart, f"the image was lost: {error}")
        except Exception as error:  # the job must end, and its worker continue
            logger.exception("Job %s failed", job["id"])
            self._keep(self._store.end, "failed", f"{type(error).__name__} in the worker, whose log says more")

    def _keep(self, change: Callable[..., Awaitable[Result]], *arguments: Any, **options: Any) -> Result:
        return async_to_sync(wait_for_database)(functools.partial(change, self._lease, *arguments, **options))

    def _report(self, **figures: Any) -> None:
        """Report figures, or none while the database is away.

        Raises:
            StoppedError: the attempt is to stop.
        """
        if time.monotonic() < self._silent_until:
            return
        try:
            is_current = async_to_sync(self._store.report)(self._lease, **figures)
        except AwayError as error:
            logger.warning("%s", error)
            self._silent_until = time.monotonic() + AWAY_SECONDS
        else:
            if not is_current:
                raise StoppedError

    def _request(self, job: str, fields: Mapping[str, Any]) -> list[tuple[bytes, str]]:
        """Return the images of a job and their kinds.

        Raises:
            JobError, LostError, StoppedError, requests.RequestException: there are none.
        """
        wanted = int(fields.get("num_images_per_prompt") or 1)
        deadline = time.monotonic() + self._settings.silent_seconds
        while True:
            headers = {"X-Request-Id": job, **make_headers(self._settings)}
            with send_request(
                *("POST", self._settings.predictions),
                json={**fields, "stream": True},
                headers=headers,
                stream=True,
                timeout=(10, self._settings.silent_seconds),
            ) as answer:
                if answer.status_code == HTTPStatus.OK:
                    return self._follow(answer, wanted)
                has_old_key = answer.status_code == HTTPStatus.BAD_REQUEST and "InvalidKeyException" in answer.text
                if has_old_key and time.monotonic() > deadline:
                    raise LostError("TorchServe refuses the API key in JOBS_KEY_FILE")
                if not has_old_key and answer.status_code != HTTPStatus.SERVICE_UNAVAILABLE:
                    refuse(answer)
            time.sleep(BUSY_SECONDS)
            self._report()

    def _follow(self, answer: requests.Response, wanted: int) -> list[tuple[bytes, str]]:
        """Read a stream to its end; return the images and their kinds.

        Raises:
            JobError, LostError, StoppedError, requests.RequestException: there are none.
        """
        images: dict[int, tuple[bytes, str]] = {}
        for event in read_events(answer):
            kind, figures = str(event["type"]), {}
            if kind == "error":
                is_lost = event["error"]["code"] == HTTPStatus.SERVICE_UNAVAILABLE
                raise (LostError if is_lost else JobError)(event["error"]["message"])
            if kind.endswith(".completed"):
                images[event["index"]] = base64.b64decode(event["b64_json"]), event["output_format"]
            elif kind.endswith(".partial_image"):
                figures = {"preview": base64.b64decode(event["b64_json"])}
            elif kind == "progress":
                figures = {name: event[name] for name in ("step", "total", "seconds_left")}
            self._report(**figures)
        if len(images) < wanted:
            raise LostError(f"the stream ended after {len(images)} of {wanted} images")
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
