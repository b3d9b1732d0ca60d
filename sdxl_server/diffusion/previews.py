"""Fast previews: colours told from latents by a map that is fitted to what the model's own VAE decodes. Lossy.

A cell of latents becomes a block of pixels, linearly in the latents of the cell and its eight neighbours, with bends in
those of the cell itself, since decoders saturate. What the map is fitted to are drawn leaves of all colours, of which
the VAE's encoder makes latents; half of these are enlarged, as guidance enlarges a picture's. All is drawn from one
seed, so that a preview depends on the model, the configuration and the request alone.
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
from sdxl_server.diffusion.denoiser import name_step
from sdxl_server.diffusion.generation import Progress
from sdxl_server.diffusion.stand_ins import check_finite, fork_vae
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.model.vaes import find_methods

PICTURES, SIDE, LEAVES = 6, 128, 60  # of SIDE pixels, with so many leaves each
MOSAIC_SIDE = 64  # in cells of latents: room for all of them, once as they are and once enlarged
BENDS = (0.5, 1.0, 1.5)  # standard deviations from the mean, on both sides
ENLARGEMENT = 1.5
RIDGE = 1e-3  # beside features of a variance of about 1


@dataclass(frozen=True)
class ColourMap:
    """What tells pixels from latents.

    Attributes:
        mean, spread: of each channel of the latents that it was fitted to; 1, channels, 1, 1.
        weights: colours × a block's height × its width, features.
        block: pixels along a cell.
        error: of what it was fitted to, the mean distance in levels of 255.
    """

    mean: Any
    spread: Any
    weights: Any
    block: int
    error: float

    def draw(self, latents: Any) -> Any:
        """Return the pixels, from -1 to 1, of latents as the VAE's decoder takes them.

        Raises:
            NotFiniteError: there are none.
        """
        check_finite(latents, "the preview")
        features = list_features((latents.float().cpu() - self.mean) / self.spread)
        return pixel_shuffle((self.weights @ features).unflatten(2, latents.shape[2:]), self.block).clamp(-1, 1)


def keep_colours(fit: Callable[[], ColourMap], backend: Any, *ingredients: Any) -> ColourMap:
    """Return a fitted map, from the cache of what is compiled where it has one.

    Args:
        backend: the OpenVINOBackend of the VAE's decoder; without one, or before its first run, nothing is kept.
        ingredients: what the map depends on beside the weights and the code.
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


def fit_colours(vae: Any, decode: Callable[[Any], Any], *, height: int, width: int) -> ColourMap:
    """Fit a map to a VAE; its encoder runs in eager PyTorch, so that nothing is compiled for it.

    Args:
        decode: returns the pixels of one picture's latents, in a tuple.
        height, width: at which it is called, as often as all that is drawn takes.

    Raises:
        NotFiniteError: the VAE makes NaN or infinity of a picture.
    """
    _, encode = find_methods(vae)
    with torch.no_grad():
        pictures = draw_leaves().to(vae.device, vae.dtype)
        # of a full VAE the first half, the means
        latents = torch.cat([encode(each)[:, : vae.config.latent_channels] for each in pictures.split(1)]).float().cpu()
        check_finite(latents, "what the VAE made of the image")
        spread, mean = torch.std_mean(latents, dim=(0, 2, 3), keepdim=True)
        tiles = torch.stack([latents, mean + ENLARGEMENT * (latents - mean)], dim=1).flatten(0, 1)
        mosaics = lay_out(tiles, height=height, width=width)
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
    """Return what the colours of blocks are linear in: pictures, features, cells."""
    around = unfold(pad(latents, (1, 1, 1, 1), mode="replicate"), 3)
    bent = torch.cat([relu(side * latents - bend) for side in (1, -1) for bend in BENDS], dim=1).flatten(2)
    return torch.cat([around, bent, torch.ones_like(bent[:, :1])], dim=1)


def draw_leaves() -> Any:
    """Return pictures of leaves that cover each other, as things in photographs do: PICTURES, 3, SIDE, SIDE."""
    generator = torch.Generator().manual_seed(0)

    def choose(count: int, low: float, high: float) -> Any:
        return low + (high - low) * torch.rand(PICTURES, count, 1, 1, generator=generator)

    down, across = torch.arange(SIDE).view(1, 1, -1, 1), torch.arange(SIDE).view(1, 1, 1, -1)
    pictures = choose(3, -1, 1).expand(-1, -1, SIDE, SIDE)
    for _ in range(LEAVES):
        place, angle, flatness = choose(2, 0, SIDE), choose(1, 0, torch.pi), choose(1, 1, 2.5)
        y, x = down - place[:, :1], across - place[:, 1:]
        along, aside = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
        radius = SIDE * (0.03 + 0.3 * choose(1, 0, 1) ** 2)  # more small ones than large ones
        is_leaf = torch.hypot(along, aside * flatness) < radius
        pictures = torch.where(is_leaf, choose(3, -1, 1), pictures)
    return pictures


def lay_out(tiles: Any, *, height: int, width: int) -> Any:
    """Return mosaics of a size, as few as hold all tiles; the last one is filled with the first tiles again."""
    down, across = (-(-side // tiles.shape[-1]) for side in (height, width))
    count = -(-len(tiles) // (down * across)) * down * across
    chosen = tiles[torch.arange(count) % len(tiles)].unflatten(0, (-1, down, across))
    return chosen.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)[..., :height, :width]


def choose_preview_steps(count: int, *, steps: int) -> list[int]:
    """Return the steps after which previews are due, in equal parts of the way; the last step is the picture itself."""
    if steps < 2:
        return []
    return [min(max(round(steps * (i + 1) / (count + 1)), 1), steps - 1) for i in range(count)]


def draw_preview(loaded: LoadedPipeline, progress: Progress) -> Any:
    """Return the picture, a Pillow image, as it looks from where it stands, in the way that the configuration says.

    Raises:
        NotFiniteError: it is none.
    """
    pipeline, config, kind = loaded.pipeline, loaded.pipeline.vae.config, loaded.config.preview
    place = name_step(progress.denoiser.request, progress.index, progress.denoiser)
    with torch.no_grad(), place, metrics.PREVIEW_SECONDS.labels(kind).time():
        latents = progress.denoiser.predict() / config.scaling_factor
        mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
        if mean is not None and std is not None:
            latents = latents * torch.tensor(std).view(1, -1, 1, 1) + torch.tensor(mean).view(1, -1, 1, 1)
        if kind == "fast":
            pixels = fit_preview(loaded).draw(latents)
        else:
            pixels = fork_vae(loaded).decode(latents.to(pipeline.vae.device))[0]
        return pipeline.image_processor.postprocess(pixels.float().cpu())[0]


@functools.lru_cache(maxsize=2)  # a worker has one pipeline
def fit_preview(loaded: LoadedPipeline) -> ColourMap:
    """Return the map of fast previews: fitted at the warm-up, or else for the first preview."""
    width, height = (side // loaded.pipeline.vae_scale_factor for side in loaded.contract.size)
    if loaded.graphs == "dynamic":  # no larger than holds all that it is fitted to
        width, height = min(width, MOSAIC_SIDE), min(height, MOSAIC_SIDE)
    vae = loaded.pipeline.vae
    fit = functools.partial(fit_colours, vae, fork_vae(loaded).decode, height=height, width=width)
    return keep_colours(fit, loaded.parts.get("vae"), vae.config, loaded.tile_side, height, width)
