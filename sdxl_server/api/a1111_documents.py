"""The lists, options, metadata and commands of A1111's API. A command acts on the client's own drawing."""

import base64
import os
from collections.abc import Callable, Mapping
from typing import Any

from sdxl_server.api.a1111 import CHECKPOINT, CLIP_SKIP, is_own_model
from sdxl_server.api.a1111_controlnet import NONE, SCRIPT, list_modules, write_model
from sdxl_server.api.bodies import read_fields
from sdxl_server.api.drawings import Drawing
from sdxl_server.api.http import HttpRequest
from sdxl_server.api.infotext import split_infotext
from sdxl_server.api.metadata import read_header
from sdxl_server.api.native import JSON
from sdxl_server.errors import RequestError
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.request.preprocessing import CANNY, DEFAULT_THRESHOLDS
from sdxl_server.request.sampler_names import normalize_name
from sdxl_server.request.samplers import AUTOMATIC, SCHEDULES, list_aliases
from sdxl_server.request.uploads import read_bytes
from sdxl_server.request.upscaling import LANCZOS
from sdxl_server.schemas import shorten

LABELS = {"sgm_uniform": "SGM Uniform", "ddim": "DDIM"}
NOTHING = {"name": "None", "model_name": None, "model_path": None, "model_url": None, "scale": 1}


def list_samplers(loaded: LoadedPipeline) -> list[dict[str, Any]]:
    """Return the samplers under A1111's names."""
    names = list_aliases(loaded.contract.limits.samplers)
    return [{"name": name, "aliases": [normalize_name(name)], "options": {}} for name in names]


def list_schedulers() -> list[dict[str, Any]]:
    """Return the schedules under A1111's names."""
    rest = {"aliases": None, "default_rho": -1, "need_inner_model": False}
    return [{"name": name, "label": LABELS.get(name, name.capitalize()), **rest} for name in (AUTOMATIC, *SCHEDULES)]


def list_models(loaded: LoadedPipeline) -> list[dict[str, Any]]:
    """Return the only model."""
    name, own = loaded.original["model_name"], loaded.original
    digests = {"hash": own.get("model_autov2"), "sha256": own.get("model_sha256")}
    return [{"title": write_title(own), "model_name": name, **digests, "filename": name, "config": None}]


def write_title(model: Mapping[str, str]) -> str:
    """Return a model's name with its short digest, if that is known."""
    digest = model.get("model_autov2")
    return f"{model['model_name']} [{digest}]" if digest else model["model_name"]


def list_options(loaded: LoadedPipeline) -> dict[str, Any]:
    """Return the options that have a meaning here."""
    return {
        CHECKPOINT: write_title(loaded.original),
        "sd_checkpoint_hash": loaded.original.get("model_sha256", ""),
        **{"sd_vae": "Automatic", CLIP_SKIP: 1, "samples_format": "png"},
        "jpeg_quality": loaded.contract.properties["quality"]["default"],
        **{"eta_noise_seed_delta": 0, "show_progress_every_n_steps": 1},
    }


def answer_options(loaded: LoadedPipeline, http_request: HttpRequest, _: Drawing | None) -> Any:
    """Return the options, or accept those that already hold.

    Raises:
        RequestError: an option would change.
    """
    options = list_options(loaded)
    if not any(http_request.values.values()):
        return options
    for name, value in _read_body(http_request).items():
        is_model = name == CHECKPOINT and is_own_model(value, loaded.original)
        if name not in options:
            raise RequestError(f"{shorten(name)} is no option here; the options are {', '.join(options)}", param=name)
        if value is not None and value != options[name] and not is_model:
            raise RequestError(
                f"{name} is {options[name]} on this server and stays so, not {shorten(value)}; a request can name its "
                "own settings in override_settings",
                param=name,
            )
    return None


def describe_progress(drawing: Drawing | None, *, has_image: bool = True) -> dict[str, Any]:
    """Return how far the client's oldest drawing is, with its last preview. The next step draws a new one."""
    state = {"skipped": False, "interrupted": False, "stopping_generation": False, "job": "", "job_count": 0}
    state |= {"job_timestamp": "0", "job_no": 0, "sampling_step": 0, "sampling_steps": 0}
    answer = {"progress": 0.0, "eta_relative": 0.0, "state": state, "current_image": None, "textinfo": None}
    if drawing is None:
        return answer
    progress = drawing.progress
    state |= {"skipped": drawing.is_skipped, "interrupted": drawing.is_interrupted, "job": "scripts_txt2img"}
    state["job_count"] = drawing.request.num_images_per_prompt
    if progress is None:
        return answer
    state |= {"job_no": progress.index, "sampling_step": progress.step, "sampling_steps": progress.steps}
    seconds = drawing.seconds.get("inference", 0.0)
    answer |= {"progress": progress.share, "eta_relative": seconds / progress.share * (1 - progress.share)}
    if has_image:
        drawing.is_watched = True
        answer["current_image"] = drawing.preview and base64.b64encode(drawing.preview).decode()
    return answer


def interrupt(loaded: LoadedPipeline, http_request: HttpRequest, drawing: Drawing | None) -> dict[str, Any]:
    """End the client's oldest drawing. Its response has the images that are finished."""
    if drawing is not None:
        drawing.is_interrupted = True
    return {}


def skip(loaded: LoadedPipeline, http_request: HttpRequest, drawing: Drawing | None) -> dict[str, Any]:
    """Leave out the image under way of the client's oldest drawing."""
    if drawing is not None:
        drawing.is_skipped = True
    return {}


def read_png_info(loaded: LoadedPipeline, http_request: HttpRequest, _: Drawing | None) -> dict[str, Any]:
    """Return A1111's text in an image file; all texts are empty if it has none.

    Raises:
        RequestError: it is no image.
    """
    image = _read_body(http_request).get("image")
    text = read_header(read_bytes("image", image)).get("parameters", "")
    try:
        prompt, negative, parameters = split_infotext(text)
    except RequestError:
        return {"info": text, "items": {}, "parameters": {}}
    prompts = {"Prompt": prompt, "Negative prompt": negative or ""}
    return {"info": text, "items": {"parameters": text}, "parameters": prompts | parameters}


def measure_memory() -> dict[str, Any]:
    """Return this machine's memory in bytes."""
    page, total, free = (os.sysconf(name) for name in ("SC_PAGE_SIZE", "SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    ram = {"free": free * page, "used": (total - free) * page, "total": total * page}
    return {"ram": ram, "cuda": {"error": "unavailable"}}


def list_adapters(loaded: LoadedPipeline) -> list[dict[str, Any]]:
    """Return the adapters that prompts can name as `<lora:name:scale>`."""
    names = loaded.contract.limits.adapters
    return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in names]


def list_embeddings(loaded: LoadedPipeline) -> dict[str, Any]:
    """Return the embeddings that prompts can name."""
    rest = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None}
    shapes = {each.name: {"shape": sum(each.widths.values()), "vectors": each.vectors} for each in loaded.embeddings}
    return {"loaded": {name: {**rest, **shape} for name, shape in shapes.items()}, "skipped": {}}


def list_vaes(loaded: LoadedPipeline) -> list[dict[str, Any]]:
    """Return the VAE of the configuration, if it is not the model's own."""
    path = loaded.config.vae_path
    return [{"model_name": os.path.basename(path), "filename": os.path.basename(path)}] if path else []


def list_scripts(loaded: LoadedPipeline) -> dict[str, Any]:
    """Return the names of `alwayson_scripts`; by these, clients know that the server has controls."""
    names = [SCRIPT] if loaded.controls else []
    return {"txt2img": names, "img2img": names}


def _list_models(loaded: LoadedPipeline) -> list[str]:
    return [write_model(each.config.name, each.sha256) for each in loaded.controls]


def _list_modules(loaded: LoadedPipeline) -> list[str]:
    return list_modules(loaded.contract.limits.controls.values())


def _describe_modules(loaded: LoadedPipeline) -> dict[str, Any]:
    """Return the preprocessors with their settings."""
    low, high = DEFAULT_THRESHOLDS
    named = {"Canny Low Threshold": low, "Canny High Threshold": high}
    sliders = [{"name": name, "value": value, "min": 0, "max": 255} for name, value in named.items()]
    modules = _list_modules(loaded)
    details = {name: {"model_free": False, "sliders": sliders if name == CANNY else []} for name in modules}
    return {"module_list": modules, "module_detail": details}


def _list_types(loaded: LoadedPipeline) -> dict[str, Any]:
    """Return the types of controls in A1111's form: one with all."""
    models = ["None", *_list_models(loaded)]
    every = {
        "module_list": _list_modules(loaded),
        "model_list": models,
        "default_option": NONE,
        "default_model": "None",
    }
    return {"control_types": {"All": every}}


def list_upscalers(loaded: LoadedPipeline) -> list[dict[str, Any]]:
    """Return no upscaler, and the configured one."""
    if (own := loaded.upscaler) is None:
        return [NOTHING, {**NOTHING, "name": LANCZOS}]
    return [NOTHING, {**NOTHING, "name": own.title, "model_name": own.title, "scale": own.scale}]


def _read_body(http_request: HttpRequest) -> dict[str, Any]:
    return read_fields(http_request.values, content_type=http_request.content_type or JSON, properties={}, aliases={})


Document = Callable[[LoadedPipeline, HttpRequest, Drawing | None], Any]


def _hold(value: Any) -> Document:
    return lambda *_: value


# By path below /sdapi/v1. Lists of parts that this server lacks are empty.
A1111_DOCUMENTS: Mapping[str, Document] = {
    "samplers": lambda loaded, *_: list_samplers(loaded),
    "schedulers": lambda *_: list_schedulers(),
    "sd-models": lambda loaded, *_: list_models(loaded),
    "sd-vae": lambda loaded, *_: list_vaes(loaded),
    "options": answer_options,
    "loras": lambda loaded, *_: list_adapters(loaded),
    "progress": lambda *about: describe_progress(about[-1]),
    "progress/skip_current_image": lambda *about: describe_progress(about[-1], has_image=False),  # a query in A1111
    "interrupt": interrupt,
    "skip": skip,
    "png-info": read_png_info,
    "memory": lambda *_: measure_memory(),
    "upscalers": lambda loaded, *_: list_upscalers(loaded),
    "embeddings": lambda loaded, *_: list_embeddings(loaded),
    "scripts": lambda loaded, *_: list_scripts(loaded),
    "cmd-flags": _hold({}),
    **{
        name: _hold([])
        for name in (
            *("latent-upscale-modes", "prompt-styles", "hypernetworks", "face-restorers", "realesrgan-models"),
            *("script-info", "extensions"),
        )
    },
    **{f"refresh-{name}": _hold(None) for name in ("checkpoints", "loras", "vae")},  # nothing can have changed
}
# By path below /controlnet, for sd-webui-controlnet.
CONTROLNET_DOCUMENTS: Mapping[str, Document] = {
    "version": lambda *_: {"version": 3},
    "settings": lambda loaded, *_: {"control_net_unit_count": loaded.config.max_controls},
    "model_list": lambda loaded, *_: {"model_list": _list_models(loaded)},
    "module_list": lambda loaded, *_: _describe_modules(loaded),
    "control_types": lambda loaded, *_: _list_types(loaded),
}
