"""The configurations to measure, as configurations.yaml lists them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

GUIDE = "inductor-guide"
PARTS = {
    "unet": ("diffusers", "UNet2DConditionModel", "forward"),
    "vae": ("diffusers", "AutoencoderKL", "decode"),
    "text_encoder": ("transformers", "CLIPTextModel", "forward"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", "forward"),
}
WEIGHTS = {"f32": "float32", "bf16": "bfloat16"}
_NATIVE = {"weight_compression": "int8_sym or int8_asym", "config": "OpenVINO properties by name"}


class ConfigurationError(ValueError):
    """An entry that cannot be measured; the message names the key, what it takes and what was given."""


@dataclass(frozen=True)
class Configuration:
    """How a part of the model runs; configurations.yaml tells each key's meaning."""

    name: str
    arithmetic: str
    weights: str | None = None
    pt2: Any = None
    native: Mapping[str, Any] | None = None

    @classmethod
    def parse(cls, raw: Any) -> "Configuration":
        """Check and return one entry.

        Raises:
            ConfigurationError: an unknown key or a wrong value.
        """
        if not isinstance(raw, Mapping) or not isinstance(raw.get("name"), str):
            raise ConfigurationError(f"a configuration takes keys and values with a name, not {raw!r}")
        name, keys = raw["name"], [each.name for each in fields(cls)]
        for key in raw:
            if key not in keys:
                raise ConfigurationError(f"{name}.{key} is not a key; the keys are {', '.join(keys)}")
        _choose(f"{name}.arithmetic", raw.get("arithmetic"), *WEIGHTS, "best")
        if "weights" in raw:
            _choose(f"{name}.weights", raw["weights"], "float32", "bfloat16", "float16")
        if raw.get("native") is not None:
            _check_native(name, raw)
        else:
            _check_pt2(name, raw.get("pt2"))
        return cls(**raw)

    def settle(self, has_bf16: bool) -> "Configuration":
        """Return it with the arithmetic and the type of the weights that it has on such a machine."""
        arithmetic = ("bf16" if has_bf16 else "f32") if self.arithmetic == "best" else self.arithmetic
        return replace(self, arithmetic=arithmetic, weights=self.weights or WEIGHTS[arithmetic])

    @property
    def compression(self) -> str | None:
        """The form that weights are compressed to, or None."""
        options = self.native
        if isinstance(self.pt2, Mapping):
            options = self.pt2.get("options")
        return (options or {}).get("weight_compression")


def read_configurations(path: Path) -> list[Configuration]:
    """Return the configurations of a file.

    Raises:
        ConfigurationError: names the key, what it takes and what was given.
    """
    raw = yaml.safe_load(path.read_text())
    if not isinstance(raw, list) or not raw:
        raise ConfigurationError(f"{path.name} takes a list of configurations, not {raw!r}")
    configurations = [Configuration.parse(each) for each in raw]
    names = [each.name for each in configurations]
    for name in names:
        if names.count(name) > 1:
            raise ConfigurationError(f"{path.name} takes each name once, not {name!r} {names.count(name)} times")
    return configurations


def _choose(key: str, value: Any, *accepted: str) -> None:
    if value not in accepted:
        raise ConfigurationError(f"{key} takes {' | '.join(accepted)}, not {value!r}")


def _check_native(name: str, raw: Mapping[str, Any]) -> None:
    native = raw["native"]
    if "pt2" in raw:
        raise ConfigurationError(f"{name} takes pt2 or native, not both")
    if not isinstance(native, Mapping):
        raise ConfigurationError(f"{name}.native takes keys and values, not {native!r}")
    for key in native:
        if key not in _NATIVE:
            raise ConfigurationError(f"{name}.native.{key} is not a key; the keys are {', '.join(_NATIVE)}")
    if "weight_compression" in native:
        _choose(f"{name}.native.weight_compression", native["weight_compression"], "int8_sym", "int8_asym")
    if not isinstance(native.get("config", {}), Mapping):
        raise ConfigurationError(f"{name}.native.config takes {_NATIVE['config']}, not {native['config']!r}")


def _check_pt2(name: str, pt2: Any) -> None:
    from pipeline_utils import CompileConfig, ConfigError

    try:
        CompileConfig.parse(pt2)
    except ConfigError as error:
        raise ConfigurationError(f"{name}: {error}") from error
