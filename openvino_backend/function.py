"""Methods that are traced once and kept in a file. A second start neither traces nor converts them."""

import contextlib
import inspect
import logging
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openvino_backend.backend import OpenVINOBackend, check_on_cpu
from openvino_backend.cache import name_entry, open_entry, write_entry
from openvino_backend.compiling import CompiledGraph
from openvino_backend.deferred import Steps, defer, finish, infer_shapes
from openvino_backend.fingerprint import Describer, compute_fingerprint
from openvino_backend.low_rank import Products, use
from openvino_backend.memory import release_memory
from openvino_backend.torch_private import pytree
from openvino_backend.tracing import Structure, TracedGraph, trace_lock, trace_method
from openvino_backend.weights import KnownWeights

logger = logging.getLogger(__name__)

_FILE = "function.bin"


@dataclass(frozen=True)
class CacheEntry:
    """The compiled graph of one kind of call, as the cache keeps it.

    Attributes:
        graph: takes the tensors among the arguments, in their order.
        results: the structure of the method's results.
    """

    graph: CompiledGraph
    results: Structure

    def run(self, tensors: Sequence[torch.Tensor]) -> Any:
        return self.results.fill(self.graph(*tensors))


@dataclass(frozen=True)
class _Call:
    """A call of a method.

    Attributes:
        arguments: the structure of the arguments.
        tensors: the tensors among the arguments.
        axes: the dynamic axes of each tensor.
    """

    arguments: Structure
    tensors: list[torch.Tensor]
    axes: list[tuple[int, ...]]

    def describe(self) -> str:
        """Describe the kind of call: the structure, the tensors' types and shapes, the other values."""
        shapes = [
            (str(tensor.dtype), [-1 if axis in free else length for axis, length in enumerate(tensor.shape)])
            for tensor, free in zip(self.tensors, self.axes, strict=True)
        ]
        others = [*map(Describer().describe, self.arguments.leaves)]
        return repr((str(self.arguments.spec), shapes, others))


@dataclass(frozen=True)
class _Axes:
    """Replaces a tensor. These axes may have any length."""

    axes: tuple[int, ...]


class CompiledFunction:
    """A method of a module that runs on OpenVINO as a whole; call it under torch.no_grad().

    Each new kind of call, by the shapes, types and values of its arguments, is traced and compiled once. One graph
    serves all lengths of a dynamic axis. The weights and all other values are compiled in. A later change of the
    module, a global or a function has no effect on a compiled kind of call.

    With the option `model_caching` the graph is kept in `cache_dir`. Its key covers the method, the kind of call, the
    options and the weights. It covers the tree of modules: classes, plain attributes, configuration and hooks. It
    covers their source files, package versions and the CPU's flags. It omits globals, environment variables, and
    functions that a running program replaces.

    Args:
        method: such as `module.forward`. It must not change its arguments, and must return new tensors.
        options: as for OpenVINOBackend.
        dynamic_shapes: the axes of any length, by argument name, for a dictionary of tensors also by its keys. Example:
            `{"sample": (0, 2, 3), "added_cond_kwargs": {"time_ids": (0,)}}`. The method's steps must not depend on
            these lengths.
        static_shapes: shapes by argument name. A call with these shapes gets a graph of its own.
        ranks: the largest sum of low-rank matrices' ranks, by the changed weight's name; see `bind`.
        name: the method's name in the log, and in the note of an error.

    Attributes:
        backend: its `reports` show what runs.

    Raises:
        OptionsError: an option is unknown or wrong.
        OpenVINOBackendError: a call cannot be compiled; says why.
    """

    def __init__(
        self,
        method: Callable[..., Any],
        options: Mapping[str, Any] | None = None,
        dynamic_shapes: Mapping[str, Any] | None = None,
        static_shapes: Iterable[Mapping[str, tuple[int, ...]]] = (),
        ranks: Mapping[str, int] | None = None,
        *,
        name: str | None = None,
    ) -> None:
        if not isinstance(getattr(method, "__self__", None), torch.nn.Module):
            raise TypeError(f"CompiledFunction takes a method of a torch.nn.Module, not {method!r}")
        self.backend = OpenVINOBackend(options, ranks=ranks)
        self._module, self._function = method.__self__, method.__func__  # type: ignore[attr-defined]
        self._name = name or f"{self._function.__module__}.{self._function.__qualname__}"
        self._parameters = list(inspect.signature(self._function).parameters)[1:]  # the first is the module
        self._dynamic_shapes, self._static_shapes = dict(dynamic_shapes or {}), tuple(static_shapes)
        self._entries: dict[str, CacheEntry] = {}
        self._warm: set[str] = set()  # kinds of calls that have run
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the method returns."""
        if defer(self, args, kwargs):
            return infer_shapes(self._function, self._module, *args, **kwargs)
        call = self._read_call(args, kwargs)
        kind = call.describe()
        if kind in self._warm:
            return self._entries[kind].run(call.tensors)
        with self._lock, self._add_note():
            entry = finish(self._find_or_prepare(call))
            # At the first run OpenVINO converts a dynamic graph's weights to its own form.
            files = [model.file for model in entry.graph.models]
            with release_memory(self.backend.options, self._list_weights(), files):
                result = entry.run(call.tensors)
            self._warm.add(kind)
            return result

    def prepare(self, *args: Any, **kwargs: Any) -> Steps[CacheEntry]:
        """Prepare such a call without making it; see deferred.py."""
        with self._lock, self._add_note():
            return (yield from self._find_or_prepare(self._read_call(args, kwargs)))

    def bind(self, products: Products) -> Callable[..., Any]:
        """Return the function with low-rank matrices. Only its calls compute with the weights W + up · down.

        Args:
            products: by weight name down, rank × inputs (× height × width), and up, results × rank; float32.
        """

        def call(*args: Any, **kwargs: Any) -> Any:
            with use(products):
                return self(*args, **kwargs)

        return call

    @contextlib.contextmanager
    def _add_note(self) -> Iterator[None]:
        """Add this method's name to an error of the block."""
        try:
            yield
        except Exception as error:
            error.add_note(f"while OpenVINO compiled or ran {self._name}")
            raise

    def describe_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Return a description that all calls of one kind share."""
        return self._read_call(args, kwargs).describe()

    def measure_weights(self) -> int:
        """Return the bytes of the module's weights."""
        return sum(each.nbytes for each in self._list_weights())

    def _list_weights(self) -> list[torch.Tensor]:
        return [*self._module.parameters(), *self._module.buffers()]

    def _read_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        names = [*self._parameters, *("" for _ in args)]
        given = {**kwargs, **dict(zip(names, args, strict=False))}
        is_static = any(
            all(getattr(given.get(name), "shape", None) == shape for name, shape in shapes.items())
            for shapes in self._static_shapes
        )
        free = {} if is_static else self._dynamic_shapes
        marked = (
            [_mark_axes(each, free.get(name)) for name, each in zip(names, args, strict=False)],
            [_mark_axes(each, free.get(name)) for name, each in kwargs.items()],
        )
        arguments, tensors = Structure.take_apart((args, kwargs))
        return _Call(arguments, tensors, [each.axes for each in pytree.tree_leaves(marked) if isinstance(each, _Axes)])

    def _find_or_prepare(self, call: _Call) -> Steps[CacheEntry]:
        kind = call.describe()
        if kind not in self._entries:
            self._entries[kind] = yield from self._prepare(call, kind)
        return self._entries[kind]

    def _prepare(self, call: _Call, kind: str) -> Steps[CacheEntry]:
        """Return the entry for this kind of call, from the cache or made now."""
        logger.info("Preparing %s for OpenVINO: a new kind of call waits until it is compiled", self._name)
        options = self.backend.options
        self.backend.check_bound()
        check_on_cpu([*self._list_weights(), *call.tensors])
        with release_memory(options, self._list_weights()):  # digesting them reads them all
            weights = KnownWeights(self._module, options)
            with trace_lock:
                fingerprint = compute_fingerprint(self._module, self._function)
            key = name_entry(options, "function", fingerprint, kind, list(weights.tensors), weights.sha256)
            with open_entry(options, key) as folder:
                entry = yield from self._load(folder, weights)
                if entry is None:
                    with trace_lock:
                        traced, results = self._trace(call, weights)
                    yield
                    entry = CacheEntry(self.backend.compile(traced), results)
                    self._save(folder, entry, weights)
                return entry

    def _trace(self, call: _Call, weights: KnownWeights) -> tuple[TracedGraph, Structure]:
        traced, results = trace_method(
            self._module,
            self._function,
            call.arguments,
            [each.contiguous() for each in call.tensors],
            axes=call.axes,
            decompositions=self.backend.options.find_decompositions(),
            weights=weights,
        )
        check_on_cpu(traced.constants.values())
        check_on_cpu(node.meta.get("val") for node in traced.graph.graph.nodes)  # including those that the code makes
        return traced, results

    def _save(self, folder: Path | None, entry: CacheEntry, weights: KnownWeights) -> None:
        if folder is None:
            return
        for model in entry.graph.models:
            sources = {each: weights.find_name(tensor) for each, tensor in model.weights.items()}
            model.sources = {each: name for each, name in sources.items() if name is not None}
        try:
            written = pickle.dumps(entry)
        except (AttributeError, RuntimeError, TypeError, pickle.PicklingError) as error:
            logger.warning("%s is traced anew at each start: its results cannot be kept: %s", self._name, error)
            return
        with write_entry(folder):
            (folder / _FILE).write_bytes(written)

    def _load(self, folder: Path | None, weights: KnownWeights) -> Steps[CacheEntry | None]:
        """Return the entry in the cache's folder, ready to call, or None if none fits."""
        if folder is None or not (folder / _FILE).exists():
            return None
        try:
            entry: CacheEntry = pickle.loads((folder / _FILE).read_bytes())
            yield
            reports = []
            for model in entry.graph.models:
                model.weights = {each: weights.tensors[name].detach() for each, name in model.sources.items()}
                reports.append(model.load(self.backend.options, ranks=self.backend.ranks))
        except Exception as error:  # whatever is wrong with the file, tracing again helps
            logger.warning("The cache entry %s does not fit and is made anew: %s", folder, error)
            return None
        self.backend.add_report(entry.graph, reports, traced=False)
        return entry


def _mark_axes(value: Any, axes: Any) -> Any:
    """Replace each tensor by _Axes with its axes, except axes of length 1.

    A length of 1 is dynamic in a batch only: OpenVINO computes 1×1 images wrongly in a graph of dynamic lengths.

    Args:
        axes: numbers; for a dictionary the numbers of each tensor by its key.
    """
    if isinstance(axes, Mapping) and isinstance(value, Mapping):
        return {name: _mark_axes(each, axes.get(name)) for name, each in value.items()}

    def mark(tensor: torch.Tensor) -> _Axes:
        return _Axes(tuple(axis for axis in axes or () if axis == 0 or tensor.shape[axis] != 1))

    return pytree.tree_map_only(torch.Tensor, mark, value)
