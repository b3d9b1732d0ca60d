"""The request contract: checks the fields of a client and returns a request."""

import copy
import dataclasses
import difflib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from sdxl_server.errors import RequestError
from sdxl_server.request.adapters import take_tags
from sdxl_server.request.fields import DECLARATIONS, MAX_SEED, RANDOM_SEED, SCHEDULE_FIELDS, GenerationRequest
from sdxl_server.request.limits import Limits
from sdxl_server.request.prompt_weights import check_weights
from sdxl_server.request.resizing import resize_controls, resize_images
from sdxl_server.request.sampler_names import SAMPLER_NAME, join_sampler_name
from sdxl_server.request.uploads import MASK, build_white_image, read_upload
from sdxl_server.request.upscaling import FIELDS_WITHOUT_PROMPT
from sdxl_server.schemas import read_value, shorten

# The fields that decide the work on a request.
WORK_FIELDS = ("num_inference_steps", *SCHEDULE_FIELDS, "num_images_per_prompt", "width", "height", "hires", "upscale")


@dataclass(frozen=True)
class Contract:
    """The requests that this server accepts.

    Attributes:
        properties: the JSON Schema of each field (draft 2020-12), with its default and description.
        limits: the limits in these schemas, and those on several fields together.
        count_calls: returns the UNet calls for one image of a request. Raises RequestError if the scheduler cannot
            make these steps.
        half: cost of a UNet call without guidance, as a share of one with guidance.
        batch: rows per UNet call of a request with default values: 2 with guidance.
        needs: the fields that a request must have next to the prompt, for an inpainting model.
    """

    properties: Mapping[str, dict[str, Any]]
    limits: Limits
    count_calls: Callable[[GenerationRequest], float]
    half: float = 0.5
    batch: int = 2
    needs: Sequence[str] = ()

    @property
    def size(self) -> tuple[int, int]:
        """The default width and height, in pixels."""
        return self.properties["width"]["default"], self.properties["height"]["default"]

    def check(self, fields: Mapping[str, Any], *, names: Mapping[str, str] | None = None) -> GenerationRequest:
        """Return the request with these fields; null means the default.

        Args:
            names: by field, its name in the client's API, for errors. Others have their own name.

        Raises:
            RequestError: names the field, what is accepted and what was given.
        """
        named = {name: name for name in self.properties} | dict(names or {})
        named |= {} if fields.get(SAMPLER_NAME) is None else {"scheduler": SAMPLER_NAME}
        read = self._read_fields(fields, named)
        used = {name: schema["default"] for name, schema in self.properties.items() if "default" in schema}
        for each in reversed(read.get("adapters") or ()):  # the first adapter overrules the others
            used |= self.limits.adapters[each["name"]].defaults
        used |= read
        if "prompt" not in used and {"image", "upscale"} <= read.keys():
            return self._check_upscaling(read, named)
        if "prompt" not in used:
            raise RequestError("prompt is missing; send a text", param="prompt")
        for name in self.needs:
            if name not in used:
                needs = " and ".join(named[each] for each in self.needs)
                raise RequestError(
                    f"{named[name]} is missing: this is an inpainting model; send {needs}", param=named[name]
                )
        if used.get("seed", RANDOM_SEED) == RANDOM_SEED:
            used["seed"] = secrets.randbelow(MAX_SEED + 1)
        if MASK in used and "image" not in used:
            raise RequestError(f"{named[MASK]} needs an image; send image too", param=named[MASK])
        if "image" in used:
            resize_images(used, read, self.limits, named)
            used.setdefault("strength", 1.0 if MASK in used else 0.8)
        if used.get("control"):
            resize_controls(used, read, self.limits)
        request = GenerationRequest(**used)
        if self.limits.config.weighted_prompts:
            check_weights(request)
        self._check_size(request, named)
        self._check_hires(request, named)
        self._check_upscaled_size(request.drawn_size, request.upscale, named["upscale"])
        self._check_work(request, list(dict.fromkeys(named[name] for name in WORK_FIELDS if name in read)))
        return request

    def apply_tags(self) -> Self:
        """Return a contract that applies adapters' tags in prompts, as `lora_tags` does."""
        config = dataclasses.replace(self.limits.config, lora_tags=True)
        return dataclasses.replace(self, limits=dataclasses.replace(self.limits, config=config))

    def check_sample(self, fields: Mapping[str, Any]) -> GenerationRequest:
        """Return the request with these fields, and with white images where it must have images.

        Raises:
            RequestError: see `check`.
        """
        return self.check({**fields, **dict.fromkeys(self.needs, build_white_image())})

    def _read_fields(self, fields: Mapping[str, Any], named: Mapping[str, str]) -> dict[str, Any]:
        """Return the fields that a client has sent, each checked, without those that are null."""
        config = self.limits.config
        fields, tagged = take_tags(join_sampler_name(fields), self.limits.adapters, config)
        if config.empty_negative_prompt == "zeros":
            fields = {name: each for name, each in fields.items() if not (name.startswith("negative") and each == "")}
        for name in fields:
            if name not in self.properties:
                near = difflib.get_close_matches(name[:100], self.properties, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise RequestError(
                    f"{shorten(name)} is not a field; {hint}the fields are {', '.join(self.properties)}", param=name
                )
        given = {name: value for name, value in fields.items() if value is not None}
        side = config.max_side if "prompt" in given else config.max_upscaled_side
        read = {name: self._check_field(name, value, named, max_side=side) for name, value in given.items()}
        if tagged:
            named_ones = list(read.get("adapters") or ())
            together = [*named_ones, *(each for each in tagged if each not in named_ones)]
            read["adapters"] = self._check_field("adapters", together, named)
        return read

    def _check_field(self, name: str, value: Any, named: Mapping[str, str], *, max_side: int = 0) -> Any:
        schema, declaration = self.properties[name], DECLARATIONS[name]
        if declaration.is_upload:
            return value if isinstance(value, tuple) else read_upload(named[name], value, max_side=max_side)
        try:
            read = read_value(value, schema) if declaration.read is None else declaration.read(value, self.limits)
        except RequestError as error:  # of a part of the value; its message names that
            raise RequestError(str(error), param=named[name]) from error
        except ValueError as error:
            raise RequestError(f"{named[name]} {error}", param=named[name]) from error
        if isinstance(read, list):
            return tuple(map(int if schema["items"]["type"] == "integer" else float, read))
        return read

    def _check_upscaling(self, read: Mapping[str, Any], named: Mapping[str, str]) -> GenerationRequest:
        """Return the request that enlarges images and draws nothing.

        Args:
            read: its checked fields; `image` is an Upload, or several in a tuple.
        """
        for name in read:
            if name not in FIELDS_WITHOUT_PROMPT:
                message = f"{named[name]} has no effect without a prompt; leave it out, or send prompt"
                raise RequestError(message, param=named[name])
        defaults = {name: self.properties[name].get("default") for name in FIELDS_WITHOUT_PROMPT}
        uploads = read["image"] if isinstance(read["image"], tuple) else (read["image"],)
        images = tuple(each.pixels for each in uploads)
        for each in images:
            self._check_upscaled_size(each.size, read["upscale"], named["image"])
        width, height = images[0].size
        used = {**defaults, **read, "image": images, "num_images_per_prompt": len(images)}
        request = GenerationRequest(prompt="", width=width, height=height, seed=0, **used)
        self._check_work(request, [named["image"]])
        return request

    def _check_hires(self, request: GenerationRequest, named: Mapping[str, str]) -> None:
        if request.hires is None:
            return
        param, most = named["hires"], self.limits.config.max_side
        if request.image is not None:
            raise RequestError(f"{param} is for images from a prompt alone; leave out {named['image']}", param=param)
        _, second = request.list_passes()
        if max(second.width, second.height) > most:
            raise RequestError(
                f"{param}: the second pass has sides of at most {most} pixels, not {second.width}x{second.height}; "
                "reduce its scale, and use upscale for more",
                param=param,
            )
        try:
            self._check_size(second, named)
            self.count_calls(second)
        except RequestError as error:
            raise RequestError(f"{param}: the second pass: {error}", param=param) from error

    def _check_upscaled_size(self, size: tuple[int, int], factor: int | None, param: str) -> None:
        most = self.limits.config.max_upscaled_side
        if factor is not None and factor * max(size) > most:
            raise RequestError(
                f"an upscaled image has sides of at most {most} pixels, not {size[0]}x{size[1]} times {factor}; send a "
                "smaller image or factor",
                param=param,
            )

    def _check_size(self, request: GenerationRequest, named: Mapping[str, str]) -> None:
        size, allowed = (request.width, request.height), self.limits.allowed_sizes
        if allowed and size not in allowed:
            names = ", ".join(f"{width}x{height}" for width, height in allowed)
            fields = list(dict.fromkeys((named["width"], named["height"])))
            verb = "take" if fields[1:] else "takes"
            message = f"{' and '.join(fields)} {verb} one of {names} here, not {size[0]}x{size[1]}"
            raise RequestError(message, param=fields[0])

    def _check_work(self, request: GenerationRequest, given: Sequence[str]) -> None:
        count, most = request.num_images_per_prompt, self.limits.config.max_megapixel_steps
        work, parts = 0.0, []
        for each in request.list_passes():
            calls = self.count_calls(each) * count
            work += calls * each.megapixels
            parts.append(f"{calls:g} UNet calls of {each.width}x{each.height}")
        if upscaling := sum(self.measure_upscaling(request, index) for index in range(count)):
            work += upscaling
            parts.append(f"an upscaling that counts {upscaling:.4g}")
        if work > most:
            raise RequestError(
                f"images x UNet calls x megapixels may be {most:g} at most, not {' and '.join(parts)} = {work:.4g}; "
                f"reduce {' or '.join(given) or WORK_FIELDS[0]}",
                param=next(iter(given), WORK_FIELDS[0]),
            )

    def measure_upscaling(self, request: GenerationRequest, index: int) -> float:
        """Return the work of enlarging image `index` of a request, in UNet calls x megapixels."""
        if self.limits.upscaler is None:
            return 0.0
        return sum(self.limits.upscaler.measure(*each) for each in request.list_enlargements(index))

    def build_schema(self, *, is_form: bool = False) -> dict[str, Any]:
        """Return the JSON Schema of a JSON body, or of a form, where images are files."""
        properties = copy.deepcopy(dict(self.properties))
        for name, schema in properties.items():
            schema.pop("x-accepted", None)
            if is_form and DECLARATIONS[name].is_upload:
                properties[name] = {
                    "type": "string",
                    "format": "binary",
                    "description": DECLARATIONS[name].words,
                }
        drawn = {"required": ["prompt", *self.needs]}
        enlarged = {"required": ["image", "upscale"]}
        return {
            "type": "object",
            "additionalProperties": False,
            **(drawn if self.limits.upscaler is None else {"anyOf": [drawn, enlarged]}),
            "properties": properties,
            "dependentRequired": {MASK: ["image"]},
        }
