"""A model's folder: which of its files are loaded, whether they are complete, and which command repairs it."""

import json
import logging
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from sdxl_server.convert.digests import compute_autov2
from sdxl_server.convert.recognition import describe_precision
from sdxl_server.convert.weights_files import (
    PICKLES,
    CheckpointError,
    check_not_quantised,
    explain_pickle,
    read_safetensors_header,
)
from sdxl_server.errors import ConfigError
from sdxl_server.schemas import shorten

FP16_MARK = ".fp16"  # as in model.fp16.safetensors
LFS_POINTER = b"version https://git-lfs"
HUB_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")
PEFT_FILE = "adapter_config.json"
LIBRARIES = ("diffusers", "transformers")  # whose classes a component may have
READ_SUFFIXES = (".safetensors", ".json", ".txt")
WEIGHTS = re.compile(r"(diffusion_pytorch_)?model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")

logger = logging.getLogger(__name__)


def write_redownload_command(folder: Path, *, option: str = "--model") -> str:
    """Return the command that downloads a folder again, next to it, from the source that it names.

    Args:
        option: --model for a pipeline, --vae for a VAE.
    """
    record = load_json_object(folder / "source.json")
    model = record.get("model") or load_json_object(folder / "model_index.json").get("_name_or_path")
    words = ["python", "Download_model.py"]
    if isinstance(model, str) and HUB_ID.fullmatch(model):
        words += [option, model]
        revision = record.get("revision")
        words += ["--revision", revision] if isinstance(revision, str) and re.fullmatch(r"\w{1,64}", revision) else []
    else:
        words += [option, "<its id on the hub>"]
    return shlex.join([*words, "--output-dir", f"{folder}-whole"])


def describe_original(folder: Path) -> dict[str, str]:
    """Return the name of a folder's model, and the digests of the file that it was converted from if this is known."""
    record = load_json_object(folder / "source.json")
    model, sha256 = record.get("model"), record.get("sha256")
    name = PurePosixPath(model).name.removesuffix(".safetensors") if isinstance(model, str) else folder.resolve().name
    if not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        return {"model_name": name}
    return {"model_name": name, "model_sha256": sha256, "model_autov2": compute_autov2(sha256)}


def check_components(folder: Path, components: Sequence[str]) -> None:
    """Refuse a pipeline's folder that is incomplete, or whose components could run code when they are loaded.

    Only the components that are loaded are checked, and of these only the files that are read.

    Raises:
        ConfigError: names the component or the file, and what to do.
    """
    index, remedy = load_json_object(folder / "model_index.json"), write_redownload_command(folder)
    for name in components:
        held = index.get(name)
        if not isinstance(held, list) or [type(each) for each in held] != [str, str]:
            raise ConfigError(f"cannot read the pipeline in {folder}: its model_index.json names no {name}; {remedy}")
        if held[0] not in LIBRARIES:
            raise ConfigError(
                f"{folder}/model_index.json names a class of the Python module {shorten(held[0])} for {name}. A "
                f"model's own code is not run: use a model with classes of {' and '.join(LIBRARIES)}"
            )
        if held[0] == "transformers" and (folder / name / PEFT_FILE).exists():
            raise ConfigError(
                f"{folder / name / PEFT_FILE} would add an adapter to {name} when it is loaded. Remove this file, and "
                "name the adapter in handler.adapters"
            )
        check_component(folder / name, remedy=remedy)


def check_component(folder: Path, *, remedy: str) -> None:
    """Refuse a component's folder that is incomplete, or whose weights could run code when they are loaded.

    Args:
        remedy: the command that makes a whole folder.

    Raises:
        ConfigError: names the file and what to do.
    """
    check_links([folder, *(path for path in sorted(folder.glob("*")) if _is_read(path))])
    if not folder.is_dir():
        raise ConfigError(f"{folder} is missing. Make the whole folder by: {remedy}")
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    pickles = [path for path in files if path.suffix.lower() in PICKLES]
    if pickles and not any(is_weights(path.name) for path in files):
        own = next((path for path in pickles if "pytorch_model" in path.name), pickles[0])
        raise ConfigError(explain_pickle(own, "a pickle"))
    for path in files:
        if path.suffix in READ_SUFFIXES and path.stat().st_size < 1000:
            with path.open("rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    clone = folder if (folder / ".git").exists() else folder.parent
                    command = shlex.join(["git", "-C", str(clone), "lfs", "pull"])
                    raise ConfigError(f"{path} is a pointer of Git LFS, not the file itself. Fetch it by: {command}")
    for source, name in _list_named_weights(folder):
        if not name.endswith((".safetensors", ".safetensors.index.json")):
            raise ConfigError(f"{source}: {explain_pickle(folder / name, 'read as a pickle')}")
        if not (folder / name).exists():
            raise ConfigError(f"{source} names {name}, which is not there: {remedy}")
    _check_precision(folder, remedy=remedy)


def check_links(paths: Iterable[Path]) -> None:
    """Refuse links that lead nowhere.

    Raises:
        ConfigError: names the first one and what to do.
    """
    for path in paths:
        if explained := explain_broken_link(path):
            raise ConfigError(explained)


def explain_broken_link(path: Path) -> str | None:
    """Say what to do about a link that leads nowhere, as in a snapshot without its cache; None for another path."""
    if not os.path.islink(path) or path.exists():
        return None
    return (
        f"{path} is a link to {path.readlink()}, which is not there. In the hub's cache such links lead to its folder "
        "blobs: mount the whole cache, or copy the model by cp --recursive --dereference"
    )


def _is_read(path: Path) -> bool:
    """Say whether a file of a component is read: of two variants of weights only one is."""
    is_half = FP16_MARK in path.name
    is_other = is_weights(path.name) and is_half is (find_variant(path.parent) is None)
    return path.suffix in READ_SUFFIXES and not is_other


def _check_precision(folder: Path, *, remedy: str) -> None:
    """Refuse a component with quantised or damaged weights, and warn of plain fp8.

    Args:
        remedy: the command that makes a whole folder.

    Raises:
        ConfigError: names the format, or a file that is no safetensors.
    """
    method = load_json_object(folder / "config.json").get("quantization_config")
    if method is not None:
        raise ConfigError(
            f"{folder}/config.json has a quantization_config ({shorten(method)}), and quantised weights are not "
            "served: use the model's folder in fp16, bf16 or fp32"
        )
    for path in sorted(folder.glob("*.safetensors")):
        if not is_weights(path.name) or not _is_read(path):
            continue
        try:
            header = read_safetensors_header(path)
        except CheckpointError as error:
            raise ConfigError(f"{error}. Make the whole folder by: {remedy}") from error
        try:
            check_not_quantised(header)
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
        if header.scales:
            raise ConfigError(f"{path} is in scaled fp8, which is read from models in one file only: use one in fp16")
        if header.fp8:
            logger.warning("%s: %s", path, describe_precision(header))


def _list_named_weights(folder: Path) -> list[tuple[Path, str]]:
    """Return the weights files that a component's settings name, each after the file that names it."""
    config, is_half = folder / "config.json", find_variant(folder) is not None
    named = [(config, load_json_object(config).get("transformers_weights"))]
    for index in sorted(folder.glob("*.safetensors*.json")):
        shards = load_json_object(index).get("weight_map") if (FP16_MARK in index.name) is is_half else None
        named += [(index, name) for name in sorted(set(shards.values()))] if isinstance(shards, Mapping) else []
    return [(source, name) for source, name in named if isinstance(name, str)]


def is_weights(name: str) -> bool:
    """Say whether diffusers or transformers read weights in safetensors under this name, or the index of their shards.

    diffusers names shards `model.fp16-00001-of-00002.safetensors` or, older, `model-00001-of-00002.fp16.safetensors`.
    It names their index `….safetensors.index.fp16.json` or `….safetensors.fp16.index.json`. Plain names lack `.fp16`.
    """
    return WEIGHTS.fullmatch(name.replace(FP16_MARK, "")) is not None


def find_variant(folder: Path) -> str | None:
    """Return `fp16` if a component has its weights under that name only, else None."""
    names = [path.name for path in folder.glob("*.safetensors") if is_weights(path.name)]
    return FP16_MARK.removeprefix(".") if names and all(FP16_MARK in name for name in names) else None


def load_weights(kind: Any, folder: Path, dtype: Any) -> Any:
    """Load a component from its safetensors. Nothing is downloaded, and no code of the folder runs.

    Args:
        kind: the component's class, of diffusers or transformers.
        dtype: torch's type for its weights.

    Raises:
        ConfigError: weights are missing. Both libraries would draw with random ones.
    """
    component, read = kind.from_pretrained(
        folder,
        dtype=dtype,
        variant=find_variant(folder),
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    if missing := sorted(read["missing_keys"]):
        others = f", and has others such as {min(read['unexpected_keys'])}" if read["unexpected_keys"] else ""
        raise ConfigError(
            f"{folder} lacks {len(missing)} weights of its {kind.__name__}, such as {missing[0]}{others}. Its "
            "files are incomplete or another model's: download the model again"
        )
    return component


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
