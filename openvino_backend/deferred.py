"""Deferred compilation: torch traces one call after the other, and OpenVINO compiles them in parallel."""

import contextlib
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import torch

from openvino_backend.torch_private import call_with_fakes, pytree

Result = TypeVar("Result")
# What makes a call ready. It stops where torch has done its part and OpenVINO's begins: from there on it may go on in
# another thread, during the first part of others.
Steps = Generator[None, None, Result]


class Function(Protocol):
    """What CompiledFunction has for this."""

    def describe_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what tells one kind of call from another."""

    def measure_weights(self) -> int:
        """Return the bytes of the module's weights."""

    def prepare(self, *args: Any, **kwargs: Any) -> Steps[Any]:
        """Have ready what such a call needs, without making it."""


# A function, and the arguments that it was called with, by place and by name.
Call = tuple[Function, tuple[Any, ...], dict[str, Any]]
_calls: list[Call] | None = None  # those of the block that is open


def defer(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Note a call to be made ready at the end of the block that is open; tell whether there is one."""
    if _calls is None:
        return False
    _calls.append((function, args, kwargs))
    return True


@contextlib.contextmanager
def compile_ahead() -> Iterator[None]:
    """Let all calls in the block return zeros, and have what they need ready at its end, several at the same time.

    OpenVINO compiles on one core. No call is made while something is traced: torch would take it for a part of that.

    Raises:
        OpenVINOBackendError: what stood in the way of one.
    """
    global _calls
    calls: list[Call] = []
    _calls = calls
    try:
        yield
    finally:
        _calls = None
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
    """Go on to the end, in whatever thread."""
    with torch.no_grad():
        while True:
            try:
                next(steps)
            except StopIteration as end:
                result: Result = end.value
                return result


class _Method(torch.nn.Module):
    """A method as the forward of a module, so that torch can call it with other weights."""

    def __init__(self, module: torch.nn.Module, method: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.method(self.module, *args, **kwargs)


def infer_shapes(method: Callable[..., Any], module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Return what a method of a module returns, but with zeros in its tensors: only their shapes are computed.

    With all tensors on the meta device that takes a third of the time of torch's fake tensors, which are left for
    methods that look at numbers, or that bring tensors of their own.
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
    """Return a structure with the same tensors without their numbers."""

    def strip(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    return pytree.tree_map_only(torch.Tensor, strip, values)
