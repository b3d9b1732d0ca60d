"""Exit with 0 when the model can answer, else with 1 and a line with the reason."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import requests

from sdxl_server.serving.client import send_request

# TorchServe's defaults
PROPERTIES = {
    "inference_address": "http://127.0.0.1:8080",
    "management_address": "http://127.0.0.1:8081",
    "disable_token_authorization": "false",
}
MANAGEMENT_SECONDS = 10  # for the management API, which waits for no worker
RETRY_SECONDS = 0.5


class NotReadyError(RuntimeError):
    """The model cannot answer; the message gives the reason."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Check once, or until the model is ready; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sdxl_server.serving.readiness", description=__doc__)
    parser.add_argument("--ts-config", type=Path, default=Path("config.properties"), help="the server's settings")
    parser.add_argument(
        "--key-file", type=Path, default=Path("key_file.json"), help="written into the folder the server is started in"
    )
    parser.add_argument("--model", default="diffusion_fast", metavar="NAME")
    parser.add_argument(
        "--answer",
        type=float,
        metavar="SECONDS",
        help="also ask the model, which answers after the images in work and in the queue; without this option "
        "a worker that hangs counts as ready",
    )
    parser.add_argument("--wait", type=float, default=0, metavar="SECONDS", help="how long to try (default: once)")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.wait
    while True:
        try:
            properties = read_properties(options.ts_config)
            needs_token = properties["disable_token_authorization"].lower() != "true"
            token = read_token(options.key_file, "management") if needs_token else None
            check_workers(properties["management_address"], options.model, token)
            if options.answer is not None:
                token = read_token(options.key_file, "inference") if needs_token else None
                check_answer(properties["inference_address"], options.model, token, seconds=options.answer)
        except NotReadyError as error:
            if time.monotonic() + RETRY_SECONDS > deadline:
                print(error, file=sys.stderr)
                return 1
            time.sleep(RETRY_SECONDS)
        else:
            return 0


def read_properties(path: Path) -> dict[str, str]:
    """Return PROPERTIES as a config.properties sets them.

    Raises:
        NotReadyError: the file cannot be read.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise NotReadyError(f"{path} cannot be read: {error.strerror}") from error
    pairs = (line.partition("=") for line in lines if not line.startswith("#"))
    settings = {key.strip(): value.strip() for key, _, value in pairs}
    return {key: settings.get(key, default) for key, default in PROPERTIES.items()}


def read_token(key_file: Path, kind: str) -> str:
    """Return the token for `inference` or `management`.

    Raises:
        NotReadyError: the file has none.
    """
    try:
        token: str = json.loads(key_file.read_text())[kind]["key"]
    except FileNotFoundError as error:
        raise NotReadyError(f"{key_file} is missing; TorchServe writes it into its working directory") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotReadyError(f"{key_file} holds no readable token for {kind}") from error
    return token


def check_workers(address: str, model: str, token: str | None) -> None:
    """Ask the management API for the model's workers. There must be one at least, and all must be ready.

    Raises:
        NotReadyError: names their states.
    """
    answer = send_get(f"{address}/models/{model}", token, seconds=MANAGEMENT_SECONDS)
    try:
        statuses = [str(worker["status"]) for worker in answer.json()[0]["workers"]]
    except (ValueError, LookupError, TypeError) as error:
        raise NotReadyError(f"{address} does not answer like TorchServe") from error
    if not statuses:
        raise NotReadyError(f"{model} has no worker")
    if set(statuses) != {"READY"}:
        raise NotReadyError(f"{model}'s workers: {', '.join(statuses)}")


def check_answer(address: str, model: str, token: str | None, *, seconds: float) -> None:
    """Ask the model what it runs.

    Raises:
        NotReadyError: it does not answer.
    """
    send_get(f"{address}/predictions/{model}/1.0/describe", token, seconds=seconds)


def send_get(url: str, token: str | None, *, seconds: float) -> requests.Response:
    """Return the response to a GET.

    Raises:
        NotReadyError: there is none in time, or it is an error.
    """
    try:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        answer = send_request("GET", url, headers=headers, timeout=seconds)
    except requests.Timeout as error:
        raise NotReadyError(f"no answer from {url} within {seconds:g} s") from error
    except requests.RequestException as error:
        raise NotReadyError(f"no server at {url}") from error
    if answer.status_code == 400 and "InvalidKeyException" in answer.text:
        raise NotReadyError("the token is refused; the key file belongs to another start of the server")
    if answer.status_code == 404:
        raise NotReadyError(f"there is no model at {url}")
    if answer.status_code != 200:
        raise NotReadyError(f"{url} answers {answer.status_code}: {answer.text[:200]!r}")
    return answer


if __name__ == "__main__":
    sys.exit(main())
