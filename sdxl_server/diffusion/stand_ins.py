"""Stand-ins: modules of one image that diffusers gets instead of the shared models.

Each has what diffusers reads of a model. What one request asks for stays in its own objects.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sdxl_server.errors import NotFiniteError
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.model.tiling import decode_tiles, plan_tiles
from sdxl_server.model.vaes import is_tiny, wrap_encoded

Functions = Mapping[str, Callable[..., Any]]


def check_finite(values: Any, what: str) -> None:
    """Refuse a tensor with a number that is NaN or infinite; it costs a thousandth of what makes the tensor.

    Raises:
        NotFiniteError: says what the tensor is.
    """
    if not torch.isfinite(values).all():
        raise NotFiniteError(f"{what} holds numbers that are not finite")


class Part(torch.nn.Module):
    """What diffusers reads of a model: its configuration, its type, its device."""

    reads: tuple[str, ...] = ("config", "dtype", "device")

    def __init__(self, model: Any) -> None:
        super().__init__()
        for name in self.reads:
            if hasattr(model, name):
                setattr(self, name, getattr(model, name))


class Autoencoder(Part):
    """The VAE of one picture.

    Args:
        tile_side: of the largest square that is decoded whole, in cells of latents; None where everything is.
    """

    reads = (*Part.reads, "post_quant_conv")

    def __init__(self, model: Any, functions: Functions, *, tile_side: int | None) -> None:
        super().__init__(model)
        self._decode, self._encode, self._tile_side = functions["vae"], functions["vae_encoder"], tile_side
        self._is_tiny = is_tiny(model)

    def decode(self, latents: Any, return_dict: bool = True, generator: Any = None) -> Any:
        """Return the pixels of latents in a tuple, whatever `return_dict`; the decoder has no use for a generator."""
        height, width = latents.shape[2:]
        latents, tiles = latents.to(self.dtype), plan_tiles(height, width, self._tile_side)
        if tiles is None:
            decoded = self._decode(latents, return_dict=False)
        else:
            decoded = (decode_tiles(lambda tile: self._decode(tile, return_dict=False)[0], latents, tiles),)
        check_finite(decoded[0], "what the VAE decoded")
        return decoded

    def encode(self, pixels: Any) -> Any:
        """Return an image's latents, of the full VAE their distribution, as diffusers has them."""
        encoded = self._encode(pixels.to(self.dtype))
        check_finite(encoded, "what the VAE made of the image")
        return wrap_encoded(encoded, tiny=self._is_tiny)


class TextEncoder(Part):
    """A text encoder of one picture."""

    def __init__(self, model: Any, run: Callable[..., Any]) -> None:
        super().__init__(model)
        # Of Stable Diffusion 1.x and 2.x with clip_skip diffusers takes the last normalisation from there.
        self.text_model = getattr(model, "text_model", model)  # transformers 5 has it in the model itself
        self._run = run

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Call the shared text encoder."""
        return self._run(*inputs, **options)


def fork_vae(loaded: LoadedPipeline) -> Autoencoder:
    """Return the VAE of one image."""
    return Autoencoder(loaded.pipeline.vae, loaded.functions, tile_side=loaded.tile_side)
