"""Warnings about a request: parts without effect, and likely mistakes."""

from collections.abc import Mapping, Sequence
from typing import Any

from sdxl_server.api.bodies import SEND_JSON
from sdxl_server.api.image_encoding import has_room
from sdxl_server.api.image_metadata import describe_image
from sdxl_server.diffusion.prompt_embedding import build_embeddings_provider, choose_chunks, join_fragments, read_tokens
from sdxl_server.model.embeddings import expand, replace_names
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.request.adapters import ADAPTERS_EXAMPLE
from sdxl_server.request.fields import GenerationRequest
from sdxl_server.request.limits import Limits
from sdxl_server.request.masks import KEPT_DRAWING
from sdxl_server.request.prompt_weights import Fragment, parse_weights
from sdxl_server.request.prompts import AND, BREAK, FOREIGN, LITERAL, PROMPTS, TAG, WEIGHTS
from sdxl_server.request.samplers import SAMPLERS, SIGMA_SCHEDULES, split_sampler
from sdxl_server.request.uploads import MASK
from sdxl_server.sampling.step_plan import has_halves
from sdxl_server.schemas import shorten

MAX_SHOWN = 5  # fragments of a prompt in one warning
MAX_NAMED = 10  # unknown fields in one warning
MIN_STEPS_OF_ORDER_3 = 25  # with fewer, steps of uneven length multiply the model's errors by 2 to 3


def list_warnings(loaded: LoadedPipeline, request: GenerationRequest, *, earlier: Sequence[str] = ()) -> list[str]:
    """Return the warnings about a checked request.

    Args:
        earlier: the warnings from reading the request; the metadata contains them too.
    """
    warnings = []
    for name in PROMPTS:
        if value := getattr(request, name):
            plain = replace_names(value, loaded.embeddings, lambda each: each.name)
            warnings += warn_of_syntax(name, plain, is_weighted=loaded.config.weighted_prompts)
            read = expand(value, loaded.embeddings)
            warnings += warn_of_length(name, read, loaded.own_tokenizer, chunks=choose_chunks(loaded))
    warnings += warn_of_sampling(request)
    if not has_halves(request.guidance_scale, loaded.pipeline.unet.config):
        scale = request.guidance_scale
        why = f"guidance_scale is {scale:g}" if scale <= 1 else "this model's UNet has the guidance as an input"
        given = [name for name in PROMPTS if name.startswith("negative") and getattr(request, name)]
        warnings += [f"{name} has no effect: {why}" for name in given]
    of_masks = ("invert_mask", "mask_blur", "mask_fill", "padding_mask_crop")
    uploads = {"image": ("strength", "resize_mode"), MASK: of_masks}
    for name, upload in ((name, upload) for upload, names in uploads.items() for name in names):
        is_used = name == "resize_mode" and request.control is not None
        if getattr(request, name) is not None and getattr(request, upload) is None and not is_used:
            warnings.append(f"{name} has no effect without {'a mask' if upload == MASK else 'an image'}")
    if request.mask_image is not None:
        warnings += warn_of_mask(request.mask_image)
    if request.stream and request.partial_images and loaded.config.safety_checker is not None:
        warnings.append("partial_images has no effect here: the safety checker cannot check previews")
    described = describe_image(loaded, request, 0, unet_calls=0, warnings=[*earlier, *warnings])
    if loaded.config.embed_parameters and not has_room(request, described):
        warnings.append("the prompts are too long for a JPEG's metadata, which is left out; use PNG or WebP")
    return warnings


def warn_of_body(fields: Mapping[str, Any]) -> list[str]:
    """Return a warning if the prompt looks like JSON."""
    prompt = fields.get("prompt")
    is_json = isinstance(prompt, str) and prompt.lstrip()[:1] == "{" and prompt.rstrip()[-1:] == "}"
    return [f"the prompt looks like JSON but is used as text; for JSON {SEND_JSON}"] if is_json else []


def warn_of_tags(fields: Mapping[str, Any], limits: Limits) -> list[str]:
    """Return a warning of tags of adapters that are left out of a prompt."""
    warnings = []
    for name in PROMPTS:
        found = TAG.finditer(fields[name]) if isinstance(fields.get(name), str) else ()
        is_applied = limits.config.lora_tags and not name.startswith("negative")
        left = [each[0].strip() for each in found if not is_applied or each[1].lower() == "hypernet"]
        if left:
            advice = f"name adapters in the field adapters, such as {ADAPTERS_EXAMPLE}" if limits.adapters else ""
            shown = ", ".join(shorten(each, length=40) for each in left[:MAX_SHOWN])
            warnings.append(f"{name}: {shown} left out; {advice or 'this server has no adapters'}")
    return warnings


def warn_of_unknown(names: Sequence[str]) -> list[str]:
    """Return a warning of OpenAI's or other fields that do not exist here."""
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    shown = ", ".join(shorten(name) for name in names[:MAX_NAMED])
    return [f"ignored, since there is no such field: {shown}{more}"] if names else []


def warn_of_values(fields: Mapping[str, Any], *, accepted: Mapping[str, Sequence[str]]) -> list[str]:
    """Return warnings of values that have no effect here.

    Args:
        accepted: by field, the values that need no warning.
    """
    return [
        f"{name} has no effect here with {shorten(value)}, but with {', '.join(accepted[name])}"
        + ("; the image is opaque" if name == "background" else "")
        for name, value in fields.items()
        if value not in accepted[name]
    ]


def warn_of_long_prompts(fields: Mapping[str, Any], *, most: int) -> list[str]:
    """Return warnings of prompts that are cut to `most` characters."""
    lengths = {name: len(fields[name]) for name in PROMPTS if isinstance(fields.get(name), str)}
    return [
        f"{name} has {length} characters; the first {most} are read"
        for name, length in lengths.items()
        if length > most
    ]


def warn_of_syntax(name: str, prompt: str, *, is_weighted: bool = False) -> list[str]:
    """Return a warning of other programs' syntax in a prompt.

    Args:
        is_weighted: weights and BREAK have a meaning here too, see prompt_weights.py.
    """
    patterns = [*LITERAL, *FOREIGN, *(() if is_weighted else WEIGHTS)]
    if not prompt.isupper():
        patterns += [AND] if is_weighted else [AND, BREAK]
    found = [each.search(prompt) for each in patterns]
    starts = sorted({match.start(): match[0] for match in found if match}.items())
    if not starts:
        return []
    shown = ", ".join(shorten(text, length=40) for _, text in starts[:MAX_SHOWN])
    verbs = ("has", "is") if len(starts) == 1 else ("have", "are")
    return [f"{name}: {shown} {verbs[0]} no special meaning here and {verbs[1]} read as plain words"]


def warn_of_length(name: str, prompt: str, tokenizer: Any, *, chunks: int) -> list[str]:
    """Return warnings of the part of a prompt that the text encoders do not read.

    Args:
        chunks: see `choose_chunks`.
    """
    most, parts = tokenizer.model_max_length, parse_weights(prompt) if chunks else [[Fragment(prompt, 1.0)]]
    if chunks > 1:
        made = len(read_tokens(build_embeddings_provider(tokenizer, None, chunks), parts)[0]) // most
        return [f"{name} makes {made} chunks of {most} tokens; the first {chunks} are read"] if made > chunks else []
    warnings = []
    if len(parts) > 1:
        warnings.append(f"{name}: BREAK starts no new chunk here: graphs for one size read one chunk")
    count = len(tokenizer(join_fragments(parts)).input_ids)
    if count > most:
        warnings.append(f"{name} has {count} tokens; the text encoder reads the first {most}")
    return warnings


def warn_of_mask(mask: Any) -> list[str]:
    """Return a warning of a mask that protects everything, nothing, or strokes that were drawn."""
    low, high = mask.getextrema()
    protects = {0: "everything: nothing is repainted", 255: "nothing: everything is repainted"}
    rule = "a mask is repainted where it is transparent, or white if nothing is transparent"
    if mask.info.get(KEPT_DRAWING):
        return [
            "the mask has strokes of one colour on a transparent canvas, and everything but the strokes is repainted; "
            "invert_mask: true repaints the strokes"
        ]
    return [f"the mask protects {protects[low]}; {rule}"] if low == high else []


def warn_of_sampling(request: GenerationRequest) -> list[str]:
    """Return a warning of options that make much of the model's errors in few steps."""
    name, options = split_sampler(request.scheduler or "")
    is_uneven = any(options.get(each) for each in SIGMA_SCHEDULES) and "solver_order" in SAMPLERS[name].options
    is_steep = options.get("solver_order") == 3 or options.get("use_beta_sigmas")
    is_short = request.schedule_field is None and request.num_inference_steps < MIN_STEPS_OF_ORDER_3
    if not (is_uneven and is_steep and is_short):
        return []
    return [
        f"{name} with these options increases the model's errors in {request.num_inference_steps} steps; "
        f"{MIN_STEPS_OF_ORDER_3} steps, solver_order 2 or another sigma schedule give a better image"
    ]
