"""Prompts as A1111's users write them: weights, BREAK, and more tokens than a text encoder takes at once.

The syntax is A1111's. compel cuts a prompt into chunks, of which each goes through the text encoder by itself, and
weighs each word by how far it stands from an empty prompt, as ComfyUI does; the UNet reads the chunks as one text.
"""

import functools
import re
from types import SimpleNamespace
from typing import Any, NamedTuple

from sdxl_server.config.settings import HandlerConfig
from sdxl_server.errors import RequestError
from sdxl_server.model.families import Family
from sdxl_server.request.fields import GenerationRequest
from sdxl_server.request.prompts import LITERAL, PROMPTS
from sdxl_server.schemas import shorten

MAX_CHUNKS = 10  # of a prompt; a call of the text encoders each
MAX_WEIGHT = 10.0  # beyond it models make noise, and float16 may overflow
FACTORS = {"(": 1.1, "[": 1 / 1.1}
TOKEN = re.compile(
    rf"""
      (?P<literal>{"|".join(f"(?:{each.pattern})" for each in LITERAL)})
    | \\(?P<escaped>[()\[\]\\]?)
    | (?P<open>[(\[])
    | :\s*(?P<weight>[-+]?[.\d]+)\s*\)
    | (?P<close>[)\]])
    | (?P<break>\bBREAK\b)
    | (?:(?!\bBREAK\b)[^\\()\[\]:<])+
    | .
    """,
    re.VERBOSE | re.DOTALL,
)


class Fragment(NamedTuple):
    """Words of one weight."""

    text: str
    weight: float


def choose_chunks(config: HandlerConfig, graphs: str | None) -> int:
    """Return how many chunks of a prompt are read, 0 where its syntax is not; a static graph has room for one."""
    if not config.weighted_prompts:
        return 0
    return 1 if graphs == "static" and config.compile_unet else MAX_CHUNKS


def parse_weights(prompt: str) -> list[list[Fragment]]:
    """Return a prompt's words with their weights, in the parts that BREAK makes of it.

    As in A1111 `(` weighs by 1.1 and `[` by 1 / 1.1, nested ones multiply, one that is not closed goes on to the end,
    and one that closes nothing is a plain bracket.

    Raises:
        ValueError: what stands as a weight is none, or a weight is too large; says so after the field's name.
    """
    found: list[tuple[str | None, float]] = []  # None is BREAK
    opened: dict[str, list[int]] = {bracket: [] for bracket in FACTORS}

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        found[start:] = [(text, weight * factor) for text, weight in found[start:]]

    for match in TOKEN.finditer(prompt):
        opening = "[" if match["close"] == "]" else "("
        if match["open"]:
            opened[match["open"]].append(len(found))
        elif (match["weight"] or match["close"]) and opened[opening]:
            close(opening, _read_number(match["weight"]) if match["weight"] else FACTORS[opening])
        else:
            plain = match[0] if match["escaped"] is None else match["escaped"]  # "" of a backslash before other text
            found.append((None if match["break"] else plain, 1.0))
    for bracket, starts in opened.items():
        while starts:
            close(bracket, FACTORS[bracket])
    return _merge(found)


def _read_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"takes weights such as (word:1.3), not {shorten(text)}") from None


def _merge(found: list[tuple[str | None, float]]) -> list[list[Fragment]]:
    """Return the parts that say something, neighbours of one weight made one."""
    parts: list[list[Fragment]] = [[]]
    for text, weight in found:
        if text is None:
            parts.append([])
            continue
        if not abs(weight) <= MAX_WEIGHT:
            raise ValueError(
                f"takes weights from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}, nested ones multiplied, and {shorten(text)} "
                rf"has {weight:g}; brackets that are meant as such are written \( and \)"
            )
        last = parts[-1].pop() if parts[-1] and parts[-1][-1].weight == weight else Fragment("", weight)
        parts[-1].append(Fragment(last.text + text, weight))
    said = [part for part in parts if any(each.text.strip() for each in part)]
    return said or [[Fragment("", 1.0)]]


def check_weights(request: GenerationRequest) -> None:
    """Refuse prompts with weights that cannot be.

    Raises:
        RequestError: names the field.
    """
    for name in PROMPTS:
        try:
            parse_weights(getattr(request, name) or "")
        except ValueError as error:
            raise RequestError(f"{name} {error}", param=name) from error


def find_cuts(name: str, prompt: str, tokenizer: Any, *, chunks: int) -> list[str]:
    """Return warnings of what of a prompt the text encoders do not read.

    Args:
        chunks: see `choose_chunks`.
    """
    most, parts = tokenizer.model_max_length, parse_weights(prompt) if chunks else [[Fragment(prompt, 1.0)]]
    if chunks > 1:
        made = len(_read_tokens(_make_provider(tokenizer, None, chunks), parts)[0]) // most
        return [f"{name} makes {made} chunks of {most} tokens; the first {chunks} are read"] if made > chunks else []
    warnings = []
    if len(parts) > 1:
        warnings.append(f"{name}: BREAK begins no chunk here, where graphs for one size read a single one")
    count = len(tokenizer(_join(parts)).input_ids)
    if count > most:
        warnings.append(f"{name} has {count} tokens; the text encoder reads the first {most}")
    return warnings


def embed_prompts(pipeline: Any, request: GenerationRequest, family: Family, *, chunks: int) -> dict[str, Any]:
    """Return what a pipeline is given in the place of the prompts, nothing where they are plain.

    Plain ones of one chunk go diffusers' way, so that their pictures are the same to the last bit.

    Args:
        pipeline: the picture's own, through whose text encoders all goes.
        chunks: see `choose_chunks`.
    """
    import torch

    @functools.cache
    def provide(name: str, skip: int | None) -> Any:
        encoder = _Encoder(getattr(pipeline, name), skip, is_xl=family.is_xl)
        return _make_provider(getattr(pipeline, name.replace("text_encoder", "tokenizer")), encoder, chunks)

    read, is_plain = [], True
    for side, texts, skip in _list_sides(pipeline, request):
        for name, text in zip(family.text_encoders, texts, strict=False):
            provider, parts = provide(name, skip), parse_weights(text)
            most = provider.max_token_count
            ids, weights = (each[: chunks * most] for each in _read_tokens(provider, parts))
            is_plain &= parts == [[Fragment(text, 1.0)]] and len(ids) == most
            read.append((side, provider, ids, weights, _join(parts)))
    if is_plain:
        return {}
    longest = max(len(ids) for _, _, ids, _, _ in read)
    embedded: dict[str, Any] = {}
    with torch.no_grad():
        for side, provider, ids, weights, text in read:
            rows = provider.build_weighted_embedding_tensor(ids, weights)
            empty = [provider.empty_z] * ((longest - len(ids)) // provider.max_token_count)
            rows = torch.cat([rows, *empty], dim=1).to(provider.text_encoder.dtype)
            before = [embedded[f"{side}prompt_embeds"]] if f"{side}prompt_embeds" in embedded else []
            embedded[f"{side}prompt_embeds"] = torch.cat([*before, rows], dim=-1)
            if family.is_xl:  # the last encoder's
                embedded[f"{side}pooled_prompt_embeds"] = provider.get_pooled_embeddings([text])
    return embedded


def _list_sides(pipeline: Any, request: GenerationRequest) -> list[tuple[str, tuple[str, str], int | None]]:
    """Return of the prompt, and of the negative one where it has an effect, the two texts and the layers to skip.

    They are diffusers' rules: without a negative prompt SDXL takes zeros, which it makes itself, and no layer of a
    negative prompt is skipped.
    """
    sides = [("", (request.prompt, request.prompt_2 or request.prompt), request.clip_skip)]
    is_given = request.negative_prompt is not None or request.negative_prompt_2 is not None
    if request.guidance_scale > 1 and (is_given or not pipeline.config.get("force_zeros_for_empty_prompt", False)):
        negative = request.negative_prompt or ""
        sides.append(("negative_", (negative, request.negative_prompt_2 or negative), None))
    return sides


def _join(parts: list[list[Fragment]]) -> str:
    return " ".join(each.text for part in parts for each in part)


def _make_provider(tokenizer: Any, encoder: Any, chunks: int) -> Any:
    from compel import EmbeddingsProvider, SplitLongTextMode

    device = "cpu" if encoder is None else encoder.device
    mode = SplitLongTextMode.SENTENCES  # or else phrases, or else words, of which none is cut
    return EmbeddingsProvider(tokenizer, encoder, truncate=chunks == 1, device=device, split_long_text_mode=mode)


def _read_tokens(provider: Any, parts: list[list[Fragment]]) -> tuple[Any, Any]:
    """Return the tokens of a prompt in whole chunks, each part beginning one, and their weights."""
    import torch

    if provider.truncate_to_model_max_length:
        parts = [[each for part in parts for each in part]]
    ids, weights = [], []
    for part in parts:
        texts, factors = [each.text for each in part], [each.weight for each in part]
        found = provider.get_token_ids_and_expand_weights(texts, factors, device=provider.device)
        ids.append(found[0])
        weights.append(found[1])
    return torch.cat(ids), torch.cat(weights)


class _Encoder:
    """What compel calls in the place of a text encoder: one picture's part, called as diffusers calls it.

    So the graphs run that are compiled already. What was encoded once is kept: a weighted prompt is compared with an
    empty one, and others are filled up with it.

    Args:
        part: the picture's.
        skip: the request's clip_skip.
        is_xl: of which kind of model it is, which diffusers take from different layers.
    """

    def __init__(self, part: Any, skip: int | None, *, is_xl: bool) -> None:
        self.device, self.dtype = part.device, part.dtype
        self._part, self._skip, self._is_xl = part, skip, is_xl
        self._known: dict[tuple[int, ...], Any] = {}

    def __call__(self, ids: Any, attention_mask: Any = None, **_: Any) -> Any:
        """Return the embeddings of a chunk, and with SDXL's second encoder the pooled one."""
        key = tuple(ids.flatten().tolist())
        if key not in self._known:
            self._known[key] = self._encode(ids.long())  # compel's empty prompt is in int32
        return self._known[key]

    def _encode(self, ids: Any) -> Any:
        if self._is_xl:
            output = self._part(ids, output_hidden_states=True)
            chosen = output.hidden_states[-2 - (self._skip or 0)]
        elif self._skip is None:
            chosen = (output := self._part(ids, attention_mask=None))[0]
        else:
            output = self._part(ids, attention_mask=None, output_hidden_states=True)
            chosen = self._part.text_model.final_layer_norm(output.hidden_states[-1 - self._skip])
        return SimpleNamespace(last_hidden_state=chosen, pooler_output=output[0])
