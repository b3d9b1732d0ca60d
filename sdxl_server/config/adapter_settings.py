"""The entries of `adapters` in the handler section of model-config.yaml."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdxl_server.config.sections import NEEDED, SCHEDULER, any_text, read_section, setting
from sdxl_server.errors import ConfigError
from sdxl_server.schemas import real, shorten, switch, whole


@dataclass(frozen=True)
class AdapterConfig:
    """An entry of `adapters` in the handler section."""

    name: str = setting(
        NEEDED,
        {"type": "string", "pattern": r"^[\w.-]{1,64}$", "x-accepted": "a name of letters, digits, - _ and ."},
        "by which requests name it",
    )
    path: str = setting(
        NEEDED, any_text("a .safetensors file"), "of the adapter, inside the archive or absolute; LoRA only"
    )
    scale: float = setting(1.0, real(-100, 100), "how strongly it is applied, unless a request says otherwise")
    fuse: bool = setting(
        False,
        switch(),
        "true: it is added to the weights when they are loaded, for all requests, none of which can name it, and costs "
        "no time; false: it is applied, by openvino only, in requests that name it",
    )
    scheduler: str | Mapping[str, Any] | None = setting(
        None,
        SCHEDULER,
        "the sampler of requests that name the adapter and no sampler",
        null="that of all requests",
    )
    num_inference_steps: int | None = setting(
        None, whole(1, 1000), "denoising steps of such requests", null="those of all requests"
    )
    guidance_scale: float | None = setting(None, real(0, 100), "guidance of such requests", null="that of all requests")

    def list_defaults(self) -> dict[str, Any]:
        """Return the defaults of requests that name it."""
        values = {name: getattr(self, name) for name in ("scheduler", "num_inference_steps", "guidance_scale")}
        return {name: value for name, value in values.items() if value is not None}


def read_adapters(entries: Sequence[Any]) -> tuple[AdapterConfig, ...]:
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
            raise ConfigError(f"{key}.name takes a name that no other has, not {shorten(entry.name)}")
        if entry.fuse and entry.list_defaults():
            name = next(iter(entry.list_defaults()))
            raise ConfigError(
                f"{key}.{name} is for requests that name the adapter, as none can with fuse: true; give handler.{name}"
            )
    return adapters
