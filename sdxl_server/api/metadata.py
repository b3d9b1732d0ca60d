"""Read the metadata of an image file: our own, A1111's text, or ComfyUI's graph. Only the file's header is read."""

import io
import warnings
from collections.abc import Callable, Mapping
from typing import Any
from xml.etree import ElementTree

from sdxl_server.api.bodies import BODY_NAMES, read_fields
from sdxl_server.api.comfyui import read_graph
from sdxl_server.api.image_encoding import XMP_NAMESPACE, XMP_PROPERTY
from sdxl_server.api.infotext import read_infotext
from sdxl_server.errors import RequestError
from sdxl_server.request.limits import Limits
from sdxl_server.request.upload_limits import MAX_JPEG_PIXELS, check_segments
from sdxl_server.request.uploads import ACCEPTED_IMAGE, PILLOW_FORMATS, read_bytes
from sdxl_server.schemas import load_json, shorten

FILES = ("image/", "application/octet-stream")  # content types of a body that is the file itself
MAX_XMP = 4 * 2**20  # bytes


def read_metadata(file: bytes, limits: Limits) -> dict[str, Any]:
    """Return the metadata of an image file: `request`, its fields for this server; `warnings`; `made_with`.

    Args:
        limits: with the samplers and adapters of this server, for other programs' names.

    Raises:
        RequestError: the file is no image, or holds no metadata that can be read.
    """
    found = read_header(file)
    readers: tuple[tuple[str, Callable[[str], dict[str, Any] | None]], ...] = (
        ("xmp", _read_own),
        ("parameters", _read_own),  # of older versions
        ("parameters", lambda text: read_infotext(text, limits)),
        ("prompt", lambda text: read_graph(text, limits)),
    )
    reason = "this image holds no metadata of a request: no JSON of this server, no text of A1111, no graph of ComfyUI"
    for name, read in readers:
        try:
            if name in found and (described := read(found[name])):
                return described
        except RequestError as error:
            reason = f"the metadata of this image cannot be read: {error}"
    raise RequestError(reason, param="image")


def read_metadata_request(values: Mapping[str, Any], limits: Limits, *, content_type: str) -> dict[str, Any]:
    """Return the metadata of the image file that is the body, or the field `image` of a form or of JSON.

    Raises:
        RequestError: there is no such file; see `read_metadata`.
    """
    if content_type.lower().startswith(FILES):
        fields = {"image": next((values[name] for name in BODY_NAMES if values.get(name)), None)}
    elif not any(values.values()):
        fields = {}
    else:
        fields = read_fields(values, content_type=content_type, properties={}, aliases={})
    if not fields.get("image"):
        accepted = "the body, with Content-Type image/png for example, or the field image of a form or of JSON"
        raise RequestError(f"image is missing: send an image file as {accepted}", param="image")
    return read_metadata(read_bytes("image", fields["image"]), limits)


def read_header(file: bytes) -> dict[str, str]:
    """Return the texts of a file that may hold metadata.

    Raises:
        RequestError: it is no image.
    """
    from PIL import ExifTags, Image

    try:
        check_segments(file)
        with warnings.catch_warnings(action="ignore"):  # Pillow warns of each EXIF tag that it cannot read
            Image.MAX_IMAGE_PIXELS = MAX_JPEG_PIXELS  # as for uploads; nothing is decoded here
            image = Image.open(io.BytesIO(file), formats=PILLOW_FORMATS)
            texts = {name: image.info[name] for name in ("parameters", "prompt") if name in image.info}
            comment = image.info.get("exif") and image.getexif().get_ifd(ExifTags.IFD.Exif).get(
                ExifTags.Base.UserComment
            )
    except Exception as error:  # Pillow's decoders raise many types
        raise RequestError(f"this takes {ACCEPTED_IMAGE}: {shorten(str(error))}", param="image") from error
    if comment:
        texts.setdefault("parameters", _decode_comment(comment))
    return {name: each for name, each in texts.items() if isinstance(each, str)} | _find_xmp(image.info.get("xmp"))


def _decode_comment(comment: Any) -> str:
    """Return the text of EXIF's UserComment. Programs write UTF-16 in both orders, mostly with Latin letters."""
    if not isinstance(comment, bytes):
        return str(comment)
    code, raw = comment[:8], comment[8:]
    if code != b"UNICODE\0":
        return (raw if code in (b"ASCII\0\0\0", bytes(8)) else comment).decode(errors="replace")
    is_little = raw.startswith(b"\xff\xfe") or raw[1::2].count(0) > raw[::2].count(0)
    return raw.decode("utf-16-le" if is_little else "utf-16-be", errors="replace").lstrip("\ufeff")


def _find_xmp(packet: Any) -> dict[str, str]:
    """Return our own property of an XMP packet. Other programs may write it as an element."""
    packet = packet.encode(errors="replace") if isinstance(packet, str) else packet or b""
    name = f"{{{XMP_NAMESPACE}}}{XMP_PROPERTY}"
    # An XMP packet has no document type, whose entities could grow.
    if XMP_NAMESPACE.encode() not in packet or b"<!" in packet or len(packet) > MAX_XMP:
        return {}
    try:
        root = ElementTree.fromstring(packet.rstrip(b"\0 "))
    except ElementTree.ParseError:
        return {}
    texts = (each.text if each.tag == name else each.get(name) for each in root.iter())
    text = next(filter(None, texts), None)
    return {} if text is None else {"xmp": text}


def _read_own(text: str) -> dict[str, Any] | None:
    """Return the metadata that this project has written; None for another text."""
    try:
        described = load_json(text)
    except ValueError:
        return None
    request = described.get("request") if isinstance(described, dict) else None
    is_own = isinstance(request, dict) and (isinstance(request.get("prompt"), str) or "upscale" in request)
    return described if is_own else None
