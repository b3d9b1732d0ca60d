"""The entries of `adapters` in the handler section of model-config.yaml."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdxl_server.config.declaration import NAME, SCHEDULER, declare, read_section
from sdxl_server.errors import ConfigError
from sdxl_server.schemas import any_text, real, shorten, switch, whole


@dataclass(frozen=True)
class AdapterConfig:
    """An entry of `adapters` in the handler section."""

    name: str = declare(NAME, "its name in requests")
    path: str = declare(any_text("a .safetensors file"), "LoRA or other adapter file, inside the archive or absolute")
    scale: float = declare(real(-100, 100), "default strength", value=1.0)
    fuse: bool = declare(
        switch(),
        "true: added to the weights for all requests, at no cost, and requests cannot name it; false: applied when a "
        "request names it, only plain LoRA with openvino",
        value=False,
    )
    scheduler: str | Mapping[str, Any] | None = declare(
        SCHEDULER,
        "default sampler of requests that name the adapter",
        value=None,
        null="the default of all requests",
    )
    num_inference_steps: int | None = declare(
        whole(1, 1000), "their default denoising steps", value=None, null="the default of all requests"
    )
    guidance_scale: float | None = declare(
        real(0, 100), "their default guidance", value=None, null="the default of all requests"
    )

    def list_defaults(self) -> dict[str, Any]:
        """Return the defaults of requests that name this adapter."""
        values = {name: getattr(self, name) for name in ("scheduler", "num_inference_steps", "guidance_scale")}
        return {name: value for name, value in values.items() if value is not None}


def read_adapter_settings(entries: Sequence[Any]) -> tuple[AdapterConfig, ...]:
    """Check the list `adapters` of the handler section and return it.

    Raises:
        ConfigError: names the entry, its key, what is accepted and what was given.
    """
    adapters = tuple(
        read_section(AdapterConfig, each, f"handler.adapters[{index}]") for index, each in enumerate(entries)
    )
    names = [each.name for each in adapters]
    for index, entry in enumerate(adapters):
        key = f"handler.adapters[{index}]"
        if entry.name in names[:index]:
            raise ConfigError(f"{key}.name takes a name that no other adapter has, not {shorten(entry.name)}")
        if entry.fuse and entry.list_defaults():
            name = next(iter(entry.list_defaults()))
            raise ConfigError(
                f"{key}.{name} is for requests that name the adapter; with fuse: true, set handler.{name} instead"
            )
    return adapters
