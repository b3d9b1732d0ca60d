"""A model's folder: which files it may hold, whether it is complete, and which command repairs it."""

import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdxl_server.errors import ConfigError

FP16_MARK = ".fp16"  # as in model.fp16.safetensors
LFS_POINTER = b"version https://git-lfs"
# An index of shards may name files of any suffix. diffusers reads all but safetensors as pickles.
ACCEPTED_SUFFIXES = frozenset((".jpeg", ".jpg", ".json", ".md", ".model", ".png", ".safetensors", ".txt", ".webp"))
ACCEPTED_FILES = frozenset((".gitattributes", ".gitignore", "LICENSE", "NOTICE"))


def write_redownload_command(folder: Path) -> str:
    """Return the command that downloads a folder again, next to it, from the source that it names."""
    record = load_json_object(folder / "source.json")
    model = record.get("model") or load_json_object(folder / "model_index.json").get("_name_or_path")
    words = ["python", "Download_model.py"]
    if isinstance(model, str) and re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", model):
        words += ["--model", model]
        revision = record.get("revision")
        words += ["--revision", revision] if isinstance(revision, str) and re.fullmatch(r"\w{1,64}", revision) else []
    else:
        words += ["--model", "<its id on the hub>"]
    return shlex.join([*words, "--output-dir", f"{folder}-whole"])


def write_copy_command(folder: Path, *, option: str = "--model") -> str:
    """Return the command that copies only the needed files of a folder.

    Args:
        option: --model for a pipeline, --vae for a VAE.
    """
    return shlex.join(["python", "Download_model.py", option, str(folder), "--output-dir", f"{folder}-whole"])


def check_file_types(folder: Path, *, remedy: str) -> None:
    """Refuse a folder with file types that no pipeline needs: they could run code when they are loaded.

    Subfolders behind links are checked too.

    Args:
        remedy: the command that copies the needed files.

    Raises:
        ConfigError: names the file.
    """

    def fail(error: OSError) -> None:
        raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from error

    seen = set()
    accepted = ", ".join(sorted(ACCEPTED_SUFFIXES))
    for place, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        seen.add(os.path.realpath(place))
        folders[:] = sorted(each for each in folders if os.path.realpath(os.path.join(place, each)) not in seen)
        for name in sorted(names):
            if os.path.splitext(name)[1] not in ACCEPTED_SUFFIXES and name not in ACCEPTED_FILES:
                raise ConfigError(
                    f"{os.path.join(place, name)} could run code when it is loaded. A model's folder takes {accepted}. "
                    f"The needed files are copied by: {remedy}"
                )


def check_complete(folder: Path) -> None:
    """Refuse a folder that lacks weights.

    Raises:
        ConfigError: names the file or the component, and the command that repairs it.
    """
    for path in sorted(folder.glob("*/*")):
        if path.suffix in (".safetensors", ".json", ".txt") and path.is_file() and path.stat().st_size < 1000:
            with path.open("rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    command = shlex.join(["git", "-C", str(folder), "lfs", "pull"])
                    raise ConfigError(f"{path} is a pointer of Git LFS, not the file itself. Fetch it by: {command}")
    for index in sorted(folder.glob("*/*.safetensors.index*.json")):
        named = load_json_object(index).get("weight_map")
        shards = set(named.values()) if isinstance(named, Mapping) else set()
        missing = sorted(name for name in shards if isinstance(name, str) and not (index.parent / name).exists())
        if missing:
            raise ConfigError(f"{index} names {missing[0]}, which is not there: {write_redownload_command(folder)}")


def find_variant(folder: Path) -> str | None:
    """Return `fp16` if a component has its weights under that name only, else None."""
    for name in load_json_object(folder / "model_index.json"):
        variant = find_component_variant(folder.glob(f"{name}/*.safetensors")) if name.isidentifier() else None
        if variant is not None:
            return variant
    return None


def find_component_variant(weights: Iterable[Path]) -> str | None:
    """Return `fp16` if there are files and all are of that variant, else None."""
    names = [path.name for path in weights]
    return FP16_MARK.removeprefix(".") if names and all(FP16_MARK in name for name in names) else None


def check_tokenizers(pipeline: Any, text_encoders: Sequence[str], folder: Path) -> None:
    """Refuse a tokenizer that does not fit its text encoder, and limit its length to the encoder's.

    diffusers loads a tokenizer without a vocabulary silently, and every prompt then gives the same image.

    Raises:
        ConfigError: names the missing file and the command that repairs it.
    """
    for name in text_encoders:
        key = name.replace("text_encoder", "tokenizer")
        tokenizer, encoder = getattr(pipeline, key), getattr(pipeline, name)
        known, rows = len(tokenizer), encoder.get_input_embeddings().num_embeddings
        if known != rows:
            raise ConfigError(
                f"{folder / key} knows {known} tokens and {name} {rows}. Its tokenizer.json, or vocab.json with "
                f"merges.txt, is missing or another model's; {write_redownload_command(folder)}"
            )
        longest = encoder.config.max_position_embeddings
        if tokenizer.model_max_length > longest:  # 10^30 when tokenizer_config.json is silent
            tokenizer.model_max_length = longest


def load_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, empty if it cannot be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
