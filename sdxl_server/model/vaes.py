"""The kinds of VAE, the full one and the tiny one (TAESD, lossy), and one from a folder of its own."""

import json
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

from sdxl_server.errors import ConfigError
from sdxl_server.model.folders import name_variant, read_json
from sdxl_server.schemas import shorten

FULL, TINY = "AutoencoderKL", "AutoencoderTiny"  # diffusers' classes
LEAST_APART = 1e-4  # of the scaling factors of two kinds of models: 0.13025 for SDXL, 0.18215 for 1.x and 2.x


def is_tiny(vae: Any) -> bool:
    """Say whether a VAE is a tiny one, whose pictures lack fine detail."""
    return type(vae).__name__ == TINY


def find_methods(vae: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return what decodes latents, to pixels in a tuple, and what encodes pixels.

    The full one's encoder returns the moments of latents, the tiny one's the latents themselves.
    """
    if is_tiny(vae):
        return MethodType(_decode_tiny, vae), MethodType(_encode_tiny, vae)
    return vae._decode, vae._encode


def _decode_tiny(self: Any, z: Any, return_dict: bool = False) -> Any:
    return (self.decoder(z),)


def _encode_tiny(self: Any, x: Any) -> Any:
    return self.encoder(x)


def wrap_encoded(encoded: Any, *, tiny: bool) -> Any:
    """Return what diffusers' own `encode` would, of what an encoder of `find_methods` returned."""
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput

    if tiny:
        return AutoencoderTinyOutput(latents=encoded)
    return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(encoded))


def read_class(folder: Path) -> str:
    """Return which of the two kinds of VAE a folder holds.

    Raises:
        ConfigError: it holds none.
    """
    try:
        held = json.loads((folder / "config.json").read_text()).get("_class_name")
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise ConfigError(
            f"handler.vae_path takes the folder of a VAE as diffusers has it, but {folder} has no readable "
            f"config.json; python Download_model.py --vae makes one ({error})"
        ) from error
    if held not in (FULL, TINY):
        raise ConfigError(
            f"handler.vae_path takes the folder of an {FULL} or {TINY}, but {folder} holds {shorten(held)}"
        )
    return str(held)


def read_vae(folder: Path, dtype: Any) -> Any:
    """Read a VAE from a folder of its own, from safetensors.

    Args:
        dtype: torch's type of its weights.

    Raises:
        ConfigError: there is none.
    """
    import diffusers

    kind = getattr(diffusers, read_class(folder))
    variant = name_variant(folder.glob("diffusion_pytorch_model*.safetensors"))
    return kind.from_pretrained(folder, dtype=dtype, variant=variant, use_safetensors=True, local_files_only=True)


def check_vae(vae: Any, *, channels: int, own: Path) -> None:
    """Refuse a VAE that is another kind of model's.

    Args:
        channels: of the latents that the UNet makes.
        own: the folder of the model's own VAE.

    Raises:
        ConfigError: says what does not fit.
    """
    if type(vae).__name__ not in (FULL, TINY):
        raise ConfigError(f"handler.model_path takes a pipeline with an {FULL} or {TINY}, not {type(vae).__name__}")
    found = vae.config.latent_channels
    if found != channels:
        raise ConfigError(f"handler.vae_path takes a VAE of {channels} latent channels for this model, not {found}")
    settings = read_json(own / "config.json")
    of_model = settings.get("scaling_factor") if settings.get("_class_name") == FULL else None
    if of_model and not is_tiny(vae) and abs(vae.config.scaling_factor - of_model) > LEAST_APART:
        raise ConfigError(
            f"handler.vae_path takes a VAE of this kind of model, of scaling factor {of_model:g} (0.13025: Stable "
            f"Diffusion XL; 0.18215: 1.x and 2.x), not {vae.config.scaling_factor:g}"
        )
