"""Functions that are traced once and kept in a file, so that a second start neither traces nor converts."""

import contextlib
import inspect
import json
import logging
import pickle
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openvino_backend.ahead import Steps, finish, imitate, put_off
from openvino_backend.backend import CompiledGraph, OpenVINOBackend, TracedGraph, check_on_cpu
from openvino_backend.cache import name_entry, open_entry, write_entry
from openvino_backend.conditions import Conditions, describe, is_plain, unwrap_method
from openvino_backend.errors import CacheMissError
from openvino_backend.low_rank import Products, use
from openvino_backend.memory import release_memory
from openvino_backend.repeated import digest_blocks, list_blocks, trace_once
from openvino_backend.torch_private import (
    WRAPPED,
    bind_arguments,
    check_guards,
    drop_lengths,
    find_by_reference,
    find_changed_source,
    find_wrappers,
    flatten_arguments,
    guard_hooks,
    is_keepable,
    is_of_torch,
    keep_lengths_apart,
    list_looks,
    list_traced_lines,
    load_function,
    make_scope,
    make_traceable,
    mark_dynamic,
    read_graph,
    save_function,
)
from openvino_backend.weights import KnownWeights

logger = logging.getLogger(__name__)

_FILE = "function.bin"
_CONDITIONS = "conditions.json"
# The method's own defaults, which torch takes from when it was traced.
_OWN_LOOKS = ("F.__defaults__", "tuple((F.__kwdefaults__ or {}).items())")


# While torch traces, and while it loads a trace, settings of the whole process and the call of every module are others.
_tracing = threading.Lock()


@dataclass(frozen=True)
class Trace:
    """A traced function of torch's, with what torch's guards in it leave out."""

    function: Any
    conditions: Conditions
    unseen: frozenset[str] = frozenset()  # expressions of guards that are neither kept nor conditions


class CompiledFunction:
    """A method of a module that runs on OpenVINO as a whole; call it under torch.no_grad().

    Each new kind of call, by the shapes, types and values of its arguments, is traced by torch and compiled once; one
    graph serves all lengths of an axis that is named as dynamic. With the option `model_caching` the trace is kept in
    `cache_dir` beside the models, with torch's own checks of what it depends on, with what these leave out, and with
    the digests of the source lines that were traced. The weights are compiled in: changing them later has no effect. A
    change of anything else that torch looks at has the method traced anew; environment variables that the method reads
    are not looked at.

    Args:
        method: such as `module.forward`; neither changes its arguments nor returns views of them.
        options: as for OpenVINOBackend.
        dynamic_shapes: the axes of any length, by the argument's name and for a dictionary of tensors by its keys, such
            as `{"sample": (0, 2, 3), "added_cond_kwargs": {"time_ids": (0,)}}`.
        static_shapes: of arguments by name; a call in which they have these has a graph of its own nevertheless.
        ranks: by the names of the module's weights, beside which a call may bring low-rank matrices, the largest sum of
            their ranks; see `bind`.
        repeated: names of classes, of whose modules one of each kind is traced and stands for those that are alike. A
            change of another one alone, but for its weights' type and shape, is seen when a trace is taken from the
            cache, and not after that.

    Attributes:
        backend: its `reports` tell what runs.

    Raises:
        OptionsError: wrong options.
        OpenVINOBackendError: at a call, what stands in the way.
    """

    def __init__(
        self,
        method: Callable[..., Any],
        options: Mapping[str, Any] | None = None,
        dynamic_shapes: Mapping[str, Any] | None = None,
        static_shapes: Iterable[Mapping[str, tuple[int, ...]]] = (),
        ranks: Mapping[str, int] | None = None,
        repeated: Collection[str] = (),
    ) -> None:
        if not isinstance(getattr(method, "__self__", None), torch.nn.Module):
            raise TypeError(f"CompiledFunction takes a method of a torch.nn.Module, not {method!r}")
        self.backend = OpenVINOBackend(options, ranks=ranks)
        self._module, original = method.__self__, method.__func__  # type: ignore[attr-defined]
        self._name, self._function = f"{original.__module__}.{original.__qualname__}", make_traceable(original)
        self._signature = inspect.signature(self._function)
        self._dynamic_shapes, self._static_shapes = dict(dynamic_shapes or {}), tuple(static_shapes)
        self._repeated = list_blocks(self._module, repeated)
        self._traces: dict[Any, list[Trace]] = {}
        self._settled: set[int] = set()  # ids of the traces that were run
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Stay out when torch pickles the module, which may hold this in the method's place, with its checks."""
        return {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the method returns."""
        if put_off(self, args, kwargs):
            return imitate(self._function, self._module, *args, **kwargs)
        call = self.describe_call(args, kwargs)
        trace = self._find(call, args, kwargs)
        if trace is not None and id(trace) in self._settled:
            return trace.function.fn(self._module, *args, **kwargs)
        with self._lock:
            trace = finish(self._find_or_prepare(call, args, kwargs))
            # At its first run OpenVINO brings the weights of a dynamic graph into a form of its own.
            files = [part.file for part in read_graph(trace.function).parts]
            with release_memory(self.backend.options, self._list_weights(), files):
                result = trace.function.fn(self._module, *args, **kwargs)
            self._settled.add(id(trace))
            return result

    def prepare(self, *args: Any, **kwargs: Any) -> Steps[Trace]:
        """Have ready what such a call needs, without making it; see ahead.py."""
        with self._lock:
            return (yield from self._find_or_prepare(self.describe_call(args, kwargs), args, kwargs))

    def _find_or_prepare(self, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Steps[Trace]:
        with _tracing:  # meanwhile torch's checks see what is there for tracing only
            trace = self._find(call, args, kwargs)
        if trace is None:
            trace = yield from self._prepare(call, args, kwargs)
            self._traces[call] = [trace, *self._traces.get(call, [])]
        return trace

    def bind(self, products: Products) -> Callable[..., Any]:
        """Return the function with matrices that are added to the module's weights, W + up · down, in calls of it only.

        Args:
            products: by the name of a weight down, rank × inputs (× height × width), and up, results × rank; float32.
        """

        def call(*args: Any, **kwargs: Any) -> Any:
            with use(products):
                return self(*args, **kwargs)

        return call

    def describe_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what tells one kind of call from another: the structure, the tensors' types, the other values."""
        leaves, structure = flatten_arguments(*self._change(args, kwargs, drop_lengths))
        return structure, tuple(map(describe, leaves))

    def _change(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Any, Any], Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments, those changed that have axes of any length in this call."""
        names = [*list(self._signature.parameters)[1:], *("" for _ in args)]  # the first is the module
        given = {**kwargs, **dict(zip(names, args, strict=False))}
        if any(
            all(getattr(given.get(name), "shape", None) == shape for name, shape in shapes.items())
            for shapes in self._static_shapes
        ):
            return args, kwargs

        def change_one(name: str, value: Any) -> Any:
            axes = self._dynamic_shapes.get(name)
            return value if axes is None or value is None else change(value, axes)

        return tuple(map(change_one, names, args)), {name: change_one(name, value) for name, value in kwargs.items()}

    def _find(self, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace | None:
        """Return the trace that holds for this call, if there is one."""
        for trace in self._traces.get(call, []):
            arguments = self._bind(trace.function, args, kwargs)
            if check_guards(trace.function, arguments) and trace.conditions.hold(arguments):
                return trace
        return None

    def _bind(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments by name, and what the method encloses now: a loaded function has a copy of that."""
        return {**bind_arguments(function, self._module, *args, **kwargs), **self._find_enclosed()}

    def _prepare(self, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Steps[Trace]:
        """Return the trace for this kind of call, from the cache or else made now."""
        logger.info("OpenVINO is to run %s for a new kind of call, which waits until it is compiled", self._name)
        self.backend.check_bound()
        check_on_cpu([*self._list_weights(), *flatten_arguments(args, kwargs)[0]])
        with release_memory(self.backend.options, self._list_weights()):  # digesting them reads them all
            weights = KnownWeights(self._module, self.backend.options)
            with _tracing:
                blocks = digest_blocks(self._repeated)
            key = name_entry(self.backend.options, "function", self._name, call, weights.sha256, blocks)
            with open_entry(self.backend.options, key) as folder:
                trace = yield from self._load(folder, weights, args, kwargs)
                if trace is None:
                    with _tracing:
                        trace, graph = self._trace(weights, args, kwargs)
                    yield
                    self.backend.compile(graph)
                    self._save(folder, trace, weights)
                return trace

    def _trace(self, weights: KnownWeights, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Trace, TracedGraph]:
        """Return the trace for this kind of call, and its graph, which is not compiled yet."""
        graphs: list[TracedGraph] = []

        def keep_graph(graph: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> CompiledGraph:
            graphs.append(self.backend.trace_plain(graph, example_inputs, weights=weights))
            return graphs[0].compiled

        args, kwargs = self._change(args, kwargs, mark_dynamic)
        enclosed = self._find_enclosed()
        usual = set(map(id, [*self._list_weights(), *flatten_arguments(args, kwargs)[0]]))
        bound = self._signature.bind(self._module, *args, **kwargs)
        bound.apply_defaults()
        namespace, arguments = self._function.__globals__, {**bound.arguments, **enclosed}
        needed: set[str] = set()
        looks = [*_OWN_LOOKS, *(f"L[{name!r}]" for name, value in enclosed.items() if not is_plain(value))]

        def choose_guards(guards: Sequence[Any]) -> list[bool]:
            # What is around a repeated block's method while torch traces is not there when its checks are made.
            wrappers = find_wrappers(guards, namespace, arguments)
            kept = [is_keepable(guard, enclosed) and id(guard) not in wrappers for guard in guards]
            lost = [guard for guard, is_kept in zip(guards, kept, strict=True) if not is_kept]
            lost += find_by_reference(guards, namespace, arguments)
            # A tensor that is an attribute or a global is compiled in like a weight, but is replaced more easily.
            lost += [each for each in guards if isinstance(each.value, torch.Tensor) and id(each.value) not in usual]
            for guard in (each for each in lost if not is_of_torch(each)):
                found = list_looks(guard, namespace)
                if wrapper := wrappers.get(id(guard)):
                    found = [each.replace(f"{wrapper}{WRAPPED}", wrapper) for each in found]
                looks.extend(found)
                needed.update(found if guard.has_value else ())
            return kept

        options = {"guard_filter_fn": choose_guards}
        compiled = torch.compile(self._function, backend=keep_graph, fullgraph=True, dynamic=False, options=options)
        with guard_hooks(), keep_lengths_apart(), trace_once(self._repeated):
            function = compiled.aot_compile(((self._module, *args), kwargs))
        arguments = self._bind(function, args, kwargs)
        traced, classes = list_traced_lines(function), self._look(looks, arguments).classes
        classes |= {f"C[{index}]": kind for index, kind in enumerate(self._find_classes())}
        looks += (f"{each}.{name}" for each, kind in classes.items() for name in _list_methods(kind, traced))
        conditions = self._look(looks, arguments)
        return Trace(function, conditions, frozenset(needed & conditions.absent)), graphs[0]

    def _look(self, expressions: Iterable[str], arguments: Mapping[str, Any]) -> Conditions:
        scope = {**make_scope(self._function.__globals__), "C": self._find_classes(), "F": self._function}
        return Conditions(expressions, scope, arguments)

    def measure_weights(self) -> int:
        """Return the bytes of the module's weights."""
        return sum(each.nbytes for each in self._list_weights())

    def _list_weights(self) -> list[torch.Tensor]:
        return [*self._module.parameters(), *self._module.buffers()]

    def _find_classes(self) -> list[type]:
        """Return the classes of the module's parts, each once, in the order of the parts."""
        return list(dict.fromkeys(map(type, self._module.modules())))

    def _find_enclosed(self) -> dict[str, Any]:
        """Return what the method encloses by name, such as the function that a decorator's wrapper wraps."""
        enclosed = {}
        for name, cell in zip(self._function.__code__.co_freevars, self._function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # what is not there yet, such as a class within its own body
                enclosed[name] = cell.cell_contents
        return enclosed

    def _find_external(self) -> dict[str, Any]:
        """Return what is enclosed and not written to a file; torch knows such objects by identity, as no number has."""
        return {name: value for name, value in self._find_enclosed().items() if not is_plain(value)}

    def _save(self, folder: Path | None, trace: Trace, weights: KnownWeights) -> None:
        if folder is None:
            return
        if trace.unseen:
            logger.warning("%s is traced anew at each start: it depends on %s", self._name, ", ".join(trace.unseen))
            return
        for part in read_graph(trace.function).parts:
            sources = {each: weights.find_name(t) for each, t in part.weights.items()}
            part.sources = {each: name for each, name in sources.items() if name is not None}
        namespace, external = self._function.__globals__, self._find_external()
        with write_entry(folder):
            try:
                save_function(trace.function, folder / _FILE, namespace=namespace, external=external)
            except (AttributeError, RuntimeError, TypeError, pickle.PicklingError) as error:
                logger.warning("%s is traced anew at each start: torch cannot keep its trace: %s", self._name, error)
                return
            (folder / _CONDITIONS).write_text(json.dumps(trace.conditions.descriptions))

    def _load(
        self, folder: Path | None, weights: KnownWeights, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Steps[Trace | None]:
        """Return the trace in the cache's folder, ready to be called, or None if there is none that fits."""
        if folder is None or not (folder / _FILE).exists():
            return None
        try:
            with _tracing:
                function, conditions = self._read(folder, args, kwargs)
            yield
            graph: CompiledGraph = read_graph(function)
            reports = []
            for part in graph.parts:
                part.weights = {each: weights.tensors[name].detach() for each, name in part.sources.items()}
                reports.append(part.load(self.backend.options, ranks=self.backend.ranks))
        except Exception as error:  # whatever is wrong with the file, tracing anew is the answer
            logger.warning("The cache entry %s does not fit and is made anew: %s", folder, error)
            return None
        self.backend.add_report(graph, reports, traced=False)
        return Trace(function, conditions)

    def _read(self, folder: Path, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Conditions]:
        """Return the function in the cache's folder, and what it depends on.

        Raises:
            CacheMissError: that was something else when it was traced.
        """
        namespace, external = self._function.__globals__, self._find_external()
        function = load_function(folder / _FILE, namespace=namespace, external=external)
        if changed := find_changed_source(function):
            raise CacheMissError(f"{changed} have changed")
        arguments = self._bind(function, args, kwargs)
        if not check_guards(function, arguments):
            raise CacheMissError("the module is not in the state in which it was traced")
        descriptions = json.loads((folder / _CONDITIONS).read_text())
        conditions = self._look(descriptions, arguments)
        conditions.check_descriptions(descriptions)
        return function, conditions


def _list_methods(kind: type, traced: set[tuple[str, int]]) -> list[str]:
    """Return those methods of a class that were traced; torch takes them as fixed."""
    found = []
    for name in {name for each in kind.__mro__ for name in vars(each)}:
        method = unwrap_method(inspect.getattr_static(kind, name, None))
        if inspect.isfunction(method) and (method.__module__, method.__code__.co_firstlineno) in traced:
            found.append(name)
    return found
