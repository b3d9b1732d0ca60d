"""What the backend that comes with OpenVINO does silently, and ours does not: ours; see test_stock_hazards.py."""

import copy
from pathlib import Path
from types import MappingProxyType
from typing import Any

import openvino
import pytest
import torch

from openvino_backend import OpenVINOBackend, OptionsError
from tests.unit.modules import Bessel, TimeEmbedding, make_module, measure_error, needs_bf16

pytestmark = pytest.mark.usefixtures("inference")


FLOAT32 = MappingProxyType({"INFERENCE_PRECISION_HINT": "f32"})
BESSEL = "aten.special_bessel_j0.default"


class Attention(torch.nn.Module):
    """Self-attention with two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        query, key, value = self.linear(x).view(batch, length, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value)
        return mixed.transpose(1, 2).reshape(batch, length, 16)


class Table(torch.nn.Module):
    """A module whose only numbers are a table in its configuration."""

    def __init__(self, table: tuple[float, ...]) -> None:
        super().__init__()
        self.table = table

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * torch.tensor(self.table) + 1).exp()


def make_convolutions() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3))


def make_input(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


TIME = torch.tensor([981.0, 777.0])
PICTURE = make_input(1, 3, 8, 8)
ROWS = make_input(4, 16)
TABLES = ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))


def name_layers(compiled: openvino.CompiledModel) -> tuple[str, ...]:
    """Return the types of the operators that OpenVINO executes, as it names them."""
    return tuple(str(each.get_rt_info()["layerType"].astype(str)) for each in compiled.get_runtime_model().get_ops())


def run_cached(module: torch.nn.Module, x: torch.Tensor, folder: Path) -> tuple[bool, float]:
    torch._dynamo.reset()
    backend = OpenVINOBackend({"config": FLOAT32, "model_caching": True, "cache_dir": str(folder)})
    error = measure_error(compile_ours(module, backend)(x), module(x))
    (model,) = backend.reports[0].models
    return model.loaded_from_cache, error


def compile_ours(module: torch.nn.Module, backend: OpenVINOBackend, *, dynamic: bool = False) -> Any:
    return torch.compile(module, backend=backend, fullgraph=True, dynamic=dynamic)


def test_runs_without_aot_autograd() -> None:
    module, backend = make_convolutions(), OpenVINOBackend({"config": FLOAT32})
    assert measure_error(compile_ours(module, backend)(PICTURE), module(PICTURE)) < 1e-5


def test_dynamic_shapes() -> None:
    module, backend = Attention(), OpenVINOBackend()
    compiled = compile_ours(module, backend, dynamic=True)
    for rows, length in ((2, 5), (3, 9)):
        x = make_input(rows, length, 16)
        assert measure_error(compiled(x), module(x)) < 1e-5
    assert [report.operators_outside for report in backend.reports] == [()]


def test_operator_unknown_to_openvino(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Exception, match=BESSEL):
        compile_ours(Bessel(), OpenVINOBackend())(ROWS)
    torch._dynamo.reset()
    backend = OpenVINOBackend({"strict": False})
    compile_ours(Bessel(), backend)(ROWS)
    assert backend.reports[0].operators_outside == (BESSEL,)
    assert BESSEL in caplog.text


@needs_bf16
def test_bfloat16_weights() -> None:
    backend = OpenVINOBackend()
    assert compile_ours(make_module().bfloat16(), backend)(ROWS.bfloat16()).dtype == torch.bfloat16
    ((model,),) = (report.models for report in backend.reports)
    assert (model.devices, model.precision) == (("CPU",), "bf16")
    assert backend.reports[0].operators_outside == ()


def test_device_that_is_not_there() -> None:
    with pytest.raises(OptionsError, match=r"takes CPU.* here.*not 'GPU\.7'"):
        OpenVINOBackend({"device": "GPU.7"})


def test_second_start_with_a_cache(tmp_path: Path) -> None:
    """Processes share it, too: test_two_processes_share_a_cache_entry."""
    for is_cached in (False, True):
        found, error = run_cached(make_module(), ROWS, tmp_path)
        assert found is is_cached
        assert error < 1e-5


def test_cache_tells_weights_apart(tmp_path: Path) -> None:
    for seed in (0, 1):
        is_cached, error = run_cached(make_module(seed=seed), ROWS, tmp_path)
        assert not is_cached
        assert error < 1e-5


def test_cache_tells_tables_apart(tmp_path: Path) -> None:
    for table in TABLES:
        is_cached, error = run_cached(Table(table), make_input(2, 3), tmp_path)
        assert not is_cached
        assert error < 1e-5


def test_callers_options_are_left_alone(tmp_path: Path) -> None:
    options = {"config": dict(FLOAT32), "model_caching": True, "cache_dir": str(tmp_path)}
    given = copy.deepcopy(options)
    compile_ours(make_module(), OpenVINOBackend(options))(ROWS)
    assert options == given


@needs_bf16
def test_cached_model_keeps_its_properties(tmp_path: Path) -> None:
    for _ in range(2):
        torch._dynamo.reset()
        backend = OpenVINOBackend({"config": FLOAT32, "model_caching": True, "cache_dir": str(tmp_path)})
        compile_ours(make_module(), backend)(ROWS)
    assert [(model.loaded_from_cache, model.precision) for model in backend.reports[0].models] == [(True, "f32")]


def test_weights_are_constants() -> None:
    backend = OpenVINOBackend()
    compile_ours(make_module(), backend)(ROWS)
    assert [model.inputs for model in backend.reports[0].models] == [1]


def test_results_are_not_overwritten() -> None:
    compiled = compile_ours(make_module(), OpenVINOBackend())
    first = compiled(ROWS)
    kept = first.clone()
    compiled(make_input(4, 16, seed=1))
    assert torch.equal(first, kept)


def test_options_of_one_compile_do_not_reach_another() -> None:
    compile_ours(Bessel(), OpenVINOBackend({"strict": False}))(ROWS)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=BESSEL):
        compile_ours(Bessel(), OpenVINOBackend())(ROWS)


@needs_bf16
def test_time_embedding_stays_in_float32() -> None:
    module = TimeEmbedding()
    reference = module(TIME)
    assert measure_error(compile_ours(module, OpenVINOBackend())(TIME), reference) < 1e-5
    torch._dynamo.reset()
    assert measure_error(compile_ours(module.bfloat16(), OpenVINOBackend())(TIME), reference) < 0.01


def test_normalization_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, compile_model = [], openvino.Core.compile_model

    def keep_compiled(*args: Any) -> Any:
        compiled.append(compile_model(*args))
        return compiled[-1]

    monkeypatch.setattr(openvino.Core, "compile_model", keep_compiled)
    compile_ours(torch.nn.LayerNorm(16), OpenVINOBackend({"config": FLOAT32}))(ROWS)
    (ours,) = (name_layers(model) for model in compiled)
    assert "MVN" in ours
    assert "Reduce" not in ours


def test_options_are_checked() -> None:
    with pytest.raises(OptionsError, match="unknown OpenVINO option 'devices'; the options are device"):
        OpenVINOBackend({"devices": "CPU"})
