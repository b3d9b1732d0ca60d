"""The samplers: one row for each of diffusers' schedulers, with the names and options that requests may use.

A sampler with options is an object, `{"name": ..., option: ...}`. Without options it is a name. sampler_names.py reads
the spellings of other programs.

tests/unit/test_samplers.py draws a known image with every row, prediction type and declared option.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sdxl_server.schemas import Schema, choice, switch, whole

Options = Mapping[str, Schema]
Samplers = Mapping[str, Options]  # the samplers that fit a model, each with its options

SIGMA_SCHEDULES = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
EXAMPLE = '{"name": "DPM++ 2M", "use_karras_sigmas": true}'
KARRAS, EXPONENTIAL, BETA = ({name: True} for name in SIGMA_SCHEDULES[:3])
LINSPACE, TRAILING = ({"timestep_spacing": each} for each in ("linspace", "trailing"))
DDIM_UNIFORM = {"timestep_spacing": "leading", "steps_offset": 1}
SCHEDULES: Mapping[str, Mapping[str, Any]] = {  # of A1111 and ComfyUI, which choose them apart from the sampler
    **{"karras": KARRAS, "exponential": EXPONENTIAL, "polyexponential": EXPONENTIAL, "beta": BETA},
    **{"normal": LINSPACE, "uniform": LINSPACE, "simple": TRAILING, "sgm_uniform": TRAILING},
    **{"ddim": DDIM_UNIFORM, "ddim_uniform": DDIM_UNIFORM},
}
AUTOMATIC = "automatic"  # A1111's choice for a sampler
ODE, SDE = (
    {"algorithm_type": each, "solver_order": 2, "solver_type": "midpoint"}
    for each in ("dpmsolver++", "sde-dpmsolver++")
)
SDE_3 = {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}

_ALWAYS: Schema = {"type": "boolean", "enum": [True]}  # diffusers' other value draws a wrong image
_SIGMAS: Options = {name: switch() for name in SIGMA_SCHEDULES[:3]}
_SPACING: Options = {"timestep_spacing": choice("linspace", "leading", "trailing"), "steps_offset": whole(0, 10)}
_SPACING_FROM_END: Options = {**_SPACING, "timestep_spacing": choice("leading", "trailing")}
_ALPHA: Options = {"set_alpha_to_one": switch()}
_FINAL: Options = {"final_sigmas_type": choice("zero", "sigma_min")}
_ORDER: Options = {"solver_order": whole(1, 3), "lower_order_final": switch()}
_DPM: Options = {
    **_ORDER,
    "algorithm_type": choice("dpmsolver++", "sde-dpmsolver++"),
    "solver_type": choice("midpoint", "heun"),
    **_FINAL,
}
_DISTILLED: Options = {"original_inference_steps": whole(1, 1000), **_ALPHA, **_SPACING}
_NO_SAMPLE = ("epsilon", "v_prediction")


@dataclass(frozen=True)
class Sampler:
    """One scheduler of diffusers.

    Attributes:
        name: its class in diffusers.
        aliases: the names of A1111, ComfyUI and k-diffusion, each with the options that it stands for.
        options: what requests may set. All other settings are the model's.
        predictions: the prediction types of the models that it samples correctly.
        zero_snr: it samples models with zero terminal SNR correctly.
        use: "any"; "own" if only models saved with it use it; "distilled" if only models distilled for it do; "edm".
        schedules: the fields that give the steps themselves and that it takes.
        wrong: options that fail together, each right alone.
    """

    name: str
    aliases: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    options: Options = field(default_factory=dict)
    predictions: tuple[str, ...] = ("epsilon", "v_prediction", "sample")
    zero_snr: bool = False
    use: str = "any"
    schedules: tuple[str, ...] = ()
    wrong: Mapping[str, Any] = field(default_factory=dict)


_ROWS = (
    Sampler("DDIMParallelScheduler", {}, {**_ALPHA, **_SPACING_FROM_END}, zero_snr=True, use="own"),
    Sampler("DDIMScheduler", {"DDIM": {}}, {**_ALPHA, **_SPACING_FROM_END}, zero_snr=True),
    Sampler("DDPMParallelScheduler", {}, _SPACING, zero_snr=True, use="own", schedules=("timesteps",)),
    Sampler("DDPMScheduler", {"DDPM": {}}, _SPACING, zero_snr=True, schedules=("timesteps",)),
    Sampler(
        "DEISMultistepScheduler",
        {"DEIS": {}},
        {**_ORDER, "algorithm_type": choice("deis"), "solver_type": choice("logrho"), **_SIGMAS, **_SPACING},
    ),
    Sampler(
        "DPMSolverMultistepScheduler",
        {
            "DPM++ 2M": ODE,
            "DPM++ 2M Karras": {**ODE, **KARRAS},
            "DPM++ 2M SDE": SDE,
            "DPM++ 2M SDE Karras": {**SDE, **KARRAS},
            "DPM++ 2M SDE Heun": {**SDE, "solver_type": "heun"},
            "DPM++ 3M SDE": {**SDE_3, "solver_type": "heun"},  # of the second step, which has order 2
            "DPM++ 3M SDE Karras": {**SDE_3, "solver_type": "heun", **KARRAS},
        },
        {**_DPM, "euler_at_final": switch(), **_SIGMAS, "use_lu_lambdas": switch(), **_SPACING},
        zero_snr=True,
        schedules=("timesteps",),
    ),
    Sampler(
        "DPMSolverSinglestepScheduler",
        {"DPM++ 2S": ODE, "DPM++ SDE": SDE, "DPM++ SDE Karras": {**SDE, **KARRAS}},
        {**_DPM, **_SIGMAS},
        schedules=("timesteps",),
        wrong=SDE_3,  # diffusers subtracts a curvature where it should add one
    ),
    Sampler("EDMDPMSolverMultistepScheduler", {}, {**_DPM, "euler_at_final": switch()}, use="edm", wrong=SDE_3),
    Sampler("EDMEulerScheduler", {}, _FINAL, use="edm", schedules=("sigmas",)),
    Sampler(
        "EulerAncestralDiscreteScheduler",
        {"Euler a": {}, "Euler a Karras": KARRAS},
        {**_SIGMAS, **_SPACING},
        _NO_SAMPLE,
        zero_snr=True,
    ),
    Sampler(
        "EulerDiscreteScheduler",
        {"Euler": {}},
        {"interpolation_type": choice("linear"), **_SIGMAS, **_SPACING, **_FINAL},
        zero_snr=True,
        schedules=("timesteps", "sigmas"),
    ),
    Sampler("HeunDiscreteScheduler", {"Heun": {}}, {**_SIGMAS, **_SPACING}, schedules=("timesteps",)),
    Sampler(
        "KDPM2AncestralDiscreteScheduler",
        {"DPM2 a": {}, "DPM2 a Karras": KARRAS},
        {**_SIGMAS, **_SPACING},
        _NO_SAMPLE,
    ),
    Sampler(
        "KDPM2DiscreteScheduler",
        {"DPM2": {}, "DPM2 Karras": KARRAS},
        {**_SIGMAS, **_SPACING},
        _NO_SAMPLE,
    ),
    Sampler("LCMScheduler", {"LCM": {}}, _DISTILLED, zero_snr=True, use="distilled", schedules=("timesteps",)),
    Sampler("LMSDiscreteScheduler", {"LMS": {}, "LMS Karras": KARRAS}, {**_SIGMAS, **_SPACING}),
    Sampler(
        "PNDMScheduler",
        {"PLMS": {"skip_prk_steps": True}},
        {"skip_prk_steps": switch(), **_ALPHA, **_SPACING_FROM_END},
        ("epsilon",),
    ),
    Sampler("SASolverScheduler", {}, {"lower_order_final": switch(), **_SIGMAS, **_SPACING}, use="own"),
    Sampler("TCDScheduler", {"TCD": {}}, _DISTILLED, zero_snr=True, use="distilled", schedules=("timesteps",)),
    Sampler(
        "UniPCMultistepScheduler",
        # Order 3 in A1111 and ComfyUI. Their default is bh1, which ends in NaN in diffusers.
        {each: {"solver_order": 3, "solver_type": "bh2"} for each in ("UniPC", "uni_pc_bh2")},
        {
            "solver_order": whole(1, 3),
            "predict_x0": _ALWAYS,
            "solver_type": choice("bh2"),
            "lower_order_final": _ALWAYS,
            **_SIGMAS,
            **_SPACING,
            **_FINAL,
        },
        zero_snr=True,
    ),
)
SAMPLERS: Mapping[str, Sampler] = {row.name: row for row in _ROWS}
ALIASES: Mapping[str, Mapping[str, Any]] = {
    alias: {"name": row.name, **options} for row in _ROWS for alias, options in row.aliases.items()
}


def list_aliases(samplers: Samplers) -> dict[str, Mapping[str, Any]]:
    """Return the names of other programs for these samplers."""
    return {alias: meaning for alias, meaning in ALIASES.items() if meaning["name"] in samplers}


def build_sampler_schema(samplers: Samplers) -> Schema:
    """Return the JSON Schema of a sampler. It does not say which options go with which name."""
    name = choice(*samplers, *list_aliases(samplers))
    options: dict[str, Schema] = {}
    for known in samplers.values():
        for option, schema in known.items():
            words = [*options.get(option, {}).get("enum", []), *schema.get("enum", [])]
            if schema["type"] == "boolean":
                options[option] = switch()
            else:
                options[option] = {**schema, "enum": list(dict.fromkeys(words))} if words else schema
    options["schedule"] = choice(AUTOMATIC, *SCHEDULES)
    with_options = {"type": "object", "required": ["name"], "additionalProperties": False}
    return {
        "type": ["string", "object"],
        "anyOf": [name, {**with_options, "properties": {"name": name, **options}}],
        "x-accepted": describe_samplers(samplers),
    }


def describe_samplers(samplers: Samplers) -> str:
    """Say in words what a sampler may be."""
    names, aliases = ", ".join(samplers), ", ".join(list_aliases(samplers))
    return f"one of {names}; one of {aliases}; or an object of such a name and options, as {EXAMPLE}"


def split_sampler(sampler: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of what `read_sampler` has returned."""
    if isinstance(sampler, str):
        return sampler, {}
    return str(sampler["name"]), {option: value for option, value in sampler.items() if option != "name"}
