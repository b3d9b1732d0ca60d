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

MAX_CHUNKS = 10  # of a prompt; each takes one call of the text encoders


def choose_chunks(loaded: LoadedPipeline) -> int:
    """Return how many chunks of a prompt are read, 0 without weights. A static graph has room for one."""
    if not loaded.config.weighted_prompts:
        return 0
    return 1 if loaded.graphs == "static" and loaded.config.compile_unet else MAX_CHUNKS


def embed_prompts(pipeline: Any, request: GenerationRequest, family: Family, *, chunks: int) -> dict[str, Any]:
    """Return the pipeline arguments that replace the prompts; none for plain prompts.

    diffusers itself encodes plain prompts of one chunk, so those images stay the same to the last bit.

    Args:
        pipeline: the image's own. Its text encoders are called.
        chunks: see `choose_chunks`.
    """
    import torch

    @functools.cache
    def provide(name: str, skip: int | None) -> Any:
        encoder = _Encoder(getattr(pipeline, name), skip, is_xl=family.is_xl)
        return build_embeddings_provider(getattr(pipeline, name.replace("text_encoder", "tokenizer")), encoder, chunks)

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
            if family.is_xl:  # from the last encoder
                embedded[f"{side}pooled_prompt_embeds"] = provider.get_pooled_embeddings([text])
    return embedded


def _list_sides(pipeline: Any, request: GenerationRequest) -> list[tuple[str, tuple[str, str], int | None]]:
    """Return prefix, the two texts and the layers to skip: for the prompt, and for a negative prompt with an effect.

    These are diffusers' rules. Without a negative prompt SDXL uses zeros, which diffusers makes. clip_skip does not
    apply to negative prompts.
    """
    sides = [("", (request.prompt, request.prompt_2 or request.prompt), request.clip_skip)]
    is_given = request.negative_prompt is not None or request.negative_prompt_2 is not None
    if request.guidance_scale > 1 and (is_given or not pipeline.config.get("force_zeros_for_empty_prompt", False)):
        negative = request.negative_prompt or ""
        sides.append(("negative_", (negative, request.negative_prompt_2 or negative), None))
    return sides


class _Encoder:
    """A text encoder for compel: it calls the image's stand-in as diffusers calls it.

    So the graphs that are already compiled run. Encoded chunks are kept, because the empty prompt is needed often.

    Args:
        model: the image's stand-in.
        skip: the request's clip_skip.
        is_xl: the model is SDXL, where diffusers reads another layer.
    """

    def __init__(self, model: Any, skip: int | None, *, is_xl: bool) -> None:
        self.device, self.dtype = model.device, model.dtype
        self._model, self._skip, self._is_xl = model, skip, is_xl
        self._known: dict[tuple[int, ...], Any] = {}

    def __call__(self, ids: Any, attention_mask: Any = None, **_: Any) -> Any:
        """Return the embeddings of a chunk, and the pooled embedding from SDXL's second encoder."""
        key = tuple(ids.flatten().tolist())
        if key not in self._known:
            self._known[key] = self._encode(ids.long())  # compel's empty prompt is in int32
        return self._known[key]

    def _encode(self, ids: Any) -> Any:
        if self._is_xl:
            output = self._model(ids, output_hidden_states=True)
            chosen = output.hidden_states[-2 - (self._skip or 0)]
        elif self._skip is None:
            chosen = (output := self._model(ids, attention_mask=None))[0]
        else:
            output = self._model(ids, attention_mask=None, output_hidden_states=True)
            chosen = self._model.text_model.final_layer_norm(output.hidden_states[-1 - self._skip])
        return SimpleNamespace(last_hidden_state=chosen, pooler_output=output[0])


def join_fragments(parts: list[list[Fragment]]) -> str:
    """Return a prompt's words without weights."""
    return " ".join(each.text for part in parts for each in part)


def build_embeddings_provider(tokenizer: Any, encoder: Any, chunks: int) -> Any:
    from compel import EmbeddingsProvider, SplitLongTextMode

    device = "cpu" if encoder is None else encoder.device
    mode = SplitLongTextMode.SENTENCES  # then phrases, then words; no word is cut
    return EmbeddingsProvider(tokenizer, encoder, truncate=chunks == 1, device=device, split_long_text_mode=mode)


def read_tokens(provider: Any, parts: list[list[Fragment]]) -> tuple[Any, Any]:
    """Return a prompt's tokens in whole chunks, and their weights. Each part begins a new chunk."""
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
