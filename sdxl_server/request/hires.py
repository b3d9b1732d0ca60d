"""Hires fix: an image is drawn, enlarged, and drawn again from there. So a model keeps its own size at first."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdxl_server.errors import RequestError
from sdxl_server.schemas import Schema, load_json, read_value, real, shorten, whole

MAX_SCALE = 4
DEFAULT_STRENGTH = 0.4
EXAMPLE = '{"scale": 1.5, "strength": 0.4, "steps": 20}'
SCALE: Schema = {**real(1, MAX_SCALE), "exclusiveMinimum": 1}


@dataclass(frozen=True)
class Hires:
    """The second pass of an image.

    Attributes:
        scale: of its sides.
        strength: how much it changes, as with an image to start from.
        steps: before `strength` reduces them; None: as in the first pass.
    """

    scale: float
    strength: float = DEFAULT_STRENGTH
    steps: int | None = None

    @property
    def factor(self) -> int:
        """The factor of the upscaler, whose result is reduced to the size."""
        return 2 if self.scale <= 2 else 4

    def compute_size(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height of the second pass, multiples of 8."""
        return round(width * self.scale / 8) * 8, round(height * self.scale / 8) * 8

    def describe(self) -> dict[str, Any]:
        """Return it as requests have it."""
        return {name: value for name, value in vars(self).items() if value is not None}


def build_hires_schema(max_steps: int) -> Schema:
    """Return the JSON Schema of the field."""
    return {
        "type": "object",
        "required": ["scale"],
        "additionalProperties": False,
        "properties": {"scale": SCALE, "strength": real(0, 1), "steps": whole(1, max_steps)},
        "x-accepted": f"an object such as {EXAMPLE}",
    }


def read_hires(value: Any, *, max_steps: int) -> Hires:
    """Return the second pass of a request.

    Args:
        value: an object, or its JSON text from a form.

    Raises:
        ValueError: what is accepted and what was given. The message continues the field's name.
        RequestError: names the key.
    """
    schema = build_hires_schema(max_steps)
    if isinstance(value, str):
        try:
            value = load_json(value)
        except ValueError as error:
            raise ValueError(f"takes {schema['x-accepted']}, not {shorten(value)}") from error
    if not isinstance(value, Mapping) or value.get("scale") is None:
        raise ValueError(f"takes {schema['x-accepted']}, not {shorten(value)}")
    read = {}
    for name, each in value.items():
        if name not in schema["properties"]:
            raise RequestError(f"hires.{shorten(name)} is not a key; the keys are {', '.join(schema['properties'])}")
        if each is not None:
            try:
                read[name] = read_value(each, schema["properties"][name])
            except ValueError as error:
                raise RequestError(f"hires.{name} {error}") from error
    return Hires(**read)


def build_second_pass(request: Any) -> Any:
    """Return the request of the second pass, without the image that it starts from."""
    hires, (width, height) = request.hires, request.drawn_size
    return dataclasses.replace(
        request,
        **{"width": width, "height": height, "image": "", "strength": hires.strength, "hires": None, "upscale": None},
        num_inference_steps=hires.steps or request.num_inference_steps,
    )
