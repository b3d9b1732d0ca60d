"""The queue of a worker, first come, first served: which request makes a step now, and which ones wait."""

import enum
import logging
import math
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from http import HTTPStatus

from sdxl_server import metrics
from sdxl_server.api.http import Response
from sdxl_server.errors import RequestError

logger = logging.getLogger(__name__)

ABANDONED_SECONDS = 2.0  # without a call of the handler; then no client is left
KEEP_ALIVE_SECONDS = 5.0  # of silence, after which the next reply holds a keep-alive
HOLD_SECONDS = 20.0  # of a long first step, after which JSON and events begin; proxies give up after 60 s of silence


class Action(enum.Enum):
    """The action of a request in one call of the handler."""

    STEP = enum.auto()
    HOLD = enum.auto()  # its response does not begin, so that an error in its first step has its own HTTP status
    WAIT = enum.auto()


@dataclass
class QueuedRequest:
    """A request in the queue, and what its client was sent.

    Attributes:
        is_computing: a step is under way.
        has_stepped: the first step is made.
        has_begun: the response has begun, with its status and headers.
        position: the last position that was sent; -1 before.
        sent_at: when bytes were last sent, by time.monotonic().
        added_at: when the request came.
    """

    response: Response
    is_computing: bool = False
    has_stepped: bool = False
    has_begun: bool = False
    position: int = -1
    sent_at: float = 0.0
    added_at: float = field(default_factory=time.monotonic)

    @property
    def may_hold(self) -> bool:
        """Say whether the response can still wait to begin, so that a failed first step has its own HTTP status.

        An image file waits for ever: it cannot carry an error after its beginning.
        """
        is_file = not self.response.api.write_waiting(0, kind=self.response.content_type)
        return not self.has_begun and (is_file or time.monotonic() - self.added_at < HOLD_SECONDS)

    def reply(self, body: bytes = b"", *, position: int = 0) -> bytes:
        """Return what is sent now: the body, else a new position in the queue, else a keep-alive when one is due."""
        self.has_begun = True
        now = time.monotonic()
        has_moved = 0 < position != self.position
        if not body and self.response.may_pause and (has_moved or now - self.sent_at >= KEEP_ALIVE_SECONDS):
            body = self.response.api.write_waiting(position if has_moved else 0, kind=self.response.content_type)
            self.position = position if has_moved else self.position
        self.sent_at = now if body else self.sent_at
        return body


class Queue:
    """The requests of a worker in their order of arrival.

    In each call of the handler the oldest request makes a step. One more of the first max_running makes its first
    step. While a long step is under way, no other begins. Up to max_waiting others wait, and further ones are refused.

    Attributes:
        requests: by their id, oldest first.
    """

    def __init__(self, *, max_running: int, max_waiting: int) -> None:
        self.requests: dict[str, QueuedRequest] = {}
        self._max_running, self._max_waiting = max_running, max_waiting
        self._oldest: str | None = None
        self._may_begin = True
        self._call_ended_at = math.inf  # during a call
        metrics.REQUESTS_IN_FLIGHT.set_function(lambda: len(self._list_connected()))
        metrics.REQUESTS_WAITING.set_function(lambda: sum(not each.has_stepped for each in self._list_connected()))

    def _list_connected(self) -> list[QueuedRequest]:
        """Return the requests whose clients are there. After the last client has left, no call reports it."""
        is_abandoned = time.monotonic() - self._call_ended_at > ABANDONED_SECONDS
        return [] if is_abandoned else list(self.requests.values())

    def end_call(self) -> None:
        """Note that a call is over. The next one follows at once while requests are in flight."""
        self._call_ended_at = time.monotonic()

    def begin_call(self, in_flight: Collection[str]) -> None:
        """Begin a call, and end the work for clients that have left.

        Args:
            in_flight: the ids of the call.
        """
        for request_id in self.requests.keys() - set(in_flight):
            queued = self.requests.pop(request_id)
            if not queued.has_stepped:
                logger.info("The client has left the queue; %d requests were before its own", queued.position)
            queued.response.steps.close()
            metrics.REQUESTS.labels("left").inc()
        self._oldest, self._may_begin, self._call_ended_at = next(iter(self.requests), None), True, math.inf

    def add(self, request_id: str, response: Response, *, is_limited: bool) -> None:
        """Put a request at the end of the queue. A document always finds room.

        Raises:
            RequestError: the queue is full.
        """
        if response.waits and is_limited and len(self.requests) >= self._max_running + self._max_waiting:
            response.steps.close()
            raise RequestError(
                f"{len(self.requests)} requests are in the queue, which is its limit; ask again later",
                status=HTTPStatus.SERVICE_UNAVAILABLE,
            )
        self.requests[request_id] = QueuedRequest(response)

    def count_before(self, request_id: str) -> int:
        """Return how many requests are before this one."""
        return list(self.requests).index(request_id)

    def choose_action(self, request_id: str) -> Action:
        """Return what a request does in this call."""
        queued = self.requests[request_id]
        if not queued.response.waits:
            return Action.STEP
        is_first_step = not queued.has_stepped and self.count_before(request_id) < self._max_running
        is_next = request_id == self._oldest or is_first_step and self._may_begin
        if queued.is_computing or is_next and not any(each.is_computing for each in self.requests.values()):
            self._may_begin &= not is_first_step
            return Action.STEP
        return Action.HOLD if is_first_step and queued.may_hold else Action.WAIT
