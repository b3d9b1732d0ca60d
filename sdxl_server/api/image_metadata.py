"""The metadata of an image, enough to generate it again."""

from collections.abc import Sequence
from typing import Any

from sdxl_server import __version__
from sdxl_server.model.describe import describe_arithmetic, describe_vae, list_applied_adapters, list_applied_controls
from sdxl_server.model.embeddings import list_used_embeddings
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.model.tiling import describe_tiles
from sdxl_server.request.fields import GenerationRequest
from sdxl_server.request.upscaling import LANCZOS


def describe_image(
    loaded: LoadedPipeline, request: GenerationRequest, index: int, *, unet_calls: float, warnings: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the metadata of image `index`: the request's fields, warnings, and the model with its versions."""
    import diffusers
    import openvino
    import torch

    arithmetic = describe_arithmetic(loaded)
    made_by = {
        "backend": loaded.compilation.backend or "eager",
        **({} if arithmetic is None else {"arithmetic": arithmetic, "graphs_for": loaded.graphs}),
        "versions": {
            "sdxl_server": __version__,
            "diffusers": diffusers.__version__,
            "torch": torch.__version__,
            "openvino": openvino.__version__,
        },
    }
    upscaler = loaded.upscaler if request.list_enlargements(0) else None
    made_by = {**({} if upscaler is None else {"upscaler": upscaler.describe()}), **made_by}
    about = {"request": request.describe(index), **({"warnings": list(warnings)} if warnings else {})}
    if not request.is_drawn:
        return {**about, "made_with": made_by}
    return {
        **about,
        "made_with": {
            "model": loaded.config.model_path,
            **loaded.original,
            "is_xl": loaded.family.is_xl,
            "weights_sha256": loaded.weights_sha256,
            **({"adapters": applied} if (applied := list_applied_adapters(loaded, request)) else {}),
            **({"embeddings": used} if (used := list_used_embeddings(request, loaded.embeddings)) else {}),
            **({"controls": controls} if (controls := list_applied_controls(loaded, request)) else {}),
            **({"vae": vae} if (vae := describe_vae(loaded))["path"] or vae["lossy"] else {}),
            **({"weighted_prompts": True} if loaded.config.weighted_prompts else {}),
            **({"vae_tiles": tiles} if (tiles := describe_tiles(request.list_passes()[-1], loaded.config)) else {}),
            **({"hires_upscaler": LANCZOS if upscaler is None else upscaler.title} if request.hires else {}),
            "dtype": loaded.dtype,
            "unet_calls": unet_calls,
            **made_by,
        },
    }
