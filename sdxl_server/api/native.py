"""The native API's face: what its requests say, and what its answers are made of, events included."""

import base64
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdxl_server.api.bodies import read_fields
from sdxl_server.api.warnings import warn_of_body
from sdxl_server.request.contract import Contract
from sdxl_server.request.fields import GenerationRequest

JSON, EVENTS = "application/json", "text/event-stream"
# Bytes. TorchServe ends a worker whose reply, with those to other requests beside it, is above max_response_size.
MAX_PIECE = 8_000_000


@dataclass(frozen=True)
class MadePicture:
    """A picture as it is sent.

    Attributes:
        file: its bytes.
        seed: its own.
        parameters: the fields that make it again.
        unet_calls: that were made for it, of how many, in words.
    """

    file: bytes
    seed: int
    parameters: Mapping[str, Any]
    unet_calls: str


class NativeFace:
    """Reads a request as the contract has it; answers with the picture, with JSON, or with events.

    Attributes:
        event: what the names of a picture's events begin with.
        takes_json_only: an answer is never a picture as itself.
        beside_error: what stands beside the error of an answer in JSON whose status of 200 is sent already.
    """

    event = "image_generation"
    takes_json_only = False
    beside_error: Mapping[str, Any] = {}

    def read(
        self, values: Mapping[str, Any], *, content_type: str, contract: Contract
    ) -> tuple[GenerationRequest, list[str]]:
        """Return the request in the parameters that TorchServe hands over, and warnings of what was left out of it.

        Raises:
            RequestError: names the field, what is accepted and what was given.
        """
        fields = read_fields(values, content_type=content_type, properties=contract.properties, aliases={})
        return contract.check(fields), warn_of_body(fields)

    def choose_type(self, request: GenerationRequest, accepted: str) -> str:
        """Return the content type of the answer.

        Args:
            accepted: the header `Accept`.
        """
        if request.stream:
            return EVENTS
        if self.takes_json_only or request.num_images_per_prompt > 1 or JSON in accepted:
            return JSON
        return f"image/{request.output_format}"

    def write_place(self, place: int, *, kind: str) -> bytes:
        """Return what tells a client that waits how many requests are before its own."""
        return format_event("queue", {"place": place}) if kind == EVENTS else self.write_pause(kind=kind)

    def write_pause(self, *, kind: str) -> bytes:
        """Return what flows where nothing is to be told: a comment, or white space, which may stand before JSON.

        A picture as itself can carry neither.
        """
        return {EVENTS: b":\n\n", JSON: b" "}.get(kind, b"")

    def write_compiling(self, parts: Sequence[str]) -> bytes:
        """Return the event of a stream that tells which parts of the model are compiled first."""
        return format_event("compiling", {"parts": list(parts)})

    def write_step(self, *, done: int, total: int, seconds: float, share: float) -> bytes:
        """Return the event of a stream after a step.

        Args:
            share: of the calls of the UNet, those that are made.
        """
        left = seconds / share * (1 - share)
        return format_event("progress", {"step": done, "total": total, "seconds": seconds, "seconds_left": left})

    def write_preview(self, request: GenerationRequest, file: bytes, *, index: int, number: int) -> bytes:
        """Return the event of preview `number` of picture `index`."""
        data = {**_describe_event(request, file, seed=request.get_seed(index)), "index": index}
        return format_event(f"{self.event}.partial_image", {**data, "partial_image_index": number})

    def write_pictures(
        self, request: GenerationRequest, pictures: Sequence[MadePicture], *, kind: str, warnings: Sequence[str]
    ) -> Iterator[bytes]:
        """Write the end of an answer of a content type: the picture, or all of them in JSON or in events.

        One picture after the other, so that no more than one is held in base64.
        """
        if kind == EVENTS:
            for index, each in enumerate(pictures):
                yield self._write_completed(request, each, index, warnings=warnings)
        elif kind != JSON:
            yield pictures[0].file
        else:
            about = {"created": int(time.time()), "output_format": request.output_format}
            about |= {"size": f"{request.width}x{request.height}", "warnings": list(warnings)}
            yield json.dumps(about).removesuffix("}").encode() + b', "data": ['
            for index, each in enumerate(pictures):
                yield (b", " if index else b"") + json.dumps(_describe_picture(request, each)).encode()
            yield b"]}"

    def _write_completed(
        self, request: GenerationRequest, picture: MadePicture, index: int, *, warnings: Sequence[str]
    ) -> bytes:
        details = {"image_tokens": 0, "text_tokens": 0}  # nothing is counted here, and the official client asks for it
        usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0, "input_tokens_details": details}
        data = {**_describe_event(request, picture.file, seed=picture.seed), "index": index, "usage": usage}
        data |= {"parameters": picture.parameters, "unet_calls": picture.unet_calls, "warnings": list(warnings)}
        return format_event(f"{self.event}.completed", data)

    def write_failure(self, error: Mapping[str, Any], *, kind: str) -> bytes:
        """Return an error in the place of what is left of an answer."""
        return format_event("error", error) if kind == EVENTS else json.dumps({**error, **self.beside_error}).encode()


def split_pieces(written: Iterable[bytes]) -> Iterator[bytes]:
    """Split what is written into pieces that TorchServe takes from its worker, at least one.

    What is shorter is joined, since each piece takes a call of the handler.
    """
    held = b""
    for each in written:
        if held and len(held) + len(each) > MAX_PIECE:
            yield held
            held = b""
        start = 0
        while len(each) - start > MAX_PIECE:
            yield each[start : start + MAX_PIECE]
            start += MAX_PIECE
        held += each[start:]
    yield held


def format_event(kind: str, data: Mapping[str, Any]) -> bytes:
    """Return a server-sent event."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode()


def _describe_picture(request: GenerationRequest, picture: MadePicture) -> dict[str, Any]:
    """Return a picture as it stands in JSON."""
    content = base64.b64encode(picture.file).decode()
    name = request.response_format
    shown = f"data:image/{request.output_format};base64,{content}" if name == "url" else content
    return {
        name: shown,
        "seed": picture.seed,
        "parameters": picture.parameters,
        "unet_calls": picture.unet_calls,
    }


def _describe_event(request: GenerationRequest, file: bytes, *, seed: int) -> dict[str, Any]:
    return {
        "b64_json": base64.b64encode(file).decode(),
        "created_at": int(time.time()),
        "output_format": request.output_format,
        "size": f"{request.width}x{request.height}",
        "background": "opaque",
        "quality": "auto",
        "seed": seed,
    }


PICTURES_SCHEMA = {
    "type": "object",
    "required": ["created", "data", "warnings"],
    "properties": {
        "created": {"type": "integer", "description": "seconds since 1970"},
        "data": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["seed", "parameters", "unet_calls"],
                "properties": {
                    "b64_json": {"type": "string", "contentEncoding": "base64"},
                    "url": {"type": "string", "description": "with response_format url: the picture as a data: URL"},
                    "seed": {"type": "integer"},
                    "parameters": {"type": "object", "description": "the fields that make this picture again"},
                    "unet_calls": {"type": "string", "description": "made for it, such as 11 of 30"},
                },
            },
        },
        "size": {"type": "string"},
        "output_format": {"type": "string"},
        "warnings": {"type": "array", "items": {"type": "string"}},
    },
}
ERROR_SCHEMA = {
    "type": "object",
    "description": "The handler's errors have `error`; TorchServe's own have the other three.",
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "integer", "description": "the HTTP status, also where one of 200 was sent before"},
            },
        },
        "code": {"type": "integer"},
        "type": {"type": "string"},
        "message": {"type": "string"},
    },
}
