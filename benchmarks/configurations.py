"""Configurations to measure, one entry of configurations.yaml each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

IMAGE = "image"  # the whole pipeline, from a prompt to a JPEG
PARTS = {
    "unet": ("diffusers", "UNet2DConditionModel", "forward"),
    "vae": ("diffusers", "AutoencoderKL", "decode"),
    "text_encoder": ("transformers", "CLIPTextModel", "forward"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", "forward"),
}
WEIGHTS = {"f32": "float32", "bf16": "bfloat16"}
ENGINES = ("pt2", "native", "peer")
_OPENVINO_FORMATS = ["fp32", "fp16", "int8"]
LIBRARIES = {"optimum": _OPENVINO_FORMATS, "genai": _OPENVINO_FORMATS, "sdcpp": ["f32", "f16", "bf16", "q8_0"]}


def _build_section(required: Sequence[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


_SCHEMA = _build_section(
    ["name", "arithmetic"],
    name={"type": "string"},
    arithmetic={"enum": [*WEIGHTS, "best"]},
    weights={"enum": ["float32", "bfloat16", "float16"]},
    pt2={},
    native=_build_section([], weight_compression={"enum": ["int8_sym", "int8_asym"]}, config={"type": "object"}),
    peer=_build_section(
        ["library", "weight_format"],
        library={"enum": list(LIBRARIES)},
        weight_format={"type": "string"},
        config={"type": "object"},
    ),
)


class ConfigurationError(ValueError):
    """An entry is wrong. The message names the key, the accepted values and the given one."""


@dataclass(frozen=True)
class Configuration:
    """How a model runs. The head of configurations.yaml explains each key."""

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
        import jsonschema

        from sdxl_server.config.compile_settings import CompileConfig
        from sdxl_server.errors import ConfigError

        try:
            jsonschema.validate(raw, _SCHEMA)
            CompileConfig.parse(raw.get("pt2"))
        except jsonschema.ValidationError as error:
            raise ConfigurationError(f"{raw}: {error.json_path}: {error.message}") from error
        except ConfigError as error:
            raise ConfigurationError(f"{raw['name']}: {error}") from error
        if len([key for key in ENGINES if key in raw]) > 1:
            raise ConfigurationError(f"{raw['name']} takes one of {', '.join(ENGINES)}")
        if peer := raw.get("peer"):
            formats = LIBRARIES[peer["library"]]
            if peer["weight_format"] not in formats:
                raise ConfigurationError(f"{peer['library']} takes {', '.join(formats)}, not {peer['weight_format']}")
        return cls(**raw)

    def settle(self, has_bf16: bool) -> "Configuration":
        """Choose the arithmetic and the type of the weights for a CPU."""
        arithmetic = ("bf16" if has_bf16 else "f32") if self.arithmetic == "best" else self.arithmetic
        return replace(self, arithmetic=arithmetic, weights=self.weights or WEIGHTS[arithmetic])


def choose_configurations(path: Path, only: Sequence[str]) -> list[Configuration]:
    """Load a file. Return the named configurations in the order of their names, or all.

    Raises:
        ConfigurationError: a wrong entry, or an unknown name.
    """
    listed: dict[str, Configuration] = {}
    for raw in yaml.safe_load(path.read_text()):
        each = Configuration.parse(raw)
        if each.name in listed:
            raise ConfigurationError(f"{path.name} takes each name once; {each.name} is there twice")
        listed[each.name] = each
    for name in only:
        if name not in listed:
            raise ConfigurationError(f"--only takes {', '.join(listed)}, not {name!r}")
    return [listed[name] for name in only or listed]
