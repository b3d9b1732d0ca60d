"""A kept trace is used where all it depends on is as it was, and nowhere else."""

import copy
import functools
import json
import os
import subprocess
import sys
import timeit
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers

from openvino_backend import CompiledFunction
from openvino_backend.conditions import Conditions, describe
from tests.unit import modules, states
from tools.server import ROOT

pytestmark = pytest.mark.usefixtures("inference")


class Number:
    def __init__(self, value: float) -> None:
        self.value = value


@pytest.fixture
def states_restored() -> Any:
    """Put back what a test changes in the module `states`."""
    kept, table = dict(vars(states)), dict(states.TABLE)
    classes = {
        (each, name): vars(each)[name]
        for each, name in ((states.ClassNumber, "factor"), (states.Inner, "forward"), (states.Helper, "multiply"))
    }
    shift, defaults = modules.shift, states.times.__defaults__
    yield
    vars(states).update(kept)
    states.TABLE.clear()
    states.TABLE.update(table)
    for (each, name), value in classes.items():
        setattr(each, name, value)
    modules.shift, states.times.__defaults__ = shift, defaults
    states.Default.forward.__defaults__, states.Keyword.forward.__kwdefaults__ = (2.0,), {"factor": 2.0}


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("name", states.CHANGES)
@pytest.mark.usefixtures("states_restored")
def test_change_between_two_calls_is_seen(tmp_path: Path, name: str, is_kept: bool) -> None:
    make, change = states.CHANGES[name]
    module = make()
    function = CompiledFunction(module.forward, {"model_caching": is_kept, "cache_dir": str(tmp_path)})
    before = function(states.X)
    assert states.call(module, function) < 1e-6
    change(module)
    assert states.call(module, function) < 1e-6
    assert not torch.equal(function(states.X), before)


@pytest.mark.parametrize("is_kept", [False, True])
def test_change_of_what_is_enclosed_is_seen(tmp_path: Path, is_kept: bool) -> None:
    options = {"model_caching": True, "cache_dir": str(tmp_path)}
    for _ in range(1 + is_kept):
        module, change = states.make_enclosing(is_changed=False)
        torch.nn.init.zeros_(module.linear.bias)
        function = CompiledFunction(module.forward, options)
        assert states.call(module, function) < 1e-6
    assert function.backend.reports[0].traced is not is_kept
    change()
    assert states.call(module, function) < 1e-6


def test_second_start_takes_a_trace_only_where_it_holds(tmp_path: Path) -> None:
    """Three processes: the first traces, the second takes its traces, the third is in another state."""
    answers: list[dict[str, tuple[float, bool]]] = []
    for hash_seed, state in ((1, "as before"), (2, "as before"), (3, "changed")):
        command = [sys.executable, "-m", "tests.unit.states", state, str(tmp_path)]
        environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout))
    first, second, changed = answers
    assert {name: error for answer in answers for name, (error, _) in answer.items() if error > 1e-6} == {}
    assert [name for name, (_, traced) in first.items() if not traced] == []
    assert [name for name, (_, traced) in second.items() if traced] == []
    # A tensor is passed at each call, as it then is.
    assert [name for name, (_, traced) in changed.items() if not traced] == ["global tensor"]


@pytest.mark.parametrize(
    ("part", "method", "shapes", "keywords"),
    [
        ("vae", "decode", [(1, 4, 16, 16)], {"return_dict": False}),
        ("unet", "forward", [(2, 4, 16, 16), (), (2, 77, 64)], {"return_dict": False}),
        ("text_encoder", "forward", [(1, 77)], {"output_hidden_states": True}),
        ("text_encoder_2", "forward", [(1, 77)], {"output_hidden_states": True}),
    ],
)
def test_parts_of_a_pipeline_come_back_and_are_checked_fast(
    tiny_model: Path, tmp_path: Path, part: str, method: str, shapes: list[tuple[int, ...]], keywords: dict[str, Any]
) -> None:
    kind = {"vae": "AutoencoderKL", "unet": "UNet2DConditionModel"}.get(part)
    library = diffusers if kind else transformers
    kind = kind or {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"}[part]
    module = getattr(library, kind).from_pretrained(tiny_model / part)
    inputs = [torch.zeros(each, dtype=torch.float32 if library is diffusers else torch.long) for each in shapes]
    if part == "unet":
        keywords |= {"added_cond_kwargs": {"text_embeds": torch.zeros(2, 32), "time_ids": torch.zeros(2, 6)}}
    getattr(module, method)(*inputs, **keywords)  # transformers hooks up the hidden states at the first call
    for is_traced in (True, False):
        function = CompiledFunction(
            getattr(module, method), {"model_caching": True, "cache_dir": str(tmp_path), "max_graphs": 1}
        )
        for _ in range(3):
            function(*inputs, **keywords)
        assert [report.traced for report in function.backend.reports] == [is_traced]
    ((trace,),) = function._traces.values()
    arguments = function._bind(trace.function, tuple(inputs), keywords)
    assert min(timeit.repeat(lambda: trace.conditions.hold(arguments), number=1, repeat=20)) < 1e-3


def test_descriptions_hold_no_address() -> None:
    values = [
        object(),
        torch.nn.Linear(1, 1),
        [object()],
        functools.partial(print, object()),
        lambda: None,
        {1: object()},
    ]
    for each in values:
        assert "0x" not in describe(each)
        assert describe(each) == describe(copy.deepcopy(each))


@pytest.mark.parametrize(
    ("seen", "now", "is_same"),
    [
        (2.0, 2.0, True),
        (2.0, 2, False),
        (0.0, -0.0, False),
        (float("nan"), float("nan"), True),
        ((1, "a"), (1, "a"), True),
        ((1, [2]), (1, [2]), False),
        (torch.float32, torch.float32, True),
        ([].append, [].append, False),
    ],
)
def test_values_of_one_process_are_compared(seen: Any, now: Any, is_same: bool) -> None:
    conditions = Conditions(["L['x']"], {}, {"x": seen})
    assert conditions.hold({"x": seen})
    assert conditions.hold({"x": now}) is is_same
    assert not conditions.hold({})


def test_what_was_absent_stays_absent() -> None:
    conditions = Conditions(["L['x']"], {}, {})
    assert conditions.descriptions == {"L['x']": "absent"}
    assert conditions.hold({})
    assert not conditions.hold({"x": 1})


def test_objects_as_arguments_share_an_entry(tmp_path: Path) -> None:
    """Their addresses, which differ at each start, are no part of the key."""

    class Adding(torch.nn.Module):
        def forward(self, x: torch.Tensor, other: Any) -> torch.Tensor:
            return x + other.value

    keys = set()
    for _ in range(2):
        function = CompiledFunction(Adding().forward, {"model_caching": True, "cache_dir": str(tmp_path)})
        other = Number(2.0)
        assert float(function(torch.ones(1), other)) == 3.0
        keys |= {path.parent.name for path in tmp_path.glob("*/function.bin")}
        kept = [other]  # so that the next one has another address
    assert len(keys) == len(kept) == 1
