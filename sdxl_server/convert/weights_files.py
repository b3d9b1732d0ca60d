"""Read weights files in safetensors: the header, then tensors under their plain names and at their full values."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
FIRST_BYTES = {  # of files in other formats
    b"PK\x03\x04": "a pickle of PyTorch's",
    b"\x80": "a pickle",
    b"GGUF": "weights in GGUF",
    b"<": "a web page, such as a login page",
    b"version https://git-lfs": "a pointer of Git LFS (fetch the file by git lfs pull)",
}
# PyTorch's wrappers (compile, FSDP, checkpointing, DataParallel) add these to names. kohya writes _ for a dot.
WRAPPERS = re.compile(r"_(orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)[._]|(?<![^.])module\.")
# The names of a layer's scale in scaled fp8, and of tensors that only fp8 arithmetic needs.
SCALES = ("scale_weight", "weight_scale", "scale")
BLOCK_SCALE = re.compile(r"(scale_weight|weight_scale(_inv)?)$")  # where it is none of SCALES that fit
FP8_EXTRAS = re.compile(r"(^|\.)(scaled_fp8|scale_input|input_scale|comfy_quant)$")
# Other quantised weights, by a pattern of their names. The first match counts.
QUANTISED = {
    "NF4 or FP4 of bitsandbytes": r"\.(absmax|quant_map)$|\.quant_state\.bitsandbytes__",
    "int8 of bitsandbytes": r"\.SCB$",
    "SVDQuant of Nunchaku": r"\.wscales$",
    "GPTQ or AWQ": r"\.(qweight|qzeros)$",
    "Quanto": r"\.weight\._(data|scale)$",
    "NVFP4": r"\.weight_scale_2$",
}


class CheckpointError(ValueError):
    """A file that cannot be converted. The message gives the reason in one line."""


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file. Names are plain: without the parts that wrappers add.

    Attributes:
        shapes: by the tensor's name, without the tensors that belong to scaled fp8.
        metadata: texts by key.
        dtypes: the file's name of each tensor's type, such as F8_E4M3; of all tensors.
        stored: the names in the file, by plain name.
        scales: the names of scales, one for the weights or one for each output, by the name of the weights.
    """

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]
    dtypes: Mapping[str, str]
    stored: Mapping[str, str]
    scales: Mapping[str, str]

    def count(self, prefix: str, pattern: str = "") -> int:
        """Return the number of weights under a prefix whose further name begins with the pattern."""
        return sum(
            math.prod(shape)
            for name, shape in self.shapes.items()
            if name.startswith(prefix) and re.match(pattern, name[len(prefix) :])
        )

    def has(self, prefix: str) -> bool:
        """Say whether a tensor's name has this prefix."""
        return any(name.startswith(prefix) for name in self.shapes)

    @property
    def fp8(self) -> list[str]:
        """The names of the tensors in fp8."""
        return [name for name in self.shapes if self.dtypes[name].startswith("F8_")]

    def load_tensors(self, names: Iterable[str], dtype: Any) -> dict[str, Any]:
        """Return tensors by name.

        Args:
            dtype: of tensors that are in fp8 in the file. Few operations of PyTorch take fp8.
        """
        from safetensors import safe_open

        tensors, fp8 = {}, set(self.fp8)
        with safe_open(self.path, framework="pt") as file:
            for name in names:
                tensors[name] = file.get_tensor(self.stored[name])
                if name in self.scales:
                    scale = file.get_tensor(self.stored[self.scales[name]]).float()
                    outputs = scale.reshape(-1, *[1] * (tensors[name].dim() - 1))
                    tensors[name] = (tensors[name].float() * outputs).to(dtype)
                elif name in fp8:
                    tensors[name] = tensors[name].to(dtype)
        return tensors


def read_safetensors_header(path: Path) -> Header:
    """Return the header of a safetensors file.

    Raises:
        CheckpointError: the file has another format or is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if path.suffix.lower() in PICKLES:
        raise CheckpointError(explain_pickle(path, "a pickle"))
    stored: dict[str, str] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                other = stored.setdefault(remove_wrappers(name), name)
                if other != name:
                    raise CheckpointError(f"{path} holds two tensors for one name: {other} and {name}")
            slices = {name: file.get_slice(held) for name, held in stored.items()}
            shapes = {name: tuple(each.get_shape()) for name, each in slices.items()}
            dtypes = {name: each.get_dtype() for name, each in slices.items()}
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(_explain_format(path, error)) from error
    scales = {
        name: scale
        for name, dtype in dtypes.items()
        if dtype.startswith("F8_") and name.endswith(".weight")
        for scale in (name.removesuffix("weight") + end for end in SCALES)
        if scale in shapes and math.prod(shapes[scale]) in (1, *shapes[name][:1])
    }
    aside = {*scales.values(), *filter(FP8_EXTRAS.search, shapes)}
    return Header(
        path, {name: each for name, each in shapes.items() if name not in aside}, metadata, dtypes, stored, scales
    )


def remove_wrappers(name: str) -> str:
    """Return a name without the parts that PyTorch's wrappers add."""
    return WRAPPERS.sub("", name)


def check_not_quantised(header: Header) -> None:
    """Refuse quantised weights by their format. Those in fp8 are read.

    Raises:
        CheckpointError: names the format.
    """
    named = (kind for kind, each in QUANTISED.items() if any(re.search(each, name) for name in header.dtypes))
    typed = (
        dtype.replace("I", "int").replace("U", "uint")
        for name, dtype in header.dtypes.items()
        if name.endswith("weight") and re.match(r"[IU]\d|F4|F6_", dtype)
    )
    in_blocks = ("8 bits with a scale for each block" for name in header.shapes if BLOCK_SCALE.search(name))
    kind = next(chain(named, typed, in_blocks), None)
    if kind:
        raise CheckpointError(
            f"{header.path} holds quantised weights ({kind}), which are not served: use the model's file in fp16, bf16 "
            "or fp32"
        )


def _explain_format(path: Path, error: Exception) -> str:
    """Return the message for a file that is no readable safetensors, by its first bytes."""
    with path.open("rb") as stream:
        beginning = stream.read(64).lstrip()
    what = next((words for start, words in FIRST_BYTES.items() if beginning.startswith(start)), None)
    if what is None:
        return f"{path} is damaged, or was not fetched whole: {error}"
    return explain_pickle(path, what) if "pickle" in what else f"{path} holds {what}, no weights in safetensors"


def explain_pickle(path: Path, what: str) -> str:
    """Return the message that refuses a pickle."""
    return (
        f"{path} is {what}, which can run code when it is read: use the model's .safetensors file. If there is none, "
        "convert it with torch.load(..., weights_only=True) and safetensors.torch.save_file on a disposable machine"
    )
