"""The errors of this package."""

from collections.abc import Iterable


class OpenVINOBackendError(RuntimeError):
    """A graph cannot run on OpenVINO; the message says why."""


class UnsupportedOperatorsError(OpenVINOBackendError):
    """OpenVINO's front end has no translation for these operators of the graph."""

    def __init__(self, operators: Iterable[str]) -> None:
        self.operators = frozenset(operators)
        super().__init__(
            f"OpenVINO has no {', '.join(sorted(self.operators))}; with strict: false these would run in PyTorch"
        )


class GraphLimitError(OpenVINOBackendError):
    """Another graph would exceed the option max_graphs."""


class CacheMissError(OpenVINOBackendError):
    """A model is no longer in the cache."""
