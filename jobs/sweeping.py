"""Sweep in the API's process: restore lost jobs and messages, and keep the folder in its limits."""

import logging
import threading
import time

import redis

from jobs.results import Results, remove_old
from jobs.settings import Settings
from jobs.store import LOST, Claim, Store
from jobs.tasks import QUEUE, work

logger = logging.getLogger(__name__)

PAUSE_SECONDS = 2.0
OLD_SECONDS = 30.0


class Sweeper:
    """Sweeps every other second. Several sweepers do no harm."""

    def __init__(self, store: Store, results: Results, settings: Settings) -> None:
        self._store, self._results, self._settings = store, results, settings
        self._seen: dict[Claim, tuple[str, float]] = {}
        self._cleaned = 0.0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._is_over.set()

    def _run(self) -> None:
        while not self._is_over.wait(PAUSE_SECONDS):
            try:
                self.sweep()
            except (redis.RedisError, OSError) as error:
                self._seen.clear()  # without Redis there were no heartbeats
                logger.warning("The sweep failed: %s", error)

    def sweep(self) -> None:
        """Sweep once."""
        now = time.monotonic()
        running = self._store.list_running()
        seen = {claim: self._store.read(claim.job).get("beat", "") for claim in running}
        self._seen = {
            claim: self._seen[claim] if self._seen.get(claim, ("",))[0] == beat else (beat, now)
            for claim, beat in seen.items()
        }
        for claim, (_, since) in self._seen.items():
            if now - since > self._settings.lost_seconds:
                logger.warning("Job %s: the worker of attempt %d is lost", claim.job, claim.attempt)
                self._store.end(claim, "again", LOST)
        waiting = self._store.count_waiting()
        for _ in range(min(waiting - int(self._store.redis.llen(QUEUE)), 10)):
            work.delay()
        if now - self._cleaned > OLD_SECONDS:
            self._cleaned = now
            remove_old(self._store, self._results, self._settings)
