"""What bounds the work on a request before it is done, whatever the request holds.

Numbers of things are counted before they are read, at the speed of a search; what is read after that is at most some
times the bytes that it came in. A bound on time stands behind it.
"""

import contextlib
import ctypes
import functools
import re
import signal
import threading
from collections.abc import Iterator

from sdxl_server.errors import RequestError

MAX_FIELDS = 100  # of a form
MAX_PIECES = 10_000  # segments of a JPEG, chunks of a PNG or WebP, tags of a TIFF; 24 MB in chunks of 4 KB are 6,000
MAX_SCANS = 40  # of a progressive JPEG, each of which goes over the whole picture; encoders make 10
MAX_PIXELS = 50_000_000  # of an uploaded picture; telephones make up to 49 million
MAX_PICTURE_SIDE = 20_000  # of one, in pixels
MAX_RUNS = 2**20  # bytes of a BMP in run lengths, which Pillow reads in Python
MAX_NUMBERS = 100_000  # of one tag of a TIFF, such as the places of its tiles
READ_SECONDS = 20.0  # for one request; a picture of 50 megapixels takes 2 s

JPEG_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")  # past what stands for itself within a scan
BYTES = (1, 2, 6, 7)  # types of a TIFF's tags that Pillow keeps as they are
SCAN, END = 0xDA, 0xD9
WITH_LENGTH = frozenset((*range(0xC0, 0xD0), *range(0xDA, 0xE0), *range(0xE0, 0xF0), 0xFE)) - {0xC8}


def check_pieces(raw: bytes) -> None:
    """Refuse a picture's file of more pieces than pictures have.

    Raises:
        ValueError: says of what there are too many.
    """
    if raw.startswith(b"\xff\xd8"):
        _check_jpeg(raw)
    elif raw.startswith(b"\x89PNG"):
        _check_png(raw)
    elif raw.startswith(b"RIFF"):
        _check_webp(raw)
    elif raw.startswith(b"GIF8"):
        _check_gif(raw)
    elif raw.startswith((b"II", b"MM")):
        _check_tiff(raw)
    elif raw.startswith(b"BM") and raw[30:34] in (b"\1\0\0\0", b"\2\0\0\0") and len(raw) > MAX_RUNS:
        raise ValueError(f"it is a BMP in run lengths of more than {MAX_RUNS} bytes")


def _check_jpeg(raw: bytes) -> None:
    """Walk from marker to marker; before the first scan Pillow reads byte by byte what belongs to none."""
    position, pieces, scans = 2, 0, 0
    while found := JPEG_MARKER.search(raw, position):
        code = raw[found.end() - 1]
        pieces += 1 if scans else found.end() - position - 1
        scans += code == SCAN
        if scans > MAX_SCANS:
            raise ValueError(f"it has more than {MAX_SCANS} scans")
        if pieces > MAX_PIECES:
            raise ValueError(f"it has more than {MAX_PIECES} segments, or as many bytes between them")
        if code == END and scans:
            return
        position = found.end()
        if code in WITH_LENGTH:
            position += max(int.from_bytes(raw[position : position + 2]), 2)
    if not scans and len(raw) - position > MAX_PIECES:
        raise ValueError("it has no scan")


def _check_png(raw: bytes) -> None:
    """Walk from chunk to chunk; nobody reads what stands behind the last."""
    position = 8
    for _ in range(MAX_PIECES):
        if position >= len(raw) or raw[position + 4 : position + 8] == b"IEND":
            return
        position += 12 + int.from_bytes(raw[position : position + 4], "big")
    raise ValueError(f"it has more than {MAX_PIECES} chunks")


def _check_webp(raw: bytes) -> None:
    """Walk from chunk to chunk, of which each frame is one; nobody reads past the length that stands first."""
    position, end = 12, min(len(raw), 8 + int.from_bytes(raw[4:8], "little"))
    for _ in range(MAX_PIECES):
        if position >= end:
            return
        length = int.from_bytes(raw[position + 4 : position + 8], "little")
        position += 8 + length + length % 2
    raise ValueError(f"it has more than {MAX_PIECES} chunks")


def _check_gif(raw: bytes) -> None:
    """Walk over the extensions before the first picture, the only one that is read."""
    flags = raw[10] if len(raw) > 10 else 0
    position, is_within = 13 + (3 << (flags & 7) + 1 if flags & 128 else 0), False
    for _ in range(MAX_PIECES):
        if position >= len(raw):
            return
        value = raw[position]
        if is_within:
            position, is_within = position + 1 + value, value > 0
        elif value in b",;":
            return
        else:
            is_within = value == ord("!")
            position += 1 + is_within
    raise ValueError(f"it has more than {MAX_PIECES} blocks before its first picture")


def _check_tiff(raw: bytes) -> None:
    """Walk from directory to directory, all of which Pillow reads, and over their tags; text counts as one number."""
    read = functools.partial(int.from_bytes, byteorder="little" if raw.startswith(b"II") else "big")
    if read(raw[2:4]) != 42:
        raise ValueError("it is no TIFF of the first kind; a BigTIFF is not read")
    position, pieces = read(raw[4:8]), 0
    while position and position < len(raw):
        count = read(raw[position : position + 2])
        pieces += 1 + count
        if pieces > MAX_PIECES:
            raise ValueError(f"it has more than {MAX_PIECES} tags")
        end = position + 2 + 12 * count
        for entry in range(position + 2, end, 12):
            if read(raw[entry + 2 : entry + 4]) not in BYTES and read(raw[entry + 4 : entry + 8]) > MAX_NUMBERS:
                raise ValueError(f"it has a tag of more than {MAX_NUMBERS} numbers")
        position = read(raw[end : end + 4])


@contextlib.contextmanager
def limit_time(seconds: float) -> Iterator[None]:
    """Raise RequestError in a block that takes longer.

    It ends Python's code, and Pillow's decoders between two pieces of a file; one call into C goes on to its end. Only
    the main thread, in which TorchServe's workers run, gets signals: in others there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise RequestError(f"reading the request has taken more than {seconds:g} s; send smaller or simpler pictures")

    _disable_alternate_stack()
    previous = signal.signal(signal.SIGALRM, end)
    try:
        # Once more each second, since a library may take it for an error of its own and go on.
        signal.setitimer(signal.ITIMER_REAL, seconds, 1)
        yield
    finally:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
        finally:  # it may have come just before the line above
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)


class _SignalStack(ctypes.Structure):
    """The `stack_t` of Linux."""

    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


_SS_DISABLE = 2


def _disable_alternate_stack() -> None:
    """Let the signals of this thread run on its own stack.

    Python runs its handlers on the alternate stack. OpenVINO's CPU plugin sets one for each Core (openvino#11894).
    Two Cores that end in the order of their start leave one that is unmapped. The next signal would kill the process.
    """
    ctypes.CDLL(None).sigaltstack(ctypes.byref(_SignalStack(flags=_SS_DISABLE)), None)
