"""Load a diffusers pipeline from its folder."""

from pathlib import Path
from typing import Any

from sdxl_server.model.families import Family
from sdxl_server.model.folders import find_variant
from sdxl_server.model.vaes import check_vae, load_vae


def load_diffusers_pipeline(folder: Path, dtype: str, family: Family, *, vae: Path | None = None) -> Any:
    """Load the pipeline from its safetensors. Nothing is downloaded, and no code of the folder runs.

    Args:
        vae: the folder of a VAE that replaces the pipeline's own.

    Raises:
        ConfigError: the VAE belongs to another model.
        Exception: a component is missing or broken. Each library has classes of its own for that.
    """
    import diffusers
    import torch
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    # Pipelines warn of each long prompt. The client gets that warning already, and the log has the prompt.
    diffusers.utils.logging.get_logger("diffusers.pipelines").setLevel("ERROR")
    transformers.utils.logging.disable_progress_bar()
    # SDXL's VAE overflows in float16. diffusers would convert it there and back for each image.
    vae_dtype = torch.float32 if dtype == "float16" else getattr(torch, dtype)
    dtypes = {"default": getattr(torch, dtype), "vae": vae_dtype}
    _fix_class_order()
    pipeline = getattr(diffusers, family.text_to_image).from_pretrained(
        folder,
        dtype=dtypes,
        variant=find_variant(folder),
        use_safetensors=True,
        local_files_only=True,
        **({} if vae is None else {"vae": load_vae(vae, vae_dtype)}),
    )
    check_vae(pipeline.vae, channels=pipeline.unet.config.out_channels, own=folder / "vae")
    pipeline.set_progress_bar_config(disable=True)
    # Otherwise diffusers converts the VAE to float32 for each image that it encodes.
    pipeline.vae.register_to_config(force_upcast=False)
    return pipeline


def _fix_class_order() -> None:
    """Build each class of text encoder once, in a fixed order; diffusers' order differs between processes.

    transformers keeps a list of the classes that it has built, and torch's guards check its order.
    """
    import torch
    import transformers

    with torch.device("meta"):
        for kind in (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection):
            kind(transformers.CLIPTextConfig(num_hidden_layers=1))
