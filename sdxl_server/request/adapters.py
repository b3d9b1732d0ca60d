"""The adapters that requests can name, and how requests name them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdxl_server.config.settings import HandlerConfig
from sdxl_server.errors import RequestError
from sdxl_server.request.prompts import PROMPTS, TAG
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
        value: a list, or its JSON text from a form. A single adapter needs no list, and its name alone is enough.

    Raises:
        ValueError: what is accepted and what was given. The message continues the field's name.
    """
    schema = build_adapters_schema(registered)
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = load_json(value)
        except ValueError as error:
            raise ValueError(f"takes {schema['x-accepted']}, not {shorten(value)}") from error
    value = [value] if isinstance(value, (str, Mapping)) else value
    if not isinstance(value, list) or len(value) > schema["maxItems"]:
        raise ValueError(f"takes {schema['x-accepted']}, not {shorten(value)}")
    read = []
    for each in value:
        each = {"name": each} if isinstance(each, str) else each
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


def take_tags(
    fields: Mapping[str, Any], registered: Mapping[str, RegisteredAdapter], config: HandlerConfig
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a request's fields without tags such as `<lora:outline:0.8>`, and the adapters that these name.

    Tags in negative prompts and of hypernetworks are never applied. Prompts that are too long are refused later.

    Raises:
        RequestError: a tag names no registered adapter, or has not one scale.
    """
    taken, named = dict(fields), []
    for prompt in PROMPTS:
        text = fields.get(prompt)
        if not isinstance(text, str) or len(text) > config.max_prompt_characters or not (tags := TAG.findall(text)):
            continue
        taken[prompt] = TAG.sub("", text).strip()
        if config.lora_tags and not prompt.startswith("negative"):
            named += [_read_tag(prompt, tag, registered) for kind, tag in tags if kind.lower() != "hypernet"]
    return taken, [each for index, each in enumerate(named) if each not in named[:index]]


def _read_tag(prompt: str, tag: str, registered: Mapping[str, RegisteredAdapter]) -> dict[str, Any]:
    name, *scales = [each.strip() for each in tag.split(":")]
    if name not in registered:
        names = ", ".join(registered) or "none"
        raise RequestError(f"{prompt} names the adapter {shorten(name)}; the adapters are: {names}", param=prompt)
    try:
        (scale,) = {float(each) for each in scales} or {1.0}  # A1111 has one for the text encoders and one for the UNet
    except ValueError as error:
        raise RequestError(
            f"{prompt} takes tags with one scale, such as <lora:{name}:0.8>, not {shorten(tag)}", param=prompt
        ) from error
    return {"name": name, "scale": scale}
