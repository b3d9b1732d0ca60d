"""Warnings about a request: what of it has no effect, or was perhaps meant otherwise."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sdxl_server.api.image_files import can_hold
from sdxl_server.api.image_metadata import describe_picture
from sdxl_server.diffusion.prompt_embedding import choose_chunks, join_fragments, make_provider, read_tokens
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.request.fields import GenerationRequest
from sdxl_server.request.prompt_weights import Fragment, parse_weights
from sdxl_server.request.prompts import AND, BREAK, EMBEDDING, LITERAL, PROMPTS, WEIGHTS
from sdxl_server.request.samplers import split_sampler
from sdxl_server.sampling.step_plan import has_halves
from sdxl_server.sampling.trials import measure_growth, write_config
from sdxl_server.schemas import shorten

SEND_JSON = "send Content-Type: application/json"
MAX_SHOWN = 5  # fragments of a prompt in one warning
MOST_GROWTH = 2.0  # of a model's errors; at 2.6 and 3.2 the demonstration model draws 3 to 5 of 8 right, at 1.7 all
MOST_STEPS = 50  # at which growth is looked for: it falls with them


def list_warnings(loaded: LoadedPipeline, request: GenerationRequest, *, told: Sequence[str] = ()) -> list[str]:
    """Return what of a request is left out, in words.

    Args:
        told: the warnings that there are already.
    """
    warnings = []
    for name in PROMPTS:
        if value := getattr(request, name):
            warnings += warn_of_syntax(name, value, is_weighted=loaded.config.weighted_prompts)
            warnings += warn_of_length(name, value, loaded.pipeline.tokenizer, chunks=choose_chunks(loaded))
    warnings += warn_of_sampling(loaded.pipeline.scheduler, request)
    if not has_halves(request.guidance_scale, loaded.pipeline.unet.config):
        scale = request.guidance_scale
        why = f"guidance_scale is {scale:g}" if scale <= 1 else "the guidance is an input of this model's UNet"
        given = [name for name in PROMPTS if name.startswith("negative") and getattr(request, name)]
        warnings += [f"{name} has no effect, since {why}" for name in given]
    for name in ("strength", "resize_mode"):
        if getattr(request, name) is not None and request.image is None:
            warnings.append(f"{name} has no effect without an image")
    if request.mask_image is not None:
        warnings += warn_of_mask(request.mask_image)
    described = describe_picture(loaded, request, 0, unet_calls=0, warnings=[*told, *warnings])
    if loaded.config.embed_parameters and not can_hold(request, described):
        warnings.append("the prompts are too long for a JPEG to hold what makes it again; PNG and WebP have room")
    return warnings


def warn_of_body(fields: Mapping[str, Any]) -> list[str]:
    """Return what of a request was perhaps meant otherwise."""
    prompt = fields.get("prompt")
    is_alike = isinstance(prompt, str) and prompt.lstrip()[:1] == "{" and prompt.rstrip()[-1:] == "}"
    return [f"the prompt looks like JSON and is drawn as text; for JSON {SEND_JSON}"] if is_alike else []


def warn_of_syntax(name: str, prompt: str, *, is_weighted: bool = False) -> list[str]:
    """Return a warning of what means something to other programs, none where there is nothing.

    Args:
        is_weighted: weights and BREAK mean something here too, see prompt_weights.py.
    """
    patterns = [*LITERAL, EMBEDDING, *(() if is_weighted else WEIGHTS)]
    if not prompt.isupper():
        patterns += [AND] if is_weighted else [AND, BREAK]
    found = [each.search(prompt) for each in patterns]
    starts = sorted({match.start(): match[0] for match in found if match}.items())
    if not starts:
        return []
    shown = ", ".join(shorten(text, length=40) for _, text in starts[:MAX_SHOWN])
    verbs = ("means", "is") if len(starts) == 1 else ("mean", "are")
    return [f"{name}: {shown} {verbs[0]} nothing here and {verbs[1]} read as plain words"]


def warn_of_length(name: str, prompt: str, tokenizer: Any, *, chunks: int) -> list[str]:
    """Return warnings of what of a prompt the text encoders do not read.

    Args:
        chunks: see `choose_chunks`.
    """
    most, parts = tokenizer.model_max_length, parse_weights(prompt) if chunks else [[Fragment(prompt, 1.0)]]
    if chunks > 1:
        made = len(read_tokens(make_provider(tokenizer, None, chunks), parts)[0]) // most
        return [f"{name} makes {made} chunks of {most} tokens; the first {chunks} are read"] if made > chunks else []
    warnings = []
    if len(parts) > 1:
        warnings.append(f"{name}: BREAK begins no chunk here, where graphs for one size read a single one")
    count = len(tokenizer(join_fragments(parts)).input_ids)
    if count > most:
        warnings.append(f"{name} has {count} tokens; the text encoder reads the first {most}")
    return warnings


def warn_of_mask(mask: Any) -> list[str]:
    """Return what is odd about a mask, in words."""
    rule = "a mask is transparent, or without transparency white, where the image is painted anew"
    told = {0: "protects all of the image, of which nothing is painted anew", 255: "protects nothing of the image"}
    low, high = mask.getextrema()
    return [f"the mask {told[low]}; {rule}"] if low == high else []


def warn_of_sampling(own: Any, request: GenerationRequest) -> list[str]:
    """Return what the scheduler that a request names makes of it, in words.

    A solver of high order reckons with the changes of the model's predictions, and with its errors too: how much that
    is depends on its options and on the number of steps.
    """
    name, options = split_sampler(request.scheduler or type(own).__name__)
    if not options or request.schedule_field is not None or request.num_inference_steps > MOST_STEPS:
        return []
    written = json.dumps(options, sort_keys=True)
    growth = measure_growth(write_config(own), name, written, steps=request.num_inference_steps)
    if growth <= MOST_GROWTH:
        return []
    return [
        f"{name} with these options makes the model's errors {growth:.1f} times as large in "
        f"{request.num_inference_steps} steps; more steps or a lower solver_order draw better"
    ]
