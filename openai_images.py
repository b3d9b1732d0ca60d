"""OpenAI's images API in terms of the request contract, whose own fields are taken beside OpenAI's.

The answer needs no translation: the contract's JSON has OpenAI's shape, and its stream OpenAI's events.
"""

import base64
import io
import json
import re
import time
from collections.abc import Mapping
from typing import Any

from generation_request import FORM_NAMES, Contract, GenerationRequest, RequestError, read_bytes, shorten

PATHS = ("v1/images/generations", "v1/images/edits")
RENAMED = {**FORM_NAMES, "image[]": "image"}
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


def parse_openai(values: Mapping[str, Any], *, path: str, content_type: str, contract: Contract) -> GenerationRequest:
    """Read a request of OpenAI's images API.

    Args:
        values: what TorchServe hands over: a JSON `body`, or the fields of a form.
        path: one of PATHS.

    Raises:
        RequestError: names the field, what is accepted and what was given.
    """
    given = contract.read_fields(values, content_type=content_type or "application/json")
    fields: dict[str, Any] = {"output_format": "png"}
    for name, value in given.items():
        if value is None or name in NAMES:
            continue
        if name in ACCEPTED:
            _check_accepted(name, value)
        elif name == "size":
            fields |= _read_size(value)
        elif name == "mask" and path.endswith("edits"):
            fields["mask_image"] = _read_mask(value)
        else:
            fields[RENAMED.get(name, name)] = max(value, 1) if name == "output_compression" and value == 0 else value
    if path.endswith("edits") and "image" not in fields:
        raise RequestError("image is missing; an edit starts from one", param="image")
    try:
        return contract.check(fields)
    except RequestError as error:
        native = str(error.param)
        theirs = {native: name for name, native in RENAMED.items() if name in given}
        if "size" in given:
            theirs |= {"width": "size", "height": "size"}
        name = theirs.get(native, native)
        message = str(error) if name == "size" else str(error).replace(native, name, 1)
        raise RequestError(message, param=name) from error


def list_models(name: str) -> dict[str, Any]:
    """Return the answer to OpenAI's list of models."""
    return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "user"}]}


def format_event(kind: str, data: Mapping[str, Any]) -> bytes:
    """Return a server-sent event."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode()


def format_picture(
    request: GenerationRequest, file: bytes, *, path: str, index: int, partial: int | None = None
) -> bytes:
    """Return OpenAI's event of a finished picture, or of preview number `partial`.

    Args:
        path: an edit's events have names of their own.
        index: the picture's place in the request.
    """
    name = "image_edit" if path.endswith("edits") else "image_generation"
    data = {
        "b64_json": base64.b64encode(file).decode(),
        "created_at": int(time.time()),
        "output_format": request.output_format,
        "size": f"{request.width}x{request.height}",
        "background": "opaque",
        "quality": "auto",
        "seed": request.seed + index,
        "index": index,
    }
    if partial is not None:
        return format_event(f"{name}.partial_image", {**data, "partial_image_index": partial})
    details = {"image_tokens": 0, "text_tokens": 0}  # nothing is counted here, and the official client asks for it
    usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0, "input_tokens_details": details}
    return format_event(f"{name}.completed", {**data, "usage": usage, "parameters": request.describe(index)})


def _check_accepted(name: str, value: Any) -> None:
    if value not in ACCEPTED[name]:
        options = ", ".join(json.dumps(option) for option in ACCEPTED[name])
        raise RequestError(f"{name} takes {options} here, not {shorten(value)}", param=name)


def _read_size(value: Any) -> dict[str, int]:
    if value == "auto":
        return {}
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", value) if isinstance(value, str) else None
    if found is None:
        raise RequestError(f"size takes auto or a size such as 1024x1024, not {shorten(value)}", param="size")
    return {"width": int(found[1]), "height": int(found[2])}


def _read_mask(value: Any) -> bytes:
    """Return the mask as the contract has it, white where it is transparent here."""
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(read_bytes("mask", value)), formats=["PNG", "WEBP"]) as mask:
            if mask.width * mask.height > 64_000_000 or "A" not in mask.getbands():
                raise ValueError("it has no alpha channel" if "A" not in mask.getbands() else "it is too large")
            painted = ImageOps.invert(mask.getchannel("A"))
    except RequestError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds
        raise RequestError(
            "mask takes a PNG or WebP that is transparent where the image is to be painted anew; this one cannot be "
            f"used: {shorten(str(error))}",
            param="mask",
        ) from error
    file = io.BytesIO()
    painted.save(file, "PNG")
    return file.getvalue()
