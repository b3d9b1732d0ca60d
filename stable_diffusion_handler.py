"""TorchServe's side: bytes in, bytes out. TorchServe wants exactly one class in this file."""

import base64
import json
import logging
import os
import time
from collections.abc import Generator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import torch
from ts.metrics.dimension import Dimension
from ts.metrics.metric_type_enum import MetricTypes

import openai_images
from generation_request import GenerationRequest, RequestError, build_openapi
from pipeline_utils import (
    CompileConfig,
    HandlerConfig,
    LoadedPipeline,
    Progress,
    describe_picture,
    draw_preview,
    encode_picture,
    find_cut_prompts,
    generate,
    load_pipeline,
)

logger = logging.getLogger(__name__)

DESCRIBE_HINT = "The answer is at /predictions/<model>/<version>/describe"


class StableDiffusionHandler:
    """Answer each request with its pictures.

    Under continuousBatching TorchServe calls `handle` over and over with the requests that are in flight, and each call
    makes one denoising step of each. So requests join and leave between steps, and a client that has left is missing
    from the next call. The first call's answer commits the status and the headers of a response, so the first step is
    made before it. Without continuousBatching one call makes all steps.

    It does not derive from ts.torch_handler.BaseHandler, whose import loads OpenVINO's stock torch.compile backend.
    """

    context: Any
    loaded: LoadedPipeline

    def initialize(self, context: Any) -> None:
        """Load, compile and warm up the pipeline as model-config.yaml says; called once in each worker.

        Raises:
            ConfigError: names the key, what is accepted and what was given; the worker does not start.
        """
        # TorchServe would decode bodies before the handler sees them, and log what it cannot decode.
        os.environ["TS_DECODE_INPUT_REQUEST"] = "false"
        self.context = context
        self.running: dict[str, Generator[bytes, None, bytes]] = {}
        self.answered: set[str] = set()
        self.questioned: set[str] = set()
        settings = context.model_yaml_config or {}
        self.is_continuous = settings.get("continuousBatching") is True
        self.response_timeout, self.longest = float(settings.get("responseTimeout", 120)), 0.0
        properties = context.system_properties
        gpu_id = properties.get("gpu_id")
        device = f"cuda:{gpu_id}" if gpu_id is not None and torch.cuda.is_available() else "cpu"
        self.loaded = load_pipeline(
            HandlerConfig.parse(settings.get("handler")),
            CompileConfig.parse(settings.get("pt2")),
            model_dir=Path(properties["model_dir"]),
            device=device,
        )
        for part, figures in self.loaded.measure_parts().items():
            for name, (value, unit) in figures.items():
                context.metrics.add_metric(
                    name, value, unit, dimensions=[Dimension("Part", part)], metric_type=MetricTypes.GAUGE
                )
        logger.info("Ready: %s", json.dumps(self.loaded.describe()))

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[Any]:
        """Go one step on with each request in flight; return what to send of each response now."""
        start = time.monotonic()
        try:
            return self.go_on(data, context)
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

    def go_on(self, data: list[dict[str, Any]], context: Any) -> list[Any]:
        """Answer one call of TorchServe's; see `handle`."""
        self.context = context
        headers = context.get_all_request_header(0)
        in_flight = set(context.request_ids.values())
        # The management API's question, as which a client's request passes that has this header and an empty form.
        is_question = headers.get("describe") == "True" and "explain" not in headers and data == [{}]
        if is_question and in_flight.isdisjoint(self.running.keys() | self.answered):
            if not self.is_continuous:
                return [self.loaded.describe()]
            if in_flight == self.questioned:
                # TorchServe puts it back into its queue as it takes it out (Model.pollInferJob, 0.12.0).
                logger.error("TorchServe repeats this for ever under continuousBatching: restart it. %s", DESCRIBE_HINT)
                time.sleep(1)
            self.questioned = in_flight
        for request_id in self.running.keys() - in_flight:
            self.running.pop(request_id).close()
        self.answered &= in_flight
        replies = [self.advance(index, row) for index, row in enumerate(data)]
        if self.is_continuous:
            # True: this was the end of the response; False: more will come; None: this is all of it.
            context.stopping_criteria = [lambda _, is_last=is_last: is_last for _, is_last in replies]
            return [body for body, _ in replies]
        while any(request_id in self.running for request_id in in_flight):
            replies = [
                self.advance(index, row) if context.get_request_id(index) in self.running else replies[index]
                for index, row in enumerate(data)
            ]
        return [body for body, _ in replies]

    def advance(self, index: int, row: dict[str, Any]) -> tuple[bytes, bool | None]:
        """Make one step of a request; return what to send now, and what TorchServe is to make of it."""
        request_id = self.context.get_request_id(index)
        if request_id in self.answered:
            return b"", True
        is_new = request_id not in self.running
        try:
            if is_new:
                self.running[request_id] = self.serve(index, row)
            return next(self.running[request_id]), False
        except StopIteration as end:
            del self.running[request_id]
            if not is_new:
                return end.value, True
            self.answered.add(request_id)  # TorchServe takes the end of a response only after a beginning
            return end.value, False
        except Exception as error:  # one request must not take down the worker or its neighbours
            self.running.pop(request_id, None)
            has_begun = self.is_continuous and not is_new
            return self.report(error, index, has_begun=has_begun), True if has_begun else None

    def preprocess(self, index: int, row: dict[str, Any], path: str) -> GenerationRequest:
        """Return the request in a body, which is OpenAI's below one of its paths.

        Raises:
            RequestError: says what is wrong with it.
        """
        start = time.perf_counter()
        contract, content_type = self.loaded.contract, self._read_header(index, "content-type")
        if path:
            request = openai_images.parse_openai(row, path=path, content_type=content_type, contract=contract)
        else:
            request = contract.parse(row, content_type=content_type)
        # As JSON a prompt has no line breaks, so that it cannot forge a line of the log.
        logger.info("Request: %s", json.dumps(request.describe()))
        self._add_time("preprocess", time.perf_counter() - start)
        return request

    def serve(self, index: int, row: dict[str, Any]) -> Generator[bytes, None, bytes]:
        """Answer a request, yielding after each denoising step what to send then; return the rest of the answer.

        Args:
            index: the request's place in this call, valid until the first step.

        Raises:
            RequestError: the request is wrong.
            TimeoutError: the request's time is up.
        """
        start = time.monotonic()
        path = self.context.get_request_header(index, "url_path") or ""
        if path and path not in openai_images.PATHS:
            self.context.set_response_content_type(index, "application/json")
            return self.show_document(path)
        request = self.preprocess(index, row, path)
        warnings = find_cut_prompts(self.loaded, request)
        accepted = self._read_header(index, "accept")
        kind = f"image/{request.output_format}"
        if request.stream:
            kind = "text/event-stream"
        elif path or request.num_images_per_prompt > 1 or "application/json" in accepted:
            kind = "application/json"
        self.context.set_response_content_type(index, kind)
        self.context.set_response_header(index, "X-Seed", str(request.seed))
        if warnings:
            self.context.set_response_header(index, "X-Warning", "; ".join(warnings))
        steps, has_begun = self.inference(request, start), False
        try:
            while True:
                progress = next(steps)
                yield self.show_step(request, progress, path, time.monotonic() - start) if request.stream else b""
                has_begun = True
        except StopIteration as end:
            return self.postprocess(request, end.value, warnings, kind=kind, path=path)
        except Exception as error:
            if not (request.stream and has_begun):
                raise
            return openai_images.format_event("error", self.explain(error))
        finally:
            steps.close()

    def show_document(self, path: str) -> bytes:
        """Return what a path below the model's version names, as JSON.

        Raises:
            RequestError: there is no such path.
        """
        documents = {
            "describe": self.loaded.describe,
            "openapi.json": lambda: build_openapi(self.loaded.contract),
            "v1/models": lambda: openai_images.list_models(self.context.model_name),
        }
        if path not in documents:
            names = ", ".join((*documents, *openai_images.PATHS))
            raise RequestError(f"there is no {ascii(path)} here; there are {names}", status=404)
        return json.dumps(documents[path]()).encode()

    def show_step(self, request: GenerationRequest, progress: Progress, path: str, seconds: float) -> bytes:
        """Return the events of a stream after a step, a preview among them where one is due.

        Below OpenAI's paths the step itself is a comment, which keeps the connection alive and which clients skip.
        """
        left = seconds / progress.done * (progress.total - progress.done)
        events = f": step {progress.done} of {progress.total}\n\n".encode()
        if not path:
            told = {"step": progress.done, "total": progress.total, "seconds": seconds, "seconds_left": left}
            events = openai_images.format_event("progress", told)
        due = [round(progress.steps * (i + 1) / (request.partial_images + 1)) for i in range(request.partial_images)]
        for i, step in enumerate(due):
            if step == progress.step:
                file = encode_picture(draw_preview(self.loaded, progress), request)
                events += openai_images.format_picture(request, file, path=path, partial=i, index=progress.index)
        return events

    def inference(self, request: GenerationRequest, start: float) -> Generator[Progress, None, list[Any]]:
        """Make the pictures; the time that is noted is the work on them, without that on other requests between."""
        steps, seconds, progress = generate(self.loaded, request), 0.0, None
        try:
            while True:
                resumed = time.perf_counter()
                try:
                    progress = next(steps)
                finally:
                    seconds += time.perf_counter() - resumed
                if time.monotonic() - start > request.timeout:
                    raise TimeoutError(
                        f"the timeout of {request.timeout:g} s has passed after {progress.done} of {progress.total} "
                        "steps; ask for fewer steps or smaller pictures, or give a longer timeout"
                    )
                yield progress
        except StopIteration as end:
            self._add_time("inference", seconds)
            return end.value
        except GeneratorExit:
            if progress is not None:
                logger.info(
                    "The client has left; its work has ended after step %d of %d", progress.done, progress.total
                )
            raise
        finally:
            steps.close()

    def postprocess(
        self, request: GenerationRequest, images: list[Any], warnings: list[str], *, kind: str, path: str
    ) -> bytes:
        """Return the rest of the answer: the picture, or JSON or events with the pictures in base64."""
        start = time.perf_counter()
        described = [describe_picture(self.loaded, request, index) for index in range(len(images))]
        is_embedded = self.loaded.config.embed_parameters
        files = [
            encode_picture(image, request, parameters=parameters if is_embedded else None)
            for image, parameters in zip(images, described, strict=True)
        ]
        body = files[0]
        if kind == "text/event-stream":
            events = (openai_images.format_picture(request, file, path=path, index=i) for i, file in enumerate(files))
            body = b"".join(events)
        elif kind == "application/json":
            pictures = [
                {"b64_json": base64.b64encode(file).decode(), "seed": request.seed + i, "parameters": each["request"]}
                for i, (file, each) in enumerate(zip(files, described, strict=True))
            ]
            answer = {
                "created": int(time.time()),
                "data": pictures,
                "output_format": request.output_format,
                "size": f"{request.width}x{request.height}",
                "warnings": warnings,
            }
            body = json.dumps(answer).encode()
        self._add_time("postprocess", time.perf_counter() - start)
        return body

    def report(self, error: Exception, index: int, *, has_begun: bool) -> bytes:
        """Return an error as JSON, and set the status of the answer unless that has begun already."""
        explained = self.explain(error)
        if not has_begun:
            status = explained["error"]["code"]
            self.context.set_response_status(status, HTTPStatus(status).phrase, index)
            self.context.set_response_content_type(index, "application/json")
        return json.dumps(explained).encode()

    def explain(self, error: Exception) -> dict[str, Any]:
        """Return what a client is told of an error."""
        if isinstance(error, RequestError):
            status, kind, message = error.status, "invalid_request_error", str(error)
        elif isinstance(error, TimeoutError):
            status, kind, message = 504, "timeout_error", str(error)
        else:
            logger.error("The picture failed", exc_info=error)
            status, kind, message = 500, "server_error", "the picture failed; the server's log says why"
        return {"error": {"message": message, "type": kind, "param": getattr(error, "param", None), "code": status}}

    def _read_header(self, index: int, wanted: str) -> str:
        headers = self.context.get_all_request_header(index)
        return next((str(value) for name, value in headers.items() if name.lower() == wanted), "")

    def _add_time(self, stage: str, seconds: float) -> None:
        if self.loaded.config.profile:
            self.context.metrics.add_time(f"ts_handler_{stage}", seconds * 1000)
