"""Hostile requests as data: each a method, a path, headers and a body, or the bytes of a whole connection.

generated.py adds the requests that follow or break the server's OpenAPI document.
"""

import base64
import functools
import io
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from PIL import Image

from scorecard.clients import CONTROL

MODEL = "/predictions/diffusion_fast"
PATHS = (
    *(MODEL, f"{MODEL}/1.0", f"{MODEL}/1.0/describe", f"{MODEL}/1.0/openapi.json", f"{MODEL}/1.0/v1/models"),
    *(f"{MODEL}/1.0/v1/images/{end}" for end in ("generations", "edits", "variations")),
    *(f"{MODEL}/1.0/sdapi/v1/{end}" for end in ("txt2img", "img2img", "options", "png-info", "progress")),
    *(f"{MODEL}/1.0/controlnet/{end}" for end in ("model_list", "module_list", "detect")),
    *(f"{MODEL}/1.0/%2e%2e/%00", f"{MODEL}/9.9", f"{MODEL}/1.0/{'a' * 3000}", f"{MODEL}//1.0//describe"),
    *(f"{MODEL}?prompt=a+fox&steps=1", f"{MODEL}?seed=%ff&seed=%00", "/predictions/none", "/predictions"),
    *("/ping", "/explanations/diffusion_fast", "/v1/models/diffusion_fast:predict", "/invocations", "/wf-predict/x"),
    *("/models", "/workflows", "/metrics", "/v2/health/ready", "/../../etc/passwd"),
)
METHODS = ("GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "FOX")
TEXTS = (
    *("", " ", "a fox", "a fox\0", "\ud800", "\udfff\ud800", "é\u0301" * 50, "\u202e\u2066fox", "🦊" * 300, "ﷺ" * 800),
    *("a" * 1999, "a" * 5000, "fox " * 400, "\r\nX-Injected: 1\r\n\r\n", "\x1b[2J\x07", "${jndi:ldap://127.0.0.1:9/x}"),
    *("[METRICS]forged.Count:1|#Level:Model|#type:COUNTER", "x\n[PID]1\nTorch worker started.", "%n%s%x"),
    *("{0}{a.__class__}", "<script>alert(1)</script>", "' OR 1=1 --", "../../etc/passwd", "\ufeff\ufffe\uffff"),
    *("1" * 400, "null", "NaN"),
)
NOISE = Random(0).randbytes(3000)
JSON = b'{"prompt": "a fox", "width": 64, "height": 64, "seed": 1}'
BODIES: tuple[tuple[str, bytes], ...] = (  # by content type
    *(("application/json", json.dumps({"prompt": text}).encode()) for text in TEXTS),
    *(("application/json", json.dumps({text[:200]: 1}).encode()) for text in TEXTS),
    *(("application/json", JSON.replace(b"1", number)) for number in (b"NaN", b"1e999", b"-Infinity", b"0x1", b"01")),
    *(("application/json", JSON.replace(b"1", number)) for number in (b"1" * 5000, b"1e-320", b"-0.0", b"[[]]")),
    *(("application/json", body) for body in (b"", JSON[:20], JSON[:20] + NOISE[:3] + JSON[20:], JSON + JSON)),
    *(("application/json", body) for body in (JSON.decode().encode("utf-16"), b"\xef\xbb\xbf" + JSON, NOISE)),
    *(("application/json", b"[" * count) for count in (10, 1000, 100_000)),
    ("application/json", b'{"a":' * 50_000),
    ("application/json", b'{"prompt": "a", ' + b",".join(b'"a%d": 1' % i for i in range(20_000)) + b"}"),
    ("application/json", b'{"prompt": "\\ud800\\udc00\\ud800"}'),
    ("application/json", b'{"prompt": "a", "prompt": "b"}'),
    *(("text/plain", text.encode("utf-8", "surrogatepass")) for text in TEXTS),
    ("text/plain", NOISE[:200]),
    *(("application/x-www-form-urlencoded", body) for body in (b"prompt=a+fox&num_inference_steps=1", b"&&&===")),
    *(("application/x-www-form-urlencoded", body) for body in (b"prompt=%", b"a=b&" * 5000, b"prompt=%ff%00")),
)
CONTENT_TYPES = (  # of a body that is JSON
    *("", "text/plain", "application/json; charset=utf-16", "application/json\t;;;=", "text/plain; charset=utf-7"),
    *("application/x-www-form-urlencoded", "multipart/form-data", "multipart/form-data; boundary=", "image/png"),
    *("multipart/mixed; boundary=b", "application/octet-stream", "a" * 500),
)
HOSTILE_HEADERS = (
    *(("describe", "True"), ("explain", "True"), ("ts_stream_next", "true"), ("ts_request_sequence_id", "1")),
    *(("requestId", "0"), ("url_path", "describe"), ("Accept", "application/json"), ("Accept", "\xff" * 50)),
    *(("Content-Encoding", "gzip"), ("Expect", "100-continue"), ("Range", "bytes=5-"), ("X-Large", "a" * 6000)),
    *(("Upgrade", "h2c"), ("Connection", "upgrade"), ("Host", "[::1"), ("X-Forwarded-For", "${jndi:ldap://127.0.0.1}")),
    *(("Cookie", "a=" + "b" * 2000), ("Origin", "null"), ("TE", "trailers"), ("X-Bytes", "\xe9\xa0\xff")),
)
PART_HEADS = (  # of a multipart form
    *(f'Content-Disposition: form-data; name="{name}"' for name in ("prompt", 'a"; filename="b', "a" * 3000)),
    *(
        f'Content-Disposition: form-data; name="image"; {file}'
        for file in ('filename="../../x"', "filename*=utf-8''%ff")
    ),
    *(f"Content-Disposition: {kind}" for kind in ("form-data", "attachment", "")),
    *(
        f'Content-Disposition: form-data; name="image"; filename="x.png"\r\nContent-{line}'
        for line in ("Type: \xff", "Transfer-Encoding: base64")
    ),
)
FORM_ENDS = (b"--b--\r\n", b"", b"--b", b"--c--\r\n")
TXT2IMG = f"{MODEL}/1.0/sdapi/v1/txt2img"
CONTROLS = (  # and units of A1111's ControlNet
    *(b"{}", b"[[]]", b"[null, true, 1, {}]", b"[" * 1000, b"[" + b"{}," * 10_000 + b"{}]", b'{"name": "edges"}'),
    *(b'[{"name": "edges", "image": "", "scale": %b}]' % number for number in (b"NaN", b"1e999", b"true", b'"1"')),
    *(b'[{"model": "edges", "image": %b, "enabled": "x"}]' % value for value in (b"{}", b"[]", b'{"image": {}}', b"7")),
    *(
        b'[{"model": %b, "weight": {}, "resize_mode": []}]' % value
        for value in (b'"edges [x]"', b"[]", b"{}", b"1e400")
    ),
)
IMAGE_KINDS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")


@dataclass(frozen=True)
class Hostile:
    """One request; the token is added when it is sent."""

    method: str
    path: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def is_form(self) -> bool:
        return any(kind in self.headers.get("Content-Type", "") for kind in ("multipart", "urlencoded"))


def list_requests() -> list[Hostile]:
    """Return requests that a server must answer with 2xx or 4xx."""
    forms = [f"--b\r\n{head}\r\n\r\n".encode("latin-1") + b"a fox\r\n" for head in PART_HEADS]
    forms += [_make_part(b"prompt", b"a fox"), _make_part(b"image", NOISE), _make_part(b"x", b"") * 300, b""]
    files = list_bad_images()
    return [
        *(_post(body, kind) for kind, body in BODIES),
        *(_post(JSON, kind) for kind in CONTENT_TYPES),
        *(
            Hostile("POST", MODEL, JSON, {"Content-Type": "application/json", name: value})
            for name, value in HOSTILE_HEADERS
        ),
        *(_post(JSON, path=path) for path in PATHS),
        *(Hostile("GET", path, b"") for path in PATHS),
        *(Hostile(method, MODEL, JSON, {"Content-Type": "application/json"}) for method in METHODS),
        *(_post(form + end, _FORM) for form in forms for end in FORM_ENDS),
        *(make_upload(name, file) for name in ("image", "mask_image") for file in files),
        *(make_control(file) for file in files),
        *(make_unit(file) for file in files),
        *(
            _post(_make_part(b"control", text.encode("utf-8", "replace")) + forms[0] + FORM_ENDS[0], _FORM)
            for text in TEXTS
        ),
        *(_post(b'{"prompt": "a", "control": ' + value + b"}") for value in CONTROLS),
        *(
            _post(b'{"prompt": "a", "alwayson_scripts": {"controlnet": {"args": ' + value + b"}}}", path=TXT2IMG)
            for value in CONTROLS
        ),
        *(_post(_make_part(b"prompt", b"a") + _make_part(b"image", file) + FORM_ENDS[0], _FORM) for file in files),
    ]


def list_connections(token: str) -> tuple[bytes, ...]:
    """Return what clients send that do not keep to HTTP; a server may answer 4xx, or close the connection."""
    head = f"POST {MODEL} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n".encode()
    return (
        NOISE,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + NOISE[:200],  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + NOISE[:50],
        b"GET / HTTP/9.9\r\n\r\n",
        b"\r\n" * 500,
        head + b"Content-Length: -1\r\n\r\n",
        head + b"Content-Length: 99999999999999999999\r\n\r\n",
        head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
        head + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
        head + b"Transfer-Encoding: chunked\r\n\r\nfffffffff\r\nx",
        head + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
        head + b"X: " + b"a" * 20_000 + b"\r\n\r\n",
        head + b"Y:\0\x80\r\n\r\n",
        head + b"Content-Type: text/plain\r\nContent-Length: 50\r\n\r\nonly a part of it",
        b"POST " + b"/" * 9000 + b" HTTP/1.1\r\n\r\n",
    )


def list_bad_images() -> list[bytes]:
    """Return files that are no whole image, or far larger than their bytes."""
    files = [save_image(Image.new("RGB", (65, 64), "red"), kind) for kind in IMAGE_KINDS]
    return [
        *(file[: len(file) // 2] for file in files),
        *(file[: len(file) // 2] + NOISE[:4] + file[len(file) // 2 + 4 :] for file in files),
        b"",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        make_png(60_000, 60_000, b"\0" * 100_000),
        make_png(8, 8, b"\0" * 50_000_000),
        make_png(0, 0, b""),
        make_png(64, 64, b"\0" * 64 * 193, text=b"\0" * 20_000_000),
    ]


def save_image(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return an image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_png(width: int, height: int, pixels: bytes, *, text: bytes = b"") -> bytes:
    """Return a PNG of the stated size with these bytes as its pixels; both may be far too large."""
    header = _make_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    comment = _make_chunk(b"zTXt", b"a\0\0" + zlib.compress(text, 1)) if text else b""
    content = _make_chunk(b"IDAT", zlib.compress(pixels, 1))
    return b"\x89PNG\r\n\x1a\n" + header + comment + content + _make_chunk(b"IEND", b"")


FORM_PAIRS = "pairs of a form"  # nginx bounds them; TorchServe reads them all before its worker sees a request


def make_attacks() -> dict[str, Callable[[], Hostile]]:
    """Return by name the requests that would cost far more than their bytes if nothing bounded the cost."""
    upload = functools.partial(make_upload, "image")
    return {
        "emoji in a name": lambda: _post(b'{"' + "🦊".encode() * 8_388_600 + b'": 1}'),
        "control characters in a form's name": lambda: _post(b"\1" * 16_800_000 + b"=1", _PAIRS),
        "the same, of a part": lambda: _post(_make_part(b"\1" * 16_800_000, b"1"), _FORM),
        "lone surrogates in a value": lambda: _post(b'{"prompt": "' + rb"\ud800" * 5_000_000 + b'"}'),
        "escapes in OpenAI's value": lambda: _post(
            b'{"prompt": "a", "quality": "' + rb"\u0001" * 5_000_000 + b'"}', path=f"{MODEL}/1.0/v1/images/generations"
        ),
        "a body that is a list": lambda: _post(b"[" + b'"\xf0\x9f\xa6\x8a",' * 4_000_000 + b"1]"),
        "numbers in a pair": lambda: _post(b'{"prompt": "a", "original_size": [' + b"1," * 1_500_000 + b"1]}"),
        "objects in a pair": lambda: _post(b'{"prompt": "a", "target_size": [' + b"{}," * 11_000_000 + b"1]}"),
        "names": lambda: _post(b"{" + b",".join(b'"%x":1' % i for i in range(2_500_000)) + b"}"),
        "nesting": lambda: _post(b'{"prompt": ' + b'{"a":[' * 5_000_000),
        "long numbers": lambda: _post(b"[" + (b"9" * 4300 + b",") * 7_800 + b"1]"),
        FORM_PAIRS: lambda: _post(b"&".join(b"%x" % i for i in range(1_000_000)), _PAIRS),
        "parts of a form": lambda: _post(b"".join(_make_part(b"%x" % i, b"") for i in range(200_000)), _FORM),
        "parts of one name": lambda: _post(_make_part(b"prompt", b"") * 100_000, _FORM),
        "a field called url_path": lambda: _post(b"", path="/invocations?url_path=x&prompt=a"),
        "a part called content-type": lambda: _post(_make_part(b"content-type", b"x"), _FORM),
        "scans of a JPEG": lambda: upload(make_progressive(2048, 8_000)),
        "segments of a JPEG": lambda: upload(_insert(make_jpeg(), b"\xff\xfe\0\2" * 6_000_000)),
        "bytes between a JPEG's segments": lambda: upload(_insert(make_jpeg(), b"\0" * 24_000_000)),
        "chunks of a PNG": lambda: upload(_repeat_chunk(b"IDAT", b"", 2_000_000)),
        "tags of a PNG": lambda: upload(_repeat_chunk(b"eXIf", _make_exif(65_535), 1)),
        "frames of a WebP": lambda: upload(make_animation(200_000)),
        "tags of a TIFF": lambda: upload(b"II*\0\x08\0\0\0" + _DIRECTORY * 1_000_000),
        "numbers of a TIFF": lambda: upload(b"II*\0\x08\0\0\0\1\0" + _STRIPS + bytes(24_000_000)),
        "blocks of a GIF": lambda: upload(b"GIF89a\x40\0\x40\0\0\0\0!\xfe" + b"\1a" * 12_000_000),
        "bytes before a GIF's image": lambda: upload(b"GIF89a\x40\0\x40\0\0\0\0" + b"a" * 24_000_000),
        "runs of a BMP": lambda: upload(_make_runs(7_000, 12_000_000)),
        "frames of an AVIF": lambda: upload(make_film(300)),
        "a mask of 64 megapixels": lambda: _post(
            json.dumps({"prompt": "a", "image": _encode(make_jpeg()), "mask": _encode(make_mask(8_000))}).encode(),
            path=f"{MODEL}/1.0/v1/images/edits",
        ),
        "base64 of no image": lambda: _post(b'{"prompt": "a", "image": "' + b"/" * 33_000_000 + b'"}'),
        "a prompt of white space": lambda: _post(json.dumps({"prompt": " " * 1_999 + "\0"}).encode()),
        "a prompt of one word": lambda: _post(json.dumps(dict.fromkeys(_PROMPTS, "\U000103c0" * 2_000)).encode()),
    }


_DIRECTORY = struct.pack("<HI", 0, 8)  # without tags; the next one is the first again
_STRIPS = struct.pack("<HHIII", 273, 4, 6_000_000, 26, 0)
_PAIRS, _FORM = "application/x-www-form-urlencoded", "multipart/form-data; boundary=b"
_PROMPTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")


def _post(body: bytes, kind: str = "application/json", *, path: str = MODEL) -> Hostile:
    return Hostile("POST", path, body, {"Content-Type": kind})


def _encode(file: bytes) -> str:
    return base64.b64encode(file).decode()


def make_upload(name: str, file: bytes) -> Hostile:
    """Return a request for one small step from an image."""
    small = {"width": 64, "height": 64, "num_inference_steps": 1, "strength": 1}
    return _post(json.dumps({"prompt": "a", **small, name: _encode(file)}).encode())


def make_control(file: bytes) -> Hostile:
    """Return a request for one small step with a control."""
    control = [{"name": CONTROL, "image": _encode(file), "preprocess": "canny"}]
    return _post(json.dumps({"prompt": "a", "width": 64, "height": 64, "control": control}).encode())


def make_unit(file: bytes) -> Hostile:
    """Return a request of A1111's API with a unit of its ControlNet."""
    units = [{"model": f"{CONTROL} [1a2b3c4d]", "image": {"image": _encode(file)}, "module": "canny"}]
    body = {"prompt": "a", "width": 64, "height": 64, "alwayson_scripts": {"ControlNet": {"args": units}}}
    return _post(json.dumps(body).encode(), path=TXT2IMG)


def _make_part(name: bytes, content: bytes) -> bytes:
    return b'--b\r\nContent-Disposition: form-data; name="' + name + b'"\r\n\r\n' + content + b"\r\n"


def make_jpeg(**options: Any) -> bytes:
    """Return a JPEG of one colour."""
    return save_image(Image.new("RGB", options.pop("size", (64, 64)), "red"), "JPEG", **options)


def make_progressive(side: int, scans: int) -> bytes:
    """Return a progressive JPEG that repeats its last scan."""
    whole = make_jpeg(size=(side, side), progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last * scans + whole[-2:]


def _insert(jpeg: bytes, segments: bytes) -> bytes:
    return jpeg[:20] + segments + jpeg[20:]  # past JFIF


def _make_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _repeat_chunk(kind: bytes, data: bytes, count: int) -> bytes:
    """Return a PNG that repeats a chunk before its pixels."""
    valid = make_png(64, 64, b"\0" * 64 * 193)
    return valid[:33] + _make_chunk(kind, data) * count + valid[33:]


def _make_exif(tags: int) -> bytes:
    """Return EXIF whose tags all point to the same bytes."""
    size = 8 + 2 + 12 * tags + 4
    entries = b"".join(struct.pack(">HHII", tag, 7, size - 8, 8) for tag in range(tags))
    return b"MM\0*" + struct.pack(">IH", 8, tags) + entries + bytes(4)


def make_animation(frames: int) -> bytes:
    """Return a WebP of many frames."""
    still = save_image(Image.new("RGB", (64, 64), "red"), "WEBP")
    frame = bytes(6) + b"\x3f\0\0\x3f\0\0" + bytes(4) + still[12:]
    chunk = b"ANMF" + struct.pack("<I", len(frame)) + frame + b"\0" * (len(frame) % 2)
    head = b"VP8X" + struct.pack("<I", 10) + b"\2\0\0\0\x3f\0\0\x3f\0\0" + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    content = b"WEBP" + head + chunk * frames
    return b"RIFF" + struct.pack("<I", len(content)) + content


def make_film(frames: int) -> bytes:
    """Return an AVIF of many frames."""
    frame = Image.new("RGB", (64, 64), "red")
    return save_image(frame, "AVIF", save_all=True, append_images=[frame] * (frames - 1), speed=10)


def _make_runs(side: int, runs: int) -> bytes:
    """Return a BMP in run lengths of one pixel each."""
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, 2 * runs, 0, 0, 256, 0)
    return b"BM" + struct.pack("<III", 54 + 1024 + 2 * runs, 0, 54 + 1024) + header + bytes(1024) + b"\1\1" * runs


def make_mask(side: int) -> bytes:
    """Return a transparent PNG."""
    return save_image(Image.new("RGBA", (side, side)), "PNG", compress_level=1)
