"""The fields of a request, each declared once.

The rest follows from a declaration: JSON Schema, docs, the argument of diffusers' pipeline, and an image's metadata.
The page docs/extending.md shows how to add a field.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdxl_server.config.declaration import NEEDED, Declaration, Role, declare, list_declarations
from sdxl_server.config.settings import MIN_CALLS, MIN_SIDE
from sdxl_server.request.adapters import build_adapters_schema, read_adapters
from sdxl_server.request.controls import RequestControl, build_control_schema, read_controls
from sdxl_server.request.hires import Hires, build_hires_schema, build_second_pass, read_hires
from sdxl_server.request.limits import Limits
from sdxl_server.request.sampler_names import read_sampler
from sdxl_server.request.samplers import build_sampler_schema
from sdxl_server.request.upload_limits import IMAGE_FORMATS
from sdxl_server.request.uploads import RESIZE_MODES
from sdxl_server.request.upscaling import FIELDS_WITHOUT_PROMPT, build_upscale_schema
from sdxl_server.schemas import Schema, choice, falling, nullable, pair, real, shares, switch, text, whole

MAX_SEED = 2**32 - 1
RANDOM_SEED = -1
SCHEDULES = (
    "StableDiffusionTimesteps",
    "StableDiffusionXLTimesteps",
    "StableDiffusionSigmas",
    "StableDiffusionXLSigmas",
)
SCHEDULE_FIELDS = ("timesteps", "sigmas", "schedule")  # a request has one of them at most
WITH_IMAGE = "with an image, its aspect decides by default"
UPLOAD: Schema = {
    "type": "string",
    "contentEncoding": "base64",
    "x-accepted": f"an image ({', '.join(IMAGE_FORMATS)}) in base64, or its data URL",
}


def _prompt(limits: Limits) -> Schema:
    return text(limits.config.max_prompt_characters)


def _side(limits: Limits) -> Schema:
    return whole(MIN_SIDE, limits.config.max_side, multiple_of=8)


@dataclass(frozen=True)
class GenerationRequest:
    """A request with every field checked. Names and meanings are diffusers'."""

    prompt: str = declare(
        lambda limits: text(limits.config.max_prompt_characters, is_needed=True), "what the image shows"
    )
    width: int = declare(_side, f"pixels; {WITH_IMAGE}")
    height: int = declare(_side, f"pixels; {WITH_IMAGE}")
    seed: int = declare(
        whole(RANDOM_SEED, MAX_SEED),
        f"seed of the first image; each later image has the next number, 0 after {MAX_SEED}. None or {RANDOM_SEED}: "
        "random",
        is_argument=False,
    )
    prompt_2: str | None = declare(_prompt, "for the second text encoder; default: `prompt`", value=None)
    negative_prompt: str | None = declare(
        _prompt, "what the image should not show; no effect with a guidance of 1 or less", value=None
    )
    negative_prompt_2: str | None = declare(
        _prompt, "for the second text encoder; default: `negative_prompt`", value=None
    )
    num_inference_steps: int = declare(lambda limits: whole(1, limits.config.max_steps), "denoising steps", value=30)
    guidance_scale: float = declare(
        real(0, 100), "how strongly the prompt guides the image; 1 or less: no guidance", value=5.0
    )
    guidance_rescale: float = declare(real(0, 1), "reduces overexposure with strong guidance", value=0.0)
    unet_calls: int | None = declare(
        lambda limits: whole(MIN_CALLS, 2 * max(limits.config.max_steps, MIN_CALLS)),
        "UNet calls; other steps are extrapolated (lossy). `strength` and `denoising_end` reduce it",
        value=None,
        is_argument=False,
    )
    guidance_interval: tuple[float, float] | None = declare(
        shares(),
        "from which to which share of the denoising guidance applies; other steps cost half",
        value=None,
        is_argument=False,
    )
    num_images_per_prompt: int = declare(
        lambda limits: whole(1, limits.config.max_images),
        "images, generated one after another",
        value=1,
        role=Role.DELIVERY,
        is_argument=False,
    )
    scheduler: str | Mapping[str, Any] | None = declare(
        lambda limits: build_sampler_schema(limits.samplers),
        "the sampler: a name from diffusers or another program, or an object with a name and options",
        value=None,
        is_argument=False,
        read=lambda value, limits: read_sampler(value, limits.samplers),
    )
    adapters: tuple[Mapping[str, Any], ...] | None = declare(
        lambda limits: build_adapters_schema(limits.adapters),
        "adapters (LoRA), each with its scale; an adapter can change other defaults",
        value=None,
        is_argument=False,
        read=lambda value, limits: read_adapters(value, limits.adapters, max_rank=limits.config.max_adapter_rank),
    )
    control: tuple[RequestControl, ...] | None = declare(
        lambda limits: build_control_schema(limits.controls, limits.config.max_controls),
        "controls (ControlNet, T2I-Adapter, IP-Adapter): the result follows the image of each, such as drawn edges, "
        "with a `scale`; `from`, `to`: shares of the denoising; `preprocess: canny` draws the edges of the image",
        value=None,
        is_argument=False,
        read=lambda value, limits: read_controls(
            value, limits.controls, most=limits.config.max_controls, max_side=limits.config.max_side
        ),
    )
    clip_skip: int | None = declare(
        lambda limits: whole(0, limits.max_clip_skip), "number of last layers of the text encoders to skip", value=None
    )
    denoising_end: float | None = declare(
        {**real(0, 1), "exclusiveMinimum": 0}, "share of the denoising after which it stops", value=None
    )
    timesteps: tuple[int, ...] | None = declare(
        lambda limits: falling(whole(0, 999), limits.config.max_steps, "a list of falling whole numbers from 999 to 0"),
        "the timesteps, instead of `num_inference_steps`; some schedulers accept them",
        value=None,
        is_argument=False,
    )
    sigmas: tuple[float, ...] | None = declare(
        lambda limits: falling(real(0, 1e6), limits.config.max_steps + 1, "a list of falling numbers that ends with 0"),
        "the noise levels, the last 0, instead of `num_inference_steps`; some schedulers accept them",
        value=None,
        is_argument=False,
    )
    schedule: str | None = declare(
        choice(*SCHEDULES),
        "one of diffusers' AysSchedules, instead of `num_inference_steps`; for models that predict the noise",
        value=None,
        is_argument=False,
    )
    original_size: tuple[int, int] | None = declare(
        pair(0, 65536), "height and width of the imagined original image; small values look blurred", value=None
    )
    crops_coords_top_left: tuple[int, int] | None = declare(
        pair(0, 65536), "top and left of the imagined crop", value=None
    )
    target_size: tuple[int, int] | None = declare(
        pair(0, 65536), "height and width of the imagined target image", value=None
    )
    image: Any = declare(
        UPLOAD, "an image to start from (image-to-image); transparent pixels become white", value=None, is_upload=True
    )
    mask_image: Any = declare(
        UPLOAD,
        "a mask for inpainting: `image` is repainted where the mask is transparent, or white if nothing is transparent",
        value=None,
        is_upload=True,
    )
    invert_mask: bool | None = declare(
        switch(),
        "inverts `mask_image`: `image` is repainted where the mask is opaque, or black if nothing is transparent",
        value=None,
        is_argument=False,
    )
    mask_blur: int | None = declare(
        whole(0, 64), "width in pixels of the soft edge inside `mask_image`; default: 4", value=None, is_argument=False
    )
    mask_fill: str | None = declare(
        choice("original", "surroundings"),
        "how the drawing begins inside `mask_image`: with `image`, or without it, with colours from around the mask; "
        "default: original",
        value=None,
        is_argument=False,
    )
    padding_mask_crop: int | None = declare(
        whole(0, 1024),
        "draws only the mask's box with these pixels around it, at `width`×`height`, and pastes it into `image`; the "
        "result has the size of `image`",
        value=None,
        is_argument=False,
    )
    resize_mode: str | None = declare(
        choice(*RESIZE_MODES),
        "how `image` gets another aspect: `crop` cuts its edges, `pad` adds white bars, `stretch` distorts it; "
        "default: crop",
        value=None,
        is_argument=False,
    )
    strength: float | None = declare(
        real(0, 1), "how much `image` changes; no effect without an image; default: 0.8, or 1 with a mask", value=None
    )
    hires: Hires | None = declare(
        lambda limits: build_hires_schema(limits.config.max_steps),
        "a second pass (hires fix): the image is enlarged by `scale`, with the upscaler if there is one, and drawn "
        "again from there with `strength` (default: 0.4) and `steps` (default: `num_inference_steps`)",
        value=None,
        is_argument=False,
        read=lambda value, limits: read_hires(value, max_steps=limits.config.max_steps),
    )
    upscale: int | None = declare(
        lambda limits: build_upscale_schema(limits.upscaler),
        "enlarges each image by this factor with the upscaler; with `image` and without `prompt` nothing is drawn",
        value=None,
        is_argument=False,
    )
    output_format: str = declare(
        choice("jpeg", "png", "webp"), "file format of the images", value="jpeg", role=Role.FILE, is_argument=False
    )
    quality: int = declare(whole(1, 100), "quality of a JPEG or WebP", value=90, role=Role.FILE, is_argument=False)
    response_format: str = declare(
        choice("b64_json", "url"),
        "an image in JSON: `b64_json` is base64, `url` adds a data: URL and doubles the bytes",
        value="b64_json",
        role=Role.DELIVERY,
        is_argument=False,
    )
    timeout: float = declare(
        lambda limits: real(1, limits.config.max_timeout),
        "seconds of work until the last step must be complete",
        value=3600,
        role=Role.DELIVERY,
        is_argument=False,
    )
    stream: bool = declare(
        switch(),
        "respond with server-sent events: steps, previews and images",
        value=False,
        role=Role.DELIVERY,
        is_argument=False,
    )
    partial_images: int = declare(
        whole(0, 3),
        "previews of each image in a stream; an image of one step has none",
        value=0,
        role=Role.DELIVERY,
        is_argument=False,
    )

    @property
    def schedule_field(self) -> str | None:
        """The field that names the steps instead of `num_inference_steps`."""
        return next((name for name in SCHEDULE_FIELDS if getattr(self, name) is not None), None)

    @property
    def is_crop(self) -> bool:
        """Only a crop around the mask is drawn."""
        return self.padding_mask_crop is not None and self.mask_image is not None

    @property
    def image_size(self) -> tuple[int, int]:
        """The width and height of the resulting images, in pixels."""
        width, height = self.drawn_size
        return width * (self.upscale or 1), height * (self.upscale or 1)

    @property
    def drawn_size(self) -> tuple[int, int]:
        """The width and height of the images before the upscaling."""
        if self.hires is not None:
            return self.hires.compute_size(self.width, self.height)
        return self.image.size if self.is_crop else (self.width, self.height)

    def list_passes(self) -> list["GenerationRequest"]:
        """Return the request of each pass of denoising, the second one without its image."""
        if not self.is_drawn:
            return []
        return [self] if self.hires is None else [self, build_second_pass(self)]

    def list_enlargements(self, index: int) -> list[tuple[tuple[int, int], int]]:
        """Return the size before each work of the upscaler on image `index`, and its factor."""
        hires = [] if self.hires is None else [((self.width, self.height), self.hires.factor)]
        return hires + ([] if self.upscale is None else [(self.get_size(index), self.upscale)])

    def get_size(self, index: int) -> tuple[int, int]:
        """Return the width and height of image `index` before the upscaling."""
        return self.drawn_size if self.is_drawn else self.image[index].size

    @property
    def megapixels(self) -> float:
        """The drawn pixels."""
        return self.width * self.height / 1e6

    @property
    def is_drawn(self) -> bool:
        """The images are drawn. Without a prompt uploaded images are enlarged."""
        return bool(self.prompt)

    def get_single(self, index: int) -> "GenerationRequest":
        """Return the request of one uploaded image that is enlarged; a drawing's request is unchanged."""
        return self if self.is_drawn else dataclasses.replace(self, image=self.image[index], num_images_per_prompt=1)

    def get_seed(self, index: int) -> int:
        """Return the seed of image `index`."""
        return (self.seed + index) % (MAX_SEED + 1)

    def describe(self, index: int = 0) -> dict[str, Any]:
        """Return the fields that generate image `index` again, without the uploaded images."""
        kept = {
            name: getattr(self, name)
            for name, declaration in DECLARATIONS.items()
            if (self.is_drawn or name in FIELDS_WITHOUT_PROMPT)
            and declaration.role is not Role.DELIVERY
            and not declaration.is_upload
        }
        if self.is_drawn:
            control = self.control and [each.describe() for each in self.control]
            hires = self.hires and self.hires.describe()
            kept |= {"seed": self.get_seed(index), "control": control, "hires": hires}
        return {name: value for name, value in kept.items() if value is not None}


DECLARATIONS: Mapping[str, Declaration] = list_declarations(GenerationRequest)


def build_properties(
    limits: Limits, *, defaults: Mapping[str, Any], lacking: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Return the JSON Schema of each field under these limits, with its default and description.

    Args:
        defaults: by field, the defaults that the configuration or the model gives.
        lacking: the fields that this kind of model does not have.
    """
    properties = {}
    defaults = {"timeout": limits.config.max_timeout, **defaults}
    for field in dataclasses.fields(GenerationRequest):
        name, declaration = field.name, DECLARATIONS[field.name]
        if name in lacking:
            continue
        schema = declaration.build_schema(limits)
        default = defaults.get(name, None if field.default is NEEDED else field.default)
        properties[name] = {
            **(schema if name == "prompt" else nullable(schema)),
            **({} if default is None else {"default": default}),
            "description": f"base64 of {declaration.words}" if declaration.is_upload else declaration.words,
        }
    return properties
