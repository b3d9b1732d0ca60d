"""The jobs' API: `uvicorn jobs.api:app --host 127.0.0.1 --port 8090`, behind nginx, which checks API keys."""

import asyncio
import contextlib
import hashlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from typing import Annotated, Any

import psycopg
import requests
from fastapi import Body, FastAPI, Header, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from jobs.database import AwayError, Database
from jobs.drawing import LostError, make_headers
from jobs.results import Results
from jobs.settings import Settings
from jobs.store import FullError, HolderFullError, Order, Store
from jobs.upkeep import keep_jobs, send_webhooks
from jobs.webhooks import WebhookError, check_webhook
from sdxl_server.api.metadata import read_metadata
from sdxl_server.errors import RequestError
from sdxl_server.request.limits import Limits
from sdxl_server.schemas import describe_schema, is_valid, shorten
from sdxl_server.serving.client import send_request

SCHEMA_SECONDS = 60  # the server's fields are cached this long
RETRY_SECONDS = 5
MAX_POLL_SECONDS = 10
NOT_OF_JOBS = ("stream", "response_format")
MEDIA = {b"\x89P": "image/png", b"\xff\xd8": "image/jpeg", b"RI": "image/webp"}
Id = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{8,64}$", description="chosen by the client, or by POST")]
Holder = Annotated[str, Header(alias="X-Holder", description="nginx sends the owner of the API key")]
Fields = Annotated[dict[str, Any], Body(description="a GenerationRequest of the model's own API, and a webhook")]


class JobState(BaseModel):
    """Where a job stands."""

    id: str
    state: str
    place: int | None
    step: int | None
    total: int | None
    seconds_left: float | None
    attempt: int
    message: str | None
    created: float
    ended: float | None
    preview: str | None
    pictures: list[str]


class ApiError(Exception):
    """An error of the API."""

    def __init__(self, status: HTTPStatus, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


class Orders:
    """Checks orders by the fields of the running server."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._schema: tuple[float, dict[str, Any]] = (float("-inf"), {})

    def read(self, fields: dict[str, Any], *, holder: str, job: str) -> Order:
        """Return the order of a request.

        Raises:
            ApiError: names the field, what is accepted and what was given.
        """
        fields = dict(fields)
        try:
            webhook = check_webhook(fields.pop("webhook"), self._settings) if "webhook" in fields else None
        except WebhookError as error:
            raise ApiError(HTTPStatus.BAD_REQUEST, str(error), "webhook") from error
        taken = self._read_schema()
        for name, value in fields.items():
            if name in NOT_OF_JOBS:
                raise ApiError(HTTPStatus.BAD_REQUEST, f"{name} has no place in a job; leave it out", name)
            if taken and name not in taken:
                raise ApiError(HTTPStatus.BAD_REQUEST, f"{shorten(name)} is not a field", shorten(name))
            if taken and not is_valid(value, taken[name]):
                message = f"{name} takes {describe_schema(taken[name])}, not {shorten(value)}"
                raise ApiError(HTTPStatus.BAD_REQUEST, message, name)
        if "prompt" not in fields:
            raise ApiError(HTTPStatus.BAD_REQUEST, "prompt is missing", "prompt")
        text = json.dumps(fields, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return Order(holder=holder, id=job, digest=digest, fields=text, webhook=webhook)

    def _read_schema(self) -> Mapping[str, Any]:
        """Return the schemas of the server's fields; empty while it is down, and then the worker checks."""
        at, fields = self._schema
        if time.monotonic() - at > SCHEMA_SECONDS:
            with contextlib.suppress(requests.RequestException, LostError, ValueError, LookupError):
                address = f"{self._settings.predictions}/1.0/openapi.json"
                document = send_request("GET", address, headers=make_headers(self._settings), timeout=5).json()
                fields = document["components"]["schemas"]["GenerationRequest"]["properties"]
                self._schema = time.monotonic(), fields
        return fields


@contextlib.asynccontextmanager
async def run(app: FastAPI) -> AsyncIterator[None]:
    """Connect, and do the upkeep while the API runs."""
    settings = Settings.read()
    async with Database(settings.database) as database:
        store, results = Store(database, settings), Results(settings.results)
        app.state.store, app.state.results, app.state.orders = store, results, Orders(settings)
        tasks = [
            asyncio.create_task(keep_jobs(database, store, results, settings)),
            asyncio.create_task(send_webhooks(database, store, settings)),
        ]
        yield
        while tasks:
            for task in tasks:
                task.cancel()  # psycopg's pool loses some cancellations
            tasks = list((await asyncio.wait(tasks, timeout=1))[1])


app = FastAPI(title="Jobs of Stable Diffusion XL", version="1.0", lifespan=run, docs_url=None, redoc_url=None)
app.router.redirect_slashes = False


@app.exception_handler(ApiError)
def write_error(_: Request, error: ApiError) -> JSONResponse:
    """Return an error in the form of the model's own API."""
    kind = "server_busy" if error.status >= 500 else "invalid_request_error"
    content = {"message": str(error), "type": kind, "param": error.param, "code": int(error.status)}
    is_passing = error.status in (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.TOO_MANY_REQUESTS)
    headers = {"Retry-After": str(RETRY_SECONDS)} if is_passing else {}
    return JSONResponse({"error": content}, status_code=error.status, headers=headers)


@app.exception_handler(RequestValidationError)
def write_mistake(request: Request, error: RequestValidationError) -> JSONResponse:
    """Return the error of a wrong path or body."""
    first = error.errors()[0]
    name = str(first["loc"][-1])
    message = f"{name}: {first['msg']}, not {shorten(first.get('input'))}"
    return write_error(request, ApiError(HTTPStatus.BAD_REQUEST, message, name))


@app.exception_handler(AwayError)
@app.exception_handler(FullError)
@app.exception_handler(psycopg.errors.UndefinedTable)
def write_busy(request: Request, error: Exception) -> JSONResponse:
    """Return why nothing was kept."""
    message = str(error) if isinstance(error, FullError) else "the database is away; ask again later"
    if isinstance(error, psycopg.errors.UndefinedTable):
        message = "the database has no tables; run python -m jobs setup"
    is_own = isinstance(error, HolderFullError)
    status = HTTPStatus.TOO_MANY_REQUESTS if is_own else HTTPStatus.SERVICE_UNAVAILABLE
    return write_error(request, ApiError(status, message))


@app.get("/jobs")
async def list_jobs(request: Request, response: Response, holder: Holder = "") -> list[JobState]:
    """Return the holder's newest 100 jobs."""
    rows = await request.app.state.store.list_newest(holder)
    if seconds := [compute_pause(row) for row in rows if row["ended"] is None]:
        response.headers["Retry-After"] = str(min(seconds))
    return [describe(row) for row in rows]


@app.post("/jobs", response_model=JobState, status_code=HTTPStatus.ACCEPTED)
async def post_job(request: Request, fields: Fields, holder: Holder = "") -> Response:
    """Order images."""
    return await submit(request, uuid.uuid4().hex, fields, holder)


@app.put("/jobs/{job}", response_model=JobState, status_code=HTTPStatus.ACCEPTED)
async def put_job(request: Request, job: Id, fields: Fields, holder: Holder = "") -> Response:
    """Order images under an id. The same order again is the same job."""
    return await submit(request, job, fields, holder)


@app.get("/jobs/{job}", response_model=JobState)
async def get_job(request: Request, job: Id, holder: Holder = "") -> Response:
    """Return a job's state. If-None-Match with the last ETag gets 304 while nothing has changed."""
    return write_state(request, await find(request, job, holder))


@app.delete("/jobs/{job}", response_model=JobState)
async def delete_job(request: Request, job: Id, holder: Holder = "") -> Response:
    """Cancel a job: a waiting one at once, a running one within a step. A finished job stays."""
    await request.app.state.store.cancel(holder, job)
    return write_state(request, await find(request, job, holder))


@app.get("/jobs/{job}/preview")
async def get_preview(request: Request, job: Id, holder: Holder = "") -> Response:
    """Return the newest preview of a running job, if the order has partial_images."""
    return write_image(await request.app.state.store.read_preview(holder, job))


@app.get("/jobs/{job}/pictures/{index}")
async def get_picture(request: Request, job: Id, index: int, holder: Holder = "") -> Response:
    """Return an image of a finished job."""
    return write_image(await read_image(request, job, index, holder))


@app.get("/jobs/{job}/pictures/{index}/metadata")
async def get_metadata(request: Request, job: Id, index: int, holder: Holder = "") -> Response:
    """Return the metadata of an image of a finished job."""
    image = await read_image(request, job, index, holder)
    if image is None:
        return write_image(image)
    try:
        return JSONResponse(await asyncio.to_thread(read_metadata, image, Limits()))
    except RequestError as error:  # an operator can switch the metadata off
        raise ApiError(HTTPStatus.NOT_FOUND, str(error)) from error


async def read_image(request: Request, job: str, index: int, holder: str) -> bytes | None:
    """Return the file of an image; None if there is none."""
    names = (await find(request, job, holder))["results"]
    is_there = 0 <= index < len(names)
    return await asyncio.to_thread(request.app.state.results.read, names[index]) if is_there else None


async def find(request: Request, job: str, holder: str) -> dict[str, Any]:
    """Return a holder's job.

    Raises:
        ApiError: there is none of this id.
    """
    row: dict[str, Any] | None = await request.app.state.store.describe(holder, job)
    if row is None:
        message = f"there is no job {job}; a job is removed some time after its end"
        raise ApiError(HTTPStatus.NOT_FOUND, message, "id")
    return row


async def submit(request: Request, job: str, fields: dict[str, Any], holder: str) -> Response:
    """Keep an order; return its job.

    Raises:
        ApiError: the order is wrong, or another one has its id.
    """
    order = await asyncio.to_thread(request.app.state.orders.read, fields, holder=holder, job=job)
    if not await request.app.state.store.submit(order):
        raise ApiError(HTTPStatus.CONFLICT, f"job {job} exists and asks for something else", "id")
    response = write_state(request, await find(request, job, holder), HTTPStatus.ACCEPTED)
    response.headers["Location"] = f"/jobs/{job}"
    return response


def describe(row: Mapping[str, Any]) -> JobState:
    """Return where a job stands."""
    path = f"/jobs/{row['id']}"
    preview = f"{path}/preview" if row["has_preview"] else None
    pictures = [f"{path}/pictures/{index}" for index, _ in enumerate(row["results"])]
    return JobState.model_validate({**row, "preview": preview, "pictures": pictures})


def write_state(request: Request, row: Mapping[str, Any], status: HTTPStatus = HTTPStatus.OK) -> Response:
    """Return a job's state, with the seconds until the next question where it has not ended."""
    content = describe(row).model_dump_json()
    headers = {"ETag": f'"{hashlib.sha256(content.encode()).hexdigest()[:32]}"', "Cache-Control": "no-cache"}
    if row["ended"] is None:
        headers["Retry-After"] = str(compute_pause(row))
    if status == HTTPStatus.OK and request.headers.get("If-None-Match") == headers["ETag"]:
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
    return Response(content, status_code=status, headers=headers, media_type="application/json")


def compute_pause(row: Mapping[str, Any]) -> int:
    """Return the seconds until the next question about an open job."""
    return min(1 + (row["place"] or 0), MAX_POLL_SECONDS)


def write_image(image: bytes | None) -> Response:
    """Return an image.

    Raises:
        ApiError: there is none.
    """
    if image is None:
        raise ApiError(HTTPStatus.NOT_FOUND, "there is no such image, or not yet")
    return Response(image, media_type=MEDIA[image[:2]])
