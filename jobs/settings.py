"""The environment variables of the jobs' programs: JOBS_ and these names in capitals."""

import base64
import ipaddress
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import Field, PositiveInt, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

RESTARTED = 100  # the priority of a job that is started again, above the priorities of all holders
Priority = Annotated[int, Field(gt=-RESTARTED, lt=RESTARTED)]


class SettingError(ValueError):
    """A variable is wrong. The message names it, what it accepts and what was given."""


def _declare(default: Any, words: str) -> Any:
    return Field(default=default, description=words)


class Settings(BaseSettings):
    """The operator's choices. A holder is the owner of an API key."""

    model_config = SettingsConfigDict(env_prefix="JOBS_", frozen=True)

    database: str = _declare("postgresql:///sdxl_jobs", "PostgreSQL, as libpq takes its address")
    predictions: str = _declare(
        "http://127.0.0.1:8080/predictions/diffusion_fast",
        "the model in a worker's TorchServe, or in HAProxy with as many workers as instances",
    )
    key_file: str = _declare("", "TorchServe's key_file.json, where it needs an API key")
    results: str = _declare("results", "the images: a folder, or an fsspec URL such as s3://bucket/results")
    max_waiting: PositiveInt = _declare(1000, "waiting jobs; one more gets 503")
    max_waiting_of_holder: PositiveInt = _declare(1000, "waiting jobs of one holder; one more gets 429")
    max_waiting_bytes: PositiveInt = _declare(2_000_000_000, "of waiting orders, with their input images")
    priorities: Annotated[dict[str, Priority], NoDecode] = _declare(
        {}, "holder=number pairs; a higher number is drawn first, other holders have 0"
    )
    keep_bytes: PositiveInt = _declare(10_000_000_000, "of images; beyond, the jobs that ended first are removed")
    keep_seconds: PositiveInt = _declare(86_400, "after its end a job is removed")
    lost_seconds: PositiveInt = _declare(30, "a worker without a heartbeat for so long counts as lost")
    silent_seconds: PositiveInt = _declare(300, "a TorchServe that sends nothing for so long counts as lost")
    webhooks: Annotated[list[str], NoDecode] = _declare(
        [], "where webhooks may go: origins such as https://example.org, and private networks"
    )
    webhook_secret: str = _declare("", "signs webhooks: whsec_ and 24 to 64 bytes in base64")

    @classmethod
    def read(cls) -> "Settings":
        """Return the settings from the environment.

        Raises:
            SettingError: a variable is wrong.
        """
        try:
            return cls()
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = f"JOBS_{first['loc'][0] if first['loc'] else 'webhook_secret'}".upper()
            given = f", not {first['input']!r:.200}" if first["loc"] else ""  # never the secret
            raise SettingError(f"{name}: {first['msg']}{given}") from None

    @field_validator("priorities", mode="before")
    @classmethod
    def _split_pairs(cls, text: object) -> object:
        return dict(pair.partition("=")[::2] for pair in text.split()) if isinstance(text, str) else text

    @field_validator("webhooks", mode="before")
    @classmethod
    def _split_words(cls, text: object) -> object:
        return text.split() if isinstance(text, str) else text

    @model_validator(mode="after")
    def _check_webhooks(self) -> "Settings":
        if self.webhooks:
            _ = self.networks
            if not 24 <= len(base64.b64decode(self.webhook_secret.removeprefix("whsec_"))) <= 64:
                raise ValueError("JOBS_WEBHOOKS needs whsec_ and 24 to 64 bytes in base64 here")
        return self

    @property
    def origins(self) -> list[str]:
        """The origins that webhooks may go to."""
        return [word for word in self.webhooks if urlsplit(word).scheme in ("http", "https")]

    @property
    def networks(self) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
        """The private networks that webhooks may go to."""
        return [ipaddress.ip_network(word) for word in self.webhooks if word not in self.origins]
