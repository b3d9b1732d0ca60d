"""A folder for diffusers made of a file that holds a whole model, one part after the other."""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdxl_server.convert.recognition import LAYOUTS, PLACE, UNET, VAE, Checkpoint, CheckpointError, read_header

INDEX = "model_index.json"
FILES = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}  # of all others: config.json
DTYPES = {"fp16": "float16", "fp32": "float32"}
VAE_PARTS = r"(encoder|decoder|quant_conv|post_quant_conv)\."
Settings = Mapping[str, Mapping[str, Any]]


def make_folder(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    dtype: str,
    vae: Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Bring the folder to hold the model as diffusers reads it; model_index.json comes last.

    A part bears its name only when it is whole, and one that is there is not made again.

    Args:
        dtype: a key of DTYPES.
        vae: what to take in the place of the file's own VAE: another file, or a folder.
        tell: takes a line on each step.

    Raises:
        CheckpointError: the file does not hold what a model of its kind has.
    """
    settings = checkpoint.read_settings()
    folder.mkdir(parents=True, exist_ok=True)
    with write_settings(settings) as described:
        for part in ("unet", "vae", *LAYOUTS[checkpoint.layout]):
            if (folder / part).exists():
                continue
            tell(f"{part}: {count_numbers(part, settings[part]) * (2 if dtype == 'fp16' else 4) / 1e9:.2f} GB")
            if part == "vae" and vae is not None:
                save_part(read_vae(vae, described, dtype), folder / part)
            else:
                save_part(read_part(checkpoint, part, described, dtype), folder / part)
        for name in settings.keys() - {"model_index"}:
            if not (folder / name).exists():
                shutil.copytree(described / name, folder / name)
        shutil.copy(described / INDEX, folder / INDEX)


def count_numbers(part: str, settings: Mapping[str, Any]) -> int:
    """Return how many weights a part of these settings has."""
    import diffusers
    import torch
    import transformers

    with torch.device("meta"):
        if part.startswith("text_encoder"):
            config = transformers.CLIPTextConfig(**settings)
            module = (transformers.CLIPTextModelWithProjection if part[-1] == "2" else transformers.CLIPTextModel)(
                config
            )
        else:
            module = getattr(diffusers, settings["_class_name"]).from_config(settings)
    return sum(weight.numel() for weight in module.parameters())


def count_bytes(checkpoint: Checkpoint, folder: Path, dtype: str) -> int:
    """Return what the parts take on the disk that are not there yet."""
    settings = checkpoint.read_settings()
    parts = [part for part in ("unet", "vae", *LAYOUTS[checkpoint.layout]) if not (folder / part).exists()]
    return sum(count_numbers(part, settings[part]) for part in parts) * (2 if dtype == "fp16" else 4)


def check_sizes(checkpoint: Checkpoint, *, needs_vae: bool) -> None:
    """Refuse a UNet or a VAE of another architecture, by the numbers that it has.

    Raises:
        CheckpointError: says how many it has and how many are right.
    """
    if needs_vae and not checkpoint.has_vae:
        raise CheckpointError(f"{checkpoint.path} holds no VAE: name one by --vae, a .safetensors or a folder")
    header, settings = read_header(checkpoint.path), checkpoint.read_settings()
    held = {"unet": header.count(UNET), **({"vae": header.count(VAE, VAE_PARTS)} if needs_vae else {})}
    for part, count in held.items():
        expected = count_numbers(part, settings[part])
        if count != expected:
            raise CheckpointError(
                f"{checkpoint.path} holds a {part} of {count:,} weights, and that of {checkpoint.describe()} has "
                f"{expected:,}: another architecture, such as a distilled one: those are read from folders only"
            )


@contextmanager
def write_settings(settings: Settings) -> Iterator[Path]:
    """Yield a folder with these settings and with CLIP's tokenizers, as a pipeline's folder has them."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for part, content in settings.items():
            if part == "model_index":
                (place / INDEX).write_text(json.dumps(content, indent=2) + "\n")
                continue
            (place / part).mkdir()
            path = place / part / FILES.get(part.removesuffix("_2"), "config.json")
            path.write_text(json.dumps(content, indent=2) + "\n")
            if part.startswith("tokenizer"):
                write_vocabulary(place / part)
        yield place


def write_vocabulary(folder: Path) -> None:
    """Write CLIP's vocabulary: the bytes, the bytes that end a word, and what the merges make of them, in order."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    lines = (PLACE / "merges.txt").read_text().splitlines()
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(line.replace(" ", "") for line in lines[1:])]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))


@contextmanager
def read_quietly(path: Path, part: str) -> Iterator[None]:
    """Keep diffusers' bars and advice from the user, and turn what it raises into a CheckpointError."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    library = logging.getLogger("diffusers")
    level, library.level = library.level, logging.ERROR
    try:
        yield
    except CheckpointError:
        raise
    except (
        KeyError,
        OSError,
        RuntimeError,
        ValueError,
        diffusers.loaders.single_file_utils.SingleFileComponentError,
    ) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path} holds no {part} that fits: {type(error).__name__}: {reason}") from error
    finally:
        library.level = level


def read_part(checkpoint: Checkpoint, part: str, described: Path, dtype: str) -> Any:
    """Return one part of the file as diffusers or transformers knows it.

    Args:
        described: a folder with the settings of the pipeline.

    Raises:
        CheckpointError: the file lacks some of it.
    """
    import diffusers
    import torch

    index = json.loads((described / INDEX).read_text())
    others = {name: None for name, value in index.items() if isinstance(value, list) and name != part}
    with read_quietly(checkpoint.path, part):
        pipeline = getattr(diffusers, index["_class_name"]).from_single_file(
            str(checkpoint.path),
            config=str(described),
            dtype=getattr(torch, DTYPES[dtype]),
            local_files_only=True,
            **others,
        )
    return check_whole(getattr(pipeline, part), part, checkpoint.path)


def read_vae(path: Path, described: Path, dtype: str) -> Any:
    """Return a VAE from a file of its own, in either naming, or from a folder.

    Raises:
        CheckpointError: it is none.
    """
    import diffusers
    import torch

    kind, wanted = diffusers.AutoencoderKL, getattr(torch, DTYPES[dtype])
    with read_quietly(path, "vae"):
        if path.is_dir():
            inside = path / "vae" if (path / "vae/config.json").exists() else path
            if not (inside / "config.json").exists():
                raise CheckpointError(f"{path} is no folder of a VAE: it has no config.json")
            held = json.loads((inside / "config.json").read_text()).get("_class_name")
            if held != kind.__name__:
                raise CheckpointError(
                    f"--vae takes an {kind.__name__} beside a model in one file, but {path} holds {held}; name a tiny "
                    "VAE as vae_path in model-config.yaml"
                )
            vae = kind.from_pretrained(inside, dtype=wanted, use_safetensors=True, local_files_only=True)
        else:
            if not any(name.removeprefix(VAE).startswith("decoder.conv_in.") for name in read_header(path).shapes):
                raise CheckpointError(f"{path} holds no VAE such as --vae takes")
            vae = kind.from_single_file(
                str(path), config=str(described), subfolder="vae", dtype=wanted, local_files_only=True
            )
    return check_whole(vae, "vae", path)


def check_whole(module: Any, part: str, path: Path) -> Any:
    """Refuse a part that the file held not all of: what was not read is on no device."""
    missing = [name for name, weight in module.named_parameters() if weight.is_meta]
    if missing:
        raise CheckpointError(f"{path} lacks {len(missing)} tensors of its {part}, such as {missing[0]}")
    return module


def save_part(module: Any, folder: Path) -> None:
    """Write one part, which bears its name only when it is whole."""
    growing = folder.with_name(f".{folder.name}.incomplete")
    shutil.rmtree(growing, ignore_errors=True)
    module.save_pretrained(growing, safe_serialization=True)
    if folder.name == "text_encoder":
        name_as_published(growing / "model.safetensors")
    growing.replace(folder)


def name_as_published(path: Path) -> None:
    """Give the weights of a first text encoder their `text_model.`, as in published checkpoints.

    Today's transformers writes them without, and reads both; 5.5, which optimum-intel needs, finds none of such names
    and goes on with random weights.
    """
    from safetensors.torch import load_file, save_file

    weights = {f"text_model.{name.removeprefix('text_model.')}": each for name, each in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
