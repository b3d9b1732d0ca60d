"""A1111's API (/sdapi/v1), which chat programs, bots and plug-ins of editors speak.

Its fields are translated to the contract's fields. a1111_documents.py answers all other questions of its clients.
"""

import base64
import json
import time
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

from sdxl_server import __version__
from sdxl_server.api.a1111_controlnet import UNITS, read_units
from sdxl_server.api.a1111_values import coerce, normalize_model_name, read_as, warn_of_effects
from sdxl_server.api.bodies import read_fields
from sdxl_server.api.infotext import read_clip_skip, write_infotext
from sdxl_server.api.native import JSON, EncodedImage, NativeApi
from sdxl_server.api.warnings import warn_of_body, warn_of_tags, warn_of_unknown
from sdxl_server.config.settings import MAX_SIDE
from sdxl_server.errors import RequestError
from sdxl_server.request.contract import Contract
from sdxl_server.request.fields import GenerationRequest
from sdxl_server.request.hires import SCALE
from sdxl_server.request.sampler_names import SAMPLER_NAME, SCHEDULE_NAMES, name_sampler, normalize_name
from sdxl_server.request.samplers import AUTOMATIC, split_sampler
from sdxl_server.request.uploads import MASK, read_upload
from sdxl_server.request.upscaling import LANCZOS
from sdxl_server.schemas import Schema, choice, real, shorten, switch, whole

FIELDS = {  # with an equivalent
    **{"prompt": "prompt", "negative_prompt": "negative_prompt", "width": "width", "height": "height", "seed": "seed"},
    **{"steps": "num_inference_steps", "cfg_scale": "guidance_scale"},
}
COUNTS = ("batch_size", "n_iter")
SAMPLER_FIELDS = (SAMPLER_NAME, "sampler_index", "scheduler")
# Without an equivalent: the values that have no effect anyway. Other values get a warning.
NO_EQUIVALENT: Mapping[str, Sequence[Any]] = {
    **{"styles": ([],), "subseed_strength": (0,), "seed_resize_from_h": (0, -1), "seed_resize_from_w": (0, -1)},
    **{"restore_faces": (False,), "tiling": (False,), "script_name": ("None",), "refiner_checkpoint": ("None",)},
    **{"eta": (0, 1), "s_churn": (0,), "s_noise": (1,), "s_min_uncond": (0,), "disable_extra_networks": (False,)},
    "infotext": (),
}
# They change no image here: saving, the preview of a larger image, and what other fields need.
SILENT = (
    *("send_images", "save_images", "do_not_save_samples", "do_not_save_grid", "force_task_id", "comments"),
    *("override_settings", "override_settings_restore_afterwards", "alwayson_scripts", "script_args", "clip_skip"),
    *("subseed", "s_tmin", "s_tmax", "refiner_switch_at", "enable_hr", "firstpass_image", "denoising_strength"),
    *("firstphase_width", "firstphase_height", "hr_scale", "hr_upscaler", "hr_second_pass_steps", "hr_resize_x"),
    *("hr_resize_y", "hr_checkpoint_name", "hr_sampler_name", "hr_scheduler", "hr_prompt", "hr_negative_prompt"),
)
NO_EQUIVALENT_OF_HIRES: Mapping[str, Sequence[Any]] = {
    **{"hr_checkpoint_name": ("Use same checkpoint",), "hr_sampler_name": ("Use same sampler",)},
    **{"hr_scheduler": ("Use same scheduler",), "hr_prompt": (), "hr_negative_prompt": ()},
}
NO_EQUIVALENT_OF_IMAGES: Mapping[str, Sequence[Any]] = {"latent_mask": (), "initial_noise_multiplier": (1,)}
FILLS = ("surroundings", "original", "surroundings", "surroundings")  # by A1111's number; the last two fill the latents
MASK_BLURS = ("mask_blur", "mask_blur_x", "mask_blur_y")
IMAGE_FIELDS = (
    *("init_images", "mask", *MASK_BLURS, "mask_round", "inpainting_mask_invert", "inpainting_fill"),
    *("inpaint_full_res", "inpaint_full_res_padding", "resize_mode", "image_cfg_scale", "include_init_images"),
)
RESIZE_MODES = ("stretch", "crop", "pad", "stretch")  # by A1111's number; the last one resizes the latents
DENOISING = 0.75  # A1111's default
SAME_SCALE = 0.02  # of a second pass, across and down
SETTINGS: Mapping[str, Sequence[Any]] = {  # without an equivalent, too
    **{"sd_vae": ("Automatic", "None"), "eta_noise_seed_delta": (0,), "forge_additional_modules": ([],)},
}
FORMATS = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}
CLIP_SKIP = "CLIP_stop_at_last_layers"
CHECKPOINT = "sd_model_checkpoint"
VERSION = f"sdxl_server {__version__}"
THEIRS = {each: name for name, each in FIELDS.items()} | {
    **{"image": "init_images", MASK: "mask", "strength": "denoising_strength", "mask_blur": "mask_blur"},
    **{"padding_mask_crop": "inpaint_full_res_padding", "quality": "jpeg_quality", "control": UNITS},
    "hires": "enable_hr",
}


class A1111Api(NativeApi):
    """Reads txt2img, and responds with one JSON object, whose `info` is JSON in a text."""

    takes_json_only = True
    takes_commands = True
    names: Sequence[str] = (*FIELDS, *COUNTS, *SAMPLER_FIELDS, *NO_EQUIVALENT, *SILENT)

    def __init__(self, model: Mapping[str, str] = MappingProxyType({})) -> None:
        self._model = model
        self._seeds: list[int] = []
        self._infotexts: list[str] = []

    def begin(self, model: Mapping[str, str]) -> "A1111Api":
        """Return the object for one request."""
        return type(self)(model)

    def read(
        self, values: Mapping[str, Any], *, content_type: str, contract: Contract
    ) -> tuple[GenerationRequest, list[str]]:
        """Return the request in TorchServe's parameters, and warnings.

        Raises:
            RequestError: names the field as A1111 does, what is accepted and what was given.
        """
        if contract.limits.adapters:  # A1111 has no other way to name them
            contract = contract.apply_tags()
        given = read_fields(values, content_type=content_type or JSON, properties={}, aliases={})
        known = {name: value for name, value in given.items() if name in self.names and value not in (None, "")}
        properties = contract.properties
        fields = {own: coerce(known[name], properties[own]) for name, own in FIELDS.items() if name in known}
        counts = {name: read_as(known, name, properties["num_images_per_prompt"], 1) for name in COUNTS}
        fields |= {"num_images_per_prompt": _multiply(counts, properties)}
        fields |= _choose_sampler(known, contract)
        settings, warnings = self._read_settings(known, contract)
        fields |= settings | self.read_images(known, contract, warnings)
        warnings += warn_of_effects(known, NO_EQUIVALENT)
        if read_as(known, "enable_hr", switch(), False):
            fields["hires"] = _read_hires(known, fields, contract)
            warnings += warn_of_effects(known, NO_EQUIVALENT_OF_HIRES)
            upscaler = contract.limits.upscaler
            own = LANCZOS if upscaler is None else upscaler.name
            if known.get("hr_upscaler", own) != own:
                warnings.append(f"hr_upscaler is {own} here, and {shorten(known['hr_upscaler'])} is ignored")
        scripts = known.get("alwayson_scripts")
        unknown = [name for name in given if name not in self.names]
        image = fields.get("image")
        units = read_units(scripts, contract.limits, image=image, warnings=warnings, unknown=unknown)
        sizes = dict(zip(("width", "height"), contract.size, strict=True)) if units and image is None else {}
        fields = {**sizes, **fields, **units}  # the image of a unit decides no size in A1111
        warnings += warn_of_unknown(unknown)
        most = max(COUNTS, key=lambda name: counts[name])
        request = contract.check(fields, names={**THEIRS, "num_images_per_prompt": most})
        self._sends_images = bool(read_as(known, "send_images", switch(), True))
        self._parameters = self._list_parameters(known, request)
        return request, [*warnings, *warn_of_body(fields), *warn_of_tags(fields, contract.limits)]

    def read_images(self, known: Mapping[str, Any], contract: Contract, warnings: list[str]) -> dict[str, Any]:
        """Return the fields of the uploaded images; add warnings about them."""
        return {}

    def write_image(
        self, request: GenerationRequest, image: EncodedImage, index: int, *, kind: str, warnings: Sequence[str]
    ) -> bytes:
        """Return the image's part of the JSON."""
        start = b", " if self._seeds and self._sends_images else b"" if self._seeds else b'{"images": ['
        self._seeds.append(image.seed)
        self._infotexts.append(write_infotext(image.metadata))
        return start + (json.dumps(base64.b64encode(image.file).decode()).encode() if self._sends_images else b"")

    def write_end(self, request: GenerationRequest, warnings: Sequence[str]) -> bytes:
        """Return the end of the JSON, after the images."""
        info = json.dumps(self._describe(request, warnings))
        rest = json.dumps({"parameters": self._parameters, "info": info}).encode().removeprefix(b"{")
        return (b"" if self._seeds else b'{"images": [') + b"], " + rest

    @classmethod
    def describe_error(cls, error: Exception, message: str, *, status: int, kind: str) -> tuple[int, dict[str, Any]]:
        """Return the HTTP status of a failed request and the error: FastAPI's for a wrong field, or A1111's."""
        if status == HTTPStatus.BAD_REQUEST:
            place = ["body", *filter(None, [getattr(error, "param", None)])]
            return HTTPStatus.UNPROCESSABLE_ENTITY, {"detail": [{"loc": place, "msg": message, "type": "value_error"}]}
        return status, {"error": kind, "detail": message, "body": "", "errors": message}

    def _describe(self, request: GenerationRequest, warnings: Sequence[str]) -> dict[str, Any]:
        """Return A1111's `info` of the finished images."""
        seeds, prompt, negative = self._seeds, self._parameters["prompt"], self._parameters["negative_prompt"]
        first = next(iter(seeds), request.seed)
        sampler = name_sampler(request.scheduler)[0] if request.scheduler else None
        return {
            **{"prompt": prompt, "all_prompts": [prompt] * len(seeds)},
            **{"negative_prompt": negative, "all_negative_prompts": [negative] * len(seeds)},
            **{"seed": first, "all_seeds": seeds, "subseed": first, "all_subseeds": seeds, "subseed_strength": 0},
            **{"width": request.width, "height": request.height, "sampler_name": sampler},
            **{"cfg_scale": request.guidance_scale, "steps": request.num_inference_steps},
            **{"batch_size": self._parameters["batch_size"], "restore_faces": False, "face_restoration_model": None},
            **{"sd_model_name": self._model.get("model_name"), "sd_model_hash": self._model.get("model_autov2")},
            **{"sd_vae_name": None, "sd_vae_hash": None, "seed_resize_from_w": -1, "seed_resize_from_h": -1},
            **{"denoising_strength": request.strength, "extra_generation_params": {}, "index_of_first_image": 0},
            **{"infotexts": self._infotexts, "styles": [], "job_timestamp": time.strftime("%Y%m%d%H%M%S")},
            "clip_skip": self._clip_skip,
            **{"is_using_inpainting_conditioning": request.mask_image is not None, "version": VERSION},
            "warnings": list(warnings),
        }

    def _list_parameters(self, known: Mapping[str, Any], request: GenerationRequest) -> dict[str, Any]:
        """Return the request as the client sent it, with the defaults of this server and without images."""
        defaults = {name: getattr(request, own) for name, own in FIELDS.items()}
        defaults |= {"seed": -1, "negative_prompt": "", "batch_size": 1, "n_iter": 1}
        if request.scheduler:
            defaults[SAMPLER_NAME], defaults["scheduler"] = name_sampler(request.scheduler)
        images: dict[str, Any] = {} if known.get("include_init_images") else {"init_images": None, "mask": None}
        images |= {"alwayson_scripts": {}} if request.control else {}
        return {**defaults, **known, **{name: empty for name, empty in images.items() if name in known}}

    def _read_settings(self, known: Mapping[str, Any], contract: Contract) -> tuple[dict[str, Any], list[str]]:
        """Return the fields of `override_settings`, and warnings of settings without an effect."""
        settings = known.get("override_settings", {})
        if not isinstance(settings, Mapping):
            raise RequestError(f"override_settings takes an object, not {shorten(settings)}", param="override_settings")
        settings = {name: value for name, value in settings.items() if value not in (None, "")}
        layers = {CLIP_SKIP: settings.get(CLIP_SKIP, known.get("clip_skip", 1))}
        most = contract.limits.max_clip_skip + (2 if contract.limits.is_xl else 1)
        self._clip_skip = read_as(layers, CLIP_SKIP, whole(1, most), 1)
        fields: dict[str, Any] = {"clip_skip": read_clip_skip(self._clip_skip, is_xl=contract.limits.is_xl)}
        fields["output_format"] = FORMATS[read_as(settings, "samples_format", choice(*FORMATS), "png")]
        if "jpeg_quality" in settings:
            fields["quality"] = coerce(settings["jpeg_quality"], contract.properties["quality"])
        warnings = []
        if CHECKPOINT in settings and not is_own_model(settings[CHECKPOINT], self._model):
            only = self._model.get("model_name")
            warnings.append(f"{CHECKPOINT}: {shorten(settings[CHECKPOINT])} is ignored; the only model is {only}")
        warnings += warn_of_effects(settings, SETTINGS)
        read = (CLIP_SKIP, CHECKPOINT, "samples_format", "jpeg_quality", *SETTINGS)
        unknown = [f"override_settings.{name}" for name in settings if name not in read]
        return fields, [*warnings, *warn_of_unknown(unknown)]


class A1111Img2ImgApi(A1111Api):
    """Reads img2img, which starts from an image and may have a mask."""

    names = (*A1111Api.names, *IMAGE_FIELDS, *NO_EQUIVALENT_OF_IMAGES)

    def read_images(self, known: Mapping[str, Any], contract: Contract, warnings: list[str]) -> dict[str, Any]:
        """Return the fields of the uploaded images; add warnings about them.

        Raises:
            RequestError: names the field as A1111 does, what is accepted and what was given.
        """
        images, side = known.get("init_images"), contract.limits.config.max_side
        images = images if isinstance(images, list) else [] if images is None else [images]
        if len(images) != 1:
            raise RequestError(
                f"init_images takes a list of one image in base64, not {len(images)}", param="init_images"
            )
        mode = read_as(known, "resize_mode", whole(0, len(RESIZE_MODES) - 1), 0)
        strength = coerce(known.get("denoising_strength", DENOISING), contract.properties["strength"])
        fields = {
            "image": read_upload("init_images", images[0], max_side=side),
            **{"resize_mode": RESIZE_MODES[mode], "strength": strength},
        }
        warnings += warn_of_effects(known, NO_EQUIVALENT_OF_IMAGES)
        if "mask" not in known:
            return fields
        mask = read_upload("mask", known["mask"], max_side=side)
        is_inverted = read_as(known, "inpainting_mask_invert", switch(), False)
        # A1111 repaints what is opaque, or white if nothing is transparent.
        fields |= {MASK: mask, "invert_mask": is_inverted != (mask.alpha is not None)}
        blurs = [coerce(known[name], contract.properties["mask_blur"]) for name in MASK_BLURS if name in known]
        fill = read_as(known, "inpainting_fill", whole(0, len(FILLS) - 1), 0)
        fields |= {"mask_blur": next(iter(blurs), None), "mask_fill": FILLS[fill]}
        if fill > 1:
            warnings.append(f"inpainting_fill is 0 here, colours from around the mask, and not {fill}")
        if read_as(known, "inpaint_full_res", switch(), True):
            fields["padding_mask_crop"] = coerce(
                known.get("inpaint_full_res_padding", 0), contract.properties["padding_mask_crop"]
            )
        return fields


def is_own_model(given: Any, model: Mapping[str, str]) -> bool:
    """Say whether a client names this server's model: by its name, file, title or digest."""
    return normalize_model_name(given) in [each.casefold() for each in model.values()]


def _multiply(counts: Mapping[str, int], properties: Mapping[str, Schema]) -> int:
    """Return the number of images."""
    (batch, repeated), most = counts.values(), properties["num_images_per_prompt"]["maximum"]
    if batch * repeated > most:
        raise RequestError(f"batch_size x n_iter may be {most} at most, not {batch} x {repeated}", param="n_iter")
    return batch * repeated


def _read_hires(known: Mapping[str, Any], fields: Mapping[str, Any], contract: Contract) -> dict[str, Any]:
    """Return the second pass. Its size is a scale, or a width and a height that keep the aspect."""
    size = [read_as(known, name, whole(0, MAX_SIDE), 0) for name in ("hr_resize_x", "hr_resize_y")]
    if any(size):
        drawn = [fields.get(name) or own for name, own in zip(("width", "height"), contract.size, strict=True)]
        scales = [wanted / side for wanted, side in zip(size, drawn, strict=True) if wanted]
        if max(scales) - min(scales) > SAME_SCALE:
            raise RequestError(
                f"hr_resize_x and hr_resize_y keep the aspect of {drawn[0]}x{drawn[1]} here, not {size[0]}x{size[1]}",
                param="hr_resize_x",
            )
        scale = scales[0]
    else:
        scale = read_as(known, "hr_scale", SCALE, 2.0)
    strength = read_as(known, "denoising_strength", real(0, 1), DENOISING)
    steps = read_as(known, "hr_second_pass_steps", whole(0, contract.limits.config.max_steps), 0)
    return {"scale": scale, "strength": strength, "steps": steps or None}


def _choose_sampler(known: Mapping[str, Any], contract: Contract) -> dict[str, Any]:
    """Return the sampler and its schedule. Without a schedule A1111 chooses one for the sampler."""
    schedule = known.get("scheduler", AUTOMATIC)
    word = normalize_name(schedule) if isinstance(schedule, str) else schedule
    sampler = known.get(SAMPLER_NAME, known.get("sampler_index"))
    if sampler is None:
        if word == AUTOMATIC:
            return {}
        sampler = split_sampler(contract.properties["scheduler"]["default"])[0]
    key = normalize_name(sampler) if isinstance(sampler, str) else ""
    ending = next((each for each in SCHEDULE_NAMES if key.endswith(each)), None)
    # Some clients name the schedule twice, and older ones in the sampler's name only.
    is_named = ending is not None and word in (AUTOMATIC, ending)
    return {SAMPLER_NAME: sampler, **({} if is_named else {"scheduler": schedule})}
