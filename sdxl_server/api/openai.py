"""OpenAI's images API as a face: its requests in terms of the contract, whose own fields are taken beside them.

Most of the answer needs no translation: the contract's JSON has OpenAI's shape, and its stream OpenAI's events.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sdxl_server.api.bodies import read_fields, rename_fields
from sdxl_server.api.native import EVENTS, NativeFace
from sdxl_server.api.warnings import warn_of_body
from sdxl_server.errors import RequestError
from sdxl_server.request.contract import Contract
from sdxl_server.request.fields import GenerationRequest
from sdxl_server.request.masks import has_holes
from sdxl_server.request.prompts import PROMPTS
from sdxl_server.request.uploads import MASK, read_upload
from sdxl_server.schemas import shorten

ALIASES = {
    "n": "num_images_per_prompt",
    "rng_seed": "seed",
    "output_compression": "quality",
    "image[]": "image",
    "mask": MASK,
}
# Fields without an equal here; these of their values ask for what is done anyway, others are ignored with a warning.
ACCEPTED = {
    "background": ("auto", "opaque"),
    "input_fidelity": ("high", "low"),
    "moderation": ("auto", "low"),
    "quality": ("auto", "low", "medium", "high", "standard", "hd"),
    "style": ("vivid", "natural"),
}
NAMES = ("model", "user")  # any text
ANSWERED_BY_URL = "dall-e"  # models of this name answer with a URL unless asked otherwise, and their clients read that
MAX_TOLD = 10  # names of fields in a warning


class OpenAIFace(NativeFace):
    """Reads OpenAI's requests for pictures; a step of its streams is a comment, which clients skip."""

    takes_json_only = True
    # LiteLLM's edits look at the status only and would take the missing `data` for no pictures; a time that is none
    # they refuse. All others stumble over `data`, or look for the error.
    beside_error: Mapping[str, Any] = {"created": "failed"}
    is_edit = False

    def read(
        self, values: Mapping[str, Any], *, content_type: str, contract: Contract
    ) -> tuple[GenerationRequest, list[str]]:
        """Return the request in the parameters that TorchServe hands over, and warnings of what was left out of it.

        Raises:
            RequestError: names the field as OpenAI does, what is accepted and what was given.
        """
        given = read_fields(
            values, content_type=content_type or "application/json", properties=contract.properties, aliases=ALIASES
        )
        warnings = warn_of_body(given)
        known = _drop_unknown(given, known=contract.properties, warnings=warnings)
        kept = _cut_prompts(known, most=contract.bounds.max_prompt_characters, warnings=warnings)
        defaults = {"output_format": "png", "response_format": _choose_response_format(kept.get("model"))}
        fields = {**defaults, **self._translate(kept)}
        if self.is_edit and "image" not in fields:
            raise RequestError("image is missing; an edit starts from one", param="image")
        try:
            if self.is_edit:
                fields["image"] = image = read_upload("image", fields["image"], max_side=contract.bounds.max_side)
                fields |= {MASK: image} if MASK not in fields and has_holes(image) else {}
            return contract.check(fields), warnings
        except RequestError as error:
            native = error.param or "body"
            theirs = {own: name for name, own in ALIASES.items() if name in kept}
            if "size" in kept:
                theirs |= {"width": "size", "height": "size"}
            name = theirs.get(native, native)
            message = str(error) if name == "size" else str(error).replace(native, name, 1)
            raise RequestError(message, param=name) from error

    def _translate(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of the contract that these of OpenAI's stand for."""
        kept: dict[str, Any] = {}
        for name, value in given.items():
            if value is None or name in NAMES or name in ACCEPTED and not _is_native(name, value):
                continue
            if name == "size":
                for side, pixels in _read_size(value).items():
                    if given.get(side) is not None:
                        raise RequestError(f"size and {side} are one field; give one of them", param="size")
                    kept[side] = pixels
            else:
                kept[name] = max(value, 1) if name == "output_compression" and value == 0 else value
        return rename_fields(kept, ALIASES)

    def write_place(self, place: int, *, kind: str) -> bytes:
        """Return a comment in the place of the native event, of a kind that OpenAI's clients do not know."""
        return f": {place} requests are before this one\n\n".encode() if kind == EVENTS else self.write_pause(kind=kind)

    def write_compiling(self, parts: Sequence[str]) -> bytes:
        """Return a comment in the place of the native event."""
        return f": {', '.join(parts)} compiled first\n\n".encode()

    def write_step(self, *, done: int, total: int, seconds: float, share: float) -> bytes:
        """Return a comment, which keeps the connection alive."""
        return f": step {done} of {total}\n\n".encode()


class OpenAIEditFace(OpenAIFace):
    """Reads OpenAI's edits, which start from a picture; their events have names of their own."""

    event = "image_edit"
    is_edit = True


def list_models(name: str) -> bytes:
    """Return the answer to OpenAI's list of models."""
    return json.dumps({"object": "list", "data": [describe_model(name)]}).encode()


def describe_model(name: str) -> dict[str, Any]:
    """Return what OpenAI's API says of a model."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "user"}


def _is_native(name: str, value: Any) -> bool:
    """Say whether a value is that of the contract's own field of this name: the quality as a number."""
    return name == "quality" and isinstance(value, (int, float)) and not isinstance(value, bool)


def _drop_unknown(given: Mapping[str, Any], *, known: Mapping[str, Any], warnings: list[str]) -> dict[str, Any]:
    """Return the fields that mean something here; add a warning of others, and of values without effect."""
    names = {*known, *ALIASES, *ACCEPTED, *NAMES, "size"}
    unknown = [name for name in given if name not in names]
    if unknown:
        more = f" and {len(unknown) - MAX_TOLD} more" if len(unknown) > MAX_TOLD else ""
        told = ", ".join(shorten(name) for name in unknown[:MAX_TOLD])
        warnings.append(f"ignored, since there is no such field: {told}{more}")
    for name, accepted in ACCEPTED.items():
        value = given.get(name)
        if value is not None and not _is_native(name, value) and value not in accepted:
            done = "; the picture is opaque" if name == "background" else ""
            warnings.append(f"{name} has no effect here with {shorten(value)}, but with {', '.join(accepted)}{done}")
    return {name: value for name, value in given.items() if name in names}


def _cut_prompts(given: Mapping[str, Any], *, most: int, warnings: list[str]) -> dict[str, Any]:
    """Return the fields with prompts of at most so many characters, of which the text encoder reads fewer anyway."""
    kept = dict(given)
    for name in PROMPTS:
        value = given.get(name)
        if isinstance(value, str) and len(value) > most:
            kept[name] = value.lstrip()[:most]
            warnings.append(f"{name} has {len(value)} characters; the first {most} are read")
    return kept


def _choose_response_format(model: Any) -> str:
    return "url" if isinstance(model, str) and model.startswith(ANSWERED_BY_URL) else "b64_json"


def _read_size(value: Any) -> dict[str, int]:
    if value in ("auto", ""):
        return {}
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", value) if isinstance(value, str) else None
    if found is None:
        raise RequestError(f"size takes auto or a size such as 1024x1024, not {shorten(value)}", param="size")
    return {"width": int(found[1]), "height": int(found[2])}
