"""Images as files, with their metadata."""

import io
import json
import re
from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import quoteattr

from sdxl_server.api.infotext import write_infotext
from sdxl_server.api.marking import Marker
from sdxl_server.request.fields import GenerationRequest

MAX_SEGMENT = 64_000  # bytes of metadata in EXIF or XMP of a JPEG, whose segments end at 65,533 bytes
# The whole metadata is JSON in an XMP property. JPEG, PNG, WebP and AVIF all hold XMP, and tools that copy images keep
# it. The other places are A1111's.
XMP_NAMESPACE, XMP_PROPERTY = "urn:sdxl_server", "metadata"
XMP = (
    "<?xpacket begin='\ufeff' id='W5M0MpCehiHzreSzNTczkc9d'?>"
    "<x:xmpmeta xmlns:x='adobe:ns:meta/'><rdf:RDF xmlns:rdf='http://www.w3.org/1999/02/22-rdf-syntax-ns#'>"
    "<rdf:Description rdf:about='' {properties}/></rdf:RDF></x:xmpmeta><?xpacket end='w'?>"
)
NOT_XML = re.compile("[\ufffe\uffff]")  # JSON escapes the other characters that XML does not hold


def has_room(request: GenerationRequest, parameters: Mapping[str, Any]) -> bool:
    """Say whether a file of the request's format has room for the metadata."""
    comment, xmp = _encode_comment(parameters), _build_xmp({}, parameters)
    return request.output_format != "jpeg" or max(len(comment), len(xmp)) <= MAX_SEGMENT


def encode_image(
    image: Any, request: GenerationRequest, *, marker: Marker, parameters: Mapping[str, Any] | None = None
) -> bytes:
    """Return a Pillow image as JPEG, PNG or WebP.

    Args:
        marker: marks the file as made by a model.
        parameters: the metadata, stored if there is room. XMP has all of it. A1111's text is in the text chunk
            `parameters` of a PNG, and in EXIF's UserComment of the others.
    """
    from PIL import ExifTags, Image, PngImagePlugin

    if parameters is not None and not has_room(request, parameters):
        parameters = None
    options: dict[str, Any] = {}
    properties = marker.list_properties(request)
    xmp = _build_xmp(properties, parameters) if properties or parameters is not None else None
    if request.output_format == "png":
        options["pnginfo"] = texts = PngImagePlugin.PngInfo()
        if parameters is not None:
            texts.add_itxt("parameters", write_infotext(parameters))
        if xmp is not None:
            texts.add_itxt("XML:com.adobe.xmp", xmp.decode())
    elif xmp is not None:
        options["xmp"] = xmp
    if request.output_format != "png" and parameters is not None:
        options["exif"] = Image.Exif()
        options["exif"].get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _encode_comment(parameters)
    buffer = io.BytesIO()
    image.save(buffer, request.output_format, quality=request.quality, **options)
    return marker.sign(buffer.getvalue(), request)


def _build_xmp(properties: Mapping[str, str], parameters: Mapping[str, Any] | None) -> bytes:
    """Return an XMP packet with these properties and the metadata."""
    if parameters is not None:
        text = NOT_XML.sub(lambda each: f"\\u{ord(each[0]):04x}", json.dumps(parameters, ensure_ascii=False))
        properties = {**properties, "xmlns:sdxl": XMP_NAMESPACE, f"sdxl:{XMP_PROPERTY}": text}
    return XMP.format(properties=" ".join(f"{name}={quoteattr(each)}" for name, each in properties.items())).encode()


def _encode_comment(parameters: Mapping[str, Any]) -> bytes:
    return b"UNICODE\0" + write_infotext(parameters).encode("utf-16-be")
