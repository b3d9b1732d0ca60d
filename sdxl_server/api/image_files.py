"""Images as files, with their metadata."""

import io
import json
from collections.abc import Mapping
from typing import Any

from sdxl_server.api.marking import Marker
from sdxl_server.request.fields import GenerationRequest

MAX_EXIF_BYTES = 65_000  # JPEG's segments end at 65,533 bytes


def has_room(request: GenerationRequest, parameters: Mapping[str, Any]) -> bool:
    """Say whether a file of the request's format has room for the metadata."""
    return request.output_format != "jpeg" or len(_encode_comment(parameters)) <= MAX_EXIF_BYTES


def encode_image(
    image: Any, request: GenerationRequest, *, marker: Marker, parameters: Mapping[str, Any] | None = None
) -> bytes:
    """Return a Pillow image as JPEG, PNG or WebP.

    Args:
        marker: marks the file as made by a model.
        parameters: the metadata, stored as JSON if there is room. PNG has the text chunk `parameters`; the others
            have EXIF's UserComment.
    """
    from PIL import ExifTags, Image, PngImagePlugin

    options: dict[str, Any] = {}
    xmp = marker.build_xmp(request)
    if request.output_format == "png":
        options["pnginfo"] = texts = PngImagePlugin.PngInfo()
        if parameters is not None:
            texts.add_itxt("parameters", json.dumps(parameters, ensure_ascii=False))
        if xmp is not None:
            texts.add_itxt("XML:com.adobe.xmp", xmp.decode())
    elif xmp is not None:
        options["xmp"] = xmp
    if request.output_format != "png" and parameters is not None and has_room(request, parameters):
        options["exif"] = Image.Exif()
        options["exif"].get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _encode_comment(parameters)
    buffer = io.BytesIO()
    image.save(buffer, request.output_format, quality=request.quality, **options)
    return marker.sign(buffer.getvalue(), request)


def _encode_comment(parameters: Mapping[str, Any]) -> bytes:
    return b"UNICODE\0" + json.dumps(parameters, ensure_ascii=False).encode("utf-16-be")
