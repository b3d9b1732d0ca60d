"""Uploaded images: from base64 or a form's file to the pixels that a viewer shows."""

import base64
import binascii
import contextlib
import io
import math
import re
import string
import warnings
from dataclasses import dataclass
from typing import Any

from sdxl_server.errors import RequestError
from sdxl_server.request.upload_limits import (
    IMAGE_FORMATS,
    MAX_JPEG_PIXELS,
    MAX_PIXELS,
    MAX_UPLOAD_SIDE,
    check_segments,
)
from sdxl_server.schemas import shorten

MASK = "mask_image"
RESIZE_MODES = ("crop", "pad", "stretch")
PILLOW_FORMATS = tuple(each.upper() for each in IMAGE_FORMATS)
ACCEPTED_IMAGE = f"a whole image as {', '.join(IMAGE_FORMATS[:-1])} or {IMAGE_FORMATS[-1]}"
MIN_UPLOAD_SIDE = 8
BASE64 = (string.ascii_letters + string.digits + "+/-_=").encode()
SPACES = b" \t\r\n\f\v"
URL_SAFE = bytes.maketrans(b"-_", b"+/")
HEIF = (*(b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), b"mif1", b"msf1")
MAX_PROFILE = 4 * 2**20  # bytes of an ICC profile; profiles for printing have 3 MB


@dataclass(frozen=True)
class Upload:
    """An image as a viewer shows it.

    Attributes:
        pixels: an upright Pillow image in sRGB, 8 bits per colour. Transparent pixels are white.
        alpha: the opacity, a grey Pillow image. None: all pixels are opaque.
    """

    pixels: Any
    alpha: Any = None


def build_white_image() -> Upload:
    """Return a white image, which is also a mask that protects nothing."""
    from PIL import Image

    return Upload(Image.new("RGB", (64, 64), "white"))


def read_bytes(name: str, value: Any) -> bytes:
    """Return the file in a field: bytes from a form, base64 or a data URL from JSON or a form.

    Raises:
        RequestError: it is none of these.
    """
    if isinstance(value, list):
        raise RequestError(f"{name} takes one image in base64, not {len(value)} in a list; send one image", param=name)
    if isinstance(value, str):
        return _decode_base64(name, value.encode("utf-8", "surrogatepass"))
    if not isinstance(value, (bytes, bytearray)):
        raise RequestError(f"{name} takes an image in base64, not {shorten(value)}", param=name)
    raw = bytes(value)
    is_text = raw[:5].lower() == b"data:" or raw and not raw.translate(None, BASE64 + SPACES)  # no image file is
    return _decode_base64(name, raw) if is_text else raw


def _decode_base64(name: str, text: bytes) -> bytes:
    """Return the bytes of base64: also in lines, as a data URL, URL-safe or without padding."""
    head, content = b"", text.strip()
    if content[:5].lower() == b"data:":
        head, _, content = content.partition(b",")
    if head and not head.lower().endswith(b";base64"):
        raise RequestError(f"{name} takes a data URL in base64, not {shorten(head.decode('latin-1'))}", param=name)
    if re.match(rb"(?i)(https?|ftp|file|blob):", content):
        given = shorten(content[:100].decode("latin-1"))
        raise RequestError(f"{name} takes base64, not {given}; send the file, not its URL", param=name)
    packed = content.translate(URL_SAFE, SPACES).rstrip(b"=")
    try:
        return base64.b64decode(packed + b"=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        shown = shorten(text[:100].decode("utf-8", "replace"))
        raise RequestError(f"{name} takes base64, not {shown}: {error}", param=name) from error


def read_upload(name: str, value: Any, *, max_side: int) -> Upload:
    """Return the image in a field. An Upload, which an API has read before, is returned unchanged.

    Args:
        max_side: the largest side of a result. A much larger image is reduced at once.

    Raises:
        RequestError: it is not a whole image, or is too large or too small.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(value, Upload):
        return value
    raw = read_bytes(name, value)
    try:
        check_segments(raw)
        with warnings.catch_warnings(action="ignore"):  # Pillow warns of each EXIF tag that it cannot read
            Image.MAX_IMAGE_PIXELS = MAX_JPEG_PIXELS  # Pillow's own limit; _check_size knows the format
            image = Image.open(io.BytesIO(raw), formats=PILLOW_FORMATS)
            _check_size(name, image)
            side = max_side if math.prod(image.size) <= MAX_PIXELS else min(max_side, min(image.size) // 2)
            image.draft(None, (side, side))  # of a JPEG
            image.load()
            return _convert(_reduce(image, max_side))
    except RequestError:
        raise
    except UnidentifiedImageError as error:
        raise RequestError(f"{name} takes {ACCEPTED_IMAGE}; {_describe_unread(raw)}", param=name) from error
    except Exception as error:  # Pillow's decoders raise many types
        raise RequestError(
            f"{name} takes {ACCEPTED_IMAGE}; this file cannot be read: {shorten(str(error))}", param=name
        ) from error


def _check_size(name: str, image: Any) -> None:
    size, is_jpeg = image.size, image.format in ("JPEG", "MPO")
    most = MAX_JPEG_PIXELS if is_jpeg else MAX_PIXELS
    if min(size) < MIN_UPLOAD_SIDE or max(size) > MAX_UPLOAD_SIDE or math.prod(size) > most:
        hint = "" if is_jpeg else f"; a JPEG may have {MAX_JPEG_PIXELS // 10**6}"
        raise RequestError(
            f"{name} takes sides of {MIN_UPLOAD_SIDE} to {MAX_UPLOAD_SIDE} pixels and at most {most // 10**6} "
            f"megapixels, not {size[0]}x{size[1]}{hint}",
            param=name,
        )


def _describe_unread(raw: bytes) -> str:
    """Return why no decoder knows a file."""
    if raw[4:8] == b"ftyp" and raw[8:12] in HEIF:
        return "this file is HEIC (HEIF): save or export it as JPEG, for example"
    return f"this file cannot be read: it has another format, or is not whole; it begins with {shorten(raw[:12])}"


def _reduce(image: Any, max_side: int) -> Any:
    """Return an image with a short side below twice `max_side`: copies of large images take memory."""
    factor = min(image.size) // max_side
    if factor < 2 or image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK") or "transparency" in image.info:
        return image
    smaller = image.reduce(factor)
    smaller.info = image.info
    return smaller


def _convert(image: Any) -> Upload:
    """Return a decoded image as a viewer shows it: orientation, colours and transparency."""
    from PIL import Image

    profile = image.info.get("icc_profile")
    turned = {
        **{2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM},
        **{5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE},
        8: Image.Transpose.ROTATE_90,
    }.get(read_orientation(image.info.get("exif", b"")))
    image, alpha = _split_alpha(image)
    pixels = _convert_to_srgb(image, profile)
    if turned is not None:
        pixels, alpha = pixels.transpose(turned), alpha and alpha.transpose(turned)
    if alpha is not None:
        pixels = Image.composite(pixels, Image.new("RGB", pixels.size, "white"), alpha)
    return Upload(pixels, alpha)


def read_orientation(exif: bytes) -> int:
    """Return the orientation in an EXIF block, even in a damaged block; 1: upright."""
    exif = exif.removeprefix(b"Exif\0\0")
    order: Any = {b"II": "little", b"MM": "big"}.get(exif[:2])
    if order is None:
        return 1
    first = int.from_bytes(exif[4:8], order)
    count = int.from_bytes(exif[first : first + 2], order)
    for entry in range(first + 2, min(first + 2 + 12 * count, len(exif) - 9), 12):
        tag, kind = (int.from_bytes(exif[at : at + 2], order) for at in (entry, entry + 2))
        if tag == 0x0112:
            size = {1: 1, 3: 2, 4: 4}.get(kind, 2)
            return int.from_bytes(exif[entry + 8 : entry + 8 + size], order)
    return 1


def _split_alpha(image: Any) -> tuple[Any, Any]:
    """Return an image of 8 bits without transparency, and its opacity if any pixel is transparent."""
    if image.mode.startswith(("I", "F")):
        return _reduce_to_8_bits(image)
    if not image.has_transparency_data:
        is_known = image.mode in ("RGB", "CMYK", "LAB", "L")
        return image if is_known else image.convert("L" if image.mode == "1" else "RGB"), None
    seen = image.convert("RGBA")
    alpha = seen.getchannel("A")
    is_grey = image.mode in ("1", "L", "LA", "La")
    return seen.convert("L" if is_grey else "RGB"), None if alpha.getextrema() == (255, 255) else alpha


def _reduce_to_8_bits(image: Any) -> tuple[Any, Any]:
    """Return an image of more bits in grey of 8 bits, and its opacity."""
    import numpy as np
    from PIL import Image

    bits, photometric = (getattr(image, "tag_v2", {}).get(tag, default) for tag, default in ((258, (16,)), (262, 1)))
    values = np.nan_to_num(np.asarray(image).astype(np.float32))
    ranges = [1.0] * (image.mode == "F") + [255.0, 65535.0]
    highest = float(values.max())
    top = next((each for each in ranges if highest <= each), highest)
    if image.mode.startswith("I;"):
        top = 2.0 ** bits[0] - 1
    key = image.info.get("transparency")
    alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)) if isinstance(key, int) else None
    shown = np.clip(values / top, 0, 1)
    if photometric == 0:  # white is zero; Pillow does not invert 16 bits
        shown = 1 - shown
    return Image.fromarray((shown * 255 + 0.5).astype(np.uint8)), alpha


def _convert_to_srgb(image: Any, profile: Any) -> Any:
    """Return an image in sRGB by its ICC profile; a damaged profile is ignored."""
    from PIL import ImageCms

    srgb = ImageCms.createProfile("sRGB")
    source: Any = ImageCms.createProfile("LAB") if image.mode == "LAB" else None
    with contextlib.suppress(ImageCms.PyCMSError, OSError, TypeError):
        if isinstance(profile, bytes) and len(profile) <= MAX_PROFILE:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source is not None:
            transform = ImageCms.buildTransform(source, srgb, image.mode, "RGB")
            if image.mode != "RGB" or not _is_identity(transform):
                return ImageCms.applyTransform(image, transform)
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_identity(transform: Any) -> bool:
    """Say whether a transform of RGB changes colours only by rounding."""
    import numpy as np
    from PIL import Image, ImageCms

    axis = np.arange(0, 256, 15, dtype=np.uint8)
    colours = np.stack(np.meshgrid(axis, axis, axis), axis=-1).reshape(len(axis), -1, 3)
    made = ImageCms.applyTransform(Image.fromarray(colours), transform)
    return int(np.abs(np.asarray(made).astype(int) - colours).max()) <= 1
