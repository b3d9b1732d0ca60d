"""What the backend that comes with OpenVINO does silently: the other half of test_hazards.py.

A message "no longer" means that a release of OpenVINO mended its backend. Then the table of hazards in docs/backends.md
has a row too many.
"""

import copy
import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import openvino
import pytest
import torch

from tests.unit.modules import Bessel, TimeEmbedding, make_module, measure_error, needs_bf16
from tests.unit.test_hazards import (
    BESSEL,
    FLOAT32,
    PICTURE,
    ROWS,
    TABLES,
    TIME,
    Attention,
    Table,
    make_convolutions,
    make_input,
    name_layers,
)

Result = TypeVar("Result")
pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("inference")]
AOT = {"aot_autograd": True}


@dataclass(frozen=True)
class Seen:
    """What the stock backend did with one module, read from what ran.

    Attributes:
        failure: the error that reached the caller.
        error: relative L2 distance to the module without torch.compile.
        inputs: the number of inputs of each model compiled by OpenVINO.
        layers: the operators of those models.
        precisions: the arithmetic of those models and of those from the stock backend's cache.
        eager_parts: the number of parts given up and run in PyTorch for ever.
        eager_operators: the operators left to PyTorch one by one.
        inductor_graphs: the number of graphs handed to Inductor.
        log: what the stock backend logged that a user would see.
        writes_options: whether the caller's options were changed.
    """

    failure: str
    error: float
    inputs: tuple[int, ...]
    layers: tuple[str, ...]
    precisions: tuple[str, ...]
    eager_parts: int
    eager_operators: tuple[str, ...]
    inductor_graphs: int
    log: tuple[str, ...]
    writes_options: bool


def call_in_fresh_process(function: Callable[..., Result], *args: Any) -> Result:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


class Stock:
    """The stock backend in a process of its own, watched; nothing of it is replaced."""

    def __init__(self) -> None:
        from openvino.frontend.pytorch.torchdynamo import backend, execute

        self.backend, self.execute = backend, execute
        self.inductor_graphs = 0
        self.restored: list[openvino.CompiledModel] = []
        self.log: list[str] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: self.log.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("openvino").addHandler(handler)
        compile_fx, restore = backend.compile_fx, backend.openvino_compile_cached_model

        def watch_inductor(*args: Any, **kwargs: Any) -> Any:
            self.inductor_graphs += 1
            return compile_fx(*args, **kwargs)

        def watch_restore(*args: Any) -> Any:
            self.restored.append(restore(*args))
            return self.restored[-1]

        backend.compile_fx, backend.openvino_compile_cached_model = watch_inductor, watch_restore

    def forget(self) -> None:
        """Empty every global that an earlier module left."""
        torch._dynamo.reset()
        self.backend.openvino_options = {}
        self.execute.clear_caches()
        self.execute.req_cache.clear()

    def compile(self, module: torch.nn.Module, options: Mapping[str, Any] | None, *, dynamic: bool = False) -> Any:
        self.inductor_graphs = 0
        self.restored.clear()
        self.log.clear()
        return torch.compile(module, backend="openvino", options=options, dynamic=dynamic)

    @torch.no_grad()
    def see(
        self,
        module: torch.nn.Module,
        x: torch.Tensor,
        options: Mapping[str, Any] | None = None,
        *,
        dynamic: bool = False,
        forget: bool = True,
    ) -> Seen:
        """Compile and call a module."""
        if forget:
            self.forget()
        failure, error, given = "", math.nan, copy.deepcopy(options)
        try:
            error = measure_error(self.compile(module, options, dynamic=dynamic)(x), module(x))
        except Exception as caught:
            failure = f"{type(caught).__name__}: {caught}"
        graphs = self.execute.partitioned_modules.values()
        parts = [part for graph in graphs for part in graph.children() if hasattr(part, "perm_fallback")]
        compiled = self.execute.compiled_cache.values()
        return Seen(
            failure=failure,
            error=error,
            inputs=tuple(len(model.inputs) for model in compiled),
            layers=tuple(name for model in compiled for name in name_layers(model)),
            precisions=tuple(
                model.get_property("INFERENCE_PRECISION_HINT").get_type_name() for model in (*compiled, *self.restored)
            ),
            eager_parts=sum(part.perm_fallback for part in parts),
            eager_operators=tuple(
                str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"
            ),
            inductor_graphs=self.inductor_graphs,
            log=tuple(self.log),
            writes_options=options != given,
        )

    @torch.no_grad()
    def overwrites_results(self) -> bool:
        """Tell whether a second call changes the tensor that the first one returned."""
        self.forget()
        compiled = self.compile(make_module(), AOT)
        first = compiled(ROWS)
        kept = first.clone()
        compiled(make_input(4, 16, seed=1))
        return not torch.equal(first, kept)


@dataclass(frozen=True)
class OneStart:
    """What was seen in one process."""

    seen: dict[str, Seen]
    overwrites_results: bool


def see_one_start() -> OneStart:
    """Run by a fresh process: every hazard that shows within one."""
    stock = Stock()
    seen = {
        "without aot_autograd": stock.see(make_convolutions(), PICTURE),
        "dynamic": stock.see(Attention(), make_input(2, 5, 16), AOT, dynamic=True),
        "operator": stock.see(Bessel(), ROWS, AOT),
        "bfloat16": stock.see(make_module().bfloat16(), ROWS.bfloat16(), AOT),
        "device": stock.see(make_module(), ROWS, {**AOT, "device": "GPU.7"}),
        "weights": stock.see(make_module(), ROWS, AOT),
        "time": stock.see(TimeEmbedding(), TIME, AOT),
        "options": stock.see(make_module(), ROWS, {**AOT, "devices": "CPU", "strickt": True}),
        "alone": stock.see(torch.nn.Linear(16, 8), ROWS),
    }
    with torch._inductor.config.patch(freezing=True):
        seen["norm"] = stock.see(torch.nn.LayerNorm(16), ROWS, {**AOT, "config": dict(FLOAT32)})
    overwrites = stock.overwrites_results()
    stock.see(torch.nn.Linear(16, 8), ROWS, AOT)
    torch._dynamo.reset()
    seen["after another"] = stock.see(torch.nn.Linear(16, 8), ROWS, forget=False)
    return OneStart(seen, overwrites)


def see_cached_start(folder: Path, seed: int) -> dict[str, Seen]:
    """Run by a fresh process: modules whose compiled models are kept in a folder."""
    stock = Stock()

    def make_options(name: str) -> dict[str, Any]:
        return {**AOT, "config": dict(FLOAT32), "model_caching": True, "cache_dir": str(folder / name)}

    with torch._inductor.config.patch(freezing=True):  # so that the kept models hold their weights
        seen = {
            "same": stock.see(make_module(), ROWS, make_options("same")),
            "weights": stock.see(make_module(seed=seed), ROWS, make_options("weights")),
        }
    seen["table"] = stock.see(Table(TABLES[seed]), make_input(2, 3), make_options("table"))
    return seen


@pytest.fixture(scope="module")
def stock() -> OneStart:
    return call_in_fresh_process(see_one_start)


@dataclass(frozen=True)
class TwoStarts:
    """What two processes saw that share a cache folder, and the files there after each."""

    first: dict[str, Seen]
    second: dict[str, Seen]
    first_files: dict[str, str]
    second_files: dict[str, str]


@pytest.fixture(scope="module")
def stock_twice(tmp_path_factory: pytest.TempPathFactory) -> TwoStarts:
    folder = tmp_path_factory.mktemp("stock")
    first, first_files = call_in_fresh_process(see_cached_start, folder, 0), digest_files(folder / "weights" / "model")
    second = call_in_fresh_process(see_cached_start, folder, 1)
    return TwoStarts(first, second, first_files, digest_files(folder / "weights" / "model"))


def digest_files(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*") if path.is_file()}


def no_longer(does: str) -> str:
    return f"the stock backend no longer {does}: update the table in docs/backends.md"


def test_runs_without_aot_autograd(stock: OneStart) -> None:
    seen = stock.seen["without aot_autograd"]
    assert "sources must not be empty" in seen.failure, no_longer("fails on a convolution without aot_autograd")


def test_dynamic_shapes(stock: OneStart) -> None:
    seen = stock.seen["dynamic"]
    assert (seen.eager_parts, seen.inputs, seen.log) == (1, (), ()), no_longer("runs attention eager with dynamic=True")


def test_operator_unknown_to_openvino(stock: OneStart) -> None:
    seen = stock.seen["operator"]
    message = no_longer("leaves unknown operators to PyTorch without a word")
    assert (seen.eager_operators, len(seen.inputs), seen.log) == ((BESSEL,), 2, ()), message


@needs_bf16
def test_bfloat16_weights(stock: OneStart) -> None:
    seen = stock.seen["bfloat16"]
    assert (seen.eager_parts, seen.inputs, seen.log) == (1, (), ()), no_longer("runs bfloat16 weights eager")


def test_device_that_is_not_there(stock: OneStart) -> None:
    seen = stock.seen["device"]
    assert (seen.eager_parts, seen.inputs, seen.log) == (1, (), ()), no_longer("runs eager for a device not there")


def test_second_start_with_a_cache(stock_twice: TwoStarts) -> None:
    first, second = stock_twice.first["same"], stock_twice.second["same"]
    assert (first.eager_parts, first.failure) == (0, "")
    assert (second.eager_parts, second.inputs, second.log) == (1, (), ()), no_longer("runs a cached model eager")


def test_cache_tells_weights_apart(stock_twice: TwoStarts) -> None:
    first, second = stock_twice.first_files, stock_twice.second_files
    assert [Path(name).suffix for name in sorted(first)] == [".bin", ".xml"], no_longer("keeps a model in two files")
    assert first == second, no_longer("takes one file for two checkpoints")


def test_cache_tells_tables_apart(stock_twice: TwoStarts) -> None:
    assert stock_twice.first["table"].error < 0.01
    assert stock_twice.second["table"].error > 0.5, no_longer("gives a model the numbers of another")
    assert stock_twice.second["table"].log == ()


def test_callers_options_are_left_alone(stock_twice: TwoStarts) -> None:
    assert stock_twice.first["same"].writes_options, no_longer("writes into the caller's `config`")


@needs_bf16
def test_cached_model_keeps_its_properties(stock_twice: TwoStarts) -> None:
    assert stock_twice.first["table"].precisions == ("f32",)
    assert stock_twice.second["table"].precisions == ("bf16",), no_longer("drops `config` for a cached model")


def test_weights_are_constants(stock: OneStart) -> None:
    assert stock.seen["weights"].inputs == (7,), no_longer("passes the weights at each call")


def test_results_are_not_overwritten(stock: OneStart) -> None:
    assert stock.overwrites_results, no_longer("overwrites a result at the next call")


def test_options_of_one_compile_do_not_reach_another(stock: OneStart) -> None:
    alone, after = stock.seen["alone"], stock.seen["after another"]
    assert (alone.inductor_graphs, alone.failure) == (0, "")
    message = no_longer("hands a module to Inductor because of another one's options")
    assert (after.inductor_graphs, after.log) == (1, ()), message


@needs_bf16
def test_time_embedding_stays_in_float32(stock: OneStart) -> None:
    assert stock.seen["time"].error > 0.1, no_longer("computes sines of large angles in bfloat16")  # 0.5 is seen


def test_normalization_stays_whole(stock: OneStart) -> None:
    layers = stock.seen["norm"].layers
    assert "Reduce" in layers, no_longer("splits a layer norm")


def test_options_are_checked(stock: OneStart) -> None:
    seen = stock.seen["options"]
    assert (seen.failure, len(seen.inputs), seen.log) == ("", 1, ()), no_longer("takes options that do not exist")
