"""Blocks that are traced once: what comes of it is what each of them computes, also after a change of one."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from openvino_backend import CompiledFunction, backend
from openvino_backend.ahead import finish
from openvino_backend.function import _tracing
from openvino_backend.repeated import trace_once, write_out_regions
from tests.unit.modules import make_module, measure_error, shift
from tests.unit.test_function import make_options, print_before_and_after, read_origins

pytestmark = pytest.mark.usefixtures("inference")


class Block(torch.nn.Module):
    """A residual layer with a number and a function of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = torch.nn.LayerNorm(width), torch.nn.Linear(width, width)
        self.factor, self.bend = 2.0, torch.nn.functional.silu

    def forward(self, x: torch.Tensor, more: torch.Tensor | None = None, *, is_last: bool = False) -> torch.Tensor:
        x = x + self.factor * self.bend(self.linear(self.norm(x if more is None else x + more)))
        return x.sum(1) if is_last else x


class Tower(torch.nn.Module):
    """Blocks of two widths; every other one is given something more, and the last is called in another way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = torch.nn.ModuleList(Block(16) for _ in range(5))
        self.between = torch.nn.Linear(16, 8)
        self.narrow = torch.nn.ModuleList(Block(8) for _ in range(3))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index, block in enumerate(self.wide):
            x = block(x, x * 0.5) if index % 2 else block(x)
        x = self.between(x)
        for index, block in enumerate(self.narrow):
            x = block(x, is_last=index == 2)
        return x


def compile_tower(module: Tower, options: dict[str, Any]) -> CompiledFunction:
    return CompiledFunction(module.forward, options, {"x": (0, 1)}, repeated=["Block"])


@pytest.fixture
def regions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For each graph how many blocks torch has traced."""
    counts: list[int] = []

    def count(graph: torch.fx.GraphModule) -> None:
        calls = graph.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph)
        counts.append(len({call.args[0].target for call in calls}))
        write_out_regions(graph)

    monkeypatch.setattr(backend, "write_out_regions", count)
    return counts


def test_one_of_each_kind_is_traced(tmp_path: Path, regions: list[int]) -> None:
    module, method = Tower(), Block.forward
    function = compile_tower(module, make_options(tmp_path))
    for shape in ((2, 3, 16), (4, 7, 16), (2, 3, 16)):
        x = torch.randn(shape)
        assert measure_error(function(x), module(x)) < 1e-6
    assert regions == [3]  # of 8: the wide ones, those that are given more, the narrow ones
    assert Block.forward is method
    second = compile_tower(Tower(), make_options(tmp_path))
    assert torch.equal(second(x), function(x))
    assert read_origins(function) == [(True, [False])]
    assert read_origins(second) == [(False, [True])]


def hook(module: torch.nn.Module, _: Any, result: torch.Tensor) -> torch.Tensor:
    return result * 3


class Other(Block):
    def forward(self, x: torch.Tensor, more: torch.Tensor | None = None, *, is_last: bool = False) -> torch.Tensor:
        return super().forward(x, more, is_last=is_last) + 1


@pytest.mark.parametrize(
    "change",
    [
        lambda module: setattr(module.wide[3], "factor", 3.0),
        lambda module: setattr(module.wide[3], "bend", torch.nn.functional.gelu),
        lambda module: setattr(module.wide[2], "bend", shift),
        lambda module: setattr(module.wide[2].norm, "eps", 0.5),
        lambda module: setattr(module.narrow[1], "linear", make_module()[0].__class__(8, 8, bias=False)),
        lambda module: setattr(module.narrow[1], "__class__", Other),
        lambda module: module.wide[2].register_forward_hook(hook),
        lambda module: module.narrow[1].linear.register_forward_hook(hook),
    ],
    ids=["number", "function", "own function", "part's number", "part", "class", "hook", "part's hook"],
)
def test_another_block_in_another_state_is_traced_anew(tmp_path: Path, change: Callable[[Tower], Any]) -> None:
    x = torch.randn(2, 3, 16)
    compile_tower(Tower(), make_options(tmp_path))(x)
    module = Tower()
    change(module)
    with torch.no_grad():
        expected = module(x)
    function = compile_tower(module, make_options(tmp_path))
    assert measure_error(function(x), expected) < 1e-6
    assert measure_error(Tower()(x), expected) > 1e-3
    assert function.backend.reports[0].traced


def test_changed_source_is_traced_anew(tmp_path: Path) -> None:
    code = (
        "import sys, torch\n"
        "from openvino_backend import CompiledFunction\n"
        "class B(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x * 2\n"
        "module = torch.nn.Sequential(B(), B())\n"
        "options = {'model_caching': True, 'cache_dir': sys.argv[1]}\n"
        "function = CompiledFunction(module.forward, options, repeated=['B'])\n"
        "with torch.no_grad(): print(float(function(torch.ones(1))), function.backend.reports[0].traced)\n"
    )
    assert print_before_and_after(tmp_path, code) == [["4.0", "True"], ["4.0", "False"], ["9.0", "True"]]


def test_start_while_another_function_is_traced(tmp_path: Path) -> None:
    x, module = torch.randn(2, 3, 16), Tower()
    compile_tower(module, make_options(tmp_path))(x)
    second = compile_tower(Tower(), make_options(tmp_path))
    thread = threading.Thread(target=finish, args=(second.prepare(x),))
    with _tracing, trace_once(module.wide):
        thread.start()
        time.sleep(0.5)
    thread.join()
    assert read_origins(second) == [(False, [True])]


class Changing(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(1) * 2


class Choosing(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


@pytest.mark.parametrize("kind", [Changing, Choosing])
def test_graphs_in_the_graph_that_stay_are_refused(kind: type[torch.nn.Module]) -> None:
    class Copying(torch.nn.Sequential):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x * 1)

    function = CompiledFunction(Copying(kind(), kind()).forward, repeated=["Changing"])
    with pytest.raises(Exception, match="the graph holds graphs that (auto_functionalized|cond)"):
        function(torch.ones(3))
