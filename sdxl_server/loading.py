"""Load a pipeline: check the folder, read it, build the contract, compile, warm up."""

import contextlib
import errno
import re
from collections.abc import Iterator
from pathlib import Path

from sdxl_server.config.compile_settings import CompileConfig
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.diffusion.warm_up import warm_up
from sdxl_server.errors import ConfigError
from sdxl_server.model.adapters.registry import compute_ranks, load_adapters
from sdxl_server.model.compiling import choose_graphs, compile_components, list_components_to_compile
from sdxl_server.model.contract_builder import build_contract
from sdxl_server.model.controls.registry import load_controls
from sdxl_server.model.diffusers_pipeline import load_diffusers_pipeline
from sdxl_server.model.dtypes import check_device, choose_dtype
from sdxl_server.model.embeddings import load_embeddings
from sdxl_server.model.families import find_family
from sdxl_server.model.folders import (
    check_components,
    check_tokenizers,
    describe_original,
    write_redownload_command,
)
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.model.safety_checker import check_has_safety_checker
from sdxl_server.model.sources import check_has_pipeline
from sdxl_server.model.upscaler import load_upscaler
from sdxl_server.schemas import shorten

_OUT_OF_MEMORY = re.compile(r"out of memory|not enough memory|can(?:'t|not) allocate memory|bad.alloc", re.IGNORECASE)


def load_pipeline(
    config: HandlerConfig, compilation: CompileConfig, *, model_dir: Path, device: str = "cpu"
) -> LoadedPipeline:
    """Load the model, compile its components and warm them up, so that no client waits for compilation.

    Args:
        model_dir: the archive's folder; a relative model_path is looked up there.
        device: torch's device.

    Raises:
        ConfigError: the configuration does not fit the model or the machine.
    """
    folder = model_dir / config.model_path
    check_has_pipeline(config.model_path, model_dir)
    family = find_family(folder, is_xl=config.is_xl)
    vae = None if config.vae_path is None else model_dir / config.vae_path
    has_safety_checker = config.safety_checker is not None
    check_device(compilation, device=device)
    graphs = choose_graphs(config, compilation)
    dtype, compilation = choose_dtype(config, compilation, device=device)
    remedy = write_redownload_command(folder)
    with reraise_as_config_error(f"cannot read the pipeline in {folder} (download it again: {remedy})"):
        check_components(folder, [name for name in family.components if name != "vae" or vae is None])
        if has_safety_checker:
            check_has_safety_checker(folder, family)
        pipeline = load_diffusers_pipeline(folder, dtype, family, vae=vae, has_safety_checker=has_safety_checker)
        check_tokenizers(pipeline, family.text_encoders, folder)
        if device != "cpu":
            pipeline.to(device)
        compiled = list_components_to_compile(family, config) if compilation.backend == "openvino" else []
        adapters = load_adapters(pipeline, family, config, model_dir=model_dir, compiled=compiled)
        embeddings = load_embeddings(pipeline, family, config, model_dir=model_dir)
        controls = load_controls(pipeline, family, config, dtype, model_dir=model_dir)
        upscaler = load_upscaler(pipeline, config, dtype, model_dir=model_dir)
        contract = build_contract(
            *(pipeline, family, config),
            graphs=graphs,
            adapters=adapters,
            embeddings=embeddings,
            controls=controls,
            upscaler=upscaler,
        )
    with reraise_as_config_error("the warm-up failed" if config.warm_up else "the model cannot be made ready"):
        functions, parts = compile_components(
            pipeline,
            family,
            config,
            compilation,
            contract=contract,
            ranks=compute_ranks(adapters, config),
            controls=controls,
            upscaler=upscaler,
        )
        loaded = LoadedPipeline(
            *(pipeline, config, compilation, dtype, graphs, family, functions, parts, contract, adapters),
            embeddings=embeddings,
            controls=controls,
            upscaler=upscaler,
            original=describe_original(folder),
        )
        if config.warm_up:
            warm_up(loaded)
    if config.weights_sha256 is not None and config.weights_sha256 != loaded.weights_sha256:
        raise ConfigError(
            f"handler.weights_sha256 takes the digest of the weights in {folder} as {dtype}, "
            f"{loaded.weights_sha256}, not {config.weights_sha256!r}. The weights or the dtype are unexpected"
        )
    return loaded


@contextlib.contextmanager
def reraise_as_config_error(start: str) -> Iterator[None]:
    """Turn any error of a block into a ConfigError. Each library raises classes of its own.

    Args:
        start: how the message begins, unless a compiled component failed or the machine lacks something.

    Raises:
        ConfigError: also the block's own ConfigError, unchanged.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        # The compiled functions add what they did.
        doing = next((f" {note}" for note in getattr(error, "__notes__", ()) if note.startswith("while ")), "")
        lack, remedy = _find_lack(error)
        if lack:
            start = f"{lack}{doing}. {remedy}"
        elif doing:
            start = f"pt2 failed{doing}"
        reason = shorten(" ".join(str(error).split()), length=600)
        raise ConfigError(f"{start}: {type(error).__name__}: {reason}") from error


def _find_lack(error: BaseException) -> tuple[str, str]:
    """Return what the machine lacked if that caused an error, and the remedy."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError) or _OUT_OF_MEMORY.search(str(cause)):
            return "out of memory", "Use a larger machine, smaller sizes, or graphs: dynamic"
        if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(cause):
            return "a disk is full", "Free space on it, or change cache_dir (openvino) or TORCHINDUCTOR_CACHE_DIR"
        cause = cause.__cause__ or cause.__context__
    return "", ""
