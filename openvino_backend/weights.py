"""The weights of a module: their names and their digest. The digest is kept for the files that hold them."""

import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openvino_backend.cache import keep_value, tell_change
from openvino_backend.options import Options

# An entry of /proc/self/smaps: from, to, offset in the file, inode, path.
_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ (\d+) +(/.+)")
_CHANGED = re.compile(r"(?:Anonymous|Swap): +[1-9]")


class KnownWeights:
    """The weights of a module, digested once for all its graphs.

    Attributes:
        tensors: the weights by name: parameters, buffers, and tensors in plain attributes of the module or a part.
        sha256: their digest.
    """

    def __init__(self, module: torch.nn.Module, options: Options) -> None:
        plain = (
            (f"{part}.{name}".lstrip("."), value)
            for part, each in module.named_modules()
            for name, value in vars(each).items()
            if isinstance(value, torch.Tensor)
        )
        self.tensors: dict[str, torch.Tensor] = dict([*module.named_parameters(), *module.named_buffers(), *plain])
        self.sha256 = find_digest(self.tensors, options)
        self._names = {_locate(tensor): name for name, tensor in self.tensors.items()}

    def find_name(self, tensor: torch.Tensor) -> str | None:
        """Return the name of a weight, or None for other tensors, such as those that the code makes."""
        return self._names.get(_locate(tensor)) if tensor.numel() else None

    def digest_constants(self, values: Mapping[str, torch.Tensor]) -> str:
        """Return a digest of a graph's constants: these weights in any order, or other tensors."""
        sources = {name: self.find_name(tensor) for name, tensor in values.items()}
        others = {name: values[name] for name, source in sources.items() if source is None}
        return hashlib.sha256(repr((self.sha256, sources, digest_weights(others))).encode()).hexdigest()


@dataclass(frozen=True)
class _Mapping:
    """Memory with a file's content, byte by byte.

    Attributes:
        start, end: its addresses.
        offset: the position of its first byte in the file.
        file: numbers that change with the file's content.
    """

    start: int
    end: int
    offset: int
    file: tuple[int, ...]


def find_digest(weights: Mapping[str, torch.Tensor], options: Options) -> str:
    """Return the digest of weights, from the cache if they are mapped from unchanged files.

    Weights in no file are digested again: that takes as long as comparing them with a kept copy.
    """
    mappings = list(_list_mappings()) if options.model_caching else []
    places = {name: _find_place(tensor, mappings) for name, tensor in weights.items()}
    others = {name: tensor for name, tensor in weights.items() if places[name] is None}
    if len(others) == len(weights):
        return digest_weights(weights)
    described = [(name, str(each.dtype), *each.shape, places[name]) for name, each in weights.items()]
    key = hashlib.sha256(repr(("weights", described, digest_weights(others))).encode()).hexdigest()[:32]
    return keep_value(options, key, lambda: digest_weights(weights).encode()).decode()


def digest_weights(weights: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of the tensors in their order, with their types and shapes."""

    def digest(tensor: torch.Tensor) -> bytes:
        described = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        described.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return described.digest()

    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        return hashlib.sha256(b"".join(pool.map(digest, weights.values()))).hexdigest()


def _locate(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return what identifies one tensor: views may share their start and shape."""
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _find_place(tensor: torch.Tensor, mappings: Sequence[_Mapping]) -> tuple[int, ...] | None:
    """Return a tensor's file and position in it, or None if it is in no file.

    Args:
        mappings: in the order of their addresses.
    """
    start = tensor.data_ptr()
    index = bisect_right(mappings, start, key=lambda each: each.start) - 1
    if index < 0 or start + tensor.nbytes > mappings[index].end or not (tensor.is_cpu and tensor.is_contiguous()):
        return None
    return (*mappings[index].file, start - mappings[index].start + mappings[index].offset)


def _list_mappings() -> Iterator[_Mapping]:
    """Yield the mapped files without changed pages in memory. A private mapping may have some."""
    entries = re.split(r"\n(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text())
    for entry in entries:
        head = _HEAD.match(entry)
        if head is None or _CHANGED.search(entry):
            continue
        start, end, offset, inode, path = head.groups()
        try:
            status = Path(path).stat()
        except OSError:  # it was removed
            continue
        if status.st_ino == int(inode):  # else another file has taken its place
            yield _Mapping(int(start, 16), int(end, 16), int(offset, 16), tell_change(status))
