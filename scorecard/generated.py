"""Requests that schemathesis generates from the server's OpenAPI document. Some follow it and some break it."""

import json
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import requests

from tools.server import SCRIPTS, LocalServer

CHECKS_LEFT_OUT = (
    "positive_data_acceptance",  # a document cannot say that base64 must hold an image
    "missing_required_header",  # TorchServe answers 400, not 401, to a missing token
    "ignored_auth",  # likewise
    "unsupported_method",  # TorchServe takes every method for a prediction
)


@dataclass(frozen=True)
class GeneratedRun:
    """The result of generated requests.

    Attributes:
        passed: every answer is as the document says, and none is a server error.
        output: schemathesis's report.
    """

    passed: bool
    count: int
    output: str


def run_schemathesis(server: LocalServer, *, examples: int, most_steps: int, patience: float = 90) -> GeneratedRun:
    """Send generated requests to a server.

    Args:
        examples: the number of requests for each media type and mode, in addition to those at the document's bounds.
        most_steps: the most steps that a request asks for.
        patience: seconds until an answer must come.
    """
    try:
        document = server.read_document("openapi.json")
    except requests.RequestException as error:
        return GeneratedRun(False, 0, str(error))
    document["components"]["schemas"]["GenerationRequest"]["properties"]["num_inference_steps"]["maximum"] = most_steps
    with tempfile.TemporaryDirectory(prefix="schemathesis-") as folder:
        (Path(folder) / "openapi.json").write_text(json.dumps(document))
        run = subprocess.run(
            [
                *(SCRIPTS / "schemathesis", "run", "openapi.json", "--url", server.url.rpartition("/predictions")[0]),
                *("--header", f"Authorization: {server.get_headers()['Authorization']}", "--mode", "all"),
                *("--max-examples", str(examples), "--seed", "1", "--request-timeout", str(patience), "--no-color"),
                *("--exclude-checks", ",".join(CHECKS_LEFT_OUT), "--phases", "coverage,fuzzing"),
                "--continue-on-failure",
            ],
            cwd=folder,
            env={**os.environ, "SCHEMATHESIS_HOOKS": str(Path(__file__).with_name("generated_hooks.py"))},
            capture_output=True,
            text=True,
        )
    found = re.search(r"(\d+) generated", run.stdout)
    return GeneratedRun(run.returncode == 0, int(found[1]) if found else 0, run.stdout + run.stderr)
