"""One call's way: its request is read, drawn, and answered in the words of the API that it came by."""

import dataclasses
import functools
import json
import logging
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from sdxl_server import __version__, metrics
from sdxl_server.api.bodies import check_parts
from sdxl_server.api.http import Answer, Call
from sdxl_server.api.image_files import encode_picture
from sdxl_server.api.image_metadata import describe_picture
from sdxl_server.api.native import JSON, MadePicture, NativeFace, split_pieces
from sdxl_server.api.openai import OpenAIEditFace, OpenAIFace, describe_model, list_models
from sdxl_server.api.openapi import build_openapi
from sdxl_server.api.warnings import list_warnings
from sdxl_server.config.settings import CompileConfig, HandlerConfig, check_server_keys
from sdxl_server.diffusion.generation import Picture, Progress, generate
from sdxl_server.diffusion.previews import choose_preview_steps, draw_preview
from sdxl_server.errors import NotFiniteError, RequestError, VersionError, format_error
from sdxl_server.loading import load_pipeline
from sdxl_server.model.describe import describe_pipeline, list_uncompiled, measure_parts
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.request.fields import GenerationRequest
from sdxl_server.request.masks import keep_protected
from sdxl_server.request.upload_limits import READ_SECONDS, limit_time
from sdxl_server.schemas import shorten

logger = logging.getLogger(__name__)

FACES: Mapping[str, NativeFace] = {
    "": NativeFace(),
    "v1/images/generations": OpenAIFace(),
    "v1/images/edits": OpenAIEditFace(),
}


class Service:
    """A loaded pipeline and the faces that it is reached by.

    Args:
        loaded: the pipeline.
        archive: the version that the model archive was made for.
    """

    def __init__(self, loaded: LoadedPipeline, *, archive: str = __version__) -> None:
        self.loaded, self.archive = loaded, archive

    def describe(self) -> dict[str, Any]:
        """Return what runs, and what it runs on."""
        import torch

        from openvino_backend import find_processors

        report = describe_pipeline(self.loaded)
        processors = {**dataclasses.asdict(find_processors()), "torch_threads": torch.get_num_threads()}
        return {**report, "processors": processors, "versions": {**report["versions"], "archive": self.archive}}

    def answer(self, call: Call) -> Answer:
        """Return the answer to a call, of which no step has been made.

        Raises:
            RequestError: the request is wrong, or there is nothing at its path.
        """
        face = FACES.get(call.path)
        if face is None:
            document = self.read_document(call)
            return Answer(JSON, {}, FACES[""], _send_whole(document), waits=False)
        start = time.perf_counter()
        with limit_time(READ_SECONDS):
            check_parts(call.values, content_type=call.content_type, length=call.content_length)
            request, warnings = face.read(call.values, content_type=call.content_type, contract=self.loaded.contract)
            warnings += list_warnings(self.loaded, request, told=warnings)
        # As JSON a prompt has no line breaks, so that it cannot forge a line of the log.
        logger.info("Request: %s", json.dumps({"id": call.request_id, **request.describe()}))
        kind = face.choose_type(request, call.accept)
        headers = {"X-Seed": str(request.seed)} | ({"X-Warning": "; ".join(warnings)} if warnings else {})
        answer = Answer(kind, headers, face, _send_whole(b""))
        answer.seconds["preprocess"] = time.perf_counter() - start
        answer.steps = self._draw(call, request, answer, warnings)
        return answer

    def read_document(self, call: Call) -> bytes:
        """Return what a path names that is no face.

        Raises:
            RequestError: there is no such path.
        """
        if call.path == "describe":
            return json.dumps(self.describe()).encode()
        if call.path == "openapi.json":
            return json.dumps(build_openapi(self.loaded.contract)).encode()
        if call.path == "v1/models":
            return list_models(call.model)
        if call.path == f"v1/models/{call.model}":
            return json.dumps(describe_model(call.model)).encode()
        names = ", ".join(("describe", "openapi.json", "v1/models", f"v1/models/{call.model}", *filter(None, FACES)))
        raise RequestError(f"there is no {shorten(call.path)} here; there are {names}", status=404)

    def _draw(
        self, call: Call, request: GenerationRequest, answer: Answer, warnings: list[str]
    ) -> Generator[bytes, None, bytes]:
        """Yield after each step what to send then; return the rest."""
        face, seconds = answer.face, answer.seconds
        steps = self._make_steps(call, request, seconds)
        uncompiled = list_uncompiled(self.loaded, request)
        if uncompiled and request.stream:  # of any other answer the beginning waits, and with it the status
            yield face.write_compiling(uncompiled)
        try:
            while True:
                progress = next(steps)
                answer.may_pause = False
                shown = self._show_step(request, progress, face, seconds["inference"])
                last = yield from _leave_last(split_pieces([shown]))
                answer.may_pause = True
                yield last
        except StopIteration as end:
            answer.may_pause = False
            resumed = time.perf_counter()
            made = [
                self._finish(call, request, picture, index, warnings=warnings)
                for index, picture in enumerate(end.value)
            ]
            seconds["postprocess"] = time.perf_counter() - resumed
            written = face.write_pictures(request, made, kind=answer.content_type, warnings=warnings)
            last = yield from _leave_last(split_pieces(written))
            for _ in made:
                metrics.PICTURE_SECONDS.observe((seconds["inference"] + seconds["postprocess"]) / len(made))
            metrics.REQUESTS.labels("picture").inc()
            return last
        finally:
            steps.close()

    def _make_steps(
        self, call: Call, request: GenerationRequest, seconds: dict[str, float]
    ) -> Generator[Progress, None, list[Picture]]:
        """Make the pictures; the time that counts is the work on them, without that on other requests between."""
        steps, progress = generate(self.loaded, request), None
        seconds["inference"] = 0.0
        try:
            while True:
                resumed = time.perf_counter()
                try:
                    progress = next(steps)
                finally:
                    seconds["inference"] += time.perf_counter() - resumed
                if seconds["inference"] > request.timeout:
                    raise TimeoutError(
                        f"the timeout of {request.timeout:g} s has passed after {progress.done} of {progress.total} "
                        "steps; ask for fewer steps or smaller pictures, or give a longer timeout"
                    )
                yield progress
        except StopIteration as end:
            pictures: list[Picture] = end.value
            return pictures
        except GeneratorExit:
            if progress is not None:
                logger.info(
                    "The client has left; its work has ended after step %d of %d, request %s",
                    progress.done,
                    progress.total,
                    call.request_id,
                )
            raise
        finally:
            steps.close()

    def _show_step(self, request: GenerationRequest, progress: Progress, face: NativeFace, seconds: float) -> bytes:
        """Return the events of a stream after a step, a preview among them where one is due."""
        if not request.stream:
            return b""
        events = face.write_step(done=progress.done, total=progress.total, seconds=seconds, share=progress.share)
        due = choose_preview_steps(request.partial_images, steps=progress.steps)
        numbers = [number for number, step in enumerate(due) if step == progress.step]
        if numbers:
            file = encode_picture(keep_protected(draw_preview(self.loaded, progress), request), request)
            for number in numbers:
                events += face.write_preview(request, file, index=progress.index, number=number)
        return events

    def _finish(
        self, call: Call, request: GenerationRequest, picture: Picture, index: int, *, warnings: Sequence[str]
    ) -> MadePicture:
        described = describe_picture(self.loaded, request, index, unet_calls=picture.unet_calls, warnings=warnings)
        if call.is_id_given:
            described["request_id"] = call.request_id
        calls = f"{picture.unet_calls:g} of {picture.calls_of_all}"
        embedded = described if self.loaded.config.embed_parameters else None
        file = encode_picture(picture.image, request, parameters=embedded)
        return MadePicture(file, request.get_seed(index), described["request"], calls)


def load_service(settings: Mapping[str, Any], *, model_dir: Path, gpu_id: int | None, archive: str) -> Service:
    """Load, compile and warm up the pipeline as model-config.yaml says.

    Args:
        model_dir: the archive's folder.
        gpu_id: of the CUDA device that TorchServe chose, if any.
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
            "(torch-model-archiver, README's step 2)"
        )
    check_server_keys(settings)
    limit_torch(find_processors())
    device = f"cuda:{gpu_id}" if gpu_id is not None and torch.cuda.is_available() else "cpu"
    config, is_ready = HandlerConfig.parse(settings.get("handler")), threading.Event()
    if config.metrics_address is not None:
        metrics.serve_metrics(config.metrics_address, is_ready)
    loaded = load_pipeline(
        config,
        CompileConfig.parse(settings.get("pt2")),
        model_dir=model_dir,
        device=device,
    )
    metrics.watch_parts(functools.partial(measure_parts, loaded))
    is_ready.set()
    return Service(loaded, archive=archive)


def explain(error: Exception, request_id: str) -> dict[str, Any]:
    """Count a request that ended with an error; return what its client is told, in which `code` is the HTTP status."""
    if isinstance(error, RequestError):
        kind = "server_busy" if error.status == HTTPStatus.SERVICE_UNAVAILABLE else "invalid_request_error"
        status, message = error.status, str(error)
    elif isinstance(error, TimeoutError):
        status, kind, message = 504, "timeout_error", str(error)
    elif isinstance(error, NotFiniteError):
        status, kind, message = 500, "server_error", str(error)
        logger.error("%s; request %s", message, request_id)
    else:
        logger.error("The picture failed: %s; request %s", format_error(error), request_id)
        status, kind, message = 500, "server_error", "the picture failed; the server's log says why"
    metrics.count_failure(status)
    return {"error": {"message": message, "type": kind, "param": getattr(error, "param", None), "code": status}}


def _leave_last(pieces: Iterator[bytes]) -> Generator[bytes, None, bytes]:
    """Yield all pieces but the last, which is returned."""
    last = next(pieces)
    for piece in pieces:
        yield last
        last = piece
    return last


def _send_whole(document: bytes) -> Generator[bytes, None, bytes]:
    """Return an answer that takes no step."""
    return document
    yield
