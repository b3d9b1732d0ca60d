"""The worker, one for each TorchServe: it draws one job after the other while TorchServe answers."""

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from procrastinate import JobContext
from procrastinate.exceptions import ConnectorException
from procrastinate.worker import Worker

from jobs.database import PAUSE_SECONDS, AwayError, Database, wait_for_database
from jobs.drawing import Attempt, is_ready
from jobs.results import Results
from jobs.settings import Settings
from jobs.store import Store

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 5
# A starting worker forgets others without a heartbeat, and after an outage all are without. The sweep is more patient.
FORGET_SECONDS = 86_400


async def work(settings: Settings) -> None:
    """Draw until SIGTERM or SIGINT, which lets the current job end."""
    async with Database(settings.database) as database:
        store, results = Store(database, settings), Results(settings.results)
        is_away = asyncio.Event()

        @database.app.task(name="draw", queue="draw", pass_context=True)
        def draw(context: JobContext) -> None:
            Attempt(context.job.id or 0, store=store, results=results, settings=settings).run()

        async def check_server(draw: Callable[[], Awaitable[Any]], context: JobContext, worker: Worker) -> None:
            if await asyncio.to_thread(is_ready, settings):
                await draw()
                return
            is_away.set()
            worker.stop()
            await wait_for_database(functools.partial(store.restart, context.job.id or 0, "TorchServe is away"))

        while True:
            while not await asyncio.to_thread(is_ready, settings):
                await asyncio.sleep(PAUSE_SECONDS)
            is_away.clear()
            try:
                await database.app.run_worker_async(
                    queues=["draw"],
                    update_heartbeat_interval=min(HEARTBEAT_SECONDS, settings.lost_seconds / 4),
                    stalled_worker_timeout=FORGET_SECONDS,
                    abort_job_polling_interval=FORGET_SECONDS,  # an attempt itself notices at each step
                    delete_jobs="always",
                    worker_middleware=[check_server],
                )
            except (AwayError, ConnectorException) as error:
                logger.warning("The worker begins anew: %s", error)
                await asyncio.sleep(PAUSE_SECONDS)
            else:
                if not is_away.is_set():
                    return
