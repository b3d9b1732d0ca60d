"""The rules of jobs, with a real PostgreSQL and procrastinate; TorchServe and webhooks' receivers are scripted."""

import asyncio
import hashlib
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from asgiref.sync import sync_to_async
from fastapi.testclient import TestClient
from procrastinate import RetryStrategy
from standardwebhooks import Webhook

from jobs import database, upkeep
from jobs.__main__ import main
from jobs.api import app
from jobs.database import AwayError, Database, wait_for_database
from jobs.drawing import Attempt
from jobs.results import Results
from jobs.settings import SettingError, Settings
from jobs.store import FullError, HolderFullError, Order, Store
from jobs.webhooks import DeliveryError, WebhookError, check_webhook, send_webhook
from tests.scripted import IMAGE, Server, answer, complete, make_event
from tools.postgres import LocalPostgres, find_postgres

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(find_postgres() is None, reason="postgresql is not installed"),
]
SECRET = "whsec_" + "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3"
Patch = pytest.MonkeyPatch
STEP = make_event("progress", step=1, total=2, seconds=1.0, seconds_left=3.5)


@pytest.fixture(scope="module")
def postgres() -> Iterator[LocalPostgres]:
    with LocalPostgres() as local:
        os.environ["JOBS_DATABASE"] = local.address
        assert main(["setup"]) == 0
        yield local
        del os.environ["JOBS_DATABASE"]


@dataclass
class Jobs:
    """A database without jobs, and what works on it."""

    database: Database
    settings: Settings
    holder: str = "anna"
    store: Store = field(init=False)

    def __post_init__(self) -> None:
        self.store = Store(self.database, self.settings)

    def change(self, **settings: Any) -> None:
        self.settings = self.settings.model_copy(update=settings)
        self.store = Store(self.database, self.settings)

    async def order(self, job: str, *, holder: str = "", webhook: str | None = None, **fields: Any) -> bool:
        text = json.dumps({"prompt": "a fox", **fields})
        digest = hashlib.sha256(text.encode()).hexdigest()
        order = Order(holder=holder or self.holder, id=job, digest=digest, fields=text, webhook=webhook)
        return await self.store.submit(order)

    async def read(self, job: str) -> dict[str, Any]:
        row = await self.store.describe(self.holder, job)
        assert row is not None
        return row

    async def find_lease(self, job: str) -> int:
        rows = await self.database.fetch("SELECT lease FROM image_jobs WHERE id = %s", job)
        return int(rows[0]["lease"])

    async def count_waiting(self, queue: str = "draw") -> int:
        query = "SELECT count(*) AS jobs FROM procrastinate_jobs WHERE status = 'todo' AND queue_name = %s"
        return int((await self.database.fetch(query, queue))[0]["jobs"])

    async def draw(self, job: str, server: Server | None = None) -> dict[str, Any]:
        """Make an attempt at a job; return the job."""
        changes = {"predictions": server.url} if server else {}
        settings = self.settings.model_copy(update=changes)
        results = Results(settings.results)
        attempt = Attempt(await self.find_lease(job), store=self.store, results=results, settings=settings)
        await sync_to_async(attempt.run, thread_sensitive=False)()
        return await self.read(job)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def jobs(postgres: LocalPostgres, tmp_path: Path) -> AsyncIterator[Jobs]:
    postgres.run_sql("DELETE FROM image_jobs", "DELETE FROM procrastinate_jobs")
    settings = Settings(database=postgres.address, results=str(tmp_path / "results"), webhook_secret=SECRET)
    async with Database(postgres.address) as connected:
        yield Jobs(connected, settings)


@pytest.fixture
def brief(monkeypatch: Patch) -> None:
    """Wait less for a database that is away."""
    monkeypatch.setattr(database, "CONNECT_SECONDS", 1)
    monkeypatch.setattr(database, "QUERY_SECONDS", 2)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        server.listen()
        yield server


async def test_the_same_order_is_one_job(jobs: Jobs) -> None:
    assert [await jobs.order("order-01"), await jobs.order("order-01")] == [True, True]
    assert await jobs.count_waiting() == 1
    assert not await jobs.order("order-01", seed=2)
    assert await jobs.count_waiting() == 1


async def test_holders_do_not_meet(jobs: Jobs) -> None:
    await jobs.order("order-01")
    assert await jobs.order("order-01", holder="ben", seed=2)  # an id of his own
    await jobs.order("order-02", holder="ben")
    assert [row["id"] for row in await jobs.store.list_newest("ben")] == ["order-02", "order-01"]
    assert await jobs.store.describe("anna", "order-02") is None
    await jobs.store.cancel("anna", "order-02")
    assert [row["state"] for row in await jobs.store.list_newest("ben")] == ["waiting", "waiting"]


async def test_places_follow_priority_and_never_grow(jobs: Jobs) -> None:
    jobs.change(priorities={"vip": 5})
    for number in range(3):
        await jobs.order(f"order-0{number}")
    assert [(await jobs.read(f"order-0{number}"))["place"] for number in range(3)] == [0, 1, 2]
    await jobs.store.start(await jobs.find_lease("order-00"))
    await jobs.store.restart(await jobs.find_lease("order-00"), "lost")
    assert [(await jobs.read(f"order-0{number}"))["place"] for number in range(3)] == [0, 0, 1]
    await jobs.order("order-vip", holder="vip")
    assert (await jobs.store.describe("vip", "order-vip") or {})["place"] == 0
    manager = jobs.database.app.job_manager
    claimed = await manager.fetch_job(["draw"], await manager.register_worker())
    assert claimed is not None
    assert claimed.id == await jobs.find_lease("order-00")  # the restarted one first


async def test_an_attempt_that_was_replaced_can_do_nothing(jobs: Jobs) -> None:
    await jobs.order("order-01")
    old = await jobs.find_lease("order-01")
    assert await jobs.store.start(old)
    await jobs.store.restart(old, "lost")
    new = await jobs.find_lease("order-01")
    assert await jobs.store.start(old) is None
    assert not await jobs.store.report(old, step=1)
    assert not await jobs.store.end(old, "done", results=["1-0.png"])
    await jobs.store.restart(old, "lost")
    assert await jobs.find_lease("order-01") == new
    assert (await jobs.read("order-01"))["attempt"] == 1
    await jobs.store.start(new)
    assert await jobs.store.end(new, "done", results=["2-0.png"])
    assert (await jobs.read("order-01"))["results"] == ["2-0.png"]


async def test_a_repeated_transaction_changes_nothing(jobs: Jobs) -> None:
    """The database may have kept a change although its confirmation was lost."""
    await jobs.order("order-01", webhook="https://example.org/")
    lease = await jobs.find_lease("order-01")
    for _ in range(2):
        await jobs.store.start(lease)
    assert (await jobs.read("order-01"))["attempt"] == 1
    for _ in range(2):
        assert await jobs.store.end(lease, "done", results=["1-0.png"], size=5)
    assert not await jobs.store.end(lease, "failed", "late")
    assert await jobs.count_waiting("webhooks") == 1


async def test_a_job_is_lost_twice_at_most(jobs: Jobs) -> None:
    await jobs.order("order-01")
    for _ in range(2):
        await jobs.store.start(await jobs.find_lease("order-01"))
        await jobs.store.restart(await jobs.find_lease("order-01"), "its worker was lost")
    row = await jobs.read("order-01")
    assert (row["state"], row["message"]) == ("failed", "its worker was lost; this was attempt 2")


async def test_cancelled_jobs(jobs: Jobs) -> None:
    for job in ("waiting-1", "running-1", "finished-1"):
        await jobs.order(job)
    running, finished = await jobs.find_lease("running-1"), await jobs.find_lease("finished-1")
    await jobs.store.start(running)
    await jobs.store.end(finished, "done", results=["1-0.png"])
    for job in ("waiting-1", "running-1", "finished-1"):
        await jobs.store.cancel("anna", job)
    assert [(await jobs.read(job))["state"] for job in ("waiting-1", "running-1", "finished-1")] == [
        *("cancelled", "cancelled", "done")
    ]
    assert not await jobs.store.report(running, step=1)
    assert not await jobs.store.end(running, "done")
    left = await jobs.database.fetch("SELECT id FROM procrastinate_jobs")
    assert left == [{"id": finished}]  # no worker has claimed it


@pytest.mark.parametrize(
    ("limit", "kind"),
    [
        ({"max_waiting": 1}, FullError),
        ({"max_waiting_of_holder": 1}, HolderFullError),
        ({"max_waiting_bytes": 35}, FullError),
    ],
)
async def test_a_full_queue_keeps_nothing(jobs: Jobs, limit: dict[str, int], kind: type[FullError]) -> None:
    jobs.change(**limit)
    await jobs.order("order-01")
    with pytest.raises(kind, match=r"wait"):
        await jobs.order("order-02")
    assert await jobs.order("order-01")  # it has its place
    if kind is HolderFullError:
        assert await jobs.order("order-02", holder="ben")
    assert await jobs.count_waiting() == len(await jobs.database.fetch("SELECT id FROM image_jobs"))


async def test_results_are_bounded_by_bytes_and_age(jobs: Jobs) -> None:
    results = Results(jobs.settings.results)
    for number in range(3):
        await jobs.order(f"order-0{number}")
        lease = await jobs.find_lease(f"order-0{number}")
        await jobs.store.end(lease, "done", results=[results.write(lease, 0, IMAGE, "jpeg")], size=len(IMAGE))
    jobs.change(keep_bytes=int(2.5 * len(IMAGE)))
    await jobs.store.remove_old()
    assert [row["id"] for row in await jobs.store.list_newest("anna")] == ["order-02", "order-01"]
    await upkeep.remove_unnamed(jobs.store, results)
    assert len(results.list_names()) == 2
    await jobs.database.fetch("UPDATE image_jobs SET ended = now() - interval '2 days' RETURNING id")
    await jobs.store.remove_old()
    await upkeep.remove_unnamed(jobs.store, results)
    assert results.list_names() == []


async def test_only_images_without_a_job_are_removed(jobs: Jobs) -> None:
    results = Results(jobs.settings.results)
    await jobs.order("order-01")
    lease = await jobs.find_lease("order-01")
    written = results.write(lease, 0, IMAGE, "jpeg")  # by an attempt that has not ended
    for name in ("999-0.jpeg", "notes.txt"):
        (Path(jobs.settings.results) / name).write_bytes(IMAGE)
    await upkeep.remove_unnamed(jobs.store, results)
    assert {path.name for path in Path(jobs.settings.results).iterdir()} == {written, "notes.txt"}


async def test_a_memory_filesystem_holds_results(jobs: Jobs) -> None:
    results = Results("memory://bucket/results")
    name = results.write(7, 0, IMAGE, "jpeg")
    assert (results.list_names(), results.read(name)) == ([name], IMAGE)
    results.remove(name)
    results.remove(name)
    assert (results.list_names(), results.read(name)) == ([], None)


async def test_a_job_that_procrastinate_lost_is_started_again(jobs: Jobs) -> None:
    await jobs.order("order-01")
    await jobs.database.fetch("DELETE FROM procrastinate_jobs RETURNING id")
    await upkeep.restart_lost(jobs.database, jobs.store, jobs.settings)
    assert await jobs.count_waiting() == 1


async def test_a_lost_worker(jobs: Jobs) -> None:
    manager = jobs.database.app.job_manager
    await jobs.order("order-01")
    worker = await manager.register_worker()
    job = await manager.fetch_job(["draw"], worker)
    assert job is not None
    assert job.id is not None
    await jobs.store.start(job.id)
    await upkeep.restart_lost(jobs.database, jobs.store, jobs.settings)
    assert await jobs.find_lease("order-01") == job.id  # its worker lives
    old = "UPDATE procrastinate_workers SET last_heartbeat = now() - interval '1 hour' RETURNING id"
    await jobs.database.fetch(old)
    await upkeep.restart_lost(jobs.database, jobs.store, jobs.settings)
    assert await jobs.find_lease("order-01") != job.id
    assert await jobs.count_waiting() == 1
    assert len(await jobs.database.fetch("SELECT id FROM procrastinate_jobs")) == 1


@pytest.mark.usefixtures("brief")
async def test_the_database_is_away(jobs: Jobs, postgres: LocalPostgres) -> None:
    await jobs.order("order-01")
    lease = await jobs.find_lease("order-01")
    await jobs.store.start(lease)
    postgres.run_sql("ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()")
    await asyncio.sleep(0.2)
    with pytest.raises(AwayError, match="read-only"):
        await jobs.order("order-02")
    postgres.run_sql("ALTER SYSTEM RESET default_transaction_read_only", "SELECT pg_reload_conf()")
    await asyncio.sleep(0.2)
    backends = psutil.Process(postgres.find_pid()).children()
    for backend in backends:
        backend.send_signal(signal.SIGSTOP)
    with pytest.raises(AwayError):
        await jobs.order("order-02")
    for backend in backends:
        backend.send_signal(signal.SIGCONT)
    postgres.stop()
    with pytest.raises(AwayError):
        await jobs.order("order-02")
    delivery = asyncio.create_task(wait_for_database(lambda: jobs.store.end(lease, "done", results=["1-0.png"])))
    await asyncio.sleep(1)
    await asyncio.to_thread(postgres.start)
    assert await delivery
    assert [row["id"] for row in await jobs.store.list_newest("anna")] == ["order-01"]


async def test_the_images_are_stored(jobs: Jobs, server: Server) -> None:
    await jobs.order("order-01", num_images_per_prompt=2)
    preview = complete(b"preview", index=0, partial_image_index=0)
    stream = preview + STEP + complete(index=1, output_format="png") + complete(index=0, output_format="png")
    server.steps = [answer(b"queue", status=503, kind="text/plain"), answer(stream)]
    row = await jobs.draw("order-01", server)
    assert (row["state"], row["step"], row["total"], row["attempt"]) == ("done", 1, 2, 1)
    assert [Results(jobs.settings.results).read(name) for name in row["results"]] == [IMAGE, IMAGE]
    assert json.loads(server.requests[1].body)["stream"]
    assert server.requests[1].headers["X-Request-Id"] == "order-01"
    stored = (await jobs.database.fetch("SELECT fields, preview, bytes FROM image_jobs"))[0]
    assert stored == {"fields": "", "preview": None, "bytes": 2 * len(IMAGE)}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (STEP + complete(output_format="png"), 200, "the image was lost: the stream ended after 1 of 2 images"),
        (b"", 200, "the image was lost: the stream ended after 0 of 2 images"),
        ({"error": {"message": "the worker died"}}, 500, "the image was lost: the worker died"),
        (make_event("error", error={"message": "it restarts", "code": 503}), 200, "the image was lost: it restarts"),
    ],
)
async def test_a_lost_image_is_drawn_again_once(
    jobs: Jobs, server: Server, body: Any, status: int, message: str
) -> None:
    await jobs.order("order-01", num_images_per_prompt=2)
    server.steps = [answer(body, status=status)] * 2
    row = await jobs.draw("order-01", server)
    assert (row["state"], row["step"], row["place"], row["attempt"]) == ("waiting", None, 0, 1)
    row = await jobs.draw("order-01", server)
    assert (row["state"], row["message"]) == ("failed", f"{message}; this was attempt 2")
    await upkeep.remove_unnamed(jobs.store, results := Results(jobs.settings.results))
    assert results.list_names() == []


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"error": {"message": "width takes 64 to 2048"}}, 400, "width takes 64 to 2048"),
        ({"error": {"message": "it took too long"}}, 504, "it took too long"),
        (make_event("error", error={"message": "no numbers", "code": 500}), 200, "no numbers"),
        (b"no JSON", 404, "TorchServe answered 404"),
    ],
)
async def test_an_order_that_cannot_be_drawn_fails(
    jobs: Jobs, server: Server, body: Any, status: int, message: str
) -> None:
    await jobs.order("order-01")
    server.steps = [answer(body, status=status)]
    row = await jobs.draw("order-01", server)
    assert (row["state"], row["message"], row["attempt"]) == ("failed", message, 1)


async def test_a_restarted_torchserve_has_another_key(jobs: Jobs, server: Server, tmp_path: Path) -> None:
    key_file = tmp_path / "key_file.json"
    key_file.write_text(json.dumps({"inference": {"key": "old"}}))
    jobs.change(key_file=str(key_file))
    await jobs.order("order-01")
    refusal = answer({"code": 400, "type": "InvalidKeyException", "message": "Token Authorization failed."}, status=400)

    def restart(handler: Any) -> None:
        refusal(handler)
        key_file.write_text(json.dumps({"inference": {"key": "new"}}))

    server.steps = [restart, answer(complete(output_format="png"))]
    assert (await jobs.draw("order-01", server))["state"] == "done"
    assert [request.headers["Authorization"] for request in server.requests] == ["Bearer old", "Bearer new"]


async def test_a_cancelled_job_leaves_no_images(jobs: Jobs, server: Server) -> None:
    await jobs.order("order-01")
    loop = asyncio.get_running_loop()

    def cancel(handler: Any) -> None:
        asyncio.run_coroutine_threadsafe(jobs.store.cancel("anna", "order-01"), loop).result(10)
        answer(complete(output_format="png"))(handler)

    server.steps = [cancel]
    assert (await jobs.draw("order-01", server))["state"] == "cancelled"
    assert Results(jobs.settings.results).list_names() == []


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("MAX_WAITING", "0", "JOBS_MAX_WAITING: Input should be greater than 0, not '0'"),
        ("LOST_SECONDS", "soon", "JOBS_LOST_SECONDS: Input should be a valid integer"),
        ("PRIORITIES", "anna=high", "JOBS_PRIORITIES: Input should be a valid integer"),
        ("PRIORITIES", "anna=100", "JOBS_PRIORITIES: Input should be less than 100"),
        ("WEBHOOKS", "https://example.org", "JOBS_WEBHOOK_SECRET: "),
    ],
)
def test_wrong_variables(name: str, value: str, words: str, monkeypatch: Patch) -> None:
    monkeypatch.setenv(f"JOBS_{name}", value)
    with pytest.raises(SettingError) as caught:
        Settings.read()
    assert str(caught.value).startswith(words)


HOOKS = ["https://example.org", "http://10.0.0.5:9000"]


@pytest.mark.parametrize(
    "address",
    [
        "https://example.org.evil.com/",
        "https://example.org@evil.com/",
        "https://example.org:8443/",
        "http://example.org/",
        "http://10.0.0.5/",
        "//example.org/",
        "file:///etc/passwd",
        "https://example.org/\r\nHost: x",
        "https://example.org/é",
        "https://example.org/" + "a" * 2000,
        ["https://example.org/"],
        "",
        7,
    ],
)
def test_webhooks_go_to_listed_origins_only(address: Any) -> None:
    settings = Settings(webhooks=HOOKS, webhook_secret=SECRET)
    assert check_webhook("https://example.org/done?a=b", settings) == "https://example.org/done?a=b"
    with pytest.raises(WebhookError, match=r"takes an address at https://example.org or http://10.0.0.5:9000, not"):
        check_webhook(address, settings)
    with pytest.raises(WebhookError, match="the operator allows no address"):
        check_webhook(address, Settings())


JOB = {"id": "order-01", "state": "done", "message": None, "results": ["1-0.png"], "ended": 1.5}


def test_a_private_address_must_be_listed(server: Server) -> None:
    origin = f"http://localhost:{server.server_port}"
    job = {**JOB, "webhook": f"{origin}/done"}
    with pytest.raises(WebhookError, match=r"localhost has the private address \S+, which JOBS_WEBHOOKS does not list"):
        send_webhook(job, Settings(webhooks=[origin], webhook_secret=SECRET))
    assert not server.requests
    send_webhook(job, Settings(webhooks=[origin, "127.0.0.0/8", "::1/128"], webhook_secret=SECRET))
    assert server.requests[0].headers["Host"] == f"localhost:{server.server_port}"


@pytest.mark.parametrize("status", [301, 404, 500])
def test_a_webhook_that_is_not_accepted(server: Server, status: int) -> None:
    origin = f"http://127.0.0.1:{server.server_port}"
    server.steps = [answer(b"", status=status, headers={"Location": f"{origin}/elsewhere"})] * 2
    with pytest.raises(DeliveryError, match=f"answers {status}"):
        send_webhook({**JOB, "webhook": f"{origin}/done"}, Settings(webhooks=[origin], webhook_secret=SECRET))
    assert [request.path for request in server.requests] == ["/done"]


async def test_a_webhook_is_signed_and_retried(jobs: Jobs, server: Server, monkeypatch: Patch) -> None:
    monkeypatch.setattr(upkeep, "RETRIES", RetryStrategy(max_attempts=8, retry_exceptions={DeliveryError}))
    monkeypatch.setattr(upkeep, "POLL_SECONDS", 0.2)
    origin = f"http://127.0.0.1:{server.server_port}"
    jobs.change(webhooks=[origin])
    server.steps = [answer(b"", status=500), answer(b"", status=500), answer(b"", status=204)]
    await jobs.order("order-01", webhook=f"{origin}/done?key=1")
    sender = asyncio.create_task(upkeep.send_webhooks(jobs.database, jobs.store, jobs.settings))
    await jobs.store.end(await jobs.find_lease("order-01"), "done", results=["1-0.png"])
    open_hooks = "SELECT id FROM procrastinate_jobs WHERE queue_name = 'webhooks'"
    while len(server.requests) < 3 or await jobs.database.fetch(open_hooks):
        await asyncio.sleep(0.05)
    sender.cancel()
    await asyncio.gather(sender, return_exceptions=True)
    assert [request.path for request in server.requests] == ["/done?key=1"] * 3
    assert len({request.headers["webhook-id"] for request in server.requests}) == 1
    last = server.requests[-1]
    content = Webhook(SECRET).verify(last.body, dict(last.headers.items()))
    assert (content["type"], content["data"]) == (
        "job.done",
        {"id": "order-01", "state": "done", "message": None, "images": 1},
    )


@pytest.fixture
def client(postgres: LocalPostgres, server: Server, tmp_path: Path, monkeypatch: Patch) -> Iterator[TestClient]:
    postgres.run_sql("DELETE FROM image_jobs", "DELETE FROM procrastinate_jobs")
    monkeypatch.setenv("JOBS_RESULTS", str(tmp_path))
    monkeypatch.setenv("JOBS_PREDICTIONS", server.url)
    monkeypatch.setenv("JOBS_MAX_WAITING_OF_HOLDER", "2")
    server.steps = [answer(b"", status=503)] * 9  # it does not describe its fields
    with TestClient(app) as client:
        yield client


def test_the_api(client: TestClient, postgres: LocalPostgres) -> None:
    order, anna, ben = {"prompt": "a fox"}, {"X-Holder": "anna"}, {"X-Holder": "ben"}
    accepted = client.put("/jobs/order-01", json=order, headers=anna)
    assert (accepted.status_code, accepted.headers["Location"]) == (202, "/jobs/order-01")
    other = client.put("/jobs/order-01", json={"prompt": "a cat"}, headers=anna)
    assert (other.status_code, other.json()["error"]["param"]) == (409, "id")
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/preview"), ("GET", "/pictures/0")):
        assert client.request(method, f"/jobs/order-01{path}", headers=ben).status_code == 404
    assert [job["id"] for job in client.get("/jobs", headers=anna).json()] == ["order-01"]
    assert client.get("/jobs", headers=ben).json() == []
    read = client.get("/jobs/order-01", headers=anna)
    assert (read.json()["state"], read.json()["place"], read.headers["Retry-After"]) == ("waiting", 0, "1")
    known = {**anna, "If-None-Match": read.headers["ETag"]}
    assert client.get("/jobs/order-01", headers=known).status_code == 304
    assert client.post("/jobs", json=order, headers=anna).status_code == 202
    full = client.post("/jobs", json=order, headers=anna)
    assert (full.status_code, full.headers["Retry-After"]) == (429, "5")
    assert client.delete("/jobs/order-01", headers=anna).json()["state"] == "cancelled"
    ended = client.get("/jobs/order-01", headers=known)
    assert (ended.status_code, "Retry-After" in ended.headers) == (200, False)


@pytest.mark.parametrize(
    ("method", "path", "body", "words"),
    [
        ("POST", "/jobs", {}, "prompt is missing"),
        ("POST", "/jobs", {"prompt": "a", "stream": True}, "stream has no place in a job"),
        ("POST", "/jobs", {"prompt": "a", "webhook": "https://example.org"}, "the operator allows no address"),
        ("POST", "/jobs", [1], "Input should be a valid dictionary"),
        ("PUT", "/jobs/short", {"prompt": "a"}, "job: String should match"),
    ],
)
def test_mistakes(client: TestClient, method: str, path: str, body: Any, words: str) -> None:
    refused = client.request(method, path, json=body)
    assert refused.status_code == 400
    assert words in refused.json()["error"]["message"]


@pytest.mark.usefixtures("brief")
def test_the_api_without_a_database(client: TestClient, postgres: LocalPostgres) -> None:
    postgres.run_sql("ALTER TABLE image_jobs RENAME TO elsewhere")
    missing = client.get("/jobs")
    postgres.run_sql("ALTER TABLE elsewhere RENAME TO image_jobs")
    assert (missing.status_code, "run python -m jobs setup" in missing.json()["error"]["message"]) == (503, True)
    postgres.stop()
    for method, path in (("POST", "/jobs"), ("GET", "/jobs/order-01")):
        away = client.request(method, path, json={"prompt": "a"})
        assert (away.status_code, away.headers["Retry-After"]) == (503, "5")
        assert away.json()["error"]["message"] == "the database is away; ask again later"
    postgres.start()
    assert client.get("/jobs").json() == []
