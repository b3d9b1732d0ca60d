"""CompiledFunction: what is traced once is neither traced nor converted at the next start, and stays right."""

import asyncio
import importlib
import pkgutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.modeling_outputs import BaseModelOutput

from openvino_backend import CompiledFunction, compile_ahead
from openvino_backend.deferred import infer_shapes
from openvino_backend.models import CompiledModel
from tests.unit.modules import Bessel, TimeEmbedding, make_module, measure_error, needs_bf16

pytestmark = pytest.mark.usefixtures("inference")


class Table(torch.nn.Module):
    """Numbers that stand in the code beside a weight, one output of two, keywords, a dictionary, a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.factor = 2.0

    def forward(self, x: torch.Tensor, *, more: dict[str, torch.Tensor], twice: bool = False) -> dict[str, Any]:
        table = torch.tensor([0.5, 1.0, 1.5, 2.0])
        y = self.linear(x * table) * self.factor + more["shift"]
        return {"y": y * 2 if twice else y, "sum": x.sum(), "name": "table"}


def make_options(folder: Path, **options: Any) -> dict[str, Any]:
    return {"model_caching": True, "cache_dir": str(folder), **options}


def read_origins(function: CompiledFunction) -> list[tuple[bool, list[bool]]]:
    """Return for each graph whether torch traced it, and for each of its models whether it was cached."""
    return [(graph.traced, [model.loaded_from_cache for model in graph.models]) for graph in function.backend.reports]


def test_second_start_neither_traces_nor_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = make_module(), torch.randn(4, 16)
    expected_by_torch = module(x)
    module.forward = first = CompiledFunction(module.forward, make_options(tmp_path))
    expected = module(x)
    assert measure_error(expected, expected_by_torch) < 1e-6
    assert read_origins(first) == [(True, [False])]

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("torch traces again")

    monkeypatch.setattr("torch.export.export", refuse)
    monkeypatch.setattr("openvino_backend.compiling.convert_graph", refuse)
    second = CompiledFunction(make_module().forward, make_options(tmp_path))
    assert torch.equal(second(x), expected)
    assert read_origins(second) == [(False, [True])]


def test_numbers_in_the_code_and_arguments_by_keyword(tmp_path: Path) -> None:
    module, x = Table(), torch.randn(3, 4)
    for is_traced in (True, False):
        function = CompiledFunction(module.forward, make_options(tmp_path))
        for twice in (False, True):
            arguments = {"more": {"shift": torch.randn(4)}, "twice": twice}
            result, expected = function(x, **arguments), module(x, **arguments)
            assert list(result) == list(expected)
            assert result["name"] == "table"
            assert measure_error(result["y"], expected["y"]) < 1e-6
            assert measure_error(result["sum"], expected["sum"]) < 1e-6
        assert [traced for traced, _ in read_origins(function)] == [is_traced] * 2


def test_output_class_of_transformers(tmp_path: Path) -> None:
    class Encoder(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> BaseModelOutput:
            y = super().forward(x)
            return BaseModelOutput(last_hidden_state=y, hidden_states=(x + 1, y + 1))

    module, x = Encoder(4, 4), torch.randn(3, 4)
    expected = module(x)
    for is_traced in (True, False):
        function = CompiledFunction(module.forward, make_options(tmp_path))
        result = function(x)
        assert isinstance(result, BaseModelOutput)
        assert measure_error(result.last_hidden_state, expected.last_hidden_state) < 1e-6
        assert torch.equal(result.hidden_states[0], x + 1)
        assert function.backend.reports[0].traced is is_traced
        for name in [name for name in globals() if name.startswith("___module")]:
            del globals()[name]  # as in a new process


def test_other_weights_have_entries_of_their_own(tmp_path: Path) -> None:
    x = torch.randn(4, 16)
    for seed, is_traced in ((0, True), (1, True), (0, False), (1, False)):
        module = make_module(seed=seed)
        function = CompiledFunction(module.forward, make_options(tmp_path))
        assert measure_error(function(x), module(x)) < 1e-6
        assert function.backend.reports[0].traced is is_traced


class Factors(torch.nn.Module):
    """Numbers from a tuple, made a tensor in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.factors = (1.0, 2.0, 3.0, 4.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * torch.tensor(self.factors)


def test_tensor_that_the_code_makes_is_no_other_states(tmp_path: Path) -> None:
    module, x = Factors(), torch.randn(3, 4)
    for factors in ((1.0, 2.0, 3.0, 4.0), (5.0, 6.0, 7.0, 8.0)):
        module.factors = factors
        function = CompiledFunction(module.forward, make_options(tmp_path))
        assert measure_error(function(x), module(x)) < 1e-6
        assert read_origins(function) == [(True, [False])]


class Pair(torch.nn.Module):
    """Two layers in one order or the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.is_swapped = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(self.b(x)) if self.is_swapped else self.b(self.a(x))


def test_compressed_weights_are_no_other_states(tmp_path: Path) -> None:
    """They are kept in the file, and not bound to the module's weights again."""
    module, x = Pair(), torch.randn(3, 64)
    for module.is_swapped in (False, True):
        options = make_options(tmp_path, weight_compression="int8_sym", config={"INFERENCE_PRECISION_HINT": "f32"})
        function = CompiledFunction(module.forward, options)
        assert measure_error(function(x), module(x)) < 0.02


class Tied(torch.nn.Module):
    """A square weight, and a view of it that begins at the same place and has the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4, 4), requires_grad=False)
        self.register_buffer("turned", self.weight.data.t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight + 1) @ self.turned


def test_views_of_one_weight_are_told_apart(tmp_path: Path) -> None:
    module, x = Tied(), torch.randn(3, 4)
    for is_traced in (True, False):
        function = CompiledFunction(module.forward, make_options(tmp_path))
        assert measure_error(function(x), module(x)) < 1e-6
        assert function.backend.reports[0].traced is is_traced


def compute_before_and_after(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> list[tuple[float, bool]]:
    """Return what a module computes, and whether torch traced it, at two starts and at one with `x * 3` for `x * 2`.

    Args:
        code: it defines `make_module()`. Each start imports it anew, from a folder of its own.
    """
    computed = []
    for start, text in enumerate((code, code, code.replace("x * 2", "x * 3"))):
        path = folder / f"{start}/changing.py"
        path.parent.mkdir()
        path.write_text(text)
        with monkeypatch.context() as patch:
            patch.syspath_prepend(path.parent)
            patch.delitem(sys.modules, "changing", raising=False)
            module = importlib.import_module("changing").make_module()
            function = CompiledFunction(module.forward, make_options(folder / "cache"))
            computed.append((float(function(torch.ones(1))), function.backend.reports[0].traced))
    return computed


def test_changed_source_is_traced_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import torch\nclass M(torch.nn.Module):\n    def forward(self, x):\n        return x * 2\nmake_module = M\n"
    assert compute_before_and_after(tmp_path, monkeypatch, code) == [(2.0, True), (2.0, False), (3.0, True)]


def test_damaged_function_is_traced_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module, x = make_module(), torch.randn(4, 16)
    CompiledFunction(module.forward, make_options(tmp_path))(x)
    (kept,) = tmp_path.glob("*/function.bin")
    kept.write_bytes(kept.read_bytes()[:-10])
    function = CompiledFunction(module.forward, make_options(tmp_path))
    assert measure_error(function(x), module(x)) < 1e-6
    assert read_origins(function) == [(True, [True])]  # the model beside it is whole
    assert "is damaged or unfinished" in caplog.text


def test_vanished_model_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module, x = make_module(), torch.randn(4, 16)
    CompiledFunction(module.forward, make_options(tmp_path))(x)
    (model,) = tmp_path.glob("*/model.xml")
    for path in model.parent.iterdir():
        path.unlink()
    function = CompiledFunction(module.forward, make_options(tmp_path))
    assert measure_error(function(x), module(x)) < 1e-6
    assert read_origins(function) == [(True, [False])]
    assert "does not fit and is made anew" in caplog.text


@needs_bf16
@pytest.mark.parametrize("compression", [None, "int8_sym"])
def test_short_and_compressed_weights_come_back(tmp_path: Path, compression: str | None) -> None:
    module, time = TimeEmbedding().half(), torch.tensor([981.0, 777.0])
    results = []
    for _ in range(2):
        options = make_options(tmp_path, config={"INFERENCE_PRECISION_HINT": "bf16"})
        function = CompiledFunction(
            module.forward, options | ({"weight_compression": compression} if compression else {})
        )
        results.append(function(time))
    assert read_origins(function) == [(False, [True, True])]
    assert [model.precision for model in function.backend.reports[0].models] == ["f32", "bf16"]
    assert torch.equal(*results)


def test_operators_outside_come_back(tmp_path: Path) -> None:
    module, x = Bessel(), torch.randn(4, 16)
    for is_traced in (True, False):
        function = CompiledFunction(module.forward, make_options(tmp_path, strict=False))
        assert measure_error(function(x), module(x)) < 1e-6
        (report,) = function.backend.reports
        assert (report.traced, report.operators_outside) == (is_traced, ("aten.special_bessel_j0.default",))


def test_without_caching_nothing_is_written(tmp_path: Path) -> None:
    module, x = make_module(), torch.randn(4, 16)
    function = CompiledFunction(module.forward, {"cache_dir": str(tmp_path / "cache")})
    assert measure_error(function(x), module(x)) < 1e-6
    assert not (tmp_path / "cache").exists()


def test_each_kind_of_call_is_compiled_once_and_bounded() -> None:
    module = make_module()
    function = CompiledFunction(module.forward, {"max_graphs": 2})
    for rows in (2, 3, 2, 3):
        x = torch.randn(rows, 16)
        assert measure_error(function(x), module(x)) < 1e-6
    assert len(function.backend.reports) == 2
    with pytest.raises(Exception, match="fewer different shapes, or raise the option 'max_graphs'"):
        function(torch.randn(4, 16))
    function(torch.randn(2, 16))


def test_calls_ahead_return_zeros_and_leave_nothing_to_compile() -> None:
    module, x, more = Table(), torch.randn(3, 4), {"shift": torch.randn(4)}
    function = CompiledFunction(module.forward)
    with compile_ahead():
        result = function(x, more=more)
    assert (result["y"].shape, float(result["y"].abs().sum()), result["name"]) == (x.shape, 0, "table")
    assert read_origins(function) == [(True, [False])]
    assert measure_error(function(x, more=more)["y"], module(x, more=more)["y"]) < 1e-6
    assert len(function.backend.reports) == 1


def test_calls_ahead_are_those_of_the_block_alone() -> None:
    """Another thread and another task make their calls, and an inner block leaves the outer one open."""
    module, x = make_module(), torch.randn(4, 16)
    function, expected = CompiledFunction(module.forward), module(x)

    async def call_in_a_task() -> torch.Tensor:
        go_on = asyncio.Event()
        task = asyncio.create_task(call_later(go_on))
        with compile_ahead():
            go_on.set()
            return await task

    async def call_later(go_on: asyncio.Event) -> torch.Tensor:
        await go_on.wait()
        return function(x)

    with ThreadPoolExecutor(1) as pool, compile_ahead():
        assert measure_error(pool.submit(function, x).result(), expected) < 1e-6
        assert not function(x).any()
        with compile_ahead():
            assert not function(x).any()
        assert not function(x).any()
    assert measure_error(asyncio.run(call_in_a_task()), expected) < 1e-6
    assert len(function.backend.reports) == 1


class Reading(torch.nn.Module):
    """Its method looks at a number, or has a tensor that is none of its weights, as torch's meta device has none."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.shift = kind, torch.ones(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[: torch.tensor(2).item()] if self.kind == "number" else x + self.shift


@pytest.mark.parametrize("kind", ["number", "tensor"])
def test_results_are_imitated_of_what_the_meta_device_cannot_compute(kind: str) -> None:
    module, x = Reading(kind), torch.randn(3, 4)
    result = infer_shapes(Reading.forward, module, x)
    assert (result.shape, result.device.type) == (module(x).shape, "cpu")
    assert not result.any()


@pytest.mark.parametrize("is_kept", [False, True])
def test_models_of_calls_ahead_are_compiled_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_kept: bool
) -> None:
    modules, x = [make_module(seed=seed) for seed in range(2)], torch.randn(4, 16)
    for module in modules if is_kept else ():
        CompiledFunction(module.forward, make_options(tmp_path))(x)
    make = "pickle.loads" if is_kept else "torch.export.export"
    make_trace = pkgutil.resolve_name(make)
    load, both, has_begun = CompiledModel.load, Barrier(2), Event()

    def wait_and_load(*args: Any, **about: Any) -> Any:
        both.wait(timeout=60)
        return load(*args, **about)

    def tell_and_make(*args: Any, **about: Any) -> Any:
        has_begun.set()
        return make_trace(*args, **about)

    monkeypatch.setattr(CompiledModel, "load", wait_and_load)
    monkeypatch.setattr(make, tell_and_make)
    functions = [CompiledFunction(module.forward, make_options(tmp_path)) for module in modules]
    with compile_ahead():
        for function in functions:
            function(x)
        assert not has_begun.wait(0.5)  # torch takes a call of any module while it reads a trace for a part of that
    assert has_begun.is_set()
    for module, function in zip(modules, functions, strict=True):
        assert read_origins(function) == [(not is_kept, [is_kept])]
        assert measure_error(function(x), module(x)) < 1e-6


class Returning(torch.nn.Module):
    """Returns its input, a view of it, a weight, the same tensor twice, and what it changed of its own in place."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(4), requires_grad=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x * 2
        z = y[1:]
        y.add_(self.weight)
        return x, x.t(), x.view(-1), self.weight, y, y, z


def test_results_are_new_tensors(tmp_path: Path) -> None:
    module, x = Returning(), torch.randn(3, 4)
    expected = [each.clone() for each in module(x)]
    for is_traced in (True, False):
        function = CompiledFunction(module.forward, make_options(tmp_path))
        results = function(x)
        assert all(torch.equal(*each) for each in zip(results, expected, strict=True))
        for each in results[:4]:
            each.zero_()
        assert torch.equal(module(x)[0], expected[0])
        assert torch.equal(module.weight, expected[3])
        assert function.backend.reports[0].traced is is_traced


class Adding(torch.nn.Module):
    """Adds in place to a result that is read before and after, twice, to a view, and in another type."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 2, 1)

    def forward(self, x: torch.Tensor, more: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.conv(x)
        before = y * 2
        y += more
        y += before
        z = self.conv(y)
        z[:, :1].add_(more[:, :1])
        viewed = z[:, 1:]
        z += more
        whole = (x * 8).to(torch.int32)
        whole += more.to(torch.int64)
        return before, y, z, viewed, whole


def test_additions_in_place_are_seen_where_they_were() -> None:
    module, inputs = Adding().eval(), (torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3))
    with torch.no_grad():
        expected = module(*inputs)
    function = CompiledFunction(module.forward)
    for result, each in zip(function(*inputs), expected, strict=True):
        assert result.dtype == each.dtype
        torch.testing.assert_close(result, each)


def test_an_addition_in_place_needs_no_second_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    class Residual(torch.nn.Module):
        def forward(self, x: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
            y = x * 2
            kept = (y,)
            y += more
            return y + kept[0]

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("torch traces again")

    monkeypatch.setattr("torch.export.ExportedProgram.run_decompositions", refuse)
    x = torch.randn(3, 4)
    assert torch.equal(CompiledFunction(Residual().forward)(x, torch.ones(3, 4)), 2 * (x * 2 + 1))


def test_results_that_cannot_be_kept_are_traced_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Naming(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
            return x * 2, lambda: None

    for _ in range(2):
        function = CompiledFunction(Naming().forward, make_options(tmp_path))
        assert torch.equal(function(torch.ones(2))[0], torch.full((2,), 2.0))
        assert function.backend.reports[0].traced
    assert caplog.text.count("is traced anew at each start") == 2


def test_call_while_another_function_is_traced() -> None:
    """torch records each call of a module then, whichever thread makes it."""
    begun, go_on = Event(), Event()

    class Waiting(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            begun.set()
            assert go_on.wait(60)
            return x + 1

    warm, x = CompiledFunction(make_module().forward, {}), torch.randn(4, 16)
    expected = warm(x)
    waiting = CompiledFunction(Waiting().forward)
    with ThreadPoolExecutor() as pool:
        traced = pool.submit(waiting, x)
        assert begun.wait(60)
        try:
            assert torch.equal(warm(x), expected)
        finally:
            go_on.set()
        assert torch.equal(traced.result(), x + 1)


def test_what_stands_in_the_way_of_a_call_ahead_is_raised() -> None:
    function = CompiledFunction(Bessel().forward)
    with pytest.raises(Exception, match="aten.special_bessel_j0"), compile_ahead():
        assert function(torch.randn(4, 16)).shape == (4, 16)
    with pytest.raises(Exception, match="aten.special_bessel_j0"):  # calls are made again
        function(torch.randn(4, 16))


def test_what_is_no_pure_method_is_refused() -> None:
    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.total.add_(x)
            return self.total * 2

    class Choosing(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    class Adding(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(1)

    with pytest.raises(Exception, match="changes tensors_0 in place"):
        CompiledFunction(Adding().forward)(torch.zeros(3))
    with pytest.raises(Exception, match="changes module.total in place"):
        CompiledFunction(Counting().forward)(torch.zeros(3))
    with pytest.raises(Exception, match="the graph contains graphs that cond"):
        CompiledFunction(Choosing().forward)(torch.zeros(3))
    with pytest.raises(TypeError, match="takes a method of a torch.nn.Module"):
        CompiledFunction(torch.sin)


class Wide(torch.nn.Module):
    """Linear layers with weights from a file."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterDict(weights).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.weights.values():
            x = torch.nn.functional.linear(x, weight)
        return x


def measure_resident(path: Path) -> int:
    """Return how much memory the mapping of a file takes, in MiB."""
    smaps = Path("/proc/self/smaps").read_text().split("\n")
    at = [i for i, line in enumerate(smaps) if line.endswith(str(path))]
    resident = [line for i in at for line in smaps[i + 1 : i + 6] if line.startswith("Rss")]
    return sum(int(line.split()[1]) for line in resident) // 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("is_ahead", [False, True])
@pytest.mark.parametrize("release", [False, True])
def test_mapped_weights_take_no_memory_once_released(tmp_path: Path, release: bool, is_ahead: bool) -> None:
    path, x = tmp_path / "weights.safetensors", torch.randn(2, 2048).half()
    save_file({str(i): (torch.randn(2048, 2048) / 45).half() for i in range(8)}, path)
    module = Wide(load_file(path))
    expected = module(x)
    assert measure_resident(path) >= 64
    options = {"release_weights": release, "config": {"INFERENCE_PRECISION_HINT": "f32"}}
    function = CompiledFunction(module.forward, options, dynamic_shapes={"x": (0,)})
    if is_ahead:
        with compile_ahead():
            function(x)
    result = function(x)
    assert (measure_resident(path) < 8) is release
    assert measure_error(result, expected) < 0.01
    assert torch.equal(module(x), expected)


class Blocks(torch.nn.Module):
    """Convolutions of images of any size; their sizes are expressions in the graph."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Conv2d(4, 4, 3, padding=1) for _ in range(count))

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            sample = torch.nn.functional.silu(block(sample))
        return torch.nn.functional.interpolate(sample, scale_factor=2.0).flatten(2)


def test_one_thread_compiles_while_another_traces() -> None:
    """The size of the deep module keeps its thread in traces, in which the other's graphs must not be touched."""

    def compile_some(count: int) -> None:
        for _ in range(12):
            function = CompiledFunction(Blocks(count).eval().forward, {}, {"sample": (0, 2, 3)})
            with torch.no_grad():
                assert function(torch.randn(1, 4, 16, 24)).shape == (1, 4, 32 * 48)

    with ThreadPoolExecutor() as pool:
        for each in [pool.submit(compile_some, 12), pool.submit(compile_some, 1)]:
            each.result()
