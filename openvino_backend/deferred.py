"""Deferred compilation: torch traces calls one by one, and OpenVINO compiles them in parallel."""

import contextlib
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import torch

from openvino_backend.torch_private import call_with_fakes, pytree

Result = TypeVar("Result")
# Prepares a call. It yields between torch's part and OpenVINO's. Another thread may then continue it, while other calls
# are traced.
Steps = Generator[None, None, Result]


class Function(Protocol):
    """The methods of CompiledFunction that this module needs."""

    def describe_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return a description that all calls of one kind share."""

    def measure_weights(self) -> int:
        """Return the bytes of the module's weights."""

    def prepare(self, *args: Any, **kwargs: Any) -> Steps[Any]:
        """Prepare such a call without making it."""


# A function, its positional arguments and its keyword arguments.
Call = tuple[Function, tuple[Any, ...], dict[str, Any]]
# The calls of the open block. Other threads and tasks have none, so their calls are made.
_calls: ContextVar[list[Call] | None] = ContextVar("calls", default=None)


def defer(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Note a call to prepare at the end of the open block. Return whether a block is open."""
    calls = _calls.get()
    if calls is None:
        return False
    calls.append((function, args, kwargs))
    return True


@contextlib.contextmanager
def compile_ahead() -> Iterator[None]:
    """Let all calls in the block return zeros. At its end compile what they need, in parallel.

    Only calls in this context count. A greenlet or a thread has another one, unless it gets a copy of this one.
    OpenVINO compiles on one core. No call is made during a trace: torch would trace it too.

    Raises:
        OpenVINOBackendError: a call cannot be compiled; says why.
    """
    calls: list[Call] = []
    token = _calls.set(calls)
    try:
        yield
    finally:
        _calls.reset(token)
    # One of each kind.
    kinds = {
        (id(function), function.describe_call(args, kwargs)): (function, args, kwargs)
        for function, args, kwargs in calls
    }
    # The largest first: while OpenVINO compiles it, the others are traced.
    ordered = sorted(kinds.values(), key=lambda call: call[0].measure_weights(), reverse=True)
    with ThreadPoolExecutor() as pool:
        prepared = []
        for function, args, kwargs in ordered:
            steps = function.prepare(*args, **kwargs)
            with torch.no_grad():
                next(steps, None)
            prepared.append(pool.submit(finish, steps))
    for each in prepared:
        each.result()


def finish(steps: Steps[Result]) -> Result:
    """Run the steps to their end, in any thread."""
    with torch.no_grad():
        while True:
            try:
                next(steps)
            except StopIteration as end:
                result: Result = end.value
                return result


class _Method(torch.nn.Module):
    """A module whose forward is a method. torch can call it with other weights."""

    def __init__(self, module: torch.nn.Module, method: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.method(self.module, *args, **kwargs)


def infer_shapes(method: Callable[..., Any], module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Return what a method returns, with zeros in its tensors: only their shapes are computed.

    With all tensors on the meta device this takes a third of the time of torch's fake tensors. Fake tensors are left
    for methods that read numbers or bring their own tensors.
    """
    called = _Method(module, method)
    weights = dict(_strip([*called.named_parameters(), *called.named_buffers()]))
    try:
        with torch.device("meta"):
            result = torch.func.functional_call(called, weights, *_strip((args, kwargs)))
    except (NotImplementedError, RuntimeError):
        result = call_with_fakes(method, module, *args, **kwargs)
    return pytree.tree_map_only(torch.Tensor, lambda each: torch.zeros(each.shape, dtype=each.dtype), result)


def _strip(values: Any) -> Any:
    """Replace each tensor in a structure by one without numbers."""

    def strip(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    return pytree.tree_map_only(torch.Tensor, strip, values)
