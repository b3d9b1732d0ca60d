"""The configured device and backend run, or the load fails and says why. So do failures at the warm-up."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import diffusers
import pytest
import torch
import torch._inductor.cudagraph_trees  # otherwise torch._dynamo.reset() imports it, which changes what that loops over
from prometheus_client import REGISTRY

from openvino_backend.deferred import infer_shapes
from openvino_backend.models import CompiledModel
from sdxl_server import __version__
from sdxl_server.config.compile_settings import CompileConfig
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.errors import ConfigError
from sdxl_server.model.compiling import compile_method
from sdxl_server.model.describe import count_component_graphs, describe_pipeline
from sdxl_server.model.dtypes import choose_device, choose_dtype
from sdxl_server.service import load_service
from tests.unit.modules import make_module, measure_error
from tests.unit.pipelines import UNET_ONLY, load
from tools.server import ROOT

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", os.environ.get("CXX", "c++")))), reason="Inductor needs a C++ compiler"
)
no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
INDUCTOR = {"backend": "inductor"}
STOCK = """
import sys, torch
from sdxl_server.config.compile_settings import CompileConfig
from sdxl_server.model.compiling import compile_method
from tests.unit.modules import Bessel, make_module

for module, device in (
    (make_module(), "CPU"), (make_module().bfloat16(), "CPU"), (make_module(), "GPU.7"), (Bessel(), "CPU")
):
    torch._dynamo.reset()
    pt2 = {"backend": "openvino_stock", "options": {"aot_autograd": True, "device": device}}
    compiled = compile_method(module.requires_grad_(False).forward, CompileConfig.parse(pt2), name="unet")
    try:
        with torch.no_grad():
            compiled(torch.randn(4, 16, dtype=next(module.parameters()).dtype))
        print(compiled.graphs)
    except Exception as error:
        print(type(error).__name__, error)
"""


@no_cuda
@pytest.mark.parametrize(
    ("device_type", "gpu_id", "told"),
    [
        ("gpu", None, "deviceType: gpu needs a GPU with CUDA: .* finds 0, and TorchServe found no GPU"),
        ("GPU", 0, "deviceType: gpu needs a GPU with CUDA: .* finds 0, and TorchServe chose GPU 0"),
        (None, 1, "deviceType: gpu, TorchServe's default where it finds a GPU, needs .* chose GPU 1"),
    ],
)
def test_a_gpu_that_pytorch_cannot_use_is_refused(
    tmp_path: Path, device_type: str | None, gpu_id: int | None, told: str
) -> None:
    settings = {} if device_type is None else {"deviceType": device_type}
    with pytest.raises(ConfigError, match=rf"{told}.*deviceType: cpu.*options: {{device: GPU}}"):
        load_service(settings, model_dir=tmp_path, gpu_id=gpu_id, archive=__version__)


def test_a_gpu_that_pytorch_can_use_is_the_one_that_torchserve_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's answers on a machine with one GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert [choose_device(each, gpu_id=0) for each in ("gpu", None, "cpu", "CPU")] == ["cuda:0", "cuda:0", "cpu", "cpu"]
    assert choose_device(None, gpu_id=None) == "cpu"
    for gpu_id in (None, 1):
        with pytest.raises(ConfigError, match="finds 1, and TorchServe"):
            choose_device("gpu", gpu_id=gpu_id)


@pytest.mark.parametrize("device_type", ["neuron", "mps", "xpu", "cuda:0", "gpuu", "", 1, True, ["gpu"]])
def test_another_device_type_is_refused(tmp_path: Path, device_type: Any) -> None:
    with pytest.raises(ConfigError, match="deviceType takes cpu or gpu, not .*options: {device: GPU}"):
        load_service({"deviceType": device_type}, model_dir=tmp_path, gpu_id=None, archive=__version__)


class Broken(torch.nn.Module):
    """A module with code that dynamo cannot trace."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear = kind, torch.nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "break":
            torch._dynamo.graph_break()
        elif self.kind == "branch" and x.sum() > 0:
            x = x + 1
        elif self.kind == "file":
            Path("/dev/null").write_text("x")
        return self.linear(x)


@pytest.mark.usefixtures("inference")
@pytest.mark.parametrize("backend", ["inductor", "cudagraphs"])
@pytest.mark.parametrize("kind", ["break", "branch", "file"])
def test_a_graph_break_is_an_error(backend: str, kind: str) -> None:
    compiled = compile_method(Broken(kind).forward, CompileConfig.parse(backend), name="vae")
    with pytest.raises(ConfigError, match=rf"{backend} cannot compile vae as one graph: .*fullgraph: false"):
        compiled(torch.ones(2, 4))


@needs_compiler
@pytest.mark.usefixtures("inference")
def test_a_graph_break_is_accepted_on_request() -> None:
    module, x = Broken("break"), torch.ones(2, 4)
    compiled = compile_method(module.forward, CompileConfig.parse({**INDUCTOR, "fullgraph": False}))
    torch._dynamo.utils.counters.clear()
    assert measure_error(compiled(x), module(x)) < 1e-6
    assert compiled.graphs == 1
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 1  # describe reports this number


def test_a_graph_break_stops_the_load(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_forward(monkeypatch, lambda result: torch._dynamo.graph_break() or result)
    with pytest.raises(ConfigError, match="inductor cannot compile unet as one graph"):
        load(tiny_model, "inductor", warm_up=True, **UNET_ONLY)


@pytest.mark.usefixtures("inference")
@pytest.mark.parametrize("case", ["cudagraphs", "stance", "variable"])
def test_a_component_that_eager_pytorch_ran_is_an_error(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU cudagraphs leaves the graph unchanged; a stance and a variable turn dynamo off."""
    if case == "variable":
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    backend = "cudagraphs" if case == "cudagraphs" else "inductor"
    compiled = compile_method(make_module().forward, CompileConfig.parse(backend), name="text_encoder")
    with (
        torch.compiler.set_stance("force_eager" if case == "stance" else "default"),
        pytest.raises(ConfigError, match=f"pt2.backend: {backend} did not compile text_encoder: eager PyTorch ran it"),
    ):
        compiled(torch.randn(4, 16))


@no_cuda
def test_cudagraphs_on_a_cpu_stops_the_load(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="pt2.backend: cudagraphs did not compile text_encoder"):
        load(tiny_model, "cudagraphs", warm_up=True)


@needs_compiler
@pytest.mark.usefixtures("inference")
def test_each_module_of_a_class_counts_its_graphs() -> None:
    x, counts = torch.randn(4, 16), []
    for seed in range(2):
        torch.manual_seed(seed)
        module = torch.nn.Linear(16, 8).requires_grad_(False)  # torch's own kernel, so g++ has nothing to compile
        compiled = compile_method(module.forward, CompileConfig.parse("inductor"))
        assert measure_error(compiled(x), module(x)) < 1e-6
        compiled(x)
        counts.append(compiled.graphs)
    assert counts == [1, 1]


def test_openvinos_own_backend_is_refused_where_it_runs_eagerly() -> None:
    """In a process of its own, because it changes settings of torch."""
    done = subprocess.run([sys.executable, "-c", STOCK], cwd=ROOT, capture_output=True, text=True)
    ran, *refused = done.stdout.splitlines()
    assert (int(ran), len(refused)) == (1, 3), done.stderr
    for line in refused:  # bfloat16, a device that is not there, an operator that OpenVINO lacks
        assert line.startswith("ConfigError pt2.backend: openvino_stock did not compile unet")
    compilation = CompileConfig.parse({"backend": "openvino_stock", "options": {"aot_autograd": True}})
    assert choose_dtype(HandlerConfig(), compilation, device="cpu") == ("float32", compilation)


@pytest.mark.parametrize("name", ["tvm", "openxla", "onnxrt", "aot_eager", "eager", "Inductor", "open_vino", "none"])
def test_other_backends_are_refused(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CompileConfig.parse({"backend": name})
    message = str(caught.value)
    assert message.startswith(f"pt2.backend takes one of openvino, inductor, cudagraphs, openvino_stock, not '{name}'")
    near = {"Inductor": "inductor", "open_vino": "openvino"}.get(name)
    assert (f"did you mean {near}?" in message) is (near is not None)


def test_dynamos_name_of_openvino_means_the_same(tiny_model: Path, cached: dict[str, Any]) -> None:
    loaded = load(tiny_model, {**cached, "backend": "openvino_backend"}, warm_up=True, **UNET_ONLY)
    report = describe_pipeline(loaded)
    assert (report["backend"], report["graphs"], list(report["openvino"])) == ("openvino", 1, ["unet"])


@pytest.mark.parametrize(
    ("options", "told"),
    [({"strict": False}, "strict"), ({"freezing": "yes"}, "freezing, got str should be bool"), ({1: 2}, "")],
)
def test_options_of_inductor_are_checked_at_once(options: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"^pt2.options: inductor .*{told}"):
        CompileConfig.parse({**INDUCTOR, "options": options})


def replace_forward(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any]) -> None:
    """Let the UNet change its result."""
    forward = diffusers.UNet2DConditionModel.forward

    def changed(self: Any, sample: Any, timestep: Any, encoder_hidden_states: Any, **options: Any) -> Any:
        (result,) = forward(self, sample, timestep, encoder_hidden_states, **{**options, "return_dict": False})
        return (change(result),)

    monkeypatch.setattr(diffusers.UNet2DConditionModel, "forward", changed)


def fail(error: Exception) -> Callable[..., Any]:
    """Return a function that raises an error."""

    def raise_it(*_: Any, **__: Any) -> Any:
        raise error

    return raise_it


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (fail(RuntimeError("mixed up")), "^the warm-up failed: RuntimeError: .*mixed up"),
        (fail(KeyError("in_features")), "^the warm-up failed: KeyError: .*in_features"),
        (lambda result: torch.empty(2**50), "^out of memory. Use .*: RuntimeError: .*allocate"),
    ],
)
def test_without_a_backend_none_is_blamed(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any], told: str
) -> None:
    replace_forward(monkeypatch, change)
    with pytest.raises(ConfigError, match=told) as caught:
        load(tiny_model, warm_up=True)
    assert "pt2" not in str(caught.value)


def test_an_operator_that_openvino_lacks_is_told_with_its_component(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_forward(monkeypatch, torch.special.bessel_j0)
    told = "^pt2 failed while OpenVINO compiled or ran unet: .*OpenVINO has no aten.special_bessel_j0.default"
    with pytest.raises(ConfigError, match=told):
        load(tiny_model, "openvino", warm_up=True, **UNET_ONLY)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("Exception from src/core.cpp: std::bad_alloc"), "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "/cache/model.bin"), "a disk is full .*/cache/model.bin"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/cache/model.bin"), "a disk is full .*/cache/model.bin"),
    ],
    ids=["memory", "memory in C++", "disk", "quota"],
)
def test_what_the_machine_lacks_is_told_with_the_component(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    """The errors of a smaller machine."""
    monkeypatch.setattr(CompiledModel, "load", fail(error))
    with pytest.raises(ConfigError, match=rf"^{told}") as caught:
        load(tiny_model, "openvino", compile_unet=False, compile_vae=False, warm_up=True)
    assert "while OpenVINO compiled or ran text_encoder" in str(caught.value)
    assert "pt2" not in str(caught.value)


def test_calls_without_numbers_are_not_counted(
    tiny_model: Path, cached: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The warm-up infers the shapes of a whole image first, then it draws one."""
    names = ("sdxl_unet_calls_made_total", "sdxl_unet_call_seconds_count", "sdxl_unet_calls_skipped_total")
    before = [REGISTRY.get_sample_value(name) for name in names]
    watched = Mock(wraps=infer_shapes)
    monkeypatch.setattr("openvino_backend.function.infer_shapes", watched)
    loaded = load(tiny_model, cached, graphs="static", warm_up=True)
    after = [REGISTRY.get_sample_value(name) for name in names]
    assert [new - old for new, old in zip(after, before, strict=True)] == [1, 1, 0]  # type: ignore[operator]
    assert watched.call_count == 4  # two text encoders, the UNet, the VAE
    assert [count_component_graphs(loaded, name) for name in ("unet", "vae")] == [1, 1]
