"""Ask the server for a picture and save it."""

import argparse
import io
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path

CONNECT_SECONDS = 10
MAX_ANSWER_BYTES = 64 * 2**20
TOKEN_VARIABLE = "TORCHSERVE_TOKEN"


class QueryError(Exception):
    """A failure whose message is the line to show."""


@dataclass(frozen=True)
class Answer:
    """What the server sent back."""

    status: int
    content_type: str
    body: bytes

    def read_json(self) -> dict[str, object]:
        """Return the body's JSON object, empty where it is something else."""
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError):
            return {}
        return value if isinstance(value, dict) else {}

    def show_start(self) -> str:
        return self.body[:800].decode(errors="replace")[:200]


def parse_seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise argparse.ArgumentTypeError(f"must be more than 0, not {text}")
    return seconds


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="query.py", description="Ask the server for a picture and save it.")
    add = parser.add_argument
    add("--url", default="http://localhost:8080/predictions/diffusion_fast", help="where to ask (default: %(default)s)")
    add("--prompt", required=True, help="what the picture shows")
    add("--filename", type=Path, help="where to save the picture (default: output-<date>-<time>.jpg)")
    add("--overwrite", action="store_true", help="replace the file that --filename names")
    add("--token", help=f"the server's inference key (default: {TOKEN_VARIABLE}, then the key file)")
    add("--key-file", type=Path, default="key_file.json", help="the server's key file (default: %(default)s)")
    add(
        "--timeout",
        type=parse_seconds,
        metavar="SECONDS",
        default=3600,
        help="how long to wait in all (default: %(default)s)",
    )
    return parser.parse_args(argv)


def check_target(filename: Path | None, *, overwrite: bool) -> None:
    """Refuse a place that the picture could not be saved in, before the server works for it.

    Raises:
        QueryError: the file exists, or its folder cannot be written.
    """
    path = filename or Path("output.jpg")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise QueryError(f"cannot write into the folder {path.parent}")
    if filename and os.path.lexists(filename):
        if not overwrite:
            raise QueryError(f"{filename} exists; choose another --filename or add --overwrite")
        if not filename.is_file():
            raise QueryError(f"{filename} exists and is not a file")


def read_key(key_file: Path) -> str | None:
    """Return the inference key of TorchServe's key file, None where there is no file."""
    try:
        key = json.loads(key_file.read_bytes())["inference"]["key"]
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError) as error:
        raise QueryError(f"{key_file} holds no inference key") from error
    return str(key)


def send_prompt(url: str, prompt: str, *, token: str | None) -> Answer:
    """Send one request and read the whole answer.

    Raises:
        QueryError: a token that cannot be sent, no answer, or one of more than MAX_ANSWER_BYTES.
    """
    import requests

    if token and not (token.isascii() and token.isprintable()):
        raise QueryError("the token holds a character that cannot be sent")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    body = bytearray()
    try:
        with requests.Session() as session:
            session.trust_env = False  # no proxy between, and no ~/.netrc in the token's place
            session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
            with session.post(
                url,
                json={"prompt": prompt},
                headers=headers,
                timeout=(CONNECT_SECONDS, None),  # wait_for_picture keeps the time
                allow_redirects=False,  # the token is for this address only
                stream=True,
            ) as response:
                for part in response.iter_content(2**16):
                    body += part
                    if len(body) > MAX_ANSWER_BYTES:
                        raise QueryError(f"the answer is larger than {MAX_ANSWER_BYTES} bytes")
                return Answer(response.status_code, response.headers.get("Content-Type", ""), bytes(body))
    except requests.RequestException as error:
        cause: BaseException = error
        while cause.__context__:  # the first failure is the plain one: "Connection refused"
            cause = cause.__context__
        raise QueryError(f"no answer from {url}: {getattr(cause, 'strerror', None) or cause}") from error


def request_picture(options: argparse.Namespace) -> Answer:
    """Send the prompt with the token that is found; once more where the key file has a new one."""
    given = options.token or os.environ.get(TOKEN_VARIABLE)
    token = given or read_key(options.key_file)
    answer = send_prompt(options.url, options.prompt, token=token)
    if not given and is_token_refused(answer):
        new_token = read_key(options.key_file)  # a server that was restarted has made new keys
        if new_token and new_token != token:
            answer = send_prompt(options.url, options.prompt, token=new_token)
    return answer


def is_token_refused(answer: Answer) -> bool:
    return answer.status == 400 and answer.read_json().get("type") == "InvalidKeyException"


def wait_for_picture(options: argparse.Namespace) -> Answer:
    """Request the picture in a thread; meanwhile show the time on a terminal, and stop when it is up.

    A timeout of the request itself would start again with every byte that arrives.
    """
    future: Future[Answer] = Future()

    def run() -> None:
        try:
            future.set_result(request_picture(options))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    start = time.monotonic()
    try:
        while not future.done():
            elapsed = time.monotonic() - start
            if elapsed >= options.timeout:
                raise QueryError(f"no answer from {options.url} within {options.timeout:g} s (--timeout)")
            show_status(f"\rwaiting {int(elapsed)} s")
            wait([future], timeout=min(int(elapsed) + 1, options.timeout) - elapsed)
    finally:
        show_status("\r" + " " * 20 + "\r")
    return future.result()


def show_status(text: str) -> None:
    if sys.stderr.isatty():
        print(text, end="", file=sys.stderr, flush=True)


def check_answer(answer: Answer, *, key_file: Path) -> None:
    """Refuse every answer that is not a whole picture.

    Raises:
        QueryError: with what the server said.
    """
    if is_token_refused(answer):
        order = f"--token, then {TOKEN_VARIABLE}, then the inference key in {key_file} (--key-file)"
        raise QueryError(f"the server refuses the token, or there is none; it is taken from {order}")
    if answer.status != 200:
        content = answer.read_json()
        error = content.get("error")
        message = error.get("message") if isinstance(error, dict) else content.get("message")
        what = " (redirects are not followed)" if 300 <= answer.status < 400 else ""
        raise QueryError(f"the server answered {answer.status}{what}: {str(message or answer.show_start())[:1000]}")
    check_picture(answer)


def check_picture(answer: Answer) -> None:
    from PIL import Image, UnidentifiedImageError

    kind = answer.content_type or "no content type"
    try:
        if not kind.startswith("image/"):
            raise UnidentifiedImageError
        with Image.open(io.BytesIO(answer.body), formats=["JPEG", "PNG", "WEBP"]) as picture:
            picture.load()  # verify() takes a JPEG that is cut short
    except UnidentifiedImageError as error:
        raise QueryError(f"the answer is not a picture ({kind}): {answer.show_start()}") from error
    except Exception as error:  # Pillow's decoders raise many kinds
        raise QueryError(f"the picture is damaged ({kind}, {len(answer.body)} bytes): {error}") from error


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


def escape_controls(text: str) -> str:
    """Escape what could move a terminal's cursor or colour its text; a server chose some of it."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    try:
        check_target(options.filename, overwrite=options.overwrite)
        answer = wait_for_picture(options)
        check_answer(answer, key_file=options.key_file)
        path = options.filename or Path(time.strftime("output-%Y%m%d-%H%M%S.jpg"))
        print(save_picture(answer.body, path, overwrite=options.overwrite and options.filename is not None))
    except KeyboardInterrupt:
        return 130
    except (QueryError, OSError, ValueError) as error:
        print(f"query.py: {escape_controls(str(error))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
