"""Decoding large latents in tiles that overlap, which bounds the memory. Lossy: no tile knows what is in the others.

All tiles of a picture have one size, so that one graph decodes them, and are blended where they overlap, as far as
diffusers does it. The last one of a row or column is moved back until it is whole, where diffusers has a narrow one.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sdxl_server.config.settings import HandlerConfig
from sdxl_server.request.fields import GenerationRequest

logger = logging.getLogger(__name__)

SHARE = 4  # two tiles are blended over one part in so many, as in diffusers


@dataclass(frozen=True)
class Axis:
    """Where the tiles of a picture lie along one axis, in cells of latents.

    Attributes:
        size: of each.
        starts: of each.
        overlap: over which two are blended.
    """

    size: int
    starts: tuple[int, ...]
    overlap: int

    def weigh(self, block: int) -> Any:
        """Return how much each tile counts in each pixel, of `block` a cell: tiles, pixels."""
        size, overlap = self.size * block, self.overlap * block
        weights = torch.zeros(len(self.starts), self.starts[-1] * block + size)
        ramp = (torch.arange(size) / overlap).clamp(max=1)
        for index, start in enumerate(self.starts):
            covered = slice(start * block, start * block + size)
            share = ramp if index else torch.ones(size)
            weights[:, covered] *= 1 - share
            weights[index, covered] = share
        return weights


def plan_tiles(height: int, width: int, side: int | None) -> tuple[Axis, Axis] | None:
    """Return the tiles of latents down and across, or None where they are decoded whole.

    Args:
        side: of a tile, and of the largest square that is decoded whole; None where everything is.
    """
    if side is None or height * width <= side * side:
        return None
    overlap = side // SHARE

    def place(length: int) -> Axis:
        size = min(side, length)
        count = 1 + -(-(length - size) // (side - overlap))
        return Axis(size, tuple(min(index * (side - overlap), length - size) for index in range(count)), overlap)

    return place(height), place(width)


def find_tile_side(config: HandlerConfig, cell: int) -> int | None:
    """Return the side of a tile in cells of latents, each of so many pixels; None where everything is decoded whole."""
    return None if config.vae_tile_side is None else config.vae_tile_side // cell


def describe_tiles(request: GenerationRequest, config: HandlerConfig) -> dict[str, Any] | None:
    """Return for a picture's metadata in which tiles it is decoded, in pixels; None where it is decoded whole."""
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


def decode_tiles(decode: Callable[[Any], Any], latents: Any, tiles: tuple[Axis, Axis]) -> Any:
    """Return the pixels of latents, in float32.

    Args:
        decode: returns the pixels of a tile.
    """
    down, across = tiles
    logger.info(
        "The VAE decodes a picture of %d × %d latents in %d tiles of %d × %d (handler.vae_tile_side): lossy",
        *reversed(latents.shape[2:]),
        len(down.starts) * len(across.starts),
        across.size,
        down.size,
    )
    pixels = None
    for row, top in enumerate(down.starts):
        for column, left in enumerate(across.starts):
            tile = decode(latents[..., top : top + down.size, left : left + across.size].contiguous()).float()
            if pixels is None:
                block = tile.shape[-1] // across.size
                shares = [each.weigh(block).to(tile.device) for each in tiles]
                pixels = tile.new_zeros(*tile.shape[:2], *(each.shape[1] for each in shares))
            y, x = top * block, left * block
            place = (..., slice(y, y + tile.shape[-2]), slice(x, x + tile.shape[-1]))
            pixels[place] += tile * shares[0][row, place[1], None] * shares[1][column, place[2]]
    return pixels
