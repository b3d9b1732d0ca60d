"""A1111's text of an image's settings, which galleries, model sites and other programs read.

It is the prompt, a line `Negative prompt: …`, and a last line `Steps: 20, Sampler: Euler a, …`. Fields without a name
in A1111 have their own name in the last line; other programs ignore them.
"""

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from sdxl_server.api.a1111_controlnet import read_unit, write_unit
from sdxl_server.config.declaration import Role
from sdxl_server.errors import RequestError
from sdxl_server.request.fields import DECLARATIONS, MAX_SEED, GenerationRequest
from sdxl_server.request.hires import read_hires
from sdxl_server.request.limits import Limits
from sdxl_server.request.prompts import TAG
from sdxl_server.request.sampler_names import name_sampler, normalize_name, read_sampler
from sdxl_server.request.samplers import SAMPLERS
from sdxl_server.request.uploads import RESIZE_MODES
from sdxl_server.request.upscaling import FACTORS, LANCZOS
from sdxl_server.schemas import load_json, read_number, shorten

NEGATIVE = "Negative prompt:"
MIN_PARAMETERS = 3  # of the last line, as in A1111
MAX_CHARACTERS = 1_000_000
MAX_STEPS = 1000
STRENGTH = "Denoising strength"
HIRES_SCALE, HIRES_STEPS, HIRES_UPSCALER = "Hires upscale", "Hires steps", "Hires upscaler"
NUMBERS = {
    "Steps": "num_inference_steps",
    "CFG scale": "guidance_scale",
    "CFG rescale": "guidance_rescale",  # SD.Next's
    "Seed": "seed",
    STRENGTH: "strength",
}
WHOLE = ("num_inference_steps", "seed")
NUMBER = re.compile(r"[+-]?\d{1,20}(\.\d{0,20})?(e[+-]?\d{1,2})?", re.ASCII)
UPSCALED_BY, UPSCALED_WITH = "Postprocess upscale by", "Postprocess upscaler"
WHOLE_NUMBER = re.compile(r"([+-]?\d{1,20})(\.0{0,20})?", re.ASCII)
UNIT = re.compile(r"ControlNet \d{1,2}", re.ASCII)
SIZE = re.compile(r"(\d{1,5})\s?x\s?(\d{1,5})", re.ASCII)
KEY = re.compile(r"\s*(\w[\w \-/]{1,100}):\s*")
END = re.compile(r"\s*(,|$)")
# These name the model and the program. The next ones say nothing about the image.
MADE_WITH = {
    **{"Model": "model", "Model hash": "model_hash", "VAE": "vae"},
    **{"Lora hashes": "lora_hashes", "Version": "version"},
}
SILENT = ("VAE hash", "TI hashes", "Hashes", "User", "App", "Backend", "Pipeline", "Operations", "Created Date")
SILENT_STARTS = ("Civitai ", "Batch ")
MAX_NAMED = 12  # parameters in one warning
_ALL_SAMPLERS = {name: row.options for name, row in SAMPLERS.items()}


def write_infotext(described: Mapping[str, Any]) -> str:
    """Return A1111's text of an image.

    Args:
        described: the metadata of the image, see `describe_image`.
    """
    request, made_with = dict(described["request"]), described.get("made_with", {})
    prompt, negative = request.pop("prompt", ""), request.pop("negative_prompt", None)
    tags = "".join(
        f" <lora:{each['name']}:{write_value(each['scale'])}>" for each in request.pop("adapters", None) or ()
    )
    units = _write_units(request.pop("control", None) or (), request.get("resize_mode"), made_with.get("controls"))
    parameters: dict[str, Any] = {"Steps": request.pop("num_inference_steps", None)}
    if scheduler := request.get("scheduler"):
        sampler, schedule = name_sampler(scheduler)
        parameters |= {"Sampler": sampler, "Schedule type": schedule or None}
        with contextlib.suppress(ValueError):
            if _read_sampler(sampler, schedule, _ALL_SAMPLERS) == scheduler:
                del request["scheduler"]
    parameters |= {name: request.pop(NUMBERS[name], None) for name in ("CFG scale", "Seed")}
    if "width" in request and "height" in request:
        parameters["Size"] = f"{request.pop('width')}x{request.pop('height')}"
    parameters |= {
        "Model hash": made_with.get("model_autov2"),
        "Model": made_with.get("model_name"),
        "VAE": PurePath(made_with.get("vae", {}).get("path") or "").name or None,
        STRENGTH: request.pop("strength", None),
        "CFG rescale": request.pop("guidance_rescale", 0.0) or None,
        "Clip skip": write_clip_skip(request.pop("clip_skip", None), is_xl=made_with.get("is_xl", True)),
        **_write_hires(request, made_with),
        UPSCALED_BY: request.pop("upscale", None),
        UPSCALED_WITH: PurePath(made_with.get("upscaler", {}).get("name", "")).stem or None,
        **{name: value for name, value in request.items() if _is_chosen(name, value)},
        **units,
        "Lora hashes": _write_hashes(made_with.get("adapters", ())),
        "TI hashes": _write_hashes(made_with.get("embeddings", ())),
    }
    if version := made_with.get("versions", {}).get("sdxl_server"):
        parameters["Version"] = f"sdxl_server {version}"
    last = ", ".join(f"{name}: {_quote(write_value(each))}" for name, each in parameters.items() if each is not None)
    return "\n".join([prompt + tags, *([] if negative is None else [f"{NEGATIVE} {negative}".rstrip()]), last])


def read_infotext(text: str, limits: Limits) -> dict[str, Any]:
    """Return an image's metadata from A1111's text: `request`, `warnings` and `made_with`, as `describe_image` does.

    Args:
        limits: with the samplers and adapters of this server.

    Raises:
        RequestError: the text is not A1111's.
    """
    prompt, negative, parameters = split_infotext(text)
    return build_metadata(prompt, negative, parameters, limits)


def build_metadata(prompt: str, negative: str | None, parameters: Mapping[str, str], limits: Limits) -> dict[str, Any]:
    """Return an image's metadata from its prompts and its parameters under A1111's names; see `read_infotext`."""
    warnings: list[str] = []
    parameters = dict(parameters)
    made_with = {own: parameters.pop(name) for name, own in MADE_WITH.items() if name in parameters}
    request: dict[str, Any] = {"prompt": prompt, **({} if negative is None else {"negative_prompt": negative})}
    request |= _read_tags(request, limits, warnings)
    request |= _read_hires(parameters, limits)
    if any(name.startswith("Hires ") for name in parameters) and STRENGTH in parameters:
        parameters["Hires denoising strength"] = parameters.pop(STRENGTH)  # it is of the second pass
    request |= _read_numbers(parameters, warnings)
    if found := SIZE.fullmatch(parameters.get("Size", "")):
        request |= {"width": int(found[1]), "height": int(found[2])}
        del parameters["Size"]
    sampler, schedule = parameters.pop("Sampler", None), parameters.pop("Schedule type", "")
    if sampler is not None and "scheduler" not in parameters:
        request |= _choose_sampler(sampler, schedule, limits, warnings)
    if NUMBER.fullmatch(skipped := parameters.get("Clip skip", "")):
        del parameters["Clip skip"]
        clip_skip = read_clip_skip(int(float(skipped)), is_xl=limits.is_xl)
        request |= {"clip_skip": clip_skip} if clip_skip else {}
    if limits.upscaler is not None and parameters.get(UPSCALED_BY, "") in map(str, FACTORS):
        request["upscale"] = int(parameters.pop(UPSCALED_BY))
        parameters.pop(UPSCALED_WITH, None)
    for name in [each for each in parameters if _is_kept(each)]:
        request[name] = _read_own(name, parameters.pop(name), limits)
    request |= _read_units(parameters, limits, request.get("resize_mode"), warnings)
    left = [f"{name}: {value}" for name, value in parameters.items() if not _is_silent(name)]
    if left:
        shown = ", ".join(shorten(each, length=50) for each in left[:MAX_NAMED])
        more = f" and {len(left) - MAX_NAMED} more" if len(left) > MAX_NAMED else ""
        warnings.append(f"without an equivalent here, left out: {shown}{more}")
    return {
        "request": request,
        **({"warnings": warnings} if warnings else {}),
        **({"made_with": made_with} if made_with else {}),
    }


def split_infotext(text: str) -> tuple[str, str | None, dict[str, str]]:
    """Return the prompt, the negative prompt and the parameters of A1111's text.

    Raises:
        RequestError: the text is not A1111's.
    """
    if len(text) > MAX_CHARACTERS:
        raise RequestError(f"the metadata has {len(text)} characters; at most {MAX_CHARACTERS} are read")
    lines = text.replace("\r\n", "\n").strip("\0 \t\r\n").split("\n")
    # Prompts may have such lines too, so the last one counts. Extensions write further lines below it.
    found = ((index, _read_parameters(lines[index])) for index in reversed(range(len(lines))))
    end, parameters = next(
        ((index, each) for index, each in found if "Steps" in each and len(each) >= MIN_PARAMETERS), (0, {})
    )
    if not parameters:
        raise RequestError("the text is not A1111's: it has no line such as Steps: 20, Sampler: Euler a, Seed: 7")
    begin = next((index for index in range(end) if lines[index].lstrip().startswith(NEGATIVE)), end)
    negative = "\n".join(lines[begin:end]).strip().removeprefix(NEGATIVE).strip() if begin < end else None
    return "\n".join(lines[:begin]).strip(), negative, parameters


def read_clip_skip(value: int, *, is_xl: bool) -> int | None:
    """Return diffusers' clip_skip for A1111's number.

    A1111 counts the layer that is read, from the end. SDXL is made for the second one, so that 2 skips nothing there.
    """
    return max(value - (2 if is_xl else 1), 0) or None


def write_clip_skip(value: int | None, *, is_xl: bool) -> int | None:
    """Return A1111's number for diffusers' clip_skip. None: the model's own layer."""
    return value + (2 if is_xl else 1) if value else None


def _read_parameters(line: str) -> dict[str, str]:
    """Return the parameters of a line `Steps: 20, Sampler: Euler a`."""
    found, position = {}, 0
    while position < len(line):
        key = KEY.match(line, position)
        quoted = _read_quoted(line, key.end()) if key else None
        comma = line.find(",", quoted[1] if quoted else position)
        end = comma if comma >= 0 else len(line)
        if key:
            found[key[1].strip()] = quoted[0] if quoted else line[key.end() : end].strip()
        position = end + 1
    return found


def _read_quoted(line: str, start: int) -> tuple[str, int] | None:
    """Return a value in quotes, or a list or object in JSON, and where it ends; None if it is neither."""
    if line[start : start + 1] not in ('"', "[", "{"):
        return None
    try:
        value, end = json.JSONDecoder().raw_decode(line, start)
    except (ValueError, RecursionError):
        return None
    return (value if isinstance(value, str) else line[start:end], end) if END.match(line, end) else None


def _write_hires(request: dict[str, Any], made_with: Mapping[str, Any]) -> dict[str, Any]:
    """Take the second pass; return its parameters."""
    hires = request.pop("hires", None)
    if hires is None:
        return {}
    steps, upscaler = hires.get("steps"), made_with.get("hires_upscaler")
    return {STRENGTH: hires["strength"], HIRES_SCALE: hires["scale"], HIRES_STEPS: steps, HIRES_UPSCALER: upscaler}


def _read_hires(parameters: dict[str, str], limits: Limits) -> dict[str, Any]:
    """Take the parameters of a second pass; return its field. They stay if they do not describe one here."""
    names = {HIRES_SCALE: "scale", STRENGTH: "strength", HIRES_STEPS: "steps"}
    given = {own: parameters[name] for name, own in names.items() if name in parameters}
    if not {"scale", "strength"} <= given.keys() or not all(map(NUMBER.fullmatch, given.values())):
        return {}
    try:
        hires = read_hires({name: read_number(each) for name, each in given.items()}, max_steps=MAX_STEPS)
    except ValueError:
        return {}
    own = {HIRES_UPSCALER: LANCZOS if limits.upscaler is None else limits.upscaler.name}
    for name in (*names, *(own.items() & parameters.items() and own)):
        parameters.pop(name, None)
    return {"hires": hires.describe()}


def _read_tags(request: dict[str, Any], limits: Limits, warnings: list[str]) -> dict[str, Any]:
    """Return the prompts without tags such as `<lora:outline:0.8>`, and the adapters that these name."""
    read: dict[str, Any] = {name: TAG.sub("", prompt).strip() for name, prompt in request.items()}
    scales: dict[str, float] = {}
    unknown = []
    for kind, tag in TAG.findall(request["prompt"]):
        name, *given = (each.strip() for each in tag.split(":"))
        numbers = [float(each) for each in (each.rpartition("=")[2] for each in given) if NUMBER.fullmatch(each)]
        if kind.lower() == "hypernet" or name not in limits.adapters:
            unknown.append(name)
            continue
        scales[name] = numbers[1] if len(numbers) > 1 else next(iter(numbers), 1.0)  # the text encoders', the UNet's
        if len(set(numbers)) > 1 or len(numbers) < len(given):
            warnings.append(f"<{kind}:{shorten(tag)}> has one scale here, {scales[name]:g}")
    if unknown:
        names = ", ".join(limits.adapters) or "none"
        shown = ", ".join(shorten(each) for each in dict.fromkeys(unknown[:MAX_NAMED]))
        warnings.append(f"adapters left out: {shown}; the adapters here are: {names}")
    adapters = [{"name": name, "scale": scale} for name, scale in scales.items()]
    return read | ({"adapters": adapters} if adapters else {})


def _read_numbers(parameters: dict[str, str], warnings: list[str]) -> dict[str, Any]:
    """Take the parameters that are numbers; return their fields."""
    read: dict[str, Any] = {}
    for name, field in NUMBERS.items():
        if (text := parameters.pop(name, None)) is None:
            continue
        if not (found := (WHOLE_NUMBER if field in WHOLE else NUMBER).fullmatch(text)):
            warnings.append(f"{name} takes a number, not {shorten(text)}")
        elif field == "seed" and not 0 <= int(found[1]) <= MAX_SEED:
            warnings.append(f"seeds here are whole numbers from 0 to {MAX_SEED}; {shorten(text)} is left out")
        else:
            read[field] = int(found[1]) if field in WHOLE else float(text)
    return read


def _choose_sampler(sampler: str, schedule: str, limits: Limits, warnings: list[str]) -> dict[str, Any]:
    """Return the field `scheduler` for A1111's names, empty if there is none."""
    if normalize_name(sampler).endswith(normalize_name(schedule)):  # some programs name it twice
        schedule = ""
    for tried in dict.fromkeys((schedule, "")):
        try:
            return {"scheduler": _read_sampler(sampler, tried, limits.samplers)}
        except ValueError as error:
            named = f", Schedule type {shorten(tried)}" if tried else ""
            warnings.append(f"Sampler {shorten(sampler)}{named}: {error}")
    return {}


def _read_sampler(sampler: str, schedule: str, samplers: Mapping[str, Any]) -> str | dict[str, Any]:
    return read_sampler({"name": sampler, **({"schedule": schedule} if schedule else {})}, samplers)


def _write_units(controls: Sequence[Mapping[str, Any]], resize_mode: str | None, made_with: Any) -> dict[str, str]:
    """Return the parameters for an image's controls, as sd-webui-controlnet names them."""
    digests = {each["name"]: each["sha256"] for each in made_with or ()}
    how = resize_mode or RESIZE_MODES[0]
    texts = [write_unit(each, digest=digests.get(each["name"]), resize_mode=how) for each in controls]
    return {f"ControlNet {index}": text for index, text in enumerate(texts)}


def _read_units(
    parameters: dict[str, str], limits: Limits, resize_mode: str | None, warnings: list[str]
) -> dict[str, Any]:
    """Take the parameters of sd-webui-controlnet's units; return the field `control` without images."""
    texts = {name: parameters.pop(name) for name in list(parameters) if UNIT.fullmatch(name)}
    how = resize_mode or RESIZE_MODES[0]
    read = [read_unit(name, text, limits, resize_mode=how, warnings=warnings) for name, text in texts.items()]
    controls = [each for each in read if each]
    return {"control": controls} if controls else {}


def _read_own(name: str, text: str, limits: Limits) -> Any:
    """Return the value of a field under its own name."""
    if DECLARATIONS[name].build_schema(limits)["type"] == "string":
        return text
    try:
        return load_json(text)
    except ValueError:
        return text


def _is_kept(name: str) -> bool:
    """Say whether a field of this name draws the image."""
    return name in DECLARATIONS and DECLARATIONS[name].role is Role.IMAGE and not DECLARATIONS[name].is_upload


def _is_chosen(name: str, value: Any) -> bool:
    """Say whether a field differs from its default, so that the text needs it."""
    return _is_kept(name) and bool(value != GenerationRequest.__dataclass_fields__[name].default)


def _is_silent(name: str) -> bool:
    return name in SILENT or name.startswith(SILENT_STARTS)


def _write_hashes(files: Any) -> str | None:
    return ", ".join(f"{each['name']}: {each['autov2']}" for each in files) or None


def write_value(value: Any) -> str:
    """Return a parameter's value as A1111 writes it, not yet quoted."""
    if isinstance(value, str):
        return value
    return repr(value).removesuffix(".0") if type(value) in (int, float) else json.dumps(value, ensure_ascii=False)


def _quote(text: str) -> str:
    """Return a value as A1111 writes it. Values that begin like JSON are quoted, too."""
    is_plain = not re.search(r"[,:\n\r]", text) and text.strip() == text and text[:1] not in ('"', "[", "{", "")
    return text if is_plain else json.dumps(text, ensure_ascii=False)
