"""Functions that are traced once and kept in a file, so that a second start neither traces nor converts."""

import importlib
import inspect
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.guards import CheckFunctionManager
from torch._dynamo.package import _hash_sourcelines
from torch.utils import _pytree as pytree

from openvino_backend.backend import CompiledGraph, OpenVINOBackend, digest_weights, name_entry
from openvino_backend.cache import open_entry
from openvino_backend.errors import CacheMissError
from openvino_backend.memory import release_memory

logger = logging.getLogger(__name__)

_FILE = "function.bin"


class CompiledFunction:
    """A method of a module that runs on OpenVINO as a whole; call it under torch.no_grad().

    Each new kind of call, by the shapes, types and values of its arguments, is traced by torch and compiled once. With
    the option `model_caching` the trace is kept in `cache_dir` beside the models, with torch's own checks of what it
    depends on, and with the digests of the source lines that were traced.

    Args:
        method: such as `module.forward`; neither changes its arguments nor returns views of them.
        options: as for OpenVINOBackend.

    Attributes:
        backend: its `reports` tell what runs.

    Raises:
        OptionsError: wrong options.
        OpenVINOBackendError: at a call, what stands in the way.
    """

    def __init__(self, method: Callable[..., Any], options: Mapping[str, Any] | None = None) -> None:
        if not isinstance(getattr(method, "__self__", None), torch.nn.Module):
            raise TypeError(f"CompiledFunction takes a method of a torch.nn.Module, not {method!r}")
        self.backend = OpenVINOBackend(options)
        self._module, self._function = method.__self__, method.__func__  # type: ignore[attr-defined]
        self._functions: dict[Any, Any] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Stay out when torch pickles the module, which may hold this in the method's place, with its checks."""
        return {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the method returns."""
        call = _describe_call(args, kwargs)
        function = self._functions.get(call)
        if function is None or not function.guard_check(self._module, *args, **kwargs):
            with self._lock:
                function = self._functions.get(call)
                if function is None or not function.guard_check(self._module, *args, **kwargs):
                    function = self._functions[call] = self._prepare(call, args, kwargs)
        return function.fn(self._module, *args, **kwargs)

    def _prepare(self, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the function for this kind of call, from the cache or else traced."""
        self.backend.check_bound()
        weights = dict([*self._module.named_parameters(), *self._module.named_buffers()])
        digest = digest_weights(weights)
        names = (self._function.__module__, self._function.__qualname__)
        key = name_entry(self.backend.options, "function", *names, call, digest)
        with (
            open_entry(self.backend.options, key) as folder,
            release_memory(self.backend.options, weights.values()),
        ):
            function = self._load(folder, weights, args, kwargs)
            if function is None:
                function = self._trace(digest, args, kwargs)
                self._save(folder, function, weights)
            return function

    def _trace(self, digest: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def compile_graph(graph: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> CompiledGraph:
            return self.backend.compile_plain(graph, example_inputs, weights_sha256=digest)

        compiled = torch.compile(
            self._function,
            backend=compile_graph,
            fullgraph=True,
            dynamic=False,
            options={"guard_filter_fn": self._choose_guards},
        )
        return compiled.aot_compile(((self._module, *args), kwargs))

    def _choose_guards(self, guards: Sequence[Any]) -> list[bool]:
        """Keep torch's checks but for those of objects by their identity, which another process cannot make."""
        lost = set(CheckFunctionManager.UNSUPPORTED_SERIALIZATION_GUARD_TYPES)
        enclosed = tuple(self._find_enclosed())
        return [
            not (
                guard.is_global
                or lost & {guard.guard_type, *guard.derived_guard_types}
                or guard.orig_guard._unserializable
                or (enclosed and guard.name.startswith(enclosed))
            )
            for guard in guards
        ]

    def _find_enclosed(self) -> dict[str, Any]:
        """Return what a decorator's wrapper encloses: the function that it wraps, by name."""
        return dict(inspect.getclosurevars(self._function).nonlocals)

    def _save(self, folder: Path | None, function: Any, weights: Mapping[str, torch.Tensor]) -> None:
        if folder is None:
            return
        names = {(tensor.data_ptr(), tuple(tensor.shape)): name for name, tensor in weights.items()}
        for part in function._artifacts.compiled_fn.parts:
            sources = {each: names.get((t.data_ptr(), tuple(t.shape))) for each, t in part.weights.items()}
            part.sources = {each: name for each, name in sources.items() if name is not None}
        # Modules to which torch refers among the function's globals, under names that only this process knows.
        environment = function._artifacts.runtime_env
        for name in environment.external_refs:
            value = self._function.__globals__.get(name)
            if inspect.ismodule(value):
                environment.import_sources[name] = value.__name__
        function.save_compiled_function(folder / _FILE, external_data=self._find_enclosed())

    def _load(
        self, folder: Path | None, weights: Mapping[str, torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return the function in the cache's folder, ready to be called, or None if there is none that fits."""
        if folder is None or not (folder / _FILE).exists():
            return None
        try:
            with (folder / _FILE).open("rb") as stream:
                function = torch.compiler.load_compiled_function(
                    stream, f_globals=self._function.__globals__, external_data=self._find_enclosed()
                )
            _check_sources(function.source_info())
            if not function.guard_check(self._module, *args, **kwargs):
                raise CacheMissError("the module is not in the state in which it was traced")
            graph: CompiledGraph = function._artifacts.compiled_fn
            reports = []
            for part in graph.parts:
                part.weights = {each: weights[name].detach() for each, name in part.sources.items()}
                reports.append(part.load(self.backend.options))
        except Exception as error:  # whatever is wrong with the file, tracing anew is the answer
            logger.warning("The cache entry %s does not fit and is made anew: %s", folder, error)
            return None
        self.backend.add_report(graph, reports, traced=False)
        return function


def _describe_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what tells one kind of call from another: the structure, the tensors' types, the other values."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    described = tuple(
        (each.dtype, tuple(each.shape), each.stride(), str(each.device)) if isinstance(each, torch.Tensor) else each
        for each in leaves
    )
    return str(structure), repr(described)


def _check_sources(info: Any) -> None:
    """Refuse a function when the source lines that torch traced have changed since.

    Raises:
        CacheMissError: names the lines.
    """
    for source in info.inlined_sources:
        lines = (source.firstlineno, source.lastlineno)
        if _hash_sourcelines(importlib.import_module(source.module), *lines) != source.checksum:
            raise CacheMissError(f"lines {lines[0]} to {lines[1]} of {source.module} have changed")
