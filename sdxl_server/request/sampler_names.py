"""How requests name samplers: diffusers' names, and the spellings of A1111, ComfyUI, InvokeAI and k-diffusion."""

import contextlib
import difflib
import functools
import re
from collections.abc import Mapping
from typing import Any

from sdxl_server.errors import RequestError
from sdxl_server.request.samplers import (
    ALIASES,
    AUTOMATIC,
    EXAMPLE,
    SAMPLERS,
    SCHEDULES,
    SIGMA_SCHEDULES,
    Options,
    Samplers,
    list_aliases,
    split_sampler,
)
from sdxl_server.schemas import is_valid, load_json, read_value, shorten

SAMPLER_NAME = "sampler_name"  # A1111's and ComfyUI's field. Then `scheduler` names the schedule.
OBJECT_ALIASES = {SAMPLER_NAME: "name", "scheduler": "schedule"}
SHORT = {"ka": "karras", "k": "karras", "exp": "exponential"}  # at the end of a name
# Other programs' samplers that diffusers does not have, with the nearest that it has.
MISSING = {
    "DPM++ 2S a": "DPM++ SDE",
    "DPM fast": "DPM++ 2M",
    "DPM adaptive": "DPM++ 2M",
    "Restart": "Euler a",
    "Heun++": "Heun",
    "heunpp2": "Heun",
    "ipndm": "DEIS",
    "ipndm_v": "DEIS",
    "res_multistep": "DPM++ 2M",
    "er_sde": "DPM++ 2M SDE",
}
PREFERRED = {  # A1111's automatic schedules
    **dict.fromkeys(("DPM++ 2M", "DPM++ SDE", "DPM2", "DPM2 a"), "karras"),
    **dict.fromkeys(("DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE"), "exponential"),
}
WRITTEN = ("Uniform", "Karras", "Exponential", "Beta", "SGM Uniform", "DDIM")  # A1111's schedules with a meaning here


def normalize_name(name: str) -> str:
    """Return one key for all spellings of a sampler, such as `k_dpmpp_2m_sde_gpu` and `DPM++ 2M SDE`."""
    plain = name[:100].casefold().replace("++", "pp").replace("ancestral", "a")
    words = [each for each in re.findall(r"[^\W_]+", plain) if each != "gpu"]
    if len(words) > 1 and words[0] in ("k", "sample"):
        words = words[1:]
    return "".join(words).removesuffix("scheduler").removesuffix("discrete")


SCHEDULE_NAMES = {**{normalize_name(each): each for each in (AUTOMATIC, *SCHEDULES)}, **SHORT}


def join_sampler_name(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request's fields with `sampler_name` and its `scheduler` as one `scheduler`.

    Raises:
        RequestError: this `scheduler` is no schedule.
    """
    joined = {name: value for name, value in fields.items() if name != SAMPLER_NAME}
    if fields.get(SAMPLER_NAME) is not None:
        joined["scheduler"] = {name: fields[name] for name in OBJECT_ALIASES if fields.get(name) is not None}
        try:
            _read_schedule_name(joined["scheduler"].get("scheduler") or AUTOMATIC)
        except ValueError as error:
            raise RequestError(f"scheduler next to {SAMPLER_NAME} {error}", param="scheduler") from error
    return joined


def read_sampler(value: Any, samplers: Samplers) -> str | dict[str, Any]:
    """Return a sampler by diffusers' name, with its options if there are any.

    Args:
        value: a name in any spelling, an object, or the JSON of an object, as forms send it.

    Raises:
        ValueError: says what is wrong and what is accepted. The caller puts the field's name in front.
    """
    given = _read_object(value)
    schedule = given.pop("schedule", None)
    name = given.pop("name", None)
    meaning = _find_sampler(name, schedule, samplers, given=value if name is None else name)
    name, options = split_sampler({**meaning, **given})
    accepted = samplers[name]
    for option, chosen in options.items():
        if option not in accepted:
            raise ValueError(f"takes for {name} the options {', '.join(accepted) or 'none'}, not {shorten(option)}")
        try:
            options[option] = read_value(chosen, accepted[option])
        except ValueError as error:
            raise ValueError(f"takes for {option} {str(error).removeprefix('takes ')}") from error
    schedules = [option for option in SIGMA_SCHEDULES if options.get(option)]
    if len(schedules) > 1:
        raise ValueError(f"takes one sigma schedule, not {' and '.join(schedules)}")
    wrong = SAMPLERS[name].wrong
    if wrong and all(options.get(option) == each for option, each in wrong.items()):
        together = " and ".join(f"{option}: {each}" for option, each in wrong.items())
        raise ValueError(f"does not take {together} together for {name}; give one of them")
    return {"name": name, **options} if options else name


def name_sampler(sampler: str | Mapping[str, Any]) -> tuple[str, str]:
    """Return A1111's names of a sampler and of its schedule, the nearest ones if none is exact.

    A class without a name in A1111 keeps its own. An empty schedule is the model's own.

    Args:
        sampler: what `read_sampler` has returned.
    """
    name, options = split_sampler(sampler)
    meanings = [each for each in _list_written_names() if each[2] == name]
    if not meanings:
        return name, ""
    alias, schedule, _, _ = min(meanings, key=lambda each: len(options.items() ^ each[3].items()))
    return alias, schedule


@functools.cache
def _list_written_names() -> list[tuple[str, str, str, dict[str, Any]]]:
    """Return A1111's samplers and schedules, each with diffusers' name and options."""
    found, samplers = [], {row.name: row.options for row in SAMPLERS.values()}
    for alias in ALIASES:
        for schedule in ("", *WRITTEN):
            with contextlib.suppress(ValueError):
                meaning = split_sampler(read_sampler({"name": alias, "schedule": schedule}, samplers))
                # For A1111 no schedule is its automatic one, which is not the model's own.
                found.append((alias, schedule or (WRITTEN[0] if alias in PREFERRED else ""), *meaning))
    return found


def _read_object(value: Any) -> dict[str, Any]:
    """Return a sampler as an object, under the names of its own options."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = load_json(value)
        except ValueError as error:
            raise ValueError(f"takes a name or JSON such as {EXAMPLE}, not {shorten(value)}") from error
    if not isinstance(value, Mapping):
        return {"name": value}
    return {str(OBJECT_ALIASES.get(name, name)): each for name, each in value.items()}


def _find_sampler(name: Any, schedule: Any, samplers: Samplers, *, given: Any) -> dict[str, Any]:
    """Return what a name stands for, with a schedule at its end or apart."""
    known = {normalize_name(each): each for each in (*samplers, *list_aliases(samplers))}
    key = normalize_name(name) if isinstance(name, str) else ""
    splits = [(key.removesuffix(each), each) for each in ("", *SCHEDULE_NAMES) if key.endswith(each)]
    base, ending = next((each for each in splits if each[0] in known), (key, ""))
    if base not in known or ending and key in SCHEDULE_NAMES:
        raise ValueError(_describe_unknown(key, known, given=given))
    chosen = [each for each in (ending, schedule) if each not in (None, "")]
    if len(chosen) > 1:
        raise ValueError(f"takes one schedule, not {' and '.join(map(shorten, chosen))}")
    meaning = dict(ALIASES.get(known[base], {"name": known[base]}))
    return {**meaning, **(_read_schedule(chosen[0], known[base], samplers[meaning["name"]]) if chosen else {})}


def _read_schedule(schedule: Any, sampler: str, accepted: Options) -> Mapping[str, Any]:
    """Return the options that a schedule stands for."""
    name = _read_schedule_name(schedule)
    if name == AUTOMATIC:
        name = PREFERRED.get(sampler, "")
    options = SCHEDULES.get(name, {})
    if not all(option in accepted and is_valid(value, accepted[option]) for option, value in options.items()):
        raise ValueError(f"takes no schedule {name} with {sampler}; leave it out, or name another sampler")
    return options


def _read_schedule_name(schedule: Any) -> str:
    name = SCHEDULE_NAMES.get(normalize_name(schedule)) if isinstance(schedule, str) else None
    if name is None:
        raise ValueError(f"takes a schedule, one of {', '.join((AUTOMATIC, *SCHEDULES))}, not {shorten(schedule)}")
    return name


def _describe_unknown(key: str, known: Mapping[str, str], *, given: Any) -> str:
    """Say in one line which names are accepted instead of an unknown one."""
    example = next((each for each in ("Euler a", "DDIM", *known.values()) if each in known.values()), "none here")
    if key in SCHEDULE_NAMES:
        return f"takes a sampler such as {example}, and {shorten(given)} is a schedule: send {SAMPLER_NAME} too"
    missing = {normalize_name(each): each for each in MISSING}
    lost = next((missing[each] for each in sorted(missing, key=len, reverse=True) if key.startswith(each)), None)
    if lost is not None and (nearest := MISSING[lost]) in known.values():
        return f"takes no {lost}, which diffusers does not have; the nearest is {nearest}"
    is_typo = key not in map(normalize_name, (*SAMPLERS, *ALIASES))  # otherwise it exists, for other models
    near = [known[each] for each in difflib.get_close_matches(key, known)] if is_typo else []
    hint = f"did you mean {' or '.join(near)}?" if near else "openapi.json lists all"
    return f"takes a sampler that suits this model, such as {example}, not {shorten(given)}; {hint}"
