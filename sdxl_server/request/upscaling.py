"""The upscaler as requests see it."""

from collections.abc import Callable
from dataclasses import dataclass

from sdxl_server.schemas import Schema

FACTORS = (2, 4)
LANCZOS = "Lanczos"  # enlarges for a second pass without an upscaler; A1111's name
# The fields of a request that draws nothing: it enlarges its image.
FIELDS_WITHOUT_PROMPT = ("image", "upscale", "output_format", "quality", "response_format", "timeout", "stream")

Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class RegisteredUpscaler:
    """The upscaler that requests can use.

    Attributes:
        name: in A1111's API.
        measure: returns the work of enlarging an image of a size by a factor, in UNet calls × megapixels.
    """

    name: str
    measure: Callable[[Size, int], float]


def build_upscale_schema(upscaler: RegisteredUpscaler | None) -> Schema:
    """Return the JSON Schema of the factor."""
    if upscaler is None:
        return {"type": "integer", "enum": [], "x-accepted": "null: this server has no upscaler"}
    return {"type": "integer", "enum": list(FACTORS)}
