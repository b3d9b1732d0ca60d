"""A kept graph is used where all that its key is made of is as it was, and nowhere else."""

import copy
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import transformers

from openvino_backend import CompiledFunction
from openvino_backend.fingerprint import Describer
from tests.unit.modules import measure_error
from tests.unit.test_function import compute_before_and_after, make_options
from tools.server import ROOT

pytestmark = pytest.mark.usefixtures("inference")


class Act(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu()


class SameAct(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu()


class Processor:
    """An object that is no module, such as diffusers' processors of attention."""

    factor = 1.0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class Layer(torch.nn.Module):
    """A layer with all that a key is made of."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.act = torch.nn.Linear(4, 4), Act()
        self.factor, self.factors, self.table = 2.0, [1.0], {"shift": torch.zeros(4)}
        self.processor, self.bend = Processor(), functools.partial(torch.mul, other=1.0)
        self.config = transformers.CLIPTextConfig(hidden_size=16, num_attention_heads=1)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor, *, more: Any = None, twice: bool = False) -> torch.Tensor:
        y = self.bend(self.processor(self.act(self.linear(x)))) * self.factor * self.factors[0] + self.table["shift"]
        y = y + self.config.hidden_size if more is None else y + more["shift"]
        return y * 2 if twice else y

    def compute_twice(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward(x) * 2


def make_enclosing(factor: float) -> Callable[..., torch.Tensor]:
    def enclosing(self: Layer, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * factor

    return enclosing


def triple(module: torch.nn.Module, _: Any, result: torch.Tensor) -> torch.Tensor:
    return result * 3


def no_change(_: Layer) -> None:
    pass


X = torch.linspace(-1, 1, 12).view(3, 4)
# Changes of the module.
CHANGES: dict[str, Callable[[Layer], Any]] = {
    "weight's value": lambda m: m.linear.weight.mul_(2),
    "class name": lambda m: setattr(m, "act", SameAct()),
    "tree": lambda m: setattr(m, "act", torch.nn.Sequential(m.act)),
    "number": lambda m: setattr(m, "factor", 3.0),
    "kind of number": lambda m: setattr(m, "factor", 2),
    "list": lambda m: m.factors.insert(0, 5.0),
    "tensor in a table": lambda m: m.table.update(shift=torch.ones(4)),
    "object's number": lambda m: setattr(m.processor, "factor", 3.0),
    "partial": lambda m: setattr(m, "bend", functools.partial(torch.mul, other=2.0)),
    "function": lambda m: setattr(m, "bend", torch.sin),
    "own function": lambda m: setattr(m, "bend", lambda x: x - 1),
    "hook": lambda m: m.linear.register_forward_hook(triple),
    "training": lambda m: m.eval(),
    "configuration": lambda m: setattr(m.config, "hidden_size", 32),
}
# Changes of the function and of the call: what is compiled, with options, and called with.
CALLS: dict[str, dict[str, Any]] = {
    "method": {"method": Layer.compute_twice},
    "what the method encloses": {"method": make_enclosing(3.0)},
    "structure": {"keywords": {"more": {"shift": torch.ones(4)}}},
    "argument's value": {"keywords": {"twice": True}},
    "argument's type": {"x": X.double()},
    "argument's shape": {"x": X[:2]},
    "free axes": {"dynamic_shapes": {"x": (0,)}},
    "option": {"config": {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "THROUGHPUT"}},
}
OTHERS: dict[str, tuple[str, Any]] = {
    "package version": ("transformers.__version__", "0"),
    "torch's version": ("torch.__version__", "0"),
    "OpenVINO's version": ("openvino.get_version", lambda: "0"),
    "CPU flag": ("openvino_backend.cache.read_flags", lambda: frozenset({"avx2", "none_such"})),
}


def is_traced(
    folder: Path,
    change: Callable[[Layer], Any] = no_change,
    *,
    method: Any = Layer.forward,
    x: torch.Tensor = X,
    keywords: dict[str, Any] | None = None,
    **about: Any,
) -> bool:
    """Tell whether a changed module's method is traced; check what it computes."""
    module = Layer()
    change(module)
    if x.dtype != torch.float32:
        module.to(x.dtype)
    bound, config = MethodType(method, module), about.pop("config", {"INFERENCE_PRECISION_HINT": "f32"})
    function = CompiledFunction(bound, make_options(folder, config=config), **about)
    assert measure_error(function(x, **keywords or {}), bound(x, **keywords or {})) < 1e-6
    return function.backend.reports[0].traced


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the graph of the layer without a change."""
    folder = tmp_path_factory.mktemp("kept")
    with torch.no_grad():
        for method in (Layer.forward, make_enclosing(2.0)):
            assert is_traced(folder, method=method)
    return folder


@pytest.mark.parametrize("method", [Layer.forward, make_enclosing(2.0)], ids=lambda method: method.__name__)
def test_what_is_unchanged_hits_the_cache(kept: Path, method: Any) -> None:
    assert not is_traced(kept, method=method)


@pytest.mark.parametrize("name", [*CHANGES, *CALLS, *OTHERS])
def test_changed_ingredient_misses_the_cache(kept: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no entry of another change is taken for it."""
    if name in OTHERS:
        monkeypatch.setattr(*OTHERS[name])
    assert is_traced(kept, CHANGES.get(name, no_change), **CALLS.get(name, {}))


def test_changed_source_file_misses_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has changed is no part of the class, but a function in its file."""
    code = (
        "import torch\n"
        "def scale(x):\n"
        "    return x * 2\n"
        "class M(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return scale(x)\n"
        "def make_module():\n"
        "    return torch.nn.Sequential(M(), M())\n"
    )
    assert compute_before_and_after(tmp_path, monkeypatch, code) == [(4.0, True), (4.0, False), (9.0, True)]


def test_what_is_no_ingredient_hits(tmp_path: Path) -> None:
    """Names of folders, numbers of hooks, and the order of a set are of one process, or of one machine."""

    def change(module: Layer) -> None:
        module.config.name_or_path = "/elsewhere"
        torch.nn.Linear(1, 1).register_forward_hook(triple)  # takes a number
        module.linear.register_forward_hook(triple)

    assert is_traced(tmp_path, lambda module: module.linear.register_forward_hook(triple))
    assert not is_traced(tmp_path, change)


PARTS = """
import sys
from pathlib import Path
import torch
from openvino_backend import CompiledFunction
from openvino_backend.fingerprint import compute_fingerprint
from sdxl_server.model.families import FAMILIES
from sdxl_server.model.diffusers_pipeline import load_diffusers_pipeline

folder, cache, *names = sys.argv[1:]
pipeline = load_diffusers_pipeline(Path(folder), "float32", FAMILIES["sdxl"])
for name in names:
    module, traced = getattr(pipeline, name), None
    if name.startswith("text"):  # transformers hooks up the hidden states at the first call
        function = CompiledFunction(module.forward, {"model_caching": True, "cache_dir": cache})
        with torch.no_grad():
            module(torch.zeros(1, 1, dtype=torch.long), output_hidden_states=True)
            function(torch.zeros(1, 77, dtype=torch.long), output_hidden_states=True)
        traced = function.backend.reports[0].traced
    print(name, compute_fingerprint(module, type(module).forward), traced)
"""


def test_parts_of_a_pipeline_are_the_same_in_each_process(tiny_model: Path, tmp_path: Path) -> None:
    """From another folder too. diffusers makes them in the order of a set, which these two numbers turn round."""
    elsewhere = shutil.copytree(tiny_model, tmp_path / "elsewhere")
    names = ["unet", "vae", "text_encoder", "text_encoder_2"]
    printed = []
    for seed, folder, order in (("1", tiny_model, names), ("4", elsewhere, names[::-1])):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", PARTS, str(folder), str(tmp_path / "cache"), *order]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        printed.append({tuple(line.split()[:2]): line.split()[2] for line in done.stdout.splitlines()})
    first, second = printed
    assert len(first) == 4
    assert first.keys() == second.keys()
    assert sorted(first.values()) == ["None", "None", "True", "True"]
    assert sorted(second.values()) == ["False", "False", "None", "None"]


def test_descriptions_hold_no_address() -> None:
    values = [
        *(object(), torch.nn.Linear(1, 1), [object()], functools.partial(print, object()), lambda: None),
        *({1: object()}, Processor(), Processor().__call__, {object}, torch.ones(2)),
    ]
    for each in values:
        assert "0x" not in Describer().describe(each)
        assert Describer().describe(each) == Describer().describe(copy.deepcopy(each))


def test_objects_as_arguments_share_an_entry(tmp_path: Path) -> None:
    class Adding(torch.nn.Module):
        def forward(self, x: torch.Tensor, other: Any) -> torch.Tensor:
            return x + other.factor

    others = [Processor() for _ in range(2)]
    traced = []
    for factor, other in zip((1.0, 2.0, 2.0), (others[0], *others), strict=True):
        other.factor = factor
        function = CompiledFunction(Adding().forward, make_options(tmp_path))
        assert float(function(torch.ones(1), other)) == 1 + factor
        traced.append(function.backend.reports[0].traced)
    assert traced == [True, True, False]
