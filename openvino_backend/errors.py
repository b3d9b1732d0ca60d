"""What may go wrong."""

from collections.abc import Iterable


class OpenVINOBackendError(RuntimeError):
    """A graph that cannot run on OpenVINO; the message says what stands in the way."""


class UnsupportedOperatorsError(OpenVINOBackendError):
    """OpenVINO's front end has no translation for these operators of the graph."""

    def __init__(self, operators: Iterable[str]) -> None:
        self.operators = frozenset(operators)
        super().__init__(
            f"OpenVINO has no {', '.join(sorted(self.operators))}; with strict: false these would run in PyTorch"
        )


class GraphLimitError(OpenVINOBackendError):
    """One more graph would be past the option max_graphs."""


class CacheMissError(OpenVINOBackendError):
    """A model that should be in the cache is not there any more."""
