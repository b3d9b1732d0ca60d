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
DESCRIBE_HINT = "the answer is at /predictions/<model>/<version>/describe"
RETRY_AFTER = "5"  # seconds, for clients that find the queue full
GRPC_MESSAGE = "gRPC is not served, since TorchServe loses its streams under continuousBatching; ask over HTTP"


class StableDiffusionHandler:
    """Answer each request with its pictures.

    Under continuousBatching TorchServe calls `handle` over and over with up to batchSize requests, which all stand in
    the queue of sdxl_server.serving. A call reads what is new and makes a step or two. A reply, be it an empty one,
    begins the response with its status and its headers, and only from then on does TorchServe look whether the client
    is still there: who has left is missing from the next call.
    Without continuousBatching one call makes all steps.

    It does not derive from ts.torch_handler.BaseHandler, whose import loads OpenVINO's stock torch.compile backend.
    """

    context: Any
    service: "Service"

    def __init__(self) -> None:
        """Refuse a model-config.yaml that TorchServe cannot read, before it tries and fails without naming the file.

        Raises:
            ConfigError, RuntimeError: see check_is_text, import_package.
        """
        self.package = import_package()
        self.package.check_is_text(Path(__file__).with_name("model-config.yaml"))

    def initialize(self, context: Any) -> None:
        """Load, compile and warm up the pipeline as model-config.yaml says; called once in each worker.

        Raises:
            ConfigError: names the key, what is accepted and what was given; the worker does not start.
        """
        # TorchServe would decode bodies before the handler sees them, and log what it cannot decode.
        os.environ["TS_DECODE_INPUT_REQUEST"] = "false"
        self.context = context
        self.answered: set[str] = set()
        self.questioned: set[str] = set()
        settings = context.model_yaml_config or {}
        model_dir, gpu_id = (context.system_properties.get(name) for name in ("model_dir", "gpu_id"))
        self.service = self.package.load_service(settings, model_dir=Path(model_dir), gpu_id=gpu_id, archive=MADE_FOR)
        config = self.service.loaded.config
        self.queue = self.package.Queue(max_running=config.max_running, max_waiting=config.max_waiting)
        self.pace = self.package.Pace(float(settings.get("responseTimeout", 120)))
        self.is_continuous = settings.get("continuousBatching") is True
        for part, figures in self.package.measure_parts(self.service.loaded).items():
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
            self.queue.end_call()
            self.pace.note(time.monotonic() - start)

    def make_replies(self, data: list[dict[str, Any]], context: Any) -> list[Any]:
        """Answer one call of TorchServe's; see `handle`."""
        self.context = context
        if len(data) == 1 and self.is_grpc(0):
            raise PredictionException(GRPC_MESSAGE, HTTPStatus.NOT_IMPLEMENTED)  # for all of a call
        in_flight = set(context.request_ids.values())
        if self.is_question(data) and in_flight.isdisjoint(self.queue.tickets.keys() | self.answered):
            if not self.is_continuous:
                return [self.service.describe()]
            if in_flight == self.questioned:
                # TorchServe puts it back into its queue as it takes it out (Model.pollInferJob, 0.12.0).
                logger.error("TorchServe repeats this for ever under continuousBatching: restart it; %s", DESCRIBE_HINT)
                time.sleep(1)
            self.questioned = in_flight
        self.queue.begin_call(in_flight)
        self.answered &= in_flight
        if not self.is_continuous:
            return self.make_whole(data)
        replies = self.take_turns(data)
        context.stopping_criteria = [lambda _, state=state: state.value for _, state in replies]
        return [body for body, _ in replies]

    def make_whole(self, data: list[dict[str, Any]]) -> list[bytes]:
        """Make all steps of all requests, in turns; return an answer in one piece to each."""
        pieces = [[] if each is None else [each[0]] for each in (self.admit(*each) for each in enumerate(data))]
        while self.queue.tickets:
            for index in range(len(data)):
                if self.context.get_request_id(index) in self.queue.tickets:
                    body, state = self.advance(index)
                    pieces[index] = [body] if state is self.package.State.WHOLE else [*pieces[index], body]
        self.answered.clear()
        return [b"".join(each) for each in pieces]

    def take_turns(self, data: list[dict[str, Any]]) -> "list[tuple[bytes, State]]":
        """Read what is new, and let each make a step or wait; return a reply to each."""
        replies = []
        for index, row in enumerate(data):
            request_id = self.context.get_request_id(index)
            refusal = None if request_id in self.queue.tickets else self.admit(index, row)
            if refusal is not None:
                replies.append(refusal)
                continue
            turn = self.queue.choose_turn(request_id)
            if turn is self.package.Turn.STEP:
                replies.append(self.advance(index))
            elif turn is self.package.Turn.HOLD:
                # What is not among these ids is left out of the message, and TorchServe keeps it for the next call
                # (ts/service.py hands over the dictionary that it encodes by, 0.12.0); any reply begins the response.
                del self.context.request_ids[index]
                replies.append((b"", self.package.State.MORE))
            else:
                ticket = self.queue.tickets[request_id]
                self.tell_headers(index, ticket)
                replies.append((ticket.write_place(self.queue.find_place(request_id)), self.package.State.MORE))
        return replies

    def admit(self, index: int, row: dict[str, Any]) -> "tuple[bytes, State] | None":
        """Read a new request and give it the last place in the queue; return a reply to one that has none there."""
        request_id = self.context.get_request_id(index)
        if request_id in self.answered:
            return b"", self.package.State.LAST
        if self.is_grpc(index):
            return self.refuse_grpc(index), self.package.State.LAST
        try:
            self.queue.add(request_id, self.begin(index, row), is_bounded=self.is_continuous)
        except Exception as error:  # one request must not take down the worker or its neighbours
            return self.report(error, index), self.package.State.WHOLE
        return None

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
        request_id = self.context.get_request_id(index)
        ticket = self.queue.tickets[request_id]
        self.tell_headers(index, ticket)
        try:
            body = next(ticket.answer.steps)
        except StopIteration as end:
            self.add_times(self.queue.tickets.pop(request_id).answer)
            if ticket.has_begun:
                return end.value, self.package.State.LAST
            self.answered.add(request_id)  # TorchServe takes the end of a response only after a beginning
            return end.value, self.package.State.MORE
        except Exception as error:  # one request must not take down the worker or its neighbours
            self.queue.tickets.pop(request_id)
            if ticket.has_begun and self.is_continuous:
                return ticket.answer.write_failure(self.explain(error, index)), self.package.State.LAST
            return self.report(error, index), self.package.State.WHOLE
        ticket.has_stepped = ticket.has_begun = True
        return ticket.note_sent(body) if self.is_continuous else body, self.package.State.MORE

    def refuse_grpc(self, index: int) -> bytes:
        """Return what a call by gRPC gets beside others: an error as JSON, since a status would be that of all."""
        # An answer in one piece has no such header, and TorchServe ends the worker for it (GRPCJob.response, 0.12.0).
        self.context.set_response_header(index, "ts_stream_next", "false")
        error = self.package.RequestError(GRPC_MESSAGE, status=HTTPStatus.NOT_IMPLEMENTED)
        return json.dumps(self.explain(error, index)).encode()

    def tell_headers(self, index: int, ticket: "Ticket") -> None:
        """Tell TorchServe the headers of an answer, in the call in which the response begins."""
        headers = {} if ticket.has_begun else {"content-type": ticket.answer.content_type, **ticket.answer.headers}
        for name, value in headers.items():
            self.context.set_response_header(index, name, value)

    def begin(self, index: int, row: dict[str, Any]) -> "Answer":
        """Return the answer to the new request at this place in the call.

        Raises:
            RequestError: the request is wrong.
        """
        headers, own_id = self.context.get_all_request_header(index), self.context.get_request_id(index)
        call = self.package.Call.read(row, headers, model=self.context.model_name, own_id=own_id)
        return self.service.answer(call)

    def explain(self, error: Exception, index: int) -> dict[str, Any]:
        """Return what the client of a request that has failed is told."""
        headers, own_id = self.context.get_all_request_header(index), self.context.get_request_id(index)
        explained: dict[str, Any] = self.package.explain(error, self.package.read_id(headers, own_id))
        return explained

    def report(self, error: Exception, index: int) -> bytes:
        """Return an error as JSON, and set the status of the answer, which has not begun."""
        explained = self.explain(error, index)
        status = explained["error"]["code"]
        self.context.set_response_status(status, HTTPStatus(status).phrase, index)
        self.context.set_response_content_type(index, "application/json")
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.context.set_response_header(index, "Retry-After", RETRY_AFTER)
        return json.dumps(explained).encode()

    def add_times(self, answer: "Answer") -> None:
        """Log the time of each stage of a request that is over, in milliseconds."""
        if self.service.loaded.config.profile:
            for stage, seconds in answer.seconds.items():
                self.context.metrics.add_time(f"ts_handler_{stage}", seconds * 1000)


def import_package() -> Any:
    """Return pipeline_utils, whose import brings in the installed package.

    Raises:
        RuntimeError: it is not installed, or is another one.
    """
    try:
        import pipeline_utils
    except ImportError as error:
        raise RuntimeError(
            f"this archive was made for sdxl_server {MADE_FOR}, which cannot be imported here ({error}): "
            "pip install -r requirements.txt, then make the archive again (torch-model-archiver, README's step 2)"
        ) from error
    return pipeline_utils
