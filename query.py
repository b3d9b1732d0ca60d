"""Ask the server for pictures and save them; show each step on a terminal.

One file, which runs with Python and requests alone; with tqdm it shows a bar, and --like needs Pillow.
"""

import argparse
import base64
import codecs
import contextlib
import json
import os
import queue
import random
import re
import struct
import sys
import threading
import time
import urllib.parse
import uuid
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

CONNECT_SECONDS = 10
MAX_WAIT_SECONDS = 30
# A server is not trusted with this machine's memory and disk. An event holds a picture in base64, and few other things.
MAX_EVENT_BYTES = 64 * 2**20
MAX_EVENT_PARTS = 50_000
MAX_STEPS = 4000  # of a picture: 1000 at most, of which schedulers of second order make two each
MAX_PIXELS = 4096 * 4096
MAX_ERROR_BYTES = 2**16
BUSY_TYPE = "ServiceUnavailableException"  # its message, "no worker to serve", is the same for a full queue
TOKEN_VARIABLE = "TORCHSERVE_TOKEN"
SUFFIXES = {".jpg": "jpeg", ".jpeg": "jpeg", ".png": "png", ".webp": "webp"}
JOB_ID = re.compile(r"[A-Za-z0-9_-]{8,64}")
JOB_PAUSE_SECONDS = 1.0
FAILED, REFUSED, TRY_LATER, INTERRUPTED = 1, 2, 3, 130
JPEG_MARKER = re.compile(rb"\xff+([^\xff])")
JPEG_FRAMES = {bytes([marker]) for marker in range(0xC0, 0xD0)} - {b"\xc4", b"\xc8", b"\xcc"}
JPEG_SCAN_END = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # a marker that is neither a stuffed byte nor a restart
# Width and height by the first ten bytes of a part: a lossy picture, a lossless one, one with more beside it
WEBP_SIZES: dict[bytes, Callable[[bytes], tuple[int, int]]] = {
    b"VP8 ": lambda part: (get_bits(part, 48, 14), get_bits(part, 64, 14)),
    b"VP8L": lambda part: (1 + get_bits(part, 8, 14), 1 + get_bits(part, 22, 14)),
    b"VP8X": lambda part: (1 + get_bits(part, 32, 24), 1 + get_bits(part, 56, 24)),
}
# The longest first: UTF-32's begins with UTF-16's. These codecs take the mark away.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
EXIT_CODES = """exit codes:
  0    every picture is saved
  1    the server failed, or a picture could not be read or saved
  2    the request is refused, or these options are wrong
  3    no server, a busy one, or no picture in time: later it may work
  130  interrupted; the server stops working on it too
  With several prompts it is the highest of theirs."""
EPILOG = """examples:
  query.py --prompt "a red fox" --steps 20 --seed 7 --filename fox.png
  query.py --like fox.png --guidance-scale 3
  query.py --prompts list.txt --concurrency 4

"""
# The fields of the request contract; docs/requests.md says what each takes.
# <fields: python -m tools.write_generated>
FIELDS: dict[str, dict[str, Any]] = {
    "width": {"type": int, "metavar": "PIXELS", "help": "pixels; with an image, its aspect decides by default"},
    "height": {"type": int, "metavar": "PIXELS", "help": "pixels; with an image, its aspect decides by default"},
    "seed": {
        "type": int,
        "metavar": "N",
        "help": "seed of the first image; each later image has the next number, 0 after 4294967295. None or -1: random",
    },
    "prompt_2": {"help": "for the second text encoder; default: prompt"},
    "negative_prompt": {"help": "what the image should not show; no effect with a guidance of 1 or less"},
    "negative_prompt_2": {"help": "for the second text encoder; default: negative_prompt"},
    "num_inference_steps": {"type": int, "metavar": "N", "help": "denoising steps"},
    "guidance_scale": {
        "type": float,
        "metavar": "X",
        "help": "how strongly the prompt guides the image; 1 or less: no guidance",
    },
    "guidance_rescale": {"type": float, "metavar": "X", "help": "reduces overexposure with strong guidance"},
    "unet_calls": {
        "type": int,
        "metavar": "N",
        "help": "UNet calls; other steps are extrapolated (lossy). strength and denoising_end reduce it",
    },
    "guidance_interval": {
        "type": float,
        "nargs": 2,
        "metavar": ("FROM", "TO"),
        "help": "from which to which share of the denoising guidance applies; other steps cost half",
    },
    "num_images_per_prompt": {"type": int, "metavar": "N", "help": "images, generated one after another"},
    "scheduler": {
        "metavar": "NAME",
        "help": "the sampler: a name from diffusers or another program, or an object with a name and options",
    },
    "adapters": {
        "metavar": "JSON",
        "help": "adapters (LoRA), each with its scale; an adapter can change other defaults",
    },
    "clip_skip": {"type": int, "metavar": "N", "help": "number of last layers of the text encoders to skip"},
    "denoising_end": {"type": float, "metavar": "SHARE", "help": "share of the denoising after which it stops"},
    "timesteps": {
        "type": int,
        "nargs": "+",
        "metavar": "T",
        "help": "the timesteps, instead of num_inference_steps; some schedulers accept them",
    },
    "sigmas": {
        "type": float,
        "nargs": "+",
        "metavar": "SIGMA",
        "help": "the noise levels, the last 0, instead of num_inference_steps; some schedulers accept them",
    },
    "schedule": {
        "choices": (
            "StableDiffusionTimesteps",
            "StableDiffusionXLTimesteps",
            "StableDiffusionSigmas",
            "StableDiffusionXLSigmas",
        ),
        "help": "one of diffusers' AysSchedules, instead of num_inference_steps; for models that predict the noise",
    },
    "original_size": {
        "type": int,
        "nargs": 2,
        "metavar": ("HEIGHT", "WIDTH"),
        "help": "height and width of the imagined original image; small values look blurred",
    },
    "crops_coords_top_left": {
        "type": int,
        "nargs": 2,
        "metavar": ("TOP", "LEFT"),
        "help": "top and left of the imagined crop",
    },
    "target_size": {
        "type": int,
        "nargs": 2,
        "metavar": ("HEIGHT", "WIDTH"),
        "help": "height and width of the imagined target image",
    },
    "image": {
        "type": Path,
        "metavar": "FILE",
        "help": "an image to start from (image-to-image); transparent pixels become white",
    },
    "mask_image": {
        "type": Path,
        "metavar": "FILE",
        "help": "a mask for inpainting: image is repainted where the mask is transparent, or white if nothing is transparent",
    },
    "resize_mode": {
        "choices": ("crop", "pad"),
        "help": "how image gets another aspect: crop cuts its edges, pad adds white bars; default: crop",
    },
    "strength": {
        "type": float,
        "metavar": "X",
        "help": "how much image changes; no effect without an image; default: 0.8, or 1 with a mask",
    },
    "output_format": {"choices": ("jpeg", "png", "webp"), "help": "file format of the images"},
    "quality": {"type": int, "metavar": "N", "help": "quality of a JPEG or WebP"},
}
# </fields>
SHORT_NAMES = {"num_inference_steps": "--steps", "num_images_per_prompt": "-n"}


def get_bits(data: bytes, start: int, count: int) -> int:
    """Return a number in little-endian bits."""
    return int.from_bytes(data, "little") >> start & (1 << count) - 1


class QueryError(Exception):
    """A failure whose message is the line to show.

    Attributes:
        code: the program's exit code.
    """

    def __init__(self, message: str, *, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


class RefusedTokenError(QueryError):
    """The server lets nobody in with this token."""


class NotRunError(QueryError):
    """The server has not begun this request, so it may be sent again.

    Attributes:
        retry_after: seconds that the server asks to be left alone, None where it does not say.
    """

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message, code=TRY_LATER)
        self.retry_after = retry_after


@dataclass(eq=False)
class Job:
    """One request, and what has come of it.

    Attributes:
        label: what its messages begin with, such as the line of the prompts' file.
        paths: where each of its pictures goes.
        done, total: denoising steps.
        step: the last that has arrived; its thread's own, like `received` and `place`.
        received: the pictures, by their index, and the previews, by that and their number.
        is_over: set where nobody waits for more; its thread then leaves the server.
    """

    label: str
    fields: dict[str, Any]
    paths: list[Path]
    deadline: float = 0.0
    done: int = 0
    total: int = 0
    saved: int = 0
    step: int = 0
    place: int | None = None
    received: set[tuple[int, int | None]] = field(default_factory=set)
    is_over: threading.Event = field(default_factory=threading.Event)


Arrived = queue.SimpleQueue[tuple[Job, Any]]


def parse_positive(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"must be more than 0, not {text}")
    return number


def parse_seconds(text: str) -> float:
    number = float(text)
    if not number >= 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, not {text}")
    return number


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="query.py",
        usage="%(prog)s (--prompt TEXT | --prompts FILE | --like PICTURE | --job ID) [options]",
        description=(__doc__ or "").partition("\n")[0],
        epilog=EPILOG + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_argument_group("what to draw")
    source.add_argument("--prompt", metavar="TEXT", help="what the picture shows")
    source.add_argument(
        "--prompts", type=Path, metavar="FILE", help="a prompt, or a JSON object of fields, on each line"
    )
    source.add_argument(
        "--like", type=Path, metavar="PICTURE", help="repeat a picture, but for what is given beside it"
    )
    picture = parser.add_argument_group("the picture (without these, as the server is set)")
    for name, keywords in FIELDS.items():
        picture.add_argument(*filter(None, ["--" + name.replace("_", "-"), SHORT_NAMES.get(name)]), **keywords)
    add = parser.add_argument_group("the answer").add_argument
    add(
        "--filename",
        type=Path,
        help="where to save the picture (default: output-<date>-<time>.jpg); several get -1, -2 …",
    )
    add("--overwrite", action="store_true", help="replace a file of that name")
    add(
        "--preview",
        type=int,
        nargs="?",
        const=3,
        default=0,
        choices=range(4),
        metavar="N",
        help="also save how it looks after each of N parts of the way, at most 3 (without N: 3)",
    )
    add = parser.add_argument_group("the server").add_argument
    add("--url", default="http://localhost:8080/predictions/diffusion_fast", help="where to ask (default: %(default)s)")
    add("--token", help=f"the server's inference key (default: {TOKEN_VARIABLE}, then the key file)")
    add("--key-file", type=Path, default="key_file.json", help="the server's key file (default: %(default)s)")
    add("--concurrency", type=int, default=4, metavar="N", help="prompts in flight at a time (default: %(default)s)")
    add(
        "--timeout",
        type=parse_positive,
        metavar="SECONDS",
        default=3600,
        help="how long to wait for a prompt's pictures (default: %(default)s)",
    )
    add(
        "--retry",
        type=parse_seconds,
        metavar="SECONDS",
        default=60,
        help="how long to go on asking a server that is busy or not there (default: %(default)s; 0: not at all)",
    )
    add = parser.add_argument_group("jobs (docs/scaling.md)").add_argument
    add(
        "--job",
        metavar="ID",
        help="order a job under an id of your choice, 8 to 64 letters, digits, - or _, and wait for it; the same order "
        "again, or the id alone, comes back for it",
    )
    add("--leave", action="store_true", help="do not wait for the job")
    options = parser.parse_args(argv)
    if options.job is not None and not JOB_ID.fullmatch(options.job):
        parser.error(f"--job takes 8 to 64 letters, digits, - or _, not {options.job[:100]!r}")
    if options.leave and not options.job or options.job and options.prompts:
        parser.error("--leave goes with --job, and --prompts does not")
    options.overwrite &= options.filename is not None  # a name with the time in it replaces nothing
    if options.prompt is not None and options.prompts:
        parser.error("--prompt and --prompts do not go together")
    if options.prompt is None and not (options.prompts or options.like or options.job):
        parser.error("one of --prompt, --prompts, --like and --job is needed")
    if options.concurrency < 1:
        parser.error(f"--concurrency must be 1 or more, not {options.concurrency}")
    return options


def plan_jobs(options: argparse.Namespace) -> list[Job]:
    """Return the requests to make, with a place for each picture.

    Raises:
        QueryError: a file cannot be used.
    """
    fields = read_parameters(options.like) if options.like else {}
    suffix = options.filename and options.filename.suffix.lower()
    if suffix in SUFFIXES:
        fields["output_format"] = SUFFIXES[suffix]
    given = {name: value for name, value in vars(options).items() if name in FIELDS or name == "prompt"}
    fields |= {name: encode_file(value) for name, value in given.items() if value is not None}
    if options.preview:
        fields["partial_images"] = options.preview
    jobs = [Job("", fields, [])]
    if options.prompts:
        lines = read_prompts(options.prompts)
        jobs = [Job(f"line {number}: ", fields | line, []) for number, line in lines.items()]
    start = Path(time.strftime("output-%Y%m%d-%H%M%S"))
    endings = {name: ending for ending, name in reversed(SUFFIXES.items())}
    for i, job in enumerate(jobs, 1):
        count = job.fields.get("num_images_per_prompt", 1)
        count = count if isinstance(count, int) and 0 < count < 100 else 1
        path = options.filename or start.with_suffix(endings.get(str(job.fields.get("output_format")), ".jpg"))
        stem = f"{path.stem}-{i:0{len(str(len(jobs)))}}" if options.prompts else path.stem
        job.paths = [path.with_stem(f"{stem}-{k}" if count > 1 else stem) for k in range(1, count + 1)]
        for path in job.paths:
            check_target(path, is_chosen=options.filename is not None, overwrite=options.overwrite)
    return jobs


def encode_file(value: object) -> object:
    return base64.b64encode(value.read_bytes()).decode() if isinstance(value, Path) else value


def read_prompts(path: Path) -> dict[int, dict[str, Any]]:
    """Return the fields on each line that is not empty, by the line's number; a line starting with a brace is JSON.

    Raises:
        QueryError: there is no prompt, a line starts with a brace and is no JSON object, or it is not text.
    """
    prompts = {}
    for number, line in enumerate(decode_text(path.read_bytes(), path).splitlines(), 1):
        if line.strip():
            prompts[number] = load_object(line) if line.lstrip().startswith("{") else {"prompt": line.strip()}
            if not prompts[number]:
                raise QueryError(f"line {number} of {path} is not a JSON object with fields", code=REFUSED)
    if not prompts:
        raise QueryError(f"{path} holds no prompt", code=REFUSED)
    return prompts


def decode_text(raw: bytes, path: Path) -> str:
    """Return a text without its byte order mark: UTF-8, or UTF-16 and UTF-32 as editors and PowerShell mark them.

    Raises:
        QueryError: it is none of these.
    """
    codec = next((codec for mark, codec in MARKS.items() if raw.startswith(mark)), "utf-8")
    try:
        text = raw.decode(codec)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise QueryError(f"line {line} of {path} is not {codec.upper()}: save it as UTF-8", code=REFUSED) from error
    if "\0" in text:
        raise QueryError(f"{path} holds NUL characters, as UTF-16 without a mark does: save it as UTF-8", code=REFUSED)
    return text


def load_object(text: str | bytes | bytearray) -> dict[str, Any]:
    """Return a JSON object, empty where the text is something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def read_parameters(path: Path) -> dict[str, Any]:
    """Return the request that a picture of this server carries.

    Raises:
        QueryError: it carries none, or there is no Pillow.
    """
    try:
        from PIL import ExifTags, Image
    except ImportError as error:
        raise QueryError("--like reads pictures with Pillow: pip install pillow", code=REFUSED) from error
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as picture:
            check_pixels(*picture.size)  # a PNG is decoded for its texts
            comment = picture.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment, b"")
            text = picture.info.get("parameters") or comment.removeprefix(b"UNICODE\0").decode("utf-16-be")
    except FileNotFoundError as error:
        raise QueryError(f"there is no file {path}", code=REFUSED) from error
    except Exception as error:  # Pillow's decoders raise many kinds
        raise QueryError(f"{path} cannot be read as a picture: {error}", code=REFUSED) from error
    request = load_object(text).get("request")
    if not isinstance(request, dict):
        raise QueryError(f"{path} does not tell how it was made", code=REFUSED)
    return {name: value for name, value in request.items() if name in FIELDS or name == "prompt"}


def check_target(path: Path, *, is_chosen: bool, overwrite: bool) -> None:
    """Refuse a place that a picture could not be saved in, before the server works for it.

    Raises:
        QueryError: a file of a chosen name exists, or its folder cannot be written.
    """
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise QueryError(f"cannot write into the folder {path.parent}")
    if is_chosen and os.path.lexists(path):
        if not overwrite:
            raise QueryError(f"{path} exists; choose another --filename or add --overwrite")
        if not path.is_file():
            raise QueryError(f"{path} exists and is not a file")


def read_key(key_file: Path) -> str | None:
    """Return the inference key of TorchServe's key file, None where there is no file."""
    try:
        key = json.loads(key_file.read_bytes())["inference"]["key"]
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError) as error:
        raise QueryError(f"{key_file} holds no inference key") from error
    return str(key)


def request_events(job: Job, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Send a request and yield the events of its answer; again while it has not run, or where there is a new token.

    Raises:
        QueryError: no answer, or a refusal.
    """
    given = options.token or os.environ.get(TOKEN_VARIABLE)
    token, has_new_token = given or read_key(options.key_file), False
    start, tries = time.monotonic(), 0
    while True:
        try:
            yield from (follow_order if options.job else post_request)(job, options, token=token)
            return
        except RefusedTokenError:
            new_token = None if given else read_key(options.key_file)  # a server that was restarted has made new keys
            if has_new_token or not new_token or new_token == token:
                raise
            token, has_new_token = new_token, True
        except NotRunError as error:
            if not options.retry:
                raise
            now, tries, has_new_token = time.monotonic(), tries + 1, False
            wait = choose_wait(error.retry_after, tries=tries, left=start + options.retry - now)
            if wait is None or now + wait >= job.deadline:
                limit = f"--retry {options.retry:g}" if wait is None else f"--timeout {options.timeout:g}"
                limit += f", Retry-After: {error.retry_after:g}" if error.retry_after else ""
                raise QueryError(f"{error}; given up after {now - start:.0f} s ({limit})", code=TRY_LATER) from error
            yield {"type": "warning", "message": f"{error}; asking again in {round(wait, 1):g} s"}
            if job.is_over.wait(wait):
                return


def choose_wait(retry_after: float | None, *, tries: int, left: float) -> float | None:
    """Return after how many seconds to send a request again that has not run, None to give up.

    Args:
        retry_after: what the server asks for; up to a second more keeps its clients from coming back all at once.
        tries: how often the request was sent.
        left: seconds in which it may be sent again.
    """
    earliest = retry_after or 0.0
    if left <= 0 or earliest > left:
        return None
    spread = min(MAX_WAIT_SECONDS, 2 ** (tries - 1)) if retry_after is None else 1
    return min(earliest + random.uniform(0, spread), left)


def post_request(job: Job, options: argparse.Namespace, *, token: str | None) -> Iterator[dict[str, Any]]:
    """Send one request and yield the events of its answer.

    Raises:
        QueryError: as above.
    """
    import requests
    from urllib3.exceptions import HTTPError

    if token and not (token.isascii() and token.isprintable()):
        raise QueryError("the token holds a character that cannot be sent", code=REFUSED)
    place = ""
    try:
        with requests.Session() as session:
            session.trust_env = False  # no proxy between, and no ~/.netrc in the token's place
            session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
            with session.post(
                options.url,
                json={**job.fields, "stream": True},
                headers={"Authorization": f"Bearer {token}"} if token else {},
                timeout=(CONNECT_SECONDS, options.timeout),
                allow_redirects=False,  # the token is for this address only
                stream=True,
            ) as response:
                check_status(response, options)
                place = "before the first step"
                if warning := response.headers.get("X-Warning"):
                    yield {"type": "warning", "message": f"warning: {warning[:1000]}"}
                for event in read_events(response, job):
                    if is_wanted(event, job):
                        if event["type"] == "progress":
                            place = f"after step {event['step']} of {event['total']}"
                        yield event
    except (requests.RequestException, HTTPError) as error:
        if place:
            raise QueryError(f"the connection broke {place}; the server's log says why", code=TRY_LATER) from error
        raise explain_silence(error, options.url) from error


def follow_order(job: Job, options: argparse.Namespace, *, token: str | None) -> Iterator[dict[str, Any]]:
    """Order a job, or come back for it, and yield what happens to it as events of a stream.

    Raises:
        QueryError: it has failed, or was cancelled; or as above.
    """
    import requests
    from urllib3.exceptions import HTTPError

    address = urllib.parse.urljoin(options.url, f"/jobs/{options.job}")
    try:
        with requests.Session() as session:
            session.trust_env = False
            session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
            session.headers.update({"Authorization": f"Bearer {token}"} if token else {})
            told = read_answer(session, options, "PUT" if job.fields.get("prompt") else "GET", address, job.fields)
            while (state := told.get("state")) in ("waiting", "running"):
                if options.leave:
                    job.saved = len(job.paths)
                    yield {"type": "warning", "message": f"{address}: {state}; --job {options.job} comes back for it"}
                    return
                if state == "waiting" and told.get("place") != job.place:
                    job.place = told.get("place")
                    yield {"type": "queue", "place": job.place}
                if told.get("step"):
                    yield {"type": "progress", "step": told["step"], "total": told["total"]}
                if job.is_over.wait(JOB_PAUSE_SECONDS):
                    return
                told = read_answer(session, options, "GET", address)
            if state != "done":
                raise QueryError(f"the job is {state}: {str(told.get('message'))[:1000]}")
            first = job.paths[0]
            job.paths += [first.with_stem(f"{first.stem}-{k}") for k in range(len(job.paths), len(told["pictures"]))]
            for index, path in enumerate(told["pictures"]):
                with session.get(urllib.parse.urljoin(address, path), timeout=CONNECT_SECONDS, stream=True) as response:
                    content = response.raw.read(MAX_EVENT_BYTES)
                yield {"type": "job.completed", "index": index, "b64_json": base64.b64encode(content).decode()}
    except (requests.RequestException, HTTPError) as error:
        raise explain_silence(error, address) from error


def read_answer(
    session: Any, options: argparse.Namespace, method: str, address: str, fields: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return what the jobs' API tells of a job.

    Raises:
        QueryError: it refuses.
    """
    body = fields if method == "PUT" else None
    timeout = (CONNECT_SECONDS, options.timeout)
    with session.request(method, address, json=body, timeout=timeout, allow_redirects=False, stream=True) as response:
        if response.status_code not in (200, 202):
            check_status(response, options)
        return load_object(read_start(response))


def explain_silence(error: Exception, url: str) -> QueryError:
    """Return the failure to show where no answer began, of the kind that allows another try where nothing was sent."""
    from urllib3.exceptions import ConnectTimeoutError

    cause: BaseException = error
    while cause.__context__:  # the first failure is the plain one: "Connection refused"
        cause = cause.__context__
    message = f"no answer from {url}: {getattr(cause, 'strerror', None) or cause}"
    # urllib3's failures to connect are all of this class, a refusal and an unknown name too
    was_sent = not isinstance(getattr(next(iter(error.args), None), "reason", None), ConnectTimeoutError)
    return QueryError(message, code=TRY_LATER) if was_sent else NotRunError(message)


def check_status(response: Any, options: argparse.Namespace) -> None:
    """Refuse every answer that is no stream of events.

    Raises:
        QueryError: with what the server said.
    """
    status, kind = response.status_code, response.headers.get("Content-Type") or "no content type"
    if status == 200 and kind.startswith("text/event-stream"):
        return
    start = read_start(response)
    content = load_object(start)
    if status == 400 and content.get("type") == "InvalidKeyException":
        order = f"--token, then {TOKEN_VARIABLE}, then the inference key in {options.key_file} (--key-file)"
        raise RefusedTokenError(
            f"the server refuses the token, or there is none; it is taken from {order}", code=REFUSED
        )
    shown = start[:800].decode(errors="replace")[:200]
    if status == 200:
        raise QueryError(f"the answer is not a stream of events ({kind}): {shown}")
    error = content.get("error")
    message = error.get("message") if isinstance(error, dict) else content.get("message")
    what = " (redirects are not followed)" if 300 <= status < 400 else ""
    line = f"the server answered {status}{what}: {str(message or shown)[:1000]}"
    reason, retry_after = content.get("type"), response.headers.get("Retry-After")
    # TorchServe's other failures may come from a worker, whatever header a proxy adds; a proxy's own have no type here
    if status in (429, 503) and (reason == BUSY_TYPE or (retry_after is not None and not reason)):
        line = "the server is busy, or its model is still loading" if reason else line
        raise NotRunError(line, retry_after=parse_retry_after(retry_after))
    raise QueryError(line, code=choose_code(status))


def read_start(response: Any) -> bytes:
    """Return the beginning of an answer; iter_content would take a chunk's head of any length."""
    start = b""
    while len(start) < MAX_ERROR_BYTES and (part := response.raw.read1(MAX_ERROR_BYTES, decode_content=True)):
        start += part
    return start[:MAX_ERROR_BYTES]


def parse_retry_after(value: str | None) -> float | None:
    """Return the seconds that a Retry-After header names as such or as a date, None where it names neither."""
    if not value or (value.isascii() and value.isdigit()):
        return float(value) if value else None
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError, OSError):
        return None


def read_events(response: Any, job: Job) -> Iterator[dict[str, Any]]:
    """Yield the JSON in the data of each server-sent event, until the end or until nobody waits for it.

    Raises:
        QueryError: an event is larger than any that was asked for, or all of them are.
    """
    buffer, left = bytearray(), MAX_EVENT_BYTES * (1 + len(job.paths) * (1 + count_previews(job)))
    while part := response.raw.read1(2**16):  # iter_content would wait for a whole chunk, or for the end
        buffer += part
        left -= len(part)
        if len(buffer) > MAX_EVENT_BYTES:
            raise QueryError(f"the answer holds an event of more than {MAX_EVENT_BYTES} bytes")
        if left < 0:
            raise QueryError("the answer is longer than all pictures that were asked for")
        if job.is_over.is_set():
            return
        if buffer.find(b"\n\n", -len(part) - 1) < 0:  # what came before has been searched
            continue
        *events, buffer = buffer.split(b"\n\n")
        for event in events:
            for line in event.splitlines():
                if line.startswith(b"data:"):
                    if sum(map(line.count, (b"{", b"[", b","))) > MAX_EVENT_PARTS:  # each takes 20 times its length
                        raise QueryError(f"the answer holds an event of more than {MAX_EVENT_PARTS} parts")
                    yield load_object(line.removeprefix(b"data:"))


def count_previews(job: Job) -> int:
    """Return how many previews of each picture a request asks for."""
    count = job.fields.get("partial_images", 0)
    return count if type(count) is int and 0 <= count <= 3 else 0


def is_wanted(event: Mapping[str, Any], job: Job) -> bool:
    """Say whether an event is one to look at; note what it brings.

    Raises:
        QueryError: nobody has asked for that, or it has come already.
    """
    kind = str(event.get("type"))
    if kind == "progress":
        step, total = event["step"], event["total"]
        known = type(step) is int and type(total) is int and step <= total <= MAX_STEPS * len(job.paths)
        if not known or step <= job.step:
            raise QueryError(f"the server sends step {step!r:.50} of {total!r:.50} after step {job.step}")
        job.step = step
    elif kind == "queue":
        place = event["place"]
        if type(place) is not int or place < 0 or job.place is not None and place >= job.place:
            raise QueryError(f"the server sends place {place!r:.50} in its queue after place {job.place}")
        job.place = place
    elif kind.endswith((".partial_image", ".completed")):
        number = event["partial_image_index"] if kind.endswith(".partial_image") else None
        note_picture(event["index"], number, job)
    else:
        return kind == "error"
    return True


def note_picture(index: Any, number: Any, job: Job) -> None:
    """Note that a picture, or its preview of a number, has come.

    Raises:
        QueryError: nobody has asked for that, or it has come already.
    """
    name = f"picture {index!r:.50}" if number is None else f"preview {number!r:.50} of picture {index!r:.50}"
    is_asked = type(index) is int and 0 <= index < len(job.paths)
    if not is_asked or (number is not None and not (type(number) is int and 0 <= number < count_previews(job))):
        raise QueryError(f"the server sends {name}, counted from 0, for which nobody has asked")
    if not job.received.isdisjoint({(index, number), (index, None)}):
        raise QueryError(f"the server sends {name}, counted from 0, again")
    job.received.add((index, number))


def make_pictures(jobs: Sequence[Job], options: argparse.Namespace) -> int:
    """Make every job's pictures, several jobs at a time; return the exit code.

    Each job's thread only passes on what arrives. It is left behind when its time is up, since a timeout of the request
    itself would start again with every byte.
    """
    waiting, running, code = list(reversed(jobs)), set[Job](), 0
    arrived: Arrived = queue.SimpleQueue()
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


def follow(job: Job, options: argparse.Namespace, arrived: Arrived) -> None:
    """Pass on each event of a job's answer, and last the failure that ends it."""
    try:
        for event in request_events(job, options):
            arrived.put((job, event))
        arrived.put((job, QueryError("the answer ended before the last picture")))
    except BaseException as error:
        arrived.put((job, error))


def wait_for_event(running: Set[Job], arrived: Arrived, options: argparse.Namespace) -> tuple[Job, Any]:
    """Return what arrives next and whose it is: an event, a failure, or None after a second without either."""
    first = min(running, key=lambda job: job.deadline)
    left = first.deadline - time.monotonic()
    if left <= 0:
        late = f"no picture from {options.url} within {options.timeout:g} s (--timeout)"
        return first, QueryError(late, code=TRY_LATER)
    try:
        return arrived.get(timeout=min(1.0, left))
    except queue.Empty:
        return first, None


def handle_event(job: Job, event: Any, *, overwrite: bool) -> None:
    """Note a step, show a warning, save a picture.

    Raises:
        QueryError: what the event tells of, or a picture that is not whole.
        OSError: a picture cannot be saved.
    """
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
        show_line(f"query.py: {job.label}waiting; before it in the queue: {event['place']}", file=sys.stderr)
    elif kind == "progress":
        job.done, job.total = event["step"], event["total"]
    elif kind.endswith((".partial_image", ".completed")):
        picture = check_picture(event)
        path = job.paths[event["index"]]
        number = event["partial_image_index"] if kind.endswith(".partial_image") else None
        if number is not None:
            path = path.with_stem(f"{path.stem}-preview-{number + 1}")
        path = save_picture(picture, path, overwrite=overwrite)
        show_line(str(path), file=sys.stdout if number is None else sys.stderr)
        if number is None:
            if "seed" in event:
                show_line(f"{path}: seed {event['seed']!s:.100}", file=sys.stderr)
            job.saved += 1
            job.done = job.total if job.saved == len(job.paths) else job.done


def choose_code(status: object) -> int:
    """Return the exit code for an HTTP status."""
    if status in (429, 503, 504):
        return TRY_LATER
    return REFUSED if isinstance(status, int) and 400 <= status < 500 else FAILED


def find_tqdm() -> Any:
    """Return tqdm's class, None where it is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm


def open_bar() -> contextlib.AbstractContextManager[Any]:
    """Return a context with a bar of steps, with None where there is no tqdm."""
    tqdm = find_tqdm()
    bar: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    return tqdm(unit="step", disable=None, leave=False, dynamic_ncols=True) if tqdm else bar


def show_steps(bar: Any, jobs: Sequence[Job]) -> None:
    """Show the steps of all jobs together; one that has not begun counts as many as the last that has."""
    typical = next((job.total for job in reversed(jobs) if job.total), 0)
    bar.total = sum(job.done if job.is_over.is_set() else job.total or typical for job in jobs) or None
    bar.n = sum(job.done for job in jobs)
    if len(jobs) > 1:
        bar.set_postfix_str(f"{sum(job.is_over.is_set() for job in jobs)} of {len(jobs)} prompts", refresh=False)
    bar.refresh()


def show_error(error: Exception, *, label: str = "") -> int:
    """Show a failure in one line; return its exit code."""
    shown = f"the answer holds a damaged event: {error!r}" if isinstance(error, (LookupError, TypeError)) else error
    show_line(f"query.py: {label}{shown}", file=sys.stderr)
    return error.code if isinstance(error, QueryError) else FAILED


def show_line(text: str, *, file: Any) -> None:
    """Print a line above the bar, without what could move a terminal's cursor; a server chose some of it."""
    escaped = (char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    tqdm = find_tqdm()
    with tqdm.external_write_mode(file=file) if tqdm else contextlib.nullcontext():
        print("".join(escaped), file=file)


def check_picture(event: Mapping[str, Any]) -> bytes:
    """Return the picture of an event.

    Raises:
        QueryError: it is not a whole JPEG, PNG or WebP.
    """
    try:
        data = base64.b64decode(event["b64_json"], validate=True)
        check_frame(data)
    except struct.error as error:
        raise QueryError("the picture is damaged: it is cut short") from error
    except (ValueError, LookupError, TypeError) as error:
        raise QueryError(f"the picture is damaged: {error}") from error
    return data


def check_frame(data: bytes) -> None:
    """Follow a picture's parts from its start to its end.

    In a PNG each part tells whether it is as it was written. In a JPEG or WebP it does not: a picture that is cut short
    or put together wrongly is found, bytes that are others than they were are not.

    Raises:
        ValueError: it is not a whole JPEG, PNG or WebP.
        struct.error: it is cut short.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        check_png(data)
    elif data.startswith(b"\xff\xd8\xff"):
        check_jpeg(data)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        check_webp(data)
    else:
        raise ValueError("it is no JPEG, PNG or WebP")


def check_pixels(width: int, height: int) -> None:
    """Refuse a picture that whoever opens it would take gigabytes for.

    Raises:
        QueryError: it is larger than any that this server makes.
    """
    if width * height > MAX_PIXELS:
        raise QueryError(f"the picture has {width} x {height} pixels; the most that is taken is {MAX_PIXELS}")


def check_png(data: bytes) -> None:
    place, kinds = 8, [b""]
    while kinds[-1] != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, place)
        (checksum,) = struct.unpack_from(">I", data, place + 8 + length)
        if checksum != zlib.crc32(memoryview(data)[place + 4 : place + 8 + length]):
            raise ValueError(f"the checksum of its part {kind!r} is wrong")
        place += 12 + length
        kinds.append(kind)
    if kinds[1] != b"IHDR" or b"IDAT" not in kinds:
        raise ValueError("it is a PNG without a picture")
    check_pixels(*struct.unpack_from(">II", data, 16))


def check_jpeg(data: bytes) -> None:
    place, has_scan = 2, False
    while (marker := JPEG_MARKER.match(data, place)) and marker[1] != b"\xd9":
        (length,) = struct.unpack_from(">H", data, marker.end())
        place = marker.end() + length
        if marker[1] in JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, marker.end() + 3)
            check_pixels(width, height)
        if marker[1] == b"\xda":
            has_scan = True
            end = JPEG_SCAN_END.search(data, place)
            place = end.start() if end else len(data)
    if not marker:
        raise ValueError("it is cut short" if place >= len(data) else "its parts do not follow one another")
    if not has_scan:
        raise ValueError("it is a JPEG without a picture")


def check_webp(data: bytes) -> None:
    (length,) = struct.unpack_from("<I", data, 4)
    if len(data) < 8 + length:
        raise ValueError("it is cut short")
    place, kinds = 12, set()
    while place < 8 + length:
        kind, part = struct.unpack_from("<4sI", data, place)
        if kind in WEBP_SIZES:
            check_pixels(*WEBP_SIZES[kind](data[place + 8 : place + 18].ljust(10, b"\0")))
        place += 8 + part + part % 2
        kinds.add(kind)
    if place != 8 + length or not kinds & {b"VP8 ", b"VP8L", b"ANMF"}:
        raise ValueError("its parts are not those of a WebP")


def save_picture(picture: bytes, path: Path, *, overwrite: bool) -> Path:
    """Write the picture whole or not at all.

    Returns:
        Where it is: a name that is taken gets -1, -2, … unless it may be overwritten.
    """
    temporary = path.with_name(f".query-{uuid.uuid4().hex}.part")
    try:
        with temporary.open("xb") as file:
            file.write(picture)
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
        return make_pictures(plan_jobs(options), options)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (QueryError, OSError, ValueError) as error:
        return show_error(error)


if __name__ == "__main__":
    sys.exit(main())
