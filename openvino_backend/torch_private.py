"""All private parts of PyTorch that this package uses. Written for PyTorch 2.13; check them for another version.

* aot_autograd and its cache's setting: graphs from torch.compile still have changes in place.
* The traced graph's metadata: only this shows which inputs the function changes.
* An operator's Python kernels: with them tracing decomposes it, and no setting stops that.
* An operator's definition, and the settings of dynamic lengths: torch.export has no public name for these.
* Fake tensors: they give the shapes of results without computing them.
* pytree, decompositions: their public modules have no such function.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch._decomp import get_decompositions
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils import _pytree as pytree

__all__ = ["pytree"]

OPERATOR = torch._ops.OpOverload


# Tracing with torch.export.


@contextlib.contextmanager
def keep_lengths_apart() -> Iterator[None]:
    """Let a trace assume nothing of dynamic lengths: two may differ, and one may be 1."""
    with torch.fx.experimental._config.patch(use_duck_shape=False, backed_size_oblivious=True):
        yield


def is_composite(operator: Any) -> bool:
    """Return whether torch defines an operator by others only."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd"))


def is_mutable(operator: Any) -> bool:
    """Return whether an operator changes one of its inputs."""
    return bool(operator._schema.is_mutable)


def read_dimension(size: int | torch.SymInt) -> Any:
    """Return a size as a number, or as an expression if dynamic. Comparing sizes themselves would fix them."""
    return size if isinstance(size, int) else size.node.expr


def find_decompositions(operators: Sequence[Any]) -> dict[Any, Any]:
    """Return torch's decompositions of the operators, where it has them."""
    table: dict[Any, Any] = get_decompositions(operators)
    return table


def call_with_fakes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function with torch's fake tensors: shapes without numbers."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return function(*args, **kwargs)


# Tracing a graph of torch.compile.


@contextlib.contextmanager
def disable_python_kernels(operators: Iterable[Any]) -> Iterator[None]:
    """Remove torch's Python decompositions of the operators during a trace."""
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
    """Let this function decompose an operator during a trace, instead of torch's own."""
    with disable_python_kernels([operator]):
        for key in (torch._C.DispatchKey.Autograd, torch._C.DispatchKey.CompositeImplicitAutograd):
            operator.py_kernels[key] = kernel
        yield


def trace_inference(
    graph: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    compile_traced: Callable[[torch.fx.GraphModule], Callable[..., Any]],
    *,
    refuse_training: Callable[..., Any],
    decompositions: dict[Any, Any],
) -> Callable[..., Any]:
    """Trace a graph from dynamo to one without changes in place, and compile it.

    Returns:
        The result of `compile_traced`. torch wraps it for changed inputs and views.
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
    # torch's own cache of such graphs takes Inductor's only.
    with torch._functorch.config.patch(force_autograd_cache=False):
        return compiler(graph, example_inputs)


def find_static_inputs(graph: torch.fx.GraphModule) -> list[int]:
    """Return which inputs of dynamo's graph are the module's parameters and buffers."""
    placeholders = graph.graph.find_nodes(op="placeholder")
    return [
        index
        for index, node in enumerate(placeholders)
        if "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})
    ]


def find_changed_inputs() -> set[int]:
    """Return which inputs the graph being traced changes."""
    return set(torch._guards.TracingContext.get().fw_metadata.mutated_inp_runtime_indices)
