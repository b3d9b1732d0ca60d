"""A pipeline that is ready to make pictures: load → compile → warm up, and what it says of itself."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_server import __version__
from sdxl_server.api.image_files import can_hold
from sdxl_server.config.settings import CompileConfig, HandlerConfig
from sdxl_server.diffusion.denoiser import Autoencoder
from sdxl_server.diffusion.previews import MOSAIC_SIDE, ColourMap, fit_colours, keep_colours
from sdxl_server.errors import ConfigError
from sdxl_server.model.adapters.registry import Adapter, find_ranks, load_adapters
from sdxl_server.model.compiling import VAE_ENCODER, choose_graphs, compile_parts, list_parts
from sdxl_server.model.contract_builder import build_contract
from sdxl_server.model.families import Family, find_family
from sdxl_server.model.folders import check_texts, check_whole, write_copy, write_remedy
from sdxl_server.model.reading import blame, check_device, check_files, choose_dtype, read_pipeline
from sdxl_server.model.tiling import describe_tiles, find_tile_side
from sdxl_server.model.vaes import is_tiny
from sdxl_server.request.contract import Contract
from sdxl_server.request.fields import GenerationRequest
from sdxl_server.request.masks import find_mask_warnings
from sdxl_server.request.prompt_weights import choose_chunks, find_cuts
from sdxl_server.request.prompts import PROMPTS, find_syntax
from sdxl_server.sampling.schedulers import find_sampling_warnings
from sdxl_server.sampling.step_plan import has_halves
from sdxl_server.warm_up import warm_up


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline that is ready to make pictures.

    Attributes:
        pipeline: the diffusers pipeline, its parts compiled.
        config: what it was loaded with.
        compilation: what it was compiled with.
        dtype: the type of its weights.
        graphs: which sizes a graph of OpenVINO's is for; see `choose_graphs`.
        family: what kind of model it is.
        functions: what runs each part, compiled or not.
        parts: the compiled parts by name, each with its OpenVINOBackend, or None where another backend compiled it.
        contract: what requests may ask of it.
        adapters: that are fused into the weights, or named by requests.
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

    def describe(self) -> dict[str, Any]:
        """Return what runs, read off what was compiled so far; without a warm-up that is nothing before a request."""
        import torch

        import openvino_backend

        report: dict[str, Any] = {
            "model_path": self.config.model_path,
            "dtype": self.dtype,
            "scheduler": self.contract.properties["scheduler"]["default"],
            "backend": self.compilation.backend or "eager",
            "graphs_for": self.graphs,
            "compiled_parts": list(self.parts),
            "weights_sha256": self.weights_sha256,
            "vae": self.describe_vae(),
            "preview": {"kind": self.config.preview, "lossy": self.config.preview != "exact"},
            "adapters": [each.describe() for each in self.adapters],
            "weighted_prompts": self.config.weighted_prompts,
            "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
            "versions": {"sdxl_server": __version__, "openvino_backend": openvino_backend.__version__},
            "shortcuts": {
                "unet_calls": self.config.unet_calls,
                "guidance_interval": self.config.guidance_interval,
                "lossy": self.config.unet_calls is not None or self.config.guidance_interval is not None,
            },
            "graph_breaks": sum(torch._dynamo.utils.counters["graph_break"].values()),
        }
        if self.compilation.backend == "openvino":
            report["arithmetic"] = self.arithmetic
            report["openvino"] = {
                name: [dataclasses.asdict(graph) for graph in backend.reports] for name, backend in self.parts.items()
            }
            report["graphs"] = sum(len(graphs) for graphs in report["openvino"].values())
        return report

    @property
    def chunks(self) -> int:
        """How many chunks of a prompt are read, see `choose_chunks`."""
        return choose_chunks(self.config, self.graphs)

    @property
    def tile_side(self) -> int | None:
        """The side of the largest square that the VAE decodes whole, in cells of latents; None where all is whole."""
        return find_tile_side(self.config, self.pipeline.vae_scale_factor)

    def fork_vae(self) -> Autoencoder:
        """Return the VAE of one picture; what adapters change is elsewhere."""
        return Autoencoder(self.pipeline.vae, self.functions, tile_side=self.tile_side)

    def describe_vae(self) -> dict[str, Any]:
        """Return which VAE it has, with whether that is lossy."""
        vae = self.pipeline.vae
        return {
            "class": type(vae).__name__,
            "path": self.config.vae_path,
            "lossy": is_tiny(vae),
            "tile_side": self.config.vae_tile_side,
        }

    @functools.cached_property
    def colours(self) -> ColourMap:
        """What fast previews are drawn with; fitted at the warm-up, or else for the first preview."""
        width, height = (side // self.pipeline.vae_scale_factor for side in self.contract.size)
        if self.graphs == "dynamic":  # no larger than holds all that it is fitted to
            width, height = min(width, MOSAIC_SIDE), min(height, MOSAIC_SIDE)
        fit = functools.partial(fit_colours, self.pipeline.vae, self.fork_vae().decode, height=height, width=width)
        return keep_colours(fit, self.parts.get("vae"), self.pipeline.vae.config, self.tile_side, height, width)

    @functools.cached_property
    def arithmetic(self) -> Mapping[str, Any] | None:
        """What OpenVINO's arithmetic was set to, with whether it is lossy; None where another backend computes."""
        backends = [backend for backend in self.parts.values() if backend is not None]
        described: Mapping[str, Any] | None = backends[0].options.describe_arithmetic() if backends else None
        return described

    @functools.cached_property
    def weights_sha256(self) -> str:
        """A digest of all weights as they were loaded; OpenVINO's parts have theirs already."""
        from openvino_backend import digest_weights

        digests = []
        for name in ("unet", "vae", *self.family.text_encoders):
            backend, module = self.parts.get(name), getattr(self.pipeline, name, None)
            if backend and backend.reports:
                digests.append(backend.reports[0].weights_sha256)
            elif module is not None:
                digests.append(digest_weights(dict([*module.named_parameters(), *module.named_buffers()])))
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def list_applied(self, request: GenerationRequest) -> list[dict[str, Any]]:
        """Return the adapters of a picture: those that are fused, and those that its request names."""
        scales = {each["name"]: each["scale"] for each in request.adapters or ()}
        return [
            adapter.describe(scales.get(adapter.config.name))
            for adapter in self.adapters
            if adapter.config.fuse or adapter.config.name in scales
        ]

    def list_uncompiled(self, request: GenerationRequest) -> list[str]:
        """Return the parts that OpenVINO compiles when this request is the first to need them."""
        needed = (name for name in self.parts if name != VAE_ENCODER or request.image is not None)
        return [name for name in needed if self.parts[name] is not None and not self.parts[name].reports]

    def measure_parts(self) -> dict[str, dict[str, tuple[float, str]]]:
        """Return for each part that OpenVINO runs the figures worth watching: by their name, the value and its unit."""
        if self.compilation.backend != "openvino":
            return {}
        figures = {}
        for name, backend in self.parts.items():
            models = [model for graph in backend.reports for model in graph.models]
            figures[name] = {
                "OpenVINOModels": (len(models), "count"),
                "OpenVINOModelsFromCache": (sum(model.loaded_from_cache for model in models), "count"),
                "OpenVINOOperatorsOutside": (sum(len(each.operators_outside) for each in backend.reports), "count"),
                "OpenVINOCompileTime": (sum(model.seconds for model in models), "s"),
            }
        return figures


def load_pipeline(
    config: HandlerConfig, compilation: CompileConfig, *, model_dir: Path, device: str = "cpu"
) -> LoadedPipeline:
    """Load the model, compile its parts and make one picture, so that no user pays for compilation.

    Args:
        model_dir: the archive's folder; a relative model_path is looked up there.
        device: torch's device.

    Raises:
        ConfigError: the configuration does not fit the model or the machine.
    """
    folder = model_dir / config.model_path
    family = find_family(folder, is_xl=config.is_xl)
    check_files(folder, remedy=write_copy(folder))
    check_whole(folder)
    vae = None if config.vae_path is None else model_dir / config.vae_path
    if vae is not None:
        check_files(vae, remedy=write_copy(vae, option="--vae"))
    check_device(compilation, device=device)
    graphs = choose_graphs(config, compilation)
    dtype, compilation = choose_dtype(config, compilation, device=device)
    with blame(f"cannot read the pipeline in {folder} (it is made anew by: {write_remedy(folder)})"):
        pipeline = read_pipeline(folder, dtype, family, vae=vae)
        check_texts(pipeline, family.text_encoders, folder)
        if device != "cpu":
            pipeline.to(device)
        compiled = list_parts(family, config) if compilation.backend == "openvino" else []
        adapters = load_adapters(pipeline, family, config, model_dir=model_dir, compiled=compiled)
        contract = build_contract(pipeline, family, config, graphs=graphs, adapters=adapters)
    with blame(f"pt2.backend: {compilation.backend} cannot run this model"):
        functions, parts = compile_parts(
            pipeline, family, config, compilation, contract=contract, ranks=find_ranks(adapters, config)
        )
        loaded = LoadedPipeline(
            pipeline, config, compilation, dtype, graphs, family, functions, parts, contract, adapters
        )
        if config.warm_up:
            warm_up(loaded)
    if config.weights_sha256 is not None and config.weights_sha256 != loaded.weights_sha256:
        raise ConfigError(
            f"handler.weights_sha256 takes the digest of the weights in {folder} as {dtype}, "
            f"{loaded.weights_sha256}, not {config.weights_sha256!r}; other weights than expected, or another dtype"
        )
    return loaded


def find_warnings(loaded: LoadedPipeline, request: GenerationRequest, *, told: Sequence[str] = ()) -> list[str]:
    """Return what of a request is left out, in words.

    Args:
        told: the warnings that there are already.
    """
    warnings = []
    for name in PROMPTS:
        if value := getattr(request, name):
            warnings += find_syntax(name, value, is_weighted=loaded.config.weighted_prompts)
            warnings += find_cuts(name, value, loaded.pipeline.tokenizer, chunks=loaded.chunks)
    warnings += find_sampling_warnings(loaded.pipeline.scheduler, request)
    if not has_halves(request.guidance_scale, loaded.pipeline.unet.config):
        scale = request.guidance_scale
        why = f"guidance_scale is {scale:g}" if scale <= 1 else "the guidance is an input of this model's UNet"
        given = [name for name in PROMPTS if name.startswith("negative") and getattr(request, name)]
        warnings += [f"{name} has no effect, since {why}" for name in given]
    for name in ("strength", "resize_mode"):
        if getattr(request, name) is not None and request.image is None:
            warnings.append(f"{name} has no effect without an image")
    if request.mask_image is not None:
        warnings += find_mask_warnings(request.mask_image)
    described = describe_picture(loaded, request, 0, unet_calls=0, warnings=[*told, *warnings])
    if loaded.config.embed_parameters and not can_hold(request, described):
        warnings.append("the prompts are too long for a JPEG to hold what makes it again; PNG and WebP have room")
    return warnings


def describe_picture(
    loaded: LoadedPipeline, request: GenerationRequest, index: int, *, unet_calls: float, warnings: Sequence[str] = ()
) -> dict[str, Any]:
    """Return what makes picture `index` again: the fields of the request, what was left out of it, and what made it."""
    import diffusers
    import openvino
    import torch

    return {
        "request": request.describe(index),
        **({"warnings": list(warnings)} if warnings else {}),
        "made_with": {
            "model": loaded.config.model_path,
            "weights_sha256": loaded.weights_sha256,
            **({"adapters": applied} if (applied := loaded.list_applied(request)) else {}),
            **({"vae": vae} if (vae := loaded.describe_vae())["path"] or vae["lossy"] else {}),
            **({"weighted_prompts": True} if loaded.config.weighted_prompts else {}),
            **({"vae_tiles": tiles} if (tiles := describe_tiles(request, loaded.config)) else {}),
            "dtype": loaded.dtype,
            "unet_calls": unet_calls,
            "backend": loaded.compilation.backend or "eager",
            **({} if loaded.arithmetic is None else {"arithmetic": loaded.arithmetic, "graphs_for": loaded.graphs}),
            "versions": {
                "sdxl_server": __version__,
                "diffusers": diffusers.__version__,
                "torch": torch.__version__,
                "openvino": openvino.__version__,
            },
        },
    }
