"""Convert a single-file checkpoint into a folder for diffusers, one component after the other."""

import functools
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdxl_server.convert.recognition import LAYOUTS, SETTINGS_FOLDER, UNET_PREFIX, VAE_PREFIX, Checkpoint
from sdxl_server.convert.weights_files import CheckpointError, read_safetensors_header

INDEX = "model_index.json"
# Other components have a config.json.
CONFIG_FILES = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
DTYPES = {"fp16": "float16", "fp32": "float32"}
BYTES_PER_WEIGHT = {"fp16": 2, "fp32": 4}
VAE_MODULES = r"(encoder|decoder|quant_conv|post_quant_conv)\."
Settings = Mapping[str, Mapping[str, Any]]


def convert_to_folder(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    dtype: str,
    vae: Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the model into a folder that diffusers reads; model_index.json comes last.

    A component gets its name only when it is complete. Existing ones are not converted again.

    Args:
        dtype: a key of DTYPES.
        vae: a file or folder whose VAE replaces the file's own.
        tell: takes a line for each component.

    Raises:
        CheckpointError: the file lacks weights of its model.
    """
    settings = checkpoint.read_settings()
    folder.mkdir(parents=True, exist_ok=True)
    with write_temporary_settings(settings) as described:
        for part in _list_missing(checkpoint, folder):
            tell(f"{part}: {count_weights(part, settings[part]) * BYTES_PER_WEIGHT[dtype] / 1e9:.2f} GB")
            if part == "vae" and vae is not None:
                save_component(load_replacement_vae(vae, described, dtype), folder / part)
            else:
                save_component(load_component(checkpoint, part, described, dtype), folder / part)
        for name in settings.keys() - {"model_index"}:
            if not (folder / name).exists():
                shutil.copytree(described / name, folder / name)
        shutil.copy(described / INDEX, folder / INDEX)


def count_weights(part: str, settings: Mapping[str, Any]) -> int:
    """Return how many weights a component with these settings has."""
    import diffusers
    import torch
    import transformers

    with torch.device("meta"):
        if part.startswith("text_encoder"):
            kind = transformers.CLIPTextModelWithProjection if part[-1] == "2" else transformers.CLIPTextModel
            module = kind(transformers.CLIPTextConfig(**settings))
        else:
            module = getattr(diffusers, settings["_class_name"]).from_config(settings)
    return sum(weight.numel() for weight in module.parameters())


def count_bytes(checkpoint: Checkpoint, folder: Path, dtype: str) -> int:
    """Return the disk space of the components that are missing in the folder."""
    settings = checkpoint.read_settings()
    weights = sum(count_weights(part, settings[part]) for part in _list_missing(checkpoint, folder))
    return weights * BYTES_PER_WEIGHT[dtype]


def _list_missing(checkpoint: Checkpoint, folder: Path) -> list[str]:
    return [part for part in ("unet", "vae", *LAYOUTS[checkpoint.layout]) if not (folder / part).exists()]


def check_weight_counts(checkpoint: Checkpoint, *, needs_vae: bool) -> None:
    """Refuse a UNet or VAE of another architecture, by its number of weights.

    Raises:
        CheckpointError: names both numbers.
    """
    if needs_vae and not checkpoint.has_vae:
        raise CheckpointError(f"{checkpoint.path} holds no VAE: name one by --vae, a .safetensors or a folder")
    header, settings = read_safetensors_header(checkpoint.path), checkpoint.read_settings()
    held = {"unet": header.count(UNET_PREFIX), **({"vae": header.count(VAE_PREFIX, VAE_MODULES)} if needs_vae else {})}
    for part, count in held.items():
        expected = count_weights(part, settings[part])
        if count != expected:
            raise CheckpointError(
                f"{checkpoint.path} holds a {part} of {count:,} weights, and that of {checkpoint.describe()} has "
                f"{expected:,}. Other architectures, such as distilled ones, are read from folders only"
            )


@contextmanager
def write_temporary_settings(settings: Settings) -> Iterator[Path]:
    """Yield a temporary folder with these settings and CLIP's tokenizers, laid out as a pipeline's."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for part, content in settings.items():
            if part == "model_index":
                (place / INDEX).write_text(json.dumps(content, indent=2) + "\n")
                continue
            (place / part).mkdir()
            path = place / part / CONFIG_FILES.get(part.removesuffix("_2"), "config.json")
            path.write_text(json.dumps(content, indent=2) + "\n")
            if part.startswith("tokenizer"):
                write_vocabulary(place / part)
        yield place


def write_vocabulary(folder: Path) -> None:
    """Write CLIP's vocabulary: the bytes, the bytes at the end of a word, then each merge in order."""
    for name, content in _build_vocabulary().items():
        (folder / name).write_text(content)


@functools.cache
def _build_vocabulary() -> Mapping[str, str]:
    """Return the contents of both files; a model has two tokenizers."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    lines = (SETTINGS_FOLDER / "merges.txt").read_text().splitlines()
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(line.replace(" ", "") for line in lines[1:])]
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return {"merges.txt": "\n".join(lines) + "\n", "vocab.json": json.dumps(vocabulary, ensure_ascii=False)}


@contextmanager
def reraise_as_checkpoint_error(path: Path, part: str) -> Iterator[None]:
    """Turn diffusers' errors into a CheckpointError, and silence its progress bars and advice."""
    import diffusers
    import transformers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    library = logging.getLogger("diffusers")
    level, library.level = library.level, logging.ERROR
    try:
        yield
    except CheckpointError:
        raise
    except (KeyError, OSError, RuntimeError, ValueError, SingleFileComponentError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path} holds no {part} that fits: {type(error).__name__}: {reason}") from error
    finally:
        library.level = level


def load_component(checkpoint: Checkpoint, part: str, described: Path, dtype: str) -> Any:
    """Return one component of the file as a module of diffusers or transformers.

    Args:
        described: a folder with the settings of the pipeline.

    Raises:
        CheckpointError: the file lacks some of its weights.
    """
    import diffusers
    import torch
    import transformers
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

    prefix = {"unet": UNET_PREFIX, "vae": VAE_PREFIX, **LAYOUTS[checkpoint.layout]}[part]
    library, kind = json.loads((described / INDEX).read_text())[part]
    wanted = getattr(torch, DTYPES[dtype])
    options = {"config": str(described), "subfolder": part, "local_files_only": True}
    with reraise_as_checkpoint_error(checkpoint.path, part):
        header = read_safetensors_header(checkpoint.path)
        tensors = header.load_tensors((name for name in header.shapes if name.startswith(prefix)), wanted)
        if library == "diffusers":
            module = getattr(diffusers, kind).from_single_file(tensors, dtype=wanted, **options)
        else:
            encoder = getattr(transformers, kind)
            module = create_diffusers_clip_model_from_ldm(encoder, tensors, torch_dtype=wanted, **options)
    return check_all_loaded(module, part, checkpoint.path)


def load_replacement_vae(path: Path, described: Path, dtype: str) -> Any:
    """Return a VAE from its own file, in either naming, or from a folder.

    Raises:
        CheckpointError: there is no such VAE.
    """
    import diffusers
    import torch

    kind, wanted = diffusers.AutoencoderKL, getattr(torch, DTYPES[dtype])
    with reraise_as_checkpoint_error(path, "vae"):
        if path.is_dir():
            inside = path / "vae" if (path / "vae/config.json").exists() else path
            if not (inside / "config.json").exists():
                raise CheckpointError(f"{path} is no folder of a VAE: it has no config.json")
            held = json.loads((inside / "config.json").read_text()).get("_class_name")
            if held != kind.__name__:
                raise CheckpointError(
                    f"--vae takes an {kind.__name__} for a model in one file, but {path} holds {held}; name a tiny VAE "
                    "as vae_path in model-config.yaml"
                )
            vae = kind.from_pretrained(inside, dtype=wanted, use_safetensors=True, local_files_only=True)
        else:
            header = read_safetensors_header(path)
            if not any(name.removeprefix(VAE_PREFIX).startswith("decoder.conv_in.") for name in header.shapes):
                raise CheckpointError(f"{path} holds no VAE; --vae takes one in .safetensors or a folder")
            tensors = header.load_tensors(header.shapes, wanted)
            vae = kind.from_single_file(
                tensors, config=str(described), subfolder="vae", dtype=wanted, local_files_only=True
            )
    return check_all_loaded(vae, "vae", path)


def check_all_loaded(module: Any, part: str, path: Path) -> Any:
    """Refuse a component with missing weights. Those are still on the meta device."""
    missing = [name for name, weight in module.named_parameters() if weight.is_meta]
    if missing:
        raise CheckpointError(f"{path} lacks {len(missing)} tensors of its {part}, such as {missing[0]}")
    return module


def save_component(module: Any, folder: Path) -> None:
    """Write one component, which gets its name only when it is complete."""
    incomplete = folder.with_name(f".{folder.name}.incomplete")
    shutil.rmtree(incomplete, ignore_errors=True)
    module.save_pretrained(incomplete, safe_serialization=True)
    if folder.name == "text_encoder":
        prefix_text_encoder_names(incomplete / "model.safetensors")
    incomplete.replace(folder)


def prefix_text_encoder_names(path: Path) -> None:
    """Give the weights of the first text encoder their prefix `text_model.`, as in published checkpoints.

    Today's transformers writes them without it and reads both. Version 5.5, which optimum-intel needs, does not find
    names without it and silently uses random weights.
    """
    from safetensors.torch import load_file, save_file

    weights = {f"text_model.{name.removeprefix('text_model.')}": each for name, each in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
