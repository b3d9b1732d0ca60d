"""The pictures in a request: from base64 or a form's file to Pillow images of the size to draw."""

import base64
import binascii
import io
from collections.abc import Mapping
from typing import Any

from sdxl_server.errors import RequestError
from sdxl_server.fields import MIN_SIDE, Bounds
from sdxl_server.schemas import shorten

FORMATS = ("JPEG", "PNG", "WEBP")
MASK = "mask_image"


def read_bytes(name: str, value: Any) -> bytes:
    """Return the file in a field: bytes from a form, base64 from JSON, which may be a data URL.

    Raises:
        RequestError: it is neither.
    """
    if isinstance(value, str):
        try:
            return base64.b64decode(value.partition(",")[2] if value.startswith("data:") else value, validate=True)
        except (binascii.Error, ValueError) as error:
            raise RequestError(f"{name} takes base64, not {shorten(value)}: {error}", param=name) from error
    if not isinstance(value, (bytes, bytearray)):
        raise RequestError(f"{name} takes a picture in base64, not {shorten(value)}", param=name)
    return bytes(value)


def read_image(name: str, value: Any, *, max_side: int) -> Any:
    """Return the Pillow image in a field, upright, in RGB, a mask in grey; its size is checked before its pixels.

    Raises:
        RequestError: it is no whole picture, or one of other sides than 8 to twice `max_side` pixels.
    """
    from PIL import Image, ImageOps

    raw = read_bytes(name, value)
    try:
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
        if max(image.size) <= 2 * max_side and min(image.size) >= 8:
            return ImageOps.exif_transpose(image).convert("L" if name == MASK else "RGB")
    except Exception as error:  # Pillow's decoders raise many kinds
        raise RequestError(
            f"{name} takes a whole JPEG, PNG or WebP picture; this one cannot be read: {shorten(str(error))}",
            param=name,
        ) from error
    width, height = image.size
    raise RequestError(f"{name} takes sides of 8 to {2 * max_side} pixels, not {width}x{height}", param=name)


def read_alpha_mask(name: str, value: Any) -> bytes:
    """Return a mask whose transparent parts are to be painted anew, as OpenAI has it, as a PNG that is white there.

    Raises:
        RequestError: it is no PNG or WebP with an alpha channel.
    """
    from PIL import Image, ImageOps

    raw = read_bytes(name, value)
    try:
        with Image.open(io.BytesIO(raw), formats=["PNG", "WEBP"]) as mask:
            if mask.width * mask.height > 64_000_000 or "A" not in mask.getbands():
                raise ValueError("it has no alpha channel" if "A" not in mask.getbands() else "it is too large")
            painted = ImageOps.invert(mask.getchannel("A"))
    except Exception as error:  # Pillow's decoders raise many kinds
        raise RequestError(
            f"{name} takes a PNG or WebP that is transparent where the image is to be painted anew; this one cannot be "
            f"used: {shorten(str(error))}",
            param=name,
        ) from error
    file = io.BytesIO()
    painted.save(file, "PNG")
    return file.getvalue()


def fit_images(used: dict[str, Any], given: Mapping[str, Any], bounds: Bounds) -> None:
    """Bring the image and its mask to the picture's size, which is the image's own, in eights, unless one is given.

    Args:
        used: the fields of the request, checked; its sizes and images are replaced.
        given: those that the client gave.
    """
    from PIL import Image

    most = bounds.max_side // 8 * 8
    for name, own in zip(("width", "height"), used["image"].size, strict=True):
        if given.get(name) is None:
            used[name] = min(max(own // 8 * 8, MIN_SIDE), most)
    size = (used["width"], used["height"])
    for name in ("image", MASK):
        if name in used and used[name].size != size:
            used[name] = used[name].resize(size, Image.Resampling.LANCZOS)
