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

from sdxl_server.fields import DECLARATIONS

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
    kind = random.choice(("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"))
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

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    comment = chunk(b"zTXt", b"a\0\0" + zlib.compress(text, 1)) if text else b""
    return b"\x89PNG\r\n\x1a\n" + header + comment + chunk(b"IDAT", zlib.compress(pixels, 1)) + chunk(b"IEND", b"")


_BODIES: tuple[tuple[Callable[[Random], bytes], str], ...] = (
    (_make_json, "application/json"),
    (_make_json, "application/json"),
    (_make_broken_json, "application/json"),
    (_make_text, "text/plain"),
    (_make_form, "multipart/form-data; boundary=b"),
    (_make_pairs, "application/x-www-form-urlencoded"),
)
