"""Bodies and forms, as TorchServe passes them, and the fields in them."""

import codecs
import json
import re
from collections.abc import Mapping
from email.message import Message
from typing import Any

from sdxl_server.errors import RequestError
from sdxl_server.request.fields import DECLARATIONS
from sdxl_server.request.upload_limits import MAX_FIELDS
from sdxl_server.schemas import is_valid, load_json, read_number, shorten

BODY_NAMES = ("body", "data")  # TorchServe's names for a body that is not a form
URLENCODED, FORM = "application/x-www-form-urlencoded", "multipart/form-data"
SEND_JSON = "send Content-Type: application/json"
UNREAD_FORM = re.compile(rb"\s*--\S+\r?\ncontent-", re.IGNORECASE)  # TorchServe passes it as a body
# The longest first: UTF-32's mark begins with UTF-16's. These codecs remove the mark.
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# A fixed list: some of Python's codecs need quadratic time, and Python caches each name that it looks up.
CHARSETS = (
    *("utf-8", "utf8", "us-ascii", "ascii", "utf-16", "utf-16le", "utf-16be", "utf-32", "utf-32le", "utf-32be"),
    *(f"iso-8859-{number}" for number in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 14, 15, 16)),
    *("latin1", *(f"windows-{number}" for number in range(1250, 1259)), "koi8-r", "koi8-u"),
    *("shift_jis", "euc-jp", "iso-2022-jp", "euc-kr", "gb2312", "gbk", "gb18030", "big5"),
)
# Bytes in a part of a form, without its name. Clients write up to 98 for a text, and 364 with a file name of 255 bytes.
TEXT_HEADERS, FILE_HEADERS = 128, 400
MAX_UNEXPLAINED = 4096  # further bytes that a form's headers may have, such as long file names in two encodings
ABSENT = ("", "none", "null", "undefined")  # how programs write a missing value into a form
SWITCHES = {
    **dict.fromkeys(("true", "on", "yes", "1"), True),
    **dict.fromkeys(("false", "off", "no", "0"), False),
}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)


def read_fields(
    values: Mapping[str, Any], *, content_type: str, properties: Mapping[str, Any], aliases: Mapping[str, str]
) -> dict[str, Any]:
    """Return the fields in TorchServe's parameters: a `body`, or the fields of a form.

    A body is a JSON object, or plain text, which is the prompt. Without a content type a body that starts with a brace
    or a bracket is JSON. An empty part of a form is null.

    Args:
        properties: the JSON Schema of each field.
        aliases: other names of fields.

    Raises:
        RequestError: the body or the form cannot be read.
    """
    if len(values) > MAX_FIELDS:
        raise RequestError(f"a form takes at most {MAX_FIELDS} fields, not {len(values)}")
    kind = content_type.partition(";")[0].strip().lower()
    if kind == URLENCODED:
        _check_names(values)
    fields = {
        name: read_part(name, value, own=aliases.get(name, name), properties=properties)
        for name, value in values.items()
        if name not in BODY_NAMES
    }
    body = next((values[name] for name in BODY_NAMES if name in values), None)
    if isinstance(body, (bytes, bytearray)) and UNREAD_FORM.match(body) or not values and kind == FORM:
        raise RequestError(
            "the form was not read: its boundary is missing or wrong in the Content-Type; leave this header to the "
            "library that writes the form"
        )
    if isinstance(body, (bytes, bytearray)) and (body or not fields):
        for name, value in _read_body(bytes(body), kind=kind, charset=_read_charset(content_type)).items():
            if fields.get(name) is not None:
                raise RequestError(f"{shorten(name)} is given twice, in the body and in a form or the URL", param=name)
            fields[name] = value
    elif not fields:
        raise RequestError("the request has no body; send the prompt as text or as JSON", param="prompt")
    return fields


def check_form(values: Mapping[str, Any], *, content_type: str, length: str) -> list[str]:
    """Refuse a form that lost an image: TorchServe passes only the last part of each name.

    A text or a small image that is lost cannot be distinguished from headers. Then a warning is returned.

    Args:
        length: the header Content-Length. TorchServe sets it if the client does not.

    Raises:
        RequestError: the form was longer than its parts with any file names and headers.
    """
    boundary = re.search(r'(?i)^multipart/form-data\b.*\bboundary="?([^";]+)', content_type)
    if boundary is None or not (length.isdecimal() and len(length) < 20):
        return []
    around = len(f'--{boundary[1]}\r\nContent-Disposition: form-data; name=""\r\n\r\n\r\n')
    files = [name for name in values if _is_upload(name.removesuffix("[]")) or name == "mask"]
    left = int(length) - len(f"--{boundary[1]}--")
    for name, value in values.items():
        known = len(value) if isinstance(value, (bytes, bytearray)) else 0
        headers = FILE_HEADERS if name in files else TEXT_HEADERS
        left -= around + len(name.encode("utf-8", "replace")) + known + headers
    if files and left > MAX_UNEXPLAINED:
        raise RequestError(
            "the form has parts of equal names, and TorchServe keeps only the last: send one image and each field once",
            param=min(files),  # an image rather than its mask
        )
    return ["the form may have parts of equal names; only the last of them is read"] if left > 0 else []


def rename_fields(fields: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields under their own names, without those that are null.

    Raises:
        RequestError: one field is given under two names.
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


def read_part(name: str, value: Any, *, own: str, properties: Mapping[str, Any]) -> Any:
    """Return a form's field in the type of its schema, or as text if it cannot be read so. None: it is absent.

    Args:
        own: the field's own name.
    """
    if not isinstance(value, (bytes, bytearray)):
        return value
    raw = bytes(value)
    if _is_upload(own):
        return None if raw.strip().lower() in (each.encode() for each in ABSENT) else value
    # An unknown field is refused or ignored by its name, even if it is a file.
    content = decode_text(raw, f"the field {shorten(name)}") if own in properties else raw.decode(errors="replace")
    word, schema = content.strip().lower(), properties.get(own, {})
    if not content or word in ABSENT and not (schema and is_valid(content, schema)):
        return None
    kinds = schema.get("type", "string")
    if "string" in kinds:
        return content
    if "boolean" in kinds and word in SWITCHES:
        return SWITCHES[word]
    try:
        return load_json(content)
    except ValueError:
        return read_number(word) if NUMBER.fullmatch(word) else content


def _check_names(values: Mapping[str, Any]) -> None:
    """Refuse JSON and texts that were sent as a form.

    TorchServe cuts them at `&` and `=`, and reads the pieces as names of fields. It drops pieces without `=`.

    Raises:
        RequestError: says what to send.
    """
    if not values:
        raise RequestError(f"the form has no field: {SEND_JSON}, or text/plain for a plain prompt")
    if any(name.lstrip("\ufeff \t\r\n")[:1] in ("{", "[") for name in values):
        raise RequestError(f"the body is JSON that was sent as a form: {SEND_JSON}")
    if len(values) == 1 and " " in next(iter(values)):
        raise RequestError("the body is text that was sent as a form: send Content-Type: text/plain", param="prompt")


def _read_body(body: bytes, *, kind: str, charset: str | None) -> dict[str, Any]:
    if "json" in kind and charset is None and (found := json.detect_encoding(body)) not in ("utf-8", "utf-8-sig"):
        charset = found
    content = decode_text(body, "the body", charset=charset)
    if "json" not in kind and (kind or content.lstrip()[:1] not in ("{", "[")):
        return {"prompt": content}
    try:
        fields = load_json(content)
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RequestError(
            f'the body is JSON but no object: send {{"prompt": "a red fox"}}, for example, not {shorten(content)}'
        )
    return fields


def _read_charset(content_type: str) -> str | None:
    """Return the charset in the header, or None.

    Raises:
        RequestError: this charset is not accepted.
    """
    header = Message()
    header["Content-Type"] = content_type.encode("ascii", "replace").decode()  # other bytes raise errors later
    given = header.get_param("charset")
    if given is None:
        return None
    name = str(given).strip().lower()
    if name not in CHARSETS:
        raise RequestError(f"charset takes one of {', '.join(CHARSETS)}, not {shorten(given)}")
    return name


def decode_text(raw: bytes, what: str, *, charset: str | None = None) -> str:
    """Return a text without its byte order mark, which takes precedence over the header's charset.

    Raises:
        RequestError: names the first byte that is wrong.
    """
    marked = next((codec for mark, codec in BYTE_ORDER_MARKS.items() if raw.startswith(mark)), None)
    codec = marked or charset or "utf-8"
    try:
        return raw.decode(codec)
    except UnicodeDecodeError as error:
        name = "UTF-8" if codec in ("utf-8", "utf-8-sig") else codec
        hint = "" if marked or charset else "; name another charset in the Content-Type, as ; charset=iso-8859-1"
        raise RequestError(f"{what} is not {name}: byte {error.start} is {raw[error.start]:#04x}{hint}") from error
