"""Tiled decoding: compared with diffusers' own, reported, and without effect on small images."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdxl_server.api.image_metadata import describe_image
from sdxl_server.model.describe import describe_pipeline
from sdxl_server.model.tiling import decode_tiles, plan_tiles
from tests.unit.pipelines import load, make_picture

UNET_AND_TEXTS = {"compile_unet": False, "compile_text_encoders": False}


@pytest.mark.parametrize(
    ("size", "starts"),
    [
        ((128, 128), None),
        ((64, 256), None),  # takes no more memory than the square
        ((136, 128), ((0, 8), (0,))),
        ((192, 192), ((0, 64), (0, 64))),
        ((256, 256), ((0, 96, 128), (0, 96, 128))),
        ((64, 320), ((0,), (0, 96, 192))),
    ],
)
def test_tiles_are_whole_and_as_few_as_do(size: tuple[int, int], starts: Any) -> None:
    tiles = plan_tiles(*size, 128)
    assert (None if tiles is None else tuple(each.starts for each in tiles)) == starts
    for axis, length in zip(tiles or (), size, strict=False):
        assert axis.size == min(128, length)
        weights = axis.compute_weights(8)
        assert weights.shape == (len(axis.starts), 8 * length)
        assert torch.allclose(weights.sum(dim=0), torch.ones(8 * length))
        assert weights.min() >= 0
    assert plan_tiles(*size, None) is None


def test_tiles_are_blended_as_diffusers_does(tiny_model: Path) -> None:
    """They differ where rows and columns meet, which diffusers blends twice, and at its narrow last tiles."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tiny_model / "vae")
    vae.tile_sample_min_size, vae.tile_latent_min_size = 64, 8
    latents = torch.randn(1, 4, 20, 26, generator=torch.Generator().manual_seed(0)) * 5
    tiles = plan_tiles(20, 26, 8)
    assert tiles is not None
    with torch.no_grad():
        drawn = decode_tiles(lambda tile: vae._decode(tile, return_dict=False)[0], latents, tiles)
        theirs = vae.tiled_decode(latents, return_dict=False)[0]
        whole = vae.decode(latents, return_dict=False)[0]
    assert drawn.shape == theirs.shape == whole.shape
    is_met = torch.zeros(1, 1, *drawn.shape[2:], dtype=torch.bool)
    for top in tiles[0].starts[1:]:
        for left in tiles[1].starts[1:]:
            is_met[..., top * 8 : top * 8 + 16, left * 8 : left * 8 + 16] = True
    compared = (~is_met)[..., : 18 * 8, : 24 * 8].expand(-1, 3, -1, -1)
    assert compared.float().mean() > 0.8
    apart = (drawn - theirs)[..., : 18 * 8, : 24 * 8][compared].abs()
    assert apart.max() < 1e-4 * whole.std()  # float32: the same tiles, blended in another order
    assert (drawn - whole).abs().mean() > 1e-3 * whole.std()  # lossy


def test_a_tiled_image_is_reported(tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole, tiled, room = (load(tiny_model, vae_tile_side=side) for side in (None, 64, 128))
    with caplog.at_level(logging.INFO, "sdxl_server"):
        expected = make_picture(whole)
        assert np.array_equal(make_picture(room), expected)  # 128×128 is not larger than the tile
        assert "tiles" not in caplog.text
        drawn = make_picture(tiled)
    assert (
        "The VAE decodes an image of 16 × 16 latents in 9 tiles of 8 × 8 (handler.vae_tile_side): lossy" in caplog.text
    )
    assert not np.array_equal(drawn, expected)
    assert np.array_equal(make_picture(tiled), drawn)
    request = tiled.contract.check({"prompt": "x"})
    for loaded, told in ((whole, None), (room, None), (tiled, TOLD)):
        assert describe_image(loaded, request, 0, unet_calls=4)["made_with"].get("vae_tiles") == told
        assert describe_pipeline(loaded)["vae"]["tile_side"] == loaded.config.vae_tile_side


def list_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.name == "sdxl_server.model.tiling"]


TOLD = {"count": 9, "width": 64, "height": 64, "overlap": 16, "lossy": True}


@pytest.mark.parametrize(("graphs", "count"), [("static", 1), ("dynamic", 1), ("both", 2)])
def test_one_graph_decodes_all_tiles(tiny_model: Path, graphs: str, count: int) -> None:
    expected = make_picture(load(tiny_model, vae_tile_side=96), width=128, height=128)
    loaded = load(tiny_model, "openvino", vae_tile_side=96, graphs=graphs, warm_up=True, **UNET_AND_TEXTS)
    before = describe_pipeline(loaded)
    assert np.abs(make_picture(loaded) - expected).max() <= 1  # the last bit is rounded
    assert describe_pipeline(loaded) == before
    assert len(before["openvino"]["vae"]) == count
