"""The jobs: what clients see of them, and the transactions that change them.

Each attempt at a job is a job of procrastinate, whose id is the attempt's lease. Only the current lease changes a job.
So an attempt that was replaced can neither report nor deliver. A transaction may be repeated with the same outcome: a
database can end between a change and its confirmation. All methods raise AwayError while the database is away.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jobs.database import Connection, Database
from jobs.settings import RESTARTED, Settings

MAX_ATTEMPTS = 2
MAX_LISTED = 100
DESCRIBE = """
SELECT id, state, attempt, step, total, seconds_left, message, results, webhook, preview IS NOT NULL AS has_preview,
    extract(epoch FROM created)::float8 AS created, extract(epoch FROM ended)::float8 AS ended, place
FROM image_jobs LEFT JOIN (
    -- A job that is started again comes first. The others do not count it, so that no place grows.
    SELECT lease, CASE WHEN lease = rank THEN
        sum((lease = rank)::int) OVER (ORDER BY priority DESC, rank ROWS UNBOUNDED PRECEDING) - 1 ELSE 0 END AS place
    FROM image_jobs WHERE state = 'waiting'
) AS waiting USING (lease)
"""
END = """
UPDATE image_jobs SET state = %(state)s, message = %(message)s, results = %(results)s, bytes = %(bytes)s,
    ended = now(), fields = '', preview = NULL, seconds_left = NULL
WHERE lease = %(lease)s AND ended IS NULL RETURNING webhook
"""


@dataclass(frozen=True, kw_only=True)
class Order:
    """An order of images.

    Attributes:
        holder: the owner of the client's API key; empty without API keys.
        id: chosen by the client, or random.
        digest: of the fields.
        fields: the request, as JSON.
        webhook: the address that gets a message at the end.
    """

    holder: str
    id: str
    digest: str
    fields: str
    webhook: str | None = None


class FullError(RuntimeError):
    """There is no room for another order."""


class HolderFullError(FullError):
    """This holder has too many waiting jobs."""


class Store:
    """The jobs in a database."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database, self._settings = database, settings

    async def submit(self, order: Order) -> bool:
        """Keep an order. Return False if the holder has another order with its id.

        Raises:
            FullError: too many jobs wait.
        """
        priority = self._settings.priorities.get(order.holder, 0)
        async with self._database.transact() as connection:
            await connection.execute("SELECT pg_advisory_xact_lock(hashtext('image_jobs'))")  # counts stay true
            query = "SELECT digest FROM image_jobs WHERE holder = %s AND id = %s"
            if known := await (await connection.execute(query, (order.holder, order.id))).fetchone():
                return bool(known["digest"] == order.digest)
            await self._check_room(connection, order)
            lease = await self._defer(connection, priority)
            values = {**asdict(order), "bytes": len(order.fields), "priority": priority, "rank": lease, "lease": lease}
            names = ", ".join(values)
            marks = ", ".join(f"%({name})s" for name in values)
            await connection.execute(f"INSERT INTO image_jobs ({names}) VALUES ({marks})", values)
        return True

    async def describe(self, holder: str, job: str) -> dict[str, Any] | None:
        """Return what a holder sees of a job; None if there is no such job."""
        found = await self._database.fetch(f"{DESCRIBE} WHERE holder = %s AND id = %s", holder, job)
        return found[0] if found else None

    async def describe_attempt(self, lease: int) -> dict[str, Any] | None:
        """Return what the holder of this job sees of it; None if it was removed."""
        found = await self._database.fetch(f"{DESCRIBE} WHERE lease = %s", lease)
        return found[0] if found else None

    async def list_newest(self, holder: str) -> list[dict[str, Any]]:
        """Return a holder's newest jobs."""
        query = f"{DESCRIBE} WHERE holder = %s ORDER BY rank DESC LIMIT {MAX_LISTED}"
        return await self._database.fetch(query, holder)

    async def read_preview(self, holder: str, job: str) -> bytes | None:
        """Return the newest preview of a running job."""
        query = "SELECT preview FROM image_jobs WHERE holder = %s AND id = %s"
        return next((row["preview"] for row in await self._database.fetch(query, holder, job)), None)

    async def cancel(self, holder: str, job: str) -> None:
        """End a job, if it has not ended. Its worker notices at the next step."""
        query = "SELECT lease FROM image_jobs WHERE holder = %s AND id = %s AND ended IS NULL FOR UPDATE"
        async with self._database.transact() as connection:
            if row := await (await connection.execute(query, (holder, job))).fetchone():
                await self._end(connection, row["lease"], "cancelled")
                manager = self._database.app.job_manager
                await manager.cancel_job_by_id_async(row["lease"], delete_job=True, connection=connection)

    async def start(self, lease: int) -> Mapping[str, Any] | None:
        """Begin an attempt. Return the job's id and fields; None if it has ended or another attempt has it."""
        found = await self._database.fetch(
            "UPDATE image_jobs SET state = 'running', attempt = attempt + (state = 'waiting')::int"
            " WHERE lease = %s AND ended IS NULL RETURNING id, fields",
            lease,
        )
        return found[0] if found else None

    async def report(self, lease: int, **figures: Any) -> bool:
        """Keep step, total, seconds_left and preview. Return False if the attempt is to stop."""
        names = ("step", "total", "seconds_left", "preview")
        values = ", ".join(f"{name} = coalesce(%s, {name})" for name in names)
        query = f"UPDATE image_jobs SET {values} WHERE lease = %s AND ended IS NULL RETURNING lease"
        return bool(await self._database.fetch(query, *map(figures.get, names), lease))

    async def end(
        self, lease: int, state: str, message: str | None = None, *, results: Sequence[str] = (), size: int = 0
    ) -> bool:
        """End a job as done or failed. Return False if another attempt has it, or it was cancelled.

        Args:
            results: the names of its images.
            size: of its images in bytes.
        """
        async with self._database.transact() as connection:
            return await self._end(connection, lease, state, message, results=results, size=size)

    async def restart(self, lease: int, reason: str) -> None:
        """Give a job to another attempt, or end it as failed if there were enough of them."""
        query = "SELECT attempt FROM image_jobs WHERE lease = %s AND ended IS NULL FOR UPDATE"
        async with self._database.transact() as connection:
            row = await (await connection.execute(query, (lease,))).fetchone()
            if row and row["attempt"] >= MAX_ATTEMPTS:
                await self._end(connection, lease, "failed", f"{reason}; this was attempt {row['attempt']}")
            elif row:
                await connection.execute(
                    "UPDATE image_jobs SET lease = %s, state = 'waiting', step = NULL, total = NULL,"
                    " seconds_left = NULL, preview = NULL WHERE lease = %s",
                    (await self._defer(connection, RESTARTED), lease),
                )

    async def list_abandoned(self) -> list[int]:
        """Return the leases of open jobs that procrastinate no longer has."""
        found = await self._database.fetch(
            "SELECT lease FROM image_jobs WHERE ended IS NULL AND NOT EXISTS"
            " (SELECT FROM procrastinate_jobs WHERE id = lease AND status IN ('todo', 'doing'))"
        )
        return [row["lease"] for row in found]

    async def remove_old(self) -> None:
        """Remove jobs that ended too long ago, and the oldest ones while all images take too many bytes."""
        await self._database.fetch(
            "DELETE FROM image_jobs WHERE ended < now() - make_interval(secs => %s) OR lease IN ("
            " SELECT lease FROM (SELECT lease, sum(bytes) OVER (ORDER BY ended DESC, lease DESC) AS newer"
            " FROM image_jobs WHERE ended IS NOT NULL) AS each WHERE newer > %s) RETURNING lease",
            self._settings.keep_seconds,
            self._settings.keep_bytes,
        )

    async def find_needed(self, leases: Sequence[int]) -> set[int]:
        """Return the leases whose images are needed: an attempt writes them, or its job names them."""
        found = await self._database.fetch(
            "SELECT lease FROM image_jobs WHERE lease = ANY(%s) AND (ended IS NULL OR results <> '{}')", list(leases)
        )
        return {row["lease"] for row in found}

    async def _check_room(self, connection: Connection, order: Order) -> None:
        limits = self._settings
        query = (
            "SELECT count(*) AS jobs, count(*) FILTER (WHERE holder = %s) AS own, coalesce(sum(bytes), 0) AS bytes"
            " FROM image_jobs WHERE state = 'waiting'"
        )
        waiting = await (await connection.execute(query, (order.holder,))).fetchone()
        if waiting["own"] >= limits.max_waiting_of_holder:
            raise HolderFullError(f"{waiting['own']} of your jobs wait, which is the limit; ask again later")
        if waiting["jobs"] >= limits.max_waiting:
            raise FullError(f"{waiting['jobs']} jobs wait, which is the limit; ask again later")
        if waiting["bytes"] + len(order.fields) > limits.max_waiting_bytes:
            raise FullError(f"waiting jobs take {waiting['bytes']} bytes, which leaves no room; ask again later")

    async def _defer(self, connection: Connection, priority: int) -> int:
        task = self._database.app.configure_task("draw", queue="draw", priority=priority, connection=connection)
        return await task.defer_async()

    async def _end(
        self,
        connection: Connection,
        lease: int,
        state: str,
        message: str | None = None,
        *,
        results: Sequence[str] = (),
        size: int = 0,
    ) -> bool:
        values = {"lease": lease, "state": state, "message": message, "results": list(results), "bytes": size}
        if row := await (await connection.execute(END, values)).fetchone():
            if row["webhook"]:
                task = self._database.app.configure_task("notify", queue="webhooks", connection=connection)
                await task.defer_async(lease=lease)
            return True
        query = "SELECT FROM image_jobs WHERE lease = %(lease)s AND state = %(state)s AND results = %(results)s"
        return await (await connection.execute(query, values)).fetchone() is not None
