"""The drawings of a worker, which their clients can watch, skip and end."""

import itertools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

from sdxl_server.diffusion.progress import Progress
from sdxl_server.request.fields import GenerationRequest


@dataclass(eq=False)
class Drawing:
    """The images of one request, from its arrival to its end.

    Attributes:
        holder: the client, as nginx names the owner of its API key. Without nginx all clients are one, named "".
        seconds: the time of each stage so far, by name.
        progress: after the last step; None before the first.
        preview: the file of the last preview.
        is_watched: a client waits for a new preview.
        is_skipped: the image under way is left out.
        is_interrupted: the drawing ends after the step under way.
    """

    holder: str
    request: GenerationRequest
    seconds: Mapping[str, float]
    progress: Progress | None = None
    preview: bytes | None = None
    is_watched: bool = False
    is_skipped: bool = False
    is_interrupted: bool = False

    @property
    def is_at_last_image(self) -> bool:
        """No image follows the one under way."""
        index = 0 if self.progress is None else self.progress.index
        return index + 1 >= self.request.num_images_per_prompt


class Drawings:
    """The drawings by their order of arrival. A drawing leaves with the last reference to it."""

    def __init__(self) -> None:
        self._drawings: weakref.WeakValueDictionary[int, Drawing] = weakref.WeakValueDictionary()
        self._numbers = itertools.count()

    def add(self, drawing: Drawing) -> None:
        """Add the newest drawing."""
        self._drawings[next(self._numbers)] = drawing

    def find_oldest(self, holder: str) -> Drawing | None:
        """Return a client's oldest drawing, which is under way or next."""
        return next((each for each in self._drawings.values() if each.holder == holder), None)
