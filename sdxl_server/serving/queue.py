"""The queue of a worker, first come, first served: who makes a step now, who waits, and what they are told."""

import enum
import logging
import math
import time
from collections.abc import Collection
from dataclasses import dataclass
from http import HTTPStatus

from sdxl_server import metrics
from sdxl_server.api.http import Response
from sdxl_server.errors import RequestError

logger = logging.getLogger(__name__)

ALONE_SECONDS = 2.0  # without a call, after which nobody is in the queue any more
SILENT_SECONDS = 5.0  # after which an answer that is still to come shows a sign of life, at the next step


class Turn(enum.Enum):
    """What a request does in this call."""

    STEP = enum.auto()
    HOLD = enum.auto()  # its response does not begin, so that an error in its first step has a status of its own
    WAIT = enum.auto()


@dataclass
class Ticket:
    """A request's place in the queue, and what its client has been told.

    Attributes:
        has_stepped: it has made its first step.
        has_begun: its response has, with its status and its headers.
        place: the last that was told, -1 before.
        sent_at: when something was sent last, by time.monotonic().
    """

    answer: Response
    has_stepped: bool = False
    has_begun: bool = False
    place: int = -1
    sent_at: float = 0.0

    def write_place(self, place: int) -> bytes:
        """Return what to send to one that waits: how many are before it where that is new, or a sign of life."""
        self.has_begun = True
        if place and place != self.place:
            self.place = place
            return self.note_sent(self.answer.write_place(place))
        return self.note_sent(b"")

    def note_sent(self, body: bytes) -> bytes:
        """Return what is sent now: a sign of life in the place of nothing, where nothing was for some seconds."""
        now = time.monotonic()
        if not body and now - self.sent_at >= SILENT_SECONDS:
            body = self.answer.write_pause()
        self.sent_at = now if body else self.sent_at
        return body


class Queue:
    """The requests in a worker, by TorchServe's id.

    In each call the oldest makes a step, and one more of the first max_running its first one. Up to max_waiting others
    wait, and one more is refused.

    Attributes:
        tickets: one for each request, in their order.
    """

    def __init__(self, *, max_running: int, max_waiting: int) -> None:
        self.tickets: dict[str, Ticket] = {}
        self._max_running, self._max_waiting = max_running, max_waiting
        self._oldest: str | None = None
        self._may_begin = True
        self._call_ended_at = math.inf  # while one is made
        metrics.IN_FLIGHT.set_function(lambda: len(self._list_alive()))
        metrics.WAITING.set_function(lambda: sum(not each.has_stepped for each in self._list_alive()))

    def _list_alive(self) -> list[Ticket]:
        """Return the tickets of those who are there: when the last client leaves, no call comes to tell of it."""
        return [] if time.monotonic() - self._call_ended_at > ALONE_SECONDS else list(self.tickets.values())

    def end_call(self) -> None:
        """Note that a call is over; while requests are in flight the next one follows at once."""
        self._call_ended_at = time.monotonic()

    def begin_call(self, in_flight: Collection[str]) -> None:
        """End the work for those who are no longer there, and begin a call."""
        for request_id in self.tickets.keys() - set(in_flight):
            ticket = self.tickets.pop(request_id)
            if not ticket.has_stepped:
                logger.info("The client has left the queue; there were %d requests before its own", ticket.place)
            ticket.answer.steps.close()
            metrics.REQUESTS.labels("left").inc()
        self._oldest, self._may_begin, self._call_ended_at = next(iter(self.tickets), None), True, math.inf

    def add(self, request_id: str, answer: Response, *, is_bounded: bool) -> None:
        """Give a request the last place.

        Raises:
            RequestError: there is none left; a document needs none.
        """
        if answer.waits and is_bounded and len(self.tickets) >= self._max_running + self._max_waiting:
            answer.steps.close()
            raise RequestError(
                f"{len(self.tickets)} requests are in the queue, and it takes no more; ask again later",
                status=HTTPStatus.SERVICE_UNAVAILABLE,
            )
        self.tickets[request_id] = Ticket(answer)

    def find_place(self, request_id: str) -> int:
        """Return how many requests are before this one."""
        return list(self.tickets).index(request_id)

    def choose_turn(self, request_id: str) -> Turn:
        """Return what a request does in this call."""
        ticket = self.tickets[request_id]
        is_first = not ticket.has_stepped and self.find_place(request_id) < self._max_running
        if request_id == self._oldest or is_first and self._may_begin or not ticket.answer.waits:
            self._may_begin &= not is_first or not ticket.answer.waits
            return Turn.STEP
        return Turn.HOLD if is_first and not ticket.has_begun else Turn.WAIT


class Pace:
    """Watches how near the handler's calls come to TorchServe's limit.

    Args:
        limit: seconds.
    """

    def __init__(self, limit: float) -> None:
        self._limit, self._longest = limit, 0.0

    def note(self, seconds: float) -> None:
        """Warn of a call that came near to the limit, past which TorchServe kills a worker that is only slow."""
        if seconds > max(self._longest, self._limit / 3):
            logger.warning(
                "A call took %.0f s. After %.0f s TorchServe would have killed the worker as hung: raise "
                "responseTimeout in model-config.yaml to three times the longest call, or make smaller pictures",
                seconds,
                self._limit,
            )
        self._longest = max(self._longest, seconds)
