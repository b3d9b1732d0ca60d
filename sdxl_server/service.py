"""Load the model; dispatch each HTTP request to an API; draw its images and answer."""

import contextlib
import dataclasses
import functools
import json
import logging
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from sdxl_server import __version__, metrics
from sdxl_server.api.bodies import check_form
from sdxl_server.api.http import HttpRequest, Response, build_headers
from sdxl_server.api.image_files import encode_image
from sdxl_server.api.image_metadata import describe_image
from sdxl_server.api.native import JSON, EncodedImage, NativeApi, split_chunks
from sdxl_server.api.openai import OpenAIApi, OpenAIEditApi, describe_model, list_models
from sdxl_server.api.openapi import build_openapi
from sdxl_server.api.warnings import list_warnings
from sdxl_server.config.settings import CompileConfig, HandlerConfig, check_server_keys
from sdxl_server.diffusion.generation import GeneratedImage, Progress, generate
from sdxl_server.diffusion.previews import choose_preview_steps, draw_preview
from sdxl_server.errors import NotFiniteError, RequestError, VersionError, format_error
from sdxl_server.loading import load_pipeline
from sdxl_server.model.describe import describe_pipeline, list_uncompiled_components, measure_components
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.request.fields import GenerationRequest
from sdxl_server.request.masks import keep_protected
from sdxl_server.request.upload_limits import READ_SECONDS, limit_time
from sdxl_server.schemas import shorten

logger = logging.getLogger(__name__)

APIS: Mapping[str, NativeApi] = {
    "": NativeApi(),
    "v1/images/generations": OpenAIApi(),
    "v1/images/edits": OpenAIEditApi(),
}


class Service:
    """A loaded pipeline behind its HTTP APIs.

    Args:
        loaded: the pipeline.
        archive: the version that the model archive was made for.
    """

    def __init__(self, loaded: LoadedPipeline, *, archive: str = __version__) -> None:
        self.loaded, self.archive = loaded, archive

    def answer(self, http_request: HttpRequest) -> Response:
        """Read a request and return its response. Nothing is drawn yet.

        Raises:
            RequestError: the request is wrong, or its path does not exist.
        """
        api = APIS.get(http_request.path)
        if api is None:
            document = self._read_document(http_request)
            return Response(JSON, {}, APIS[""], _send_whole(document), waits=False)
        seconds: dict[str, float] = {}
        with _add_seconds(seconds, "preprocess"):
            with limit_time(READ_SECONDS):
                values, content_type = http_request.values, http_request.content_type
                check_form(values, content_type=content_type, length=http_request.content_length)
                request, warnings = api.read(values, content_type=content_type, contract=self.loaded.contract)
                warnings += list_warnings(self.loaded, request, earlier=warnings)
            # JSON escapes the line breaks of a prompt, so that it cannot forge a log line.
            logger.info("Request: %s", json.dumps({"id": http_request.request_id, **request.describe()}))
        headers = build_headers(request.seed, warnings)
        content_type = api.choose_type(request, http_request.accept)
        response = Response(content_type, headers, api, _send_whole(b""), seconds=seconds)
        response.steps = self._draw(http_request, request, response, warnings)
        return response

    def describe(self) -> dict[str, Any]:
        """Return what runs, and on which machine."""
        import torch

        from openvino_backend import find_processors

        report = describe_pipeline(self.loaded)
        processors = {**dataclasses.asdict(find_processors()), "torch_threads": torch.get_num_threads()}
        return {**report, "processors": processors, "versions": {**report["versions"], "archive": self.archive}}

    def _read_document(self, http_request: HttpRequest) -> bytes:
        """Return the JSON document at a path.

        Raises:
            RequestError: there is none.
        """
        path, model = http_request.path, http_request.model
        if path == "describe":
            return json.dumps(self.describe()).encode()
        if path == "openapi.json":
            return json.dumps(build_openapi(self.loaded.contract)).encode()
        if path == "v1/models":
            return list_models(model)
        if path == f"v1/models/{model}":
            return json.dumps(describe_model(model)).encode()
        paths = ", ".join(("describe", "openapi.json", "v1/models", f"v1/models/{model}", *filter(None, APIS)))
        raise RequestError(f"there is no path {shorten(path)}; the paths are {paths}", status=404)

    def _draw(
        self, http_request: HttpRequest, request: GenerationRequest, response: Response, warnings: list[str]
    ) -> Generator[bytes, None, bytes]:
        """Yield after each step the bytes to send; return the last ones."""
        api, seconds, progress = response.api, response.seconds, None
        uncompiled = list_uncompiled_components(self.loaded, request)
        if uncompiled and request.stream:  # a response without events waits, so that its status can still change
            yield api.write_compiling(uncompiled)
        steps = generate(self.loaded, request)
        try:
            while True:
                with _add_seconds(seconds, "inference"):
                    progress = next(steps)
                _check_timeout(request, progress, seconds["inference"])
                events = self._write_events(request, progress, api, seconds["inference"])
                yield (yield from _send_all_but_last(response, [events]))
        except StopIteration as end:
            images: list[GeneratedImage] = end.value
        except GeneratorExit:
            if progress is not None:
                message = "The client has left; its work has ended after step %d of %d, request %s"
                logger.info(message, progress.done, progress.total, http_request.request_id)
            raise
        finally:
            steps.close()
        with _add_seconds(seconds, "postprocess"):
            made = [self._encode(http_request, request, each, i, warnings) for i, each in enumerate(images)]
        written = api.write_images(request, made, kind=response.content_type, warnings=warnings)
        last = yield from _send_all_but_last(response, written)
        for _ in made:
            metrics.IMAGE_SECONDS.observe((seconds["inference"] + seconds["postprocess"]) / len(made))
        metrics.REQUESTS.labels("picture").inc()
        return last

    def _write_events(self, request: GenerationRequest, progress: Progress, api: NativeApi, seconds: float) -> bytes:
        """Return the stream's events after a step: progress, and the previews that are due."""
        if not request.stream:
            return b""
        events = api.write_step(done=progress.done, total=progress.total, seconds=seconds, share=progress.share)
        due = choose_preview_steps(request.partial_images, steps=progress.steps)
        numbers = [number for number, step in enumerate(due) if step == progress.step]
        if numbers:
            file = encode_image(keep_protected(draw_preview(self.loaded, progress), request), request)
            for number in numbers:
                events += api.write_preview(request, file, index=progress.index, number=number)
        return events

    def _encode(
        self,
        http_request: HttpRequest,
        request: GenerationRequest,
        generated: GeneratedImage,
        index: int,
        warnings: Sequence[str],
    ) -> EncodedImage:
        """Return an image's file, with the parameters that make it again."""
        described = describe_image(self.loaded, request, index, unet_calls=generated.unet_calls, warnings=warnings)
        if http_request.is_id_given:
            described["request_id"] = http_request.request_id
        embedded = described if self.loaded.config.embed_parameters else None
        file = encode_image(generated.image, request, parameters=embedded)
        unet_calls = f"{generated.unet_calls:g} of {generated.calls_of_all}"
        return EncodedImage(file, request.get_seed(index), described["request"], unet_calls)


@contextlib.contextmanager
def _add_seconds(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add a block's time to its stage. Time between two blocks, spent on other requests, does not count."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - start


def _check_timeout(request: GenerationRequest, progress: Progress, seconds: float) -> None:
    """Raise TimeoutError when the work on a request has taken longer than its timeout."""
    if seconds > request.timeout:
        raise TimeoutError(
            f"the timeout of {request.timeout:g} s has passed after {progress.done} of {progress.total} steps; "
            "ask for fewer steps or smaller images, or give a longer timeout"
        )


def _send_all_but_last(response: Response, written: Iterable[bytes]) -> Generator[bytes, None, bytes]:
    """Yield all chunks but the last, and return that. No keep-alive may stand between two chunks."""
    response.may_pause = False
    chunks = split_chunks(written)
    last = next(chunks)
    for chunk in chunks:
        yield last
        last = chunk
    response.may_pause = True
    return last


def _send_whole(document: bytes) -> Generator[bytes, None, bytes]:
    """Return a document as a generator without steps."""
    return document
    yield


def load_service(settings: Mapping[str, Any], *, model_dir: Path, gpu_id: int | None, archive: str) -> Service:
    """Load, compile and warm up the pipeline as model-config.yaml says.

    Args:
        model_dir: the archive's folder.
        gpu_id: the CUDA device that TorchServe chose, if any.
        archive: the version that the archive was made for.

    Raises:
        VersionError: the archive was made for another version of this package.
        ConfigError: names the key, what is accepted and what was given.
    """
    import torch

    from openvino_backend import find_processors, limit_torch

    if archive != __version__:
        raise VersionError(
            f"this archive was made for sdxl_server {archive}, and {__version__} is installed: make the archive again "
            "(torch-model-archiver, step 2 of README)"
        )
    check_server_keys(settings)
    limit_torch(find_processors())
    device = f"cuda:{gpu_id}" if gpu_id is not None and torch.cuda.is_available() else "cpu"
    config, is_ready = HandlerConfig.parse(settings.get("handler")), threading.Event()
    if config.metrics_address is not None:
        metrics.serve_metrics(config.metrics_address, is_ready)
    loaded = load_pipeline(config, CompileConfig.parse(settings.get("pt2")), model_dir=model_dir, device=device)
    metrics.register_components(functools.partial(measure_components, loaded))
    is_ready.set()
    return Service(loaded, archive=archive)


def describe_error(error: Exception, request_id: str) -> dict[str, Any]:
    """Count a failed request and return the error for its client; `code` is the HTTP status."""
    if isinstance(error, RequestError):
        kind = "server_busy" if error.status == HTTPStatus.SERVICE_UNAVAILABLE else "invalid_request_error"
        status, message = error.status, str(error)
    elif isinstance(error, TimeoutError):
        status, kind, message = 504, "timeout_error", str(error)
    elif isinstance(error, NotFiniteError):
        status, kind, message = 500, "server_error", str(error)
        logger.error("%s; request %s", message, request_id)
    else:
        status, kind, message = 500, "server_error", "the image failed; the server's log says why"
        logger.error("The image failed: %s; request %s", format_error(error), request_id)
    metrics.count_failure(status)
    return {"error": {"message": message, "type": kind, "param": getattr(error, "param", None), "code": status}}
