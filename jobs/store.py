"""The jobs in Redis: their order, their state and their workers.

Celery's messages only say that there is something to do. Scripts that Redis runs as a whole choose the
next job. So a repeated or lost message neither repeats nor loses a job. A worker sends heartbeats for each attempt at
a job. After it has lost the job to another attempt, it can neither continue nor end it.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

WAITING, AGAIN, RUNNING, ENDED, COUNTER = "jobs:waiting", "jobs:again", "jobs:running", "jobs:ended", "jobs:counter"
MAX_ATTEMPTS = 2
LOST = "its worker was lost, twice"
TRIES = 60  # of a worker's command without Redis: about a minute

_SUBMIT = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 'known' end
if redis.call('ZCARD', 'jobs:waiting') >= tonumber(ARGV[2]) then return 'full' end
redis.call('HSET', KEYS[1], 'state', 'waiting', 'digest', ARGV[3], 'created', ARGV[4], 'attempt', 0, 'beat', 0)
redis.call('ZADD', 'jobs:waiting', redis.call('INCR', 'jobs:counter'), ARGV[1])
return 'new'
"""
# A retried job comes first and is not among the waiting ones, so that no place grows.
_CLAIM = """
local id = redis.call('LPOP', 'jobs:again') or redis.call('ZPOPMIN', 'jobs:waiting')[1]
if not id then return nil end
redis.call('SADD', 'jobs:running', id)
redis.call('HSET', 'jobs:job:' .. id, 'state', 'running')
return {id, redis.call('HINCRBY', 'jobs:job:' .. id, 'attempt', 1)}
"""
_BEAT = """
if redis.call('HGET', KEYS[1], 'attempt') ~= ARGV[1] or redis.call('HGET', KEYS[1], 'state') ~= 'running'
    or redis.call('HGET', KEYS[1], 'cancel') then return 0 end
redis.call('HINCRBY', KEYS[1], 'beat', 1)
for i = 2, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
return 1
"""
_END = """
if redis.call('HGET', KEYS[1], 'attempt') ~= ARGV[1] or redis.call('HGET', KEYS[1], 'state') ~= 'running' then
    return 0 end
local state = redis.call('HGET', KEYS[1], 'cancel') and 'cancelled' or ARGV[3]
redis.call('SREM', 'jobs:running', ARGV[2])
if state == 'again' and tonumber(ARGV[1]) < tonumber(ARGV[6]) then
    redis.call('HSET', KEYS[1], 'state', 'waiting')
    redis.call('RPUSH', 'jobs:again', ARGV[2])
    return 1 end
if state == 'again' then state = 'failed' end
redis.call('HSET', KEYS[1], 'state', state, 'message', ARGV[4], 'ended', ARGV[5])
redis.call('ZADD', 'jobs:ended', ARGV[5], ARGV[2])
return 1
"""
_CANCEL = """
local state = redis.call('HGET', KEYS[1], 'state')
if state == 'running' then redis.call('HSET', KEYS[1], 'cancel', 1) end
if state == 'waiting' then
    redis.call('ZREM', 'jobs:waiting', ARGV[1])
    redis.call('LREM', 'jobs:again', 0, ARGV[1])
    redis.call('HSET', KEYS[1], 'state', 'cancelled', 'ended', ARGV[2])
    redis.call('ZADD', 'jobs:ended', ARGV[2], ARGV[1])
end
return state
"""


@dataclass(frozen=True)
class Claim:
    """A job that a worker has taken, with the number of the attempt."""

    job: str
    attempt: int


class Store:
    """The jobs in a Redis.

    Args:
        url: its address.
        tries: of a command while it is away.
    """

    def __init__(self, url: str, *, tries: int = TRIES) -> None:
        self.redis: Any = redis.Redis.from_url(
            url,
            decode_responses=True,
            socket_timeout=5,
            retry=Retry(ExponentialBackoff(cap=1), tries),
            retry_on_error=[redis.ConnectionError, redis.TimeoutError],
        )
        scripts = {"submit": _SUBMIT, "claim": _CLAIM, "beat": _BEAT, "end": _END, "cancel": _CANCEL}
        self._scripts = {name: self.redis.register_script(text) for name, text in scripts.items()}

    def submit(self, job: str, digest: str, *, max_waiting: int) -> str:
        """Put a job at the end. Return new, known (the id exists) or full."""
        return str(self._run("submit", job, job, max_waiting, digest, time.time()))

    def claim(self) -> Claim | None:
        """Take the next job, if there is one."""
        taken = self._scripts["claim"]()
        return Claim(taken[0], int(taken[1])) if taken else None

    def beat(self, claim: Claim, figures: Mapping[str, Any] | None = None) -> bool:
        """Send a heartbeat with figures. Return False if the job was cancelled or lost."""
        pairs = [each for pair in (figures or {}).items() for each in pair]
        return bool(self._run("beat", claim.job, claim.attempt, *pairs))

    def end(self, claim: Claim, state: str, message: str = "") -> bool:
        """End a job as done or failed, or (again) have it taken up once more, failed when that was so already.

        A job that is cancelled ends so. It is False where the job is another attempt's by now.
        """
        return bool(self._run("end", claim.job, claim.attempt, claim.job, state, message, time.time(), MAX_ATTEMPTS))

    def cancel(self, job: str) -> None:
        """Remove a job from the queue, or stop its worker within a step. A finished job stays."""
        self._run("cancel", job, job, time.time())

    def read(self, job: str) -> dict[str, str]:
        """Return a job's fields; empty if there is no such job."""
        read: dict[str, str] = self.redis.hgetall(f"jobs:job:{job}")
        return read

    def find_place(self, job: str) -> int:
        """Return how many jobs are before a waiting one; None if it is next."""
        place = self.redis.zrank(WAITING, job)
        return 0 if place is None else int(place)

    def list_running(self) -> list[Claim]:
        """Return the jobs in work, including jobs from lost workers."""
        jobs: set[str] = self.redis.smembers(RUNNING)
        attempts = {job: self.redis.hget(f"jobs:job:{job}", "attempt") for job in jobs}
        return [Claim(job, int(attempt)) for job, attempt in attempts.items() if attempt]

    def count_waiting(self) -> int:
        """Return the jobs without a worker."""
        return int(self.redis.zcard(WAITING)) + int(self.redis.llen(AGAIN))

    def list_ended(self, before: float = float("inf")) -> list[str]:
        """Return the jobs that ended before a time, in order."""
        jobs: list[str] = self.redis.zrangebyscore(ENDED, "-inf", before)
        return jobs

    def forget(self, job: str) -> None:
        """Remove a finished job."""
        self.redis.pipeline().zrem(ENDED, job).delete(f"jobs:job:{job}").execute()

    def _run(self, script: str, job: str, *arguments: Any) -> Any:
        return self._scripts[script](keys=[f"jobs:job:{job}"], args=arguments)
