"""OpenAI's images API: its fields are translated to the contract's fields, which are accepted too.

Responses need little translation: the native JSON and events have OpenAI's shape.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from sdxl_server.api.bodies import read_fields, rename_fields
from sdxl_server.api.native import EVENTS, NativeApi
from sdxl_server.api.warnings import (
    warn_of_body,
    warn_of_long_prompts,
    warn_of_tags,
    warn_of_unknown,
    warn_of_values,
)
from sdxl_server.errors import FlaggedError, RequestError
from sdxl_server.request.contract import Contract
from sdxl_server.request.fields import GenerationRequest
from sdxl_server.request.masks import has_holes
from sdxl_server.request.prompts import PROMPTS
from sdxl_server.request.sampler_names import SAMPLER_NAME
from sdxl_server.request.uploads import MASK, read_upload
from sdxl_server.schemas import describe_schema, is_valid, shorten

FIELD_ALIASES = {
    "n": "num_images_per_prompt",
    "rng_seed": "seed",
    "output_compression": "quality",
    "image[]": "image",
    "image[0]": "image",
    "mask": MASK,
}
# Fields without an equivalent here, with the values that have no effect anyway; other values get a warning.
NO_EQUIVALENT = {
    "background": ("auto", "opaque"),
    "input_fidelity": ("high", "low"),
    "moderation": ("auto", "low"),
    "quality": ("auto", "low", "medium", "high", "standard", "hd"),
    "style": ("vivid", "natural"),
}
IGNORED_TEXTS = ("model", "user")  # with any value
FLAGGED_CODE = "content_policy_violation"  # of an error
OPENAI_FIELDS = (*NO_EQUIVALENT, *IGNORED_TEXTS, "size", SAMPLER_NAME)
URL_MODELS = "dall-e"  # clients of models with this prefix read a URL by default


class OpenAIApi(NativeApi):
    """Reads OpenAI's generations. In streams a step is a comment, which clients skip."""

    takes_json_only = True
    # LiteLLM's edits read only the status, and would accept an error as an empty list of images. They refuse a wrong
    # time. Other clients fail without `data`, or read the error.
    error_extras: Mapping[str, Any] = {"created": "failed"}
    is_edit = False

    def read(
        self, values: Mapping[str, Any], *, content_type: str, contract: Contract
    ) -> tuple[GenerationRequest, list[str]]:
        """Return the request in TorchServe's parameters, and warnings.

        Raises:
            RequestError: names the field as OpenAI does, what is accepted and what was given.
        """
        given = read_fields(
            values,
            content_type=content_type or "application/json",
            properties=contract.properties,
            aliases=FIELD_ALIASES,
        )
        names, config = {*contract.properties, *FIELD_ALIASES, *OPENAI_FIELDS}, contract.limits.config
        most = config.max_prompt_characters
        known = {
            name: value
            for name, value in given.items()
            if name in names and value is not None and (value != "" or name in PROMPTS)
        }
        without_effect = {name: known[name] for name in NO_EQUIVALENT if name in known and not _is_native(name, known)}
        warnings = [
            *warn_of_body(given),
            *warn_of_tags(given, contract.limits),
            *warn_of_unknown([name for name in given if name not in names]),
            *warn_of_values(without_effect, accepted=NO_EQUIVALENT),
            *warn_of_long_prompts(known, most=most),
        ]
        kept = {
            name: value.lstrip()[:most] if name in PROMPTS and isinstance(value, str) and len(value) > most else value
            for name, value in known.items()
            if name not in without_effect
        }
        defaults = {"output_format": "png", "response_format": _choose_response_format(kept.get("model"))}
        fields = {**defaults, **_translate(kept, contract)}
        theirs = {MASK: "mask", "width": "size", "height": "size"} | {
            FIELD_ALIASES.get(each, each): each for each in kept
        }
        if self.is_edit:
            if "image" not in fields:
                raise RequestError("image is missing; an edit needs one", param="image")
            fields["image"] = image = read_upload(theirs["image"], fields["image"], max_side=config.max_side)
            fields |= {MASK: image} if MASK not in fields and has_holes(image) else {}
        return contract.check(fields, names=theirs), warnings

    def write_waiting(self, position: int, *, kind: str) -> bytes:
        """Return a comment instead of the native event, which OpenAI's clients do not know."""
        if position and kind == EVENTS:
            return f": {position} requests are before this one\n\n".encode()
        return super().write_waiting(0, kind=kind)

    def write_compiling(self, parts: Sequence[str]) -> bytes:
        """Return a comment instead of the native event."""
        return f": {', '.join(parts)} compiled first\n\n".encode()

    def write_step(self, *, done: int, total: int, seconds: float, share: float) -> bytes:
        """Return a comment, which keeps the connection alive."""
        return f": step {done} of {total}\n\n".encode()

    @classmethod
    def choose_code(cls, error: Exception, status: int) -> str | None:
        """Return the `code` of an error: a text or null, which OpenAI's clients expect."""
        return FLAGGED_CODE if isinstance(error, FlaggedError) else None


class OpenAIEditApi(OpenAIApi):
    """Reads OpenAI's edits, which start from an image. Their events have other names."""

    event = "image_edit"
    is_edit = True


def list_models(name: str) -> dict[str, Any]:
    """Return OpenAI's list of models."""
    return {"object": "list", "data": [describe_model(name)]}


def describe_model(name: str) -> dict[str, Any]:
    """Return a model as OpenAI's API describes it."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "user"}


def _translate(given: Mapping[str, Any], contract: Contract) -> dict[str, Any]:
    """Return the contract's fields for OpenAI's fields."""
    kept: dict[str, Any] = {}
    for name, value in given.items():
        if name in IGNORED_TEXTS:
            continue
        if name == "size":
            for side, pixels in _read_size(value, contract).items():
                if side in given:
                    raise RequestError(f"size and {side} are one field; give one of them", param="size")
                kept[side] = pixels
        else:
            kept[name] = 1 if name == "output_compression" and value == 0 and value is not False else value
    return rename_fields(kept, FIELD_ALIASES)


def _is_native(name: str, given: Mapping[str, Any]) -> bool:
    """Say whether a field is the contract's own: `quality` with a number."""
    return name == "quality" and isinstance(given[name], (int, float)) and not isinstance(given[name], bool)


def _choose_response_format(model: Any) -> str:
    return "url" if isinstance(model, str) and model.startswith(URL_MODELS) else "b64_json"


def _read_size(value: Any, contract: Contract) -> dict[str, int]:
    if value == "auto":
        return {}
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", value) if isinstance(value, str) else None
    if found is None:
        raise RequestError(f"size takes auto or a size such as 1024x1024, not {shorten(value)}", param="size")
    sides = {"width": int(found[1]), "height": int(found[2])}
    for side, pixels in sides.items():
        if not is_valid(pixels, schema := contract.properties[side]):
            raise RequestError(f"size: each side takes {describe_schema(schema)}, not {value}", param="size")
    return sides
