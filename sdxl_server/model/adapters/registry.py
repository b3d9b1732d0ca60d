"""The registered adapters: loaded with the model, then fused into its weights or kept for requests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_server.config.adapter_settings import AdapterConfig
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.convert.digests import compute_autov2
from sdxl_server.errors import ConfigError
from sdxl_server.model.adapters.changes import LowRankChange
from sdxl_server.model.adapters.layer_names import Layer, index_layers
from sdxl_server.model.adapters.lora_files import Change, load_lora
from sdxl_server.model.families import Family

LowRankMatrices = dict[str, tuple[Any, Any]]  # (A, B) by the name of a layer's weights, as openvino_backend takes them


@dataclass(frozen=True)
class Adapter:
    """A registered adapter.

    Attributes:
        config: its entry in handler.adapters.
        sha256: the digest of its file.
        ranks: by layer; None in a format without ranks.
        changes: by layer; empty after they were fused.
    """

    config: AdapterConfig
    sha256: str
    ranks: Mapping[Layer, int | None]
    changes: Mapping[Layer, LowRankChange]

    @property
    def rank(self) -> int | None:
        """The largest rank of its layers."""
        return max((each for each in self.ranks.values() if each is not None), default=None)

    def describe(self, scale: float | None = None) -> dict[str, Any]:
        """Return its entry in a report.

        Args:
            scale: the request's scale, if it names the adapter.
        """
        return {
            "name": self.config.name,
            "sha256": self.sha256,
            "autov2": compute_autov2(self.sha256),
            "scale": self.config.scale if scale is None else scale,
            "fused": self.config.fuse,
            "rank": self.rank,
            "layers": len(self.ranks),
        }


def load_adapters(
    pipeline: Any, family: Family, config: HandlerConfig, *, model_dir: Path, compiled: Sequence[str]
) -> tuple[Adapter, ...]:
    """Return the configured adapters; add the fused ones to the weights.

    Args:
        model_dir: where a relative path is looked up.
        compiled: the components that OpenVINO compiles.

    Raises:
        ConfigError: names the entry that does not fit.
    """
    if not config.adapters:
        return ()
    layers = index_layers(pipeline, family.text_encoders)
    adapters = []
    for index, entry in enumerate(config.adapters):
        key = f"handler.adapters[{index}]"
        try:
            digest, changes = load_lora(model_dir / entry.path, layers)
            if entry.fuse:
                fuse_adapter(pipeline, changes, scale=entry.scale)
        except ConfigError as error:
            raise ConfigError(f"{key}.path: {error}") from error
        ranks = {layer: each.rank for layer, each in changes.items()}
        low_rank = {} if entry.fuse else select_low_rank(changes, key, entry.path)
        adapters.append(Adapter(entry, digest, ranks, low_rank))
        if not entry.fuse:
            _check_usable(adapters[-1], key, config, compiled)
    return tuple(adapters)


def select_low_rank(changes: Mapping[Layer, Change], key: str, path: str) -> dict[Layer, LowRankChange]:
    """Return the changes of a file that requests can name. They must all be of low rank.

    Args:
        key: the adapter's entry, in messages.

    Raises:
        ConfigError: names the file's other formats.
    """
    low_rank = {layer: each for layer, each in changes.items() if isinstance(each, LowRankChange)}
    kinds = {kind for each in changes.values() if not isinstance(each, LowRankChange) for kind in each.kinds}
    if kinds:
        raise ConfigError(
            f"{key}.fuse: false takes plain LoRA, and {path} holds {', '.join(sorted(kinds))}, which can only be added "
            "to the weights: use fuse: true"
        )
    return low_rank


def _check_usable(adapter: Adapter, key: str, config: HandlerConfig, compiled: Sequence[str]) -> None:
    """Refuse an adapter that no request could use.

    Raises:
        ConfigError: names the setting to change.
    """
    outside = sorted({layer.component for layer in adapter.ranks} - set(compiled))
    if outside:
        raise ConfigError(
            f"{key}.fuse: false takes a model that openvino compiles, but it does not compile {', '.join(outside)}: "
            "use fuse: true, or pt2.backend: openvino with compile_unet and compile_text_encoders"
        )
    if (adapter.rank or 0) > config.max_adapter_rank:
        raise ConfigError(
            f"{key}.path: its rank is {adapter.rank}, and handler.max_adapter_rank is {config.max_adapter_rank}: raise "
            "the limit, or use fuse: true"
        )


def fuse_adapter(pipeline: Any, changes: Mapping[Layer, Change], *, scale: float) -> None:
    """Add an adapter's changes to the weights, summed in float32.

    Raises:
        ConfigError: the sum is too large for the type of the weights.
    """
    import torch

    for layer, change in changes.items():
        parameters = dict(getattr(pipeline, layer.component).get_submodule(layer.name).named_parameters(recurse=False))
        weights = {name: each.data.float() for name, each in parameters.items()}
        for name, added in change.compute(weights).items():
            fused = (weights[name] + added * scale).to(parameters[name].dtype)
            if not torch.isfinite(fused).all():
                raise ConfigError(
                    f"at scale {scale:g} {layer.component}.{layer.name}.{name} is too large for {fused.dtype}"
                )
            parameters[name].data = fused


def compute_ranks(adapters: Sequence[Adapter], config: HandlerConfig) -> dict[str, dict[str, int]]:
    """Return the largest sum of ranks that requests can ask for, by component and name of the weights."""
    ranks: dict[str, dict[str, int]] = {}
    for adapter in adapters:
        for layer, change in adapter.changes.items():
            sums = ranks.setdefault(layer.component, {})
            sums[layer.weight] = min(sums.get(layer.weight, 0) + change.rank, config.max_adapter_rank)
    return ranks


def build_low_rank_matrices(
    adapters: Sequence[Adapter], chosen: Sequence[Mapping[str, Any]]
) -> dict[str, LowRankMatrices]:
    """Return the joined, scaled matrices of a request's adapters, by component.

    Args:
        chosen: the names and scales of the request.
    """
    import torch

    scales = {each["name"]: each["scale"] for each in chosen}
    found: dict[Layer, list[tuple[Any, Any]]] = {}
    for adapter in adapters:
        scale = scales.get(adapter.config.name)
        if scale is not None:
            for layer, change in adapter.changes.items():
                up = change.up.float() * (scale * change.factor)
                found.setdefault(layer, []).append((change.down.float(), up))
    matrices: dict[str, LowRankMatrices] = {}
    for layer, pairs in found.items():
        downs, ups = zip(*pairs, strict=True)
        matrices.setdefault(layer.component, {})[layer.weight] = torch.cat(downs), torch.cat(ups, dim=1)
    return matrices
