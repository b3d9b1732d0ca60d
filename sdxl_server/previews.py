"""Previews for next to nothing: a straight map from latents to colours, read off the model's own decoder."""

from typing import Any

PATCHES = {4: 0.8, 2: 0.5, 1: 0.3}  # sides in latents, and how strong: together about as strong as a picture's
RIDGE = 1e-4  # of colours that nothing was seen of


class ColourMap:
    """What colour each latent stands for: the mean of its pixels, by least squares over what was decoded so far."""

    def __init__(self) -> None:
        self._squares: Any = 0.0
        self._products: Any = 0.0

    @property
    def is_blank(self) -> bool:
        """Nothing was decoded so far."""
        return isinstance(self._squares, float)

    def learn(self, latents: Any, pixels: Any) -> None:
        """Take in what latents (1, channels, height, width) were decoded to, from -1 to 1 (1, 3, more of both)."""
        import torch

        shown = (pixels.detach().float().cpu() / 2 + 0.5).clamp(0, 1)
        colours = torch.nn.functional.adaptive_avg_pool2d(shown, latents.shape[2:])[0].flatten(1).T.double()
        rows = _list_rows(latents)
        self._squares = self._squares + 1 / len(rows) * (rows.T @ rows)
        self._products = self._products + 1 / len(rows) * (rows.T @ colours)

    def forget(self) -> None:
        """Begin anew."""
        self._squares, self._products = 0.0, 0.0

    def draw(self, latents: Any, *, size: tuple[int, int]) -> Any:
        """Return a Pillow image of latents, brought to a size in pixels."""
        import torch
        from PIL import Image

        ridge = RIDGE * torch.eye(len(self._squares), dtype=torch.double)
        weights = torch.linalg.solve(self._squares + ridge, self._products)
        levels = (_list_rows(latents) @ weights).clamp(0, 1).reshape(*latents.shape[2:], 3)
        small = Image.fromarray((levels * 255).round().byte().numpy())
        return small.resize(size, Image.Resampling.BICUBIC)


def _list_rows(latents: Any) -> Any:
    """Return each latent's channels and a 1."""
    import torch

    rows = latents.detach()[0].double().cpu().flatten(1).T
    return torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.double)], dim=1)


def make_patches(*, channels: int, height: int, width: int) -> Any:
    """Return latents in patches of several sizes, from a seed: colours that no picture of the warm-up has."""
    import torch

    generator, latents = torch.Generator().manual_seed(0), torch.zeros(1, channels, height, width)
    for side, share in PATCHES.items():
        shape = (1, channels, -(-height // side), -(-width // side))
        patches = torch.randn(shape, generator=generator).repeat_interleave(side, 2).repeat_interleave(side, 3)
        latents += share * patches[:, :, :height, :width]
    return latents
