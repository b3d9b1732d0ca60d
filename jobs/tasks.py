"""The Celery worker: `celery --app jobs.tasks worker`, one for each TorchServe: a job is pulled when it is free.

Redis redelivers a lost worker's message only after a visibility timeout. A long job would exceed it and run twice. So
a message is acknowledged at once and says only that there is work; see jobs.store.
"""

import time

from celery import Celery

from jobs.drawing import PAUSE_SECONDS, is_free, work_on
from jobs.results import Results
from jobs.settings import Settings
from jobs.store import Store

QUEUE = "jobs:wake"

app = Celery("jobs", broker=Settings.read().redis)
app.conf.update(
    task_default_queue=QUEUE,
    task_ignore_result=True,
    worker_pool="solo",  # one job at a time, in the process that is killed with it
    worker_prefetch_multiplier=1,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    worker_cancel_long_running_tasks_on_connection_loss=False,
)


@app.task(name="jobs.work")
def work() -> None:
    """Take the next job, if there is one, and work on it."""
    settings = Settings.read()
    store, results = Store(settings.redis), Results(settings.folder)
    while store.count_waiting():
        if is_free(settings):
            claim = store.claim()
            if claim is not None:
                work_on(claim, store, results, settings)
            return
        time.sleep(PAUSE_SECONDS)
