"""Extrapolation of skipped UNet calls from the calls that were made. Lossy, and off by default."""

from typing import Any


class Line:
    """The straight line through the last two of some points, each a number and a tensor."""

    def __init__(self) -> None:
        self._points: list[tuple[float, Any]] = []

    def add(self, at: float, value: Any) -> None:
        """Add a point; it takes the place of the last one where that is at the same number."""
        kept = [each for each in self._points if each[0] != at]
        self._points = [*kept[-1:], (at, value)]

    def find(self, at: float) -> Any:
        """Return where the line is; through one point it is level."""
        last, value = self._points[-1]
        if len(self._points) == 1:
            return value
        before, earlier = self._points[0]
        return value + (value - earlier) * ((at - last) / (last - before))
