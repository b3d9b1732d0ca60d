"""Embeddings (textual inversion): names in prompts that stand for vectors of the text encoders.

The tokenizers get a token for each vector, and the text encoders a row, before compilation. In a prompt the tokens
replace the name before the tokenizers read it. Other prompts have no such tokens and are encoded as without embeddings.
"""

import dataclasses
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_server.config.settings import HandlerConfig
from sdxl_server.convert.digests import compute_autov2
from sdxl_server.errors import ConfigError
from sdxl_server.model.embedding_files import read_embedding
from sdxl_server.model.families import Family
from sdxl_server.request.fields import GenerationRequest
from sdxl_server.request.prompts import PROMPTS

TOKEN_MARKS = ("\ue000", "\ue001")  # no language has these characters
WORD_END = "</w>"  # as in CLIP's own tokens; a chunk may end there
MARKERS = 2  # the first and the last token of a prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Embedding:
    """A loaded embedding.

    Attributes:
        name: its name in prompts.
        sha256: the digest of its file.
        vectors: the number of its vectors, each a token of a prompt.
        widths: of a vector, by text encoder.
        tokens: what stands for the name in a prompt that the tokenizers read.
    """

    name: str
    sha256: str
    vectors: int
    widths: Mapping[str, int]
    tokens: str

    def describe(self) -> dict[str, Any]:
        """Return its entry in a report."""
        digests = {"sha256": self.sha256, "autov2": compute_autov2(self.sha256)}
        return {"name": self.name, **digests, "vectors": self.vectors}


def load_embeddings(pipeline: Any, family: Family, config: HandlerConfig, *, model_dir: Path) -> tuple[Embedding, ...]:
    """Return the configured embeddings; add their vectors to the text encoders.

    Args:
        model_dir: where a relative path is looked up.

    Raises:
        ConfigError: names the entry that does not fit.
    """
    encoders = {name: getattr(pipeline, name) for name in family.text_encoders}
    widths = {name: each.get_input_embeddings().embedding_dim for name, each in encoders.items()}
    tokenizers = {name: getattr(pipeline, name.replace("text_encoder", "tokenizer")) for name in encoders}
    most = min(each.model_max_length for each in tokenizers.values()) - MARKERS
    loaded: list[Embedding] = []
    tokens: list[str] = []
    rows: dict[str, list[Any]] = {name: [] for name in encoders}
    for index, entry in enumerate(config.embeddings or ()):
        try:
            digest, vectors = read_embedding(model_dir / entry.path, entry.name, widths, most=most)
            for name, each in vectors.items():
                rows[name].append(_convert(each, encoders[name].dtype))
        except ConfigError as error:
            raise ConfigError(f"handler.embeddings[{index}].path: {error}") from error
        count = len(next(iter(vectors.values())))
        own = [f"{len(tokens) + each}".join(TOKEN_MARKS) for each in range(count)]
        own[-1] += WORD_END
        tokens += own
        loaded.append(Embedding(entry.name, digest, count, widths, "".join(own)))
        if len(tokenizers["text_encoder"].tokenize(entry.name)) == 1:
            logger.warning(
                "handler.embeddings[%d].name: %s is also a word of the model; in prompts it means the embedding",
                index,
                entry.name,
            )
    if loaded:
        for name, encoder in encoders.items():
            _add_tokens(tokenizers[name], encoder, tokens, rows[name])
    return tuple(loaded)


def _convert(vectors: Any, dtype: Any) -> Any:
    """Return vectors in the type of the weights.

    Raises:
        ConfigError: they are too large for it.
    """
    import torch

    converted = vectors.to(dtype)
    if not torch.isfinite(converted).all():
        raise ConfigError(f"its vectors are too large for {dtype}")
    return converted


def _add_tokens(tokenizer: Any, encoder: Any, tokens: Sequence[str], rows: Sequence[Any]) -> None:
    """Add a token for each row, and the rows to a text encoder."""
    import torch
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken(each, normalized=False) for each in tokens])
    embedding = encoder.get_input_embeddings()
    weight = embedding.weight
    joined = torch.cat([weight.data, *(each.to(weight.device) for each in rows)])
    embedding.weight = torch.nn.Parameter(joined, requires_grad=weight.requires_grad)
    embedding.num_embeddings = encoder.config.vocab_size = len(joined)
    # Published models name token 2 as the end of a prompt. transformers then takes the highest token for the end, and
    # the new ones are higher. Without them both ways find the same place.
    getattr(encoder, "text_model", encoder).eos_token_id = tokenizer.eos_token_id


def replace_names(prompt: str, embeddings: Sequence[Embedding], write: Callable[[Embedding], str]) -> str:
    """Return a prompt with another text for each name of an embedding.

    A name counts as a whole word, in small or capital letters, as in A1111. `<name>` (diffusers) and `embedding:name`
    (ComfyUI) mean the same.
    """
    if not embeddings:
        return prompt
    longest_first = sorted(embeddings, key=lambda each: -len(each.name))
    names = "|".join(f"({re.escape(each.name)})" for each in longest_first)
    pattern = (
        rf"(?:(?P<open><)|(?<!\w))(?P<file>embedding:)?(?:{names})"
        r"(?(file)(?:\.(?:safetensors|pt|bin))?)(?!\w)(?(open)>)"
    )

    def choose(match: re.Match[str]) -> str:
        number = next(index for index, text in enumerate(match.groups()[2:]) if text is not None)
        return write(longest_first[number])

    return re.sub(pattern, choose, prompt, flags=re.IGNORECASE)


def expand_prompts(request: GenerationRequest, embeddings: Sequence[Embedding]) -> GenerationRequest:
    """Return a request whose prompts have tokens instead of embeddings' names."""
    prompts = {name: getattr(request, name) for name in PROMPTS}
    expanded: dict[str, Any] = {name: text and expand(text, embeddings) for name, text in prompts.items()}
    return dataclasses.replace(request, **expanded)


def expand(prompt: str, embeddings: Sequence[Embedding]) -> str:
    """Return a prompt with tokens instead of embeddings' names."""
    return replace_names(prompt, embeddings, lambda each: each.tokens)


def list_used_embeddings(request: GenerationRequest, embeddings: Sequence[Embedding]) -> list[dict[str, Any]]:
    """Return the embeddings that a request's prompts name, as reports show them."""
    text = "\n".join(getattr(request, name) or "" for name in PROMPTS)
    used: list[str] = []

    def note(embedding: Embedding) -> str:
        used.append(embedding.name)
        return ""

    replace_names(text, embeddings, note)
    return [each.describe() for each in embeddings if each.name in used]
