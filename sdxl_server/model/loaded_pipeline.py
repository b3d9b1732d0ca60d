"""LoadedPipeline: the data of a model that is ready to draw."""

import copy
import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sdxl_server.config.compile_settings import CompileConfig
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.model.adapters.registry import Adapter
from sdxl_server.model.controls.base import Control
from sdxl_server.model.embeddings import Embedding
from sdxl_server.model.families import Family
from sdxl_server.model.tiling import compute_tile_side
from sdxl_server.model.upscaler import Upscaler
from sdxl_server.request.contract import Contract


@dataclass(frozen=True, eq=False)
class LoadedPipeline:
    """A pipeline that is ready to draw.

    Attributes:
        pipeline: the diffusers pipeline with the shared models.
        config: the `handler` section.
        compilation: the `pt2` section.
        dtype: the type of the weights.
        graphs: the sizes that a graph of OpenVINO serves; see `choose_graphs`.
        family: the kind of model.
        functions: by component, what runs it, compiled or not.
        parts: the compiled components by name, each with its OpenVINOBackend. None stands for another backend.
        contract: what requests may ask for.
        adapters: the registered adapters, fused or named by requests.
        embeddings: what prompts can name.
        controls: the registered controls.
        upscaler: the configured one.
        original: the model's name and digests; see `describe_original`.
    """

    pipeline: Any
    config: HandlerConfig
    compilation: CompileConfig
    dtype: str
    graphs: str | None
    family: Family
    functions: Mapping[str, Callable[..., Any]]
    parts: Mapping[str, Any]
    contract: Contract
    adapters: tuple[Adapter, ...]
    embeddings: tuple[Embedding, ...]
    controls: tuple[Control, ...]
    upscaler: Upscaler | None
    original: Mapping[str, str]

    @property
    def tile_side(self) -> int | None:
        """The side of the largest square that the VAE decodes whole, in latent cells. None: everything is whole."""
        return compute_tile_side(self.config, self.pipeline.vae_scale_factor)

    @functools.cached_property
    def own_tokenizer(self) -> Any:
        """A copy of the tokenizer for reading requests. A tokenizer serves one thread, and images have another one."""
        return copy.deepcopy(self.pipeline.tokenizer)

    @functools.cached_property
    def weights_sha256(self) -> str:
        """The digest of all weights that draw, as loaded. OpenVINO's components have theirs already."""
        from openvino_backend import digest_weights

        digests = []
        for name in self.family.models:
            backend, module = self.parts.get(name), getattr(self.pipeline, name, None)
            if backend and backend.reports:
                digests.append(backend.reports[0].weights_sha256)
            elif module is not None:
                digests.append(digest_weights(dict([*module.named_parameters(), *module.named_buffers()])))
        return hashlib.sha256("".join(digests).encode()).hexdigest()
