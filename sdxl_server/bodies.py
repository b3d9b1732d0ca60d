"""What TorchServe hands over of a request: from a body, or the parts of a form, to fields as the client wrote them."""

import re
from collections.abc import Mapping
from typing import Any

from sdxl_server.errors import RequestError
from sdxl_server.fields import DECLARATIONS
from sdxl_server.limits import MAX_FIELDS
from sdxl_server.schemas import load_json, shorten

BODY = ("body", "data")  # TorchServe's names for what is no form
ROOM_OF_FILE, ROOM_OF_TEXT = 300, 64  # bytes of a form's part for a file's name and further headers


def read_fields(
    values: Mapping[str, Any], *, content_type: str, properties: Mapping[str, Any], aliases: Mapping[str, str]
) -> dict[str, Any]:
    """Return the fields in the parameters that TorchServe hands over: a `body`, or the fields of a form.

    A body is a JSON object, or the prompt itself as text; without a content type it is JSON when it starts with a
    brace.

    Args:
        properties: the JSON Schema of each field.
        aliases: the fields' other names.

    Raises:
        RequestError: the body is none of these.
    """
    if len(values) > MAX_FIELDS:
        raise RequestError(f"a form takes at most {MAX_FIELDS} fields, not {len(values)}")
    fields = {
        name: _read_part(name, value, properties.get(aliases.get(name, name), {}))
        if not _is_upload(aliases.get(name, name))
        else value
        for name, value in values.items()
        if name not in BODY
    }
    body = next((values[name] for name in BODY if name in values), None)
    if isinstance(body, (bytes, bytearray)) and (body or not fields):
        for name, value in _read_body(bytes(body), content_type).items():
            if name in fields:
                raise RequestError(f"{shorten(name)} is given twice, in the body and beside it", param=name)
            fields[name] = value
    elif not fields:
        raise RequestError("the request has no body; it takes the prompt as text or as JSON", param="prompt")
    return fields


def check_parts(values: Mapping[str, Any], *, content_type: str, length: str) -> None:
    """Refuse a form that was longer than what is here of it: of parts of one name TorchServe hands over the last.

    Args:
        length: the header Content-Length, which TorchServe sets where a client does not.

    Raises:
        RequestError: there is room for more than the file names and headers of its parts, which nobody tells.
    """
    boundary = re.search(r'(?i)^multipart/form-data\b.*\bboundary="?([^";]+)', content_type)
    if boundary is None or not (length.isdecimal() and len(length) < 20):
        return
    around = len(f'--{boundary[1]}\r\nContent-Disposition: form-data; name=""\r\n\r\n\r\n')
    left = int(length) - len(f"--{boundary[1]}--")
    for name, value in values.items():
        room = ROOM_OF_FILE if "image" in name or "mask" in name else ROOM_OF_TEXT
        known = len(value) if isinstance(value, (bytes, bytearray)) else 0
        left -= around + len(name.encode("utf-8", "replace")) + known + room
    if left > 0:
        raise RequestError(
            "the form has more parts than came through, since of several of one name TorchServe keeps the last: send "
            "one image and each field once (a file's name may have 200 bytes)",
            param=next((name for name in values if name.partition("[")[0] == "image"), None),
        )


def rename_fields(fields: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields by their own names.

    Raises:
        RequestError: two names of one field are given.
    """
    renamed: dict[str, Any] = {}
    for name, value in fields.items():
        own = aliases.get(name, name)
        if value is None:
            continue
        if own in renamed:
            other = next(each for each in fields if each != name and aliases.get(each, each) == own)
            raise RequestError(f"{name} and {other} are one field; give one of them", param=name)
        renamed[own] = value
    return renamed


def _is_upload(name: str) -> bool:
    return name in DECLARATIONS and DECLARATIONS[name].is_upload


def _read_part(name: str, value: Any, schema: Mapping[str, Any]) -> Any:
    """Return a form's field in the type that its schema asks for, as far as it can be read so."""
    if not isinstance(value, (bytes, bytearray)):
        return value
    content = _decode(bytes(value), f"the field {shorten(name)}")
    if "string" in schema.get("type", ["string"]):
        return content
    try:
        return load_json(content)
    except ValueError:
        return content


def _read_body(body: bytes, content_type: str) -> dict[str, Any]:
    content = _decode(body, "the body")
    if "json" not in content_type and (content_type or not content.lstrip().startswith("{")):
        return {"prompt": content}
    try:
        fields = load_json(content)
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RequestError(
            f'the body is JSON but no object such as {{"prompt": "a red fox"}}: it is {shorten(content)}'
        )
    return fields


def _decode(raw: bytes, what: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{what} is not UTF-8: byte {error.start} is {raw[error.start]:#04x}") from error
