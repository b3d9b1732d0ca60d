"""A model's folder: is it whole, which of its weights are read, and which command mends it."""

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdxl_server.errors import ConfigError

HALF = ".fp16"  # of a variant's files, as in model.fp16.safetensors
POINTER = b"version https://git-lfs"


def write_remedy(folder: Path) -> str:
    """Return the command that makes a folder anew beside it, from where it came as far as the folder tells."""
    told = read_json(folder / "source.json")
    model = told.get("model") or read_json(folder / "model_index.json").get("_name_or_path")
    words = ["python", "Download_model.py"]
    if isinstance(model, str) and re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", model):
        words += ["--model", model]
        revision = told.get("revision")
        words += ["--revision", revision] if isinstance(revision, str) and re.fullmatch(r"\w{1,64}", revision) else []
    else:
        words += ["--model", "<its id on the hub>"]
    return shlex.join([*words, "--output-dir", f"{folder}-whole"])


def write_copy(folder: Path, *, option: str = "--model") -> str:
    """Return the command that copies of a folder what a pipeline needs, or with the option `--vae` what a VAE needs."""
    return shlex.join(["python", "Download_model.py", option, str(folder), "--output-dir", f"{folder}-whole"])


def check_whole(folder: Path) -> None:
    """Refuse a folder that lacks weights, in one line with the command that mends it.

    Raises:
        ConfigError: names the file or the part.
    """
    for path in sorted(folder.glob("*/*")):
        if path.suffix in (".safetensors", ".json", ".txt") and path.is_file() and path.stat().st_size < 1000:
            with path.open("rb") as file:
                if file.read(len(POINTER)) == POINTER:
                    command = shlex.join(["git", "-C", str(folder), "lfs", "pull"])
                    raise ConfigError(
                        f"{path} is a pointer of Git LFS, not the file itself, which is fetched by: {command}"
                    )
    for index in sorted(folder.glob("*/*.safetensors.index*.json")):
        named = read_json(index).get("weight_map")
        shards = set(named.values()) if isinstance(named, Mapping) else set()
        missing = sorted(name for name in shards if isinstance(name, str) and not (index.parent / name).exists())
        if missing:
            raise ConfigError(f"{index} names {missing[0]}, which is not there: {write_remedy(folder)}")


def find_variant(folder: Path) -> str | None:
    """Return `fp16` where some part has its weights under that name only, None where all have plain ones."""
    for part in read_json(folder / "model_index.json"):
        variant = name_variant(folder.glob(f"{part}/*.safetensors")) if part.isidentifier() else None
        if variant is not None:
            return variant
    return None


def name_variant(weights: Iterable[Path]) -> str | None:
    """Return `fp16` where all these files of a part are of that variant, None where one is plain or there is none."""
    names = [path.name for path in weights]
    return HALF.removeprefix(".") if names and all(HALF in name for name in names) else None


def check_texts(pipeline: Any, text_encoders: Sequence[str], folder: Path) -> None:
    """Refuse a tokenizer that is not its text encoder's, and let each read as much as that does.

    A tokenizer without a vocabulary is read without a word, and every prompt then gives the same picture.

    Raises:
        ConfigError: says what is missing, with the command that mends it.
    """
    for name in text_encoders:
        key = name.replace("text_encoder", "tokenizer")
        tokenizer, encoder = getattr(pipeline, key), getattr(pipeline, name)
        known, rows = len(tokenizer), encoder.get_input_embeddings().num_embeddings
        if known != rows:
            raise ConfigError(
                f"{folder / key} knows {known} tokens and {name} {rows}: its tokenizer.json, or vocab.json with "
                f"merges.txt, is missing or another model's; {write_remedy(folder)}"
            )
        longest = encoder.config.max_position_embeddings
        if tokenizer.model_max_length > longest:  # where tokenizer_config.json does not say it, it is 10^30
            tokenizer.model_max_length = longest


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file, empty where there is none that can be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
