"""All of PyTorch's own inside that this package uses; written for PyTorch 2.13, to be read again for another.

- aot_autograd and its cache's setting: what torch.compile hands to a backend still has changes in place.
- The traced graph's metadata: only there stands which inputs the function changes.
- An operator's Python kernels: while they are there, tracing takes it apart, and there is no setting for that.
- What an operator is made of, and the settings of free lengths: torch.export has no public name for these.
- Fake tensors, by which the shapes of results are found without computing them.
- pytree, decompositions: the public modules of those have no function for it.
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
    """Let a trace assume neither that two free lengths are equal nor that one is not 1."""
    with torch.fx.experimental._config.patch(use_duck_shape=False, backed_size_oblivious=True):
        yield


def is_composite(operator: Any) -> bool:
    """Tell whether torch defines an operator by others only."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "CompositeImplicitAutograd"))


def is_mutable(operator: Any) -> bool:
    """Tell whether an operator changes a tensor that it is given."""
    return bool(operator._schema.is_mutable)


def read_dimension(size: int | torch.SymInt) -> Any:
    """Return a size as a number, or as an expression where it is free: comparing sizes themselves would fix them."""
    return size if isinstance(size, int) else size.node.expr


def find_decompositions(operators: Sequence[Any]) -> dict[Any, Any]:
    """Return torch's functions that take the operators apart, for those that it has."""
    table: dict[Any, Any] = get_decompositions(operators)
    return table


def call_with_fakes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return what a function returns for torch's fake tensors: shapes without numbers."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return function(*args, **kwargs)


# Tracing a graph of torch.compile.


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
    """Let this function take an operator apart, in the place of torch's own, while a graph is traced."""
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
