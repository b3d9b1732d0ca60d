"""The registered controls: loaded with the model, each of a kind that its file decides."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_server.config.control_settings import CONTROLNET, IP_ADAPTER, T2I_ADAPTER, ControlConfig
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.convert.recognition import describe_content
from sdxl_server.errors import ConfigError
from sdxl_server.model.controls import controlnet, ip_adapter, t2i_adapter
from sdxl_server.model.controls.base import Control, Inputs
from sdxl_server.model.controls.files import ControlFile, open_control
from sdxl_server.model.families import Family
from sdxl_server.schemas import shorten


@dataclass(frozen=True)
class Kind:
    """A kind of control.

    Attributes:
        name: as describe_content names its files.
        classes: diffusers' classes in the config.json of its folders.
        load: loads it.
    """

    name: str
    classes: tuple[str, ...]
    load: Callable[[ControlFile, ControlConfig, Any, Family, str], Control]


KINDS = {
    T2I_ADAPTER: Kind("a T2I-Adapter", t2i_adapter.CLASSES, t2i_adapter.load_t2i_adapter),
    CONTROLNET: Kind("a ControlNet", controlnet.CLASSES, controlnet.load_controlnet),
    IP_ADAPTER: Kind("an IP-Adapter", (), ip_adapter.load_ip_adapter),
}


def load_controls(
    pipeline: Any, family: Family, config: HandlerConfig, dtype: str, *, model_dir: Path
) -> tuple[Control, ...]:
    """Return the configured controls.

    Args:
        model_dir: where a relative path is looked up.

    Raises:
        ConfigError: names the entry that does not fit.
    """
    controls = []
    for index, entry in enumerate(config.controls or ()):
        try:
            opened = open_control(model_dir / entry.path)
            kind = find_kind(opened)
        except ConfigError as error:
            raise ConfigError(f"handler.controls[{index}].path: {error}") from error
        if entry.kind not in (None, kind):
            raise ConfigError(
                f"handler.controls[{index}].kind takes {kind}, which {opened.path} holds, not {entry.kind}"
            )
        try:
            controls.append(KINDS[kind].load(opened, entry, pipeline, family, dtype))
        except ConfigError as error:
            raise ConfigError(f"handler.controls[{index}].path: {error}") from error
    names = Counter(name for each in controls for name in each.list_components())
    if twice := [name for name, count in names.items() if count > 1]:
        raise ConfigError(f"handler.controls takes other names: two of them have the component {twice[0]}")
    return tuple(controls)


def find_kind(opened: ControlFile) -> str:
    """Return the kind of control in opened files.

    Raises:
        ConfigError: they hold something else.
    """
    held = opened.config and opened.config.get("_class_name")
    content = shorten(held) if held else describe_content(opened.header)
    for name, kind in KINDS.items():
        if held in kind.classes or content == kind.name:
            return name
    kinds = " or ".join(kind.name for kind in KINDS.values())
    raise ConfigError(f"{opened.path} holds {content}; a control is {kinds}")


def list_empty_inputs(controls: Sequence[Control], unet: Any, sample: Any) -> Inputs:
    """Return the UNet's inputs for all registered controls, without an effect.

    Args:
        sample: the UNet's input; rows × channels × height × width.
    """
    inputs: dict[str, Any] = {}
    for each in controls:
        empty: Mapping[str, Any] = each.list_empty_inputs(unet, sample)
        inputs |= {name: _merge(inputs.get(name), value) for name, value in empty.items()}
    return inputs


def _merge(one: Any, other: Any) -> Any:
    """Return the inputs of two controls: those of a kind are the same, or have other names in a dictionary."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return {**one, **{name: _merge(one.get(name), each) for name, each in other.items()}}
    return other
