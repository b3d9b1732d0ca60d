"""Giving back the memory of weights that torch does not need any more."""

import contextlib
import ctypes
import logging
import mmap
import threading
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import torch

from openvino_backend.options import Options

logger = logging.getLogger(__name__)

_INTERVAL = 0.25  # seconds
_MADV_PAGEOUT = 21  # of Linux, from 5.4


@contextlib.contextmanager
def release_memory(
    options: Options, tensors: Iterable[torch.Tensor], files: Collection[Path | None] = ()
) -> Iterator[None]:
    """Give the pages of tensors and of mapped files back to the kernel again and again in the block, and at its end.

    Nothing is lost: a page that was mapped from a file, as safetensors maps weights, is read from there when it is
    touched again; a changed one goes to the swap space, or stays where there is none. Without it a compilation has the
    weights in memory twice, torch's and OpenVINO's.
    """
    ranges = [*_find_pages(tensors), *_find_mapped(files)] if options.release_weights else []
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
        _give_back(ranges)


def _find_pages(tensors: Iterable[torch.Tensor]) -> list[tuple[int, int]]:
    """Return the address ranges of whole pages that the tensors fill, in bytes from and to."""
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


def _find_mapped(files: Collection[Path | None]) -> list[tuple[int, int]]:
    """Return the address ranges at which these files are mapped, in bytes from and to."""
    names = {str(each.resolve()) for each in files if each is not None}
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
        if madvise(start, end - start, _MADV_PAGEOUT):
            logger.debug("madvise: error %d", ctypes.get_errno())
