"""Loading a pipeline: check → read → build the contract → compile → warm up."""

from pathlib import Path

from sdxl_server.config.settings import CompileConfig, HandlerConfig
from sdxl_server.diffusion.warm_up import warm_up
from sdxl_server.errors import ConfigError
from sdxl_server.model.adapters.registry import find_ranks, load_adapters
from sdxl_server.model.compiling import choose_graphs, compile_parts, list_parts
from sdxl_server.model.contract_builder import build_contract
from sdxl_server.model.families import find_family
from sdxl_server.model.folders import check_texts, check_whole, write_copy, write_remedy
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.model.reading import blame, check_device, check_files, choose_dtype, read_pipeline


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
