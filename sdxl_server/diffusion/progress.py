"""Where the work on a request stands: UNet calls and tiles of the upscaler."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdxl_server.diffusion.denoiser import Denoiser


@dataclass(frozen=True)
class GeneratedImage:
    """A finished image.

    Attributes:
        image: a Pillow image.
        unet_calls: the UNet calls made for it, in whole calls. Outside a guidance interval one may count half.
        calls_of_all: the UNet calls of the full schedule.
    """

    image: Any
    unet_calls: float
    calls_of_all: int


@dataclass(frozen=True)
class Progress:
    """Where a request stands after a step.

    Attributes:
        done, total: steps of the request. A step is a UNet call, made or extrapolated, or a tile of the upscaler.
        index: the current image, from 0.
        step, steps: UNet calls of this image.
        denoiser: of this image; None if it is not drawn.
        share: the part of the request's work that is done; extrapolated calls do not count. Above 0.
        image: the finished image, after its last step.
    """

    done: int
    total: int
    index: int
    step: int
    steps: int
    denoiser: Denoiser | None
    share: float
    image: GeneratedImage | None = None


@dataclass(frozen=True)
class ImageWork:
    """The work on an image, in steps, and in UNet calls x megapixels.

    Attributes:
        calls, tiles: the steps.
        drawing, upscaling: the work.
    """

    calls: int
    tiles: int
    drawing: float
    upscaling: float


class Meter:
    """Measures the progress of a request.

    Args:
        images: the work on each image.
    """

    def __init__(self, images: Sequence[ImageWork]) -> None:
        self._images = images
        self.begin(0)

    def begin(self, index: int) -> None:
        """Begin an image. Earlier ones are finished or skipped."""
        self._index, self._tiles = index, 0
        self.denoisers: list[Denoiser] = []

    def count_tile(self) -> None:
        """Count a finished tile."""
        self._tiles += 1

    def measure(self, image: GeneratedImage | None = None) -> Progress:
        """Return where the request stands."""
        current, earlier = self._images[self._index], self._images[: self._index]
        step = sum(each.done for each in self.denoisers)
        made = sum(each.calls * each.request.megapixels for each in self.denoisers)
        made += current.upscaling * self._tiles / max(current.tiles, 1)
        return Progress(
            sum(each.calls + each.tiles for each in earlier) + step + self._tiles,
            sum(each.calls + each.tiles for each in self._images),
            self._index,
            step,
            current.calls,
            self.denoisers[-1] if self.denoisers else None,
            (sum(each.drawing + each.upscaling for each in earlier) + made)
            / sum(each.drawing + each.upscaling for each in self._images),
            image,
        )
