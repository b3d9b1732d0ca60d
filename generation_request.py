"""The request contract: one JSON Schema per field checks requests, fills in defaults and makes the OpenAPI document."""

import base64
import binascii
import copy
import difflib
import io
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

IMAGE_FIELDS = ("image", "mask_image")
FORM_NAMES = {"n": "num_images_per_prompt", "rng_seed": "seed", "output_compression": "quality"}  # OpenAI's numbers
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
SDXL_FIELDS = (
    *("prompt_2", "negative_prompt_2", "guidance_rescale", "denoising_end"),
    *("original_size", "crops_coords_top_left", "target_size"),
)
STREAM_FIELDS = ("stream", "partial_images")  # of the answer, not of the picture
MAX_SEED = 2**32 - 1
MIN_SIDE = 64


class RequestError(ValueError):
    """A request that cannot be answered with a picture; the client's fault.

    Attributes:
        param: the field at fault, or None for the body as a whole.
        status: of HTTP.
    """

    def __init__(self, message: str, *, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What bounds a request; the handler section of model-config.yaml sets it.

    Attributes:
        max_prompt_characters: of each of the four prompts.
        max_side: of a picture, in pixels.
        max_steps: denoising steps of a picture.
        max_images: pictures of one request.
        max_megapixel_steps: pictures x steps x megapixels of one request.
        max_timeout: seconds that one request may take.
        allowed_sizes: the only (width, height) to make, in pixels; empty: any.
    """

    max_prompt_characters: int = 2000
    max_side: int = 2048
    max_steps: int = 150
    max_images: int = 4
    max_megapixel_steps: float = 250
    max_timeout: float = 3600
    allowed_sizes: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class GenerationRequest:
    """The pictures to make, every field checked. Names and meanings are diffusers'; the contract describes them.

    Attributes:
        width, height: pixels.
        seed: of the first picture; each further one has the next number.
        timeout: seconds from when the worker takes the request.
        image, mask_image: Pillow images of the size above.
    """

    prompt: str
    width: int
    height: int
    seed: int
    num_inference_steps: int = 30
    guidance_scale: float = 5.0
    prompt_2: str | None = None
    negative_prompt: str | None = None
    negative_prompt_2: str | None = None
    guidance_rescale: float = 0.0
    num_images_per_prompt: int = 1
    scheduler: str | None = None
    clip_skip: int | None = None
    denoising_end: float | None = None
    original_size: tuple[int, int] | None = None
    crops_coords_top_left: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    image: Any = None
    mask_image: Any = None
    strength: float | None = None
    output_format: str = "jpeg"
    quality: int = 90
    timeout: float = 3600
    stream: bool = False
    partial_images: int = 0

    @property
    def total_steps(self) -> int:
        """The denoising steps of all pictures together."""
        share = 1.0 if self.strength is None else self.strength
        return int(self.num_inference_steps * share) * self.num_images_per_prompt

    def describe(self, index: int = 0) -> dict[str, Any]:
        """Return what was used for picture `index`, as fields of a request that makes it again, without the images."""
        left_out = (*IMAGE_FIELDS, *STREAM_FIELDS)
        used = {name: value for name, value in vars(self).items() if value is not None and name not in left_out}
        return {**used, "seed": self.seed + index, "num_images_per_prompt": 1}


@dataclass(frozen=True)
class Contract:
    """What this server accepts.

    Attributes:
        properties: each field's JSON Schema (draft 2020-12), with its default and description.
    """

    properties: Mapping[str, dict[str, Any]]
    limits: Limits

    @classmethod
    def build(
        cls,
        limits: Limits,
        *,
        defaults: Mapping[str, Any],
        schedulers: Sequence[str],
        max_clip_skip: int,
        is_xl: bool = True,
    ) -> Self:
        """Return the contract of a model.

        Args:
            defaults: of width, height, num_inference_steps, guidance_scale, quality and scheduler.
            schedulers: names of diffusers schedulers that fit the model.
            max_clip_skip: the layers of the smaller text encoder, less one.
        """
        properties = _build_properties(limits, schedulers=schedulers, max_clip_skip=max_clip_skip)
        for name, value in defaults.items():
            properties[name]["default"] = value
        if not is_xl:
            properties = {name: schema for name, schema in properties.items() if name not in SDXL_FIELDS}
        return cls(properties, limits)

    def parse(self, values: Mapping[str, Any], *, content_type: str = "") -> GenerationRequest:
        """Return the request in the parameters that TorchServe hands over.

        Raises:
            RequestError: names the field, what is accepted and what was given.
        """
        return self.check(self.read_fields(values, content_type=content_type))

    def read_fields(self, values: Mapping[str, Any], *, content_type: str = "") -> dict[str, Any]:
        """Return the fields in the parameters that TorchServe hands over: a `body`, or the fields of a form.

        A body is a JSON object, or the prompt itself as text; without a content type it is JSON when it starts with a
        brace.

        Raises:
            RequestError: the body is none of these.
        """
        given = {name: value for name, value in values.items() if name not in ("body", "data")}
        fields = {name: self._read_text(name, value) for name, value in given.items()}
        body = values.get("body", values.get("data"))
        if isinstance(body, (bytes, bytearray)) and (body or not fields):
            for name, value in _read_body(bytes(body), content_type).items():
                if name in fields:
                    raise RequestError(f"{shorten(name)} is given twice, in the body and beside it", param=name)
                fields[name] = value
        elif not fields:
            raise RequestError("the request has no body; it takes the prompt as text or as JSON", param="prompt")
        return fields

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
        used |= {name: self._check_field(name, value) for name, value in fields.items() if value is not None}
        if "prompt" not in used:
            raise RequestError("prompt is missing; it takes a text", param="prompt")
        used.setdefault("seed", secrets.randbelow(MAX_SEED + 1))
        if "image" in used:
            _fit_images(used, fields, self.limits)
            used.setdefault("strength", 0.8 if "mask_image" not in used else 1.0)
        request = GenerationRequest(**used)
        self._check_together(request)
        return request

    def _read_text(self, name: str, value: Any) -> Any:
        """Return a form's field in the type that its schema asks for, as far as it can be read so."""
        if name in (*IMAGE_FIELDS, "image[]", "mask") or not isinstance(value, (bytes, bytearray)):
            return value
        text = _decode(bytes(value), f"the field {shorten(name)}")
        kinds = self.properties.get(FORM_NAMES.get(name, name), {}).get("type", ["string"])
        if "string" in kinds:
            return text
        try:
            return load_json(text)
        except ValueError:
            return text

    def _check_field(self, name: str, value: Any) -> Any:
        from jsonschema import Draft202012Validator

        schema = self.properties[name]
        if name in IMAGE_FIELDS:
            return _read_image(name, value, max_side=self.limits.max_side)
        if not Draft202012Validator(schema).is_valid(value):
            raise RequestError(f"{name} takes {describe_schema(schema)}, not {shorten(value)}", param=name)
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise RequestError(f"{name} takes Unicode text, not a lone surrogate such as \\ud800", param=name)
        if "integer" in schema["type"]:
            return int(value)
        return tuple(map(int, value)) if isinstance(value, list) else value

    def _check_together(self, request: GenerationRequest) -> None:
        """Refuse fields that are right each by itself.

        Raises:
            RequestError: as above.
        """
        for name in ("mask_image", "strength"):
            if getattr(request, name) is not None and request.image is None:
                raise RequestError(f"{name} needs an image beside it", param=name)
        size, allowed = (request.width, request.height), self.limits.allowed_sizes
        if allowed and size not in allowed:
            names = ", ".join(f"{width}x{height}" for width, height in allowed)
            raise RequestError(f"width and height take one of {names} here, not {size[0]}x{size[1]}", param="width")
        if request.total_steps < 1:
            raise RequestError(
                f"strength times num_inference_steps must be 1 or more, not {request.strength} times "
                f"{request.num_inference_steps}",
                param="strength",
            )
        work = request.total_steps * request.width * request.height / 1e6
        if work > self.limits.max_megapixel_steps:
            raise RequestError(
                f"pictures times steps times megapixels may be {self.limits.max_megapixel_steps:g} at most, not "
                f"{request.total_steps} steps of {request.width}x{request.height} = {work:.0f}; ask for fewer or "
                "smaller pictures or for fewer steps",
                param="num_inference_steps",
            )

    def build_schema(self) -> dict[str, Any]:
        """Return the JSON Schema of a request's JSON body."""
        properties = copy.deepcopy(dict(self.properties))
        return {
            "type": "object",
            "additionalProperties": False,
            "required": ["prompt"],
            "properties": properties,
            "dependentRequired": {"mask_image": ["image"], "strength": ["image"]},
        }


def _build_properties(limits: Limits, *, schedulers: Sequence[str], max_clip_skip: int) -> dict[str, dict[str, Any]]:
    text = {
        "type": ["string", "null"],
        "maxLength": limits.max_prompt_characters,
        "pattern": "^[^\\u0000]*$",
    }
    side = _whole(MIN_SIDE, limits.max_side) | {"multipleOf": 8}
    pair = {
        "type": ["array", "null"],
        "items": {"type": "integer", "minimum": 0, "maximum": 65536},
        "minItems": 2,
        "maxItems": 2,
    }
    image = {"type": ["string", "null"], "contentEncoding": "base64"}
    with_description = {
        "prompt": (
            {**text, "type": "string", "minLength": 1, "pattern": "^[^\\u0000]*[^\\u0000\\s][^\\u0000]*$"},
            "what the picture shows",
        ),
        "prompt_2": (text, "for the second text encoder; without it, `prompt`"),
        "negative_prompt": (text, "what the picture should not show; without effect at a guidance of 1 or below"),
        "negative_prompt_2": (text, "for the second text encoder; without it, `negative_prompt`"),
        "width": (side, "pixels; with an image, its own unless given"),
        "height": (side, "pixels; with an image, its own unless given"),
        "num_inference_steps": (_whole(1, limits.max_steps), "denoising steps"),
        "guidance_scale": (_real(0, 100), "how strongly the prompt steers; at 1 or below not at all"),
        "guidance_rescale": ({**_real(0, 1), "default": 0.0}, "against overexposed pictures under strong guidance"),
        "seed": (_whole(0, MAX_SEED), "of the first picture, each further one has the next; random unless given"),
        "num_images_per_prompt": ({**_whole(1, limits.max_images), "default": 1}, "pictures, made one by one"),
        "scheduler": ({"type": ["string", "null"], "enum": [*schedulers, None]}, "the sampler, by diffusers' name"),
        "clip_skip": (_whole(0, max_clip_skip), "last layers of the text encoders to leave out"),
        "denoising_end": ({**_real(0, 1), "exclusiveMinimum": 0}, "share of the denoising after which to stop"),
        "original_size": (pair, "height and width that the picture passes for; small ones look blurred"),
        "crops_coords_top_left": (pair, "top and left of the crop that the picture passes for"),
        "target_size": (pair, "height and width that the picture is made for"),
        "image": (image, "base64 of a JPEG, PNG or WebP to start from (image-to-image)"),
        "mask_image": (image, "base64 of a picture that is white where `image` is to be painted anew (inpainting)"),
        "strength": (_real(0, 1), "how far to go from `image`; 0.8 unless given, with a mask 1"),
        "output_format": (
            {"type": ["string", "null"], "enum": ["jpeg", "png", "webp", None], "default": "jpeg"},
            "of the answer",
        ),
        "quality": (_whole(1, 100), "of a JPEG or WebP"),
        "timeout": (
            {**_real(1, limits.max_timeout), "default": limits.max_timeout},
            "seconds that the worker may spend on the request",
        ),
        "stream": (
            {"type": ["boolean", "null"], "default": False},
            "answer with server-sent events: one for each step, the previews, each picture",
        ),
        "partial_images": ({**_whole(0, 3), "default": 0}, "previews of each picture in a stream"),
    }
    return {name: {**schema, "description": words} for name, (schema, words) in with_description.items()}


def _whole(minimum: int, maximum: int) -> dict[str, Any]:
    return {"type": ["integer", "null"], "minimum": minimum, "maximum": maximum}


def _real(minimum: float, maximum: float) -> dict[str, Any]:
    return {"type": ["number", "null"], "minimum": minimum, "maximum": maximum}


def describe_schema(schema: Mapping[str, Any]) -> str:
    """Say in words what a field's schema accepts, null aside."""
    if "enum" in schema:
        return "one of " + ", ".join(str(value) for value in schema["enum"] if value is not None)
    if "boolean" in schema["type"]:
        return "true or false"
    if "array" in schema["type"]:
        return f"two whole numbers from {schema['items']['minimum']} to {schema['items']['maximum']}"
    if schema.get("contentEncoding") == "base64":
        return "a picture (JPEG, PNG, WebP) in base64"
    if "string" in schema["type"]:
        least = "that says something, " if schema.get("minLength") else ""
        return f"a text {least}of at most {schema['maxLength']} characters, without NUL"
    kind = "a whole number" if "integer" in schema["type"] else "a number"
    low = f"above {schema['exclusiveMinimum']}" if "exclusiveMinimum" in schema else f"from {schema['minimum']}"
    multiple = f" that is a multiple of {schema['multipleOf']}" if "multipleOf" in schema else ""
    return f"{kind} {low} to {schema['maximum']}{multiple}"


def _read_body(body: bytes, content_type: str) -> dict[str, Any]:
    text = _decode(body, "the body")
    if "json" not in content_type and (content_type or not text.lstrip().startswith("{")):
        return {"prompt": text}
    try:
        fields = load_json(text)
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RequestError(f'the body is JSON but no object such as {{"prompt": "a red fox"}}: it is {shorten(text)}')
    return fields


def _decode(raw: bytes, what: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"{what} is not UTF-8: byte {error.start} is {raw[error.start]:#04x}") from error


def load_json(text: str) -> Any:
    """Return the JSON value of a text.

    Raises:
        ValueError: it is none; NaN and Infinity are none.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a number of JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_bytes(name: str, value: Any) -> bytes:
    """Return the file in a field: bytes from a form, base64 from JSON, which may be a data URL.

    Raises:
        RequestError: it is neither.
    """
    if isinstance(value, str):
        try:
            return base64.b64decode(value.partition(",")[2] if value.startswith("data:") else value, validate=True)
        except (binascii.Error, ValueError) as error:
            raise RequestError(f"{name} takes base64, not {shorten(value)}: {error}", param=name) from error
    if not isinstance(value, (bytes, bytearray)):
        raise RequestError(f"{name} takes a picture in base64, not {shorten(value)}", param=name)
    return bytes(value)


def _read_image(name: str, value: Any, *, max_side: int) -> Any:
    """Return the Pillow image in a field, upright, in RGB, a mask in grey; its size is checked before its pixels."""
    from PIL import Image, ImageOps

    raw = read_bytes(name, value)
    try:
        image = Image.open(io.BytesIO(raw), formats=IMAGE_FORMATS)
        if max(image.size) <= 2 * max_side and min(image.size) >= 8:
            return ImageOps.exif_transpose(image).convert("L" if name == "mask_image" else "RGB")
    except Exception as error:  # Pillow's decoders raise many kinds
        raise RequestError(
            f"{name} takes a whole JPEG, PNG or WebP picture; this one cannot be read: {shorten(str(error))}",
            param=name,
        ) from error
    width, height = image.size
    raise RequestError(f"{name} takes sides of 8 to {2 * max_side} pixels, not {width}x{height}", param=name)


def _fit_images(used: dict[str, Any], given: Mapping[str, Any], limits: Limits) -> None:
    """Bring the image and its mask to the picture's size, which is the image's own, in eights, unless one is given."""
    from PIL import Image

    for name, own in zip(("width", "height"), used["image"].size, strict=True):
        if given.get(name) is None:
            used[name] = min(max(own // 8 * 8, MIN_SIDE), limits.max_side)
    size = (used["width"], used["height"])
    for name in IMAGE_FIELDS:
        if name in used and used[name].size != size:
            used[name] = used[name].resize(size, Image.Resampling.LANCZOS)


def shorten(value: Any, *, length: int = 60) -> str:
    """Return the value in plain ASCII and at most so many characters, fit for a message or a log line."""
    text = ascii(value)
    return text if len(text) <= length else text[: length - 3] + "..."


def build_openapi(contract: Contract, *, model: str = "diffusion_fast") -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of the model's address."""
    schema = contract.build_schema()
    form = copy.deepcopy(schema)
    for name in IMAGE_FIELDS:
        form["properties"][name] = {
            "type": "string",
            "format": "binary",
            "description": contract.properties[name]["description"].replace("base64 of a", "a"),
        }
    binary = {"schema": {"type": "string", "format": "binary"}}
    headers = {
        "X-Seed": {"description": "the first picture's seed", "schema": {"type": "string"}},
        "X-Warning": {
            "description": "what was left out, such as the end of a long prompt",
            "schema": {"type": "string"},
        },
    }
    errors = {
        "400": "a field that cannot be accepted, or a token that is missing or wrong",
        "413": "a request of more bytes than max_request_size",
        "500": "the picture failed; the server's log says why",
        "503": "the queue is full, or no worker is ready",
        "504": "the timeout would pass, or has passed, before the picture is made",
        "507": "the worker stopped while it made the picture",
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Stable Diffusion XL from TorchServe",
            "version": "1.0",
            "description": "A prompt in, pictures out. Names and meanings are those of diffusers' pipelines.",
        },
        "security": [{"token": []}],
        "paths": {
            f"/predictions/{model}": {
                "post": {
                    "operationId": "generate",
                    "summary": "Make pictures for a prompt",
                    "requestBody": {
                        "required": True,
                        "content": {
                            "application/json": {"schema": {"$ref": "#/components/schemas/GenerationRequest"}},
                            "multipart/form-data": {"schema": form},
                            "text/plain": {"schema": contract.properties["prompt"]},
                        },
                    },
                    "responses": {
                        "200": {
                            "description": "One picture as itself; several, or any with Accept: application/json, "
                            "as JSON. Work that fails after its first step ends the answer with an Error instead.",
                            "headers": headers,
                            "content": {
                                **{f"image/{name}": binary for name in ("jpeg", "png", "webp")},
                                "text/event-stream": {"schema": {"type": "string"}},
                                "application/json": {
                                    "schema": {
                                        "anyOf": [
                                            {"$ref": "#/components/schemas/Pictures"},
                                            {"$ref": "#/components/schemas/Error"},
                                        ]
                                    }
                                },
                            },
                        },
                        **{
                            code: {
                                "description": words,
                                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                            }
                            for code, words in errors.items()
                        },
                    },
                }
            }
        },
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {"GenerationRequest": schema, "Pictures": _PICTURES, "Error": _ERROR},
        },
    }


_PICTURES = {
    "type": "object",
    "required": ["created", "data", "warnings"],
    "properties": {
        "created": {"type": "integer", "description": "seconds since 1970"},
        "data": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["b64_json", "seed", "parameters"],
                "properties": {
                    "b64_json": {"type": "string", "contentEncoding": "base64"},
                    "seed": {"type": "integer"},
                    "parameters": {"type": "object", "description": "the fields that make this picture again"},
                },
            },
        },
        "size": {"type": "string"},
        "output_format": {"type": "string"},
        "warnings": {"type": "array", "items": {"type": "string"}},
    },
}
_ERROR = {
    "type": "object",
    "description": "The handler's errors have `error`; TorchServe's own have the other three.",
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "integer", "description": "the HTTP status, also where one of 200 was sent before"},
            },
        },
        "code": {"type": "integer"},
        "type": {"type": "string"},
        "message": {"type": "string"},
    },
}
