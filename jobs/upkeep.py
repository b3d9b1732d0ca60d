"""Upkeep in the API's process: restart lost jobs, remove old ones, and send webhooks."""

import asyncio
import logging
import time

from procrastinate import RetryStrategy
from procrastinate.jobs import Status

from jobs.database import PAUSE_SECONDS, QUERY_SECONDS, AwayError, Database
from jobs.results import Results
from jobs.settings import Settings
from jobs.store import Store
from jobs.webhooks import DeliveryError, send_webhook
from jobs.worker import FORGET_SECONDS

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 2
REMOVE_SECONDS = 30
POLL_SECONDS = 5  # for retries, which notify nobody
LOST = "its worker was lost"
# After 3, 9, 27, … seconds; the last one after 36 minutes.
RETRIES = RetryStrategy(max_attempts=8, exponential_wait=3, retry_exceptions={DeliveryError, AwayError})


async def keep_jobs(database: Database, store: Store, results: Results, settings: Settings) -> None:
    """Do the upkeep until cancelled. Several processes that do it do no harm."""
    settled, removed = time.monotonic(), 0.0
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        try:
            await database.app.job_manager.prune_stalled_workers(FORGET_SECONDS)  # fails if the database is read-only
            # After an outage all heartbeats are old, until the workers have noticed its end.
            if time.monotonic() - settled > settings.lost_seconds + QUERY_SECONDS:
                await restart_lost(database, store, settings)
            if time.monotonic() - removed > REMOVE_SECONDS:
                await store.remove_old()
                await remove_unnamed(store, results)
                removed = time.monotonic()
        except AwayError as error:
            settled = time.monotonic()
            logger.warning("No upkeep: %s", error)
        except Exception:
            logger.exception("The upkeep failed")


async def restart_lost(database: Database, store: Store, settings: Settings) -> None:
    """Give each job without a living worker to another attempt."""
    manager = database.app.job_manager
    for job in await manager.get_stalled_jobs(seconds_since_heartbeat=settings.lost_seconds):
        logger.warning("%s %s: %s", job.task_name, job.id, LOST)
        if job.task_name == "notify":
            await manager.retry_job(job)
        elif job.id is not None:
            await store.restart(job.id, LOST)
            await manager.finish_job_by_id_async(job.id, Status.FAILED, delete_job=True)
    for lease in await store.list_abandoned():
        await store.restart(lease, LOST)


async def remove_unnamed(store: Store, results: Results) -> None:
    """Remove the images that no job names."""
    leases = {name: int(name.partition("-")[0]) for name in await asyncio.to_thread(results.list_names)}
    needed = await store.find_needed(list(leases.values()))
    for name, lease in leases.items():
        if lease not in needed:
            await asyncio.to_thread(results.remove, name)


async def send_webhooks(database: Database, store: Store, settings: Settings) -> None:
    """Send webhooks until cancelled."""

    @database.app.task(name="notify", queue="webhooks", retry=RETRIES)
    async def notify(lease: int) -> None:
        if job := await store.describe_attempt(lease):
            await asyncio.to_thread(send_webhook, job, settings)

    while True:
        try:
            await database.app.run_worker_async(
                queues=["webhooks"],
                concurrency=4,
                fetch_job_polling_interval=POLL_SECONDS,
                stalled_worker_timeout=FORGET_SECONDS,
                delete_jobs="always",
                install_signal_handlers=False,
            )
        except Exception as error:
            logger.warning("Webhooks wait: %s", error)
            await asyncio.sleep(PAUSE_SECONDS)
