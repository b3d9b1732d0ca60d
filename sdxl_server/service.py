"""Load the model; dispatch each HTTP request to an API; draw its images and answer."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

from sdxl_server import __version__, metrics
from sdxl_server.api.a1111 import A1111Api, A1111Img2ImgApi
from sdxl_server.api.a1111_controlnet import SCRIPT
from sdxl_server.api.a1111_documents import A1111_DOCUMENTS, CONTROLNET_DOCUMENTS
from sdxl_server.api.a1111_extras import A1111ExtraApi, A1111ExtraBatchApi
from sdxl_server.api.bodies import check_form
from sdxl_server.api.content_filter import ContentFilter
from sdxl_server.api.drawings import Drawing, Drawings
from sdxl_server.api.http import HttpRequest, Response, build_headers
from sdxl_server.api.image_encoding import encode_image
from sdxl_server.api.image_metadata import describe_image
from sdxl_server.api.marking import Marker
from sdxl_server.api.metadata import read_metadata_request
from sdxl_server.api.native import JSON, EncodedImage, NativeApi, split_chunks
from sdxl_server.api.openai import OpenAIApi, OpenAIEditApi, describe_model, list_models
from sdxl_server.api.openapi import build_openapi
from sdxl_server.api.warnings import list_warnings
from sdxl_server.config.compile_settings import CompileConfig
from sdxl_server.config.settings import HandlerConfig, check_server_keys
from sdxl_server.diffusion.generation import SkippedImage, generate
from sdxl_server.diffusion.previews import choose_preview_steps, draw_preview
from sdxl_server.diffusion.progress import GeneratedImage, Progress
from sdxl_server.errors import NotFiniteError, RequestError, VersionError, format_error
from sdxl_server.loading import load_pipeline
from sdxl_server.model.describe import describe_pipeline, list_uncompiled_components, measure_components
from sdxl_server.model.dtypes import choose_device
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.request.fields import GenerationRequest
from sdxl_server.request.masks import keep_protected
from sdxl_server.request.upload_limits import READ_SECONDS, limit_time
from sdxl_server.schemas import shorten

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
PAUSE_SECONDS = 1.0  # of waiting for the compute thread, after which the handler's call ends
APIS: Mapping[str, NativeApi] = {
    "": NativeApi(),
    "v1/images/generations": OpenAIApi(),
    "v1/images/edits": OpenAIEditApi(),
    "sdapi/v1/txt2img": A1111Api(),
    "sdapi/v1/img2img": A1111Img2ImgApi(),
    "sdapi/v1/extra-single-image": A1111ExtraApi(),
    "sdapi/v1/extra-batch-images": A1111ExtraBatchApi(),
}
# The APIs of other paths' errors.
ERRORS_BELOW: Mapping[str, type[NativeApi]] = {"v1": OpenAIApi, "sdapi": A1111Api, SCRIPT: A1111Api}


class Service:
    """A loaded pipeline behind its HTTP APIs.

    Args:
        loaded: the pipeline.
        archive: the version that the model archive was made for.
        patience: seconds of one computation during which the handler's calls return. After them a call lasts as long as
            the computation, so that TorchServe can find a worker that hangs.
        thread: the thread that has loaded the pipeline.
        marker, content_filter: as the settings say, by default.
    """

    def __init__(
        self,
        loaded: LoadedPipeline,
        *,
        archive: str = __version__,
        patience: float = 120.0,
        thread: concurrent.futures.ThreadPoolExecutor | None = None,
        marker: Marker | None = None,
        content_filter: ContentFilter | None = None,
    ) -> None:
        self.loaded, self.archive, self._patience = loaded, archive, patience
        self._marker = marker or Marker(loaded.config)
        self._filter = content_filter or ContentFilter(loaded.config.filter)
        # One thread makes the steps of all requests, because greenlets stay in their thread. The handler can reply
        # meanwhile.
        self._thread = thread or make_thread()
        self.drawings = Drawings()

    def answer(self, http_request: HttpRequest) -> Response:
        """Read a request and return its response. Nothing is drawn yet.

        Raises:
            RequestError: the request is wrong, or its path does not exist.
        """
        if http_request.path not in APIS:
            document = json.dumps(self._find_document(http_request)).encode()
            return Response(JSON, {}, NativeApi(), _send_whole(document), waits=False)
        api = APIS[http_request.path].begin(self.loaded.original)
        seconds: dict[str, float] = {}
        with _add_seconds(seconds, "preprocess"):
            with limit_time(READ_SECONDS):
                values, content_type = http_request.values, http_request.content_type
                warnings = check_form(values, content_type=content_type, length=http_request.content_length)
                request, more = api.read(values, content_type=content_type, contract=self.loaded.contract)
                warnings += more
                warnings += list_warnings(self.loaded, request, earlier=warnings)
            # JSON escapes the line breaks of a prompt, so that it cannot forge a log line.
            logger.info("Request: %s", json.dumps({"id": http_request.request_id, **request.describe()}))
        headers = build_headers(request.seed, warnings)
        content_type = api.choose_type(request, http_request.accept)
        response = Response(content_type, headers, api, _send_whole(b""), seconds=seconds)
        drawing = Drawing(http_request.holder, request, seconds)
        if api.takes_commands:
            self.drawings.add(drawing)
        response.steps = self._draw(http_request, drawing, response, warnings)
        return response

    def describe(self) -> dict[str, Any]:
        """Return what runs, and on which machine."""
        import torch

        from openvino_backend import find_processors

        report = describe_pipeline(self.loaded)
        processors = {**dataclasses.asdict(find_processors()), "torch_threads": torch.get_num_threads()}
        return {**report, "processors": processors, "versions": {**report["versions"], "archive": self.archive}}

    def _find_document(self, http_request: HttpRequest) -> Any:
        """Return the JSON document at a path.

        Raises:
            RequestError: there is none, or the request for it is wrong.
        """
        documents = {path.format(model=http_request.model): build for path, build in DOCUMENTS.items()}
        build = documents.get(http_request.path)
        if build is None:
            below = http_request.path.partition("/")[0]
            known = [each for each in (*documents, *APIS) if each]
            paths = ", ".join([each for each in known if each.startswith(f"{below}/")] or known)
            raise RequestError(f"there is no path {shorten(http_request.path)}; the paths are {paths}", status=404)
        with limit_time(READ_SECONDS):
            return build(self, http_request)

    def _draw(
        self, http_request: HttpRequest, drawing: Drawing, response: Response, warnings: list[str]
    ) -> Generator[bytes | None, None, bytes]:
        """Yield after each step the bytes to send, and None during a long step; return the last bytes."""
        api, seconds, counted, request = response.api, response.seconds, 0.0, drawing.request
        kind, written = response.content_type, b""
        for index in range(1 if request.is_drawn else request.num_images_per_prompt):
            yield from self._filter_content(response, request.get_single(index))
        uncompiled = list_uncompiled_components(self.loaded, request)
        if uncompiled and request.stream:  # a response without events waits, so that its status can still change
            yield api.write_compiling(uncompiled)
        steps = generate(self.loaded, request)
        try:
            while not drawing.is_interrupted and not (drawing.is_skipped and drawing.is_at_last_image):
                advance = (steps.throw, SkippedImage()) if drawing.is_skipped and drawing.progress else (next, steps)
                drawing.is_skipped = False
                drawing.progress = progress = yield from self._compute(seconds, "inference", *advance)
                is_last = progress.done == progress.total
                if progress.image is None:
                    _check_timeout(request, progress, seconds["inference"])
                written = b""
                if request.stream and not is_last:
                    written = yield from self._write_events(http_request, request, progress, response)
                if progress.image is not None:
                    single = request.get_single(progress.index)
                    yield from self._filter_content(response, single, progress.image.image)
                    with _add_seconds(seconds, "postprocess"):
                        image = self._encode(http_request, request, progress.image, progress.index, warnings)
                    written += api.write_image(request, image, progress.index, kind=kind, warnings=warnings)
                    response.images += 1
                    spent = seconds["inference"] + seconds["postprocess"]
                    metrics.IMAGE_SECONDS.observe(spent - counted)
                    counted = spent
                elif drawing.is_watched:
                    drawing.is_watched = False
                    drawing.preview = yield from self._draw_preview(http_request, request, progress, response)
                if is_last:
                    break
                yield (yield from _send_all_but_last(response, written))
                written = b""
            metrics.REQUESTS.labels("picture").inc()
            written += api.write_end(request, warnings)
            return (yield from _send_all_but_last(response, written))
        except GeneratorExit:
            if (progress := drawing.progress) is not None:
                message = "The client has left; its work has ended after step %d of %d, request %s"
                logger.info(message, progress.done, progress.total, http_request.request_id)
            raise
        finally:
            self._thread.submit(steps.close)  # after a step that is under way

    def _compute(
        self, seconds: dict[str, float], stage: str, function: Callable[..., _T], *arguments: Any
    ) -> Generator[None, None, _T]:
        """Call a function in the compute thread; yield now and then until it returns.

        Its time alone counts. It may wait for the step of another request, whose client has left.
        """

        def call() -> _T:
            with _add_seconds(seconds, stage):
                return function(*arguments)

        future, started = self._thread.submit(call), time.monotonic()
        try:
            while not future.done():
                is_slow = time.monotonic() - started > self._patience
                concurrent.futures.wait([future], timeout=None if is_slow else PAUSE_SECONDS)
                if not future.done():
                    yield None
            return future.result()
        finally:
            future.cancel()

    def _filter_content(
        self, response: Response, request: GenerationRequest, image: Any = None
    ) -> Generator[None, None, None]:
        """Raise what the content filter raises, if there is one; see `ContentFilter.check`."""
        if self._filter.is_active:
            yield from self._compute(response.seconds, "filter", self._filter.check, request, image)

    def _write_events(
        self, http_request: HttpRequest, request: GenerationRequest, progress: Progress, response: Response
    ) -> Generator[None, None, bytes]:
        """Return a stream's events after a step: progress, and the previews that are due. Failed ones are left out."""
        api, spent = response.api, response.seconds["inference"]
        events = api.write_step(done=progress.done, total=progress.total, seconds=spent, share=progress.share)
        due = choose_preview_steps(request.partial_images, steps=progress.steps)
        numbers = [number for number, step in enumerate(due) if step == progress.step]
        if numbers and (file := (yield from self._draw_preview(http_request, request, progress, response))):
            for number in numbers:
                events += api.write_preview(request, file, index=progress.index, number=number)
        return events

    def _draw_preview(
        self, http_request: HttpRequest, request: GenerationRequest, progress: Progress, response: Response
    ) -> Generator[None, None, bytes | None]:
        """Return the file of a preview after a step. None: it failed, or there is none that the checker can check."""
        if self.loaded.config.safety_checker is not None or progress.denoiser is None:
            return None
        try:
            preview = yield from self._compute(response.seconds, "inference", draw_preview, self.loaded, progress)
        except Exception as error:
            logger.error("A preview failed: %s; request %s", format_error(error), http_request.request_id)
            return None
        preview = keep_protected(preview, request)
        yield from self._filter_content(response, request, preview)
        return encode_image(preview, request, marker=self._marker)

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
        file = encode_image(generated.image, request, marker=self._marker, parameters=embedded)
        unet_calls = f"{generated.unet_calls:g} of {generated.calls_of_all}"
        return EncodedImage(file, request.get_seed(index), described["request"], unet_calls, described)


def _answer_a1111(build: Callable[..., Any], service: Service, http_request: HttpRequest) -> Any:
    """Return one of A1111's documents. It may be a command to the client's own drawing."""
    return build(service.loaded, http_request, service.drawings.find_oldest(http_request.holder))


# Answered at once, also while images are drawn. {model} is the model's name in the URL.
DOCUMENTS: Mapping[str, Callable[[Service, HttpRequest], Any]] = {
    "describe": lambda service, _: service.describe(),
    "openapi.json": lambda service, _: build_openapi(service.loaded.contract),
    "metadata": lambda service, http_request: read_metadata_request(
        http_request.values, service.loaded.contract.limits, content_type=http_request.content_type
    ),
    "v1/models": lambda _, http_request: list_models(http_request.model),
    "v1/models/{model}": lambda _, http_request: describe_model(http_request.model),
    **{f"sdapi/v1/{name}": functools.partial(_answer_a1111, build) for name, build in A1111_DOCUMENTS.items()},
    **{f"{SCRIPT}/{name}": functools.partial(_answer_a1111, build) for name, build in CONTROLNET_DOCUMENTS.items()},
}


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


def _send_all_but_last(response: Response, written: bytes) -> Generator[bytes, None, bytes]:
    """Yield all chunks but the last, and return that. No keep-alive may stand between two chunks."""
    response.may_pause = False
    *chunks, last = split_chunks(written)
    yield from chunks
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
        gpu_id: the GPU that TorchServe chose, if any.
        archive: the version that the archive was made for.

    Raises:
        VersionError: the archive was made for another version of this package.
        ConfigError: names the key, what is accepted and what was given.
    """
    from openvino_backend import find_processors, limit_torch

    if archive != __version__:
        raise VersionError(
            f"this archive was made for sdxl_server {archive}, and {__version__} is installed: make the archive again "
            "(torch-model-archiver, step 2 of README)"
        )
    check_server_keys(settings)
    limit_torch(find_processors())
    device = choose_device(settings.get("deviceType"), gpu_id=gpu_id)
    config, is_ready = HandlerConfig.parse(settings.get("handler")), threading.Event()
    marker, content_filter = Marker(config), ContentFilter(config.filter)  # their mistakes are found before the load
    if config.metrics_address is not None:
        metrics.serve_metrics(config.metrics_address, is_ready, drain_file=config.drain_file)
    thread, compilation = make_thread(), CompileConfig.parse(settings.get("pt2"))
    # CUDA graphs belong to the thread that has made them.
    loaded = thread.submit(load_pipeline, config, compilation, model_dir=model_dir, device=device).result()
    metrics.register_components(functools.partial(measure_components, loaded))
    is_ready.set()
    patience = float(settings.get("responseTimeout", 120))
    return Service(
        loaded, archive=archive, patience=patience, thread=thread, marker=marker, content_filter=content_filter
    )


def make_thread() -> concurrent.futures.ThreadPoolExecutor:
    """Return the thread that computes."""
    return concurrent.futures.ThreadPoolExecutor(1, "compute")


def describe_error(error: Exception, request_id: str, *, path: str = "") -> tuple[int, dict[str, Any]]:
    """Count a failed request; return the HTTP status and the error for its client, in the form of the path's API."""
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
    api = ERRORS_BELOW.get(path.partition("/")[0], NativeApi)
    return api.describe_error(error, message, status=status, kind=kind)
