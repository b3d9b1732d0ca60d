"""TorchServe's side: calls in, replies out. TorchServe wants exactly one class in this file.

Everything else comes from the installed package, which is imported at the load only: TorchServe calls an import that
fails in this file a missing handler.
"""

import json
import logging
import os
import time
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ts.metrics.dimension import Dimension
from ts.metrics.metric_type_enum import MetricTypes
from ts.utils.util import PredictionException

if TYPE_CHECKING:
    from pipeline_utils import Answer, Service, State, Ticket

logger = logging.getLogger(__name__)

MADE_FOR = "0.2.0"  # the version of sdxl_server that this file was written for
DESCRIBE_HINT = "The answer is at /predictions/<model>/<version>/describe"
SILENT_SECONDS = 5.0  # after which an answer that is still to come shows a sign of life, at the next step
RETRY_AFTER = "5"  # seconds, for clients that find the queue full
GRPC_MESSAGE = "gRPC is not served, since TorchServe loses its streams under continuousBatching; ask over HTTP"


class StableDiffusionHandler:
    """Answer each request with its pictures.

    Under continuousBatching TorchServe calls `handle` over and over with up to batchSize requests, and this is the
    queue, first come, first served. A call reads and checks all that is new, makes one denoising step of the oldest,
    and the first step of one more of the first max_running; up to max_waiting others wait and are told their place,
    and one more is refused. A reply, be it an empty one, begins the response with its status and its headers, and only
    from then on does TorchServe look whether the client is still there: who has left is missing from the next call.
    Without continuousBatching one call makes all steps.

    It does not derive from ts.torch_handler.BaseHandler, whose import loads OpenVINO's stock torch.compile backend.
    """

    context: Any
    service: "Service"
    explain: Any

    def __init__(self) -> None:
        """Refuse a model-config.yaml that TorchServe cannot read, before it tries and fails without naming the file.

        Raises:
            ConfigError: it is not UTF-8, with or without a byte order mark.
        """
        file = Path(__file__).with_name("model-config.yaml")
        raw = file.read_bytes() if file.exists() else b""
        try:
            is_text = "\0" not in raw.decode("utf-8")
        except UnicodeDecodeError:
            is_text = False
        if not is_text:
            from pipeline_utils import ConfigError

            raise ConfigError(
                f"{file.name} is not UTF-8 (PowerShell's > and some editors write UTF-16): save it as UTF-8, for "
                "example with `iconv -f UTF-16 -t UTF-8`, and make the archive again"
            )

    def initialize(self, context: Any) -> None:
        """Load, compile and warm up the pipeline as model-config.yaml says; called once in each worker.

        Raises:
            ConfigError: names the key, what is accepted and what was given; the worker does not start.
            RuntimeError: the package that this archive needs is not installed.
        """
        # TorchServe would decode bodies before the handler sees them, and log what it cannot decode.
        os.environ["TS_DECODE_INPUT_REQUEST"] = "false"
        try:
            from pipeline_utils import explain, load_service
        except ImportError as error:
            raise RuntimeError(
                f"this archive was made for sdxl_server {MADE_FOR}, which cannot be imported here ({error}): "
                "pip install -r requirements.txt, then make the archive again (torch-model-archiver, README's step 2)"
            ) from error
        self.context, self.explain = context, explain
        self.queue: dict[str, Ticket] = {}
        self.answered: set[str] = set()
        self.questioned: set[str] = set()
        settings = context.model_yaml_config or {}
        properties = context.system_properties
        model_dir, gpu_id = Path(properties["model_dir"]), properties.get("gpu_id")
        self.service = load_service(settings, model_dir=model_dir, gpu_id=gpu_id, archive=MADE_FOR)
        config = self.service.loaded.config
        self.max_running, self.max_waiting = config.max_running, config.max_waiting
        self.is_continuous = settings.get("continuousBatching") is True
        self.response_timeout, self.longest = float(settings.get("responseTimeout", 120)), 0.0
        for part, figures in self.service.loaded.measure_parts().items():
            for name, (value, unit) in figures.items():
                context.metrics.add_metric(
                    name, value, unit, dimensions=[Dimension("Part", part)], metric_type=MetricTypes.GAUGE
                )
        logger.info("Ready: %s", json.dumps(self.service.describe()))

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[Any]:
        """Go on with the requests in flight; return what to send of each response now."""
        start = time.monotonic()
        try:
            return self.make_replies(data, context)
        finally:
            self.watch_pace(time.monotonic() - start)

    def watch_pace(self, seconds: float) -> None:
        """Warn of a call that came near to TorchServe's limit, past which it kills a worker that is only slow."""
        if seconds > max(self.longest, self.response_timeout / 3):
            logger.warning(
                "A call took %.0f s. After %.0f s TorchServe would have killed the worker as hung: raise "
                "responseTimeout in model-config.yaml to three times the longest call, or make smaller pictures",
                seconds,
                self.response_timeout,
            )
        self.longest = max(self.longest, seconds)

    def make_replies(self, data: list[dict[str, Any]], context: Any) -> list[Any]:
        """Answer one call of TorchServe's; see `handle`."""
        self.context = context
        if len(data) == 1 and self.is_grpc(0):
            raise PredictionException(GRPC_MESSAGE, HTTPStatus.NOT_IMPLEMENTED)  # for all of a call
        in_flight = set(context.request_ids.values())
        if self.is_question(data) and in_flight.isdisjoint(self.queue.keys() | self.answered):
            if not self.is_continuous:
                return [self.service.describe()]
            if in_flight == self.questioned:
                # TorchServe puts it back into its queue as it takes it out (Model.pollInferJob, 0.12.0).
                logger.error("TorchServe repeats this for ever under continuousBatching: restart it. %s", DESCRIBE_HINT)
                time.sleep(1)
            self.questioned = in_flight
        self.drop_leavers(in_flight)
        if not self.is_continuous:
            return self.make_whole(data)
        replies = self.take_turns(data)
        context.stopping_criteria = [lambda _, state=state: state.value for _, state in replies]
        return [body for body, _ in replies]

    def drop_leavers(self, in_flight: set[str]) -> None:
        """End the work for those who are no longer there."""
        for request_id in self.queue.keys() - in_flight:
            ticket = self.queue.pop(request_id)
            if not ticket.has_stepped:
                logger.info("The client has left the queue; there were %d requests before its own", ticket.place)
            ticket.answer.steps.close()
        self.answered &= in_flight

    def make_whole(self, data: list[dict[str, Any]]) -> list[bytes]:
        """Make all steps of all requests, in turns; return an answer in one piece to each."""
        from pipeline_utils import State

        refused = [self.admit(*each) for each in enumerate(data)]
        pieces = [[] if each is None else [each[0]] for each in refused]
        while self.queue:
            for index in range(len(data)):
                if self.context.get_request_id(index) in self.queue:
                    body, state = self.advance(index)
                    pieces[index] = [body] if state is State.WHOLE else [*pieces[index], body]
        self.answered.clear()
        return [b"".join(each) for each in pieces]

    def take_turns(self, data: list[dict[str, Any]]) -> "list[tuple[bytes, State]]":
        """Read what is new, make a step of the oldest and the first step of one more; return a reply to each."""
        from pipeline_utils import State

        oldest, may_begin = next(iter(self.queue), None), True
        replies = []
        for index, row in enumerate(data):
            request_id = self.context.get_request_id(index)
            if request_id not in self.queue:
                refusal = self.admit(index, row)
                if refusal is not None:
                    replies.append(refusal)
                    continue
            ticket, place = self.queue[request_id], list(self.queue).index(request_id)
            is_first = not ticket.has_stepped and place < self.max_running
            if request_id == oldest or is_first and may_begin or not ticket.answer.waits:
                may_begin &= not is_first or not ticket.answer.waits
                replies.append(self.advance(index))
            elif is_first and not ticket.has_begun:
                # What is not among these ids is left out of the message, and TorchServe keeps it for the next call. Any
                # reply would begin the response, and an error in its first step can still have a status of its own.
                # (ts/service.py hands over the dictionary that it encodes by, 0.12.0.)
                del self.context.request_ids[index]
                replies.append((b"", State.MORE))
            else:
                replies.append((self.tell_place(ticket, place), State.MORE))
        return replies

    def admit(self, index: int, row: dict[str, Any]) -> "tuple[bytes, State] | None":
        """Read a new request and give it the last place in the queue; return a reply to one that has none there."""
        from pipeline_utils import RequestError, State, Ticket

        request_id = self.context.get_request_id(index)
        if request_id in self.answered:
            return b"", State.LAST
        if self.is_grpc(index):
            return self.refuse_grpc(index), State.LAST
        try:
            answer = self.begin(index, row)
            if answer.waits and self.is_continuous and len(self.queue) >= self.max_running + self.max_waiting:
                answer.steps.close()
                raise RequestError(
                    f"{len(self.queue)} requests are in the queue, and it takes no more; ask again later",
                    status=HTTPStatus.SERVICE_UNAVAILABLE,
                )
        except Exception as error:  # one request must not take down the worker or its neighbours
            return self.report(error, index), State.WHOLE
        self.queue[request_id] = Ticket(answer)
        return None

    def tell_place(self, ticket: "Ticket", place: int) -> bytes:
        """Return what to send to one that waits: how many are before it where that is new, or a sign of life."""
        ticket.has_begun = True
        if place and place != ticket.place:
            ticket.place = place
            return self.note_sent(ticket, ticket.answer.write_place(place))
        return self.note_sent(ticket, b"")

    def note_sent(self, ticket: "Ticket", body: bytes) -> bytes:
        """Return what is sent now: a sign of life in the place of nothing, where nothing was for some seconds."""
        now = time.monotonic()
        if not body and now - ticket.sent_at >= SILENT_SECONDS:
            body = ticket.answer.write_pause()
        ticket.sent_at = now if body else ticket.sent_at
        return body

    def is_question(self, data: list[dict[str, Any]]) -> bool:
        """Say whether the management API asks what runs; so seems a client with this header and an empty form."""
        headers = self.context.get_all_request_header(0)
        return headers.get("describe") == "True" and "explain" not in headers and data == [{}]

    def is_grpc(self, index: int) -> bool:
        """Say whether a call came by gRPC, which hands on no headers but those of its own sequences."""
        headers = self.context.get_all_request_header(index)
        return not any(isinstance(value, str) and not name.startswith("ts_") for name, value in headers.items())

    def advance(self, index: int) -> "tuple[bytes, State]":
        """Make one step of a request; return what to send now, and what TorchServe is to make of it."""
        from pipeline_utils import State

        request_id = self.context.get_request_id(index)
        ticket = self.queue[request_id]
        try:
            body = next(ticket.answer.steps)
        except StopIteration as end:
            self.add_times(self.queue.pop(request_id).answer)
            if ticket.has_begun:
                return end.value, State.LAST
            self.answered.add(request_id)  # TorchServe takes the end of a response only after a beginning
            return end.value, State.MORE
        except Exception as error:  # one request must not take down the worker or its neighbours
            self.queue.pop(request_id)
            if ticket.has_begun and self.is_continuous:
                return ticket.answer.write_failure(self.explain(error)), State.LAST
            return self.report(error, index), State.WHOLE
        ticket.has_stepped = ticket.has_begun = True
        return self.note_sent(ticket, body) if self.is_continuous else body, State.MORE

    def refuse_grpc(self, index: int) -> bytes:
        """Return what a call by gRPC gets beside others: an error as JSON, since a status would be that of all."""
        from pipeline_utils import RequestError

        # An answer in one piece has no such header, and TorchServe ends the worker for it (GRPCJob.response, 0.12.0).
        self.context.set_response_header(index, "ts_stream_next", "false")
        return json.dumps(self.explain(RequestError(GRPC_MESSAGE, status=HTTPStatus.NOT_IMPLEMENTED))).encode()

    def begin(self, index: int, row: dict[str, Any]) -> "Answer":
        """Return the answer to a new request, whose headers are told to TorchServe.

        Args:
            index: the request's place in this call.

        Raises:
            RequestError: the request is wrong.
        """
        from pipeline_utils import Call

        call = Call(
            values=row,
            path=self.read_header(index, "url_path"),
            content_type=self.read_header(index, "content-type"),
            content_length=self.read_header(index, "content-length"),
            accept=self.read_header(index, "accept"),
            model=self.context.model_name,
        )
        answer = self.service.answer(call)
        self.context.set_response_content_type(index, answer.content_type)
        for name, value in answer.headers.items():
            self.context.set_response_header(index, name, value)
        return answer

    def report(self, error: Exception, index: int) -> bytes:
        """Return an error as JSON, and set the status of the answer, which has not begun."""
        explained = self.explain(error)
        status = explained["error"]["code"]
        self.context.set_response_status(status, HTTPStatus(status).phrase, index)
        self.context.set_response_content_type(index, "application/json")
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.context.set_response_header(index, "Retry-After", RETRY_AFTER)
        return json.dumps(explained).encode()

    def read_header(self, index: int, wanted: str) -> str:
        """Return a request's header, whose name may be in any case, empty where there is none.

        A form's field or a query's parameter of that name stands among the headers too, as a mapping.
        """
        headers = self.context.get_all_request_header(index).items()
        return next((value for name, value in headers if name.lower() == wanted and isinstance(value, str)), "")

    def add_times(self, answer: "Answer") -> None:
        """Log the time of each stage of a request that is over, in milliseconds."""
        if self.service.loaded.config.profile:
            for stage, seconds in answer.seconds.items():
                self.context.metrics.add_time(f"ts_handler_{stage}", seconds * 1000)
