"""Compile the components of a pipeline as `pt2` configures."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sdxl_server.config.compile_settings import BACKENDS, CompileConfig
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.errors import ConfigError
from sdxl_server.model.controls.base import Control
from sdxl_server.model.families import Family
from sdxl_server.model.safety_checker import SAFETY_CHECKER
from sdxl_server.model.tiling import compute_tile_side, plan_tiles
from sdxl_server.model.upscaler import UPSCALER, Upscaler
from sdxl_server.model.vaes import choose_vae_methods
from sdxl_server.request.contract import Contract

VAE_ENCODER = "vae_encoder"
# The axes of each component's arguments that may have any length: batch, height, width, text length.
DYNAMIC_SHAPES: Mapping[str, Mapping[str, Any]] = {
    "unet": {
        "sample": (0, 2, 3),
        "encoder_hidden_states": (0, 1),
        "added_cond_kwargs": {"text_embeds": (0,), "time_ids": (0,)},
        "down_intrablock_additional_residuals": (0, 2, 3),
        "down_block_additional_residuals": (0, 2, 3),
        "mid_block_additional_residual": (0, 2, 3),
        "cross_attention_kwargs": (0,),  # of IP-Adapters
    },
    "vae": {"z": (2, 3)},
    VAE_ENCODER: {"x": (2, 3)},
}


def choose_graphs(config: HandlerConfig, compilation: CompileConfig) -> str | None:
    """Return which sizes a graph serves: static, dynamic or both; None without OpenVINO.

    The configuration alone decides, not earlier requests or free memory. So a seed always gives the same bits.

    Raises:
        ConfigError: the backend has no such setting, or there are more sizes than graphs.
    """
    if compilation.backend != "openvino":
        if config.graphs is not None:
            raise ConfigError(
                f"handler.graphs belongs to pt2.backend: openvino, not to {compilation.backend or 'eager PyTorch'}"
            )
        return None
    from openvino_backend import Options

    graphs, sizes = config.graphs or ("static" if len(config.read_sizes()) == 1 else "dynamic"), config.read_sizes()
    limit = Options.parse(compilation.options).max_graphs
    if graphs == "static" and len(sizes) > limit:
        raise ConfigError(
            f"handler.allowed_sizes names {len(sizes)} sizes, and with graphs: static each needs a graph. But "
            f"max_graphs in pt2.options is {limit}: raise it, or use graphs: dynamic"
        )
    return graphs


def compute_half_cost(config: HandlerConfig, graphs: str | None, *, batch: int) -> float:
    """Return the cost of a UNet call without guidance, compared with a whole call.

    Args:
        graphs: see `choose_graphs`. Static graphs for guidance have no smaller batch, see FixedBatch.
        batch: the UNet's batch for a default request.
    """
    return 1.0 if graphs == "static" and config.compile_unet and batch > 1 else 0.5


def list_components_to_compile(family: Family, config: HandlerConfig) -> list[str]:
    """Return the components that the configuration compiles."""
    wanted = {
        "unet": config.compile_unet,
        "vae": config.compile_vae,
        VAE_ENCODER: config.compile_vae,
        **dict.fromkeys(family.text_encoders, config.compile_text_encoders),
        SAFETY_CHECKER: config.safety_checker is not None,
        UPSCALER: config.upscaler_path is not None,
    }
    return [name for name, is_wanted in wanted.items() if is_wanted]


def compile_components(
    pipeline: Any,
    family: Family,
    config: HandlerConfig,
    compilation: CompileConfig,
    *,
    contract: Contract,
    ranks: Mapping[str, Mapping[str, int]],
    controls: Sequence[Control] = (),
    upscaler: Upscaler | None = None,
) -> tuple[Mapping[str, Callable[..., Any]], Mapping[str, Any]]:
    """Compile the UNet, the VAE's encoder and decoder, the text encoders and the optional components.

    Lossless: each component computes the same, in the type of its weights.

    Args:
        contract: has the size and the batch of a default request.
        ranks: of the layers that requests can change, by component; see `compute_ranks`.

    Returns:
        `functions` and `parts` of LoadedPipeline.

    Raises:
        ConfigError: the machine lacks what the backend needs.
    """
    import torch

    if compilation.backend == "inductor":
        check_cpp_compiler()
    # Otherwise dynamo only warns at its limit of recompilations, and continues in eager PyTorch.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    graphs, batch = choose_graphs(config, compilation), contract.batch
    of_controls = {name: each for control in controls for name, each in control.list_components().items()}
    shapes = _list_static_shapes(pipeline, family, config, contract) if graphs == "both" else {}
    if graphs in ("dynamic", "both"):
        # With this many upsamplers the up blocks take their sizes from the down blocks, as a graph of any size must.
        pipeline.unet.num_upsamplers = 30
    decode, encode = choose_vae_methods(pipeline.vae)
    methods = {
        "unet": pipeline.unet.forward,
        "vae": decode,
        VAE_ENCODER: encode,
        **{name: getattr(pipeline, name).forward for name in family.text_encoders},
        **{name: each.method for name, each in of_controls.items()},
    }
    free = {**DYNAMIC_SHAPES, **{name: each.free for name, each in of_controls.items()}}
    if config.safety_checker is not None:
        methods[SAFETY_CHECKER] = pipeline.safety_checker.vision_model.forward
    if upscaler is not None:
        methods[UPSCALER] = upscaler.module.forward
    wanted = [*list_components_to_compile(family, config), *(of_controls if config.compile_unet else ())]
    functions: dict[str, Callable[..., Any]] = {}
    backends: dict[str, Any] = {}
    for name, method in methods.items():
        functions[name] = method
        if compilation.backend is None or name not in wanted:
            continue
        if name in family.text_encoders:
            # Its first call installs hooks for the hidden states, behind a lock that dynamo cannot trace.
            module = getattr(pipeline, name)
            module(torch.zeros(1, 1, dtype=torch.long, device=module.device), output_hidden_states=True)
        functions[name] = compile_method(
            method,
            compilation,
            name=name,
            dynamic_shapes=None if graphs == "static" else free.get(name),
            static_shapes=[shapes[name]] if name in shapes else [],
            ranks=ranks.get(name),
        )
        backends[name] = functions[name].backend if compilation.backend == "openvino" else None  # type: ignore[attr-defined]
    if graphs == "static":
        batched = ["unet", *(name for name, each in of_controls.items() if each.is_batched)]
        functions |= {name: FixedBatch(functions[name], batch) for name in batched if name in backends}
    return functions, backends


def _list_static_shapes(
    pipeline: Any, family: Family, config: HandlerConfig, contract: Contract
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes of a default request's arguments, by component."""
    height, width = (side // pipeline.vae_scale_factor for side in reversed(contract.size))
    tiles = plan_tiles(height, width, compute_tile_side(config, pipeline.vae_scale_factor))
    tile = (height, width) if tiles is None else (tiles[0].size, tiles[1].size)
    text_width = sum(getattr(pipeline, each).config.hidden_size for each in family.text_encoders)
    return {
        "unet": {
            "sample": (contract.batch, pipeline.unet.config.in_channels, height, width),
            # The graph for any size serves prompts of several chunks.
            "encoder_hidden_states": (contract.batch, pipeline.tokenizer.model_max_length, text_width),
        },
        "vae": {"z": (1, pipeline.vae.config.latent_channels, *tile)},
        VAE_ENCODER: {"x": (1, pipeline.vae.config.in_channels, *reversed(contract.size))},
    }


class FixedBatch:
    """A UNet or ControlNet whose graphs have one batch size. More rows run one batch after another.

    Missing rows are repeated.

    Args:
        run: its function.
        batch: the rows of its graphs.
    """

    def __init__(self, run: Callable[..., Any], batch: int) -> None:
        self._run, self._batch = run, batch

    def bind(self, products: Mapping[str, Any]) -> "FixedBatch":
        """Return the UNet with low-rank matrices; see CompiledFunction."""
        return FixedBatch(self._run.bind(products), self._batch)  # type: ignore[attr-defined]

    def __call__(self, sample: Any, *args: Any, **kwargs: Any) -> Any:
        """Return what the function returns, for all rows."""
        import torch
        from torch.utils import _pytree as pytree

        rows = len(sample)
        if rows == self._batch:
            return self._run(sample, *args, **kwargs)
        outputs = []
        for start in range(0, rows, self._batch):
            index = [min(start + each, rows - 1) for each in range(self._batch)]

            def choose(value: Any, index: Sequence[int] = index) -> Any:
                if isinstance(value, Mapping):
                    return {name: choose(each) for name, each in value.items()}
                if isinstance(value, list):
                    return [choose(each) for each in value]
                is_row = isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == rows
                return value[index] if is_row else value

            outputs.append(self._run(sample[index], *map(choose, args), **choose(kwargs)))
        return pytree.tree_map(lambda *each: torch.cat(each)[:rows], *outputs)


class TorchFunction:
    """A method that torch.compile compiles at its first call. It fails where the backend has compiled nothing.

    Args:
        name: the method's name in messages.

    Attributes:
        graphs: the number of graphs that the backend runs.
    """

    def __init__(self, method: Callable[..., Any], compilation: CompileConfig, *, name: str) -> None:
        import torch

        self.graphs, self._backend, self._name = 0, str(compilation.backend), name
        self._run = torch.compile(
            method,
            backend=BACKENDS[self._backend],
            # Otherwise dynamo runs in eager PyTorch what it cannot compile.
            fullgraph=compilation.fullgraph is not False,
            dynamic=compilation.dynamic,
            mode=compilation.mode,
            options=None if compilation.options is None else dict(compilation.options),
            isolate_recompiles=True,  # otherwise two modules of a class may share a graph, and one of them counts none
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the method returns.

        Raises:
            ConfigError: the backend has compiled nothing, or not the whole method.
        """
        import torch

        graphs, in_pytorch = count_graphs(self._backend)
        try:
            result = self._run(*args, **kwargs)
        except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError) as error:
            raise ConfigError(
                f"pt2.backend: {self._backend} cannot compile {self._name} as one graph: {str(error).splitlines()[0]}. "
                "pt2.fullgraph: false runs what is between graphs in eager PyTorch, and reports graph_breaks"
            ) from error
        except Exception as error:
            error.add_note(f"while {self._backend} compiled or ran {self._name}")
            raise
        graphs_after, in_pytorch_after = count_graphs(self._backend)
        self.graphs += graphs_after - graphs
        if not self.graphs or in_pytorch_after > in_pytorch:
            raise ConfigError(
                f"pt2.backend: {self._backend} did not compile {self._name}: eager PyTorch ran it, or a part of it"
            )
        return result


def count_graphs(backend: str) -> tuple[int, int]:
    """Return how many graphs a backend of torch.compile runs in this process, and what it left to eager PyTorch.

    Returns:
        The number of its graphs, and the number of graphs and operators in eager PyTorch.
    """
    import torch

    if backend == "openvino_stock":
        from openvino.frontend.pytorch.torchdynamo import execute

        graphs = execute.partitioned_modules.values()
        fallen = sum(getattr(part, "perm_fallback", False) for graph in graphs for part in graph.children())
        outside = sum(
            node.op == "call_function" and node.target is not operator.getitem
            for graph in graphs
            for node in graph.graph.nodes
        )
        return len(execute.compiled_cache), fallen + outside
    counters = torch._dynamo.utils.counters
    # Inductor compiles a graph also where it makes no graph of CUDA's of it.
    skipped = counters["inductor"]["cudagraph_skips"] if backend == "cudagraphs" else 0
    return counters["stats"]["unique_graphs"], skipped


def compile_method(
    method: Any,
    compilation: CompileConfig,
    *,
    name: str = "the method",
    dynamic_shapes: Mapping[str, Any] | None = None,
    static_shapes: Sequence[Mapping[str, Any]] = (),
    ranks: Mapping[str, int] | None = None,
) -> Any:
    """Return a module's method, compiled as configured.

    Args:
        name: the method's name in messages.
        dynamic_shapes, static_shapes, ranks: for OpenVINO; see CompiledFunction.
    """
    if compilation.backend != "openvino":
        return TorchFunction(method, compilation, name=name)
    from openvino_backend import CompiledFunction

    return CompiledFunction(
        method,
        {"release_weights": True, **(compilation.options or {})},
        dynamic_shapes=dynamic_shapes,
        static_shapes=static_shapes,
        ranks=ranks,
        name=name,
    )


def check_cpp_compiler() -> None:
    """Refuse Inductor on a machine without a C++ compiler.

    Raises:
        ConfigError: names the ways out.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError(
            "pt2.backend: inductor needs a C++ compiler, and there is none. Install g++, name a compiler in the "
            "environment variable CXX, or use the openvino backend"
        ) from error
