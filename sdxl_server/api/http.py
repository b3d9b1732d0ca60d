"""A client's request and the response to it, between TorchServe's handler and the service."""

import enum
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from sdxl_server.api.native import NativeApi

REQUEST_ID = "X-Request-Id"
HOLDER = "X-Holder"  # nginx sets it, so that no client can name another one
HARMLESS_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)  # safe in a log and in a header


class ReplyState(enum.Enum):
    """The part of a response that a reply is. The values are TorchServe's stopping criteria."""

    WHOLE = None
    MORE = False
    LAST = True


@dataclass(frozen=True)
class HttpRequest:
    """A request as a client sent it.

    Attributes:
        values: the body, or the parts of a form, by name.
        path: the part of the URL after the model's version.
        content_type, content_length, accept: these headers, empty if missing.
        model: the model's name in the URL.
        request_id: the id in the log. TorchServe always writes its own id into X-Request-Id; nginx writes this one.
        is_id_given: the client sent the id. Then the image's metadata contains it too. Without an id, equal requests
            get equal files.
        holder: the owner of the client's API key.
    """

    values: Mapping[str, Any]
    path: str = ""
    content_type: str = ""
    content_length: str = ""
    accept: str = ""
    model: str = "diffusion_fast"
    request_id: str = ""
    is_id_given: bool = False
    holder: str = ""

    @classmethod
    def read(cls, values: Mapping[str, Any], headers: Mapping[str, Any], *, model: str, own_id: str) -> Self:
        """Return the request of a body and its headers; see `read_id`."""
        given = find_header(headers, REQUEST_ID)
        request_id = read_id(headers, own_id)
        return cls(
            values,
            path=find_header(headers, "url_path"),
            content_type=find_header(headers, "content-type"),
            content_length=find_header(headers, "content-length"),
            accept=find_header(headers, "accept"),
            model=model,
            request_id=request_id,
            is_id_given=request_id == given,
            holder=find_header(headers, HOLDER),
        )


@dataclass
class Response:
    """The response to a request, from reading the request to the last byte.

    Attributes:
        content_type, headers: sent before the first step.
        api: writes the response.
        steps: yields the bytes to send after each step, or None during a long one, and returns the last bytes.
        images: how many were sent.
        waits: it waits in the queue; a document does not.
        seconds: the time of each finished stage, by name.
        may_pause: the last bytes were complete, so that a keep-alive may follow.
    """

    content_type: str
    headers: Mapping[str, str]
    api: NativeApi
    steps: Generator[bytes | None, None, bytes]
    waits: bool = True
    images: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    may_pause: bool = True


def build_headers(seed: int, warnings: Sequence[str]) -> dict[str, str]:
    """Return a response's own headers."""
    return {"X-Seed": str(seed)} | ({"X-Warning": "; ".join(warnings)} if warnings else {})


def find_header(headers: Mapping[str, Any], wanted: str) -> str:
    """Return a header by its name in any case, empty if missing.

    TorchServe's headers also contain form fields and query parameters, as mappings.
    """
    found = (value for name, value in headers.items() if name.lower() == wanted.lower() and isinstance(value, str))
    return next(found, "")


def read_id(headers: Mapping[str, Any], own_id: str) -> str:
    """Return a request's id: the client's if it is safe, or else TorchServe's own."""
    given = find_header(headers, REQUEST_ID)
    return given if HARMLESS_ID.fullmatch(given) else own_id
