"""Enlarge finished images by the upscaler, in tiles of one size."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdxl_server.diffusion.stand_ins import check_finite
from sdxl_server.model.tiling import blend_tiles
from sdxl_server.model.upscaler import TILE_SIDE, Upscaler, plan_upscaling_tiles


def upscale(upscaler: Upscaler, run: Callable[[Any], Any], image: Any, factor: int) -> Iterator[Any]:
    """Enlarge a Pillow image. Yield None after each tile but the last, and then the result.

    Passes follow until the factor is reached. A larger result is reduced by Lanczos.

    Args:
        run: the upscaler's function.

    Raises:
        NotFiniteError: the upscaler returned NaN or infinity.
    """
    weights = next(upscaler.module.parameters())

    def enlarge(tile: Any) -> Any:
        with torch.no_grad():  # only here: other requests run between two tiles
            return run(tile.to(weights.device, weights.dtype))

    wanted = (image.width * factor, image.height * factor)
    left = upscaler.count_tiles(image.size, factor)
    for width, height in upscaler.list_passes(image.size, factor):
        for result in blend_tiles(enlarge, _to_tensor(image), plan_upscaling_tiles((width, height))):
            pixels, left = result, left - 1
            if left:
                yield None
        check_finite(pixels, "the upscaler's result")
        image = _to_image(pixels[0, :, : height * upscaler.scale, : width * upscaler.scale])
    yield image if image.size == wanted else image.resize(wanted, Image.Resampling.LANCZOS)


def _to_tensor(image: Any) -> Any:
    """Return the pixels from 0 to 1: 1, 3, height, width. Sides below a tile's get copies of their last pixels."""
    pixels = torch.from_numpy(np.asarray(image).astype(np.float32) / 255).permute(2, 0, 1)[None]
    right, bottom = (max(TILE_SIDE - side, 0) for side in image.size)
    return torch.nn.functional.pad(pixels, (0, right, 0, bottom), mode="replicate")


def _to_image(pixels: Any) -> Any:
    """Return the Pillow image of pixels: 3, height, width; they are overwritten."""
    levels = pixels.clamp_(0, 1).mul_(255).round_().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())
