"""Extrapolate what skipped UNet calls would give from the calls that were made. Lossy, and off by default."""

from typing import Any


class LinearExtrapolation:
    """The straight line through the last two points. A point is a number and a tensor."""

    def __init__(self) -> None:
        self._points: list[tuple[float, Any]] = []

    def add(self, at: float, value: Any) -> None:
        """Add a point. It replaces the last point if that has the same number."""
        kept = [point for point in self._points if point[0] != at]
        self._points = [*kept[-1:], (at, value)]

    def compute(self, at: float) -> Any:
        """Return the line's value at a number. With one point that is the point's value."""
        last, value = self._points[-1]
        if len(self._points) == 1:
            return value
        previous, previous_value = self._points[0]
        return value + (value - previous_value) * ((at - last) / (last - previous))
