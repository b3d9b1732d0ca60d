"""The adapters of a model: read when it is loaded, and fused into its weights or kept for requests that name them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_server.config.adapter_settings import AdapterConfig
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.errors import ConfigError
from sdxl_server.model.adapters.files import LowRank, read_adapter
from sdxl_server.model.adapters.names import Layer, spell_layers
from sdxl_server.model.families import Family

Products = dict[str, tuple[Any, Any]]  # by the name of a layer's weights, see openvino_backend


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits the model.

    Attributes:
        config: how it is registered.
        sha256: the digest of its file.
        ranks: of the layers that it changes.
        changes: what it adds to them; empty where that is done.
    """

    config: AdapterConfig
    sha256: str
    ranks: Mapping[Layer, int]
    changes: Mapping[Layer, LowRank]

    @property
    def rank(self) -> int:
        """The largest of its layers."""
        return max(self.ranks.values())

    def describe(self, scale: float | None = None) -> dict[str, Any]:
        """Return what is applied.

        Args:
            scale: of a request that names it.
        """
        return {
            "name": self.config.name,
            "sha256": self.sha256,
            "scale": self.config.scale if scale is None else scale,
            "fused": self.config.fuse,
            "rank": self.rank,
            "layers": len(self.ranks),
        }


def load_adapters(
    pipeline: Any, family: Family, config: HandlerConfig, *, model_dir: Path, compiled: Sequence[str]
) -> tuple[Adapter, ...]:
    """Return the adapters that are configured, those that are to be fused added to the weights.

    Args:
        model_dir: where a relative path is looked up.
        compiled: the parts that openvino compiles.

    Raises:
        ConfigError: names the entry, and says what of it does not fit.
    """
    if not config.adapters:
        return ()
    spelt = spell_layers(pipeline, family.text_encoders)
    adapters = []
    for index, entry in enumerate(config.adapters):
        key = f"handler.adapters[{index}]"
        try:
            digest, changes = read_adapter(model_dir / entry.path, spelt)
            if entry.fuse:
                fuse(pipeline, changes, scale=entry.scale)
        except ConfigError as error:
            raise ConfigError(f"{key}.path: {error}") from error
        ranks = {layer: each.rank for layer, each in changes.items()}
        adapters.append(Adapter(entry, digest, ranks, {} if entry.fuse else changes))
        if not entry.fuse:
            _check_choice(adapters[-1], key, config, compiled)
    return tuple(adapters)


def _check_choice(adapter: Adapter, key: str, config: HandlerConfig, compiled: Sequence[str]) -> None:
    """Refuse an adapter that no request could use.

    Raises:
        ConfigError: says why, and what to set.
    """
    outside = sorted({layer.part for layer in adapter.ranks} - set(compiled))
    if outside:
        raise ConfigError(
            f"{key}.fuse: false takes a model that openvino compiles, and it does not compile {', '.join(outside)}: "
            "use fuse: true, or pt2.backend: openvino with all of compile_*"
        )
    if adapter.rank > config.max_adapter_rank:
        raise ConfigError(
            f"{key}.path: its rank is {adapter.rank}, and handler.max_adapter_rank is {config.max_adapter_rank}: raise "
            "that, or use fuse: true"
        )


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


def find_ranks(adapters: Sequence[Adapter], config: HandlerConfig) -> dict[str, dict[str, int]]:
    """Return by part, for each layer that requests can change, the largest sum of ranks by the name of its weights."""
    ranks: dict[str, dict[str, int]] = {}
    for adapter in adapters:
        for layer, change in adapter.changes.items():
            part = ranks.setdefault(layer.part, {})
            part[layer.weight] = min(part.get(layer.weight, 0) + change.rank, config.max_adapter_rank)
    return ranks


def choose_products(adapters: Sequence[Adapter], chosen: Sequence[Mapping[str, Any]]) -> dict[str, Products]:
    """Return by part the matrices of the adapters that a request names, one beside the other, with their scales."""
    import torch

    scales = {each["name"]: each["scale"] for each in chosen}
    found: dict[Layer, list[tuple[Any, Any]]] = {}
    for adapter in adapters:
        scale = scales.get(adapter.config.name)
        if scale is not None:
            for layer, change in adapter.changes.items():
                up = change.up.float() * (scale * change.factor)
                found.setdefault(layer, []).append((change.down.float(), up))
    products: dict[str, Products] = {}
    for layer, pairs in found.items():
        downs, ups = zip(*pairs, strict=True)
        products.setdefault(layer.part, {})[layer.weight] = torch.cat(downs), torch.cat(ups, dim=1)
    return products
