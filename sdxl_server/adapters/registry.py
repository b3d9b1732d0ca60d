"""The adapters of a model: read when it is loaded, and fused into its weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_server.adapters.files import LowRank, read_adapter
from sdxl_server.adapters.names import Layer, spell_layers
from sdxl_server.errors import ConfigError
from sdxl_server.families import Family
from sdxl_server.settings import AdapterConfig, HandlerConfig


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits the model.

    Attributes:
        config: how it is registered.
        sha256: the digest of its file.
        rank: the largest of its layers.
        layers: the number of those that it changes.
    """

    config: AdapterConfig
    sha256: str
    rank: int
    layers: int

    def describe(self) -> dict[str, Any]:
        """Return what was applied."""
        return {
            "name": self.config.name,
            "sha256": self.sha256,
            "scale": self.config.scale,
            "rank": self.rank,
            "layers": self.layers,
        }


def load_adapters(pipeline: Any, family: Family, config: HandlerConfig, *, model_dir: Path) -> tuple[Adapter, ...]:
    """Return the adapters that are configured, those that are to be fused added to the weights.

    Args:
        model_dir: where a relative path is looked up.

    Raises:
        ConfigError: names the entry, and says what of it does not fit.
    """
    if not config.adapters:
        return ()
    spelt = spell_layers(pipeline, family.text_encoders)
    adapters = []
    for index, entry in enumerate(config.adapters):
        key = f"handler.adapters[{index}]"
        if not entry.fuse:
            raise ConfigError(f"{key}.fuse takes true; adapters that each request chooses are not served")
        try:
            digest, changes = read_adapter(model_dir / entry.path, spelt)
            fuse(pipeline, changes, scale=entry.scale)
        except ConfigError as error:
            raise ConfigError(f"{key}.path: {error}") from error
        adapters.append(Adapter(entry, digest, max(each.rank for each in changes.values()), len(changes)))
    return tuple(adapters)


def fuse(pipeline: Any, changes: Mapping[Layer, LowRank], *, scale: float) -> None:
    """Add what an adapter changes to the weights, summed in float32.

    Raises:
        ConfigError: the sum is too large for the type of the weights.
    """
    import torch

    for layer, change in changes.items():
        weight = getattr(pipeline, layer.part).get_submodule(layer.name).weight
        added = (change.up.float() @ change.down.flatten(1).float()) * (change.factor * scale)
        fused = (weight.data.float() + added.reshape(weight.shape)).to(weight.dtype)
        if not torch.isfinite(fused).all():
            raise ConfigError(f"at scale {scale:g} {layer.part}.{layer.weight} is too large for {weight.dtype}")
        weight.data = fused
