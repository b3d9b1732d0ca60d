"""What a request may cost: each bound is met by a request that is small, or is refused before the work is done."""

import base64
import io
import json
import logging
import signal
import struct
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from PIL import Image

from scorecard.fuzz import MODEL, Hostile, make_animation, make_attacks, make_jpeg, make_png, make_progressive
from sdxl_server.api.native import NativeApi
from sdxl_server.api.openai import OpenAIApi, OpenAIEditApi
from sdxl_server.errors import MAX_MESSAGE, MAX_PARAM, RequestError
from sdxl_server.request import uploads
from sdxl_server.request.upload_limits import MAX_FIELDS, MAX_SCANS, MAX_SEGMENTS, check_segments, limit_time
from sdxl_server.schemas import is_valid, pair, shorten, text
from sdxl_server.service import describe_error
from tests.unit.test_request import CONTRACT
from tools.server import ROOT

READERS: dict[str, NativeApi] = {
    MODEL: NativeApi(),
    f"{MODEL}/1.0/v1/images/generations": OpenAIApi(),
    f"{MODEL}/1.0/v1/images/edits": OpenAIEditApi(),
}


def read(hostile: Hostile) -> tuple[float, str]:
    """Return the seconds that a face reads a request, and what it tells then."""
    told, kind = "", hostile.headers["Content-Type"]
    start = time.process_time()
    try:
        READERS[hostile.path].read({"body": bytearray(hostile.body)}, content_type=kind, contract=CONTRACT)
    except RequestError as error:
        told = json.dumps(describe_error(error, "a"))
    return time.process_time() - start, told


def test_attacks_are_refused_soon_and_in_few_words() -> None:
    made = ((name, make()) for name, make in make_attacks().items())
    read_here = {name: read(hostile) for name, hostile in made if not hostile.is_form and hostile.path in READERS}
    assert len(read_here) > 15
    assert [name for name, (seconds, told) in read_here.items() if seconds > 2 or len(told) > 5000] == []


@pytest.mark.parametrize("name", ["🦊" * 10**6, "\1" * 10**6, "\ud800" * 10**6, "a" * 10**6])
def test_echoes_are_bounded(name: str) -> None:
    for fields in ({name: 1}, {"prompt": name}, {"prompt": {name: [name]}}, {"prompt": [name] * 10}):
        with pytest.raises(RequestError) as caught:
            CONTRACT.check(fields)
        assert len(str(caught.value)) <= MAX_MESSAGE
        assert len(caught.value.param or "") <= MAX_PARAM
    assert len(str(RequestError(name))) == MAX_MESSAGE


def test_long_values_are_shown_as_short_ones_are() -> None:
    values: tuple[Any, ...] = (
        "é" * 5,
        "a" * 58,
        b"\xff",
        ["a", 1],
        {"b": None, "a": [1.5]},
        (),
        10**20,
        None,
        [[]],
        {1: 2},
    )
    for value in values:
        assert shorten(value) == ascii(list(value) if isinstance(value, tuple) else value)
    assert shorten("a" * 10**6) == "'" + "a" * 56 + "..."
    assert shorten([1] * 10**6) == ascii([1] * 60)[:57] + "..."
    assert shorten(10**5000) == "'a number of 16610 bits'"


def test_messages_in_the_log_have_one_line_each(caplog: pytest.LogCaptureFixture) -> None:
    prompt = "a fox\n[METRICS]forged.Count:1|#Level:Model\u2028" + "x" * 10**6
    try:
        try:
            raise KeyError(prompt)
        except KeyError as error:
            raise ValueError(prompt) from error
    except ValueError as error:
        with caplog.at_level(logging.ERROR):
            describe_error(error, "a")
    (told,) = caplog.messages
    lines = told.splitlines()
    assert len(told) < 3 * MAX_MESSAGE
    assert not [line for line in lines if line.startswith("[METRICS]")]
    assert [line.partition(":")[0] for line in lines if "forged" in line] == ["ValueError", "KeyError"]


@pytest.mark.parametrize("count", [MAX_FIELDS, MAX_FIELDS + 1])
def test_fields_of_a_form_are_counted_first(count: int) -> None:
    with pytest.raises(RequestError) as caught:
        NativeApi().read({f"x{i}": b"\xff" for i in range(count)}, content_type="", contract=CONTRACT)
    assert ("at most 100 fields, not 101" in str(caught.value)) == (count > MAX_FIELDS)


def test_length_is_checked_before_what_is_in_it() -> None:
    class Counted(list[int]):
        looked_at = 0

        def __getitem__(self, index: Any) -> Any:
            Counted.looked_at += 1
            return super().__getitem__(index)

    schema = pair(0, 9)
    assert is_valid([1, 2], schema)
    assert not is_valid(Counted([1] * 10), dict(sorted(schema.items())))  # items stand before maxItems there
    assert Counted.looked_at == 0
    assert is_valid(Counted([1, 2]), schema)
    assert Counted.looked_at == 2


@pytest.mark.parametrize(
    "prompt", [" " * 2999 + "\0", "a" * 2999 + "\0", " " * 3000, "\0" * 3000, "a " * 1499 + "\0", "\x85" * 2999 + "\0"]
)
def test_longest_prompt_is_checked_soon(prompt: str) -> None:
    start = time.process_time()
    assert not is_valid(prompt, text(3000, is_needed=True))
    assert time.process_time() - start < 0.2


def test_pictures_as_programs_write_them_pass() -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    noise = Image.effect_noise((512, 512), 90).convert("RGB")
    noise.save(buffer, "JPEG", progressive=True, exif=exif, icc_profile=bytes(3_000_000), quality=98)
    check_segments(buffer.getvalue())
    check_segments(buffer.getvalue() + bytes(10**6) + buffer.getvalue() * 30)  # what cameras append
    for kind in ("PNG", "WEBP"):
        buffer = io.BytesIO()
        noise.save(buffer, kind, exif=exif)
        check_segments(buffer.getvalue())
        check_segments(buffer.getvalue() + bytes(10**6))
    buffer = io.BytesIO()
    noise.save(buffer, "WEBP", save_all=True, append_images=[noise.rotate(90)] * 3)
    check_segments(buffer.getvalue())


def test_pieces_are_counted() -> None:
    check_segments(make_progressive(64, MAX_SCANS - 10))
    png, jpeg = make_png(64, 64, bytes(64 * 193)), make_jpeg()
    chunk = struct.pack(">I4sI", 0, b"teXt", 0)
    for file, told in {
        make_progressive(64, MAX_SCANS): "more than 40 scans",
        make_animation(MAX_SEGMENTS): "more than 10000 chunks",
        make_animation(MAX_SEGMENTS).replace(b"ANIM", b"IEND"): "more than 10000 chunks",
        png[:33] + chunk * MAX_SEGMENTS + png[33:]: "more than 10000 chunks",
        jpeg[:20] + b"\xff\xfe\0\2" * MAX_SEGMENTS + jpeg[20:]: "more than 10000 segments",
        jpeg[:20] + bytes(MAX_SEGMENTS) + jpeg[20:]: "as many bytes between them",
        jpeg[:20] + b"\xff" * MAX_SEGMENTS + jpeg[20:]: "as many bytes between them",
        jpeg[:20] + b"\xff\xf0\x27\x11" + bytes(MAX_SEGMENTS) + jpeg[20:]: "as many bytes between them",
        jpeg[:20] + b"\xff\x00" * MAX_SEGMENTS: "no scan",
    }.items():
        with pytest.raises(ValueError, match=told):
            check_segments(file)


@pytest.mark.parametrize(
    "file", [b"", b"\xff\xd8", b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"RIFF\xff\xff\xff\xffWEBPVP8 "]
)
def test_files_that_are_cut_short_are_left_to_pillow(file: bytes) -> None:
    check_segments(file)
    with pytest.raises(RequestError, match=r"image takes a whole image as JPEG"):
        CONTRACT.check({"prompt": "a", "image": base64.b64encode(file).decode()})


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def test_time_is_limited() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(RequestError, match=r"more than 0.05 s"), limit_time(0.05):
        spin(5)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    with limit_time(0.05):
        pass
    spin(0.1)


def test_limit_comes_again_where_it_was_swallowed() -> None:
    def swallow() -> None:
        try:
            spin(5)
        except ValueError:
            spin(5)

    start = time.monotonic()
    with pytest.raises(RequestError), limit_time(0.05):
        swallow()
    assert time.monotonic() - start < 3


def test_other_threads_have_no_limit() -> None:
    done = []

    def work() -> None:
        with limit_time(0.01):
            spin(0.05)
        done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done


def test_limit_ends_what_the_counts_let_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "check_segments", lambda _: None)
    file = base64.b64encode(make_progressive(512, 40_000)).decode()  # 6 s; a piece of 64 KB takes less than one
    start = time.monotonic()
    with pytest.raises(RequestError, match=r"more than 0.2 s"), limit_time(0.2):
        CONTRACT.check({"prompt": "a", "image": file})
    assert time.monotonic() - start < 4


CORES = """
import openvino
from sdxl_server.errors import RequestError
from sdxl_server.request.upload_limits import limit_time

cores = [openvino.Core(), openvino.Core()]
for index in range(2):
    cores[index].get_property("CPU", "FULL_DEVICE_NAME")  # loads the plugin
del cores[0]
del cores[0]
try:
    with limit_time(0.05):
        while True:
            pass
except RequestError:
    print("refused")
"""


def test_limit_holds_after_two_cores_of_openvino() -> None:
    """They leave a stack for signals that is unmapped."""
    done = subprocess.run([sys.executable, "-c", CORES], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr
