"""The configurations to measure, as configurations.yaml lists them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

GUIDE = "inductor-guide"
PICTURE = "picture"  # the whole pipeline, from a prompt to a JPEG, beside its parts
PARTS = {
    "unet": ("diffusers", "UNet2DConditionModel", "forward"),
    "vae": ("diffusers", "AutoencoderKL", "decode"),
    "text_encoder": ("transformers", "CLIPTextModel", "forward"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", "forward"),
}
WEIGHTS = {"f32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Library:
    """One that whole pictures are compared with.

    Attributes:
        formats: those that it keeps weights in.
    """

    name: str
    formats: Sequence[str]


_OPENVINO_FORMATS = ("fp32", "fp16", "int8")
LIBRARIES = {
    "optimum": Library("optimum-intel", _OPENVINO_FORMATS),
    "genai": Library("openvino-genai", _OPENVINO_FORMATS),
    "sdcpp": Library("stable-diffusion.cpp", ("f32", "f16", "bf16", "q8_0")),
}


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
    peer: Mapping[str, Any] | None = None

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
        engines = [key for key in ("pt2", "native", "peer") if key in raw]
        if len(engines) > 1:
            raise ConfigurationError(f"{name} takes {' or '.join(engines)}, not both")
        if engines == ["native"]:
            _check_native(f"{name}.native", raw["native"])
        elif engines == ["peer"]:
            _check_peer(f"{name}.peer", raw["peer"])
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
        if self.peer is not None:
            return "int8" if self.peer["weight_format"] in ("int8", "q8_0") else None
        options = dict(self.native or {})
        if isinstance(self.pt2, Mapping):
            options = dict(self.pt2.get("options") or {})
        if precision := options.get("precision"):
            from openvino_backend import Options

            return Options.parse({"precision": precision}).weight_compression
        return options.get("weight_compression")


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


def _check_native(key: str, section: Any) -> None:
    _check_keys(key, section, "weight_compression", "config")
    if "weight_compression" in section:
        _choose(f"{key}.weight_compression", section["weight_compression"], "int8_sym", "int8_asym")


def _check_peer(key: str, section: Any) -> None:
    _check_keys(key, section, "library", "weight_format", "config")
    _choose(f"{key}.library", section.get("library"), *LIBRARIES)
    _choose(f"{key}.weight_format", section.get("weight_format"), *LIBRARIES[section["library"]].formats)


def _check_keys(key: str, section: Any, *keys: str) -> None:
    if not isinstance(section, Mapping):
        raise ConfigurationError(f"{key} takes keys and values, not {section!r}")
    for each in section:
        if each not in keys:
            raise ConfigurationError(f"{key}.{each} is not a key; the keys are {', '.join(keys)}")
    if not isinstance(section.get("config", {}), Mapping):
        raise ConfigurationError(f"{key}.config takes the library's options by name, not {section['config']!r}")


def _check_pt2(name: str, pt2: Any) -> None:
    from sdxl_server.config.settings import CompileConfig
    from sdxl_server.errors import ConfigError

    try:
        CompileConfig.parse(pt2)
    except ConfigError as error:
        raise ConfigurationError(f"{name}: {error}") from error
