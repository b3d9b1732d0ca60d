"""openvino_backend on its own: small modules, real OpenVINO."""

import re
import subprocess
import sys
import threading
from dataclasses import fields
from pathlib import Path
from typing import Any

import openvino
import pytest
import torch

import openvino_backend
from openvino_backend import (
    CompiledFunction,
    OpenVINOBackend,
    OpenVINOBackendError,
    Options,
    OptionsError,
    UnsupportedOperatorsError,
    models,
)
from tests.unit.modules import CAPABILITIES, Bessel, TimeEmbedding, make_module, measure_error, needs_bf16
from tools.server import ROOT

pytestmark = pytest.mark.usefixtures("inference")


def compile_module(module: torch.nn.Module, backend: OpenVINOBackend) -> torch.nn.Module:
    compiled: torch.nn.Module = torch.compile(module, backend=backend, fullgraph=True, dynamic=False)
    return compiled


def test_float32_is_the_same_to_rounding() -> None:
    module, backend, x = make_module(), OpenVINOBackend(), torch.randn(4, 16)
    result = compile_module(module, backend)(x)
    assert measure_error(result, module(x)) < 1e-6
    ((report,),) = (graph.models for graph in backend.reports)
    assert (report.devices, report.precision, report.inputs, report.constants) == (
        ("CPU",),
        "f32",
        1,
        {"f32": 6},
    )
    assert not report.loaded_from_cache


@needs_bf16
def test_bfloat16_is_as_near_as_torchs_own() -> None:
    module, backend, x = make_module(), OpenVINOBackend(), torch.randn(64, 16)
    reference = module(x)
    module.bfloat16()
    torchs_error = measure_error(module(x.bfloat16()), reference)
    result = compile_module(module, backend)(x.bfloat16())
    assert result.dtype == torch.bfloat16
    assert backend.reports[0].models[0].precision == "bf16"
    assert measure_error(result, reference) <= 1.2 * torchs_error


@needs_bf16
def test_sines_stay_in_float32() -> None:
    module, backend, time = TimeEmbedding(), OpenVINOBackend(), torch.tensor([981.0, 777.0])
    reference = module(time)
    module.bfloat16()
    result = compile_module(module, backend)(time)
    assert [model.precision for model in backend.reports[0].models] == ["f32", "bf16"]
    assert measure_error(result, reference) < 0.01  # in bfloat16 throughout it is 0.7


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "f16")])
def test_a_graph_runs_in_the_type_of_its_weights_or_is_refused(dtype: torch.dtype, name: str) -> None:
    """Which types a CPU computes in differs: none, bfloat16, or float16 too where it has AVX512-FP16 or AMX-FP16."""
    module, x = make_module().to(dtype), torch.randn(4, 16).to(dtype)
    backend = OpenVINOBackend()
    if {"bf16": "BF16", "f16": "FP16"}[name] in CAPABILITIES:
        result = compile_module(module, backend)(x)
        assert (result.dtype, backend.reports[0].models[0].precision) == (dtype, name)
    else:
        with pytest.raises(Exception, match=f"computes in (f32|bf16) here, not in {name}"):
            compile_module(module, backend)(x)
    torch._dynamo.reset()
    backend = OpenVINOBackend({"config": {"INFERENCE_PRECISION_HINT": "f32"}})
    result = compile_module(module, backend)(x)
    assert (result.dtype, backend.reports[0].models[0].precision) == (dtype, "f32")


def test_another_precision_than_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has every type refuses none, so the answer of another CPU stands in for OpenVINO's here."""
    monkeypatch.setattr(models, "_read_precision", lambda compiled, device: "bf16")
    with pytest.raises(Exception, match="CPU computes in bf16 here, not in f32; accept it with config: {'INFER"):
        compile_module(make_module(), OpenVINOBackend())(torch.randn(4, 16))


def test_operator_unknown_to_openvino_is_refused_by_name() -> None:
    with pytest.raises(Exception, match="aten.special_bessel_j0.default; with strict: false") as caught:
        compile_module(Bessel(), OpenVINOBackend())(torch.randn(4, 16))
    assert UnsupportedOperatorsError.__name__ in str(caught.value)


def test_without_strict_the_operator_runs_in_pytorch_and_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    module, backend, x = Bessel(), OpenVINOBackend({"strict": False}), torch.randn(4, 16)
    assert measure_error(compile_module(module, backend)(x), module(x)) < 1e-6
    (report,) = backend.reports
    assert report.operators_outside == ("aten.special_bessel_j0.default",)
    assert len(report.models) == 2
    assert "run in PyTorch, not on OpenVINO: aten.special_bessel_j0.default" in caplog.text


@pytest.mark.parametrize(
    ("reported", "disabled"),
    [
        ({"aten.renamed.default"}, []),
        ({"aten.renamed.default", "aten.gelu.default"}, []),
        ({"aten.gelu.default"}, ["aten.gelu.default"]),
    ],
    ids=["unknown", "one of two is known", "it runs in PyTorch already"],
)
def test_an_operator_that_cannot_move_to_pytorch_ends_the_compilation(
    reported: set[str], disabled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No module is known whose operators OpenVINO reports by other names, so its answer is replaced."""
    passes = iter(range(4))

    def convert(_: Any) -> Any:
        next(passes)  # ends an endless loop
        raise UnsupportedOperatorsError(reported)

    monkeypatch.setattr("openvino_backend.compiling.convert_graph", convert)
    backend = OpenVINOBackend({"strict": False, "disabled_ops": disabled})
    with pytest.raises(Exception, match="OpenVINO has no .*, and strict: false does not help"):
        compile_module(make_module(), backend)(torch.randn(4, 16))


def test_disabled_operators_run_in_pytorch() -> None:
    module, x = make_module(), torch.randn(4, 16)
    backend = OpenVINOBackend({"strict": False, "disabled_ops": ["aten.native_layer_norm.default"]})
    assert measure_error(compile_module(module, backend)(x), module(x)) < 1e-6
    (report,) = backend.reports
    assert report.operators_outside == ("aten.native_layer_norm.default",)
    assert len(report.models) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"disabled_ops": ["aten.exp.default"]}, "needs strict: false"),
        ({"disabled_ops": ["exp"], "strict": False}, "'aten.exp.default', not 'exp'"),
        ({"disabled_ops": "aten.exp.default", "strict": False}, "takes a list"),
        ({"decompositions": ["aten.linear"]}, "'decompositions' takes operators such as"),
        ({"decompositions": ["aten.mm.default"]}, "torch cannot decompose aten.mm.default"),
        ({"release_weights": "yes"}, "true or false, not 'yes'"),
        ({"strict": 1}, "true or false, not 1"),
        ({"max_graphs": 0}, "a number from 1, not 0"),
        ({"max_graphs": True}, "a number from 1, not True"),
        ({"cache_bytes": 0}, "a number of bytes from 1, not 0"),
        ({"aot_autograd": False}, "'aot_autograd' takes true, not False"),
        ({"weight_compression": "int4"}, "int8_sym or int8_asym, not 'int4'"),
        ({"quantize_convolutions": True}, "only with weight_compression: int8_sym, not None"),
        ({"quantize_linear_layers": True, "weight_compression": "int8_asym"}, "int8_sym, not 'int8_asym'"),
        ({"precision": "int4"}, "takes f32, f16, bf16, int8 or fastest, not 'int4'"),
        ({"precision": "int8", "weight_compression": "int8_sym"}, "'precision' sets weight_compression itself"),
        ({"precision": "f32", "quantize_convolutions": False}, "'precision' sets quantize_convolutions itself"),
        (
            {"precision": "fastest", "config": {"INFERENCE_PRECISION_HINT": "f32"}},
            "'precision' sets config's INFERENCE_PRECISION_HINT itself; leave that out, or 'precision'",
        ),
        ({"precision": "fastest", "device": "AUTO:CPU"}, "'precision' is for one device.*not 'AUTO:CPU'"),
        ({"device": "AUTO:GPU.7,CPU"}, "takes CPU.*not 'AUTO:GPU.7,CPU'"),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionsError, match=message):
        OpenVINOBackend(options)


def test_each_option_says_what_it_means_and_takes() -> None:
    for option in fields(Options):
        assert option.metadata["meaning"].endswith(".")
        assert option.metadata["accepted"]


class OtherMachine(openvino.Core):
    """OpenVINO on a machine with other devices, which have the properties of its CPU."""

    devices: tuple[str, ...] = ()

    @property
    def available_devices(self) -> list[str]:
        return list(self.devices)

    def get_property(self, device: str, name: str) -> Any:
        return super().get_property("CPU" if device.startswith("GPU") else device, name)


@pytest.mark.parametrize(
    ("devices", "name", "is_there"),
    [
        (("CPU", "GPU"), "GPU.0", True),
        (("CPU", "GPU"), "GPU.1", False),
        (("CPU", "GPU.0", "GPU.1"), "GPU", True),
        (("CPU", "GPU.0", "GPU.1"), "GPU.1", True),
        (("CPU", "GPU.0", "GPU.1"), "GPU.2", False),
        (("CPU", "GPU"), "AUTO:GPU.0,CPU", True),
        (("CPU",), "GPU.0", False),
    ],
)
def test_a_machines_only_gpu_has_two_names(
    monkeypatch: pytest.MonkeyPatch, devices: tuple[str, ...], name: str, is_there: bool
) -> None:
    monkeypatch.setattr(OtherMachine, "devices", devices)
    monkeypatch.setattr(openvino, "Core", OtherMachine)
    if is_there:
        assert Options.parse({"device": name}).device == name
    else:
        with pytest.raises(OptionsError, match=f"takes {', '.join(devices)} here.*not '{name}'"):
            Options.parse({"device": name})


def test_tensors_that_are_not_on_the_cpu_are_refused() -> None:
    """The device `meta` stands in for cuda:0, which this machine lacks."""
    message = "there are tensors on meta, and this backend takes CPU tensors"
    module, x = make_module().to("meta"), torch.randn(4, 16, device="meta")
    with pytest.raises(Exception, match=message):
        compile_module(module, OpenVINOBackend())(x)
    with pytest.raises(OpenVINOBackendError, match=message):
        CompiledFunction(module.forward)(x)

    class Making(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x + 1, torch.ones(3, device="meta") + 1

    with pytest.raises(OpenVINOBackendError, match=message):
        CompiledFunction(Making().forward)(torch.randn(3))


def test_options_of_one_compile_do_not_reach_another() -> None:
    module, x = Bessel(), torch.randn(4, 16)
    compile_module(module, OpenVINOBackend({"strict": False}))(x)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="bessel_j0"):
        compile_module(module, OpenVINOBackend())(x)


def test_weights_digest_tells_weights_apart() -> None:
    digests = []
    for seed in (0, 0, 1):
        torch._dynamo.reset()
        backend = OpenVINOBackend()
        compile_module(make_module(seed=seed), backend)(torch.randn(4, 16))
        digests.append(backend.reports[0].weights_sha256)
    assert digests[0] == digests[1] != digests[2]


def test_interpolation_stays_whole() -> None:
    module = torch.nn.Upsample(scale_factor=2.0, mode="nearest")
    backend, x = OpenVINOBackend(), torch.randn(1, 3, 8, 8)
    kernels = torch.ops.aten.upsample_nearest2d.vec.py_kernels.copy()
    assert torch.equal(compile_module(module, backend)(x), module(x))
    assert backend.reports[0].models[0].operators <= 8  # as index arithmetic it is 15
    assert torch.ops.aten.upsample_nearest2d.vec.py_kernels == kernels


def test_training_is_refused() -> None:
    with torch.enable_grad(), pytest.raises(Exception, match="inference only"):
        compile_module(make_module().requires_grad_(True), OpenVINOBackend())(torch.randn(4, 16))


def test_module_that_changes_its_buffers_is_refused() -> None:
    class Counter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x + self.calls

    with pytest.raises(Exception, match="changes its own parameters or buffers"):
        compile_module(Counter(), OpenVINOBackend())(torch.randn(4))


def test_new_shape_is_compiled_anew() -> None:
    module, backend = make_module(), OpenVINOBackend()
    compiled = compile_module(module, backend)
    for rows in (4, 5, 4):
        x = torch.randn(rows, 16)
        assert measure_error(compiled(x), module(x)) < 1e-6
    assert len(backend.reports) == 2


def test_shapes_past_the_bound_are_refused() -> None:
    compiled = compile_module(make_module(), OpenVINOBackend({"max_graphs": 2}))
    for rows in (2, 3, 2):
        compiled(torch.randn(rows, 16))
    with pytest.raises(Exception, match="fewer different shapes, or raise the option 'max_graphs'"):
        compiled(torch.randn(4, 16))
    compiled(torch.randn(3, 16))


@pytest.mark.parametrize("device", ["AUTO", "AUTO:CPU", "HETERO:CPU", "MULTI:CPU", "BATCH:CPU"])
def test_devices_that_stand_for_several(device: str) -> None:
    module, x = make_module(), torch.randn(4, 16)
    backend = OpenVINOBackend({"device": device, "config": {"INFERENCE_PRECISION_HINT": "f32"}})
    assert measure_error(compile_module(module, backend)(x), module(x)) < 1e-6
    (model,) = backend.reports[0].models
    assert (model.devices, model.precision) == (("CPU",), "f32")


def test_results_are_not_overwritten_by_later_calls() -> None:
    compiled = compile_module(make_module(), OpenVINOBackend())
    first = compiled(torch.randn(4, 16))
    kept = first.clone()
    compiled(torch.randn(4, 16))
    assert torch.equal(first, kept)


def test_input_with_other_strides() -> None:
    module = make_module()
    compiled = compile_module(module, OpenVINOBackend())
    x = torch.randn(16, 4).t()
    assert measure_error(compiled(x), module(x)) < 1e-6


def test_threads_get_their_own_results() -> None:
    module = make_module()
    compiled = compile_module(module, OpenVINOBackend())
    inputs = [torch.randn(4, 16) for _ in range(8)]
    compiled(inputs[0])
    wrong: list[int] = []

    def call(x: torch.Tensor) -> None:
        with torch.no_grad():
            wrong.extend(i for i in range(50) if measure_error(compiled(x), module(x)) > 1e-6)

    threads = [threading.Thread(target=call, args=(x,)) for x in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_cache_serves_the_second_start_and_tells_weights_apart(tmp_path: Path) -> None:
    options = {"model_caching": True, "cache_dir": str(tmp_path / "cache")}
    x = torch.randn(4, 16)
    for seed, is_cached in ((0, False), (0, True), (1, False), (1, True)):
        torch._dynamo.reset()
        module, backend = make_module(seed=seed), OpenVINOBackend(options)
        assert measure_error(compile_module(module, backend)(x), module(x)) < 1e-6
        assert [model.loaded_from_cache for model in backend.reports[0].models] == [is_cached]


def run_cached(folder: Path) -> tuple[float, bool]:
    """Compile the same module anew; return its error, and whether it came from the cache."""
    torch._dynamo.reset()
    module, x = make_module(), torch.randn(4, 16)
    backend = OpenVINOBackend({"model_caching": True, "cache_dir": str(folder)})
    error = measure_error(compile_module(module, backend)(x), module(x))
    return error, backend.reports[0].models[0].loaded_from_cache


@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "unfinished"])
def test_damaged_cache_entry_is_made_anew(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    run_cached(tmp_path)
    (model,) = tmp_path.glob("*/model.xml")
    content = bytearray(model.read_bytes())
    if damage == "flipped bit":
        content[len(content) // 2] ^= 1
    model.write_bytes(content[: len(content) // 2] if damage == "cut short" else content)
    if damage == "unfinished":
        (model.parent / "seal.json").unlink()
    for is_cached in (False, True):
        error, loaded_from_cache = run_cached(tmp_path)
        assert error < 1e-6
        assert loaded_from_cache is is_cached
    assert caplog.text.count("is damaged or unfinished; it is made anew") == 1


def test_two_processes_share_a_cache_entry(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path; from tests.unit.test_backend import run_cached\n"
        "print('ready', flush=True)\n"
        "with torch.no_grad(): print(*run_cached(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert any(line == "ready\n" for line in other.stdout)
        error, is_cached = run_cached(tmp_path)
        others_error, is_others_cached = other.communicate(timeout=120)[0].split()[-2:]
    assert {str(is_cached), is_others_cached} == {"False", "True"}
    assert max(error, float(others_error)) < 1e-6


def test_cache_folder_that_cannot_be_made_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    error, is_cached = run_cached(tmp_path / "file" / "cache")
    assert error < 1e-6
    assert not is_cached
    assert "file/cache is not used, and what is compiled is not kept: Not a directory" in caplog.text


def test_dynamo_finds_it_by_name() -> None:
    module, x = make_module(), torch.randn(4, 16)
    compiled = torch.compile(module, backend="openvino_backend", dynamic=False, options={"device": "CPU"})
    assert measure_error(compiled(x), module(x)) < 1e-6


@needs_bf16
@pytest.mark.parametrize(("mode", "kind", "tensors"), [("int8_sym", "i8", 1), ("int8_asym", "u8", 4)])
def test_weight_compression(mode: str, kind: str, tensors: int) -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(4, 32, 3), torch.nn.Flatten(), torch.nn.Linear(512, 64))
    x = torch.randn(2, 4, 6, 6)
    reference = module(x)
    config = {"INFERENCE_PRECISION_HINT": "bf16"}
    backend = OpenVINOBackend({"weight_compression": mode, "config": config})
    result = compile_module(module.half(), backend)(x.half()).float()
    assert 1e-4 < measure_error(result, reference) < 0.02
    # Of int8_sym the convolution of few channels is none; int8_asym has zero points beside the weights.
    assert backend.reports[0].models[0].constants[kind] == tensors


@pytest.mark.parametrize("activation", [torch.nn.SiLU(), torch.nn.Tanh()])
def test_quantized_convolutions(activation: torch.nn.Module) -> None:
    layers = [torch.nn.Conv2d(4, 32, 3), activation, torch.nn.Conv2d(32, 64, 3, padding=1), torch.nn.Conv2d(64, 64, 1)]
    module = torch.nn.Sequential(*layers).requires_grad_(False)
    options = {"weight_compression": "int8_sym", "config": {"INFERENCE_PRECISION_HINT": "f32"}}
    plain = compile_module(module, OpenVINOBackend(options))
    backend = OpenVINOBackend({**options, "quantize_convolutions": True})
    compiled = compile_module(module, backend)
    # Each picture has its own scale: neither a large neighbour nor a large input takes its levels.
    pictures = torch.randn(4, 4, 16, 16) * torch.tensor([0.0, 1, 30, 1000]).view(-1, 1, 1, 1)
    for ours, expected in zip(compiled(pictures), plain(pictures), strict=True):
        assert measure_error(ours, expected) < 0.02
    assert measure_error(compiled(pictures), plain(pictures)) > 1e-4
    # Those with few channels and those of one pixel are left as they are.
    assert backend.reports[0].models[0].quantized_convolutions == 1


class Attention(torch.nn.Module):
    """Three layers of one input, attention, a layer of the result, and a gated activation."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.end = (torch.nn.Linear(64, 64) for _ in range(4))
        self.gate, self.down = torch.nn.Linear(64, 512), torch.nn.Linear(256, 64)
        self.time = torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        x = x + self.time(time)[:, None]
        heads = (layer(x).unflatten(-1, (4, 16)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        attended = torch.nn.functional.scaled_dot_product_attention(*heads)
        x = x + self.end(attended.transpose(1, 2).flatten(2))
        value, gate = self.gate(x).chunk(2, dim=-1)
        return x + self.down(value * torch.nn.functional.gelu(gate))


def test_quantized_linear_layers() -> None:
    torch.manual_seed(0)
    module = Attention().requires_grad_(False)
    options = {"weight_compression": "int8_sym", "config": {"INFERENCE_PRECISION_HINT": "f32"}}
    plain = compile_module(module, OpenVINOBackend(options))
    backend = OpenVINOBackend({**options, "quantize_linear_layers": True})
    compiled = compile_module(module, backend)
    # Each token has its own scale: neither a large neighbour nor a large input takes its levels.
    tokens = torch.randn(2, 4, 64) * torch.tensor([0.0, 1, 30, 1000]).view(1, -1, 1)
    time = torch.randn(2, 64) / 100
    for ours, expected in zip(compiled(tokens, time).unbind(1), plain(tokens, time).unbind(1), strict=True):
        assert measure_error(ours, expected) < 0.03  # of four layers one after the other
    assert measure_error(compiled(tokens, time), plain(tokens, time)) > 1e-4
    # The gate's layer is two; a layer of vectors stays as it is.
    assert backend.reports[0].models[0].quantized_linear_layers == 7


def test_a_convolution_and_a_linear_layer_are_quantized_each_by_its_own_option() -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(32, 32, 3, padding=1), torch.nn.Flatten(2), torch.nn.Linear(64, 64)]
    module, picture = torch.nn.Sequential(*layers).requires_grad_(False), torch.randn(1, 32, 8, 8)
    names, counts = ("quantize_convolutions", "quantize_linear_layers"), []
    for chosen in ((), names[:1], names[1:], names):
        backend = OpenVINOBackend(
            {"weight_compression": "int8_sym", "config": {"INFERENCE_PRECISION_HINT": "f32"}}
            | dict.fromkeys(chosen, True)
        )
        compile_module(module, backend)(picture)
        model = backend.reports[0].models[0]
        counts.append((model.quantized_convolutions, model.quantized_linear_layers))
    assert counts == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_short_weights_stay_short() -> None:
    module, x = make_module().half(), torch.randn(4, 16).half()
    backend = OpenVINOBackend({"config": {"INFERENCE_PRECISION_HINT": "f32"}})
    compile_module(module, backend)(x)
    assert backend.reports[0].models[0].constants == {"f16": 6}


@pytest.mark.parametrize("shapes", [((2, 12), (4, 4)), ((4, 6), (2, 2, 8)), ((2, 12), (2, 8)), ((4, 6), (4, 8))])
def test_views_around_a_linear_layer_keep_their_meaning(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    class Reshaped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(shapes[0][-1], 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.view(shapes[0])).view(shapes[1])

    module, x = Reshaped(), torch.randn(4, 6)
    result = compile_module(module, OpenVINOBackend())(x)
    assert result.shape == module(x).shape
    assert measure_error(result, module(x)) < 1e-6


def test_linear_layers_stay_whole() -> None:
    backend, x = OpenVINOBackend(), torch.randn(2, 3, 5, 16)
    module = torch.nn.Linear(16, 8)
    assert measure_error(compile_module(module, backend)(x), module(x)) < 1e-6
    assert backend.reports[0].models[0].operators <= 5  # input, two constants, linear layer, output


def test_decompositions_take_an_operator_apart() -> None:
    x, operators = torch.randn(4, 16), []
    for names in ([], ["aten.native_layer_norm.default"]):
        torch._dynamo.reset()
        module, backend = make_module(), OpenVINOBackend({"decompositions": names})
        assert measure_error(compile_module(module, backend)(x), module(x)) < 1e-6
        operators.append(backend.reports[0].models[0].operators)
    assert operators[0] < operators[1]


def test_what_is_private_of_pytorch_is_in_one_file() -> None:
    package = Path(openvino_backend.__file__).parent
    private = re.compile(r"torch(\.\w+)*\._(?!_)|\._artifacts|_dispatch_cache|py_kernels|orig_guard|_dynamo_static")
    found = {path.name for path in package.glob("*.py") if private.search(path.read_text())}
    assert found == {"torch_private.py"}
