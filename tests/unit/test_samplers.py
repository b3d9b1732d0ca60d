"""Schedulers by their names and options, and which of them draw a model right."""

import dataclasses
import functools
import inspect
import json
import re
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from demo.measure import choose_prompts, draw_prompts, draw_with, load_eager_pipeline, score_pictures
from demo.shapes import draw_scene
from sdxl_server.api.native import NativeApi
from sdxl_server.api.openai import OpenAIApi
from sdxl_server.api.warnings import warn_of_sampling
from sdxl_server.errors import ConfigError, RequestError
from sdxl_server.request.sampler_names import MISSING, PREFERRED, read_sampler
from sdxl_server.request.samplers import ALIASES, SAMPLERS, SCHEDULES, build_sampler_schema, split_sampler
from sdxl_server.sampling.own_classes import build_partial_classes
from sdxl_server.sampling.schedulers import build_scheduler, choose_default, list_samplers
from sdxl_server.schemas import is_valid
from tests.known_image import find_fault, find_wrong_step, list_values
from tests.unit.test_request import CONTRACT, LIMITS, make_contract
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
CONTRACT_OF_SDXL = make_contract(dataclasses.replace(LIMITS, samplers=KNOWN))
# Every sampler draws these four right in 5 steps.
PROMPTS = choose_prompts(8, seed=3)[2:6]
STRENGTHS = (None, 0.1, 0.2, 0.4, 0.6, 1.0)


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
            fault = find_fault(config, name, options, strengths=STRENGTHS)
            assert not fault, (config["prediction_type"], options)


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_draws_a_known_image(alias: str) -> None:
    name, options = split_sampler(ALIASES[alias])
    assert not find_fault(SDXL.config, name, options, strengths=STRENGTHS)


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


# By the tables and functions of A1111 and k-diffusion: the sampler adds noise, its order, and the UNet calls of a step.
KNOWN_SAMPLERS: dict[str, tuple[bool, int, int]] = {
    "DDIM": (False, 1, 1),
    "DDPM": (True, 1, 1),
    "DEIS": (False, 2, 1),
    "DPM++ 2M": (False, 2, 1),
    "DPM++ 2M SDE": (True, 2, 1),
    "DPM++ 2M SDE Heun": (True, 2, 1),
    "DPM++ 3M SDE": (True, 3, 1),
    "DPM++ 2S": (False, 2, 1),  # every second step of diffusers is the middle of one of k-diffusion
    "DPM++ SDE": (True, 2, 1),
    "Euler a": (True, 1, 1),
    "Euler": (False, 1, 1),
    "Heun": (False, 2, 2),
    "DPM2 a": (True, 2, 2),
    "DPM2": (False, 2, 2),
    "LCM": (True, 1, 1),
    "LMS": (False, 4, 1),
    "PLMS": (False, 4, 1),
    "TCD": (True, 1, 1),
    "UniPC": (False, 3, 1),
    "uni_pc_bh2": (False, 3, 1),
}
FIXED_ORDERS = {"LMSDiscreteScheduler": 4, "PNDMScheduler": 4}
OTHER_OWN = [  # settings of models' own schedulers that a name overrules
    {},
    {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "solver_type": "heun"},
    {"algorithm_type": "dpmsolver++", "solver_order": 1},
]


def sample(scheduler: Any, *, seed: int) -> torch.Tensor:
    """Return what a model that is not right makes of fixed latents."""
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(seed)
    more = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        output = scheduler.scale_model_input(latents, timestep).sin()
        latents = scheduler.step(output, timestep, latents, **more).prev_sample
    return latents


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_is_the_sampler_of_its_name(alias: str) -> None:
    sampler = next(each for each in (alias, alias.removesuffix(" Karras")) if each in KNOWN_SAMPLERS)
    adds_noise, order, calls = KNOWN_SAMPLERS[sampler]
    name, options = split_sampler(ALIASES[alias])
    for own in OTHER_OWN if "DPMSolver" in name else OTHER_OWN[:1]:
        scheduler = build_scheduler({**SDXL.config, **own}, name, options)
        assert torch.equal(sample(scheduler, seed=1), sample(scheduler, seed=2)) is not adds_noise
        config = scheduler.config
        is_declared = "solver_order" in SAMPLERS[name].options
        assert (config.solver_order if is_declared else FIXED_ORDERS.get(name, scheduler.order)) == order
        assert scheduler.order == calls
        assert bool(config.get("use_karras_sigmas")) is alias.endswith(" Karras")
        is_heun = "Heun" in alias or "3M" in alias  # k-diffusion's 3M begins with a step of 2M Heun
        assert "DPMSolver" not in name or config.solver_type == ("heun" if is_heun else "midpoint")


def test_steps_of_order_3_with_noise_are_k_diffusions() -> None:
    """diffusers' own have the wrong sign before the curvature."""
    name, options = split_sampler(ALIASES["DPM++ 3M SDE"])
    scheduler = build_scheduler(SDXL.config, name, options)
    scheduler.set_timesteps(20)
    scheduler._step_index = 8
    generator = torch.Generator().manual_seed(0)
    newest, older, oldest, latents, noise = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(5))
    found = scheduler.multistep_dpm_solver_third_order_update(
        [oldest, older, newest], sample=latents, noise=torch.zeros_like(noise)
    )
    # k-diffusion counts in sigmas, with latents that are not scaled down.
    after, now, before, first = (scheduler.sigmas[9 - each].double() for each in range(4))
    scale = (1 + now**2) ** 0.5
    step, last, previous = (now / after).log(), (before / now).log(), (first / before).log()
    one, two = (newest - older) / (last / step), (older - oldest) / (previous / step)
    slope = one + (one - two) * last / (last + previous)
    curvature = (one - two) * step / (last + previous)
    second = (-2 * step).expm1() / (2 * step) + 1
    third = second / (2 * step) - 0.5
    expected = after / now * (-step).exp() * latents * scale - (-2 * step).expm1() * newest
    expected = expected + second * slope - third * curvature
    torch.testing.assert_close(found, (expected / (1 + after**2) ** 0.5).float(), rtol=1e-4, atol=1e-4)
    wrong = diffusers.DPMSolverMultistepScheduler.multistep_dpm_solver_third_order_update(
        scheduler, [oldest, older, newest], sample=latents, noise=torch.zeros_like(noise)
    )
    assert (wrong - found).abs().max() > 0.1


@pytest.mark.parametrize("name", [name for name, row in SAMPLERS.items() if row.wrong])
def test_options_that_fail_together_are_refused(name: str) -> None:
    samplers = {name: SAMPLERS[name].options}
    with pytest.raises(
        ValueError, match=r"does not take algorithm_type: sde-dpmsolver\+\+ and solver_order: 3 together"
    ):
        read_sampler({"name": name, **SAMPLERS[name].wrong}, samplers)
    for option, value in SAMPLERS[name].wrong.items():
        assert read_sampler({"name": name, option: value}, samplers) == {"name": name, option: value}


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
    assert alias.removesuffix(" Karras") in KNOWN_SAMPLERS
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
    assert read.items() <= sampler.items() if isinstance(read, dict) else sampler == read  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        *(("euler_a", "Euler a"), ("k_euler_a", "Euler a"), ("Euler Ancestral", "Euler a"), ("EULER-A", "Euler a")),
        *(("sample_euler_ancestral", "Euler a"), ("EulerDiscrete", "Euler"), ("k_lms", "LMS"), ("k-heun", "Heun")),
        *(("dpm++2m", "DPM++ 2M"), ("dpmpp_2m", "DPM++ 2M"), ("DPM++_2M", "DPM++ 2M"), ("k_dpmpp_2m", "DPM++ 2M")),
        *(("dpmpp_2m_sde_gpu", "DPM++ 2M SDE"), ("dpmpp_2m_sde_heun_gpu", "DPM++ 2M SDE Heun")),
        *(("dpmpp_sde_gpu", "DPM++ SDE"), ("dpmpp_3m_sde", "DPM++ 3M SDE"), ("dpm_2_ancestral", "DPM2 a")),
        *(("k_dpm_2", "DPM2"), ("dpmpp_2s", "DPM++ 2S"), ("plms", "PLMS"), ("uni_pc", "UniPC"), ("UNIPC", "UniPC")),
        *(("dpmpp_2m_karras", "DPM++ 2M Karras"), ("k_dpmpp_2m_ka", "DPM++ 2M Karras")),
        *(("dpmpp_2m_k", "DPM++ 2M Karras"), ("dpmpp_2m_sde_gpu_karras", "DPM++ 2M SDE Karras")),
        *(("Euler a Karras", "Euler a Karras"), ("euler_ancestral_karras", "Euler a Karras")),
    ],
)
def test_spellings_of_other_programs_are_read(spelling: str, name: str) -> None:
    assert read_sampler(spelling, KNOWN) == read_sampler(name, KNOWN)
    assert read_sampler({"name": spelling}, KNOWN) == read_sampler(name, KNOWN)


@pytest.mark.parametrize(
    ("name", "schedule", "option"),
    [
        *(("Euler", "Karras", "use_karras_sigmas"), ("Euler a", "exponential", "use_exponential_sigmas")),
        *(("dpmpp_2m", "polyexponential", "use_exponential_sigmas"), ("Heun", "beta", "use_beta_sigmas")),
        *(("DPM++ 2M SDE", "SGM Uniform", "timestep_spacing"), ("euler", "simple", "timestep_spacing")),
        *(("euler", "normal", "timestep_spacing"), ("euler", "ddim_uniform", "steps_offset")),
        *(("DPM++ 2M", "Automatic", "use_karras_sigmas"), ("DPM++ 3M SDE", "automatic", "use_exponential_sigmas")),
    ],
)
def test_a_schedule_is_read_apart_or_at_the_end_of_the_name(name: str, schedule: str, option: str) -> None:
    apart = read_sampler({"name": name, "schedule": schedule}, KNOWN)
    assert isinstance(apart, dict)
    assert option in apart
    assert read_sampler(f"{name} {schedule}", KNOWN) == apart
    assert read_sampler(json.dumps({"sampler_name": name, "scheduler": schedule}), KNOWN) == apart
    for fields in ({"scheduler": schedule}, {"scheduler": schedule.upper()}):
        request = CONTRACT_OF_SDXL.check({"prompt": "a", "sampler_name": name, **fields})
        assert request.scheduler == apart


def test_a1111s_sampler_is_read_in_every_api() -> None:
    fields = {"prompt": "a", "sampler_name": "euler_a", "scheduler": "Karras"}
    expected = read_sampler("Euler a Karras", KNOWN)
    form = {name: value.encode() for name, value in fields.items()}
    for api in (NativeApi(), OpenAIApi()):
        for values, kind in (
            (form, "multipart/form-data"),
            ({"body": json.dumps(fields).encode()}, "application/json"),
        ):
            request, warnings = api.read(values, content_type=kind, contract=CONTRACT_OF_SDXL)
            assert (request.scheduler, warnings) == (expected, [])
    assert CONTRACT_OF_SDXL.check({"prompt": "a", "sampler_name": "Euler", "scheduler": None}).scheduler == (
        "EulerDiscreteScheduler"
    )
    for name in PREFERRED:
        automatic = read_sampler({"name": name, "schedule": "automatic"}, KNOWN)
        assert automatic == read_sampler(f"{name} {PREFERRED[name]}", KNOWN) != read_sampler(name, KNOWN)
    assert read_sampler("Euler automatic", KNOWN) == "EulerDiscreteScheduler"


@pytest.mark.parametrize("api", [NativeApi(), OpenAIApi()], ids=["native", "openai"])
@pytest.mark.parametrize(
    ("sent", "param", "told"),
    [
        ({"sampler_name": "eular"}, "sampler_name", "^sampler_name takes .* not 'eular'; did you mean Euler"),
        ({"sampler_name": ["Euler"], "scheduler": "karras"}, "sampler_name", r"not \['Euler'\]"),
        (
            {"sampler_name": "Euler", "scheduler": "DPM++ 2M"},
            "scheduler",
            "^scheduler next to sampler_name takes a sche",
        ),
        ({"sampler_name": "Euler", "scheduler": 3}, "scheduler", "one of automatic, karras, .* not 3"),
        ({"sampler_name": "DDIM", "scheduler": "karras"}, "sampler_name", "takes no schedule karras with DDIM"),
    ],
)
def test_errors_of_a1111s_sampler_name_its_fields(api: NativeApi, sent: dict[str, Any], param: str, told: str) -> None:
    body = {"body": json.dumps({"prompt": "a", **sent}).encode()}
    with pytest.raises(RequestError, match=told) as caught:
        api.read(body, content_type="application/json", contract=CONTRACT_OF_SDXL)
    assert caught.value.param == param


def test_whole_options_with_a_point_are_whole_numbers() -> None:
    """In YAML 2.0 is no integer, and diffusers compares and counts with it."""
    read = read_sampler({"name": "UniPC", "solver_order": 2.0, "steps_offset": 1.0}, KNOWN)
    assert isinstance(read, dict)
    assert [type(read[option]) for option in ("solver_order", "steps_offset")] == [int, int]


@pytest.mark.parametrize(
    ("name", "same"),
    [
        *(("kdpm_2", "DPM2"), ("kdpm_2_k", "DPM2 Karras"), ("kdpm_2_a", "DPM2 a"), ("kdpm_2_a_k", "DPM2 a Karras")),
        *(("EulerDiscrete", "Euler"), ("euler_ancestral_discrete", "Euler a"), ("LMSDiscreteScheduler", "LMS")),
    ],
)
def test_names_of_invokeai_and_of_classes(name: str, same: str) -> None:
    read, expected = split_sampler(read_sampler(name, KNOWN)), split_sampler(read_sampler(same, KNOWN))
    assert read == expected


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["Euler", "Euler a", "DPM++ 2M", "DPM++ 3M SDE", "UniPC", "LMS"])
def test_every_schedule_draws_a_known_image(name: str, schedule: str) -> None:
    chosen, options = split_sampler(read_sampler({"name": name, "schedule": schedule}, KNOWN))
    assert not find_fault(SDXL.config, chosen, options, strengths=STRENGTHS)


def test_ancestral_steps_follow_the_schedule() -> None:
    plain, karras = (
        build_scheduler(SDXL.config, *split_sampler(ALIASES[each])) for each in ("Euler a", "Euler a Karras")
    )
    euler = build_scheduler(SDXL.config, "EulerDiscreteScheduler", {"use_karras_sigmas": True})
    for each in (plain, karras, euler):
        each.set_timesteps(10)
    assert torch.equal(karras.sigmas, euler.sigmas)
    assert torch.equal(karras.timesteps, euler.timesteps)
    assert not torch.allclose(karras.sigmas, plain.sigmas)


@pytest.mark.parametrize("name", MISSING)
def test_samplers_that_diffusers_lacks_are_named_with_the_nearest(name: str) -> None:
    for spelling in (name, f"{name} Karras", f"k_{name}".replace(" ", "_")):
        with pytest.raises(ValueError, match=rf"the nearest is {re.escape(MISSING[name])}$"):
            read_sampler(spelling, KNOWN)
    assert MISSING[name] in ALIASES


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (
            "Euler b",
            "takes a sampler that suits this model, such as Euler a, not 'Euler b'; did you mean Euler or Euler a[?]$",
        ),
        ("TCD", "such as Euler a, not 'TCD'; openapi.json lists all$"),  # no typo: distilled models have it
        ("dpm++ 2n", "did you mean .*DPM[+][+] 2M"),
        ("{name: Euler}", "takes a name or JSON such as {.*}, not '{name: Euler}'$"),
        ("{'name': 'Euler'}", "takes a name or JSON such as"),
        ("Karras", "'Karras' is a schedule: send sampler_name too$"),
        ("ddim_uniform", "'ddim_uniform' is a schedule"),
        ("DDIM Karras", "takes no schedule karras with DDIM; leave it out, or name another sampler$"),
        ({"name": "DDIM", "schedule": "normal"}, "takes no schedule normal with DDIM"),
        (
            {"name": "Euler", "schedule": "Align Your Steps"},
            "takes a schedule, one of automatic, karras, .* not 'Align",
        ),
        ({"name": "Euler", "schedule": 3}, "takes a schedule, one of"),
        ({"name": "euler_karras", "schedule": "beta"}, "takes one schedule, not 'karras' and 'beta'"),
        ({}, "such as Euler a, not {}; openapi.json lists all$"),
        (3, "not 3"),
        ([["Euler"]], "not "),
        ('{"name":', "takes a name or JSON such as"),
        ({"name": ["Euler"]}, r"not \['Euler'\]"),
        ({"name": "x" * 99_999}, r"not 'xxx.*\.\.\.; openapi"),
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
    assert len(str(caught.value)) < 300


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
    pictures: list[Image.Image] = list(draw_prompts(PROMPTS, draw_with(pipeline, num_inference_steps=5), batch=8))
    assert score_pictures(PROMPTS, pictures)["all"] == 1


def list_drawings_from_images() -> Iterator[Any]:
    """Yield each sampler with a strength, and all strengths for those with classes of our own for it."""
    strengths = (0.1, 0.2, 0.5)
    for i, name in enumerate(ALL):
        for strength in (*strengths, 1.0):
            is_chosen = strength == strengths[i % 3] or (strength < 1 and name in build_partial_classes())
            yield pytest.param(name, strength, marks=() if is_chosen else pytest.mark.soak)


@pytest.mark.parametrize(("name", "strength"), list_drawings_from_images())
def test_the_demonstration_model_is_drawn_right_from_images(name: str, strength: float) -> None:
    """With one step left and more, by every sampler, with the noise levels that it has."""
    own = {**DEMO.config, **({} if name in ZERO_SNR else {"rescale_betas_zero_snr": False})}
    pipeline = diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(load_demo())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = build_scheduler(own, name, {}, partial=True)
    images = [draw_scene(each.scene) for each in PROMPTS]
    draw = draw_with(pipeline, image=images, strength=strength, num_inference_steps=10)
    pictures = list(draw_prompts(PROMPTS, draw, batch=8))
    assert score_pictures(PROMPTS, pictures)["all"] == 1


def test_what_is_answered_can_be_asked_for_again() -> None:
    sampler = read_sampler("DPM++ 2M SDE Karras", KNOWN)
    assert read_sampler(json.loads(json.dumps(sampler)), KNOWN) == sampler


WORSE = pytest.mark.parametrize(
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


@WORSE
def test_a_solver_that_makes_more_of_errors_is_told(sampler: Any, steps: int, is_worse: bool) -> None:
    request = dataclasses.replace(CONTRACT.check({"prompt": "a fox"}), scheduler=sampler, num_inference_steps=steps)
    told = f"increases the model's errors in {steps} steps; 25 steps, solver_order 2 or another sigma schedule"
    assert [told in each for each in warn_of_sampling(request)] == ([True] if is_worse else [])


@pytest.mark.soak
@WORSE
def test_a_solver_that_makes_more_of_errors_draws_fewer_right(sampler: Any, steps: int, is_worse: bool) -> None:
    prompts, (name, options) = choose_prompts(8, seed=3), split_sampler(sampler)
    pipeline = load_demo()
    pipeline.scheduler = build_scheduler(DEMO.config, name, options)
    pictures = list(draw_prompts(prompts, draw_with(pipeline, num_inference_steps=steps), batch=8))
    assert (score_pictures(prompts, pictures)["all"] >= 7 / 8) is not is_worse
