"""The fields of a request, each declared once.

All else follows from a declaration: the JSON Schema that checks a request and its row in docs/requests.md and in
docs/openapi.json, the argument of diffusers' pipeline, what describes a picture, what the fuzzer sends.
docs/extending.md walks a field through.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdxl_server.config.settings import MIN_CALLS, MIN_SIDE
from sdxl_server.request.adapters import make_adapter_schema, read_adapters
from sdxl_server.request.declaration import Bounds, Declaration, Role, declare
from sdxl_server.request.samplers import make_schema, read_sampler
from sdxl_server.schemas import Schema, choice, falling, nullable, pair, real, shares, switch, text, whole

MAX_SEED = 2**32 - 1
RANDOM_SEED = -1
PICTURE_FORMATS = ("JPEG", "PNG", "WebP", "AVIF", "GIF", "TIFF", "BMP")  # that are read; each decoder is a surface
SCHEDULES = (
    "StableDiffusionTimesteps",
    "StableDiffusionXLTimesteps",
    "StableDiffusionSigmas",
    "StableDiffusionXLSigmas",
)
SCHEDULE_FIELDS = ("timesteps", "sigmas", "schedule")  # of which a request has one
WITH_IMAGE = "with an image, by its aspect unless given"


def _prompt(bounds: Bounds) -> Schema:
    return text(bounds.max_prompt_characters)


def _side(bounds: Bounds) -> Schema:
    return whole(MIN_SIDE, bounds.max_side, multiple_of=8)


def _pair(_: Bounds) -> Schema:
    return pair(0, 65536)


def _upload(_: Bounds) -> Schema:
    accepted = f"a picture ({', '.join(PICTURE_FORMATS)}) in base64, or its data URL"
    return {"type": "string", "contentEncoding": "base64", "x-accepted": accepted}


@dataclass(frozen=True)
class GenerationRequest:
    """The pictures to make, every field checked. Names and meanings are diffusers'."""

    prompt: str = declare(
        Role.PICTURE, lambda bounds: text(bounds.max_prompt_characters, is_needed=True), "what the picture shows"
    )
    width: int = declare(Role.PICTURE, _side, f"pixels; {WITH_IMAGE}")
    height: int = declare(Role.PICTURE, _side, f"pixels; {WITH_IMAGE}")
    seed: int = declare(
        Role.PICTURE,
        lambda _: whole(RANDOM_SEED, MAX_SEED),
        f"of the first picture, each further one has the next (after {MAX_SEED} 0); none or {RANDOM_SEED}: random",
        is_argument=False,
    )
    prompt_2: str | None = declare(
        Role.PICTURE, _prompt, "for the second text encoder; without it, `prompt`", value=None
    )
    negative_prompt: str | None = declare(
        Role.PICTURE,
        _prompt,
        "what the picture should not show; without effect at a guidance of 1 or below",
        value=None,
    )
    negative_prompt_2: str | None = declare(
        Role.PICTURE, _prompt, "for the second text encoder; without it, `negative_prompt`", value=None
    )
    num_inference_steps: int = declare(
        Role.PICTURE, lambda bounds: whole(1, bounds.max_steps), "denoising steps", value=30
    )
    guidance_scale: float = declare(
        Role.PICTURE,
        lambda _: real(0, 100),
        "how strongly the prompt steers; at 1 or below not at all",
        value=5.0,
    )
    guidance_rescale: float = declare(
        Role.PICTURE,
        lambda _: real(0, 1),
        "against overexposed pictures under strong guidance",
        value=0.0,
    )
    unet_calls: int | None = declare(
        Role.PICTURE,
        lambda bounds: whole(MIN_CALLS, 2 * max(bounds.max_steps, MIN_CALLS)),
        "calls of the UNet to make, the others forecast (lossy); `strength` and `denoising_end` shorten it",
        value=None,
        is_argument=False,
    )
    guidance_interval: tuple[float, float] | None = declare(
        Role.PICTURE,
        lambda _: shares(),
        "shares of the denoising between which the prompt steers; outside it a step costs half",
        value=None,
        is_argument=False,
    )
    num_images_per_prompt: int = declare(
        Role.DELIVERY,
        lambda bounds: whole(1, bounds.max_images),
        "pictures, made one by one",
        value=1,
        is_argument=False,
    )
    scheduler: str | Mapping[str, Any] | None = declare(
        Role.PICTURE,
        lambda bounds: make_schema(bounds.schedulers),
        "the sampler: diffusers' name, another program's, or an object of a name and options",
        value=None,
        is_argument=False,
        read=lambda value, bounds: read_sampler(value, bounds.schedulers),
    )
    adapters: tuple[Mapping[str, Any], ...] | None = declare(
        Role.PICTURE,
        lambda bounds: make_adapter_schema(bounds.adapters),
        "adapters (LoRA) to draw with, each with its scale; they may bring other defaults",
        value=None,
        is_argument=False,
        read=lambda value, bounds: read_adapters(value, bounds.adapters, max_rank=bounds.max_adapter_rank),
    )
    clip_skip: int | None = declare(
        Role.PICTURE,
        lambda bounds: whole(0, bounds.max_clip_skip),
        "last layers of the text encoders to leave out",
        value=None,
    )
    denoising_end: float | None = declare(
        Role.PICTURE,
        lambda _: {**real(0, 1), "exclusiveMinimum": 0},
        "share of the denoising after which to stop",
        value=None,
    )
    timesteps: tuple[int, ...] | None = declare(
        Role.PICTURE,
        lambda bounds: falling(whole(0, 999), bounds.max_steps, "a list of falling whole numbers from 0 to 999"),
        "the timesteps themselves, for `num_inference_steps`; some schedulers take them",
        value=None,
        is_argument=False,
    )
    sigmas: tuple[float, ...] | None = declare(
        Role.PICTURE,
        lambda bounds: falling(real(0, 1e6), bounds.max_steps + 1, "a list of falling numbers from 0 on, the last 0"),
        "the noise levels themselves, the last 0, for `num_inference_steps`; some schedulers take them",
        value=None,
        is_argument=False,
    )
    schedule: str | None = declare(
        Role.PICTURE,
        lambda _: choice(*SCHEDULES),
        "one of diffusers' AysSchedules, for `num_inference_steps`; for models that predict the noise",
        value=None,
        is_argument=False,
    )
    original_size: tuple[int, int] | None = declare(
        Role.PICTURE,
        _pair,
        "height and width that the picture passes for; small ones look blurred",
        value=None,
    )
    crops_coords_top_left: tuple[int, int] | None = declare(
        Role.PICTURE,
        _pair,
        "top and left of the crop that the picture passes for",
        value=None,
    )
    target_size: tuple[int, int] | None = declare(
        Role.PICTURE,
        _pair,
        "height and width that the picture is made for",
        value=None,
    )
    image: Any = declare(
        Role.PICTURE,
        _upload,
        "a picture to start from (image-to-image); what is transparent counts as white",
        value=None,
        is_upload=True,
    )
    mask_image: Any = declare(
        Role.PICTURE,
        _upload,
        "a mask: transparent, or without transparency white, where `image` is painted anew (inpainting)",
        value=None,
        is_upload=True,
    )
    resize_mode: str | None = declare(
        Role.PICTURE,
        lambda _: choice("crop", "pad"),
        "how `image` is brought to another aspect: cut at its edges, or with white bars; crop unless given",
        value=None,
        is_argument=False,
    )
    strength: float | None = declare(
        Role.PICTURE,
        lambda _: real(0, 1),
        "how far to go from `image`, and without effect where there is none; 0.8 unless given, with a mask 1",
        value=None,
    )
    output_format: str = declare(
        Role.FILE,
        lambda _: choice("jpeg", "png", "webp"),
        "of the answer",
        value="jpeg",
        is_argument=False,
    )
    quality: int = declare(Role.FILE, lambda _: whole(1, 100), "of a JPEG or WebP", value=90, is_argument=False)
    response_format: str = declare(
        Role.DELIVERY,
        lambda _: choice("b64_json", "url"),
        "of a picture in JSON: `b64_json`, base64; `url`, a data: URL",
        value="b64_json",
        is_argument=False,
    )
    timeout: float = declare(
        Role.DELIVERY,
        lambda bounds: real(1, bounds.max_timeout),
        "seconds of work in which its last step must have been made",
        value=3600,
        default=lambda bounds: bounds.max_timeout,
        is_argument=False,
    )
    stream: bool = declare(
        Role.DELIVERY,
        lambda _: switch(),
        "answer with server-sent events: one for each step, the previews, each picture",
        value=False,
        is_argument=False,
    )
    partial_images: int = declare(
        Role.DELIVERY,
        lambda _: whole(0, 3),
        "previews of each picture in a stream; a picture of one step has none",
        value=0,
        is_argument=False,
    )

    @property
    def schedule_field(self) -> str | None:
        """The field that says which steps to make in the place of `num_inference_steps`."""
        return next((name for name in SCHEDULE_FIELDS if getattr(self, name) is not None), None)

    def get_seed(self, index: int) -> int:
        """Return the seed of picture `index`."""
        return (self.seed + index) % (MAX_SEED + 1)

    def describe(self, index: int = 0) -> dict[str, Any]:
        """Return what was used for picture `index`, as fields of a request that makes it again, without the images."""
        kept = {
            name: getattr(self, name)
            for name, declaration in DECLARATIONS.items()
            if declaration.role is not Role.DELIVERY and not declaration.is_upload
        }
        return {name: value for name, value in kept.items() if value is not None} | {"seed": self.get_seed(index)}


DECLARATIONS: Mapping[str, Declaration] = {
    each.name: each.metadata["declaration"] for each in dataclasses.fields(GenerationRequest)
}


def build_properties(
    bounds: Bounds, *, defaults: Mapping[str, Any], lacking: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Return the JSON Schema of each field under some bounds, with its default and description.

    Args:
        defaults: of the fields whose default the configuration or the model gives.
        lacking: the fields that this kind of model has not.
    """
    properties = {}
    for name, declaration in DECLARATIONS.items():
        if name in lacking:
            continue
        schema = declaration.schema(bounds)
        default = defaults.get(name, declaration.default(bounds))
        properties[name] = {
            **(schema if name == "prompt" else nullable(schema)),
            **({} if default is None else {"default": default}),
            "description": f"base64 of {declaration.words}" if declaration.is_upload else declaration.words,
        }
    return properties
