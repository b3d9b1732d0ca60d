"""Previews of unfinished images. Fast ones map latents to colours, fitted to the model's own VAE. Lossy.

Each latent cell becomes a block of pixels. The map is linear in the cell and its eight neighbours. It has bends for the
cell itself, because decoders saturate. The map is fitted to drawn leaves of all colours, which the VAE encodes. Half of
their latents are enlarged, because guidance enlarges latents. One seed draws everything, so a preview depends only on
the model, the configuration and the request.
"""

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle, relu, unfold

from sdxl_server import metrics
from sdxl_server.diffusion.denoiser import name_failed_step
from sdxl_server.diffusion.progress import Progress
from sdxl_server.diffusion.stand_ins import build_vae, check_finite
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.model.vaes import choose_vae_methods

IMAGES, SIDE, LEAVES = 6, 128, 60  # images of SIDE x SIDE pixels, with LEAVES leaves each
MOSAIC_SIDE = 64  # in latent cells: room for all images, unchanged and enlarged
BENDS = (0.5, 1.0, 1.5)  # in standard deviations from the mean, on both sides
ENLARGEMENT = 1.5
RIDGE = 1e-3  # small compared with the features' variance of about 1


@dataclass(frozen=True)
class ColourMap:
    """The fitted map from latents to pixels.

    Attributes:
        mean, spread: of each channel of the fitted latents; 1, channels, 1, 1.
        weights: colours × block height × block width, features.
        block: the side of a cell in pixels.
        error: the mean distance from the fitted pixels, in levels of 255.
    """

    mean: Any
    spread: Any
    weights: Any
    block: int
    error: float

    def draw(self, latents: Any) -> Any:
        """Return the pixels, from -1 to 1, of latents in the scale of the VAE's decoder.

        Raises:
            NotFiniteError: the latents hold NaN or infinity.
        """
        check_finite(latents, "the preview")
        features = list_features((latents.float().cpu() - self.mean) / self.spread)
        return pixel_shuffle((self.weights @ features).unflatten(2, latents.shape[2:]), self.block).clamp(-1, 1)


def cache_colour_map(fit: Callable[[], ColourMap], backend: Any, *ingredients: Any) -> ColourMap:
    """Return a fitted map, from the compile cache if it holds one.

    Args:
        backend: the OpenVINOBackend of the VAE's decoder. Without one, or before its first run, nothing is cached.
        ingredients: the map also depends on the weights and the code.
    """
    if backend is None or not backend.reports:
        return fit()
    import diffusers

    from openvino_backend import keep_value, name_entry

    made_by = backend.reports[0].weights_sha256, diffusers.__version__, Path(__file__).read_bytes()
    kept = keep_value(
        backend.options, name_entry(backend.options, "colours", *made_by, *ingredients), lambda: _write(fit())
    )
    return ColourMap(**torch.load(io.BytesIO(kept), weights_only=True))


def _write(fitted: ColourMap) -> bytes:
    file = io.BytesIO()
    torch.save(vars(fitted), file)
    return file.getvalue()


def fit_colour_map(vae: Any, decode: Callable[[Any], Any], *, height: int, width: int) -> ColourMap:
    """Fit a map to a VAE. The encoder runs in eager PyTorch, so no graph is compiled for it.

    Args:
        decode: returns the pixels of one image's latents, in a tuple.
        height, width: the size of each call's latents.

    Raises:
        NotFiniteError: the VAE returned NaN or infinity.
    """
    _, encode = choose_vae_methods(vae)
    with torch.no_grad():
        images = draw_leaves().to(vae.device, vae.dtype)
        # a full VAE returns means, then variances
        latents = torch.cat([encode(each)[:, : vae.config.latent_channels] for each in images.split(1)]).float().cpu()
        check_finite(latents, "the VAE's encoding of the image")
        spread, mean = torch.std_mean(latents, dim=(0, 2, 3), keepdim=True)
        tiles = torch.stack([latents, mean + ENLARGEMENT * (latents - mean)], dim=1).flatten(0, 1)
        mosaics = build_mosaics(tiles, height=height, width=width)
        pixels = torch.cat([decode(each.to(vae.device))[0].float().cpu().clamp(-1, 1) for each in mosaics.split(1)])
        block = pixels.shape[-1] // width
        features = list_features((mosaics - mean) / spread).transpose(0, 1).flatten(1).double()
        blocks = pixel_unshuffle(pixels, block).flatten(2).transpose(0, 1).flatten(1).double()
        count = features.shape[1]
        products = features @ features.T / count + RIDGE * torch.eye(len(features), dtype=features.dtype)
        weights = torch.linalg.solve(products, features @ blocks.T / count).T
        error = 127.5 * ((weights @ features).clamp(-1, 1) - blocks).abs().mean()
    return ColourMap(mean, spread, weights.float(), block, float(error))


def list_features(latents: Any) -> Any:
    """Return the features that colours are linear in: images, features, cells."""
    around = unfold(pad(latents, (1, 1, 1, 1), mode="replicate"), 3)
    bent = torch.cat([relu(side * latents - bend) for side in (1, -1) for bend in BENDS], dim=1).flatten(2)
    return torch.cat([around, bent, torch.ones_like(bent[:, :1])], dim=1)


def draw_leaves() -> Any:
    """Return images of leaves that cover each other, like things in photographs: IMAGES, 3, SIDE, SIDE."""
    generator = torch.Generator().manual_seed(0)

    def choose(count: int, low: float, high: float) -> Any:
        return low + (high - low) * torch.rand(IMAGES, count, 1, 1, generator=generator)

    down, across = torch.arange(SIDE).view(1, 1, -1, 1), torch.arange(SIDE).view(1, 1, 1, -1)
    images = choose(3, -1, 1).expand(-1, -1, SIDE, SIDE)
    for _ in range(LEAVES):
        centre, angle, flatness = choose(2, 0, SIDE), choose(1, 0, torch.pi), choose(1, 1, 2.5)
        y, x = down - centre[:, :1], across - centre[:, 1:]
        along, aside = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
        radius = SIDE * (0.03 + 0.3 * choose(1, 0, 1) ** 2)  # more small ones than large ones
        is_leaf = torch.hypot(along, aside * flatness) < radius
        images = torch.where(is_leaf, choose(3, -1, 1), images)
    return images


def build_mosaics(tiles: Any, *, height: int, width: int) -> Any:
    """Return as few mosaics of a size as hold all tiles. The first tiles fill the last mosaic again."""
    down, across = (-(-side // tiles.shape[-1]) for side in (height, width))
    count = -(-len(tiles) // (down * across)) * down * across
    chosen = tiles[torch.arange(count) % len(tiles)].unflatten(0, (-1, down, across))
    return chosen.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)[..., :height, :width]


def choose_preview_steps(count: int, *, steps: int) -> list[int]:
    """Return the steps after which previews are due, spread evenly. After the last step comes the image itself."""
    if steps < 2:
        return []
    return [min(max(round(steps * (i + 1) / (count + 1)), 1), steps - 1) for i in range(count)]


def draw_preview(loaded: LoadedPipeline, progress: Progress) -> Any:
    """Return the preview after a step, a Pillow image, of the kind that the configuration sets.

    Raises:
        NotFiniteError: the predicted image holds NaN or infinity.
    """
    pipeline, config, kind = loaded.pipeline, loaded.pipeline.vae.config, loaded.config.preview
    if progress.denoiser is None:
        raise ValueError("an image that is not drawn has no previews")
    naming = name_failed_step(progress.denoiser.request, progress.index, progress.denoiser)
    with torch.no_grad(), naming, metrics.PREVIEW_SECONDS.labels(kind).time():
        latents = progress.denoiser.predict() / config.scaling_factor
        mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
        if mean is not None and std is not None:
            latents = latents * torch.tensor(std).view(1, -1, 1, 1) + torch.tensor(mean).view(1, -1, 1, 1)
        if kind == "fast":
            pixels = fit_preview(loaded).draw(latents)
        else:
            pixels = build_vae(loaded).decode(latents.to(pipeline.vae.device))[0]
        return pipeline.image_processor.postprocess(pixels.float().cpu())[0]


@functools.lru_cache(maxsize=2)  # a worker has one pipeline
def fit_preview(loaded: LoadedPipeline) -> ColourMap:
    """Return the map of fast previews. The warm-up fits it, or the first preview does."""
    width, height = (side // loaded.pipeline.vae_scale_factor for side in loaded.contract.size)
    if loaded.graphs == "dynamic":  # no larger than all tiles
        width, height = min(width, MOSAIC_SIDE), min(height, MOSAIC_SIDE)
    vae = loaded.pipeline.vae
    fit = functools.partial(fit_colour_map, vae, build_vae(loaded).decode, height=height, width=width)
    return cache_colour_map(fit, loaded.parts.get("vae"), vae.config, loaded.tile_side, height, width)
