"""TorchServe's side: bytes in, bytes out. TorchServe wants exactly one class in this file."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from ts.handler_utils.timer import timed
from ts.metrics.dimension import Dimension
from ts.metrics.metric_type_enum import MetricTypes

from pipeline_utils import (
    CompileConfig,
    GenerationRequest,
    HandlerConfig,
    LoadedPipeline,
    RequestError,
    encode_jpeg,
    generate,
    load_pipeline,
)

logger = logging.getLogger(__name__)


class StableDiffusionHandler:
    """Answer each prompt with a JPEG.

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
        settings = context.model_yaml_config or {}
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
        """Answer a batch: one JPEG or JSON error for each request, with its own status."""
        self.context = context
        if context.get_request_header(0, "describe") == "True":
            return [self.loaded.describe()] * len(data)
        return self.postprocess(self.inference(self.preprocess(data)))

    @timed
    def preprocess(self, data: list[dict[str, Any]]) -> list[GenerationRequest | Exception]:
        """Return for each body the request in it, or what is wrong with it."""
        return [self._read_request(index, row) for index, row in enumerate(data)]

    @timed
    def inference(self, requests: list[GenerationRequest | Exception]) -> list[Any]:
        """Return for each request its picture, or what went wrong."""
        return [request if isinstance(request, Exception) else self._make_picture(request) for request in requests]

    @timed
    def postprocess(self, results: list[Any]) -> list[bytes]:
        """Return for each picture its JPEG, for each error its JSON, and set the status of each answer."""
        return [self._answer(index, result) for index, result in enumerate(results)]

    def _read_request(self, index: int, row: dict[str, Any]) -> GenerationRequest | Exception:
        body = row.get("body", row.get("data"))
        headers = {name.lower(): value for name, value in self.context.get_all_request_header(index).items()}
        try:
            if not isinstance(body, (bytes, bytearray)):
                raise RequestError("the request has no body; it takes the prompt as text or as JSON", param="prompt")
            return GenerationRequest.parse(bytes(body), headers.get("content-type", ""), self.loaded.config)
        except RequestError as error:
            return error

    def _make_picture(self, request: GenerationRequest) -> Any:
        # As JSON a prompt has no line breaks, so that it cannot forge a line of the log.
        logger.info("Prompt: %s", json.dumps(request.prompt))
        try:
            return generate(
                self.loaded.pipeline, request, on_step=lambda step, steps: logger.debug("Step %d of %d", step, steps)
            )
        except Exception as error:  # one request must not take down the worker or its neighbours
            logger.exception("The picture failed")
            return error

    def _answer(self, index: int, result: Any) -> bytes:
        if not isinstance(result, Exception):
            self.context.set_response_content_type(index, "image/jpeg")
            return encode_jpeg(result, quality=self.loaded.config.jpeg_quality)
        if isinstance(result, RequestError):
            status, phrase, kind = 400, "Bad Request", "invalid_request_error"
            error = {"message": str(result), "type": kind, "param": result.param}
        else:
            status, phrase = 500, "Internal Server Error"
            error = {"message": "the picture failed; the server's log says why", "type": "server_error", "param": None}
        self.context.set_response_status(status, phrase, index)
        self.context.set_response_content_type(index, "application/json")
        return json.dumps({"error": error}).encode()
