"""Hostile requests, made from a seed: each a method, a path, headers and a body, or the bytes of a whole connection."""

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

from sdxl_server.request.fields import DECLARATIONS

MODEL = "/predictions/diffusion_fast"
PATHS = (
    *(MODEL, MODEL, MODEL, MODEL, f"{MODEL}/1.0", f"{MODEL}/1.0/describe", f"{MODEL}/1.0/openapi.json"),
    *(f"{MODEL}/1.0/v1/models", f"{MODEL}/1.0/v1/images/generations", f"{MODEL}/1.0/v1/images/edits"),
    *(f"{MODEL}/1.0/v1/images/variations", f"{MODEL}/1.0/%2e%2e/%00", f"{MODEL}/9.9", f"{MODEL}/1.0/" + "a" * 3000),
    *(f"{MODEL}?prompt=a+fox&steps=1", f"{MODEL}?seed=%ff&seed=%00", f"{MODEL}//1.0//describe"),
    *("/ping", "/explanations/diffusion_fast", "/v1/models/diffusion_fast:predict", "/invocations", "/wf-predict/x"),
    *(
        "/predictions/none",
        "/predictions",
        "/models",
        "/workflows",
        "/metrics",
        "/v2/health/ready",
        "/../../etc/passwd",
    ),
)
FIELDS = (
    *DECLARATIONS,
    "prompt",  # twice as often
    "n",
    "size",
    "model",
    "response_format",
    "user",
    "rng_seed",
    "promt",
    "__class__",
)
TEXTS = (
    *("", " ", "a fox", "a fox\0", "\ud800", "\udfff\ud800", "é\u0301" * 50, "\u202e\u2066fox", "🦊" * 300, "ﷺ" * 800),
    *("a" * 1999, "a" * 5000, "fox " * 400, "\r\nX-Injected: 1\r\n\r\n", "\x1b[2J\x07", "${jndi:ldap://127.0.0.1:9/x}"),
    *(
        "[METRICS]forged.Count:1|#Level:Model|#type:COUNTER",
        "x\n[PID]1\nTorch worker started.",
        "%n%s%x",
        "{0}{a.__class__}",
    ),
    *("<script>alert(1)</script>", "' OR 1=1 --", "../../etc/passwd", "\ufeff\ufffe\uffff", "1" * 400, "null", "NaN"),
)
NUMBERS = (*(0, 1, -1, 2, 8, 64, 63, 128, 127, 4, 1.5, -0.0, 1e-320, 2**31, 2**32, 2**63, -(2**63), 10**30, 1e308, 77),)
VALUES: tuple[Any, ...] = (
    *(None, True, False, [], {}, [[]], [1], [64, 64], [1e9, -1], ["a"] * 500, {"a": {"b": []}}, "64", "true"),
)
HEADERS = (
    *(("describe", "True"), ("explain", "True"), ("ts_stream_next", "true"), ("ts_request_sequence_id", "1")),
    *(("requestId", "0"), ("url_path", "describe"), ("Accept", "application/json"), ("Accept", "\xff" * 50)),
    *(("Content-Encoding", "gzip"), ("Expect", "100-continue"), ("Range", "bytes=5-"), ("X-Large", "a" * 6000)),
    *(("Upgrade", "h2c"), ("Connection", "upgrade"), ("Host", "[::1"), ("X-Forwarded-For", "${jndi:ldap://127.0.0.1}")),
    *(("Cookie", "a=" + "b" * 2000), ("Origin", "null"), ("TE", "trailers"), ("X-Bytes", "\xe9\xa0\xff")),
)
TYPES = (
    *("application/json", "application/json", "application/json", "text/plain", "application/json; charset=utf-16"),
    *(
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "text/plain; charset=utf-7",
    ),
    *("application/octet-stream", "image/png", "", "a" * 500, "application/json\t;;;=", "multipart/mixed; boundary=b"),
)
METHODS = (*("POST",) * 12, "GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "FOX")


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


def make_request(random: Random) -> Hostile:
    """Return a request that a server must answer with 2xx or 4xx."""
    make, kind = random.choice(_BODIES)
    body = make(random)
    kind = kind if random.random() < 0.8 else random.choice(TYPES)
    headers = {"Content-Type": kind.encode().decode("latin-1")} if kind else {}
    headers |= dict(random.sample(HEADERS, random.choice((0, 0, 0, 1, 2, 4))))
    return Hostile(random.choice(METHODS), random.choice(PATHS), body, headers)


def make_bytes(random: Random, token: str) -> bytes:
    """Return what a client that does not keep to HTTP sends; a server may answer 4xx, or close the connection."""
    head = f"POST {MODEL} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n"
    return random.choice(
        (
            random.randbytes(random.randrange(1, 3000)),
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + random.randbytes(200),  # TLS
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + random.randbytes(50),
            b"GET / HTTP/9.9\r\n\r\n",
            b"\r\n" * 500,
            f"{head}Content-Length: -1\r\n\r\n".encode(),
            f"{head}Content-Length: 99999999999999999999\r\n\r\n".encode(),
            f"{head}Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!".encode(),
            f"{head}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n".encode(),
            f"{head}Transfer-Encoding: chunked\r\n\r\nfffffffff\r\nx".encode(),
            f"{head}Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n".encode(),
            f"{head}X: {'a' * 20000}\r\n\r\n".encode(),
            head.encode() + b"Y:\0\x80\r\n\r\n",
            f"{head}Content-Type: text/plain\r\nContent-Length: 50\r\n\r\nonly a part of it".encode(),
            f"POST {'/' * 9000} HTTP/1.1\r\n\r\n".encode(),
        )
    )


def _make_value(random: Random, name: str) -> Any:
    if name in ("image", "mask_image"):
        return random.choice((base64.b64encode(make_image(random)).decode(), *TEXTS[:6]))
    pool = random.choice((TEXTS, NUMBERS, VALUES))
    return random.choice(pool)


def _make_json(random: Random) -> bytes:
    fields = {name: _make_value(random, name) for name in random.sample(FIELDS, random.randrange(4))}
    if random.random() < 0.7:
        fields["prompt"] = random.choice(("a fox", *TEXTS))
    text = json.dumps(fields)
    if random.random() < 0.2:
        text = text.replace("1", random.choice(("NaN", "1e999", "-Infinity", "0x1", "01", "1" * 5000)), 1)
    return text.encode()


def _make_broken_json(random: Random) -> bytes:
    valid = _make_json(random)
    cut = random.randrange(len(valid) + 1)
    return random.choice(
        (
            valid[:cut],
            valid[:cut] + random.randbytes(3) + valid[cut:],
            valid + valid,
            valid.decode().encode("utf-16"),
            b"[" * random.choice((10, 1000, 100_000)),
            b'{"a":' * 50_000,
            b'{"prompt": "a", ' + b",".join(b'"a%d": 1' % i for i in range(20_000)) + b"}",
            b'{"prompt": "\\ud800\\udc00\\ud800"}',
            b'{"prompt": "a", "prompt": "b"}',
            b"\xef\xbb\xbf" + valid,
        )
    )


def _make_text(random: Random) -> bytes:
    return random.choice((random.randbytes(200), *(text.encode("utf-8", "surrogatepass") for text in TEXTS)))


def _make_form(random: Random) -> bytes:
    """Return a multipart body with the boundary `b`, mostly a broken one."""
    parts = []
    for _ in range(random.choice((0, 1, 2, 5, 300))):
        name = random.choice((*FIELDS, 'a"; filename="b', "é", "a" * 3000))
        content = make_image(random) if random.random() < 0.3 else _make_text(random)
        extra = random.choice(("", '; filename="x.png"', "; filename*=utf-8''%ff", '; filename="../../x"'))
        kind = random.choice(
            ("", "Content-Type: image/png\r\n", "Content-Type: \xff\r\n", "Content-Transfer-Encoding: base64\r\n")
        )
        disposition = random.choice((f'form-data; name="{name}"{extra}', "form-data", "attachment", ""))
        head = f"--b\r\nContent-Disposition: {disposition}\r\n{kind}\r\n".encode("utf-8", "replace")
        parts.append(head + content + b"\r\n")
    return b"".join(parts) + random.choice((b"--b--\r\n", b"", b"--b", b"--c--\r\n"))


def _make_pairs(random: Random) -> bytes:
    return random.choice(
        (b"prompt=a+fox&num_inference_steps=1", b"&&&===", b"prompt=%", b"a=b&" * 5000, b"prompt=%ff%00")
    )


def make_image(random: Random) -> bytes:
    """Return a picture, mostly a broken or a hostile one."""
    from PIL import Image

    buffer = io.BytesIO()
    kind = random.choice(("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF"))
    Image.new("RGB", (random.choice((1, 8, 64, 65)), 64), "red").save(buffer, kind)
    valid = buffer.getvalue()
    cut = random.randrange(len(valid))
    broken = valid[:cut] + random.randbytes(4) + valid[cut + 4 :]
    return random.choice((valid, valid[:cut], broken, b"", *_make_bombs()))


@functools.cache
def _make_bombs() -> tuple[bytes, ...]:
    return (
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        make_png(60_000, 60_000, b"\0" * 100_000),
        make_png(8, 8, b"\0" * 50_000_000),
        make_png(0, 0, b""),
        make_png(64, 64, b"\0" * 64 * 193, text=b"\0" * 20_000_000),
    )


def make_png(width: int, height: int, pixels: bytes, *, text: bytes = b"") -> bytes:
    """Return a PNG that claims a size, with these bytes as its pixels; both may be far too large."""
    header = _make_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    comment = _make_chunk(b"zTXt", b"a\0\0" + zlib.compress(text, 1)) if text else b""
    content = _make_chunk(b"IDAT", zlib.compress(pixels, 1))
    return b"\x89PNG\r\n\x1a\n" + header + comment + content + _make_chunk(b"IEND", b"")


PAIRS = "pairs of a form"  # nginx bounds them; TorchServe reads them all before its worker sees a request


def make_attacks() -> dict[str, Callable[[], Hostile]]:
    """Return by their names requests whose cost would be out of all proportion to their bytes, were it not bounded."""
    picture = functools.partial(make_upload, "image")
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
        PAIRS: lambda: _post(b"&".join(b"%x" % i for i in range(1_000_000)), _PAIRS),
        "parts of a form": lambda: _post(b"".join(_make_part(b"%x" % i, b"") for i in range(200_000)), _FORM),
        "parts of one name": lambda: _post(_make_part(b"prompt", b"") * 100_000, _FORM),
        "a field called url_path": lambda: _post(b"", path="/invocations?url_path=x&prompt=a"),
        "a part called content-type": lambda: _post(_make_part(b"content-type", b"x"), _FORM),
        "scans of a JPEG": lambda: picture(make_progressive(2048, 8_000)),
        "segments of a JPEG": lambda: picture(_insert(make_jpeg(), b"\xff\xfe\0\2" * 6_000_000)),
        "bytes between a JPEG's segments": lambda: picture(_insert(make_jpeg(), b"\0" * 24_000_000)),
        "chunks of a PNG": lambda: picture(_repeat_chunk(b"IDAT", b"", 2_000_000)),
        "tags of a PNG": lambda: picture(_repeat_chunk(b"eXIf", _make_exif(65_535), 1)),
        "frames of a WebP": lambda: picture(make_animation(200_000)),
        "tags of a TIFF": lambda: picture(b"II*\0\x08\0\0\0" + _DIRECTORY * 1_000_000),
        "numbers of a TIFF": lambda: picture(b"II*\0\x08\0\0\0\1\0" + _STRIPS + bytes(24_000_000)),
        "blocks of a GIF": lambda: picture(b"GIF89a\x40\0\x40\0\0\0\0!\xfe" + b"\1a" * 12_000_000),
        "bytes before a GIF's picture": lambda: picture(b"GIF89a\x40\0\x40\0\0\0\0" + b"a" * 24_000_000),
        "runs of a BMP": lambda: picture(_make_runs(7_000, 12_000_000)),
        "frames of an AVIF": lambda: picture(make_film(300)),
        "a mask of 64 megapixels": lambda: _post(
            json.dumps({"prompt": "a", "image": _encode(make_jpeg()), "mask": _encode(make_mask(8_000))}).encode(),
            path=f"{MODEL}/1.0/v1/images/edits",
        ),
        "base64 of no picture": lambda: _post(b'{"prompt": "a", "image": "' + b"/" * 33_000_000 + b'"}'),
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
    """Return a request for one small step from a picture."""
    small = {"width": 64, "height": 64, "num_inference_steps": 1, "strength": 1}
    return _post(json.dumps({"prompt": "a", **small, name: _encode(file)}).encode())


def _make_part(name: bytes, content: bytes) -> bytes:
    return b'--b\r\nContent-Disposition: form-data; name="' + name + b'"\r\n\r\n' + content + b"\r\n"


def make_jpeg(**options: Any) -> bytes:
    """Return a JPEG of one colour."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", options.pop("size", (64, 64)), "red").save(buffer, "JPEG", **options)
    return buffer.getvalue()


def make_progressive(side: int, scans: int) -> bytes:
    """Return a progressive JPEG whose last scan comes so many times."""
    whole = make_jpeg(size=(side, side), progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last * scans + whole[-2:]


def _insert(jpeg: bytes, segments: bytes) -> bytes:
    return jpeg[:20] + segments + jpeg[20:]  # past JFIF


def _make_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _repeat_chunk(kind: bytes, data: bytes, count: int) -> bytes:
    """Return a PNG with so many of a chunk before its pixels."""
    valid = make_png(64, 64, b"\0" * 64 * 193)
    return valid[:33] + _make_chunk(kind, data) * count + valid[33:]


def _make_exif(tags: int) -> bytes:
    """Return EXIF whose tags all point to the same bytes."""
    size = 8 + 2 + 12 * tags + 4
    entries = b"".join(struct.pack(">HHII", tag, 7, size - 8, 8) for tag in range(tags))
    return b"MM\0*" + struct.pack(">IH", 8, tags) + entries + bytes(4)


def make_animation(frames: int) -> bytes:
    """Return a WebP of so many frames."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "WEBP")
    frame = bytes(6) + b"\x3f\0\0\x3f\0\0" + bytes(4) + buffer.getvalue()[12:]
    chunk = b"ANMF" + struct.pack("<I", len(frame)) + frame + b"\0" * (len(frame) % 2)
    head = b"VP8X" + struct.pack("<I", 10) + b"\2\0\0\0\x3f\0\0\x3f\0\0" + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    content = b"WEBP" + head + chunk * frames
    return b"RIFF" + struct.pack("<I", len(content)) + content


def make_film(frames: int) -> bytes:
    """Return an AVIF of so many frames."""
    from PIL import Image

    buffer = io.BytesIO()
    frame = Image.new("RGB", (64, 64), "red")
    frame.save(buffer, "AVIF", save_all=True, append_images=[frame] * (frames - 1), speed=10)
    return buffer.getvalue()


def _make_runs(side: int, runs: int) -> bytes:
    """Return a BMP in run lengths, each of which is of one pixel."""
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, 2 * runs, 0, 0, 256, 0)
    return b"BM" + struct.pack("<III", 54 + 1024 + 2 * runs, 0, 54 + 1024) + header + bytes(1024) + b"\1\1" * runs


def make_mask(side: int) -> bytes:
    """Return a transparent PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGBA", (side, side)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


_BODIES: tuple[tuple[Callable[[Random], bytes], str], ...] = (
    (_make_json, "application/json"),
    (_make_json, "application/json"),
    (_make_broken_json, "application/json"),
    (_make_text, "text/plain"),
    (_make_form, "multipart/form-data; boundary=b"),
    (_make_pairs, "application/x-www-form-urlencoded"),
)
