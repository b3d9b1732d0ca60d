"""The request contract: from fields, as a client wrote them, to a request that can be drawn."""

import copy
import difflib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdxl_server.errors import RequestError
from sdxl_server.request.declaration import Bounds
from sdxl_server.request.fields import DECLARATIONS, MAX_SEED, RANDOM_SEED, GenerationRequest
from sdxl_server.request.prompt_weights import check_weights
from sdxl_server.request.resizing import fit_images
from sdxl_server.request.uploads import MASK, make_white, read_upload
from sdxl_server.schemas import describe_schema, is_valid, shorten


@dataclass(frozen=True)
class Contract:
    """What this server accepts.

    Attributes:
        properties: each field's JSON Schema (draft 2020-12), with its default and description.
        bounds: what they were made from, and what bounds several fields together.
        count_calls: the UNet's calls for one picture of a request; raises RequestError where the scheduler can make
            no picture of it.
        half: what a call of the UNet with half of the guidance costs, in whole ones.
        batch: the rows that the UNet is given for a request that says no more: 2 with guidance.
        needs: the fields that a request must have beside the prompt, those of an inpainting model.
    """

    properties: Mapping[str, dict[str, Any]]
    bounds: Bounds
    count_calls: Callable[[GenerationRequest], float]
    half: float = 0.5
    batch: int = 2
    needs: Sequence[str] = ()

    @property
    def size(self) -> tuple[int, int]:
        """The width and height of requests that name none, in pixels."""
        return self.properties["width"]["default"], self.properties["height"]["default"]

    def check(self, fields: Mapping[str, Any]) -> GenerationRequest:
        """Return the request with these fields; a field that is null counts as left out.

        Raises:
            RequestError: names the field, what is accepted and what was given.
        """
        for name in fields:
            if name not in self.properties:
                near = difflib.get_close_matches(name[:100], self.properties, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise RequestError(
                    f"{shorten(name)} is not a field; {hint}the fields are {', '.join(self.properties)}", param=name
                )
        used = {name: schema["default"] for name, schema in self.properties.items() if "default" in schema}
        read = {name: self._check_field(name, value) for name, value in fields.items() if value is not None}
        for each in reversed(read.get("adapters") or ()):  # of several the first decides
            used |= self.bounds.adapters[each["name"]].defaults
        used |= read
        if "prompt" not in used:
            raise RequestError("prompt is missing; it takes a text", param="prompt")
        for name in self.needs:
            if name not in used:
                raise RequestError(
                    f"{name} is missing: this model is for inpainting, which paints an image anew where a mask says "
                    f"so, and takes {' and '.join(self.needs)}",
                    param=name,
                )
        if used.get("seed", RANDOM_SEED) == RANDOM_SEED:
            used["seed"] = secrets.randbelow(MAX_SEED + 1)
        if MASK in used and "image" not in used:
            raise RequestError(f"{MASK} needs an image beside it", param=MASK)
        if "image" in used:
            fit_images(used, fields, self.bounds)
            used.setdefault("strength", 1.0 if MASK in used else 0.8)
        request = GenerationRequest(**used)
        if self.bounds.weighted_prompts:
            check_weights(request)
        self._check_size(request)
        self._check_work(request)
        return request

    def check_sample(self, fields: Mapping[str, Any]) -> GenerationRequest:
        """Return the request with these fields, with white pictures for those that it must have.

        Raises:
            RequestError: see `check`.
        """
        return self.check({**fields, **dict.fromkeys(self.needs, make_white())})

    def _check_field(self, name: str, value: Any) -> Any:
        schema, declaration = self.properties[name], DECLARATIONS[name]
        if declaration.is_upload:
            return read_upload(name, value, max_side=self.bounds.max_side)
        if declaration.read is not None:
            try:
                return declaration.read(value, self.bounds)
            except ValueError as error:
                raise RequestError(f"{name} {error}", param=name) from error
        if not is_valid(value, schema):
            raise RequestError(f"{name} takes {describe_schema(schema)}, not {shorten(value)}", param=name)
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise RequestError(f"{name} takes Unicode text, not a lone surrogate such as \\ud800", param=name)
        if "integer" in schema["type"]:
            return int(value)
        if isinstance(value, list):
            return tuple(map(int if schema["items"]["type"] == "integer" else float, value))
        return value

    def _check_size(self, request: GenerationRequest) -> None:
        size, allowed = (request.width, request.height), self.bounds.allowed_sizes
        if allowed and size not in allowed:
            names = ", ".join(f"{width}x{height}" for width, height in allowed)
            raise RequestError(f"width and height take one of {names} here, not {size[0]}x{size[1]}", param="width")

    def _check_work(self, request: GenerationRequest) -> None:
        calls = self.count_calls(request) * request.num_images_per_prompt
        work = calls * request.width * request.height / 1e6
        if work > self.bounds.max_megapixel_steps:
            raise RequestError(
                f"pictures times steps times megapixels may be {self.bounds.max_megapixel_steps:g} at most, not "
                f"{calls:g} steps of {request.width}x{request.height} = {work:.4g} (a step is a call of the UNet, of "
                "which some schedulers make two for one); ask for fewer or smaller pictures or for fewer steps",
                param="num_inference_steps",
            )

    def build_schema(self, *, is_form: bool = False) -> dict[str, Any]:
        """Return the JSON Schema of a request's JSON body, or of a form, in which pictures are files."""
        properties = copy.deepcopy(dict(self.properties))
        for name, schema in properties.items():
            schema.pop("x-accepted", None)
            if is_form and DECLARATIONS[name].is_upload:
                properties[name] = {
                    "type": "string",
                    "format": "binary",
                    "description": DECLARATIONS[name].words,
                }
        return {
            "type": "object",
            "additionalProperties": False,
            "required": ["prompt", *self.needs],
            "properties": properties,
            "dependentRequired": {MASK: ["image"]},
        }
