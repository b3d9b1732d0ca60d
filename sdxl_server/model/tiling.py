"""Decode or upscale in overlapping tiles, which limits the memory. Lossy: each tile is computed on its own.

All tiles of an image have one size, so that one graph computes them. They are blended over their overlap as in
diffusers. The last tile of a row or column is moved back to full size; in diffusers it is narrower.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sdxl_server.config.settings import HandlerConfig
from sdxl_server.request.fields import GenerationRequest

logger = logging.getLogger(__name__)

OVERLAP_DIVISOR = 4  # two tiles overlap by a fourth of their side, as in diffusers


@dataclass(frozen=True)
class TileAxis:
    """The tiles of an image along one axis, in latent cells or pixels.

    Attributes:
        size: the length of each tile.
        starts: where each tile begins.
        overlap: the length over which two are blended.
    """

    size: int
    starts: tuple[int, ...]
    overlap: int

    def compute_weights(self, block: int) -> Any:
        """Return the weight of each tile at each pixel; shape: tiles, pixels.

        Args:
            block: pixels of a cell in the result.
        """
        size, overlap = self.size * block, self.overlap * block
        weights = torch.zeros(len(self.starts), self.starts[-1] * block + size)
        ramp = (torch.arange(size) / overlap).clamp(max=1)
        for index, start in enumerate(self.starts):
            covered = slice(start * block, start * block + size)
            share = ramp if index else torch.ones(size)
            weights[:, covered] *= 1 - share
            weights[index, covered] = share
        return weights


def plan_tiles(height: int, width: int, side: int | None) -> tuple[TileAxis, TileAxis] | None:
    """Return the tiles down and across, or None if the latents are decoded whole.

    Args:
        side: of a tile, and of the largest square that is decoded whole; None decodes all whole.
    """
    if side is None or height * width <= side * side:
        return None
    overlap = side // OVERLAP_DIVISOR
    return place_tiles(height, side, overlap), place_tiles(width, side, overlap)


def place_tiles(length: int, side: int, overlap: int) -> TileAxis:
    """Return the tiles along an axis of some length; one smaller tile if the length is below their side."""
    size = min(side, length)
    count = 1 + -(-(length - size) // (side - overlap))
    return TileAxis(size, tuple(min(index * (side - overlap), length - size) for index in range(count)), overlap)


def compute_tile_side(config: HandlerConfig, cell: int) -> int | None:
    """Return the side of a tile in latent cells; None if everything is decoded whole.

    Args:
        cell: its side in pixels.
    """
    return None if config.vae_tile_side is None else config.vae_tile_side // cell


def describe_tiles(request: GenerationRequest, config: HandlerConfig) -> dict[str, Any] | None:
    """Return an image's tiles for its metadata, in pixels; None if it is decoded whole."""
    tiles = plan_tiles(request.height, request.width, config.vae_tile_side)
    if tiles is None:
        return None
    down, across = tiles
    return {
        "count": len(down.starts) * len(across.starts),
        "width": across.size,
        "height": down.size,
        "overlap": down.overlap,
        "lossy": True,
    }


def decode_tiles(decode: Callable[[Any], Any], latents: Any, tiles: tuple[TileAxis, TileAxis]) -> Any:
    """Return the pixels of latents in float32.

    Args:
        decode: returns the pixels of one tile.
    """
    down, across = tiles
    logger.info(
        "The VAE decodes an image of %d × %d latents in %d tiles of %d × %d (handler.vae_tile_side): lossy",
        *reversed(latents.shape[2:]),
        len(down.starts) * len(across.starts),
        across.size,
        down.size,
    )
    *_, pixels = blend_tiles(decode, latents, tiles)
    return pixels


def blend_tiles(compute: Callable[[Any], Any], values: Any, tiles: tuple[TileAxis, TileAxis]) -> Iterator[Any]:
    """Yield the pixels in float32 after each tile. They are whole after the last one.

    Args:
        compute: returns the pixels of one tile of the values.
    """
    down, across = tiles
    pixels = None
    for row, top in enumerate(down.starts):
        for column, left in enumerate(across.starts):
            tile = compute(values[..., top : top + down.size, left : left + across.size].contiguous()).float()
            if pixels is None:
                block = tile.shape[-1] // across.size
                shares = [each.compute_weights(block).to(tile.device) for each in tiles]
                pixels = tile.new_zeros(*tile.shape[:2], *(each.shape[1] for each in shares))
            y, x = top * block, left * block
            place = (..., slice(y, y + tile.shape[-2]), slice(x, x + tile.shape[-1]))
            pixels[place] += tile * shares[0][row, place[1], None] * shares[1][column, place[2]]
            yield pixels
