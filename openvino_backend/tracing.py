"""Trace a module's method with torch.export to a graph and its compiled-in tensors."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export.graph_signature import InputKind, OutputKind

from openvino_backend.errors import OpenVINOBackendError
from openvino_backend.graph_passes import check_flat, copy_constants, write_out_sizes
from openvino_backend.lowering import add_out_of_place, find_composites, lower
from openvino_backend.torch_private import OPERATOR, is_mutable, keep_lengths_apart, pytree
from openvino_backend.weights import KnownWeights

# During a trace torch replaces weights, the call of every module, and the arithmetic of sizes, in all threads. So no
# other thread may change graphs meanwhile. Under load a start ended with "is not tracked with proxy".
trace_lock = threading.Lock()

_MUTATIONS = (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)


@dataclass(frozen=True)
class TracedGraph:
    """A graph traced by torch, with all that compiling it needs.

    Attributes:
        graph: operators that change no tensor in place.
        constants: the tensors compiled in, by node name.
        weight_ids: the ids of constants that are weights.
        weights: the traced module's weights, where they are known.
    """

    graph: torch.fx.GraphModule
    constants: Mapping[str, torch.Tensor]
    weight_ids: frozenset[int]
    weights: KnownWeights | None


class _Tensor:
    """Replaces a tensor in a structure."""


@dataclass(frozen=True)
class Structure:
    """Nested values, taken apart: where the tensors are, and the other values.

    Attributes:
        spec: the specification of torch's pytree.
        leaves: the values in their order, with a _Tensor for each tensor.
    """

    spec: Any
    leaves: list[Any]

    @classmethod
    def take_apart(cls, values: Any) -> tuple["Structure", list[torch.Tensor]]:
        """Return the structure of values and their tensors."""
        leaves, spec = pytree.tree_flatten(values)
        marked = [_Tensor() if isinstance(each, torch.Tensor) else each for each in leaves]
        return cls(spec, marked), [each for each in leaves if isinstance(each, torch.Tensor)]

    @classmethod
    def read(cls, values: Any) -> "Structure":
        """Return the structure of values with a _Tensor for each tensor."""
        leaves, spec = pytree.tree_flatten(values)
        return cls(spec, leaves)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the values: torch's own description is not made for that."""
        return Structure.read, (pytree.tree_unflatten(self.leaves, self.spec),)

    def fill(self, tensors: Sequence[torch.Tensor]) -> Any:
        """Return the values with these tensors."""
        rest = iter(tensors)
        leaves = [next(rest) if isinstance(each, _Tensor) else each for each in self.leaves]
        return pytree.tree_unflatten(leaves, self.spec)


class _Exported(torch.nn.Module):
    """A method's call as a module of tensors only, as torch.export takes it."""

    def __init__(
        self, module: torch.nn.Module, method: Any, arguments: Structure, keep: Callable[[Structure], None]
    ) -> None:
        super().__init__()
        self.module, self._method, self._arguments, self._keep = module, method, arguments, keep

    def forward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        args, kwargs = self._arguments.fill(tensors)
        structure, results = Structure.take_apart(self._method(self.module, *args, **kwargs))
        self._keep(structure)  # torch.export undoes changes of a module's attributes
        return results


def trace_method(
    module: torch.nn.Module,
    method: Any,
    arguments: Structure,
    tensors: Sequence[torch.Tensor],
    *,
    axes: Sequence[Sequence[int]],
    decompositions: Mapping[Any, Any],
    weights: KnownWeights,
) -> tuple[TracedGraph, Structure]:
    """Trace one call of a method.

    Args:
        axes: the dynamic axes of each tensor.
        decompositions: operators to decompose, with torch's functions for that.

    Returns:
        The graph, and the structure of the method's results.

    Raises:
        OpenVINOBackendError: torch cannot trace it, or it changes its input tensors.
    """
    results: list[Structure] = []
    call = _Exported(module, method, arguments, results.append)
    free = tuple({axis: torch.export.Dim.DYNAMIC for axis in each} for each in axes)
    try:
        with keep_lengths_apart():
            program = torch.export.export(call, tuple(tensors), dynamic_shapes={"tensors": free}, strict=False)
            table = dict(decompositions)
            add_out_of_place(program.graph)
            composites = find_composites(program.graph)
            if composites or table or _has_mutation(program.graph):
                known = torch.export.default_decompositions()
                table |= {each: known[each] for each in composites if each in known}
                program = program.run_decompositions(table)
    except Exception as error:
        raise OpenVINOBackendError(f"torch cannot trace {method.__qualname__}: {error}") from error
    changed = [each.target for each in program.graph_signature.output_specs if each.kind in _MUTATIONS]
    if changed:
        raise OpenVINOBackendError(
            f"the method changes {', '.join(map(str, changed))} in place, and CompiledFunction takes no such method; "
            "compile it with torch.compile(method, backend=OpenVINOBackend(...))"
        )
    if any(isinstance(each, torch.SymInt) for each in results[0].leaves):
        raise OpenVINOBackendError("the method returns a dynamic length; return a tensor that has it")
    graph = program.graph_module
    constants = {}
    for each in program.graph_signature.input_specs:
        if each.kind != InputKind.USER_INPUT:
            held = program.constants if each.target in program.constants else program.state_dict
            constants[each.arg.name] = held[each.target].detach()
    lower(graph.graph)
    copy_constants(graph.graph, constants)
    write_out_sizes(graph.graph)
    check_flat(graph)
    graph.recompile()
    weight_ids = frozenset(id(each) for each in constants.values() if weights.find_name(each))
    return TracedGraph(graph, constants, weight_ids, weights), results[0]


def _has_mutation(graph: torch.fx.Graph) -> bool:
    return any(isinstance(node.target, OPERATOR) and is_mutable(node.target) for node in graph.nodes)
