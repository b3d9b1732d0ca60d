"""All of PyTorch's own inside that this package uses; written for PyTorch 2.13, to be read again for another.

- aot_autograd and its cache's setting: what torch.compile hands to a backend still has changes in place.
- The traced graph's metadata: only there stands whether the function changes its inputs or returns views of them.
- An operator's Python kernels: while they are there, tracing takes it apart, and there is no setting for that.
- SerializableCallable and what is in a function of torch.compile(...).aot_compile, which keeps a trace in a file: it
  leaves out guards that cannot be kept, modules that it names by their address, and checking the traced source.
- Guards and how they name what they look at: what a trace depends on is found nowhere else.
- Fake tensors, by which the shapes of results are found without computing them.
- pytree, decompositions: the public modules of those have no function for it.
"""

import builtins
import contextlib
import importlib
import inspect
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._decomp import get_decompositions
from torch._dynamo import aot_compile_types, trace_rules
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.guards import CheckFunctionManager, _get_closure_vars
from torch._dynamo.package import _hash_sourcelines
from torch._dynamo.source import get_local_source_name
from torch._functorch._aot_autograd.schemas import OutputType
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree

# What a graph that is kept in a file must be.
SerializableCallable = aot_compile_types.SerializableCallable
OPERATORS = torch._ops.OpOverload | torch._ops.OpOverloadPacket
# The results of a graph that the function returns as they are, and not as views of something else.
_PLAIN_OUTPUTS = (OutputType.non_alias, OutputType.unsafe_view_alias, OutputType.custom_function_view)
# Names that dynamo adds to a function's globals; an address or a counter may stand in them.
_ADDED_GLOBAL = re.compile(r"G\['((?:__import_|__builtins_dict__|___|_\d+_c\d+)\w*)'\]")
_REFERENCES = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)
# What nested_compile_region's function has around a function, and where it holds that.
WRAPPED = ".__closure__[0].cell_contents"
# How each kind of guard looks at the value that it names; those not listed look at the value itself.
_LOOKS = {
    "DICT_CONTAINS": "{key} in {name}",
    "DICT_KEYS_MATCH": "tuple({name})",
    "DICT_NOT_CONTAINS": "{key} in {name}",
    "EMPTY_NN_MODULE_HOOKS_DICT": "len({name})",
    "FAKE_SCRIPT_TYPE_MATCH": "type({name})",
    "HASATTR": "hasattr({name}, {attr!r})",
    "MAPPING_KEYS_CHECK": "tuple({name})",
    "NOT_NONE_MATCH": "{name} is None",
    "NOT_PRESENT_IN_GENERIC_DICT": "{attr!r} in {name}.__dict__",
    "SEQUENCE_LENGTH": "(type({name}), len({name}))",
    "SET_CONTAINS": "{key} in {name}",
    "SET_NOT_CONTAINS": "{key} in {name}",
    "TYPE_MATCH": "type({name})",
}


# Tracing a graph.


def find_decompositions(operators: Sequence[Any]) -> dict[Any, Any]:
    """Return torch's functions that take the operators apart, for those that it has."""
    table: dict[Any, Any] = get_decompositions(operators)
    return table


@contextlib.contextmanager
def disable_python_kernels(operators: Iterable[Any]) -> Iterator[None]:
    """Take torch's Python decompositions away from the operators while a graph is traced."""
    saved = {each: each.py_kernels.copy() for each in operators}
    try:
        for each in saved:
            each.py_kernels.clear()
            each._dispatch_cache.clear()
        yield
    finally:
        for each, kernels in saved.items():
            each.py_kernels.clear()
            each.py_kernels.update(kernels)
            each._dispatch_cache.clear()


@contextlib.contextmanager
def replace_python_kernel(operator: Any, kernel: Callable[..., Any]) -> Iterator[None]:
    """Have an operator that torch takes apart itself taken apart by this function while a graph is traced."""
    with disable_python_kernels([operator]):
        for key in (torch._C.DispatchKey.Autograd, torch._C.DispatchKey.CompositeImplicitAutograd):
            operator.py_kernels[key] = kernel
        yield


def read_dimension(size: int | torch.SymInt) -> Any:
    """Return a size as a number, or as an expression where it is free: comparing sizes themselves would fix them."""
    return size if isinstance(size, int) else size.node.expr


def trace_inference(
    graph: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    compile_traced: Callable[[torch.fx.GraphModule], Callable[..., Any]],
    *,
    refuse_training: Callable[..., Any],
    decompositions: dict[Any, Any],
) -> Callable[..., Any]:
    """Trace a graph of dynamo's to one without changes in place, and have it compiled.

    Returns:
        What `compile_traced` returned, with what torch puts around it for changed inputs and views.
    """

    def compile_inference(traced: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        with unset_fake_temporarily():  # the weights are real
            compiled = compile_traced(traced)

        def run(arguments: list[Any]) -> Any:
            return compiled(*arguments)

        run._boxed_call = True  # type: ignore[attr-defined]  # aot_autograd then passes its arguments as one list
        return run

    compiler = aot_autograd(
        fw_compiler=refuse_training, inference_compiler=compile_inference, decompositions=decompositions
    )
    # torch's own cache of such graphs takes those of its Inductor only.
    with torch._functorch.config.patch(force_autograd_cache=False):
        return compiler(graph, example_inputs)


def find_static_inputs(graph: torch.fx.GraphModule) -> list[int]:
    """Return which inputs of dynamo's graph are parameters and buffers of the module."""
    placeholders = graph.graph.find_nodes(op="placeholder")
    return [
        index
        for index, node in enumerate(placeholders)
        if "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})
    ]


def find_changed_inputs() -> set[int]:
    """Return which inputs the graph changes that is traced just now."""
    return set(torch._guards.TracingContext.get().fw_metadata.mutated_inp_runtime_indices)


def has_plain_outputs() -> bool:
    """Tell whether the graph that is traced just now returns no views of its inputs or of other results."""
    metadata = torch._guards.TracingContext.get().fw_metadata
    return all(each.output_type in _PLAIN_OUTPUTS for each in metadata.output_info)


@contextlib.contextmanager
def keep_lengths_apart() -> Iterator[None]:
    """Let a trace suppose neither that two dynamic lengths are equal nor that one is not 1."""
    with torch.fx.experimental._config.patch(use_duck_shape=False, backed_size_oblivious=True):
        yield


def mark_dynamic(value: Any, axes: Any) -> Any:
    """Return a tensor, or a dictionary of such, with these axes marked as of any length; what is given stays as it is.

    Args:
        axes: numbers; for a dictionary those of each tensor by its key.
    """
    if isinstance(axes, Mapping):
        return {name: mark_dynamic(each, axes.get(name, ())) for name, each in value.items()}
    marked = value.detach() if axes else value
    for axis in _list_dynamic(value, axes):
        torch._dynamo.mark_dynamic(marked, axis)
    return marked


def drop_lengths(value: Any, axes: Any) -> Any:
    """Return a tensor, or a dictionary of such, of the same kind and of length 0 along these axes; see mark_dynamic."""
    if isinstance(axes, Mapping):
        return {name: drop_lengths(each, axes.get(name, ())) for name, each in value.items()}
    dynamic = _list_dynamic(value, axes)
    if not dynamic:
        return value
    return value.new_empty([0 if axis in dynamic else length for axis, length in enumerate(value.shape)])


def _list_dynamic(value: torch.Tensor, axes: Iterable[int]) -> list[int]:
    """Return the axes but those of length 1, which is no batch: OpenVINO computes pictures of 1×1 wrongly then."""
    return [axis for axis in axes if axis == 0 or value.shape[axis] != 1]


def flatten_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Any], str]:
    """Return the values in the arguments, and their structure in words."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    return leaves, str(structure)


def call_with_fakes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return what a function returns, with torch's fake tensors in the place of tensors: shapes without numbers."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return function(*args, **kwargs)


# Keeping a traced function.


def make_traceable(function: Callable[..., Any]) -> Any:
    """Return the function, or one around it where dynamo would put one of its own, whose globals are not ours to name.

    It does so for what torch itself has wrapped, such as with torch.no_grad().
    """
    if not trace_rules.check(function):
        return function

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def guard_hooks() -> Iterator[None]:
    """Have a trace depend on the hooks of modules, which dynamo takes as fixed."""
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        yield


def read_graph(function: Any) -> Any:
    """Return what the backend compiled for a function of aot_compile."""
    return function._artifacts.compiled_fn


def bind_arguments(function: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return a call's arguments by name, as guards look at them; raises TypeError when they do not fit."""
    return function.prepare_f_locals(*args, **kwargs)


def check_guards(function: Any, arguments: Mapping[str, Any]) -> bool:
    """Tell whether torch's guards hold that were kept with the function."""
    return bool(function._artifacts.guard_manager.check(arguments))


def save_function(function: Any, path: Path, *, namespace: Mapping[str, Any], external: Mapping[str, Any]) -> None:
    """Write a function of aot_compile to a file.

    Args:
        namespace: the globals of the function that was traced.
        external: objects by name that are not written but given again.
    """
    # Modules to which torch refers among the function's globals, under names that only this process knows.
    environment = function._artifacts.runtime_env
    for name in environment.external_refs:
        value = namespace.get(name)
        if inspect.ismodule(value):
            environment.import_sources[name] = value.__name__
    function.save_compiled_function(path, external_data=dict(external))


def load_function(path: Path, *, namespace: Mapping[str, Any], external: Mapping[str, Any]) -> Any:
    """Return the function that save_function wrote."""
    # Guards are made anew from what was kept. Reading it torch means to note what it imports in the trace under way.
    with path.open("rb") as stream, guard_hooks(), torch._guards.tracing(torch._guards.TracingContext(None)):
        return torch.compiler.load_compiled_function(stream, f_globals=dict(namespace), external_data=dict(external))


def find_changed_source(function: Any) -> str | None:
    """Return which of the source lines that torch traced have changed since, in words."""
    for source in function.source_info().inlined_sources:
        lines = (source.firstlineno, source.lastlineno)
        if _hash_sourcelines(importlib.import_module(source.module), *lines) != source.checksum:
            return f"lines {lines[0]} to {lines[1]} of {source.module}"
    return None


def list_traced_lines(function: Any) -> set[tuple[str, int]]:
    """Return the module and the first line of each function that was traced."""
    return {(source.module, source.firstlineno) for source in function.source_info().inlined_sources}


# Guards.


def is_keepable(guard: Any, enclosed: Iterable[str]) -> bool:
    """Tell whether a guard can be kept in a file: not one of an object's identity, of a global, of what is enclosed.

    Nor one of what torch's own modules hold, such as all that its pytree knows.
    """
    lost = set(CheckFunctionManager.UNSUPPORTED_SERIALIZATION_GUARD_TYPES)
    return not (
        guard.is_global
        or is_of_torch(guard)
        or lost & {guard.guard_type, *guard.derived_guard_types}
        or guard.orig_guard._unserializable
        or get_local_source_name(guard.orig_guard.originating_source) in enclosed
    )


def is_of_torch(guard: Any) -> bool:
    """Tell whether a guard looks at what torch itself holds; its version is looked at elsewhere."""
    return bool(guard.orig_guard.name.startswith("__import__('torch')"))


def find_by_reference(guards: Iterable[Any], namespace: Mapping[str, Any], arguments: Mapping[str, Any]) -> list[Any]:
    """Return the guards on what a class, a function or a module holds.

    In a file those stand by name: a kept guard then compares what they hold with itself.
    """
    scope = {**_get_closure_vars(), "G": namespace, "L": arguments}
    known: dict[str, bool] = {}

    def is_within(source: Any) -> bool:
        base = getattr(source, "base", None)
        if base is None:
            return False
        if base.name not in known:
            try:
                is_reference = isinstance(eval(base.name, scope), _REFERENCES)
            except Exception:  # a guard may tell that something is not there
                is_reference = False
            known[base.name] = is_reference or is_within(base)
        return known[base.name]

    return [guard for guard in guards if is_within(guard.orig_guard.originating_source)]


def find_wrappers(guards: Iterable[Any], namespace: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[int, str]:
    """Return by the ids of those guards that look through one the names of nested_compile_region's functions."""
    scope = {**_get_closure_vars(), "G": namespace, "L": arguments}
    found = {}
    for guard in guards:
        source = guard.orig_guard.originating_source if WRAPPED in guard.orig_guard.name else None
        while source is not None:
            wrapper = source.name.removesuffix(WRAPPED)
            if wrapper != source.name and hasattr(eval(wrapper, scope), "__marked_compile_region_fn__"):
                found[id(guard)] = wrapper
            source = getattr(source, "base", None)
    return found


def list_looks(guard: Any, namespace: Mapping[str, Any]) -> list[str]:
    """Return what a guard looks at as expressions of L, the arguments, G, the globals, and M, modules by name.

    Neither an address nor a counter of this process is in them, but for an object that dynamo has no other name for.
    """
    name = _name_modules(guard.orig_guard.name, namespace)
    if not name:
        return []
    about = dict(getattr(guard.orig_guard.create_fn, "keywords", {}))
    if "key" in about:
        about["key"] = _write_key(about["key"])
    if guard.guard_type == "DUPLICATE_INPUT":
        return [f"({name}) is ({_name_modules(about['source_b'].name, namespace)})"]
    if guard.guard_type == "CLOSURE_MATCH" and isinstance(guard.value, types.FunctionType):
        return [f"{name}.__code__"]
    if guard.guard_type == "TENSOR_MATCH":
        # The object too: a traced function has a copy of the globals, as they were when it was traced.
        parts = ", ".join(f"({name}).{each}" for each in ("dtype", "device", "requires_grad", "stride()"))
        return [name, f"({parts}, tuple(({name}).shape))"]
    look = _LOOKS.get(guard.guard_type)
    if look is None and "TYPE_MATCH" in guard.derived_guard_types and "ID_MATCH" not in guard.derived_guard_types:
        return [name, f"type({name})"]
    return [(look or "{name}").format(name=name, **about)]


def _write_key(key: Any) -> str:
    """Return a dictionary's key as an expression."""
    return f"M[{key.__module__!r}].{key.__qualname__}" if isinstance(key, type) else repr(key)


def make_scope(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Return the names by which the expressions of list_looks are evaluated, but for L."""
    return {**_get_closure_vars(), "G": namespace, "M": _Modules()}


class _Modules(dict[str, types.ModuleType]):
    """Modules by name, imported when they are asked for."""

    def __missing__(self, name: str) -> types.ModuleType:
        self[name] = importlib.import_module(name)
        return self[name]


def _name_modules(expression: str, namespace: Mapping[str, Any]) -> str:
    """Write modules that dynamo added to the globals by their own names."""

    def rename(match: re.Match[str]) -> str:
        value = namespace.get(match[1])
        if inspect.ismodule(value):
            return f"M[{value.__name__!r}]"
        return "M['builtins'].__dict__" if value is builtins.__dict__ else match[0]

    return _ADDED_GLOBAL.sub(rename, expression)
