"""The entries of `embeddings` in the handler section of model-config.yaml."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdxl_server.config.declaration import declare, read_section
from sdxl_server.errors import ConfigError
from sdxl_server.schemas import any_text, shorten

# A name stands alone in a prompt. So it is no punctuation, no number and no word of the prompts' own syntax.
EMBEDDING_NAME = {
    "type": "string",
    "pattern": r"\A(?!(?i:break)\Z)(?=.*[^\W\d_])\w(?:[\w.-]{0,62}\w)?\Z",
    "x-accepted": (
        "one word of at most 64 letters, digits, - _ and ., with a letter, without . or - at its ends, and not BREAK"
    ),
}


@dataclass(frozen=True)
class EmbeddingConfig:
    """An entry of `embeddings` in the handler section."""

    name: str = declare(EMBEDDING_NAME, "its name in prompts, in small or capital letters")
    path: str = declare(any_text("a .safetensors file"), "file of a textual inversion, inside the archive or absolute")


def read_embedding_settings(entries: Sequence[Any]) -> tuple[EmbeddingConfig, ...]:
    """Check the list `embeddings` of the handler section and return it.

    Raises:
        ConfigError: names the entry, its key, what is accepted and what was given.
    """
    embeddings = tuple(
        read_section(EmbeddingConfig, each, f"handler.embeddings[{index}]") for index, each in enumerate(entries)
    )
    names = [each.name.casefold() for each in embeddings]
    for index, each in enumerate(embeddings):
        if names[index] in names[:index]:
            raise ConfigError(
                f"handler.embeddings[{index}].name takes a name that no other embedding has, also in capital letters, "
                f"not {shorten(each.name)}"
            )
    return embeddings
