"""Ask the server for images and save them.

This file needs Python and requests only. tqdm adds a progress bar.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import contextlib
import json
import os
import queue
import random
import re
import sys
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONNECT_SECONDS = 10
MAX_WAIT_SECONDS = 30
JOB_PAUSE_SECONDS = 1.0
# A server must not fill the memory or disk of this machine. Only an image in base64 makes an event large.
MAX_EVENT_BYTES = 64 * 2**20
MAX_EVENT_PARTS = 50_000
MAX_IMAGES = 99
MAX_STEPS = 4000  # per image: the server allows 1000, and a second-order scheduler makes two of each
MAX_ERROR_BYTES = 2**16
BUSY_TYPE = "ServiceUnavailableException"  # TorchServe's message is "no worker" for a full queue too
TOKEN_VARIABLE = "TORCHSERVE_TOKEN"
SUFFIXES = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png", ".webp": "webp"}
DAMAGED = (LookupError, TypeError, binascii.Error)  # kinds of errors that a wrong event causes
IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF")
VERSION = re.compile(r"(/\d+(\.\d+)*)?/?$")  # at the end of the model's address
JOB_ID = re.compile(r"[A-Za-z0-9_-]{8,64}")
FAILED, REFUSED, TRY_LATER, INTERRUPTED = 1, 2, 3, 130
EPILOG = """examples:
  query.py --prompt "a red fox" --steps 20 --seed 7 --filename fox.png
  query.py --prompt "a red fox" --field clip_skip=1 --field "original_size=[512, 512]"
  query.py --like fox.png --guidance-scale 3
  query.py --prompts list.txt --concurrency 4

exit codes:
  0    every image is saved
  1    the server failed, or an image could not be read or saved
  2    the server refuses the request, or an option is wrong
  3    no server, a busy server, or no image in time: try later
  130  interrupted; the server stops its work too
  Several prompts end with their highest code."""


def read_value(text: str) -> Any:
    """Return a field's value: JSON, or else the text itself. The `image` of an object is a file, as in `control`."""
    try:
        return json.loads(text, object_hook=lambda a: {**a, "image": encode_file(a["image"])} if "image" in a else a)
    except (ValueError, RecursionError):
        return text


def read_field(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not (name and sign):
        raise argparse.ArgumentTypeError(f"takes NAME=VALUE, such as clip_skip=1, not {text!r}")
    return name, read_value(value)


def encode_file(path: str) -> str:
    try:
        return base64.b64encode(Path(path).read_bytes()).decode()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {path}: {error.strerror}") from error


# The common fields of a request, as options. --field sends the others.
FIELDS: dict[str, dict[str, Any]] = {
    "negative_prompt": {"metavar": "TEXT", "help": "what the image must not show"},
    "width": {"type": int, "metavar": "PIXELS", "help": "a multiple of 8"},
    "height": {"type": int, "metavar": "PIXELS", "help": "a multiple of 8"},
    "seed": {"type": int, "metavar": "N", "help": "the same seed repeats an image"},
    "num_inference_steps": {"type": int, "metavar": "N", "help": "denoising steps"},
    "guidance_scale": {"type": float, "metavar": "X", "help": "how strongly the prompt guides"},
    "num_images_per_prompt": {"type": int, "metavar": "N", "help": "number of images"},
    "scheduler": {"type": read_value, "metavar": "NAME", "help": "the sampler: a name, or JSON with options"},
    "adapters": {"type": read_value, "metavar": "JSON", "help": """LoRAs, such as '[{"name": "ink", "scale": 0.8}]'"""},
    "image": {"type": encode_file, "metavar": "FILE", "help": "an image to start from (image-to-image)"},
    "mask_image": {"type": encode_file, "metavar": "FILE", "help": "white or transparent: paint here (inpainting)"},
    "strength": {"type": float, "metavar": "X", "help": "how much to change --image, from 0 to 1"},
    "output_format": {"choices": ("jpeg", "png", "webp"), "help": "default: by the suffix of --filename, or jpeg"},
}
SHORT_NAMES = {"num_inference_steps": "--steps", "num_images_per_prompt": "-n"}


class QueryError(Exception):
    """A failure that the program shows in one line; any function here may raise it.

    Attributes:
        code: the program's exit code.
        retry_after: seconds that the server asks to wait, or None.
    """

    def __init__(self, message: str, *, code: int = FAILED, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.code, self.retry_after = code, retry_after


class RefusedTokenError(QueryError):
    """The server refuses this token."""


class RepeatableError(QueryError):
    """This request may be sent again: the server has not begun it, or it belongs to a job."""


@dataclass(eq=False)
class Job:
    """One request and its progress.

    The job's thread writes all from `token` on, but for `saved`.

    Attributes:
        label: the start of its messages, such as the line in the file of prompts.
        paths: the file of each image.
        step, total: denoising steps.
        place: in the queue.
        report, preview, loaded: the last ones of a job on the server, and its images so far.
        awaited: each image by index, and each preview by index and number.
        is_over: makes the thread leave the server.
    """

    label: str
    fields: dict[str, Any]
    paths: list[Path]
    deadline: float = 0.0
    token: str | None = None
    step: int = 0
    total: int = 0
    saved: int = 0
    place: int | None = None
    report: dict[str, Any] = field(default_factory=dict)
    preview: bytes = b""
    loaded: int = 0
    awaited: set[tuple[int, int | None]] = field(init=False)
    is_over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        numbers = (None, *range(read_count(self.fields.get("partial_images"), 0, most=3)))
        self.awaited = {(index, number) for index in range(len(self.paths)) for number in numbers}


def read_count(value: Any, default: int, *, most: int) -> int:
    """Return a number of images, or the default for a value that the server will refuse."""
    return value if value and is_count(value, most) else default


def is_count(value: Any, most: Any = float("inf")) -> bool:
    return type(value) is int and 0 <= value <= most


Follow = Callable[[Job, argparse.Namespace], Iterator[dict[str, Any]]]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="query.py",
        usage="%(prog)s (--prompt TEXT | --prompts FILE | --like IMAGE | --job ID) [options]",
        description="Ask the server for images and save them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group("what to draw").add_argument
    add("--prompt", metavar="TEXT", help="what the image shows")
    add("--prompts", type=Path, metavar="FILE", help="each line is a prompt, or a JSON object of fields")
    like = "repeat an image of this server, A1111 or ComfyUI, except for the given options"
    add("--like", type=encode_file, metavar="IMAGE", help=like)
    add = parser.add_argument_group("the image (the server has a default for each)").add_argument
    for name, keywords in FIELDS.items():
        add(*filter(None, ["--" + name.replace("_", "-"), SHORT_NAMES.get(name)]), **keywords)
    add("--field", type=read_field, action="append", metavar="NAME=VALUE", help="any other field, as JSON or text")
    add = parser.add_argument_group("the files").add_argument
    add("--filename", type=Path, help="default: output-<date>-<time>.jpg; several images get -1, -2, …")
    add("--overwrite", action="store_true", help="replace a file of that name")
    add("--preview", type=int, nargs="?", const=3, metavar="N", help="also save N (or 3) previews of each image")
    add = parser.add_argument_group("the server").add_argument
    add("--url", default="http://localhost:8080/predictions/diffusion_fast", help="default: %(default)s")
    add("--token", help=f"the server's inference key (default: {TOKEN_VARIABLE}, then the key file)")
    add("--key-file", type=Path, default="key_file.json", help="the server's key file (default: %(default)s)")
    add("--concurrency", type=int, default=4, metavar="N", help="prompts sent at a time (default: %(default)s)")
    seconds: dict[str, Any] = {"type": float, "metavar": "SECONDS"}
    add("--timeout", default=3600, **seconds, help="longest wait for a prompt (default: %(default)s)")
    add("--retry", default=60, **seconds, help="longest wait for a busy server (default: %(default)s; 0: no retry)")
    add = parser.add_argument_group("jobs (docs/jobs.md)").add_argument
    add("--job", metavar="ID", help="order a job under this id and wait for it; the id alone returns to it")
    add("--leave", action="store_true", help="do not wait for the job")
    options = parser.parse_args(argv)
    check_options(parser, options)
    options.overwrite &= options.filename is not None  # a name with the time in it replaces nothing
    return options


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exit with the first mistake in the options."""
    has_prompt = options.prompt is not None
    has_source = has_prompt or options.prompts or options.like or options.job
    mistakes = {
        "one of --prompt, --prompts, --like and --job is needed": not has_source,
        "--prompts goes without --prompt and without --job": options.prompts and (has_prompt or options.job),
        "--job takes 8 to 64 letters, digits, - or _": options.job is not None and not JOB_ID.fullmatch(options.job),
        "--leave needs --job": options.leave and not options.job,
        "--concurrency must be 1 or more": options.concurrency < 1,
        "--timeout must be more than 0": not options.timeout > 0,  # NaN too
        "--retry must be 0 or more": not options.retry >= 0,
    }
    for mistake, is_made in mistakes.items():
        if is_made:
            parser.error(mistake)


def plan_jobs(options: argparse.Namespace) -> list[Job]:
    """Return the requests to send, with a file for each image."""
    common = read_fields(options)
    orders = [("", common)]
    if options.prompts:
        orders = [(f"line {number}: ", common | line) for number, line in load_prompts(options.prompts).items()]
    start = Path(time.strftime("output-%Y%m%d-%H%M%S"))
    jobs = []
    for i, (label, fields) in enumerate(orders, 1):
        suffix = {"png": ".png", "webp": ".webp"}.get(str(fields.get("output_format")), ".jpg")
        path = options.filename or start.with_suffix(suffix)
        stem = f"{path.stem}-{i:0{len(str(len(orders)))}}" if options.prompts else path.stem
        count = read_count(fields.get("num_images_per_prompt"), 1, most=MAX_IMAGES)
        paths = [path.with_stem(f"{stem}-{k}" if count > 1 else stem) for k in range(1, count + 1)]
        for path in paths:
            check_target(path, is_chosen=options.filename is not None, overwrite=options.overwrite)
        jobs.append(Job(label, fields, paths))
    return jobs


def read_fields(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields that the options ask for."""
    fields = load_parameters(options) if options.like else {}
    suffix = options.filename and options.filename.suffix.lower()
    if suffix in SUFFIXES:
        fields["output_format"] = SUFFIXES[suffix]
    fields |= dict(options.field or ())
    named = {name: getattr(options, name) for name in ("prompt", *FIELDS)}
    fields |= {name: value for name, value in named.items() if value is not None}
    if options.preview:
        fields["partial_images"] = options.preview
    return fields


def load_prompts(path: Path) -> dict[int, dict[str, Any]]:
    """Return the fields on each line that is not empty, by the line's number."""
    prompts = {}
    for number, line in enumerate(decode_text(path.read_bytes(), path).splitlines(), 1):
        if line.strip():
            prompts[number] = read_object(line) if line.lstrip().startswith("{") else {"prompt": line.strip()}
            if not prompts[number]:
                raise QueryError(f"line {number} of {path} is not a JSON object with fields", code=REFUSED)
    if not prompts:
        raise QueryError(f"{path} holds no prompt", code=REFUSED)
    return prompts


def decode_text(raw: bytes, path: Path) -> str:
    """Return a text in UTF-8, UTF-16 or UTF-32."""
    codec = json.detect_encoding(raw)
    try:
        return raw.decode(codec)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise QueryError(f"line {line} of {path} is not {codec.upper()}: save it as UTF-8", code=REFUSED) from error


def read_object(text: str | bytes | bytearray) -> dict[str, Any]:
    """Return a JSON object, or an empty one for any other text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def load_parameters(options: argparse.Namespace) -> dict[str, Any]:
    """Return the request that made the image of --like, as the server reads it."""
    job = Job("--like: ", {}, [], deadline=time.monotonic() + options.timeout)
    for event in request_events(job, options, follow_metadata):
        if event["type"] == "request":
            return {name: value for name, value in event.items() if name != "type"}
        handle_event(job, event, overwrite=False)
    raise QueryError("the server answers --like without a request")


def check_target(path: Path, *, is_chosen: bool, overwrite: bool) -> None:
    """Refuse a file that could not be saved, before the server works for it."""
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise QueryError(f"cannot write into the folder {path.parent}")
    if is_chosen and os.path.lexists(path):
        if not overwrite:
            raise QueryError(f"{path} exists; choose another --filename or add --overwrite")
        if not path.is_file():
            raise QueryError(f"{path} exists and is not a file")


def load_key(key_file: Path) -> str | None:
    """Return the inference key of TorchServe's key file, or None without a file."""
    try:
        key = json.loads(key_file.read_bytes())["inference"]["key"]
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError) as error:
        raise QueryError(f"{key_file} holds no inference key") from error
    return str(key)


def request_events(job: Job, options: argparse.Namespace, follow: Follow) -> Iterator[dict[str, Any]]:
    """Send requests and yield the events of their answers.

    A request is sent again while that does no harm, for --retry after its first failure, and once with a new token.
    """
    given = options.token or os.environ.get(TOKEN_VARIABLE)
    job.token, has_new_token = given or load_key(options.key_file), False
    start, tries = 0.0, 0
    while True:
        try:
            for event in follow(job, options):
                yield event
                tries, has_new_token = 0, False
            return
        except RefusedTokenError:
            new_token = None if given else load_key(options.key_file)  # a restarted server writes new keys
            if has_new_token or not new_token or new_token == job.token:
                raise
            job.token, has_new_token = new_token, True
        except RepeatableError as error:
            if not options.retry:
                raise
            now, tries, has_new_token = time.monotonic(), tries + 1, False
            start = now if tries == 1 else start
            wait = choose_wait(error.retry_after, tries=tries, left=start + options.retry - now)
            if wait is None or now + wait >= job.deadline:
                limit = f"--retry {options.retry:g}" if wait is None else f"--timeout {options.timeout:g}"
                limit += f", Retry-After: {error.retry_after:g}" if error.retry_after else ""
                raise QueryError(f"{error}; given up after {now - start:.0f} s ({limit})", code=TRY_LATER) from error
            yield {"type": "warning", "message": f"{error}; asking again in {round(wait, 1):g} s"}
            if job.is_over.wait(wait):
                return


def choose_wait(retry_after: float | None, *, tries: int, left: float) -> float | None:
    """Return the seconds before the next try, or None to give up.

    Args:
        retry_after: seconds that the server asks for. Up to one more keeps its clients apart.
        tries: how often the request was sent.
        left: seconds during which it may be sent again.
    """
    earliest = retry_after or 0.0
    if left <= 0 or earliest > left:
        return None
    spread = min(MAX_WAIT_SECONDS, 2 ** (tries - 1)) if retry_after is None else 1
    return min(earliest + random.uniform(0, spread), left)


def follow_metadata(job: Job, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Send the image of --like and yield the server's warnings about its request, then the request."""
    url = VERSION.sub("", options.url) + "/1.0/metadata"
    with open_answer(job, options, "POST", url, kind="application/json", fields={"image": options.like}) as response:
        described = read_object(read_start(response, MAX_EVENT_BYTES))
    yield from ({"type": "warning", "message": f"warning: {each!s:.1000}"} for each in described.get("warnings", ()))
    yield {"type": "request", **described["request"]}


def follow_stream(job: Job, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Send one request and yield the events of its answer."""
    fields = {**job.fields, "stream": True}
    with open_answer(job, options, "POST", options.url, kind="text/event-stream", fields=fields) as response:
        if warning := response.headers.get("X-Warning"):
            yield {"type": "warning", "message": f"warning: {warning[:1000]}"}
        yield from filter(lambda event: check_event(event, job), read_events(response, job))


def follow_order(job: Job, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Order a job, or return to it, and yield its progress as events; a repetition goes on from the last report."""
    while job.report.get("state") != "done":
        if job.report and job.is_over.wait(JOB_PAUSE_SECONDS):
            return
        job.report = load_report(job, options)
        state, place = job.report["state"], job.report.get("place")
        if state in ("failed", "cancelled"):
            raise QueryError(f"the job is {state}: {job.report.get('message') or 'no reason is given'}"[:1000])
        if options.leave and state != "done":
            job.saved, url = len(job.paths), urllib.parse.urljoin(options.url, f"/jobs/{options.job}")
            yield {"type": "warning", "message": f"{url}: {state}; --job {options.job} returns to it"}
            return
        is_moved, job.place = state == "waiting" and place not in (None, job.place), place
        yield {"type": "queue" if is_moved else "progress", "place": place}
        with contextlib.suppress(QueryError, ValueError):  # a preview is no loss, and the job may have ended meanwhile
            yield from load_preview(job, options)
    first, addresses = job.paths[0], job.report["pictures"]
    if len(addresses) > (most := len(job.paths) if job.fields.get("prompt") else MAX_IMAGES):
        raise QueryError(f"the server sends {len(addresses)} images, and {most} were ordered")
    job.paths += [first.with_stem(f"{first.stem}-{k}") for k in range(len(job.paths), len(addresses))]
    while job.loaded < len(addresses):
        image = load(job, options, addresses[job.loaded])
        job.loaded += 1
        yield {"type": "job.completed", "index": job.loaded - 1, "file": image}


def load_report(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """Return what the jobs API reports of a job; the first request orders it."""
    report, most = {"pictures": [], **read_object(load(job, options))}, MAX_STEPS * MAX_IMAGES
    state, place, step, total, pictures = map(report.get, ("state", "place", "step", "total", "pictures"))
    are_right = {
        f"state {state!r:.50}": state in ("waiting", "running", "done", "failed", "cancelled"),
        f"place {place!r:.50}": place is None or is_count(place),
        f"step {step!r:.50} of {total!r:.50}": step is None or (is_count(total, most) and is_count(step, total)),
        f"pictures {pictures!r:.50}": isinstance(pictures, list),
    }
    for shown, is_right in are_right.items():
        if not is_right:
            raise QueryError(f"the server reports a job with {shown}")
    if type(step) is type(total) is int:
        job.step, job.total = step, total
    return report


def load_preview(job: Job, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a job's newest preview as an event, if one is awaited and it has not come before."""
    index = max(job.step - 1, 0) * len(job.paths) // max(job.total, 1)  # one image is drawn after the other
    numbers = sorted(number for i, number in job.awaited if i == index and number is not None)
    if numbers and job.report.get("preview") and (file := load(job, options, job.report["preview"])) != job.preview:
        job.preview = file
        job.awaited.remove((index, numbers[0]))
        yield {"type": "job.partial_image", "index": index, "partial_image_index": numbers[0], "file": file}


def load(job: Job, options: argparse.Namespace, address: Any = "") -> bytes:
    """Return the image at an address that the server sends, or a job's report."""
    base = urllib.parse.urlsplit(urllib.parse.urljoin(options.url, f"/jobs/{options.job}"))
    url = urllib.parse.urlsplit(urllib.parse.urljoin(base.geturl(), str(address)))
    if not isinstance(address, str) or url[:2] != base[:2]:
        raise QueryError(f"the server sends {address!r:.200}, which is no address on this server")
    kind, most = ("image/", MAX_EVENT_BYTES) if address else ("application/json", MAX_ERROR_BYTES)
    fields = job.fields if job.fields.get("prompt") and not (address or job.report) else None
    with open_answer(job, options, "PUT" if fields else "GET", url.geturl(), kind=kind, fields=fields) as response:
        content = read_start(response, most + 1)
    if len(content) > most:
        raise QueryError(f"the server sends more than {most} bytes from {url.geturl()}")
    return content


@contextlib.contextmanager
def open_answer(
    job: Job, options: argparse.Namespace, method: str, url: str, *, kind: str, fields: Mapping[str, Any] | None = None
) -> Iterator[Any]:
    """Send one request and check its answer's status, and its content type, which begins with `kind`."""
    import requests
    from urllib3.exceptions import HTTPError

    if job.token and not (job.token.isascii() and job.token.isprintable()):
        raise QueryError("the token holds a character that cannot be sent", code=REFUSED)
    data = None if fields is None else json.dumps(fields)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {job.token}"} if job.token else {})
    timeout = CONNECT_SECONDS, min(options.timeout, MAX_WAIT_SECONDS) if options.job else options.timeout
    has_answer = False
    try:
        with requests.Session() as session:
            session.trust_env = False  # no proxy, and no ~/.netrc instead of the token
            session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
            with session.request(  # without redirects, because the token is for this address only
                method, url, data=data, headers=headers, timeout=timeout, allow_redirects=False, stream=True
            ) as response:
                check_status(response, kind, options)
                has_answer = True
                yield response
    except (requests.RequestException, HTTPError) as error:
        place = f"after step {job.step} of {job.total}" if job.step else "before the first step"
        broken = f"the connection broke {place}; the server's log says why" if has_answer else None
        raise explain_failure(error, url, broken, is_repeatable=bool(options.job)) from error


def explain_failure(error: Exception, url: str, broken: str | None, *, is_repeatable: bool) -> QueryError:
    """Return the failure of a request whose answer broke, or never came; one that was not sent may be repeated."""
    from urllib3.exceptions import ConnectTimeoutError

    cause: BaseException = error
    while cause.__context__:  # the first failure is the plain one: "Connection refused"
        cause = cause.__context__
    message = broken or f"no answer from {url}: {getattr(cause, 'strerror', None) or cause}"
    # urllib3 uses this class for every failure to connect, also for an unknown host name
    was_sent = not isinstance(getattr(next(iter(error.args), None), "reason", None), ConnectTimeoutError)
    is_final = isinstance(cause, ValueError) and not broken  # a wrong address or certificate
    kind = RepeatableError if not is_final and (is_repeatable or not was_sent) else QueryError
    return kind(message, code=TRY_LATER)


def check_status(response: Any, kind: str, options: argparse.Namespace) -> None:
    """Refuse an answer of another status or content type."""
    status, content_type = response.status_code, response.headers.get("Content-Type") or "no content type"
    if status in (200, 202) and content_type.startswith(kind):
        return
    start = read_start(response)
    content = read_object(start)
    if status == 400 and content.get("type") == "InvalidKeyException":
        order = f"--token, then {TOKEN_VARIABLE}, then the inference key in {options.key_file} (--key-file)"
        raise RefusedTokenError(f"the server refuses the token, or there is none; it comes from {order}", code=REFUSED)
    shown = start[:800].decode(errors="replace")[:200]
    if status == 200:
        raise QueryError(f"the server answered with {content_type[:100]} instead of {kind}: {shown}")
    error = content.get("error")
    message = error.get("message") if isinstance(error, dict) else content.get("message")
    redirect = " (redirects are not followed)" if 300 <= status < 400 else ""
    line = f"the server answered {status}{redirect}: {str(message or shown)[:1000]}"
    if status == 404 and response.url.endswith("/metadata"):
        line = "this server is older than --like, and reads no metadata of images: update it"
    reason, wait = content.get("type"), response.headers.get("Retry-After")
    # A worker may cause TorchServe's other failures, even with a proxy's header. A proxy's own answer has no type.
    is_busy = status in (429, 503) and (reason == BUSY_TYPE or (wait is not None and not reason))
    if is_busy or (options.job and status in (429, 502, 503, 504)):
        line = "the server is busy, or its model is still loading" if reason == BUSY_TYPE else line
        is_number = wait is not None and wait.isascii() and wait.isdigit()
        raise RepeatableError(line, code=TRY_LATER, retry_after=float(wait) if is_number else None)
    raise QueryError(line, code=choose_code(status))


def choose_code(status: object) -> int:
    """Return the exit code for an HTTP status."""
    if status in (429, 503, 504):
        return TRY_LATER
    return REFUSED if isinstance(status, int) and 400 <= status < 500 else FAILED


def read_start(response: Any, size: int = MAX_ERROR_BYTES) -> bytes:
    """Return at most `size` bytes of an answer; iter_content would take a chunk's head of any length."""
    start = bytearray()
    while len(start) < size and (part := response.raw.read1(size, decode_content=True)):
        start += part
    return bytes(start[:size])


def read_events(response: Any, job: Job) -> Iterator[dict[str, Any]]:
    """Yield the JSON of each server-sent event, until the end or until the job is over."""
    buffer = bytearray()
    while part := response.raw.read1(2**16):  # iter_content would wait for a whole chunk
        buffer += part
        if len(buffer) > MAX_EVENT_BYTES:
            raise QueryError(f"the server sends an event of more than {MAX_EVENT_BYTES} bytes")
        if job.is_over.is_set():
            return
        if buffer.find(b"\n\n", -len(part) - 1) < 0:  # the bytes before have been searched
            continue
        *events, buffer = buffer.split(b"\n\n")
        for event in events:
            for line in event.splitlines():
                if line.startswith(b"data:"):
                    if sum(map(line.count, (b"{", b"[", b","))) > MAX_EVENT_PARTS:  # each takes 20 times its length
                        raise QueryError(f"the server sends an event of more than {MAX_EVENT_PARTS} parts")
                    yield read_object(line.removeprefix(b"data:"))


def check_event(event: dict[str, Any], job: Job) -> bool:
    """Note what an event brings, and decode its image; return False for an event without a use here."""
    kind = str(event.get("type"))
    if kind == "progress":
        step, total = event["step"], event["total"]
        if not (is_count(total, MAX_STEPS * len(job.paths)) and is_count(step, total) and step > job.step):
            raise QueryError(f"the server sends step {step!r:.50} of {total!r:.50} after step {job.step}")
        job.step, job.total = step, total
    elif kind == "queue":
        place = event["place"]
        if not is_count(place) or job.place is not None and place >= job.place:
            raise QueryError(f"the server sends place {place!r:.50} in its queue after place {job.place}")
        job.place = place
    elif kind.endswith((".partial_image", ".completed")):
        index = event["index"]
        number = event["partial_image_index"] if kind.endswith(".partial_image") else None
        if type(index) is not int or (index, number) not in job.awaited:
            name = f"image {index!r:.50}" if number is None else f"preview {number!r:.50} of image {index!r:.50}"
            raise QueryError(f"the server sends {name}, which was not asked for or came before")
        # No preview follows its image
        job.awaited -= {(index, number)} if number is not None else {key for key in job.awaited if key[0] == index}
        event["file"] = base64.b64decode(event["b64_json"], validate=True)
    else:
        return kind == "error"
    return True


def draw_images(jobs: Sequence[Job], options: argparse.Namespace) -> int:
    """Save the images of all jobs, several jobs at a time; return the exit code.

    A job's thread only passes on what arrives. It is abandoned after --timeout: the timeout of requests would begin
    again with every byte.
    """
    waiting, running, code = list(reversed(jobs)), set[Job](), 0
    arrived: queue.SimpleQueue[tuple[Job, Any]] = queue.SimpleQueue()
    try:
        with open_bar() as bar:
            while waiting or running:
                while waiting and len(running) < options.concurrency:
                    running.add(job := waiting.pop())
                    job.deadline = time.monotonic() + options.timeout
                    threading.Thread(target=follow, args=(job, options, arrived), daemon=True).start()
                job, event = wait_for_event(running, arrived, options)
                if job in running:
                    try:
                        handle_event(job, event, overwrite=options.overwrite)
                        is_over = job.saved == len(job.paths)
                    except (QueryError, OSError, ValueError, LookupError, TypeError) as error:
                        code = max(code, show_error(error, label=job.label))
                        is_over = True
                    if is_over:
                        job.is_over.set()
                        running.remove(job)
                if bar is not None:
                    show_steps(bar, jobs)
    finally:
        for job in jobs:
            job.is_over.set()
    return code


def follow(job: Job, options: argparse.Namespace, arrived: queue.SimpleQueue[tuple[Job, Any]]) -> None:
    """Pass on each event of a job's answer, and then the failure that ends it."""
    try:
        for event in request_events(job, options, follow_order if options.job else follow_stream):
            arrived.put((job, event))
        arrived.put((job, QueryError("the answer ended before the last image")))
    except BaseException as error:
        arrived.put((job, error))


def wait_for_event(
    running: Set[Job], arrived: queue.SimpleQueue[tuple[Job, Any]], options: argparse.Namespace
) -> tuple[Job, Any]:
    """Return a job and its next event or failure, or None after a second without either."""
    first = min(running, key=lambda job: job.deadline)
    left = first.deadline - time.monotonic()
    if left <= 0:
        late = f"no image from {options.url} within {options.timeout:g} s (--timeout)"
        return first, QueryError(late, code=TRY_LATER)
    try:
        return arrived.get(timeout=min(1.0, left))
    except queue.Empty:
        return first, None


def handle_event(job: Job, event: Any, *, overwrite: bool) -> None:
    """Show a warning or a place in the queue, save an image, or raise a failure."""
    if isinstance(event, BaseException):
        raise event
    kind = str(event.get("type")) if event else ""
    if kind == "error":
        error = event.get("error")
        error = error if isinstance(error, dict) else {}
        raise QueryError(f"the server says: {str(error.get('message'))[:1000]}", code=choose_code(error.get("code")))
    if kind == "warning":
        show_line(f"query.py: {job.label}{event['message']}", file=sys.stderr)
    elif kind == "queue":
        show_line(f"query.py: {job.label}waiting; requests before it: {event['place']}", file=sys.stderr)
    elif kind.endswith(".partial_image"):
        path = job.paths[event["index"]]
        path = path.with_stem(f"{path.stem}-preview-{event['partial_image_index'] + 1}")
        show_line(str(save_image(event["file"], path, overwrite=overwrite)), file=sys.stderr)
    elif kind.endswith(".completed"):
        path = save_image(event["file"], job.paths[event["index"]], overwrite=overwrite)
        show_line(str(path), file=sys.stdout)
        if "seed" in event:
            show_line(f"{path}: seed {event['seed']!s:.100}", file=sys.stderr)
        job.saved += 1
        job.step = job.total if job.saved == len(job.paths) else job.step


def find_tqdm() -> Any:
    """Return tqdm's class, or None if it is not installed."""
    with contextlib.suppress(ImportError):
        from tqdm import tqdm

        return tqdm
    return None


def open_bar() -> contextlib.AbstractContextManager[Any]:
    """Return a context with a progress bar, or with None without tqdm."""
    tqdm = find_tqdm()
    bar: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    return tqdm(unit="step", disable=None, leave=False, dynamic_ncols=True) if tqdm else bar


def show_steps(bar: Any, jobs: Sequence[Job]) -> None:
    """Show the steps of all jobs; a job that has not begun counts as many as the last that has."""
    typical = next((job.total for job in reversed(jobs) if job.total), 0)
    bar.total = sum(job.step if job.is_over.is_set() else job.total or typical for job in jobs) or None
    bar.n = sum(job.step for job in jobs)
    if len(jobs) > 1:
        bar.set_postfix_str(f"{sum(job.is_over.is_set() for job in jobs)} of {len(jobs)} prompts", refresh=False)
    bar.refresh()


def show_error(error: Exception, *, label: str = "") -> int:
    """Show a failure in one line; return its exit code."""
    shown = f"the server sends a damaged event: {error!r}" if isinstance(error, DAMAGED) else error
    show_line(f"query.py: {label}{shown}", file=sys.stderr)
    return error.code if isinstance(error, QueryError) else FAILED


def show_line(text: str, *, file: Any) -> None:
    """Print a line above the bar; escape the server's control characters, which could move the cursor."""
    escaped = (char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    tqdm = find_tqdm()
    with tqdm.external_write_mode(file=file) if tqdm else contextlib.nullcontext():
        print("".join(escaped), file=file)


def save_image(image: bytes, path: Path, *, overwrite: bool) -> Path:
    """Write the whole image or nothing, and return its file; without `overwrite`, a taken name gets -1, -2, …"""
    if not image.startswith(IMAGE_STARTS):
        raise QueryError("the server sends a file that is no JPEG, PNG or WebP")
    temporary = path.with_name(f".query-{uuid.uuid4().hex}.part")
    try:
        temporary.write_bytes(image)
        if not overwrite:
            path = take_free_name(path)
        return temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def take_free_name(path: Path) -> Path:
    """Create an empty file, so that no other program takes the name."""
    candidate, number = path, 0
    while True:
        try:
            candidate.touch(exist_ok=False)
            return candidate
        except FileExistsError:
            number += 1
            candidate = path.with_stem(f"{path.stem}-{number}")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    try:
        return draw_images(plan_jobs(options), options)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (QueryError, OSError, ValueError, LookupError, TypeError) as error:
        return show_error(error)


if __name__ == "__main__":
    sys.exit(main())
