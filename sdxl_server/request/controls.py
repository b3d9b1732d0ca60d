"""The controls that requests can name, and how requests name them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdxl_server.config.control_settings import CONTROL_SCALE
from sdxl_server.errors import RequestError
from sdxl_server.request.preprocessing import CANNY, DEFAULT_THRESHOLDS, PACKAGE, draw_edges, load_opencv
from sdxl_server.request.uploads import RESIZE_MODES, read_upload
from sdxl_server.schemas import Schema, choice, load_json, read_value, real, shorten

CONTROL_EXAMPLE = '[{"name": "edges", "image": "<base64>", "scale": 0.8, "from": 0, "to": 0.8}]'
NEEDED_KEYS = ("name", "image")
LOW, HIGH = "low_threshold", "high_threshold"
OF_OPENCV: Mapping[str, Schema] = {"preprocess": choice(CANNY), LOW: real(0, 255), HIGH: real(0, 255)}


@dataclass(frozen=True)
class RegisteredControl:
    """What a request can do with a registered control.

    Attributes:
        scale: the default.
        modes: of a union ControlNet.
        is_map: its image shows the result's places, and so gets its size.
    """

    scale: float
    modes: tuple[str, ...] = ()
    is_map: bool = True


@dataclass(frozen=True)
class RequestControl:
    """A control of a request.

    Attributes:
        image: an Upload, then a Pillow image; a map has the size of the result.
        begin, end: shares of the denoising, as in guidance_interval.
        mode: one of the control's; None for its first.
        resize_mode: how its image gets another aspect. None: as the request says.
        thresholds: of the edges that replace its image, low and high. None: the image is the finished map.
    """

    name: str
    image: Any
    scale: float
    begin: float = 0.0
    end: float = 1.0
    mode: str | None = None
    resize_mode: str | None = None
    thresholds: tuple[float, float] | None = None

    def describe(self) -> dict[str, Any]:
        """Return it as requests name it, without its image."""
        edges = {"preprocess": CANNY, **dict(zip((LOW, HIGH), self.thresholds, strict=True))} if self.thresholds else {}
        return {
            **{"name": self.name, "scale": self.scale, "from": self.begin, "to": self.end},
            **({"mode": self.mode} if self.mode else {}),
            **({"resize_mode": self.resize_mode} if self.resize_mode else {}),
            **edges,
        }

    def preprocess(self, image: Any) -> Any:
        """Return the map of an image in its final size."""
        return draw_edges(image, *self.thresholds) if self.thresholds else image


def build_control_schema(registered: Mapping[str, RegisteredControl], most: int) -> Schema:
    """Return the JSON Schema of a request's controls.

    Args:
        registered: the controls by name.
        most: the maximum number of controls.
    """
    if not registered:
        return {"type": "array", "maxItems": 0, "x-accepted": "an empty list: this server has no controls"}
    properties = {
        "name": choice(*registered),
        "image": {"type": "string", "contentEncoding": "base64"},
        "scale": CONTROL_SCALE,
        "from": real(0, 1),
        "to": real(0, 1),
        "resize_mode": choice(*RESIZE_MODES),
        **(OF_OPENCV if load_opencv() else {}),
    }
    if modes := dict.fromkeys(mode for each in registered.values() for mode in each.modes):
        properties["mode"] = choice(*modes)
    item = {
        "type": "object",
        "required": list(NEEDED_KEYS),
        "additionalProperties": False,
        "properties": properties,
    }
    accepted = f"a list of at most {most} such as {CONTROL_EXAMPLE}, of the controls {', '.join(registered)}"
    return {"type": "array", "items": item, "maxItems": most, "x-accepted": accepted}


def read_controls(
    value: Any, registered: Mapping[str, RegisteredControl], *, most: int, max_side: int
) -> tuple[RequestControl, ...] | None:
    """Return the controls of a request with their decoded images; None if there are none.

    Args:
        value: a list, or its JSON text from a form. A single control needs no list.
        registered, most: see `build_control_schema`.
        max_side: see `read_upload`.

    Raises:
        ValueError: what is accepted and what was given. The message continues the field's name.
        RequestError: names the entry and its key.
    """
    schema = build_control_schema(registered, most)
    refused = f"takes {schema['x-accepted']}, not "
    if isinstance(value, str):
        try:
            value = load_json(value)
        except ValueError as error:
            raise ValueError(refused + shorten(value)) from error
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, list):
        raise ValueError(refused + shorten(value))
    if len(value) > schema["maxItems"]:
        raise ValueError(f"{refused}{len(value)}")
    read = [_read_control(f"control[{index}]", each, schema, registered, max_side) for index, each in enumerate(value)]
    names = [each.name for each in read]
    if len(set(names)) < len(names):
        raise ValueError(f"takes each control once, not {', '.join(names)}")
    return tuple(read) or None


def _read_control(
    key: str, given: Any, schema: Schema, registered: Mapping[str, RegisteredControl], max_side: int
) -> RequestControl:
    if not isinstance(given, Mapping):
        raise ValueError(f"takes {schema['x-accepted']}, not {shorten(given)}")
    properties = schema["items"]["properties"]
    read: dict[str, Any] = {}
    for name, value in given.items():
        if name in OF_OPENCV.keys() - properties.keys():
            raise _refuse(key, name, f"needs the package {PACKAGE}, which this server lacks; send the finished map")
        if name not in properties:
            raise _refuse(key, shorten(name), f"is not a key; the keys are {', '.join(properties)}")
        if name != "image" and value is not None:
            try:
                read[name] = read_value(value, properties[name])
            except ValueError as error:
                raise _refuse(key, name, str(error)) from error
    for name in NEEDED_KEYS:
        if given.get(name) is None:
            raise _refuse(key, name, f"is missing; a control takes {CONTROL_EXAMPLE}")
    begin, end = read.get("from", 0.0), read.get("to", 1.0)
    if begin >= end:
        raise _refuse(key, "to", f"takes a share above from, {begin:g}, not {end:g}")
    control, mode = registered[read["name"]], read.get("mode")
    if mode not in (None, *control.modes):
        accepted = f"takes one of {', '.join(control.modes)}" if control.modes else "is for union ControlNets"
        raise _refuse(key, "mode", f"{accepted}, not {mode} for {read['name']}")
    thresholds = _read_thresholds(key, read, is_map=control.is_map)
    image = read_upload(f"{key}.image", given["image"], max_side=max_side)
    scale, resize_mode = read.get("scale", control.scale), read.get("resize_mode")
    return RequestControl(read["name"], image, scale, begin, end, mode, resize_mode, thresholds)


def _read_thresholds(key: str, read: Mapping[str, Any], *, is_map: bool) -> tuple[float, float] | None:
    """Return the thresholds of the edges to draw; None if the image is the finished map."""
    if "preprocess" not in read:
        for name in read.keys() & {LOW, HIGH}:
            raise _refuse(key, name, f"needs preprocess: {CANNY}")
        return None
    if not is_map:
        raise _refuse(key, "preprocess", f"is for controls that take a map, which {read['name']} does not")
    low, high = (read.get(name, default) for name, default in zip((LOW, HIGH), DEFAULT_THRESHOLDS, strict=True))
    if low > high:
        raise _refuse(key, LOW, f"takes a number up to {HIGH}, {high:g}, not {low:g}")
    return low, high


def _refuse(key: str, name: str, message: str) -> RequestError:
    return RequestError(f"{key}.{name} {message}")
