"""TorchServe's protocol: calls in, replies out. TorchServe accepts exactly one class in this file.

The installed package does the work. It is imported when the model is loaded, not with this file: TorchServe reports an
import error of this file as a missing handler.
"""

import json
import logging
import os
import signal
import time
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ts.metrics.dimension import Dimension
from ts.metrics.metric_type_enum import MetricTypes
from ts.utils.util import PredictionException

if TYPE_CHECKING:
    from pipeline_utils import QueuedRequest, ReplyState, Response, Service

logger = logging.getLogger(__name__)

MADE_FOR = "0.3.0"  # the version of sdxl_server that this file was written for
HINT = "the answer is at /predictions/<model>/<version>/describe"
RETRY_AFTER = "5"  # seconds, for clients that met a full queue
GRPC_MESSAGE = "gRPC is not served: TorchServe loses its streams under continuousBatching; ask over HTTP"


class StableDiffusionHandler:
    """Answer each request with its images.

    Under continuousBatching TorchServe calls `handle` again and again with up to batchSize requests. They all enter
    the queue of sdxl_server.serving. A call reads the new ones and makes a step or two. A reply, even an empty one,
    begins the response with its status and headers. Only then does TorchServe watch the connection. A client that has
    left is missing from the next call. Without continuousBatching one call makes all steps.

    The class does not derive from ts.torch_handler.BaseHandler, which imports OpenVINO's own torch.compile backend.
    """

    context: Any
    service: "Service"

    def __init__(self) -> None:
        """Check that model-config.yaml is readable. TorchServe would fail on it without naming the file.

        Raises:
            ConfigError, RuntimeError: see `check_is_text` and `import_package`.
        """
        self.package = import_package()
        self.package.check_is_text(Path(__file__).with_name("model-config.yaml"))

    def initialize(self, context: Any) -> None:
        """Load, compile and warm up the pipeline. TorchServe calls this once in each worker.

        Raises:
            ConfigError: names the key, what is accepted and what was given; the worker does not start.
        """
        # TorchServe would decode bodies before the handler sees them, and log those it cannot decode.
        os.environ["TS_DECODE_INPUT_REQUEST"] = "false"
        self.context = context
        self.finished: set[str] = set()
        self.described: set[str] = set()
        settings = context.model_yaml_config or {}
        model_dir, gpu_id = (context.system_properties.get(name) for name in ("model_dir", "gpu_id"))
        self.service = self.package.load_service(settings, model_dir=Path(model_dir), gpu_id=gpu_id, archive=MADE_FOR)
        config = self.service.loaded.config
        self.queue = self.package.Queue(max_running=config.max_running, max_waiting=config.max_waiting)
        self.is_continuous = settings.get("continuousBatching") is True
        for part, figures in self.package.measure_components(self.service.loaded).items():
            for name, (value, unit) in figures.items():
                context.metrics.add_metric(
                    name, value, unit, dimensions=[Dimension("Part", part)], metric_type=MetricTypes.GAUGE
                )
        logger.info("Ready: %s", json.dumps(self.service.describe()))

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[Any]:
        """Make a step or two of the requests in flight; return what each response sends now."""
        try:
            return self.answer_call(data, context)
        finally:
            self.queue.end_call()

    def answer_call(self, data: list[dict[str, Any]], context: Any) -> list[Any]:
        """Return the replies of one call; see `handle`."""
        self.context = context
        if len(data) == 1 and self.is_grpc(0):
            raise PredictionException(GRPC_MESSAGE, HTTPStatus.NOT_IMPLEMENTED)  # for all requests of a call
        in_flight = set(context.request_ids.values())
        if self.is_describe_call(data) and in_flight.isdisjoint(self.queue.requests.keys() | self.finished):
            if not self.is_continuous:
                return [self.service.describe()]
            if in_flight == self.described:
                # TorchServe puts it back at the front of its queue as it takes it out (Model.pollInferJob, 0.12.0).
                logger.error(
                    "TorchServe repeats ?customized=true for ever and serves nothing else: it ends now; %s", HINT
                )
                os.kill(os.getppid(), signal.SIGTERM)
                time.sleep(5)
            self.described = in_flight
        self.queue.begin_call(in_flight)
        self.finished &= in_flight
        if not self.is_continuous:
            return self.answer_at_once(data)
        replies = [self.reply(index, body) for index, body in enumerate(data)]
        context.stopping_criteria = [lambda _, state=state: state.value for _, state in replies]
        return [body for body, _ in replies]

    def answer_at_once(self, data: list[dict[str, Any]]) -> list[bytes]:
        """Make all steps of all requests in turn; return each answer in one piece."""
        errors = [self.enqueue(index, body) for index, body in enumerate(data)]
        pieces = [[] if error is None else [error[0]] for error in errors]
        while self.queue.requests:
            for index in range(len(data)):
                if self.context.get_request_id(index) in self.queue.requests:
                    body, state = self.make_step(index)
                    pieces[index] = [body] if state is self.package.ReplyState.WHOLE else [*pieces[index], body]
        self.finished.clear()
        return [b"".join(each) for each in pieces]

    def reply(self, index: int, body: dict[str, Any]) -> "tuple[bytes, ReplyState]":
        """Read a request if it is new, then make a step of it or let it wait; return what is sent now."""
        request_id = self.context.get_request_id(index)
        if request_id not in self.queue.requests and (reply := self.enqueue(index, body)) is not None:
            return reply
        action = self.queue.choose_action(request_id)
        if action is self.package.Action.STEP:
            return self.make_step(index)
        if action is self.package.Action.HOLD:
            return self.hold(index)
        queued = self.queue.requests[request_id]
        self.set_headers(index, queued)
        return queued.reply(position=self.queue.count_before(request_id)), self.package.ReplyState.MORE

    def hold(self, index: int) -> "tuple[bytes, ReplyState]":
        """Reply nothing; any reply would begin the response.

        TorchServe keeps a request whose id is left out of the message for the next call (ts/service.py encodes by this
        dictionary, 0.12.0).
        """
        del self.context.request_ids[index]
        return b"", self.package.ReplyState.MORE

    def enqueue(self, index: int, body: dict[str, Any]) -> "tuple[bytes, ReplyState] | None":
        """Read a new request and put it into the queue; return a reply if it does not enter."""
        request_id = self.context.get_request_id(index)
        if request_id in self.finished:
            return b"", self.package.ReplyState.LAST
        if self.is_grpc(index):
            return self.refuse_grpc(index), self.package.ReplyState.LAST
        try:
            self.queue.add(request_id, self.read_request(index, body), is_limited=self.is_continuous)
        except Exception as error:  # one request must not end the worker or its neighbours
            return self.write_error(error, index), self.package.ReplyState.WHOLE
        return None

    def read_request(self, index: int, body: dict[str, Any]) -> "Response":
        """Return the response to a new request, not yet begun.

        Raises:
            RequestError: the request is wrong.
        """
        headers, own_id = self.context.get_all_request_header(index), self.context.get_request_id(index)
        request = self.package.HttpRequest.read(body, headers, model=self.context.model_name, own_id=own_id)
        return self.service.answer(request)

    def make_step(self, index: int) -> "tuple[bytes, ReplyState]":
        """Make one step of a request, or a part of a long one; return what is sent now, and whether that is the end."""
        request_id = self.context.get_request_id(index)
        queued = self.queue.requests[request_id]
        try:
            body = next(queued.response.steps)
        except StopIteration as end:
            self.set_headers(index, queued)
            self.log_times(self.queue.requests.pop(request_id).response)
            if queued.has_begun:
                return end.value, self.package.ReplyState.LAST
            self.finished.add(request_id)  # TorchServe takes the end of a response only after its beginning
            return end.value, self.package.ReplyState.MORE
        except Exception as error:  # one request must not end the worker or its neighbours
            response = self.queue.requests.pop(request_id).response
            if queued.has_begun and self.is_continuous or response.images:
                _, described = self.describe_error(error, index)
                kind = response.content_type
                failure = response.api.write_failure(described, kind=kind, images=response.images)
                return failure, self.package.ReplyState.LAST
            return self.write_error(error, index), self.package.ReplyState.WHOLE
        queued.is_computing = body is None
        queued.has_stepped |= body is not None
        if queued.is_computing and queued.may_hold and self.is_continuous:
            return self.hold(index)
        self.set_headers(index, queued)
        body = body or b""
        return queued.reply(body) if self.is_continuous else body, self.package.ReplyState.MORE

    def is_describe_call(self, data: list[dict[str, Any]]) -> bool:
        """Say whether the management API asks what runs. A client with this header and an empty form looks alike."""
        headers = self.context.get_all_request_header(0)
        return headers.get("describe") == "True" and "explain" not in headers and data == [{}]

    def is_grpc(self, index: int) -> bool:
        """Say whether a request came by gRPC, which passes only the headers of its own sequences."""
        headers = self.context.get_all_request_header(index)
        return not any(isinstance(value, str) and not name.startswith("ts_") for name, value in headers.items())

    def refuse_grpc(self, index: int) -> bytes:
        """Return the error for a gRPC request next to others, as JSON: a status would hold for all of them."""
        # An answer in one piece has no such header, and TorchServe ends the worker for it (GRPCJob.response, 0.12.0).
        self.context.set_response_header(index, "ts_stream_next", "false")
        error = self.package.RequestError(GRPC_MESSAGE, status=HTTPStatus.NOT_IMPLEMENTED)
        _, described = self.describe_error(error, index)
        return json.dumps(described).encode()

    def set_headers(self, index: int, queued: "QueuedRequest") -> None:
        """Set a response's headers when it begins."""
        if not queued.has_begun:
            headers = {"content-type": queued.response.content_type, **queued.response.headers}
            for name, value in headers.items():
                self.context.set_response_header(index, name, value)

    def describe_error(self, error: Exception, index: int) -> tuple[int, dict[str, Any]]:
        """Return the HTTP status of a failed request and the error for its client."""
        headers, own_id = self.context.get_all_request_header(index), self.context.get_request_id(index)
        request_id, path = self.package.read_id(headers, own_id), self.package.find_header(headers, "url_path")
        described: tuple[int, dict[str, Any]] = self.package.describe_error(error, request_id, path=path)
        return described

    def write_error(self, error: Exception, index: int) -> bytes:
        """Return an error as JSON, and set the status of its response, which has not begun."""
        status, described = self.describe_error(error, index)
        self.context.set_response_status(status, HTTPStatus(status).phrase, index)
        self.context.set_response_content_type(index, "application/json")
        if status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.context.set_response_header(index, "Retry-After", RETRY_AFTER)
        return json.dumps(described).encode()

    def log_times(self, response: "Response") -> None:
        """Log the time of each stage of a finished request, in milliseconds."""
        if self.service.loaded.config.profile:
            for stage, seconds in response.seconds.items():
                self.context.metrics.add_time(f"ts_handler_{stage}", seconds * 1000)


def import_package() -> Any:
    """Return pipeline_utils, which imports the installed package.

    Raises:
        RuntimeError: the package is missing, or its version is another one.
    """
    try:
        import pipeline_utils
    except ImportError as error:
        raise RuntimeError(
            f"this archive was made for sdxl_server {MADE_FOR}, which cannot be imported here ({error}): "
            "pip install -r requirements.txt, then make the archive again (torch-model-archiver, step 2 of README)"
        ) from error
    return pipeline_utils
