"""The environment variables of the jobs' programs, each declared once."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


class SettingError(ValueError):
    """A variable is wrong. The message names it, what it accepts and what was given."""


def _variable(value: Any, words: str) -> Any:
    return dataclasses.field(default=value, metadata={"words": words})


@dataclass(frozen=True)
class Settings:
    """Environment variables: JOBS_ and these names in capitals."""

    redis: str = _variable("redis://127.0.0.1:6379/0", "Redis' address")
    predictions: str = _variable(
        "http://127.0.0.1:8080/predictions/diffusion_fast", "the model's address in the worker's own TorchServe"
    )
    key_file: str = _variable("", "TorchServe's key_file.json; empty: it asks for no token")
    results: str = _variable("results", "the folder of requests and images; API and workers share it")
    max_waiting: int = _variable(1000, "jobs that wait; one more is answered with 503")
    keep_bytes: int = _variable(10_000_000_000, "of the folder; past it, the jobs that ended first are removed")
    keep_seconds: int = _variable(86_400, "after its end a job is removed")
    lost_seconds: int = _variable(30, "without a sign of life of its worker a job is taken up by another, once")

    @classmethod
    def read(cls) -> Self:
        """Return the settings from the environment.

        Raises:
            SettingError: a number is none, or below 1.
        """
        given: dict[str, Any] = {}
        for each in dataclasses.fields(cls):
            name = f"JOBS_{each.name.upper()}"
            text = os.environ.get(name)
            if text is None:
                continue
            if isinstance(each.default, int) and not (text.isascii() and text.isdigit() and int(text) > 0):
                raise SettingError(f"{name} takes a whole number above 0, not {text!r}")
            given[each.name] = int(text) if isinstance(each.default, int) else text
        return cls(**given)

    @property
    def folder(self) -> Path:
        """The folder of requests and images."""
        return Path(self.results)
