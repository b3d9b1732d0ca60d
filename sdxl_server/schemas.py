"""JSON Schemas (draft 2020-12) of settings and request fields: build them, check values, describe what they accept."""

import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

from sdxl_server.errors import cut

Schema = dict[str, Any]
MAX_VALUES = 50_000  # commas and brackets in a JSON text; those in prompts count too
SLOW_KEYWORDS = ("items", "pattern")  # they read all of a value, so they are checked last


def whole(minimum: int, maximum: int, *, multiple_of: int = 1) -> Schema:
    """Return the schema of a whole number."""
    schema: Schema = {"type": "integer", "minimum": minimum, "maximum": maximum}
    return schema | ({"multipleOf": multiple_of} if multiple_of > 1 else {})


def real(minimum: float, maximum: float) -> Schema:
    """Return the schema of a number."""
    return {"type": "number", "minimum": minimum, "maximum": maximum}


def switch() -> Schema:
    """Return the schema of true or false."""
    return {"type": "boolean"}


def choice(*names: str) -> Schema:
    """Return the schema of one of some names."""
    return {"type": "string", "enum": list(names)}


def any_text(accepted: str) -> Schema:
    """Return the schema of any text but an empty one."""
    return {"type": "string", "minLength": 1, "x-accepted": accepted}


def text(maximum: int, *, is_needed: bool = False) -> Schema:
    """Return the schema of a text without NUL. A needed text has more than white space."""
    pattern = "^[^\\u0000]*[^\\u0000\\s][^\\u0000]*$" if is_needed else "^[^\\u0000]*$"
    least = {"minLength": 1} if is_needed else {}
    return {"type": "string", **least, "maxLength": maximum, "pattern": pattern}


def pair(minimum: int, maximum: int) -> Schema:
    """Return the schema of two whole numbers."""
    items = whole(minimum, maximum)
    return {"type": "array", "items": items, "minItems": 2, "maxItems": 2}


def shares() -> Schema:
    """Return the schema of two numbers from 0 to 1."""
    return {"type": "array", "items": real(0, 1), "minItems": 2, "maxItems": 2, "x-accepted": "two numbers from 0 to 1"}


def falling(items: Schema, most: int, accepted: str) -> Schema:
    """Return the schema of a list of numbers; another check makes sure that they fall."""
    return {"type": "array", "items": items, "minItems": 1, "maxItems": most, "x-accepted": accepted}


def nullable(schema: Schema) -> Schema:
    """Return a schema that also accepts null."""
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    both: Schema = {**schema, "type": [*kinds, "null"]}
    both |= {"anyOf": [*schema["anyOf"], {"type": "null"}]} if "anyOf" in schema else {}
    return both | ({"enum": [*schema["enum"], None]} if "enum" in schema else {})


def is_valid(value: Any, schema: Schema) -> bool:
    """Say whether a schema accepts a value."""
    from jsonschema import Draft202012Validator

    ordered = sorted(schema.items(), key=lambda each: each[0] in SLOW_KEYWORDS)  # jsonschema keeps the order
    validator = Draft202012Validator({name: each for name, each in ordered if name != "description"})
    is_number = not isinstance(value, float) or math.isfinite(value)  # JSON has no others; a schema accepts NaN
    try:
        return is_number and bool(validator.is_valid(value))
    except ValueError:  # from jsonschema's message: Python writes no integer of thousands of digits
        return False


def read_value(value: Any, schema: Schema) -> Any:
    """Return a value that a schema accepts, whole numbers as int and others as float.

    Raises:
        ValueError: what is accepted and what was given. The message continues a key's name.
    """
    if not is_valid(value, schema):
        raise ValueError(f"takes {describe_schema(schema)}, not {shorten(value)}")
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("takes Unicode text, not a lone surrogate such as \\ud800")
    if value is None:
        return None
    return int(value) if "integer" in schema["type"] else float(value) if "number" in schema["type"] else value


def describe_schema(schema: Mapping[str, Any]) -> str:
    """Return in words what a schema accepts; its own words, `x-accepted`, come first.

    Null is mentioned only where it has a meaning of its own, `x-null`.
    """
    if schema.get("x-null"):
        return f"{describe_schema({**schema, 'x-null': None})}, or null for {schema['x-null']}"
    if "x-accepted" in schema:
        return str(schema["x-accepted"])
    if "enum" in schema:
        return "one of " + ", ".join(str(value) for value in schema["enum"] if value is not None)
    kind = next(each for each in [schema["type"]] if each) if isinstance(schema["type"], str) else schema["type"][0]
    if kind == "boolean":
        return "true or false"
    if kind == "array":
        return f"two whole numbers from {schema['items']['minimum']} to {schema['items']['maximum']}"
    if kind == "string":
        least = "with more than spaces, " if schema.get("minLength") else ""
        return f"a text {least}of at most {schema['maxLength']} characters, without NUL"
    low = f"above {schema['exclusiveMinimum']}" if "exclusiveMinimum" in schema else f"from {schema['minimum']}"
    multiple = f" that is a multiple of {schema['multipleOf']}" if "multipleOf" in schema else ""
    return f"{'a whole number' if kind == 'integer' else 'a number'} {low} to {schema['maximum']}{multiple}"


def shorten(value: Any, *, length: int = 60) -> str:
    """Return a value in plain ASCII for a message or a log line, with at most `length` characters.

    Only the part of a large value that can be shown is read.
    """
    return cut(ascii(_clip(value, length, depth=3)), length)


def _clip(value: Any, length: int, *, depth: int) -> Any:
    """Return the part of a value that `length` characters and `depth` levels can show."""
    if isinstance(value, (str, bytes, bytearray)):
        return value[:length]
    if isinstance(value, int) and value.bit_length() > 4 * length:  # Python writes no integer of thousands of digits
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, (list, tuple)):
        return [_clip(each, length, depth=depth - 1) for each in value[:length]] if depth else "..."
    if isinstance(value, Mapping):
        first = itertools.islice(value.items(), length)
        return (
            {_clip(key, length, depth=0): _clip(each, length, depth=depth - 1) for key, each in first}
            if depth
            else "..."
        )
    return value


def read_number(text: str) -> int | float:
    """Return a number, a whole one as int: some programs write 512 as 512.0."""
    number = float(text)
    return int(number) if number.is_integer() else number


def load_json(source: str) -> Any:
    """Return the JSON value of a text, whole numbers as int.

    Raises:
        ValueError: it is not JSON, or has more values than a request needs. JSON has no NaN and no Infinity.
    """
    if sum(map(source.count, ",[{")) > MAX_VALUES:
        raise ValueError(f"it has more than {MAX_VALUES} commas and brackets")

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a number of JSON")

    try:
        return json.loads(source, parse_float=read_number, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
