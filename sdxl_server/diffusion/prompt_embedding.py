"""Embeddings of weighted and long prompts, by compel, from the compiled text encoders.

compel cuts a prompt into chunks. Each chunk goes through the text encoder alone. The UNet reads all chunks as one text.
A weight moves a word away from an empty prompt, as in ComfyUI.
"""

import functools
from types import SimpleNamespace
from typing import Any

from sdxl_server.model.families import Family
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.request.fields import GenerationRequest
from sdxl_server.request.prompt_weights import Fragment, parse_weights

MAX_CHUNKS = 10  # of a prompt; a call of the text encoders each


def choose_chunks(loaded: LoadedPipeline) -> int:
    """Return how many chunks of a prompt are read, 0 where its syntax is not; a static graph has room for one."""
    if not loaded.config.weighted_prompts:
        return 0
    return 1 if loaded.graphs == "static" and loaded.config.compile_unet else MAX_CHUNKS


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
        return make_provider(getattr(pipeline, name.replace("text_encoder", "tokenizer")), encoder, chunks)

    read, is_plain = [], True
    for side, texts, skip in _list_sides(pipeline, request):
        for name, text in zip(family.text_encoders, texts, strict=False):
            provider, parts = provide(name, skip), parse_weights(text)
            most = provider.max_token_count
            ids, weights = (each[: chunks * most] for each in read_tokens(provider, parts))
            is_plain &= parts == [[Fragment(text, 1.0)]] and len(ids) == most
            read.append((side, provider, ids, weights, join_fragments(parts)))
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


def join_fragments(parts: list[list[Fragment]]) -> str:
    return " ".join(each.text for part in parts for each in part)


def make_provider(tokenizer: Any, encoder: Any, chunks: int) -> Any:
    from compel import EmbeddingsProvider, SplitLongTextMode

    device = "cpu" if encoder is None else encoder.device
    mode = SplitLongTextMode.SENTENCES  # or else phrases, or else words, of which none is cut
    return EmbeddingsProvider(tokenizer, encoder, truncate=chunks == 1, device=device, split_long_text_mode=mode)


def read_tokens(provider: Any, parts: list[list[Fragment]]) -> tuple[Any, Any]:
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
