"""JSON Schemas (draft 2020-12) that settings and fields are declared with, and what their mistakes are told."""

import itertools
import json
import math
from collections.abc import Mapping
from typing import Any

from sdxl_server.errors import cut

Schema = dict[str, Any]
MAX_VALUES = 50_000  # of a JSON text: its commas and brackets, those in prompts included
DEAR = ("items", "pattern")  # keywords that look at all of a value: checked when the others have passed


def whole(minimum: int, maximum: int, *, multiple_of: int = 1) -> Schema:
    """Return the schema of a whole number."""
    schema: Schema = {"type": "integer", "minimum": minimum, "maximum": maximum}
    return schema | ({"multipleOf": multiple_of} if multiple_of > 1 else {})


def real(minimum: float, maximum: float) -> Schema:
    """Return the schema of a number."""
    return {"type": "number", "minimum": minimum, "maximum": maximum}


def switch() -> Schema:
    """Return the schema of true and false."""
    return {"type": "boolean"}


def choice(*names: str) -> Schema:
    """Return the schema of one of some names."""
    return {"type": "string", "enum": list(names)}


def text(maximum: int, *, is_needed: bool = False) -> Schema:
    """Return the schema of a text without NUL; one that is needed must hold more than white space."""
    pattern = "^[^\\u0000]*[^\\u0000\\s][^\\u0000]*$" if is_needed else "^[^\\u0000]*$"
    least = {"minLength": 1} if is_needed else {}
    return {"type": "string", **least, "maxLength": maximum, "pattern": pattern}


def pair(minimum: int, maximum: int) -> Schema:
    """Return the schema of two whole numbers."""
    items = whole(minimum, maximum)
    return {"type": "array", "items": items, "minItems": 2, "maxItems": 2}


def shares() -> Schema:
    """Return the schema of two shares of a whole."""
    return {"type": "array", "items": real(0, 1), "minItems": 2, "maxItems": 2, "x-accepted": "two numbers from 0 to 1"}


def falling(items: Schema, most: int, accepted: str) -> Schema:
    """Return the schema of a list of numbers, of which another check sees that they fall."""
    return {"type": "array", "items": items, "minItems": 1, "maxItems": most, "x-accepted": accepted}


def nullable(schema: Schema) -> Schema:
    """Return a schema that takes null too."""
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    both: Schema = {**schema, "type": [*kinds, "null"]}
    both |= {"anyOf": [*schema["anyOf"], {"type": "null"}]} if "anyOf" in schema else {}
    return both | ({"enum": [*schema["enum"], None]} if "enum" in schema else {})


def is_valid(value: Any, schema: Schema) -> bool:
    """Say whether a value is what a schema accepts."""
    from jsonschema import Draft202012Validator

    ordered = sorted(schema.items(), key=lambda each: each[0] in DEAR)  # jsonschema keeps the order
    validator = Draft202012Validator({name: each for name, each in ordered if name != "description"})
    is_number = not isinstance(value, float) or math.isfinite(value)  # JSON has no others, and a schema lets NaN pass
    try:
        return is_number and bool(validator.is_valid(value))
    except ValueError:  # jsonschema writes the value into a message, and Python does not write thousands of digits
        return False


def describe_schema(schema: Mapping[str, Any]) -> str:
    """Say in words what a schema accepts, null aside; those that it has itself, as `x-accepted`, come first."""
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
        least = "that says something, " if schema.get("minLength") else ""
        return f"a text {least}of at most {schema['maxLength']} characters, without NUL"
    low = f"above {schema['exclusiveMinimum']}" if "exclusiveMinimum" in schema else f"from {schema['minimum']}"
    multiple = f" that is a multiple of {schema['multipleOf']}" if "multipleOf" in schema else ""
    return f"{'a whole number' if kind == 'integer' else 'a number'} {low} to {schema['maximum']}{multiple}"


def shorten(value: Any, *, length: int = 60) -> str:
    """Return the value in plain ASCII and at most so many characters, fit for a message or a log line.

    Of a large value no more is looked at than can be shown.
    """
    return cut(ascii(_clip(value, length, depth=3)), length)


def _clip(value: Any, length: int, *, depth: int) -> Any:
    """Return a value without what cannot be shown of it in so many characters, nor what is nested more deeply."""
    if isinstance(value, (str, bytes, bytearray)):
        return value[:length]
    if isinstance(value, int) and value.bit_length() > 4 * length:  # Python refuses to write thousands of digits
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


def load_json(source: str) -> Any:
    """Return the JSON value of a text.

    Raises:
        ValueError: it is none; NaN and Infinity are none, and one of more values than a request has is not read.
    """
    if sum(map(source.count, ",[{")) > MAX_VALUES:
        raise ValueError(f"it has more than {MAX_VALUES} commas and brackets")

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a number of JSON")

    try:
        return json.loads(source, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
