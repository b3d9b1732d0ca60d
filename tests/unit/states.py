"""Modules with the same weights and the same source in two states; a trace of one is wrong for the other.

Run as a program it prints what each answers in one state: `python -m tests.unit.states STATE CACHE`.
"""

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import torch

from openvino_backend import CompiledFunction
from tests.unit import modules
from tests.unit.modules import measure_error

FACTOR = 2.0
TABLE = {"factor": 2.0}
SHIFT = torch.zeros(4)
X = torch.linspace(-1, 1, 12).view(3, 4)


class Base(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        torch.nn.init.eye_(self.linear.weight)


def times(x: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
    return x * factor


def make_times(factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def multiply(x: torch.Tensor) -> torch.Tensor:
        return x * factor

    return multiply


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def triple(x: torch.Tensor) -> torch.Tensor:
    return x * 3


class Act(Base):
    act: Callable[..., torch.Tensor] = staticmethod(torch.relu)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.linear(x))


class GlobalNumber(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * FACTOR


class GlobalTable(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * TABLE["factor"]


class GlobalTensor(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + SHIFT


class Default(Base):
    def forward(self, x: torch.Tensor, factor: float = 2.0) -> torch.Tensor:
        return times(self.linear(x)) * factor


class Keyword(Base):
    def forward(self, x: torch.Tensor, *, factor: float = 2.0) -> torch.Tensor:
        return self.linear(x) * factor


class ClassNumber(Base):
    factor = 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.factor


class ListAttribute(Base):
    def __init__(self) -> None:
        super().__init__()
        self.factors = [2.0, 1.0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for factor in self.factors:
            x = self.linear(x) * factor
        return x


class Patched(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return modules.shift(self.linear(x))


class WithoutGradients(Base):
    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * FACTOR


class PlainTensor(Base):
    def __init__(self) -> None:
        super().__init__()
        self.factors = torch.full((4,), 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.factors


class Helper:
    @classmethod
    def multiply(cls, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def multiply_thrice(_: type[Helper], x: torch.Tensor) -> torch.Tensor:
    return x * 3


class ClassMethod(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Helper.multiply(self.linear(x))


class Inner(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class Outer(Base):
    def __init__(self) -> None:
        super().__init__()
        self.linear = Inner(4, 4)
        torch.nn.init.eye_(self.linear.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def forward_thrice(self: Inner, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.Linear.forward(self, x) * 3


class Replaced(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def make_other(module: torch.nn.Module) -> torch.nn.Module:
    """Return a layer of a local class with the weights of another."""

    class Other(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) - 1

    other = Other(4, 4)
    other.load_state_dict(module.state_dict())
    return other


def make_enclosing(*, is_changed: bool) -> tuple[Base, Callable[[], None]]:
    """Return a module whose method encloses a number, a flag, a tensor and a function."""
    factor, flag, shift, act = 2.0, True, torch.zeros(4), double

    class Enclosing(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = act(self.linear(x)) * factor + shift
            return x if flag else -x

    def change() -> None:
        nonlocal factor, flag, shift, act
        factor, flag, shift, act = 3.0, False, torch.ones(4), triple

    if is_changed:
        change()
    return Enclosing(), change


def make_one_name(*, is_changed: bool) -> Base:
    """Return a module with a layer of one of two classes of one name."""
    if is_changed:

        class Layer(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * 3

    else:

        class Layer(torch.nn.Module):  # type: ignore[no-redef]
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * 2

    module = Replaced()
    module.linear = torch.nn.Sequential(module.linear, Layer())
    return module


def change_act(module: Any) -> None:
    module.act = torch.nn.functional.silu


def set_global(name: str, value: Any) -> None:
    globals()[name] = value


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "function as attribute": (Act, change_act),
    "nested function as attribute": (lambda: with_act(make_times(2.0)), lambda m: set_act(m, make_times(3.0))),
    "partial as attribute": (
        lambda: with_act(functools.partial(times, factor=2.0)),
        lambda m: set_act(m, functools.partial(times, factor=3.0)),
    ),
    "global number": (GlobalNumber, lambda _: set_global("FACTOR", 3.0)),
    "global table": (GlobalTable, lambda _: set_global("TABLE", {"factor": 3.0})),
    "table's entry": (GlobalTable, lambda _: TABLE.update(factor=5.0)),
    "global tensor": (GlobalTensor, lambda _: set_global("SHIFT", torch.ones(4))),
    "default of the method": (Default, lambda _: setattr(Default.forward, "__defaults__", (3.0,))),
    "default of a function": (Default, lambda _: setattr(times, "__defaults__", (5.0,))),
    "keyword's default": (Keyword, lambda _: setattr(Keyword.forward, "__kwdefaults__", {"factor": 3.0})),
    "class attribute": (ClassNumber, lambda _: setattr(ClassNumber, "factor", 3.0)),
    "list as attribute": (ListAttribute, lambda m: setattr(m, "factors", [3.0, 1.0])),
    "list's item": (ListAttribute, lambda m: m.factors.append(5.0)),
    "function of another module": (Patched, lambda _: setattr(modules, "shift", triple)),
    "method of a submodule's class": (Outer, lambda _: setattr(Inner, "forward", forward_thrice)),
    "number of a function that torch wraps": (WithoutGradients, lambda _: set_global("FACTOR", 3.0)),
    "tensor as attribute": (PlainTensor, lambda m: setattr(m, "factors", torch.full((4,), 3.0))),
    "class method": (ClassMethod, lambda _: setattr(Helper, "multiply", classmethod(multiply_thrice))),
    "hook": (Replaced, lambda m: m.linear.register_forward_hook(lambda module, args, output: output * 3)),
    "submodule of the same weights": (Replaced, lambda m: setattr(m, "linear", make_other(m.linear))),
}


def with_act(act: Any) -> Act:
    module = Act()
    set_act(module, act)
    return module


def set_act(module: Act, act: Any) -> None:
    module.act = act


def call(module: torch.nn.Module, function: CompiledFunction) -> float:
    """Return how far the compiled function is from the module."""
    return measure_error(function(X), module(X))


@torch.no_grad()
def call_all(*, is_changed: bool, cache: str) -> dict[str, tuple[float, bool]]:
    """Return for each module the error and whether it was traced."""
    made = {}
    for name, (make, change) in CHANGES.items():
        torch.manual_seed(0)
        made[name] = module = make()
        if is_changed:
            change(module)
    for name, make_module in (
        ("what is enclosed", lambda: make_enclosing(is_changed=is_changed)[0]),
        ("two classes of one name", lambda: make_one_name(is_changed=is_changed)),
    ):
        torch.manual_seed(0)
        made[name] = make_module()
    results = {}
    for name, module in made.items():
        options = {"model_caching": True, "cache_dir": f"{cache}/{name}", "config": {"INFERENCE_PRECISION_HINT": "f32"}}
        function = CompiledFunction(module.forward, options)
        results[name] = (call(module, function), function.backend.reports[0].traced)
    return results


if __name__ == "__main__":
    print(json.dumps(call_all(is_changed=sys.argv[1] == "changed", cache=sys.argv[2])))
