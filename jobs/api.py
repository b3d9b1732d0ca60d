"""The jobs' API: `uvicorn jobs.api:app --host 127.0.0.1 --port 8090`, behind nginx, which checks tokens."""

import contextlib
import hashlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from http import HTTPStatus
from pathlib import Path as File
from typing import Annotated, Any

import redis
import requests
from fastapi import Body, FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel

from jobs.drawing import LostError, make_headers
from jobs.results import Results
from jobs.settings import Settings
from jobs.store import Store
from jobs.sweeping import Sweeper
from jobs.tasks import work
from sdxl_server.schemas import describe_schema, is_valid, shorten
from sdxl_server.serving.client import send_request

FEW_TRIES = 3  # the client retries, and the sweeper must notice that Redis was away
SCHEMA_SECONDS = 60  # the server's fields are cached this long
NOT_OF_JOBS = ("stream", "response_format")
MEDIA = {b"\x89P": "image/png", b"\xff\xd8": "image/jpeg", b"RI": "image/webp"}
Id = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{8,64}$", description="chosen by the client, or by POST")]
Fields = Annotated[dict[str, Any], Body(description="a GenerationRequest of the model's own OpenAPI document")]


class JobState(BaseModel):
    """Where a job stands."""

    id: str
    state: str
    place: int | None = None
    step: int | None = None
    total: int | None = None
    seconds_left: float | None = None
    attempt: int = 0
    message: str | None = None
    created: float
    ended: float | None = None
    preview: str | None = None
    pictures: list[str] = []


class ApiError(Exception):
    """An error of the API."""

    def __init__(self, status: HTTPStatus, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param


class Jobs:
    """The state of the API's process."""

    def __init__(self) -> None:
        self.settings = Settings.read()
        self.store = Store(self.settings.redis, tries=FEW_TRIES)
        self.results = Results(self.settings.folder)
        self.sweeper = Sweeper(self.store, self.results, self.settings)
        self._schema: tuple[float, dict[str, Any]] = (float("-inf"), {})

    def read_fields(self) -> dict[str, Any]:
        """Return the schemas of the server's fields; empty while it is down, and then the worker checks."""
        at, fields = self._schema
        if time.monotonic() - at > SCHEMA_SECONDS:
            with contextlib.suppress(requests.RequestException, LostError, ValueError, LookupError):
                address = f"{self.settings.predictions}/1.0/openapi.json"
                document = send_request("GET", address, headers=make_headers(self.settings), timeout=5).json()
                fields = document["components"]["schemas"]["GenerationRequest"]["properties"]
                self._schema = time.monotonic(), fields
        return fields

    def check(self, fields: Mapping[str, Any]) -> None:
        """Refuse fields that TorchServe would refuse later.

        Raises:
            ApiError: names the field, what is accepted and what was given.
        """
        taken = self.read_fields()
        for name, value in fields.items():
            if name in NOT_OF_JOBS:
                raise ApiError(HTTPStatus.BAD_REQUEST, f"{name} has no place in a job; leave it out", name)
            if taken and name not in taken:
                raise ApiError(HTTPStatus.BAD_REQUEST, f"{shorten(name)} is not a field", shorten(name))
            if taken and not is_valid(value, taken[name]):
                raise ApiError(
                    HTTPStatus.BAD_REQUEST, f"{name} takes {describe_schema(taken[name])}, not {shorten(value)}", name
                )
        if "prompt" not in fields:
            raise ApiError(HTTPStatus.BAD_REQUEST, "prompt is missing", "prompt")

    def submit(self, job: str, fields: dict[str, Any], response: Response) -> JobState:
        """Accept a job, or return the one with this id.

        Raises:
            ApiError: it is wrong, another one has its id, or there is no room.
        """
        self.check(fields)
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
        self.results.write_request(job, digest, fields)
        outcome = self.store.submit(job, digest, max_waiting=self.settings.max_waiting)
        if outcome == "full":
            self.results.remove(job)
            message = f"{self.settings.max_waiting} jobs wait, which is the limit; ask again later"
            raise ApiError(HTTPStatus.SERVICE_UNAVAILABLE, message)
        if outcome == "known" and self.store.read(job).get("digest") != digest:
            raise ApiError(HTTPStatus.CONFLICT, f"job {job} exists and asks for something else", "id")
        if outcome == "new":
            work.delay()
        response.status_code = HTTPStatus.ACCEPTED
        response.headers["Location"] = f"/jobs/{job}"
        return self.describe(job)

    def describe(self, job: str) -> JobState:
        """Return where a job stands.

        Raises:
            ApiError: there is none of this id.
        """
        known = self.store.read(job)
        if not known:
            raise ApiError(
                HTTPStatus.NOT_FOUND, f"there is no job {job}; a job is removed some time after its end", "id"
            )
        state, attempt = known["state"], int(known["attempt"])
        images = self.results.list_images(job, attempt) if state == "done" else []
        has_preview = state == "running" and self.results.find_preview(job) is not None
        named = {name: known[name] for name in ("step", "total", "seconds_left", "ended") if name in known}
        return JobState(
            id=job,
            state=state,
            place=self.store.find_place(job) if state == "waiting" else None,
            attempt=attempt,
            message=known.get("message") or None,
            created=float(known["created"]),
            preview=f"/jobs/{job}/preview" if has_preview else None,
            pictures=[f"/jobs/{job}/pictures/{index}" for index in range(len(images))],
            **named,  # type: ignore[arg-type]
        )


@contextlib.asynccontextmanager
async def run_sweeper(app: FastAPI) -> AsyncIterator[None]:
    """Run the sweeper while the API runs."""
    app.state.jobs = Jobs()
    app.state.jobs.sweeper.start()
    yield
    app.state.jobs.sweeper.stop()


app = FastAPI(title="Jobs of Stable Diffusion XL", version="1.0", lifespan=run_sweeper, docs_url=None, redoc_url=None)
app.router.redirect_slashes = False


@app.exception_handler(ApiError)
def tell_error(_: Request, error: ApiError) -> JSONResponse:
    """Return an error in the form of the model's own API."""
    kind = "server_busy" if error.status >= 500 else "invalid_request_error"
    told = {"message": str(error), "type": kind, "param": error.param, "code": int(error.status)}
    return JSONResponse({"error": told}, status_code=error.status)


@app.exception_handler(RequestValidationError)
def tell_mistake(request: Request, error: RequestValidationError) -> JSONResponse:
    """Answer a wrong path or body."""
    first = error.errors()[0]
    name = str(first["loc"][-1])
    message = f"{name}: {first['msg']}, not {shorten(first.get('input'))}"
    return tell_error(request, ApiError(HTTPStatus.BAD_REQUEST, message, name))


@app.exception_handler(redis.RedisError)
def tell_redis(request: Request, _: redis.RedisError) -> JSONResponse:
    """Answer without Redis."""
    return tell_error(request, ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "Redis is away; ask again later"))


@app.post("/jobs", status_code=HTTPStatus.ACCEPTED)
def post_job(request: Request, response: Response, fields: Fields) -> JobState:
    """Order images."""
    jobs: Jobs = request.app.state.jobs
    return jobs.submit(uuid.uuid4().hex, fields, response)


@app.put("/jobs/{job}", status_code=HTTPStatus.ACCEPTED)
def put_job(request: Request, response: Response, job: Id, fields: Fields) -> JobState:
    """Order images under an id. The same order again is the same job."""
    jobs: Jobs = request.app.state.jobs
    return jobs.submit(job, fields, response)


@app.get("/jobs/{job}")
def get_job(request: Request, job: Id) -> JobState:
    """Return a job's state."""
    jobs: Jobs = request.app.state.jobs
    return jobs.describe(job)


@app.delete("/jobs/{job}")
def delete_job(request: Request, job: Id) -> JobState:
    """Cancel a job: a waiting one at once, a running one within a step. A finished job stays."""
    jobs: Jobs = request.app.state.jobs
    jobs.describe(job)
    jobs.store.cancel(job)
    return jobs.describe(job)


@app.get("/jobs/{job}/preview", response_class=FileResponse)
def get_preview(request: Request, job: Id) -> FileResponse:
    """Return the newest preview, if the order has partial_images."""
    jobs: Jobs = request.app.state.jobs
    return send(jobs.results.find_preview(job) if jobs.describe(job).state == "running" else None)


@app.get("/jobs/{job}/pictures/{index}", response_class=FileResponse)
def get_picture(request: Request, job: Id, index: int) -> FileResponse:
    """Return an image of a finished job."""
    jobs: Jobs = request.app.state.jobs
    state = jobs.describe(job)
    found = jobs.results.list_images(job, state.attempt) if state.state == "done" else []
    return send(found[index] if 0 <= index < len(found) else None)


def send(path: File | None) -> FileResponse:
    """Return an image's file.

    Raises:
        ApiError: there is none.
    """
    if path is None:
        raise ApiError(HTTPStatus.NOT_FOUND, "there is no such image, or not yet")
    with path.open("rb") as file:
        kind = MEDIA[file.read(2)]
    return FileResponse(path, media_type=kind)
