"""Calls that are made ready before they are made: torch traces one after the other, OpenVINO compiles beside it."""

import contextlib
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import torch

Result = TypeVar("Result")
# What makes a call ready. It stops where torch has done its part and OpenVINO's begins: from there on it may go on in
# another thread, beside the first part of others.
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


def put_off(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
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
    # One of each kind: while another is traced, torch's checks of a trace may not see that it holds.
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
