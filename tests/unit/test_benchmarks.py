"""The benchmarks: their configurations, the order of turns, and small real runs of each command."""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import __main__ as benchmarks
from benchmarks import comparison
from benchmarks.comparison import find_obstacle
from benchmarks.configurations import PARTS, Configuration, ConfigurationError, choose_configurations
from benchmarks.parts import Part, list_tensors
from benchmarks.shortcuts import format_plans, judge_plans, list_plans
from benchmarks.turns import Figures, MeasuringError, Row, format_starts, measure_in_turns
from sdxl_server.config.compile_settings import CompileConfig
from tools import random_model
from tools.server import ROOT

EAGER: dict[str, Any] = {"name": "eager", "arithmetic": "f32"}
OURS: dict[str, Any] = {"name": "ours", "arithmetic": "f32", "weights": "float16", "pt2": {"backend": "openvino"}}
NATIVE: dict[str, Any] = {"name": "native", "arithmetic": "f32", "native": {}}
BROKEN: dict[str, Any] = {"name": "broken", "arithmetic": "f32", "native": {"config": {"NO_SUCH_PROPERTY": 1}}}
PEER: dict[str, Any] = {"name": "peer", "arithmetic": "f32", "peer": {"library": "genai", "weight_format": "fp32"}}


def write_configurations(folder: Path, *raw: Any) -> Path:
    path = folder / "configurations.yaml"
    path.write_text(json.dumps(raw))
    return path


def test_default_configurations() -> None:
    guide, *others = choose_configurations(Path(benchmarks.__file__).with_name("configurations.yaml"), [])
    assert CompileConfig.parse(guide.pt2) == CompileConfig(backend="inductor", mode="reduce-overhead")
    assert {"eager-f32", "ours-bf16", "ours-fastest", "native-int8", "sdcpp-q8_0"} < {each.name for each in others}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"arithmetic": "f32"}, "$: 'name' is a required property"),
        ({**EAGER, "steps": 3}, "$: Additional properties are not allowed ('steps' was unexpected)"),
        ({"name": "eager"}, "$: 'arithmetic' is a required property"),
        ({**EAGER, "arithmetic": "fp32"}, "$.arithmetic: 'fp32' is not one of ['f32', 'bf16', 'best']"),
        ({**EAGER, "weights": "int8"}, "$.weights: 'int8' is not one of ['float32', 'bfloat16', 'float16']"),
        ({**EAGER, "pt2": {"backend": "openvino", "options": {"a": 1}}}, "eager: pt2.options: unknown OpenVINO option"),
        ({**EAGER, "native": {"mode": 1}}, "$.native: Additional properties are not allowed ('mode' was unexpected)"),
        ({**EAGER, "native": {"weight_compression": "nf4"}}, "'nf4' is not one of ['int8_sym', 'int8_asym']"),
        ({**EAGER, "native": {"config": 1}}, "$.native.config: 1 is not of type 'object'"),
        ({**OURS, "native": {}}, "ours takes one of pt2, native, peer"),
        ({**EAGER, "peer": {"library": "optimum"}}, "$.peer: 'weight_format' is a required property"),
        (
            {**EAGER, "peer": {"library": "a", "weight_format": "f16"}},
            "'a' is not one of ['optimum', 'genai', 'sdcpp']",
        ),
        (
            {**EAGER, "peer": {"library": "sdcpp", "weight_format": "int8"}},
            "sdcpp takes f32, f16, bf16, q8_0, not int8",
        ),
        ({**EAGER, "peer": {"library": "genai", "weight_format": "q8_0"}}, "genai takes fp32, fp16, int8, not q8_0"),
    ],
)
def test_wrong_configuration(raw: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        choose_configurations(write_configurations(tmp_path, EAGER, raw), [])
    assert message in str(caught.value)


def test_only_chooses_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="takes each name once; eager is there twice"):
        choose_configurations(write_configurations(tmp_path, EAGER, EAGER), [])
    path = write_configurations(tmp_path, EAGER, OURS, NATIVE)
    with pytest.raises(ConfigurationError, match="--only takes eager, ours, native, not 'our'"):
        choose_configurations(path, ["our"])
    assert [each.name for each in choose_configurations(path, ["native", "eager"])] == ["native", "eager"]


def test_the_cpu_decides_the_best_arithmetic() -> None:
    best = Configuration.parse({"name": "best", "arithmetic": "best"})
    assert [best.settle(each).arithmetic for each in (True, False)] == ["bf16", "f32"]
    assert [best.settle(each).weights for each in (True, False)] == ["bfloat16", "float32"]
    ours = Configuration.parse({**OURS, "arithmetic": "bf16"}).settle(has_bf16=False)
    assert (ours.arithmetic, ours.weights) == ("bf16", "float16")


def test_obstacles_have_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(raw: dict[str, Any], part: str) -> str | None:
        return find_obstacle(Configuration.parse(raw), part, ["FP32", "INT8"])

    monkeypatch.setattr(comparison, "PEERS", tmp_path / "none")
    assert find({**EAGER, "arithmetic": "bf16"}, "unet") == "no bfloat16 arithmetic among the CPU's FP32, INT8"
    assert find(NATIVE, "image") == "openvino.convert_model converts parts only; measure it with `parts`"
    assert find(PEER, "unet") == "genai draws whole images only; measure it with `images`"
    assert find(PEER, "image") == "its environment is missing; run make peers"
    assert (find(NATIVE, "unet"), find(EAGER, "image")) == (None, None)


class Recorder:
    """A configuration that logs its calls; `fails_at` names the call that fails."""

    def __init__(self, log: list[str], name: str, seconds: float, fails_at: int | None) -> None:
        self.start, self._log, self._name, self._seconds, self._fails_at = 1.0, log, name, seconds, fails_at
        self._count, self._is_closed = 0, False
        log.append(f"start {name}")

    def call(self) -> float:
        assert not self._is_closed
        self._log.append(self._name)
        self._count += 1
        if self._count == self._fails_at:
            raise MeasuringError(f"{self._name} failed")
        return self._seconds

    def finish(self) -> Figures:
        return {"ran": self._name}

    def close(self) -> None:
        self._log.append(f"close {self._name}")
        self._is_closed = True


def run_turns(*given: tuple[str, float, int | None]) -> tuple[list[str], dict[str, Row]]:
    """Measure recorders; return the log of turns and the rows. A recorder fails in turns only."""
    log = list[str]()

    def build(name: str, seconds: float, fails_at: int | None) -> Callable[[bool], Recorder]:
        return lambda is_alone: Recorder(log, name, seconds, None if is_alone else fails_at)

    rows = {name: Row(name) for name, *_ in given}
    measure_in_turns({each[0]: build(*each) for each in given}, rows, starts=2, calls=1, turns=2)
    return log, rows


def test_calls_alternate_with_the_first_row() -> None:
    log, rows = run_turns(("a", 6.0, None), ("b", 2.0, None), ("c", 3.0, None))
    alone = [step for name in "abc" for step in (f"start {name}", name, f"close {name}")]
    assert log[:18] == alone * 2
    turns = [step for name in "bc" for step in (f"start {name}", "a", name, "a", name, f"close {name}")]
    assert log[18:] == ["start a", *turns, "close a"]
    assert (rows["b"].ratios, rows["c"].ratios) == ([3.0, 3.0], [2.0, 2.0])
    assert (rows["a"].seconds, len(rows["a"].starts), rows["a"].find("ran")) == ([6.0] * 4, 2, "a")


def test_a_failed_row_leaves_the_others_alone() -> None:
    log, rows = run_turns(("a", 6.0, None), ("b", 2.0, 2), ("c", 3.0, None))
    assert (rows["a"].problem, rows["b"].problem, rows["c"].problem) == (None, "b failed", None)
    assert (len(rows["b"].ratios), rows["c"].ratios) == (1, [2.0, 2.0])
    assert [step for step in log if step.endswith(" a")] == ["start a", "close a"] * 4  # never two in memory
    log, rows = run_turns(("a", 6.0, 3), ("b", 2.0, None), ("c", 3.0, None))
    assert (rows["b"].ratios, rows["b"].problem, rows["c"].problem) == ([3.0, 3.0], None, "a failed")


def test_one_row_needs_no_turns() -> None:
    _, rows = run_turns(("a", 6.0, None))
    assert (rows["a"].seconds, rows["a"].ratios) == ([6.0, 6.0], [])


def test_starts_are_told_apart_as_cold_and_warm() -> None:
    assert [format_starts(values) for values in ([], [3.0], [3.0, 1.0, 2.0])] == ["–", "3.0 / –", "3.0 / 1.5"]


@pytest.mark.parametrize("size", random_model.CONFIGURATIONS)
def test_random_models_tokenizers_fit_their_text_encoders(size: str) -> None:
    """The server refuses others."""
    for text in random_model.CONFIGURATIONS[size]["text"]:
        assert len(random_model.make_tokenizer(text["vocab_size"])) == text["vocab_size"]


@pytest.mark.parametrize("name", PARTS)
def test_each_part_takes_the_inputs_that_are_drawn_for_it(tiny_model: Path, name: str) -> None:
    part = Part(tiny_model, name, "float16", 64)
    with torch.no_grad():
        results = [list_tensors(part.method(**inputs))[0] for inputs in part.inputs]
    assert {each.dtype for each in results} == {torch.float32 if name == "vae" else torch.float16}
    assert all(torch.isfinite(each).all() for each in results)
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(results, 2))


def test_parts(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Six processes measure a text encoder, because its library is imported fastest."""
    path, output = write_configurations(tmp_path, EAGER, OURS, BROKEN, PEER), tmp_path / "figures.json"
    command = ["parts", "--model", str(tiny_model), "--parts", "text_encoder", "--configurations", str(path)]
    command += ["--size", "64", "--turns", "3"]
    benchmarks.main([*command, "--output", str(output)])
    lines = {line.split(" | ")[0]: line for line in capsys.readouterr().out.splitlines()}
    number = r"[\d.e+]+"
    spread = rf"{number} \({number}–{number}\)"
    starts = rf"{number} / {number}"
    eager = rf"\| eager \| {spread} \| 1 \(1–1\) \| 0 \| {starts} \| {starts} \| PyTorch in float32 \|"
    assert re.fullmatch(eager, lines["| eager"])
    assert re.fullmatch(rf"\| ours \| {spread} \| {spread} \| .+ \| OpenVINO in f32, 1 models \|", lines["| ours"])
    assert "NO_SUCH_PROPERTY" in lines["| broken"]
    assert "genai draws whole images only" in lines["| peer"]
    figures = json.loads(output.read_text())
    eager, ours, *_ = figures["text_encoder"]
    assert (figures["command"][0], figures["machine"]["cores"] > 0) == ("parts", True)
    assert (eager["starts"][0]["error"], ours["starts"][0]["from_cache"], ours["turns"]["from_cache"]) == (
        0,
        False,
        True,
    )
    assert 0 < ours["starts"][0]["error"] < 2e-3  # inputs and results are in float16, which holds 11 bits
    for row in (eager, ours):
        assert (len(row["starts"][0]["calls"]), len(row["seconds"]), len(row["ratios"])) == (3, 3, 3)
        assert 0.2 < row["turns"]["gigabytes"] < 4


@pytest.mark.soak
def test_images(tmp_path: Path) -> None:
    """The other library runs if `make peers` has built its environment."""
    output = tmp_path / "figures.json"
    path = write_configurations(tmp_path, OURS, EAGER, PEER)
    command = ["images", "--quick", "--steps", "6", "--calls", "2", "--turns", "2", "--configurations", str(path)]
    benchmarks.main([*command, "--images", str(tmp_path), "--output", str(output)])
    ours, eager, peer = json.loads(output.read_text())["image"]
    assert (eager["turns"]["ran"], ours["turns"]["ran"]) == ("PyTorch in float32", "OpenVINO in f32, 5 models")
    assert eager["starts"][0]["error"] == 0
    assert eager["starts"][0]["score"] == ours["starts"][0]["score"] > 0.5  # the first three held-out prompts
    assert 0 < ours["starts"][0]["error"] < 0.02  # of images, rounded to 256 levels, from weights in float16
    assert Image.open(tmp_path / "ours 2.png").size == (128, 128)
    if comparison.PEERS.exists():
        assert (peer["problem"], len(peer["ratios"])) == (None, 2)
        assert 0 < peer["starts"][0]["error"] < 0.05


@pytest.mark.soak
def test_servers_of_two_checkouts(tmp_path: Path) -> None:
    output, other = tmp_path / "figures.json", tmp_path / "other"
    other.symlink_to(ROOT)
    command = ["server", "openvino", "--checkouts", str(ROOT), str(other), "--starts", "1", "--turns", "2"]
    benchmarks.main([*command, "--output", str(output)])
    rows = json.loads(output.read_text())["server"]
    assert [row["problem"] for row in rows] == [None, None]
    assert [row["turns"]["ran"]["backend"] for row in rows] == ["openvino", "openvino"]
    assert len(rows[1]["ratios"]) == 2
    assert rows[1]["turns"]["gigabytes"] > 0.3


def test_step_plans_are_judged_by_their_distance_to_the_full_image(tiny_model: Path, tmp_path: Path) -> None:
    plans = list_plans(6, [4])
    chosen = {name: plans[name] for name in ("full", "unet_calls: 4", "4 steps without guidance")}
    settings = {"dtype": "float32", "guidance_scale": 5.0, "warm_up": False}
    rows = judge_plans(tiny_model, chosen, settings=settings, pt2=None, count=2, images=tmp_path)
    full, near, unguided = rows
    assert (full.calls, near.calls, unguided.calls) == (6, 4, 4)
    assert (full.psnr, full.latents) == ([float("inf")] * 2, [0, 0])
    assert min(near.psnr) > max(unguided.psnr) > 0
    assert 0 < max(near.latents) < min(unguided.latents)
    assert len(list(tmp_path.glob("*.png"))) == 2 * len(chosen)
    assert [row["PSNR, mean dB"] for row in format_plans(rows)][0] == "inf"
