"""A section of model-config.yaml as a dataclass, whose fields are its settings."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdxl_server.errors import ConfigError, cut
from sdxl_server.schemas import Schema, describe_schema, is_valid, nullable, shorten

NEEDED = dataclasses.MISSING  # the default of a setting that has none
SCHEDULER: Schema = {"type": ["string", "object"], "minLength": 1, "x-accepted": "a scheduler as requests name it"}


def setting(value: Any, schema: Schema, words: str, *, null: str = "") -> Any:
    """Declare a setting.

    Args:
        value: its default.
        null: what null stands for, where it is taken.
    """
    return dataclasses.field(
        default=value, metadata={"schema": nullable(schema) if null else schema, "words": words, "null": null}
    )


def any_text(accepted: str) -> Schema:
    return {"type": "string", "minLength": 1, "x-accepted": accepted}


def describe_setting(declared: Mapping[str, Any]) -> str:
    """Say in words what a setting accepts, from its field's metadata."""
    accepted = describe_schema(declared["schema"])
    return f"{accepted}, or null for {declared['null']}" if declared["null"] else accepted


def read_section(cls: type[Any], raw: Any, section: str) -> Any:
    """Return the dataclass made from one section of model-config.yaml, every key checked."""
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{section} takes keys and values, not {shorten(raw)}")
    settings = {each.name: each.metadata for each in dataclasses.fields(cls)}
    read = {}
    for name, value in raw.items():
        if name not in settings:
            shown = cut(name, 100) if isinstance(name, str) else shorten(name)
            raise ConfigError(f"{section}.{shown} is not a key; the keys are {', '.join(settings)}")
        schema = settings[name]["schema"]
        if not is_valid(value, schema):
            raise ConfigError(f"{section}.{name} takes {describe_setting(settings[name])}, not {shorten(value)}")
        read[name] = int(value) if "integer" in schema["type"] and value is not None else value
    for each in dataclasses.fields(cls):
        if each.default is NEEDED and each.name not in read:
            raise ConfigError(f"{section}.{each.name} is missing; it takes {describe_setting(each.metadata)}")
    return cls(**read)


def check_is_text(file: Path) -> None:
    """Refuse a model-config.yaml that TorchServe cannot read, if it is there.

    Raises:
        ConfigError: it is not UTF-8, with or without a byte order mark.
    """
    raw = file.read_bytes() if file.exists() else b""
    try:
        is_text = "\0" not in raw.decode("utf-8")
    except UnicodeDecodeError:
        is_text = False
    if not is_text:
        raise ConfigError(
            f"{file.name} is not UTF-8 (PowerShell's > and some editors write UTF-16): save it as UTF-8, for "
            "example with `iconv -f UTF-16 -t UTF-8`, and make the archive again"
        )
