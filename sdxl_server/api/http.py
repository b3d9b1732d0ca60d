"""What a client sent and what it is answered, as the handler passes them between TorchServe and the service."""

import enum
import re
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from sdxl_server.api.native import NativeFace

REQUEST_ID = "X-Request-Id"
HARMLESS_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)  # may stand in a log and in a header


class State(enum.Enum):
    """What a reply is of an answer; the values are those of TorchServe's stopping criteria."""

    WHOLE = None
    MORE = False
    LAST = True


@dataclass(frozen=True)
class Call:
    """What a client sent.

    Attributes:
        values: the body, or the parts of a form, by name.
        path: what follows the model's version in the address.
        content_type, content_length, accept: the headers of these names, empty where there is none.
        model: the name that the client knows the model by.
        request_id: what the log calls it. TorchServe writes its own into the answer's header X-Request-Id, over
            any other; nginx puts this one there.
        is_id_given: the id came with the request, so that the picture's metadata holds it too; without one, the same
            request gets the same file.
    """

    values: Mapping[str, Any]
    path: str = ""
    content_type: str = ""
    content_length: str = ""
    accept: str = ""
    model: str = "diffusion_fast"
    request_id: str = ""
    is_id_given: bool = False

    @classmethod
    def read(cls, values: Mapping[str, Any], headers: Mapping[str, Any], *, model: str, own_id: str) -> Self:
        """Return the call of a body and its headers; see `read_id`."""
        given = read_header(headers, REQUEST_ID)
        request_id = read_id(headers, own_id)
        return cls(
            values,
            path=read_header(headers, "url_path"),
            content_type=read_header(headers, "content-type"),
            content_length=read_header(headers, "content-length"),
            accept=read_header(headers, "accept"),
            model=model,
            request_id=request_id,
            is_id_given=request_id == given,
        )


@dataclass
class Answer:
    """The answer to a call, from its reading to its end.

    Attributes:
        content_type, headers: to send before the first of the steps.
        face: that writes it.
        steps: yields after each step what to send then, and returns the rest.
        waits: it has to wait for its turn; a document does not.
        seconds: of each stage that is over, by its name.
        may_pause: what was sent last is whole, so that a word of the wait may stand after it.
    """

    content_type: str
    headers: Mapping[str, str]
    face: NativeFace
    steps: Generator[bytes, None, bytes]
    waits: bool = True
    seconds: dict[str, float] = field(default_factory=dict)
    may_pause: bool = True

    def write_place(self, place: int) -> bytes:
        """Return what tells the client how many requests are before its own; nothing where it cannot be told."""
        return self.face.write_place(place, kind=self.content_type) if self.may_pause else b""

    def write_pause(self) -> bytes:
        """Return what shows the client, and what stands between, that the answer is still to come."""
        return self.face.write_pause(kind=self.content_type) if self.may_pause else b""

    def write_failure(self, error: Mapping[str, Any]) -> bytes:
        """Return an error in the place of what is left of an answer that has begun."""
        return self.face.write_failure(error, kind=self.content_type)


def read_header(headers: Mapping[str, Any], wanted: str) -> str:
    """Return a header, whose name may be in any case, empty where there is none.

    A form's field or a query's parameter of that name stands among TorchServe's headers too, as a mapping.
    """
    found = (value for name, value in headers.items() if name.lower() == wanted.lower() and isinstance(value, str))
    return next(found, "")


def read_id(headers: Mapping[str, Any], own_id: str) -> str:
    """Return a request's id: what it brought along, where that is harmless, or else TorchServe's own."""
    given = read_header(headers, REQUEST_ID)
    return given if HARMLESS_ID.fullmatch(given) else own_id
