"""PostgreSQL: the connections, the jobs' table, and what is done while the database is away."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, Self, TypeVar

import psycopg
from procrastinate import App, PsycopgConnector
from procrastinate.connector import Notify
from procrastinate.exceptions import ConnectorException
from procrastinate.sql import queries
from psycopg.errors import IdleInTransactionSessionTimeout, ReadOnlySqlTransaction
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Connection = Any  # psycopg.AsyncConnection, whose rows are dictionaries
CONNECT_SECONDS = 5
QUERY_SECONDS = 10  # a database that was stopped keeps its connections open, and is silent
SILENT_SECONDS = 5  # a program that freezes, or whose machine vanishes, keeps its locks so long
PAUSE_SECONDS = 1
# Away, or about to end, or a standby. Its other errors are errors of this program.
AWAY = (psycopg.OperationalError, ReadOnlySqlTransaction, IdleInTransactionSessionTimeout, TimeoutError)
SCHEMA = """
CREATE TABLE IF NOT EXISTS image_jobs (
    holder text NOT NULL,
    id text NOT NULL,
    digest text NOT NULL,                   -- of the fields
    fields text NOT NULL,                   -- JSON; empty after the end
    webhook text,
    priority int NOT NULL,
    rank bigint NOT NULL,                   -- the first lease
    lease bigint NOT NULL UNIQUE,           -- procrastinate's job, which is the current attempt
    state text NOT NULL DEFAULT 'waiting',
    attempt int NOT NULL DEFAULT 0,         -- those that began
    step int,
    total int,
    seconds_left real,
    message text,
    preview bytea,
    results text[] NOT NULL DEFAULT '{}',   -- the names of the images
    bytes bigint NOT NULL,                  -- of the fields, and after the end of the images
    created timestamptz NOT NULL DEFAULT now(),
    ended timestamptz,
    PRIMARY KEY (holder, id)
);
-- Base64 and images hardly shrink, and compression takes time.
ALTER TABLE image_jobs ALTER fields SET STORAGE EXTERNAL, ALTER preview SET STORAGE EXTERNAL;
CREATE INDEX IF NOT EXISTS image_jobs_waiting ON image_jobs (priority DESC, rank) WHERE state = 'waiting';
CREATE INDEX IF NOT EXISTS image_jobs_newest ON image_jobs (holder, rank);
CREATE INDEX IF NOT EXISTS image_jobs_ended ON image_jobs (ended) WHERE ended IS NOT NULL;
"""


class AwayError(ConnectionError):
    """The database does not answer, or takes no changes."""


@contextlib.asynccontextmanager
async def reach_database() -> AsyncIterator[None]:
    """Bound what is done with the database.

    Raises:
        AwayError: it is away.
    """
    try:
        async with asyncio.timeout(QUERY_SECONDS):
            yield
    except (psycopg.Error, ConnectorException, TimeoutError) as error:
        cause = error.__cause__ if isinstance(error, ConnectorException) else error
        if not isinstance(cause, AWAY):
            raise
        raise AwayError(f"the database is away: {cause or type(cause).__name__}") from error


async def wait_for_database(change: Callable[[], Awaitable[Result]]) -> Result:
    """Return the result of a change, which is tried until the database is there."""
    while True:
        try:
            return await change()
        except AwayError as error:
            logger.warning("%s", error)
            await asyncio.sleep(PAUSE_SECONDS)


class Connector(PsycopgConnector):
    """procrastinate's queries.

    Without the database its worker would end after a failed heartbeat. Here heartbeats, ends and notifications wait, so
    a worker that draws delivers later. Only a failed claim ends a worker, which then has no job.
    """

    async def execute_query_async(self, query: Any, **arguments: Any) -> None:
        """Run a query of a heartbeat, of the end of a job or of the end of a worker."""

        async def run() -> None:
            async with reach_database():
                await super(Connector, self).execute_query_async(query, **arguments)

        if query == queries["unregister_worker"]:  # its end waits for nothing
            with contextlib.suppress(AwayError):
                await run()
        else:
            await wait_for_database(run)

    async def execute_query_one_async(self, query: Any, **arguments: Any) -> dict[str, Any]:
        """Run a query such as a claim."""
        async with reach_database():
            return await super().execute_query_one_async(query, **arguments)

    async def execute_query_all_async(self, query: Any, **arguments: Any) -> list[dict[str, Any]]:
        """Run a query such as one for lost jobs."""
        async with reach_database():
            return await super().execute_query_all_async(query, **arguments)

    async def listen_notify(self, on_notification: Notify, channels: Iterable[str]) -> None:
        """Listen until cancelled."""
        while True:
            with contextlib.suppress(ConnectorException):
                await super().listen_notify(on_notification, channels)
            await asyncio.sleep(PAUSE_SECONDS)


async def free_locks(connection: Connection) -> None:
    """Let PostgreSQL end a transaction whose program is silent."""
    await connection.execute(f"SET idle_in_transaction_session_timeout = '{SILENT_SECONDS}s'")
    await connection.commit()


class Database:
    """The connections of a process.

    Args:
        address: as libpq takes it.

    Attributes:
        app: procrastinate's, which shares the connections.
    """

    def __init__(self, address: str) -> None:
        self.app = App(connector=Connector())
        self._pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            address,
            kwargs={"connect_timeout": CONNECT_SECONDS, "row_factory": dict_row},
            min_size=1,
            max_size=10,
            timeout=CONNECT_SECONDS,
            reconnect_timeout=CONNECT_SECONDS,  # the next query tries again; by default the pauses grow to minutes
            configure=free_locks,
            check=AsyncConnectionPool.check_connection,
            open=False,
        )

    async def __aenter__(self) -> Self:
        await self._pool.open()  # the database may be away
        await self.app.open_async(self._pool)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._pool.close()

    @contextlib.asynccontextmanager
    async def transact(self) -> AsyncIterator[Connection]:
        """Yield a connection. Its changes are kept together, or none of them.

        Raises:
            AwayError: the database is away.
        """
        async with reach_database(), self._pool.connection() as connection:
            yield connection

    async def fetch(self, query: str, *values: Any) -> list[dict[str, Any]]:
        """Run one query in a transaction; return its rows.

        Raises:
            AwayError: the database is away.
        """
        async with self.transact() as connection:
            return await (await connection.execute(query, values)).fetchall()

    async def make_tables(self) -> None:
        """Make the tables that are missing.

        Raises:
            AwayError: the database is away.
        """
        async with self.transact() as connection:
            await connection.execute(SCHEMA)
        if not await self.app.check_connection_async():
            await self.app.schema_manager.apply_schema_async()
