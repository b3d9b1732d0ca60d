"""OpenAI's images API as a face: its requests in terms of the contract, whose own fields are taken beside them.

Most of the answer needs no translation: the contract's JSON has OpenAI's shape, and its stream OpenAI's events.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from sdxl_server.answers import NativeFace
from sdxl_server.bodies import read_fields, rename_fields
from sdxl_server.errors import RequestError
from sdxl_server.fields import GenerationRequest
from sdxl_server.masks import has_holes
from sdxl_server.request import Contract
from sdxl_server.schemas import shorten
from sdxl_server.uploads import MASK, read_upload

ALIASES = {
    "n": "num_images_per_prompt",
    "rng_seed": "seed",
    "output_compression": "quality",
    "image[]": "image",
    "mask": MASK,
}
# Fields without an equal here; these of their values ask for what is done anyway.
ACCEPTED = {
    "background": ("auto", "opaque"),
    "input_fidelity": ("high", "low"),
    "moderation": ("auto", "low"),
    "quality": ("auto", "low", "medium", "high", "standard", "hd"),
    "response_format": ("b64_json",),
    "style": ("vivid", "natural"),
}
NAMES = ("model", "user")  # any text


class OpenAIFace(NativeFace):
    """Reads OpenAI's requests for pictures; a step of its streams is a comment, which clients skip."""

    takes_json_only = True
    is_edit = False

    def read(self, values: Mapping[str, Any], *, content_type: str, contract: Contract) -> GenerationRequest:
        """Return the request in the parameters that TorchServe hands over.

        Raises:
            RequestError: names the field as OpenAI does, what is accepted and what was given.
        """
        given = read_fields(
            values, content_type=content_type or "application/json", properties=contract.properties, aliases=ALIASES
        )
        fields = {"output_format": "png", **self._translate(given)}
        if self.is_edit and "image" not in fields:
            raise RequestError("image is missing; an edit starts from one", param="image")
        try:
            if self.is_edit:
                fields["image"] = image = read_upload("image", fields["image"], max_side=contract.bounds.max_side)
                fields |= {MASK: image} if MASK not in fields and has_holes(image) else {}
            return contract.check(fields)
        except RequestError as error:
            native = error.param or "body"
            theirs = {own: name for name, own in ALIASES.items() if name in given}
            if "size" in given:
                theirs |= {"width": "size", "height": "size"}
            name = theirs.get(native, native)
            message = str(error) if name == "size" else str(error).replace(native, name, 1)
            raise RequestError(message, param=name) from error

    def _translate(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of the contract that these of OpenAI's stand for."""
        kept: dict[str, Any] = {}
        for name, value in given.items():
            is_native = name == "quality" and isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is None or name in NAMES:
                continue
            if name in ACCEPTED and not is_native:
                _check_accepted(name, value)
            elif name == "size":
                for side, pixels in _read_size(value).items():
                    if given.get(side) is not None:
                        raise RequestError(f"size and {side} are one field; give one of them", param="size")
                    kept[side] = pixels
            else:
                kept[name] = max(value, 1) if name == "output_compression" and value == 0 else value
        return rename_fields(kept, ALIASES)

    def write_step(self, *, done: int, total: int, seconds: float) -> bytes:
        """Return a comment, which keeps the connection alive."""
        return f": step {done} of {total}\n\n".encode()


class OpenAIEditFace(OpenAIFace):
    """Reads OpenAI's edits, which start from a picture; their events have names of their own."""

    event = "image_edit"
    is_edit = True


def list_models(name: str) -> bytes:
    """Return the answer to OpenAI's list of models."""
    model = {"id": name, "object": "model", "created": 0, "owned_by": "user"}
    return json.dumps({"object": "list", "data": [model]}).encode()


def _check_accepted(name: str, value: Any) -> None:
    if value not in ACCEPTED[name]:
        options = ", ".join(json.dumps(option) for option in ACCEPTED[name])
        options += ", or a whole number from 1 to 100" if name == "quality" else ""
        raise RequestError(f"{name} takes {options} here, not {shorten(value)}", param=name)


def _read_size(value: Any) -> dict[str, int]:
    if value == "auto":
        return {}
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", value) if isinstance(value, str) else None
    if found is None:
        raise RequestError(f"size takes auto or a size such as 1024x1024, not {shorten(value)}", param="size")
    return {"width": int(found[1]), "height": int(found[2])}
