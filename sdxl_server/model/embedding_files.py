"""Read a textual inversion: the vectors that a name in prompts stands for, in every published form."""

import hashlib
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdxl_server.convert.recognition import describe_content
from sdxl_server.convert.weights_files import PICKLES, Header
from sdxl_server.errors import ConfigError
from sdxl_server.model.adapters.files import read_adapter_file
from sdxl_server.model.adapters.lora_files import EMBEDDINGS, MODEL_BY_WIDTH
from sdxl_server.schemas import shorten

# The names of SDXL's two tensors: kohya, OneTrainer and A1111 write the first, diffusers' advanced training the second.
PARTS = {
    "text_encoder": ("clip_l", "text_encoders_0"),
    "text_encoder_2": ("clip_g", "text_encoders_1"),
}
BUNDLED = re.compile(rf"{re.escape(EMBEDDINGS)}(?P<name>.+?)\.(?P<part>string_to_param\.[^.]*|[^.]+)")
# diffusers' training of SDXL writes one file for each text encoder.
FIRST_FILE, SECOND_FILE = "learned_embeds", "learned_embeds_2"
CONVERT = (
    "python -c \"import sys, torch, safetensors.torch as s; d = torch.load(sys.argv[1], 'cpu', weights_only=True); "
    "s.save_file({k: v.detach().contiguous() for k, v in d.get('string_to_param', d).items() if torch.is_tensor(v)}, "
    'sys.argv[2])"'
)

Tensors = dict[str, tuple[Header, str]]  # the file and the name there, by the part of an embedding


def read_embedding(path: Path, name: str, widths: Mapping[str, int], *, most: int) -> tuple[str, dict[str, Any]]:
    """Return the file's SHA-256, and for each text encoder the vectors, in rows.

    Args:
        name: chooses among several embeddings in the file of a LoRA.
        widths: of each text encoder.
        most: the largest number of vectors.

    Raises:
        ConfigError: the file is damaged, holds something else, or does not fit the model.
    """
    import torch

    digest, tensors = _open(path, name, is_xl=len(widths) > 1)
    if len(tensors) == 1:  # of any name, as for models with one text encoder
        found = dict(zip(widths, tensors.values(), strict=False))
    else:
        found = {encoder: tensors[each] for encoder in PARTS for each in PARTS[encoder] if each in tensors}
    if len(found) < len(tensors) or not tensors:
        _refuse_content(path, tensors)
    shapes = [header.shapes[stored] for header, stored in found.values()]
    (count, *_), *_ = shapes = [(1, *shape) if len(shape) == 1 else shape or (0,) for shape in shapes]
    if not count or dict(zip(found, shapes, strict=True)) != {each: (count, width) for each, width in widths.items()}:
        raise ConfigError(_explain_shapes(path, list(found.values()), widths))
    if count > most:
        raise ConfigError(f"{path} holds {count} vectors, and a prompt has room for {most}")
    vectors = {}
    for encoder, (header, stored) in found.items():
        (tensor,) = header.load_tensors([stored], torch.float32).values()
        if not tensor.is_floating_point():
            raise ConfigError(f"{path} takes floating-point numbers, not {tensor.dtype}: {stored}")
        if not torch.isfinite(tensor).all():
            raise ConfigError(f"{path} holds numbers that are not finite: {stored}")
        vectors[encoder] = tensor.reshape(-1, widths[encoder])
    return digest, vectors


def _open(path: Path, name: str, *, is_xl: bool) -> tuple[str, Tensors]:
    """Return a file's digest and the tensors of one embedding.

    Raises:
        ConfigError: the file cannot be read, or holds several embeddings of other names.
    """
    if path.suffix.lower() in PICKLES:
        paths = " ".join(shlex.quote(str(each)) for each in (path, path.with_suffix(".safetensors")))
        raise ConfigError(f"{path} is a pickle, which can run code when it is read. Convert it: {CONVERT} {paths}")
    digest, header = read_adapter_file(path)
    bundled: dict[str, Tensors] = {}
    for stored in header.shapes:
        if match := BUNDLED.fullmatch(stored):
            bundled.setdefault(match["name"], {})[match["part"]] = header, stored
    if bundled:
        wanted = [each for each in bundled if len(bundled) == 1 or each.strip("<>").casefold() == name.casefold()]
        if len(wanted) != 1:
            names = shorten(", ".join(bundled), length=200)
            raise ConfigError(f"{path} holds the embeddings {names}; name takes one of them, not {shorten(name)}")
        return digest, bundled[wanted[0]]
    second = path.with_name(path.name.replace(FIRST_FILE, SECOND_FILE, 1))
    if is_xl and len(header.shapes) == 1 and second != path and second.exists():
        other_digest, other = read_adapter_file(second)
        both = zip(("clip_l", "clip_g"), (header, other), strict=True)
        digest = hashlib.sha256(f"{digest}{other_digest}".encode()).hexdigest()
        return digest, {part: (each, stored) for part, each in both for stored in each.shapes}
    return digest, {stored: (header, stored) for stored in header.shapes}


def _refuse_content(path: Path, tensors: Tensors) -> None:
    """Refuse a file with other tensors.

    Raises:
        ConfigError: says what the file holds.
    """
    if not tensors:
        raise ConfigError(f"{path} holds no tensor of a textual inversion")
    outputs = [part for part in tensors if part.endswith("_out")]
    if outputs:
        raise ConfigError(f"{path} holds vectors for the output of a text encoder, which are not served: {outputs[0]}")
    header, _ = next(iter(tensors.values()))
    if not any(part in tensors for parts in PARTS.values() for part in parts):
        raise ConfigError(f"{path} holds {describe_content(header)}, and only a textual inversion is read here")
    known = [part for parts in PARTS.values() for part in parts]
    raise ConfigError(
        f"{path} holds vectors for other text encoders than this model's: "
        + shorten(", ".join(part for part in tensors if part not in known))
    )


def _explain_shapes(path: Path, tensors: Sequence[tuple[Header, str]], widths: Mapping[str, int]) -> str:
    """Return the message for vectors that do not fit the model's text encoders."""
    shapes = [(stored, header.shapes[stored]) for header, stored in tensors]
    made_for = MODEL_BY_WIDTH.get(sum(shape[-1] for _, shape in shapes if shape))
    held = ", ".join(f"{shorten(name)[1:-1]} {'×'.join(map(str, shape)) or 'one number'}" for name, shape in shapes)
    wanted = " and ".join(
        f"{PARTS[encoder][0] if len(widths) > 1 else 'vectors'} N×{width}" for encoder, width in widths.items()
    )
    origin = f"was made for {made_for}, not for this model" if made_for else "does not fit this model"
    return f"{path} {origin}: it has {held}, and this model takes {wanted}"
