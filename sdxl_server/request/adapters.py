"""The adapters that requests can name, and how requests name them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdxl_server.schemas import Schema, choice, describe_schema, is_valid, load_json, real, shorten

SCALE_SCHEMA = real(-100, 100)
ADAPTERS_EXAMPLE = '[{"name": "outline", "scale": 0.8}]'


@dataclass(frozen=True)
class RegisteredAdapter:
    """An adapter that requests can name.

    Attributes:
        scale: the default scale.
        rank: the largest rank of its layers.
        defaults: by field, the defaults of requests that name it.
    """

    scale: float
    rank: int
    defaults: Mapping[str, Any]


def build_adapters_schema(registered: Mapping[str, RegisteredAdapter]) -> Schema:
    """Return the JSON Schema of a request's adapters."""
    if not registered:
        return {"type": "array", "maxItems": 0, "x-accepted": "an empty list: this server has no adapters"}
    item = {
        "type": "object",
        "required": ["name"],
        "additionalProperties": False,
        "properties": {"name": choice(*registered), "scale": SCALE_SCHEMA},
    }
    accepted = f"a list of names and scales such as {ADAPTERS_EXAMPLE}, of the adapters {', '.join(registered)}"
    return {"type": "array", "items": item, "maxItems": len(registered), "x-accepted": accepted}


def read_adapters(
    value: Any, registered: Mapping[str, RegisteredAdapter], *, max_rank: int
) -> tuple[dict[str, Any], ...] | None:
    """Return the adapters of a request, each with its scale; None if there are none.

    Args:
        value: a list, or its JSON text from a form.

    Raises:
        ValueError: what is accepted and what was given. The message continues the field's name.
    """
    if isinstance(value, str):
        value = load_json(value)
    schema = build_adapters_schema(registered)
    if not isinstance(value, list) or len(value) > schema["maxItems"]:
        raise ValueError(f"takes {schema['x-accepted']}, not {shorten(value)}")
    read = []
    for each in value:
        if not is_valid(each, schema["items"]) or not is_valid(each.get("scale", 0), SCALE_SCHEMA):  # NaN
            raise ValueError(
                f"takes {schema['x-accepted']}, each scale {describe_schema(SCALE_SCHEMA)}, not {shorten(each)}"
            )
        read.append({"name": each["name"], "scale": float(each.get("scale", registered[each["name"]].scale))})
    names = [each["name"] for each in read]
    if len(set(names)) < len(names):
        raise ValueError(f"takes each adapter once, not {', '.join(names)}")
    rank = sum(registered[name].rank for name in names)
    if rank > max_rank:
        raise ValueError(f"takes adapters with a sum of ranks of at most {max_rank}, not {rank}: {', '.join(names)}")
    return tuple(read) or None
