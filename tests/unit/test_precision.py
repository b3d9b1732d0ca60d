"""The switch `precision`: what it stands for, on this machine and on others."""

from pathlib import Path
from typing import Any

import openvino
import pytest
import torch

from openvino_backend import CompiledFunction, OpenVINOBackend, Options, OptionsError
from openvino_backend.precision import choose_arithmetic, find_kind, read_flags
from tests.unit.modules import CAPABILITIES, HAS_BF16, make_module, measure_error

SAPPHIRE_RAPIDS = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
ZEN_5 = ("avx2", "avx_vnni", "avx512_f", "avx512_vnni", "avx512_bf16")
ZEN_4 = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16")
CASCADE_LAKE = ("avx2", "avx512_f", "avx512_vnni")
WEIGHTS = {"weight_compression": "int8_sym", "quantize_convolutions": True}


@pytest.mark.parametrize(
    ("flags", "int8", "fastest"),
    [
        *(
            (
                flags,
                {
                    **WEIGHTS,
                    "quantize_linear_layers": True,
                    "config": {"INFERENCE_PRECISION_HINT": "bf16", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0},
                },
                "int8",
            )
            for flags in (SAPPHIRE_RAPIDS, ZEN_5, ZEN_4)
        ),
        (
            CASCADE_LAKE,
            {**WEIGHTS, "config": {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 320}},
            "int8",
        ),
        (("avx2",), {**WEIGHTS, "config": {"INFERENCE_PRECISION_HINT": "f32"}}, "f32"),
        (("avx2", "avx_vnni"), {**WEIGHTS, "config": {"INFERENCE_PRECISION_HINT": "f32"}}, "f32"),
        # Its AMX is of no use without bfloat16 between the products.
        (
            (*CASCADE_LAKE, "amx_int8"),
            {**WEIGHTS, "config": {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 320}},
            "int8",
        ),
    ],
)
def test_each_kind_of_cpu_has_its_own(flags: tuple[str, ...], int8: dict[str, Any], fastest: str) -> None:
    kind = find_kind(frozenset(flags))
    assert (kind.int8, kind.fastest) == (int8, fastest)


def test_flags_are_this_machines() -> None:
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    for name in ("amx_int8", "amx_bf16", "avx512_vnni", "avx512_bf16", "avx2"):
        assert (name in read_flags()) == (name in flags)


def test_int8_is_what_it_stands_for_to_the_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(32, 32, 3, padding=1), torch.nn.Flatten(2), torch.nn.Linear(64, 64)]
    module, picture = torch.nn.Sequential(*layers).requires_grad_(False).half(), torch.randn(1, 32, 8, 8).half()
    cache = {"model_caching": True, "cache_dir": str(tmp_path)}
    results, reports = [], []
    for options in ({"precision": "int8"}, dict(choose_arithmetic("int8", "CPU").options)):
        compiled = CompiledFunction(module.forward, {**options, **cache})
        with torch.no_grad():
            results.append(compiled(picture))
        reports.append(compiled.backend.reports[0])
    assert torch.equal(*results)
    assert [each.models[0].loaded_from_cache for each in reports] == [False, True]  # one entry for both
    assert reports[0].models[0].quantized_convolutions == 1
    assert reports[0].models[0].constants["i8"] == 2


class Gated(torch.nn.Module):
    """A gate of 1 MB in 8 bits, which is compiled as two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.both, self.last = torch.nn.Linear(256, 4096), torch.nn.Linear(2048, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.both(x).chunk(2, dim=-1)
        return self.last(value * torch.nn.functional.gelu(gate))


def test_what_openvino_has_compiled_of_8_bits_is_kept_without_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = Gated().requires_grad_(False).half(), torch.randn(1, 5, 256).half()
    results, reports = [], []
    for flags in (read_flags(), read_flags(), read_flags() ^ {"amx_int8"}):
        monkeypatch.setattr("openvino_backend.cache.read_flags", lambda flags=flags: flags)
        options = {"precision": "int8", "model_caching": True, "cache_dir": str(tmp_path)}
        compiled = CompiledFunction(module.forward, options)
        with torch.no_grad():
            results.append(compiled(x))
        reports.append(compiled.backend.reports[0])
    assert torch.equal(results[0], results[1])
    # On another CPU of the same name what was compiled may not run.
    assert [(each.traced, each.models[0].loaded_from_cache) for each in reports] == [
        (True, False),
        (False, True),
        (True, False),
    ]
    for blob in tmp_path.glob("*/*.blob"):
        assert blob.stat().st_size < 2**20 / 4 < blob.with_name("model.bin").stat().st_size / 4
    assert len(list(tmp_path.glob("*/*.blob"))) == 2


@pytest.mark.parametrize("precision", ["f32", "f16", "bf16"])
def test_a_floating_point_type_is_the_models_or_refused(precision: str) -> None:
    module, x = make_module(), torch.randn(4, 16)
    if {"f32": "FP32", "f16": "FP16", "bf16": "BF16"}[precision] not in CAPABILITIES:
        with pytest.raises(OptionsError, match=rf"'precision' takes f32, .*int8 and fastest on CPU, not '{precision}'"):
            OpenVINOBackend({"precision": precision})
        return
    backend = OpenVINOBackend({"precision": precision})
    result = torch.compile(module, backend=backend, dynamic=False)(x)
    assert backend.reports[0].models[0].precision == precision
    assert measure_error(result, module(x)) < 0.02
    assert backend.options.describe_arithmetic() == {
        "precision": precision,
        "INFERENCE_PRECISION_HINT": precision,
        "lossy": False,
        "reason": "as asked for",
    }


def test_fastest_says_what_it_is_and_why() -> None:
    options = Options.parse({"precision": "fastest", "config": {"NUM_STREAMS": 1}})
    described = options.describe_arithmetic()
    assert options.config["NUM_STREAMS"] == 1
    assert described["lossy"] == options.is_lossy == (find_kind(read_flags()).fastest == "int8")
    assert described["INFERENCE_PRECISION_HINT"] == ("bf16" if HAS_BF16 else "f32")
    assert described["reason"].startswith(f"a CPU with {find_kind(read_flags()).name}: ")


@pytest.mark.parametrize(("precision", "weights"), [("int8", "int8_sym"), ("fastest", None)])
def test_a_gpu_takes_what_is_usual(precision: str, weights: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino.Core, "get_property", lambda core, device, name: ["FP32", "FP16", "INT8"])
    chosen = choose_arithmetic(precision, "GPU")
    assert chosen.options.get("weight_compression") == weights
    assert chosen.options["config"] == {"INFERENCE_PRECISION_HINT": "f16"}
    assert "nothing was measured" in chosen.reason


@pytest.mark.parametrize("given", ["f32", "FP32", "float32", openvino.Type.f32])
def test_a_type_has_one_name(given: Any) -> None:
    options = Options.parse({"config": {"INFERENCE_PRECISION_HINT": given}})
    assert (options.arithmetic, options.describe_arithmetic()["INFERENCE_PRECISION_HINT"]) == ("f32", "f32")
    backend = OpenVINOBackend({"config": {"INFERENCE_PRECISION_HINT": given}})
    torch.compile(make_module().bfloat16(), backend=backend, dynamic=False)(torch.ones(4, 16).bfloat16())
    assert backend.reports[0].models[0].precision == "f32"


def test_accuracy_means_float32() -> None:
    module, backend = make_module().bfloat16(), OpenVINOBackend({"config": {"EXECUTION_MODE_HINT": "ACCURACY"}})
    torch.compile(module, backend=backend, dynamic=False)(torch.ones(4, 16).bfloat16())
    assert backend.reports[0].models[0].precision == "f32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": {"INFERENCE_PRECISION_HINT": "f31"}}, "INFERENCE_PRECISION_HINT one of f32, f16, bf16, not 'f31'"),
        ({"config": {"INFERENCE_PRECISION_HINT": None}}, "one of f32, f16, bf16, not None"),
        (
            {"config": {"INFERENCE_PRECISION_HINT": "bfloat16", "EXECUTION_MODE_HINT": "ACCURACY"}},
            "INFERENCE_PRECISION_HINT: f32 with EXECUTION_MODE_HINT: ACCURACY, not bf16",
        ),
        (
            {"precision": "bf16", "config": {"INFERENCE_PRECISION_HINT": "float32"}},
            "'precision' sets config's INFERENCE_PRECISION_HINT itself",
        ),
        (
            {"precision": "fastest", "config": {"EXECUTION_MODE_HINT": "ACCURACY"}},
            "'precision' sets config's EXECUTION_MODE_HINT itself",
        ),
    ],
)
def test_settings_of_the_arithmetic_that_differ_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionsError, match=message):
        Options.parse(options)


def test_options_of_experts_are_described_too() -> None:
    described = Options.parse({"weight_compression": "int8_asym"}).describe_arithmetic()
    assert described == {"weight_compression": "int8_asym", "lossy": True}
