"""The native API: its requests, its responses and their events."""

import base64
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdxl_server.api.bodies import read_fields
from sdxl_server.api.warnings import warn_of_body, warn_of_tags
from sdxl_server.request.contract import Contract
from sdxl_server.request.fields import GenerationRequest

JSON, EVENTS = "application/json", "text/event-stream"
# Bytes. TorchServe ends a worker if its replies to all requests together exceed max_response_size.
MAX_CHUNK = 8_000_000


@dataclass(frozen=True)
class EncodedImage:
    """An encoded image with its parameters.

    Attributes:
        file: the bytes of the image file.
        seed: the seed of this image.
        parameters: the fields that generate it again.
        unet_calls: the UNet calls for it, such as "11 of 30".
        metadata: all that is known about it, see `describe_image`.
    """

    file: bytes
    seed: int
    parameters: Mapping[str, Any]
    unet_calls: str
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class NativeApi:
    """Reads the contract's fields; responds with an image file, with JSON, or with events.

    Attributes:
        event: the prefix of the event names of images.
        takes_json_only: a response is never an image file.
        takes_commands: its clients can watch, skip and end a drawing.
        error_extras: JSON members next to `error`, in a response whose status 200 is already sent.
    """

    event = "image_generation"
    takes_json_only = False
    takes_commands = False
    error_extras: Mapping[str, Any] = {}

    def begin(self, model: Mapping[str, str]) -> "NativeApi":
        """Return the object for one request. An API that keeps something of the request returns a new one.

        Args:
            model: the model's name and digests; see `describe_original`.
        """
        return self

    def read(
        self, values: Mapping[str, Any], *, content_type: str, contract: Contract
    ) -> tuple[GenerationRequest, list[str]]:
        """Return the request in TorchServe's parameters, and warnings.

        Raises:
            RequestError: names the field, what is accepted and what was given.
        """
        fields = read_fields(values, content_type=content_type, properties=contract.properties, aliases={})
        return contract.check(fields), [*warn_of_body(fields), *warn_of_tags(fields, contract.limits)]

    def choose_type(self, request: GenerationRequest, accepted: str) -> str:
        """Return the content type of the response.

        Args:
            accepted: the header `Accept`.
        """
        if request.stream:
            return EVENTS
        if self.takes_json_only or request.num_images_per_prompt > 1 or JSON in accepted.lower():
            return JSON
        return f"image/{request.output_format}"

    def write_waiting(self, position: int, *, kind: str) -> bytes:
        """Return what a client that waits is sent: its new position in the queue, or for 0 a keep-alive.

        JSON may start with white space. An image can carry neither.
        """
        if position and kind == EVENTS:
            return format_event("queue", {"place": position})
        return {EVENTS: b":\n\n", JSON: b" "}.get(kind, b"")

    def write_compiling(self, parts: Sequence[str]) -> bytes:
        """Return the event that lists the components to compile first."""
        return format_event("compiling", {"parts": list(parts)})

    def write_step(self, *, done: int, total: int, seconds: float, share: float) -> bytes:
        """Return the event after a step.

        Args:
            share: the completed share of the UNet calls.
        """
        left = seconds / share * (1 - share)
        return format_event("progress", {"step": done, "total": total, "seconds": seconds, "seconds_left": left})

    def write_preview(self, request: GenerationRequest, file: bytes, *, index: int, number: int) -> bytes:
        """Return the event of preview `number` of image `index`."""
        data = {**_describe_event(request, file, seed=request.get_seed(index)), "index": index}
        return format_event(f"{self.event}.partial_image", {**data, "partial_image_index": number})

    def write_image(
        self, request: GenerationRequest, image: EncodedImage, index: int, *, kind: str, warnings: Sequence[str]
    ) -> bytes:
        """Return what is sent when image `index` is finished: its file, its event, or its part of the JSON."""
        if kind == EVENTS:
            return self._write_completed(request, image, index, warnings=warnings)
        if kind != JSON:
            return image.file
        about = {"created": int(time.time()), "output_format": request.output_format}
        about |= {"size": "{}x{}".format(*request.image_size), "warnings": list(warnings)}
        start = b", " if index else json.dumps(about).removesuffix("}").encode() + b', "data": ['
        end = b"]}" if index + 1 == request.num_images_per_prompt else b""
        return start + json.dumps(_describe_item(request, image)).encode() + end

    def write_end(self, request: GenerationRequest, warnings: Sequence[str]) -> bytes:
        """Return what is sent when all images are finished, or the client has ended the drawing."""
        return b""

    def _write_completed(
        self, request: GenerationRequest, image: EncodedImage, index: int, *, warnings: Sequence[str]
    ) -> bytes:
        details = {"image_tokens": 0, "text_tokens": 0}  # not counted here; OpenAI's client requires it
        usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0, "input_tokens_details": details}
        data = {**_describe_event(request, image.file, seed=image.seed), "index": index, "usage": usage}
        data |= {"parameters": image.parameters, "unet_calls": image.unet_calls, "warnings": list(warnings)}
        return format_event(f"{self.event}.completed", data)

    def write_failure(self, error: Mapping[str, Any], *, kind: str, images: int) -> bytes:
        """Return an error that ends a response which has begun.

        Args:
            images: how many were sent. In JSON they stand before the error.
        """
        if kind == EVENTS:
            return format_event("error", error)
        if images:
            return b"], " + json.dumps(error).encode().removeprefix(b"{")
        return json.dumps({**error, **self.error_extras}).encode()

    @classmethod
    def describe_error(cls, error: Exception, message: str, *, status: int, kind: str) -> tuple[int, dict[str, Any]]:
        """Return the HTTP status of a failed request and the error for its client.

        Args:
            status, kind: the status and the type of the error in the native API.
        """
        param, code = getattr(error, "param", None), cls.choose_code(error, status)
        return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @classmethod
    def choose_code(cls, error: Exception, status: int) -> int | str | None:
        """Return the `code` of an error: the status."""
        return status


def split_chunks(written: bytes) -> Iterator[bytes]:
    """Yield chunks that are small enough for TorchServe, at least one."""
    for start in range(0, max(len(written), 1), MAX_CHUNK):
        yield written[start : start + MAX_CHUNK]


def format_event(kind: str, data: Mapping[str, Any]) -> bytes:
    """Return a server-sent event."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode()


def _describe_item(request: GenerationRequest, image: EncodedImage) -> dict[str, Any]:
    """Return an image as JSON has it.

    Next to `url` there is `b64_json` too, for clients that cannot read a data: URL.
    """
    content = base64.b64encode(image.file).decode()
    is_url = request.response_format == "url"
    url = {"url": f"data:image/{request.output_format};base64,{content}"} if is_url else {}
    return {
        "b64_json": content,
        **url,
        "seed": image.seed,
        "parameters": image.parameters,
        "unet_calls": image.unet_calls,
    }


def _describe_event(request: GenerationRequest, file: bytes, *, seed: int) -> dict[str, Any]:
    return {
        "b64_json": base64.b64encode(file).decode(),
        "created_at": int(time.time()),
        "output_format": request.output_format,
        "size": "{}x{}".format(*request.image_size),
        "background": "opaque",
        "quality": "auto",
        "seed": seed,
    }


IMAGES_SCHEMA = {
    "type": "object",
    "required": ["created", "data", "warnings"],
    "properties": {
        "created": {"type": "integer", "description": "seconds since 1970"},
        "data": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["b64_json", "seed", "parameters", "unet_calls"],
                "properties": {
                    "b64_json": {"type": "string", "contentEncoding": "base64"},
                    "url": {"type": "string", "description": "with response_format url: the same as a data: URL"},
                    "seed": {"type": "integer"},
                    "parameters": {"type": "object", "description": "the fields that generate this image again"},
                    "unet_calls": {"type": "string", "description": "UNet calls for it, such as 11 of 30"},
                },
            },
        },
        "size": {"type": "string"},
        "output_format": {"type": "string"},
        "warnings": {"type": "array", "items": {"type": "string"}},
        "error": {"type": "object", "description": "why images are missing, as in a response with another status"},
    },
}
ERROR_SCHEMA = {
    "type": "object",
    "description": "The handler's errors have `error`. TorchServe's own errors have the other three.",
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {
                    "type": ["integer", "null"],
                    "description": "the HTTP status, even if the response began with 200; null on OpenAI's paths",
                },
            },
        },
        "code": {"type": "integer"},
        "type": {"type": "string"},
        "message": {"type": "string"},
    },
}
