"""The two kinds of VAE, full and tiny (TAESD, lossy), also from a folder of their own."""

import json
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

from sdxl_server.errors import ConfigError
from sdxl_server.model.folders import (
    check_component,
    check_links,
    load_json_object,
    load_weights,
    write_redownload_command,
)
from sdxl_server.schemas import shorten

FULL_VAE, TINY_VAE = "AutoencoderKL", "AutoencoderTiny"  # diffusers' classes
MIN_SCALING_DIFFERENCE = 1e-4  # between kinds of models: 0.13025 for SDXL, 0.18215 for 1.x and 2.x


def is_tiny_vae(vae: Any) -> bool:
    """Say whether a VAE is a tiny one. Its images lack fine detail."""
    return type(vae).__name__ == TINY_VAE


def choose_vae_methods(vae: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the method that decodes latents and the one that encodes pixels.

    The decoder returns a tuple. The full encoder returns the moments of the latents, the tiny one the latents.
    """
    if is_tiny_vae(vae):
        return MethodType(_decode_tiny, vae), MethodType(_encode_tiny, vae)
    return vae._decode, vae._encode


def _decode_tiny(self: Any, z: Any, return_dict: bool = False) -> Any:
    return (self.decoder(z),)


def _encode_tiny(self: Any, x: Any) -> Any:
    return self.encoder(x)


def wrap_vae_output(encoded: Any, *, tiny: bool) -> Any:
    """Return an encoder's result as diffusers' own `encode` does; see `choose_vae_methods`."""
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    from diffusers.models.modeling_outputs import AutoencoderKLOutput

    if tiny:
        return AutoencoderTinyOutput(latents=encoded)
    return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(encoded))


def read_vae_class(folder: Path) -> str:
    """Return the class name of a folder's VAE.

    Raises:
        ConfigError: the folder holds none of the two kinds.
    """
    check_links([folder, folder / "config.json"])
    try:
        held = json.loads((folder / "config.json").read_text()).get("_class_name")
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        if (folder / "vae/config.json").is_file():
            raise ConfigError(f"handler.vae_path takes the folder of a VAE, and it is in {folder / 'vae'}") from error
        raise ConfigError(
            f"handler.vae_path takes the folder of a VAE in diffusers' layout, but {folder} has no readable "
            f"config.json; python Download_model.py --vae downloads one ({error})"
        ) from error
    if held not in (FULL_VAE, TINY_VAE):
        raise ConfigError(
            f"handler.vae_path takes the folder of an {FULL_VAE} or {TINY_VAE}, but {folder} holds {shorten(held)}"
        )
    return str(held)


def load_vae(folder: Path, dtype: Any) -> Any:
    """Load a VAE from a folder of its own, from safetensors.

    Args:
        dtype: torch's type for its weights.

    Raises:
        ConfigError: the folder holds no VAE, or only one that could run code when it is loaded.
    """
    import diffusers

    kind = getattr(diffusers, read_vae_class(folder))
    check_component(folder, remedy=write_redownload_command(folder, option="--vae"))
    return load_weights(kind, folder, dtype)


def check_vae(vae: Any, *, channels: int, own: Path) -> None:
    """Refuse a VAE that belongs to another kind of model.

    Args:
        channels: the UNet's output channels.
        own: the folder of the model's own VAE.

    Raises:
        ConfigError: names what does not fit.
    """
    if type(vae).__name__ not in (FULL_VAE, TINY_VAE):
        raise ConfigError(
            f"handler.model_path takes a pipeline with an {FULL_VAE} or {TINY_VAE}, not {type(vae).__name__}"
        )
    found = vae.config.latent_channels
    if found != channels:
        raise ConfigError(f"handler.vae_path takes a VAE of {channels} latent channels for this model, not {found}")
    settings = load_json_object(own / "config.json")
    expected = settings.get("scaling_factor") if settings.get("_class_name") == FULL_VAE else None
    if expected and not is_tiny_vae(vae) and abs(vae.config.scaling_factor - expected) > MIN_SCALING_DIFFERENCE:
        raise ConfigError(
            f"handler.vae_path takes a VAE for this kind of model, with scaling factor {expected:g} (0.13025: Stable "
            f"Diffusion XL; 0.18215: 1.x and 2.x), not {vae.config.scaling_factor:g}"
        )
