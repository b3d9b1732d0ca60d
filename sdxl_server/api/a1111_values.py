"""Values in requests of A1111's API: numbers and switches as text, and values without an effect."""

from collections.abc import Mapping, Sequence
from pathlib import PureWindowsPath
from typing import Any

from sdxl_server.api.bodies import read_part
from sdxl_server.errors import RequestError
from sdxl_server.schemas import Schema, describe_schema, is_valid, shorten


def read_as(known: Mapping[str, Any], name: str, schema: Schema, default: Any) -> Any:
    """Return a field that a schema accepts.

    Raises:
        RequestError: names the field, what is accepted and what was given.
    """
    value = coerce(known[name], schema) if name in known else None
    if value is None:
        return default
    if not is_valid(value, schema):
        raise RequestError(f"{name} takes {describe_schema(schema)}, not {shorten(value)}", param=name)
    return value


def coerce(value: Any, schema: Schema) -> Any:
    """Return a number or a switch that a client has sent as text, as FastAPI accepts it; None for an absent one."""
    if "boolean" in schema["type"] and value in (0, 1):
        return bool(value)
    if not isinstance(value, str) or "string" in schema["type"]:
        return value
    return read_part("", value.encode(errors="backslashreplace"), own="", properties={"": schema})


def normalize_model_name(given: Any) -> str:
    """Return a model's name without its folder, its suffix and a digest as in `name [31e35c80fc]`, in small letters."""
    name = PureWindowsPath(str(given).partition(" [")[0]).name.casefold()
    return name.removesuffix(".safetensors").removesuffix(".ckpt").removesuffix(".pth")


def warn_of_effects(given: Mapping[str, Any], accepted: Mapping[str, Sequence[Any]]) -> list[str]:
    """Return warnings of values that would have changed the image in A1111.

    Args:
        accepted: by field, the values without an effect.
    """
    left = {name: value for name, value in given.items() if name in accepted and value not in accepted[name]}
    return [f"{name} has no effect here, and {shorten(value)} is ignored" for name, value in left.items()]
