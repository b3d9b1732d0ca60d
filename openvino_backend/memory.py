"""Give back the memory of weights that torch no longer needs."""

import contextlib
import ctypes
import logging
import mmap
import threading
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from openvino_backend.options import Options

logger = logging.getLogger(__name__)

_INTERVAL = 0.25  # seconds
_MADV_PAGEOUT = 21  # Linux 5.4 or later
_PAGES, _PAGE_ENTRY = Path("/proc/self/pagemap"), np.dtype(np.uint64)


@contextlib.contextmanager
def release_memory(
    options: Options, tensors: Iterable[torch.Tensor], files: Collection[Path | None] = ()
) -> Iterator[None]:
    """Give pages of tensors and mapped files back to the kernel, repeatedly in the block and at its end.

    Nothing is lost. A page mapped from a file, as safetensors maps weights, is read from there when touched again. It
    comes from memory while the kernel has room for the file. A changed page goes to the swap space, or stays without
    one. Without this function a compilation has the weights in memory twice, torch's and OpenVINO's.

    Args:
        files: files mapped when the block begins stay mapped until it ends.
    """
    names = {str(each.resolve()) for each in files if each is not None}
    ranges = [*_find_pages(tensors), *_find_mapped(names)] if options.release_weights else []
    if not ranges:
        yield
        return
    ended = threading.Event()

    def release() -> None:
        while not ended.wait(_INTERVAL):
            _give_back(ranges)

    thread = threading.Thread(target=release, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        # This includes the block's own mappings. Earlier they might be unmapped, and their addresses used again.
        _give_back([*ranges, *_find_mapped(names)])
        # This returns what the compilation has freed, such as weights before they were written to the cache.
        ctypes.CDLL(None).malloc_trim(0)


def _find_pages(tensors: Iterable[torch.Tensor]) -> list[tuple[int, int]]:
    """Return the address ranges of whole pages that the tensors fill: start and end in bytes."""
    ranges: list[tuple[int, int]] = []
    for start, size in sorted((tensor.data_ptr(), tensor.nbytes) for tensor in tensors if tensor.is_cpu):
        if ranges and start - ranges[-1][1] < mmap.PAGESIZE:  # alignment between two weights of one file
            ranges[-1] = (ranges[-1][0], max(ranges[-1][1], start + size))
        else:
            ranges.append((start, start + size))
    whole = (
        (-(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE) for start, end in ranges
    )
    return [(start, end) for start, end in whole if end > start]


def _find_mapped(names: Collection[str]) -> list[tuple[int, int]]:
    """Return the address ranges of these mapped files: start and end in bytes."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, *_, name = line.split(maxsplit=5)
        if name in names:
            start, _, end = place.partition("-")
            ranges.append((int(start, 16), int(end, 16)))
    return ranges


def _give_back(ranges: Iterable[tuple[int, int]]) -> None:
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, end in ranges:
        advice = mmap.MADV_DONTNEED if _is_a_files(start, end) else _MADV_PAGEOUT
        if madvise(start, end - start, advice):
            logger.debug("madvise: error %d", ctypes.get_errno())


def _is_a_files(start: int, end: int) -> bool:
    """Return whether all present pages are as in a file, so that they can be dropped.

    Paging them out would take eight times as long. The kernel would read the file from the disk again.
    """
    first, past = start // mmap.PAGESIZE, end // mmap.PAGESIZE
    try:
        with _PAGES.open("rb", buffering=0) as stream:
            stream.seek(first * _PAGE_ENTRY.itemsize)
            entries = np.frombuffer(stream.read((past - first) * _PAGE_ENTRY.itemsize), _PAGE_ENTRY)
    except OSError:  # pages are not reported here
        return False
    is_there = entries >> 62 != 0  # in memory or in the swap space
    is_of_file = entries >> 61 & 1 != 0
    return len(entries) == past - first and bool(is_there.any()) and bool(is_of_file[is_there].all())
