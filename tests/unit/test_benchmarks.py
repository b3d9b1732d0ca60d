"""The benchmark: its configurations, what it measures again and what not, its report, and one small real run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import __main__ as benchmarks
from benchmarks import turns
from benchmarks.configurations import GUIDE, Configuration, ConfigurationError, read_configurations
from benchmarks.errors import measure_errors
from benchmarks.parts import Part
from benchmarks.peak import prepare_openvino
from benchmarks.report import make_rows, write_report
from benchmarks.shortcuts import judge_ways, list_ways
from openvino_backend import CompiledFunction
from sdxl_server.config.settings import CompileConfig
from tests.unit.modules import measure_error
from tools import random_model
from tools.server import ROOT

MACHINE = {
    "cpu": "a CPU",
    "cores": 2,
    "flags": ["avx2"],
    "memory_gigabytes": 1.0,
    "governor": "not told",
    "threads": 2,
    "python": "3",
    "versions": {"torch": "2"},
    "openvino_capabilities": ["FP32", "INT8"],
    "peak_gigaflops": {"f32": 100.0, "int8": 400.0},
}
EAGER: dict[str, Any] = {"name": "eager", "arithmetic": "f32"}
OURS: dict[str, Any] = {"name": "ours", "arithmetic": "f32", "weights": "float16", "pt2": {"backend": "openvino"}}


def write_configurations(folder: Path, *raw: Any) -> Path:
    path = folder / "configurations.yaml"
    path.write_text(json.dumps(raw))
    return path


def read_records(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "results.jsonl").read_text().splitlines())
    return [each for each in lines if "configuration" in each]


def make_record(raw: dict[str, Any], **figures: Any) -> dict[str, Any]:
    settled = Configuration.parse(raw).settle(has_bf16=False)
    record = {"configuration": vars(settled), "part": "unet", "time": "now", "load_average": 0.0, "ran": "something"}
    return {**record, "load": 1.0, "peak_gigabytes": 2.0, "from_cache": False, "error": 0.0, **figures}


def test_shipped_configurations() -> None:
    shipped = read_configurations(Path(benchmarks.__file__).with_name("configurations.yaml"))
    assert (shipped[0].pt2, shipped[0].native, shipped[0].arithmetic) == (None, None, "f32")  # the reference
    guide = next(each for each in shipped if each.name == GUIDE)
    assert CompileConfig.parse(guide.pt2) == CompileConfig(backend="inductor", mode="reduce-overhead")
    assert {each.compression for each in shipped} == {None, "int8_sym", "int8"}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"arithmetic": "f32"}, "takes keys and values with a name, not {'arithmetic': 'f32'}"),
        ({**EAGER, "steps": 3}, "eager.steps is not a key; the keys are name, arithmetic, weights, pt2, native, peer"),
        ({"name": "eager"}, "eager.arithmetic takes f32 | bf16 | best, not None"),
        ({**EAGER, "arithmetic": "fp32"}, "eager.arithmetic takes f32 | bf16 | best, not 'fp32'"),
        ({**EAGER, "weights": "int8"}, "eager.weights takes float32 | bfloat16 | float16, not 'int8'"),
        ({**EAGER, "pt2": {"backend": "openvino", "options": {"a": 1}}}, "eager: pt2.options: unknown OpenVINO option"),
        ({**EAGER, "native": {"mode": 1}}, "eager.native.mode is not a key; the keys are weight_compression, config"),
        ({**EAGER, "native": {"weight_compression": "nf4"}}, "takes int8_sym | int8_asym, not 'nf4'"),
        ({**EAGER, "native": {"config": 1}}, "eager.native.config takes the library's options by name, not 1"),
        ({**OURS, "native": {}}, "ours takes pt2 or native, not both"),
        ({**EAGER, "peer": {"library": "optimum"}}, "eager.peer.weight_format takes fp32 | fp16 | int8, not None"),
        ({**EAGER, "peer": {"library": "diffusers"}}, "peer.library takes optimum | genai | sdcpp, not 'diffusers'"),
        ({**EAGER, "peer": {"library": "sdcpp", "weight_format": "int8"}}, "takes f32 | f16 | bf16 | q8_0, not 'int8'"),
        ({**EAGER, "peer": {"library": "genai", "weight_format": "q8_0"}}, "takes fp32 | fp16 | int8, not 'q8_0'"),
    ],
)
def test_wrong_configuration(raw: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read_configurations(write_configurations(tmp_path, EAGER, raw))
    assert message in str(caught.value)


def test_names_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="takes each name once, not 'eager' 2 times"):
        read_configurations(write_configurations(tmp_path, EAGER, EAGER))
    both = read_configurations(write_configurations(tmp_path, EAGER, OURS, {**OURS, "name": "more"}))
    with pytest.raises(ConfigurationError, match="--only takes eager, ours, more, not 'our'"):
        benchmarks.choose(both, ["our"])
    assert [each.name for each in benchmarks.choose(both, ["more"])] == ["eager", "more"]


def test_arithmetic_is_settled_by_the_machine() -> None:
    best = Configuration.parse({"name": "best", "arithmetic": "best"})
    assert [best.settle(each).arithmetic for each in (True, False)] == ["bf16", "f32"]
    assert [best.settle(each).weights for each in (True, False)] == ["bfloat16", "float32"]
    ours = Configuration.parse({**OURS, "arithmetic": "bf16"}).settle(has_bf16=False)
    assert (ours.arithmetic, ours.weights) == ("bf16", "float16")


def test_only_what_is_missing_is_measured(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {
        key: value for key, value in make_record(EAGER, first=2.0, steps=[1.0]).items() if key != "configuration"
    }
    measured: list[tuple[str, int]] = []
    is_broken = True

    def run_module(name: str, *arguments: str, **_: Any) -> dict[str, Any]:
        if name == "benchmarks.machine":
            return dict(MACHINE)
        job = json.loads(arguments[0])
        measured.append((job["configuration"]["name"], job["steps"]))
        if is_broken and job["configuration"]["name"] == "ours":
            raise benchmarks.MeasuringError("exit code 1: broken")
        return figures

    monkeypatch.setattr(benchmarks, "run_module", run_module)
    short = {**EAGER, "name": "short", "arithmetic": "bf16"}
    path = write_configurations(tmp_path, EAGER, OURS, short)
    command = ["--model", str(tiny_model), "--output", str(tmp_path), "--configurations", str(path), "--rounds", "1"]
    benchmarks.main(command)
    assert measured == [("eager", 3), ("ours", 3)]
    eager, ours, skipped = read_records(tmp_path)
    assert (eager["steps"], ours["failed"]) == ([1.0], "exit code 1: broken")
    assert skipped["skipped"] == "no bfloat16 arithmetic among the CPU's FP32, INT8"
    measured.clear()
    is_broken = False
    benchmarks.main(command)
    assert measured == [("ours", 3)]  # what failed is tried again
    assert "broken" not in (tmp_path / "report.md").read_text()
    measured.clear()
    benchmarks.main(command)
    assert measured == []
    assert "broken" not in (tmp_path / "report.md").read_text()
    benchmarks.main([*command, "--steps", "5"])
    assert measured == [("eager", 5), ("ours", 5)]
    assert "| ours | 1 (1–1) |" in (tmp_path / "report.md").read_text()
    figures["steps"] = [2.0]
    write_configurations(tmp_path, EAGER, {**OURS, "weights": "float32"}, short)
    benchmarks.main(command)
    assert "| ours | 2 (2–2) |" in (tmp_path / "report.md").read_text()  # not those of the configuration as it was


def test_what_cannot_be_measured_says_why(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "run_module", lambda *_, **__: dict(MACHINE))
    monkeypatch.setattr(benchmarks, "PEERS", tmp_path / "none")
    native = {"name": "native", "arithmetic": "f32", "native": {}}
    peer = {"name": "peer", "arithmetic": "f32", "peer": {"library": "genai", "weight_format": "int8"}}
    path = write_configurations(tmp_path, native, peer)
    command = ["--model", str(tiny_model), "--output", str(tmp_path), "--configurations", str(path), "--rounds", "1"]
    benchmarks.main([*command, "--parts", "picture"])
    assert [each["skipped"] for each in read_records(tmp_path)] == [
        "openvino.convert_model converts parts, not the whole",
        "its environment is missing; make peers makes it",
    ]
    listed = Configuration.parse(peer)
    run = benchmarks.Run(benchmarks.read_options(command), [listed])
    run.measure(listed, "unet", 1)
    assert run.records[-1]["skipped"] == "openvino-genai makes whole pictures only (--parts picture)"


@pytest.mark.soak
def test_whole_pictures(tmp_path: Path) -> None:
    path = write_configurations(tmp_path, EAGER, OURS)
    command = [
        "--quick",
        "--parts",
        "picture",
        "--output",
        str(tmp_path),
        "--configurations",
        str(path),
        "--steps",
        "3",
    ]
    benchmarks.main([*command, "--num-inference-steps", "6", "--rounds", "1"])
    eager, ours = read_records(tmp_path)
    assert eager["ran"].startswith("PyTorch in float32; JPEG ")
    assert ours["ran"].startswith("OpenVINO in f32, 5 models; JPEG ")
    assert (eager["error"], eager["score"], len(ours["steps"])) == (0.0, ours["score"], 3)
    assert eager["score"] > 0.5  # the first three held-out prompts
    assert 0 < ours["error"] < 0.02  # of pictures, rounded to 256 levels, from weights in float16
    assert Image.open(tmp_path / "ours.jpg").size == (3 * 128, 128)
    report = (tmp_path / "report.html").read_text()
    assert report.count('<img src="data:image/jpeg;base64,') == 2
    assert f"<td>{eager['score']:.0%}</td>" in report


def test_peak_in_8_bits_is_of_8_bit_products() -> None:
    request: Any = prepare_openvino("int8", 512, 2).__self__  # type: ignore[attr-defined]
    executed = [node.get_rt_info() for node in request.get_compiled_model().get_runtime_model().get_ops()]
    kernels = [
        about["primitiveType"].astype(str) for about in executed if about["layerType"].astype(str) == "FullyConnected"
    ]
    assert [kernel.lower()[-2:] for kernel in kernels] == ["i8", "i8"]


def test_report_is_computed_from_records(tmp_path: Path) -> None:
    guide = {"name": GUIDE, "arithmetic": "f32", "pt2": {"backend": "inductor", "mode": "reduce-overhead"}}
    int8 = {**OURS, "pt2": {"backend": "openvino", "options": {"weight_compression": "int8_sym"}}}
    records = [
        make_record(EAGER, first=8.0, steps=[8.0, 8.0], flops=400_000_000_000),
        make_record(guide, first=100.0, steps=[10.0, 9.0, 11.0]),
        make_record(int8, first=52.0, steps=[2.0, 3.0], error=0.01),
        make_record(int8, first=13.0, steps=[2.0, 1.0], error=0.02, from_cache=True, peak_gigabytes=1.5),
        make_record({**EAGER, "name": "short"}, skipped="no <bfloat16>"),
        make_record({**EAGER, "name": "wild"}, first=1.0, steps=[1.0], error=None),
    ]
    rows = {row.name: row for row in make_rows(MACHINE, records)}
    ours = rows["ours"]
    assert (ours.median, ours.ratio, ours.error) == (2.0, 5.0, 0.02)
    assert (ours.cold, ours.warm, ours.peak_cold, ours.peak_warm) == (49.5, 11.5, 2.0, 1.5)
    assert ours.share == pytest.approx(400 / 2.0 / 400)
    assert rows["eager"].share == pytest.approx(400 / 8.0 / 100)
    assert (rows["short"].note, rows["short"].median) == ("skipped: no <bfloat16>", None)
    assert rows["wild"].error is None
    write_report(tmp_path, MACHINE, records, title="a model")
    markdown, html = ((tmp_path / f"report.{kind}").read_text() for kind in ("md", "html"))
    line = "| ours | 2 (1–3) | 5.00 | 0.02 | – | 50% | 49.5 | 11.5 | 1.0 | 2.0 | 1.5 | something |"
    assert line in markdown.splitlines()
    assert "<td>2 (1–3)</td><td>5.00</td>" in html
    assert "no &lt;bfloat16&gt;" in html
    assert 'width: 16.0%"></i>2<' in html  # a fifth of the longest bar, which is the guide's
    assert not any(word in html for word in ("http", "src=", "<script", "<link", "url("))


@pytest.mark.parametrize("size", random_model.CONFIGURATIONS)
def test_random_models_tokenizers_fit_their_text_encoders(size: str) -> None:
    """The server refuses others."""
    for text in random_model.CONFIGURATIONS[size]["text"]:
        assert len(random_model.make_tokenizer(text["vocab_size"])) == text["vocab_size"]


def test_real_run(tiny_model: Path, tmp_path: Path) -> None:
    broken = {"name": "broken", "arithmetic": "f32", "native": {"config": {"NO_SUCH_PROPERTY": 1}}}
    path = write_configurations(tmp_path, EAGER, OURS, broken)
    command = ["--model", str(tiny_model), "--output", str(tmp_path), "--configurations", str(path), "--size", "64"]
    benchmarks.main([*command, "--rounds", "1"])
    eager, ours, failed = read_records(tmp_path)
    assert (eager["ran"], eager["error"]) == ("PyTorch in float32", 0.0)
    assert eager["flops"] > 1e6
    assert (ours["ran"], ours["from_cache"]) == ("OpenVINO in f32, 2 models", False)
    assert 0 < ours["error"] < 2e-3  # inputs and results are in float16, which holds 11 bits
    (reference,) = tmp_path.glob("reference-unet-*.pt")
    assert len(torch.load(reference)) == 4 * 2 * 4 * 8 * 8  # of as many calls
    for record in (eager, ours):
        assert len(record["steps"]) == 3
        assert record["first"] > min(record["steps"]) > 0
        assert 0.2 < record["peak_gigabytes"] < 4
    assert "NO_SUCH_PROPERTY" in failed["failed"]
    assert "| ours |" in (tmp_path / "report.md").read_text()


def test_turns(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = {"name": "broken", "arithmetic": "f32", "native": {"config": {"NO_SUCH_PROPERTY": 1}}}
    path = write_configurations(tmp_path, EAGER, OURS, broken)
    command = ["--model", str(tiny_model), "--size", "64", "--rounds", "3", "--configurations", str(path), "--only"]
    turns.main([*command, "ours", "eager"])
    _, _, ours, eager = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"\| ours \| [\d.]+ \([\d.]+–[\d.]+\) \| 1.00 \(1.00–1.00\) \| OpenVINO in f32, 2 models \|", ours
    )
    assert re.fullmatch(r"\| eager \| .+ \| 0\.\d\d \(0\.\d\d–\d\.\d\d\) \| PyTorch in float32 \|", eager)
    with pytest.raises(SystemExit, match="broken has ended: .*NO_SUCH_PROPERTY"):
        turns.main([*command, "ours", "broken"])
    with pytest.raises(SystemExit, match="--only takes eager, ours, broken, not 'theirs'"):
        turns.main([*command, "theirs"])


def test_errors_of_8_bits_are_those_of_what_runs() -> None:
    """In float32 between the products, as --errors has it."""
    part = Part(ROOT / "demo/model", "unet", "float32", 128)
    errors = measure_errors(part)
    options = {"weight_compression": "int8_sym", "quantize_convolutions": True, "quantize_linear_layers": True}
    with torch.no_grad():
        expected = torch.cat([part.method(**each)[0] for each in part.calls])
        compiled = CompiledFunction(part.method, options)
        result = torch.cat([compiled(**each)[0] for each in part.calls])
    assert measure_error(result, expected) == pytest.approx(errors["all"], rel=0.2)
    assert errors["the weights alone"] < errors["all"]
    assert set(errors) >= {"up_blocks.0", "mid_block", "others", "resnets", "attn1", "ff.net.2"}


def test_shortcuts_are_judged_by_their_distance_to_the_full_picture(tiny_model: Path, tmp_path: Path) -> None:
    ways = list_ways(6, [4])
    chosen = {name: ways[name] for name in ("full", "unet_calls: 4", "4 steps without guidance")}
    settings = {"dtype": "float32", "guidance_scale": 5.0, "warm_up": False}
    full, near, unguided = judge_ways(tiny_model, chosen, settings=settings, pt2=None, count=2, output=tmp_path)
    assert (full.calls, near.calls, unguided.calls) == (6, 4, 4)
    assert (full.psnr, full.latents) == (float("inf"), 0)
    assert near.psnr > unguided.psnr > 0
    assert 0 < near.latents < unguided.latents
    assert len((tmp_path / "shortcuts.md").read_text().splitlines()) == 4 + len(chosen)
