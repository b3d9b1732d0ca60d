"""Limits on the work of reading a request, against hostile files and bodies.

The segments of a file are counted by a fast search before Pillow reads them. Then the work is at most proportional to
the number of bytes. A time limit is the last protection.
"""

import contextlib
import ctypes
import functools
import re
import signal
import threading
from collections.abc import Iterator

from sdxl_server.errors import RequestError

IMAGE_FORMATS = ("JPEG", "PNG", "WebP", "AVIF", "GIF", "TIFF", "BMP")  # of uploads; each decoder can be attacked
MAX_FIELDS = 100  # of a form
MAX_SEGMENTS = 10_000  # of a JPEG, chunks of a PNG or WebP, tags of a TIFF; 24 MB in chunks of 4 KB have 6,000
MAX_SCANS = 40  # of a progressive JPEG; each scan visits all pixels, and encoders write 10 scans
MAX_PIXELS = 50_000_000  # that are decoded of an uploaded image
MAX_JPEG_PIXELS = 200_000_000  # of a JPEG, which is decoded at 1/2 to 1/8 of its sides
MAX_BUFFERED_PIXELS = 120_000_000  # of a JPEG that needs all coefficients in memory, 6 bytes a pixel: 0.7 GB
MAX_UPLOAD_SIDE = 20_000  # pixels
MAX_RUNS = 2**20  # bytes of a run-length-encoded BMP: Pillow decodes it in slow Python
MAX_NUMBERS = 100_000  # in one tag of a TIFF, such as the offsets of its tiles
READ_SECONDS = 20.0  # for one request; 50 megapixels take 2 s, and 200 of a JPEG 3 s

JPEG_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")  # without the markers inside a scan
BYTES = (1, 2, 6, 7)  # types of TIFF tags that Pillow does not convert
SCAN, END = 0xDA, 0xD9
FRAMES, PROGRESSIVE = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}, (0xC2, 0xC6, 0xCA, 0xCE)
WITH_LENGTH = frozenset((*range(0xC0, 0xD0), *range(0xDA, 0xE0), *range(0xE0, 0xF0), 0xFE)) - {0xC8}


def check_segments(raw: bytes) -> None:
    """Refuse an image file with more segments than real images have.

    Raises:
        ValueError: names what there is too much of.
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
        raise ValueError(f"it is a run-length-encoded BMP of more than {MAX_RUNS} bytes")


def _check_jpeg(raw: bytes) -> None:
    """Walk over the markers. Before the first scan Pillow reads other bytes one by one."""
    position, segments, scans, frame = 2, 0, 0, b""
    while found := JPEG_MARKER.search(raw, position):
        code = raw[found.end() - 1]
        segments += 1 if scans else found.end() - position - 1
        if code in FRAMES:
            frame = raw[found.end() - 1 : found.end() + 8]
        if code == SCAN and not scans:
            _check_buffers(frame, parts=raw[found.end() + 2 : found.end() + 3])
        scans += code == SCAN
        if scans > MAX_SCANS:
            raise ValueError(f"it has more than {MAX_SCANS} scans")
        if segments > MAX_SEGMENTS:
            raise ValueError(f"it has more than {MAX_SEGMENTS} segments, or as many bytes between them")
        if code == END and scans:
            return
        position = found.end()
        if code in WITH_LENGTH:
            position += max(int.from_bytes(raw[position : position + 2]), 2)
    if not scans and len(raw) - position > MAX_SEGMENTS:
        raise ValueError("it has no scan")


def _check_buffers(frame: bytes, *, parts: bytes) -> None:
    """Refuse a JPEG whose coefficients would take too much memory.

    Args:
        frame: the header of the image, from its marker's code on.
        parts: the number of colours in the first scan.
    """
    pixels = int.from_bytes(frame[4:6]) * int.from_bytes(frame[6:8])
    if pixels > MAX_BUFFERED_PIXELS and (frame[0] in PROGRESSIVE or parts != frame[8:9]):
        raise ValueError(f"it is progressive, with more than {MAX_BUFFERED_PIXELS // 10**6} megapixels")


def _check_png(raw: bytes) -> None:
    """Walk over the chunks. Nothing after the last chunk is read."""
    position = 8
    for _ in range(MAX_SEGMENTS):
        if position >= len(raw) or raw[position + 4 : position + 8] == b"IEND":
            return
        position += 12 + int.from_bytes(raw[position : position + 4], "big")
    raise ValueError(f"it has more than {MAX_SEGMENTS} chunks")


def _check_webp(raw: bytes) -> None:
    """Walk over the chunks; each frame is one. Nothing after the length in the header is read."""
    position, end = 12, min(len(raw), 8 + int.from_bytes(raw[4:8], "little"))
    for _ in range(MAX_SEGMENTS):
        if position >= end:
            return
        length = int.from_bytes(raw[position + 4 : position + 8], "little")
        position += 8 + length + length % 2
    raise ValueError(f"it has more than {MAX_SEGMENTS} chunks")


def _check_gif(raw: bytes) -> None:
    """Walk over the extensions before the first image, the only one that is read."""
    flags = raw[10] if len(raw) > 10 else 0
    position, is_within = 13 + (3 << (flags & 7) + 1 if flags & 128 else 0), False
    for _ in range(MAX_SEGMENTS):
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
    raise ValueError(f"it has more than {MAX_SEGMENTS} blocks before its first image")


def _check_tiff(raw: bytes) -> None:
    """Walk over the directories and their tags: Pillow reads them all. A text counts as one number."""
    read = functools.partial(int.from_bytes, byteorder="little" if raw.startswith(b"II") else "big")
    if read(raw[2:4]) != 42:
        raise ValueError("it is a BigTIFF or damaged; save it as an ordinary TIFF")
    position, segments = read(raw[4:8]), 0
    while position and position < len(raw):
        count = read(raw[position : position + 2])
        segments += 1 + count
        if segments > MAX_SEGMENTS:
            raise ValueError(f"it has more than {MAX_SEGMENTS} tags")
        end = position + 2 + 12 * count
        for entry in range(position + 2, end, 12):
            if read(raw[entry + 2 : entry + 4]) not in BYTES and read(raw[entry + 4 : entry + 8]) > MAX_NUMBERS:
                raise ValueError(f"it has a tag of more than {MAX_NUMBERS} numbers")
        position = read(raw[end : end + 4])


@contextlib.contextmanager
def limit_time(seconds: float) -> Iterator[None]:
    """Raise RequestError in a block that takes longer.

    The error comes between two steps of Python code. A call into C ends first; Pillow's decoders make many short calls.
    Only the main thread gets signals, and TorchServe's workers run in it. Other threads have no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise RequestError(f"reading the request took more than {seconds:g} s; send smaller or simpler images")

    _disable_alternate_stack()
    previous = signal.signal(signal.SIGALRM, end)
    try:
        # Again each second: a library may catch the error and continue.
        signal.setitimer(signal.ITIMER_REAL, seconds, 1)
        yield
    finally:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
        finally:  # the signal may come just before the line above
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
