"""Schedulers by their names and options, and which of them draw a model right."""

import dataclasses
import functools
import json
from typing import Any

import diffusers
import pytest
from PIL import Image

from demo.measure import choose_prompts, draw_prompts, draw_with, load_eager_pipeline, score_pictures
from sdxl_server.api.warnings import warn_of_sampling
from sdxl_server.errors import ConfigError
from sdxl_server.request.samplers import ALIASES, list_options, make_schema, read_sampler, split_sampler
from sdxl_server.sampling.schedulers import check_options, choose_default, find_samplers
from sdxl_server.sampling.trials import build_scheduler, try_levels
from sdxl_server.schemas import is_valid
from tests.unit.test_request import CONTRACT
from tools.random_model import SCHEDULER
from tools.server import ROOT

SDXL = diffusers.EulerDiscreteScheduler(**SCHEDULER)
DEMO = diffusers.EulerDiscreteScheduler.from_pretrained(ROOT / "demo/model/scheduler")
ALL = (
    *("DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler"),
    *("DPMSolverSinglestepScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler"),
    *("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler"),
    *("PNDMScheduler", "UniPCMultistepScheduler"),
)
ZERO_SNR = (
    *("DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler"),
    *("EulerDiscreteScheduler", "UniPCMultistepScheduler"),
)
KNOWN = find_samplers(SDXL, {})
PROMPTS = choose_prompts(8, seed=3)


def make_own(name: str, **settings: Any) -> Any:
    return getattr(diffusers, name)(**{**SCHEDULER, **settings})


@pytest.mark.parametrize(
    ("own", "names"),
    [
        (SDXL, ALL),
        (DEMO, ZERO_SNR),
        (make_own("HeunDiscreteScheduler"), ALL),
        (make_own("DDIMScheduler", clip_sample=False), ALL),
        (make_own("EulerDiscreteScheduler", prediction_type="v_prediction"), [n for n in ALL if n != "PNDMScheduler"]),
        (
            make_own("EulerDiscreteScheduler", prediction_type="sample"),
            [n for n in ALL if n not in ("PNDMScheduler", "EulerAncestralDiscreteScheduler") and "KDPM2" not in n],
        ),
        (make_own("DDIMScheduler", clip_sample=True), [n for n in ALL if n[:2] not in ("DD", "He")]),  # they clip
        (make_own("LCMScheduler"), ["LCMScheduler"]),
        (make_own("TCDScheduler"), ["TCDScheduler"]),
        (diffusers.EDMEulerScheduler(), ["EDMEulerScheduler"]),
        (diffusers.FlowMatchEulerDiscreteScheduler(), []),
    ],
    ids=lambda value: type(value).__name__,
)
def test_those_that_draw_the_model_right_are_on_offer(own: Any, names: list[str]) -> None:
    assert list(find_samplers(own, {})) == list(names)


def test_what_was_distilled_is_drawn_with_its_own() -> None:
    offered = find_samplers(SDXL, {"time_cond_proj_dim": 256})
    assert list(offered) == ["LCMScheduler"]
    with pytest.raises(ConfigError, match="handler.scheduler takes one of LCMScheduler, since the model's own, Euler"):
        choose_default(SDXL, offered, None)
    assert choose_default(SDXL, offered, {"name": "lcm", "original_inference_steps": 20}) == {
        "name": "LCMScheduler",
        "original_inference_steps": 20,
    }


def test_a_scheduler_that_cannot_do_what_its_settings_say_is_refused() -> None:
    own = diffusers.HeunDiscreteScheduler.from_config(DEMO.config)
    with pytest.raises(ConfigError, match=r"one of DDIM.*the model's own, HeunDiscreteScheduler, has not the noise"):
        choose_default(own, find_samplers(own, {}), None)
    assert choose_default(own, find_samplers(own, {}), "Euler a") == "EulerAncestralDiscreteScheduler"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"init_noise_sigma": 2.0}, "gives the model other noise"),
        ({"init_noise_sigma": 0.9}, "gives the model other noise"),
        ({"prediction_type": "v_prediction"}, "gives the model other noise"),
        ({"prediction_type": "sample"}, "gives the model other noise"),
        ({"clip_sample": True}, "gives the model other noise"),
        ({}, ""),
    ],
    ids=str,
)
def test_each_fault_is_found(change: dict[str, Any], told: str) -> None:
    trained = build_scheduler(SDXL.config, "DDIMScheduler", {})
    sigma = change.pop("init_noise_sigma", 1.0)
    spoiled = build_scheduler(make_own("DDIMScheduler", **{"clip_sample": False, **change}).config, "DDIMScheduler", {})
    spoiled.init_noise_sigma = sigma
    assert try_levels(spoiled, trained).startswith(told)
    assert bool(try_levels(spoiled, trained)) is bool(told)


@pytest.mark.parametrize("alias", ALIASES)
def test_names_of_other_programs_are_known(alias: str) -> None:
    samplers = KNOWN | {name: list_options(getattr(diffusers, name)) for name in ("LCMScheduler", "TCDScheduler")}
    sampler = read_sampler(alias.swapcase(), samplers)
    assert sampler in (ALIASES[alias], ALIASES[alias]["name"])
    assert (sampler == ALIASES[alias]["name"]) is (len(ALIASES[alias]) == 1)
    assert read_sampler(sampler, samplers) == sampler
    assert all(is_valid(each, make_schema(samplers)) for each in (alias, sampler, {"name": alias}))
    check_options(SDXL, sampler)


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ({"name": "EulerDiscreteScheduler"}, "EulerDiscreteScheduler"),
        ({"name": "Euler", "timestep_spacing": "trailing"}, {"timestep_spacing": "trailing"}),
        ('{"name": "DPM++ 2M Karras", "solver_order": 3}', {"use_karras_sigmas": True, "solver_order": 3}),
        ({"name": "DPM++ 2M Karras", "use_karras_sigmas": False}, {"use_karras_sigmas": False}),
    ],
)
def test_options_are_read(value: Any, read: Any) -> None:
    sampler = read_sampler(value, KNOWN)
    assert {**read, "name": sampler["name"]} == sampler if isinstance(read, dict) else sampler == read  # type: ignore[index]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("Euler b", "takes one of DDIMScheduler, .*; one of DPM.*; or an object .*, not 'Euler b'"),
        ({}, "takes one of DDIMScheduler.* not {}"),
        (3, "not 3"),
        ([["Euler"]], "not "),
        ('{"name":', "Expecting value"),
        ({"name": ["Euler"]}, "not {'name': "),
        ({"name": "x" * 99_999}, r"not {'name': 'xxx.*\.\.\.$"),
        (
            {"name": "Euler", "solver_order": 2},
            "takes for EulerDiscreteScheduler the options .*not 'solver_ord",
        ),
        ({"name": "Euler", "prediction_type": "sample"}, "not 'prediction_type'"),
        ({"name": "UniPC", "solver_order": 4}, "takes for solver_order a whole number from 1 to 3, not 4"),
        ({"name": "UniPC", "solver_type": "midpoint"}, "takes for solver_type one of bh1, bh2, not 'midpoint'"),
        ({"name": "Euler", "use_karras_sigmas": 1}, "takes for use_karras_sigmas true or false, not 1"),
        ({"name": "Euler", "use_karras_sigmas": None}, "true or false, not None"),
        (
            {"name": "Euler", "timestep_spacing": "even"},
            "takes for timestep_spacing one of linspace, ",
        ),
    ],
    ids=str,
)
def test_other_options_are_told(value: Any, told: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){told}") as caught:
        read_sampler(value, KNOWN)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("sampler", "told"),
    [
        ({"name": "UniPCMultistepScheduler", "solver_type": "bh1"}, "ends with nan of the picture"),
        ({"name": "EulerDiscreteScheduler", "interpolation_type": "log_linear"}, "other noise than it was trained on"),
        (
            {"name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "use_exponential_sigmas": True},
            "cannot be used here: Only one of",
        ),
    ],
    ids=str,
)
def test_options_that_draw_wrong_are_refused(sampler: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check_options(SDXL, sampler)


@functools.cache
def load_demo() -> Any:
    return load_eager_pipeline(ROOT / "demo/model")


@pytest.mark.parametrize(
    "sampler",
    [
        *ZERO_SNR,
        *(name for name in ALL if name not in ZERO_SNR),
        "LCMScheduler",
        "TCDScheduler",
        ALIASES["DPM++ 2M SDE Karras"],
        {"name": "EulerDiscreteScheduler", "use_karras_sigmas": True},
        {"name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
        {"name": "UniPCMultistepScheduler", "solver_order": 3},
    ],
    ids=str,
)
def test_the_demonstration_model_is_drawn_right(sampler: Any) -> None:
    """By each on offer for it, and by the others with the noise levels that they have; a clipped DDIM gets half."""
    name, options = (sampler, {}) if isinstance(sampler, str) else (sampler["name"], {**sampler})
    options.pop("name", None)
    pipeline, own = load_demo(), dict(DEMO.config)
    own |= {} if name in (*ZERO_SNR, "LCMScheduler", "TCDScheduler") else {"rescale_betas_zero_snr": False}
    pipeline.scheduler = build_scheduler(own, name, options)
    pictures: list[Image.Image] = list(draw_prompts(PROMPTS, draw_with(pipeline, num_inference_steps=8), batch=8))
    assert score_pictures(PROMPTS, pictures)["all"] >= 7 / 8


def test_what_is_answered_can_be_asked_for_again() -> None:
    sampler = read_sampler("DPM++ 2M SDE Karras", KNOWN)
    assert read_sampler(json.loads(json.dumps(sampler)), KNOWN) == sampler


@pytest.mark.parametrize(
    ("sampler", "steps", "growth"),
    [
        ({"name": "UniPCMultistepScheduler", "solver_order": 3, "use_karras_sigmas": True}, 10, "3.2"),
        ({"name": "DPMSolverMultistepScheduler", "solver_order": 3, "use_karras_sigmas": True}, 10, "2.6"),
        ({"name": "UniPCMultistepScheduler", "solver_order": 3, "use_karras_sigmas": True}, 30, None),
        ({"name": "UniPCMultistepScheduler", "use_karras_sigmas": True}, 10, None),
        (ALIASES["DPM++ 2M SDE Karras"], 10, None),
    ],
    ids=str,
)
def test_a_solver_that_makes_more_of_errors_is_told(sampler: Any, steps: int, growth: str | None) -> None:
    """And so it is: with those the demonstration model draws fewer right."""
    request = dataclasses.replace(CONTRACT.check({"prompt": "a fox"}), scheduler=sampler, num_inference_steps=steps)
    told = f"makes the model's errors {growth} times as large in {steps} steps; more steps or a lower solver_order"
    assert [told in each for each in warn_of_sampling(DEMO, request)] == ([] if growth is None else [True])
    name, options = split_sampler(sampler)
    pipeline = load_demo()
    pipeline.scheduler = build_scheduler(DEMO.config, name, options)
    pictures = list(draw_prompts(PROMPTS, draw_with(pipeline, num_inference_steps=steps), batch=8))
    assert (score_pictures(PROMPTS, pictures)["all"] >= 7 / 8) is (growth is None)
