"""The pictures in a request: from base64 or a form's file to Pillow images of the size to draw."""

import base64
import binascii
import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from sdxl_server.errors import RequestError
from sdxl_server.fields import MIN_SIDE, Bounds
from sdxl_server.limits import check_pieces
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
    """Return the Pillow image in a field, upright, in RGB, a mask in grey; one that a face has read already as it is.

    Raises:
        RequestError: it is no whole picture, or one of other sides than 8 to twice `max_side` pixels.
    """
    from PIL import Image, ImageOps

    if isinstance(value, Image.Image):
        return value
    with _decode(name, value, "a whole JPEG, PNG or WebP picture", max_side=max_side) as image:
        return ImageOps.exif_transpose(image).convert("L" if name == MASK else "RGB")


def read_alpha_mask(name: str, value: Any, *, max_side: int) -> Any:
    """Return a mask whose transparent parts are to be painted anew, as OpenAI has it, as one that is white there.

    Raises:
        RequestError: it is no PNG or WebP with an alpha channel, or one of other sides than `read_image` takes.
    """
    from PIL import ImageOps

    accepted = "a PNG or WebP that is transparent where the image is to be painted anew"
    with _decode(name, value, accepted, max_side=max_side) as mask:
        if mask.format == "JPEG" or "A" not in mask.getbands():
            raise ValueError("it has no alpha channel")
        return ImageOps.invert(mask.getchannel("A"))


@contextlib.contextmanager
def _decode(name: str, value: Any, accepted: str, *, max_side: int) -> Iterator[Any]:
    """Open a picture for a block that decodes it; its pieces and its size are checked before.

    Raises:
        RequestError: it has too many pieces or other sides, or the block fails.
    """
    from PIL import Image

    raw = read_bytes(name, value)
    try:
        check_pieces(raw)
        with warnings.catch_warnings(action="ignore"):  # Pillow has one for each tag of EXIF that it cannot read
            image = Image.open(io.BytesIO(raw), formats=FORMATS)
            if max(image.size) > 2 * max_side or min(image.size) < 8:
                width, height = image.size
                raise RequestError(
                    f"{name} takes sides of 8 to {2 * max_side} pixels, not {width}x{height}", param=name
                )
            yield image
    except RequestError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds
        raise RequestError(
            f"{name} takes {accepted}; this one cannot be read: {shorten(str(error))}", param=name
        ) from error


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
