"""How settings and request fields are declared, each once, and how a section of model-config.yaml is read."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sdxl_server.errors import ConfigError, cut
from sdxl_server.schemas import Schema, describe_schema, nullable, read_value, shorten

NEEDED = dataclasses.MISSING  # the default of a setting that has none
NAME: Schema = {"type": "string", "pattern": r"^[\w.-]{1,64}$", "x-accepted": "a name of letters, digits, - _ and ."}
SCHEDULER: Schema = {"type": ["string", "object"], "minLength": 1, "x-accepted": "a scheduler as requests name it"}


class Role(Enum):
    """The part of a response that a request field decides."""

    IMAGE = "what the image shows"
    FILE = "the kind of image file"
    DELIVERY = "how, when and how often the response comes"


@dataclass(frozen=True)
class Declaration:
    """A setting or a request field, without its name and default.

    Attributes:
        schema: what it accepts, or a function that returns this from a request's Limits.
        words: its meaning.
        role: what a request field decides.
        is_argument: diffusers' pipelines have an argument of this name.
        is_upload: an image, as base64 in JSON and as a file in a form.
        read: reads a value under given Limits, where the schema does not say everything. Raises ValueError; its
            message continues the field's name.
    """

    schema: Schema | Callable[[Any], Schema]
    words: str
    role: Role = Role.IMAGE
    is_argument: bool = True
    is_upload: bool = False
    read: Callable[[Any, Any], Any] | None = None

    def build_schema(self, limits: Any = None) -> Schema:
        """Return what it accepts under the limits of requests."""
        return self.schema(limits) if callable(self.schema) else self.schema


def declare(
    schema: Schema | Callable[[Any], Schema], words: str, *, value: Any = NEEDED, null: str = "", **about: Any
) -> Any:
    """Declare a field of a dataclass.

    Args:
        value: its default.
        null: what null means, for a setting that accepts null.
        about: the other attributes of Declaration.
    """
    if null and not callable(schema):
        schema = nullable(schema) | {"x-null": null}
    return dataclasses.field(default=value, metadata={"declaration": Declaration(schema, words, **about)})


def list_declarations(cls: type[Any]) -> dict[str, Declaration]:
    """Return the declarations of a dataclass by name."""
    return {each.name: each.metadata["declaration"] for each in dataclasses.fields(cls)}


def read_section(cls: type[Any], raw: Any, section: str) -> Any:
    """Return the dataclass of one section of model-config.yaml.

    Raises:
        ConfigError: names the key, what is accepted and what was given.
    """
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{section} takes keys and values, not {shorten(raw)}")
    schemas = {name: declaration.build_schema() for name, declaration in list_declarations(cls).items()}
    read = {}
    for name, value in raw.items():
        if name not in schemas:
            shown = cut(name, 100) if isinstance(name, str) else shorten(name)
            raise ConfigError(f"{section}.{shown} is not a key; the keys are {', '.join(schemas)}")
        try:
            read[name] = read_value(value, schemas[name])
        except ValueError as error:
            raise ConfigError(f"{section}.{name} {error}") from error
    for each in dataclasses.fields(cls):
        if each.default is NEEDED and each.name not in read:
            raise ConfigError(f"{section}.{each.name} is missing; it takes {describe_schema(schemas[each.name])}")
    return cls(**read)
