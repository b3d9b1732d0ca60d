"""The entries of `controls` in the handler section of model-config.yaml."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdxl_server.config.declaration import NAME, declare, read_section
from sdxl_server.errors import ConfigError
from sdxl_server.schemas import any_text, choice, real, shorten

T2I_ADAPTER, CONTROLNET, IP_ADAPTER = CONTROL_KINDS = ("t2i_adapter", "controlnet", "ip_adapter")
CONTROL_SCALE = real(0, 10)


@dataclass(frozen=True)
class ControlConfig:
    """An entry of `controls` in the handler section."""

    name: str = declare(NAME, "its name in requests")
    path: str = declare(
        any_text("a folder or a .safetensors file"),
        "folder in diffusers' layout, or a .safetensors file, inside the archive or absolute",
    )
    kind: str | None = declare(choice(*CONTROL_KINDS), "its kind; another one is an error", value=None, null="any kind")
    scale: float = declare(CONTROL_SCALE, "default strength", value=0.8)
    image_encoder: str | None = declare(
        any_text("a folder"),
        "folder of an IP-Adapter's CLIP image encoder, relative to its file",
        value=None,
        null="image_encoder",
    )


def read_control_settings(entries: Sequence[Any]) -> tuple[ControlConfig, ...]:
    """Check the list `controls` of the handler section and return it.

    Raises:
        ConfigError: names the entry, its key, what is accepted and what was given.
    """
    controls: list[ControlConfig] = []
    for index, each in enumerate(entries):
        entry = read_section(ControlConfig, each, f"handler.controls[{index}]")
        if entry.name in (other.name for other in controls):
            raise ConfigError(
                f"handler.controls[{index}].name takes a name that no other control has, not {shorten(entry.name)}"
            )
        controls.append(entry)
    return tuple(controls)
