"""Load a diffusers pipeline from its folder."""

import inspect
from pathlib import Path
from typing import Any

from sdxl_server.model.families import Family
from sdxl_server.model.folders import load_json_object, load_weights
from sdxl_server.model.safety_checker import load_safety_checker
from sdxl_server.model.vaes import check_vae, load_vae

# Arguments of pipelines for components that are not loaded. diffusers would load them, too.
WITHOUT_EXTRAS = {
    "image_encoder": None,
    "feature_extractor": None,
    "safety_checker": None,
    "requires_safety_checker": False,
}


def load_diffusers_pipeline(
    folder: Path, dtype: str, family: Family, *, vae: Path | None = None, has_safety_checker: bool = False
) -> Any:
    """Load the family's components from their safetensors. Nothing is downloaded, and no code of the folder runs.

    Args:
        vae: the folder of a VAE that replaces the pipeline's own.
        has_safety_checker: load the safety checker, too.

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
    kind, index = getattr(diffusers, family.text_to_image), load_json_object(folder / "model_index.json")
    libraries, own_dtype = {"diffusers": diffusers, "transformers": transformers}, getattr(torch, dtype)
    # SDXL's VAE overflows in float16. diffusers would convert it there and back for each image.
    vae_dtype = torch.float32 if dtype == "float16" else own_dtype
    models = {} if vae is None else {"vae": load_vae(vae, vae_dtype)}
    for name in family.models:
        if name not in models:
            library, held = index[name]
            models[name] = load_weights(
                getattr(libraries[library], held), folder / name, vae_dtype if name == "vae" else own_dtype
            )
    accepted = inspect.signature(kind.__init__).parameters
    extras = {name: value for name, value in WITHOUT_EXTRAS.items() if name in accepted}
    pipeline = kind.from_pretrained(folder, local_files_only=True, **models, **extras)
    if has_safety_checker:
        pipeline.register_modules(**load_safety_checker(folder, own_dtype))
    check_vae(pipeline.vae, channels=pipeline.unet.config.out_channels, own=folder / "vae")
    pipeline.set_progress_bar_config(disable=True)
    # Otherwise diffusers converts the VAE to float32 for each image that it encodes.
    pipeline.vae.register_to_config(force_upcast=False)
    return pipeline
