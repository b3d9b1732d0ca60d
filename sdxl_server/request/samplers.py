"""Schedulers as clients name them: diffusers' names, the names of other programs, and the options that are taken.

A scheduler with options is an object, `{"name": ..., option: ...}`, in requests, answers and settings alike; without
options it is its name.
"""

import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any

from sdxl_server.schemas import Schema, choice, describe_schema, is_valid, load_json, shorten, switch, whole

Options = Mapping[str, Schema]
Samplers = Mapping[str, Options]  # the schedulers on offer, each with its options

SPACINGS = ("linspace", "leading", "trailing")
# The options of diffusers' schedulers that say how to sample. All others say what the model was trained on. A schema is
# for those of which the schedulers' signatures do not say what they take.
OPTIONS: Mapping[str, Schema | None] = {
    "use_karras_sigmas": None,
    "use_exponential_sigmas": None,
    "use_beta_sigmas": None,
    "use_lu_lambdas": None,
    "timestep_spacing": choice(*SPACINGS),
    "steps_offset": whole(0, 10),
    "solver_order": whole(1, 3),
    "solver_type": None,
    "algorithm_type": None,
    "lower_order_final": None,
    "euler_at_final": None,
    "final_sigmas_type": None,
    "interpolation_type": choice("linear", "log_linear"),
    "predict_x0": None,
    "set_alpha_to_one": None,
    "skip_prk_steps": None,
    "original_inference_steps": whole(1, 1000),
}
KARRAS = {"use_karras_sigmas": True}
SDE = {"algorithm_type": "sde-dpmsolver++"}
# As diffusers' documentation maps the names of A1111 and k-diffusion, and ComfyUI's where they are others.
ALIASES: Mapping[str, Mapping[str, Any]] = {
    "DPM++ 2M": {"name": "DPMSolverMultistepScheduler"},
    "DPM++ 2M Karras": {"name": "DPMSolverMultistepScheduler", **KARRAS},
    "DPM++ 2M SDE": {"name": "DPMSolverMultistepScheduler", **SDE},
    "DPM++ 2M SDE Karras": {"name": "DPMSolverMultistepScheduler", **KARRAS, **SDE},
    "DPM++ SDE": {"name": "DPMSolverSinglestepScheduler"},
    "DPM++ SDE Karras": {"name": "DPMSolverSinglestepScheduler", **KARRAS},
    "DPM2": {"name": "KDPM2DiscreteScheduler"},
    "DPM2 Karras": {"name": "KDPM2DiscreteScheduler", **KARRAS},
    "DPM2 a": {"name": "KDPM2AncestralDiscreteScheduler"},
    "DPM2 a Karras": {"name": "KDPM2AncestralDiscreteScheduler", **KARRAS},
    "Euler": {"name": "EulerDiscreteScheduler"},
    "Euler a": {"name": "EulerAncestralDiscreteScheduler"},
    "Heun": {"name": "HeunDiscreteScheduler"},
    "LMS": {"name": "LMSDiscreteScheduler"},
    "LMS Karras": {"name": "LMSDiscreteScheduler", **KARRAS},
    "DDIM": {"name": "DDIMScheduler"},
    "DDPM": {"name": "DDPMScheduler"},
    "PLMS": {"name": "PNDMScheduler", "skip_prk_steps": True},
    "DEIS": {"name": "DEISMultistepScheduler"},
    "UniPC": {"name": "UniPCMultistepScheduler"},
    "LCM": {"name": "LCMScheduler"},
    "TCD": {"name": "TCDScheduler"},
    "euler_ancestral": {"name": "EulerAncestralDiscreteScheduler"},
    "dpm_2": {"name": "KDPM2DiscreteScheduler"},
    "dpm_2_ancestral": {"name": "KDPM2AncestralDiscreteScheduler"},
    "dpmpp_2m": {"name": "DPMSolverMultistepScheduler"},
    "dpmpp_2m_sde": {"name": "DPMSolverMultistepScheduler", **SDE},
    "dpmpp_sde": {"name": "DPMSolverSinglestepScheduler"},
    "uni_pc": {"name": "UniPCMultistepScheduler"},  # ComfyUI's is of the kind bh1, which ends in NaN in diffusers
    "uni_pc_bh2": {"name": "UniPCMultistepScheduler", "solver_type": "bh2"},
}
EXAMPLE = '{"name": "DPM++ 2M", "use_karras_sigmas": true}'
LEFT_OUT = ("dpmsolver", "sde-dpmsolver")  # algorithms that diffusers gives up, and that end in noise here


def list_options(scheduler: type[Any]) -> dict[str, Schema]:
    """Return the options that a diffusers scheduler takes, by its own signature."""
    found = {}
    for name, parameter in inspect.signature(scheduler.__init__).parameters.items():
        if name in OPTIONS:
            schema = OPTIONS[name] or _read_annotation(parameter.annotation)
            if schema is not None:
                found[name] = schema
    return found


def _read_annotation(annotation: Any) -> Schema | None:
    """Return the schema of a switch or of some words, None where an annotation says neither."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = next(each for each in typing.get_args(annotation) if each is not type(None))
    if annotation is bool:
        return switch()
    if typing.get_origin(annotation) is typing.Literal:
        return choice(*(each for each in typing.get_args(annotation) if each not in LEFT_OUT))
    return None


def list_aliases(samplers: Samplers) -> dict[str, Mapping[str, Any]]:
    """Return the names of other programs for the schedulers on offer."""
    return {name: meant for name, meant in ALIASES.items() if meant["name"] in samplers}


def make_schema(samplers: Samplers) -> Schema:
    """Return the JSON Schema of a scheduler; which options go with which of them it does not say."""
    aliases = list_aliases(samplers)
    name = choice(*samplers, *aliases)
    options: dict[str, Schema] = {}
    for known in samplers.values():
        for option, schema in known.items():
            words = [*options.get(option, {}).get("enum", []), *schema.get("enum", [])]
            options[option] = {**schema, "enum": list(dict.fromkeys(words))} if words else schema
    with_options = {"type": "object", "required": ["name"], "additionalProperties": False}
    return {
        "type": ["string", "object"],
        "anyOf": [name, {**with_options, "properties": {"name": name, **options}}],
        "x-accepted": describe_samplers(samplers),
    }


def describe_samplers(samplers: Samplers) -> str:
    """Say in words what a scheduler may be."""
    names, aliases = ", ".join(samplers), ", ".join(list_aliases(samplers))
    return f"one of {names}; one of {aliases}; or an object of such a name and options, as {EXAMPLE}"


def read_sampler(value: Any, samplers: Samplers) -> str | dict[str, Any]:
    """Return a scheduler by diffusers' name, with its options if there are any.

    Args:
        value: a name, an alias in upper or lower case, an object, or the JSON of one, as forms have it.

    Raises:
        ValueError: names what is accepted and what was given, but for the field.
    """
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = load_json(value)
    given = {"name": value} if isinstance(value, str) else value
    name = given.get("name") if isinstance(given, Mapping) else None
    spelt = {each.casefold(): each for each in (*samplers, *list_aliases(samplers))}
    known = spelt.get(name.casefold()) if isinstance(name, str) else None
    if known is None:
        raise ValueError(f"takes {describe_samplers(samplers)}, not {shorten(value)}")
    meant = {**ALIASES.get(known, {"name": known}), **{key: each for key, each in given.items() if key != "name"}}
    taken = samplers[meant["name"]]
    for option, each in meant.items():
        if option != "name" and option not in taken:
            raise ValueError(f"takes for {meant['name']} the options {', '.join(taken)}, not {shorten(option)}")
        if option != "name" and not is_valid(each, taken[option]):
            raise ValueError(f"takes for {option} {describe_schema(taken[option])}, not {shorten(each)}")
    return meant if len(meant) > 1 else str(meant["name"])


def split_sampler(sampler: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of what `read_sampler` has returned."""
    if isinstance(sampler, str):
        return sampler, {}
    return str(sampler["name"]), {option: each for option, each in sampler.items() if option != "name"}
