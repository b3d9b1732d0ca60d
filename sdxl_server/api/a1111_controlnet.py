"""A1111's extension sd-webui-controlnet: its units in requests and in texts, and its lists.

A unit is a control of this server with an image. Its preprocessor (`module`) is Canny's, or none: the client makes
other maps.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sdxl_server.api.a1111_values import normalize_model_name, read_as, warn_of_effects
from sdxl_server.config.control_settings import CONTROL_SCALE
from sdxl_server.errors import RequestError
from sdxl_server.request.controls import HIGH, LOW, RegisteredControl
from sdxl_server.request.limits import Limits
from sdxl_server.request.preprocessing import CANNY, DEFAULT_THRESHOLDS, PACKAGE, load_opencv
from sdxl_server.request.uploads import read_upload
from sdxl_server.schemas import real, shorten, switch

SCRIPT, UNITS = "controlnet", "alwayson_scripts.controlnet.args"
NONE = "none"  # no preprocessor, and no model
ENCODER, ENCODERS = "ip-adapter-auto", re.compile(r"ip-?adapter", re.IGNORECASE)  # an IP-Adapter has its own
RESIZE_MODES = {"Just Resize": "stretch", "Crop and Resize": "crop", "Resize and Fill": "pad"}  # by A1111's number
OLDER_RESIZE_MODES = {
    **{"Scale to Fit (Inner Fit)": "crop", "Inner Fit (Scale to Fit)": "crop"},
    **{"Envelope (Outer Fit)": "pad", "Outer Fit (Shrink to Fit)": "pad"},
}
BALANCED = "Balanced"  # the only control_mode
THRESHOLDS = ("threshold_a", "threshold_b")
UNION_TYPES = {  # the modes of a union ControlNet
    **{"OpenPose": "openpose", "Depth": "depth", "Soft Edge": "scribble", "Hard Edge": "canny"},
    **{"Normal Map": "normal", "Segmentation": "segment", "Tile": "tile", "Inpaint": "repaint", "Unknown": None},
}
READ = (
    *("enabled", "model", "module", "image", "input_image", "weight", "resize_mode", "control_mode"),
    *("guidance_start", "guidance_end", "guidance", *THRESHOLDS, "union_control_type"),
)
NO_EQUIVALENT: Mapping[str, Sequence[Any]] = {
    **{"mask": (), "mask_image": (), "effective_region_mask": (), "guess_mode": (False,), "guessmode": (False, 0)},
    **{"advanced_weighting": ([],), "ipadapter_input": ([],)},
}
# They change no image here: memory, the second pass, saving, batches, and the resolution of a preprocessor.
SILENT = (
    *("low_vram", "lowvram", "processor_res", "pixel_perfect", "hr_option", "save_detected_map", "is_ui", "input_mode"),
    *("use_preview_as_input", "generated_image", "batch_images", "batch_image_dir", "batch_mask_dir", "output_dir"),
    *("batch_input_gallery", "batch_mask_gallery", "batch_modifiers", "animatediff_batch", "multi_inputs_gallery"),
    *("loopback", "inpaint_crop_input_image", "pulid_mode"),
)
MAX_CHARACTERS = 1000  # of a unit's text
COMMAS = re.compile(r", (?![^()]*\))")  # outside of parentheses
STARTS = re.compile(r"\(([\d.]+), ([\d.]+)\)", re.ASCII)


def read_units(scripts: Any, limits: Limits, *, image: Any, warnings: list[str], unknown: list[str]) -> dict[str, Any]:
    """Return the field `control` for the enabled units of a request, empty without any; add warnings, unknown keys.

    Args:
        scripts: the field `alwayson_scripts`.
        image: the Upload to start from, for units without an image; None if there is none.

    Raises:
        RequestError: names the unit and its key, what is accepted and what was given.
    """
    units: list[Any] = []
    others = scripts
    if isinstance(scripts, Mapping):
        own = [each for name, each in scripts.items() if name.lower() == SCRIPT]
        others = {name: each for name, each in scripts.items() if name.lower() != SCRIPT}
        units = [unit for each in own for unit in _list_units(each)]
    if others:
        warnings.append(f"alwayson_scripts has no effect here, and {shorten(others)} is ignored")
    opened = {f"{UNITS}[{index}]": each for index, each in enumerate(units)}
    used = {place: unit for place, each in opened.items() if (unit := _open_unit(place, each, warnings))}
    if len(used) > limits.config.max_controls:
        raise RequestError(
            f"{UNITS} takes at most {limits.config.max_controls} enabled units, not {len(used)}", param=UNITS
        )
    for place, unit in used.items():
        known = {f"{place}.{name}" for name in (*READ, *SILENT, *NO_EQUIVALENT)}
        unknown += [name for name in unit if name not in known]
    controls = [_read_unit(place, unit, limits, image, warnings) for place, unit in used.items()]
    return {"control": controls} if controls else {}


def _list_units(script: Any) -> list[Any]:
    units = script.get("args") or [] if isinstance(script, Mapping) else script
    units = [units] if isinstance(units, Mapping) else units
    if not isinstance(units, list):
        raise RequestError(f"{UNITS} takes a list of units, not {shorten(units)}", param=UNITS)
    return units


def _open_unit(place: str, given: Any, warnings: list[str]) -> dict[str, Any] | None:
    """Return the values of a unit, each under its whole name; None for a unit without an effect."""
    if not isinstance(given, Mapping):
        raise RequestError(f"{place} takes an object with image and model, not {shorten(given)}", param=UNITS)
    for key in ("image", "input_image"):  # may be an object of image and mask
        given = {**given, key: None, **nested} if isinstance(nested := given.get(key), Mapping) else given
    unit = {f"{place}.{name}": value for name, value in given.items() if value not in (None, "")}
    if not read_as(unit, f"{place}.enabled", switch(), True):
        return None
    if normalize_model_name(given.get("model") or NONE) != NONE:
        return unit
    if str(module := given.get("module") or NONE).lower() != NONE:
        warnings.append(f"{place} has no model, and its module {shorten(module)} is ignored")
    return None


def _read_unit(place: str, unit: Mapping[str, Any], limits: Limits, image: Any, warnings: list[str]) -> dict[str, Any]:
    """Return the control of an enabled unit."""
    name = _find_control(f"{place}.model", unit[f"{place}.model"], limits.controls)
    control, own = limits.controls[name], _read_image(place, unit, limits)
    if own is None and image is None:
        raise RequestError(f"{place}.image is missing: send the image of the control", param=f"{place}.image")
    _read_word(f"{place}.control_mode", unit, {BALANCED: None})
    resize_mode = _read_word(f"{place}.resize_mode", unit, RESIZE_MODES, OLDER_RESIZE_MODES)
    warnings += warn_of_effects(unit, {f"{place}.{key}": accepted for key, accepted in NO_EQUIVALENT.items()})
    read = {
        **{"name": name, "image": image if own is None else own, **_read_numbers(place, unit)},
        **{"resize_mode": None if own is None else resize_mode, **_read_module(place, unit, control)},
        "mode": _read_word(f"{place}.union_control_type", unit, UNION_TYPES) if control.modes else None,
    }
    return {key: value for key, value in read.items() if value is not None}


def _find_control(place: str, model: Any, controls: Mapping[str, RegisteredControl]) -> str:
    """Return the name of the registered control that a unit names, as `name` or `name [digest]`."""
    names = {each.casefold(): each for each in controls}
    if found := names.get(normalize_model_name(model)):
        return found
    accepted = f"one of {', '.join(controls)}" if controls else "None, since this server has no controls"
    raise RequestError(f"{place} takes {accepted}, not {shorten(model)}", param=place)


def _read_image(place: str, unit: Mapping[str, Any], limits: Limits) -> Any:
    """Return the Upload of a unit's image; None if it has none."""
    key = next((key for key in (f"{place}.image", f"{place}.input_image") if key in unit), None)
    return None if key is None else read_upload(key, unit[key], max_side=limits.config.max_side)


def _read_numbers(place: str, unit: Mapping[str, Any]) -> dict[str, float]:
    """Return the scale of a control and its shares of the denoising, where a unit has them."""
    end = "guidance_end" if f"{place}.guidance_end" in unit else "guidance"  # the older name
    schemas = {"scale": ("weight", CONTROL_SCALE), "from": ("guidance_start", real(0, 1)), "to": (end, real(0, 1))}
    read = {own: read_as(unit, f"{place}.{name}", schema, None) for own, (name, schema) in schemas.items()}
    read = {own: value for own, value in read.items() if value is not None}
    if read.get("from", 0) >= read.get("to", 1):
        begin, end = f"{read.get('from', 0):g}", f"{read.get('to', 1):g}"
        message = f"{place}.guidance_end takes a share above guidance_start, {begin}, not {end}"
        raise RequestError(message, param=f"{place}.guidance_end")
    return read


def _read_word(place: str, unit: Mapping[str, Any], values: Mapping[str, Any], older: Mapping[str, Any] = {}) -> Any:
    """Return the value for one of A1111's words in any case, or for its number; None without a word."""
    if place not in unit:
        return None
    words = {word.casefold(): value for word, value in {**values, **older}.items()}
    words |= {str(number): value for number, value in enumerate(values.values())}
    word = str(unit[place]).casefold()
    if word not in words:
        raise RequestError(f"{place} takes {' or '.join(values)}, not {shorten(unit[place])}", param=place)
    return words[word]


def _read_module(place: str, unit: Mapping[str, Any], control: RegisteredControl) -> dict[str, Any]:
    """Return the keys of a control that preprocess its image."""
    module = str(unit.get(f"{place}.module", NONE))
    if module.lower() == NONE or not control.is_map and ENCODERS.search(module):
        return {}
    accepted = list_modules([control])
    if module.lower() != CANNY or CANNY not in accepted:
        needed = f"; {CANNY} needs the package {PACKAGE}" if module.lower() == CANNY and control.is_map else ""
        raise RequestError(
            f"{place}.module takes {' or '.join(accepted)}, not {shorten(module)}{needed}; send the finished map",
            param=f"{place}.module",
        )
    names = {f"{place}.{name}": default for name, default in zip(THRESHOLDS, DEFAULT_THRESHOLDS, strict=True)}
    read = [read_as(unit, name, real(-1, 255), -1) for name in names]
    low, high = sorted(default if value < 0 else value for value, default in zip(read, names.values(), strict=True))
    return {"preprocess": CANNY, LOW: low, HIGH: high}


def write_unit(control: Mapping[str, Any], *, digest: str | None, resize_mode: str) -> str:
    """Return A1111's text of a unit.

    Args:
        control: a control of an image's metadata.
        digest: SHA-256 of its file.
        resize_mode: of the request.
    """
    fields = {
        "Module": control.get("preprocess", NONE),
        "Model": write_model(control["name"], digest),
        "Weight": control["scale"],
        "Resize Mode": _find_word(RESIZE_MODES, control.get("resize_mode", resize_mode)),
        "Threshold A": control.get(LOW),
        "Threshold B": control.get(HIGH),
        "Guidance Start": control["from"],
        "Guidance End": control["to"],
        "Pixel Perfect": True,
        "Control Mode": BALANCED,
        "Union Control Type": _find_word(UNION_TYPES, control.get("mode")) if "mode" in control else None,
    }
    return ", ".join(f"{name}: {value}" for name, value in fields.items() if value is not None)


def _find_word(values: Mapping[str, Any], value: Any) -> str | None:
    return next((word for word, each in values.items() if each == value), None)


def read_unit(place: str, text: str, limits: Limits, *, resize_mode: str, warnings: list[str]) -> dict[str, Any]:
    """Return the control of a unit's text without its image, empty if this server lacks it; add warnings.

    Args:
        place: the name of the text.
        resize_mode: of the request.
    """
    pairs = (each.partition(":") for each in COMMAS.split(text[:MAX_CHARACTERS]))
    named = {key.strip().lower().replace(" ", "_"): value.strip() for key, _, value in pairs}
    if found := STARTS.fullmatch(named.get("starting/ending", "")):
        named |= {"guidance_start": found[1], "guidance_end": found[2]}
    named["module"] = named.get("module", named.get("preprocessor", NONE))
    unit = {f"{place}.{name}": value for name, value in named.items()}
    try:
        name = _find_control(f"{place}.model", named.get("model", NONE), limits.controls)
        control, read = limits.controls[name], {"name": name, **_read_numbers(place, unit)}
        how = _read_word(f"{place}.resize_mode", unit, RESIZE_MODES, OLDER_RESIZE_MODES)
        mode = _read_word(f"{place}.union_control_type", unit, UNION_TYPES) if control.modes else None
    except RequestError as error:
        warnings.append(f"a control is left out: {error}")
        return {}
    read |= {"resize_mode": how} if how not in (None, resize_mode) else {}
    read |= {"mode": mode} if mode else {}
    warnings.append(f"control: the metadata lacks the image of {name}; send it again")
    try:
        return read | _read_module(place, unit, control)
    except RequestError as error:
        warnings.append(str(error))
        return read


def write_model(name: str, digest: str | None) -> str:
    """Return a control's name with its short digest, if that is known."""
    return f"{name} [{digest[:8]}]" if digest else name


def list_modules(controls: Iterable[RegisteredControl]) -> list[str]:
    """Return the preprocessors for the images of some controls."""
    are_maps = {each.is_map for each in controls}
    return [NONE, *([CANNY] if True in are_maps and load_opencv() else []), *([ENCODER] if False in are_maps else [])]
