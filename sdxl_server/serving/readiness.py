"""Exit with 0 when the model can answer, else with 1 and a line with the reason."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import requests

ADDRESSES = {"inference_address": "http://127.0.0.1:8080", "management_address": "http://127.0.0.1:8081"}
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
            addresses = read_addresses(options.ts_config)
            check_workers(addresses["management_address"], options.model, read_token(options.key_file, "management"))
            if options.answer is not None:
                token = read_token(options.key_file, "inference")
                check_answer(addresses["inference_address"], options.model, token, seconds=options.answer)
        except NotReadyError as error:
            if time.monotonic() + RETRY_SECONDS > deadline:
                print(error, file=sys.stderr)
                return 1
            time.sleep(RETRY_SECONDS)
        else:
            return 0


def read_addresses(properties: Path) -> dict[str, str]:
    """Return the addresses of a config.properties by their key, with TorchServe's defaults.

    Raises:
        NotReadyError: the file cannot be read.
    """
    try:
        lines = properties.read_text().splitlines()
    except OSError as error:
        raise NotReadyError(f"{properties} cannot be read: {error.strerror}") from error
    settings = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    return {key: settings.get(key, address).strip() for key, address in ADDRESSES.items()}


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


def check_workers(address: str, model: str, token: str) -> None:
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


def check_answer(address: str, model: str, token: str, *, seconds: float) -> None:
    """Ask the model what it runs.

    Raises:
        NotReadyError: it does not answer.
    """
    send_get(f"{address}/predictions/{model}/1.0/describe", token, seconds=seconds)


def send_get(url: str, token: str, *, seconds: float) -> requests.Response:
    """Return the response to a GET.

    Raises:
        NotReadyError: there is none in time, or it is an error.
    """
    try:
        with requests.Session() as session:
            session.trust_env = False  # no proxy, and no token from a .netrc
            answer = session.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=seconds)
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
