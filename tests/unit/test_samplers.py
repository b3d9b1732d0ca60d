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
from sdxl_server.request.samplers import ALIASES, SAMPLERS, build_sampler_schema, read_sampler, split_sampler
from sdxl_server.sampling.schedulers import build_scheduler, choose_default, list_samplers
from sdxl_server.schemas import is_valid
from tests.known_image import find_fault, find_wrong_step, list_values
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
KNOWN = list_samplers(SDXL, {})
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
        (make_own("SASolverScheduler"), sorted((*ALL, "SASolverScheduler"))),
        (make_own("EulerDiscreteScheduler", prediction_type="v_prediction"), [n for n in ALL if n != "PNDMScheduler"]),
        (
            make_own("EulerDiscreteScheduler", prediction_type="sample"),
            [n for n in ALL if n not in ("PNDMScheduler", "EulerAncestralDiscreteScheduler") and "KDPM2" not in n],
        ),
        (make_own("DDIMScheduler", clip_sample=True), ALL),  # latents are never clipped
        (make_own("DDIMScheduler", timestep_spacing="linspace"), [n for n in ALL if n != "DDIMScheduler"]),
        (make_own("DDIMInverseScheduler"), ALL),
        (make_own("LCMScheduler"), ["LCMScheduler"]),
        (make_own("TCDScheduler"), ["TCDScheduler"]),
        (diffusers.EDMEulerScheduler(), ["EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"]),
        (diffusers.FlowMatchEulerDiscreteScheduler(), []),
    ],
    ids=lambda value: type(value).__name__,
)
def test_those_that_draw_the_model_right_are_on_offer(own: Any, names: list[str]) -> None:
    assert list(list_samplers(own, {})) == list(names)


def test_what_was_distilled_is_drawn_with_its_own() -> None:
    offered = list_samplers(SDXL, {"time_cond_proj_dim": 256})
    assert list(offered) == ["LCMScheduler"]
    with pytest.raises(
        ConfigError, match="handler.scheduler takes one of LCMScheduler: the model's own, EulerD.*for other"
    ):
        choose_default(SDXL, offered, None)
    assert choose_default(SDXL, offered, {"name": "lcm", "original_inference_steps": 20}) == {
        "name": "LCMScheduler",
        "original_inference_steps": 20,
    }


def test_a_scheduler_that_cannot_do_what_its_settings_say_is_refused() -> None:
    own = diffusers.HeunDiscreteScheduler.from_config(DEMO.config)
    with pytest.raises(ConfigError, match=r"one of DDIM.*the model's own, HeunDiscreteScheduler, cannot .* zero t"):
        choose_default(own, list_samplers(own, {}), None)
    assert choose_default(own, list_samplers(own, {}), "Euler a") == "EulerAncestralDiscreteScheduler"


PREDICTIONS: dict[str, dict[str, Any]] = {
    **{name: {"prediction_type": name} for name in ("epsilon", "v_prediction", "sample")},
    "zero_snr": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}


def list_models(name: str) -> list[dict[str, Any]]:
    """Return the settings of each kind of model that a sampler is declared for."""
    row = SAMPLERS[name]
    if row.use == "edm":
        return [dict(getattr(diffusers, name)().config)]
    kinds = [*row.predictions, *(["zero_snr"] if row.zero_snr else [])]
    return [dict(make_own("EulerDiscreteScheduler", **PREDICTIONS[kind]).config) for kind in kinds]


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_declared_option_draws_a_known_image(name: str) -> None:
    values = [(key, value) for key, schema in SAMPLERS[name].options.items() for value in list_values(schema)]
    for config in list_models(name):
        defaults = build_scheduler(config, name, {}).config
        for options in ({}, *({key: value} for key, value in values if defaults.get(key) != value)):
            fault = find_fault(config, name, options, strengths=(None, 0.2, 0.4, 0.6))
            assert not fault, (config["prediction_type"], options)


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_draws_a_known_image(alias: str) -> None:
    name, options = split_sampler(ALIASES[alias])
    assert not find_fault(SDXL.config, name, options, strengths=(None, 0.2, 1.0))


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("name", [name for name, row in SAMPLERS.items() if row.use != "edm"])
def test_the_spacing_of_the_models_own_scheduler_is_right(name: str, spacing: str) -> None:
    """Or it is left out, where this one takes others."""
    config = make_own("EulerDiscreteScheduler", timestep_spacing=spacing, use_karras_sigmas=True).config
    assert not find_fault(config, name, {})
    schedule = {"use_exponential_sigmas": True}
    assert "use_exponential_sigmas" not in SAMPLERS[name].options or not find_fault(config, name, schedule)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name, row in SAMPLERS.items() for kind in PREDICTIONS if row.use in ("any", "distilled")],
)
def test_what_is_not_declared_is_refused(name: str, kind: str) -> None:
    row = SAMPLERS[name]
    is_declared = row.zero_snr if kind == "zero_snr" else kind in row.predictions
    own = make_own("EulerDiscreteScheduler" if row.use == "any" else name, **PREDICTIONS[kind])
    assert (name in list_samplers(own, {})) is is_declared


@pytest.mark.parametrize(
    ("name", "options", "fault"),
    [
        ("UniPCMultistepScheduler", {"solver_type": "bh1"}, "nan of the image"),
        ("UniPCMultistepScheduler", {"predict_x0": False}, "nan of the image"),
        ("UniPCMultistepScheduler", {"lower_order_final": False}, "nan of the image"),
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, "at timestep 701 the latents hold"),
        ("DDIMScheduler", {"timestep_spacing": "linspace"}, "at timestep 555 the latents hold"),
        ("PNDMScheduler", {"timestep_spacing": "linspace"}, "at timestep 222 the latents hold"),
    ],
)
def test_what_draws_wrong_is_not_declared(name: str, options: dict[str, Any], fault: str) -> None:
    assert fault in find_fault(SDXL.config, name, options)
    ((option, value),) = options.items()
    assert not is_valid(value, SAMPLERS[name].options[option])
    with pytest.raises(ValueError, match=f"takes for {option} one of"):
        read_sampler({"name": name, **options}, KNOWN)


@pytest.mark.parametrize("name", ["LMSDiscreteScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("strength", [0.1, 0.2, 0.8])
def test_diffusers_own_class_cannot_begin_in_the_middle(name: str, strength: float) -> None:
    """And that is why it is replaced for image-to-image."""
    wrong = find_wrong_step(build_scheduler(SDXL.config, name, {}), SDXL.config, strength=strength)
    assert wrong or (name, strength) == ("LMSDiscreteScheduler", 0.1)
    assert not find_fault(SDXL.config, name, {}, strengths=(strength,))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"init_noise_sigma": 2.0}, "at timestep"),
        ({"init_noise_sigma": 0.9}, "at timestep"),
        ({"prediction_type": "v_prediction"}, "at timestep"),
        ({"prediction_type": "sample"}, "at timestep"),
        ({"clip_sample": True}, "at timestep"),
        ({}, ""),
    ],
    ids=str,
)
def test_each_fault_is_found(change: dict[str, Any], told: str) -> None:
    sigma = change.pop("init_noise_sigma", 1.0)
    spoiled = make_own("DDIMScheduler", **{"clip_sample": False, **change})
    spoiled.init_noise_sigma = sigma
    wrong = find_wrong_step(spoiled, SDXL.config)
    assert wrong.startswith(told)
    assert bool(wrong) is bool(told)


@pytest.mark.parametrize("alias", [alias for alias in ALIASES if "SDE" in alias.upper()])
def test_stochastic_samplers_add_noise(alias: str) -> None:
    name, options = split_sampler(ALIASES[alias])
    assert build_scheduler(SDXL.config, name, options).config.algorithm_type == "sde-dpmsolver++"


def test_a_sampler_takes_one_sigma_schedule() -> None:
    both = {"name": "Euler", "use_karras_sigmas": True, "use_exponential_sigmas": True}
    with pytest.raises(ValueError, match="takes one sigma schedule, not use_karras_sigmas and use_exponential_sigmas"):
        read_sampler(both, KNOWN)
    own = make_own("EulerDiscreteScheduler", use_karras_sigmas=True)  # a request's is for the model's own
    assert not build_scheduler(own.config, "EulerDiscreteScheduler", {"use_beta_sigmas": True}).config.use_karras_sigmas


@pytest.mark.parametrize("alias", ALIASES)
def test_names_of_other_programs_are_known(alias: str) -> None:
    samplers = {name: row.options for name, row in SAMPLERS.items()}
    sampler = read_sampler(alias.swapcase(), samplers)
    assert sampler in (ALIASES[alias], ALIASES[alias]["name"])
    assert (sampler == ALIASES[alias]["name"]) is (len(ALIASES[alias]) == 1)
    assert read_sampler(sampler, samplers) == sampler
    assert all(is_valid(each, build_sampler_schema(samplers)) for each in (alias, sampler, {"name": alias}))


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
        (
            "Euler b",
            "takes a sampler that suits this model, such as Euler a, Euler .openapi.json lists all., not 'Euler b'",
        ),
        ({}, "such as DDIMScheduler, .*, not {}$"),
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
        ({"name": "UniPC", "solver_type": "midpoint"}, "takes for solver_type one of bh2, not 'midpoint'"),
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
    assert len(str(caught.value)) < 400


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
    ("sampler", "steps", "is_worse"),
    [
        ({"name": "UniPCMultistepScheduler", "solver_order": 3, "use_karras_sigmas": True}, 10, True),
        ({"name": "DPMSolverMultistepScheduler", "solver_order": 3, "use_karras_sigmas": True}, 10, True),
        ({"name": "UniPCMultistepScheduler", "solver_order": 3, "use_karras_sigmas": True}, 30, False),
        ({"name": "UniPCMultistepScheduler", "use_karras_sigmas": True}, 10, False),
        (ALIASES["DPM++ 2M SDE Karras"], 10, False),
    ],
    ids=str,
)
def test_a_solver_that_makes_more_of_errors_is_told(sampler: Any, steps: int, is_worse: bool) -> None:
    """And so it is: with those the demonstration model draws fewer right."""
    request = dataclasses.replace(CONTRACT.check({"prompt": "a fox"}), scheduler=sampler, num_inference_steps=steps)
    told = f"increases the model's errors in {steps} steps; 25 steps, solver_order 2 or another sigma schedule"
    assert [told in each for each in warn_of_sampling(request)] == ([True] if is_worse else [])
    name, options = split_sampler(sampler)
    pipeline = load_demo()
    pipeline.scheduler = build_scheduler(DEMO.config, name, options)
    pictures = list(draw_prompts(PROMPTS, draw_with(pipeline, num_inference_steps=steps), batch=8))
    assert (score_pictures(PROMPTS, pictures)["all"] >= 7 / 8) is not is_worse
