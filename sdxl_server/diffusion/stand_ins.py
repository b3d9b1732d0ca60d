"""Stand-ins: modules of one image that diffusers gets instead of the shared models.

Each has the attributes that diffusers reads from a model. A request's settings stay in its own objects.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sdxl_server.errors import NotFiniteError
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.model.tiling import decode_tiles, plan_tiles
from sdxl_server.model.vaes import is_tiny_vae, wrap_vae_output

Functions = Mapping[str, Callable[..., Any]]


def check_finite(values: Any, what: str) -> None:
    """Refuse a tensor with NaN or infinity. This takes a thousandth of the time that computes the tensor.

    Args:
        what: the tensor's name in the message.

    Raises:
        NotFiniteError: names the tensor.
    """
    if not torch.isfinite(values).all():
        raise NotFiniteError(f"{what} holds numbers that are not finite")


class StandIn(torch.nn.Module):
    """A module with the attributes that diffusers reads from a model."""

    reads: tuple[str, ...] = ("config", "dtype", "device")

    def __init__(self, model: Any) -> None:
        super().__init__()
        for name in self.reads:
            if hasattr(model, name):
                setattr(self, name, getattr(model, name))


class VAEStandIn(StandIn):
    """The VAE of one image.

    Args:
        tile_side: the largest square that is decoded in one piece, in latent cells; None for no limit.
    """

    reads = (*StandIn.reads, "post_quant_conv")

    def __init__(self, model: Any, functions: Functions, *, tile_side: int | None) -> None:
        super().__init__(model)
        self._decode, self._encode, self._tile_side = functions["vae"], functions["vae_encoder"], tile_side
        self._is_tiny = is_tiny_vae(model)

    def decode(self, latents: Any, return_dict: bool = True, generator: Any = None) -> Any:
        """Return the pixels of latents in a tuple. The decoder ignores `return_dict` and `generator`."""
        height, width = latents.shape[2:]
        latents, tiles = latents.to(self.dtype), plan_tiles(height, width, self._tile_side)
        if tiles is None:
            decoded = self._decode(latents, return_dict=False)
        else:
            decoded = (decode_tiles(lambda tile: self._decode(tile, return_dict=False)[0], latents, tiles),)
        check_finite(decoded[0], "the VAE's decoded image")
        return decoded

    def encode(self, pixels: Any) -> Any:
        """Return an image's latents in diffusers' form: a distribution for the full VAE."""
        encoded = self._encode(pixels.to(self.dtype))
        check_finite(encoded, "the VAE's encoding of the image")
        return wrap_vae_output(encoded, tiny=self._is_tiny)


class TextEncoderStandIn(StandIn):
    """A text encoder of one image."""

    def __init__(self, model: Any, run: Callable[..., Any]) -> None:
        super().__init__(model)
        # diffusers reads the last normalisation here for Stable Diffusion 1.x and 2.x with clip_skip.
        self.text_model = getattr(model, "text_model", model)  # in transformers 5 the model itself
        self._run = run

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Call the shared text encoder."""
        return self._run(*inputs, **options)


def build_vae(loaded: LoadedPipeline) -> VAEStandIn:
    """Return the VAE of one image."""
    return VAEStandIn(loaded.pipeline.vae, loaded.functions, tile_side=loaded.tile_side)
