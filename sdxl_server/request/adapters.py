"""The adapters that requests can name, and what they say of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdxl_server.schemas import Schema, choice, describe_schema, is_valid, load_json, real, shorten

SCALE = real(-100, 100)
EXAMPLE = '[{"name": "outline", "scale": 0.8}]'


@dataclass(frozen=True)
class Offer:
    """An adapter that requests can name.

    Attributes:
        scale: unless a request says otherwise.
        rank: the largest of its layers.
        defaults: of requests that name it, by field.
    """

    scale: float
    rank: int
    defaults: Mapping[str, Any]


def make_adapter_schema(offers: Mapping[str, Offer]) -> Schema:
    """Return the JSON Schema of the adapters of a request."""
    if not offers:
        return {"type": "array", "maxItems": 0, "x-accepted": "an empty list, as no adapters are on offer here"}
    item = {
        "type": "object",
        "required": ["name"],
        "additionalProperties": False,
        "properties": {"name": choice(*offers), "scale": SCALE},
    }
    accepted = f"a list of names and scales such as {EXAMPLE}, of the adapters {', '.join(offers)}"
    return {"type": "array", "items": item, "maxItems": len(offers), "x-accepted": accepted}


def read_adapters(value: Any, offers: Mapping[str, Offer], *, max_rank: int) -> tuple[dict[str, Any], ...] | None:
    """Return the adapters of a request, each with its scale; None for none.

    Args:
        value: a list, or the JSON of one, as forms have it.

    Raises:
        ValueError: names what is accepted and what was given, but for the field.
    """
    if isinstance(value, str):
        value = load_json(value)
    schema = make_adapter_schema(offers)
    if not isinstance(value, list) or len(value) > schema["maxItems"]:
        raise ValueError(f"takes {schema['x-accepted']}, not {shorten(value)}")
    read = []
    for each in value:
        if not is_valid(each, schema["items"]) or not is_valid(each.get("scale", 0), SCALE):
            raise ValueError(f"takes {schema['x-accepted']}, each scale {describe_schema(SCALE)}, not {shorten(each)}")
        read.append({"name": each["name"], "scale": float(each.get("scale", offers[each["name"]].scale))})
    names = [each["name"] for each in read]
    if len(set(names)) < len(names):
        raise ValueError(f"takes each adapter once, not {', '.join(names)}")
    rank = sum(offers[name].rank for name in names)
    if rank > max_rank:
        raise ValueError(f"takes adapters whose ranks are {max_rank} together at most, not {rank}: {', '.join(names)}")
    return tuple(read) or None
