"""Run TorchServe as the one process of a container: make the archive, serve, and on SIGTERM drain first.

What is written goes into the folder where it is started: the archive, logs and keys. The model is read where it is.
"""

import argparse
import logging
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests

logger = logging.getLogger(__name__)

IN_FLIGHT = re.compile(r"^sdxl_requests_in_flight (\S+)$", re.MULTILINE)
# Kubernetes takes a pod out of its services while it is told to end; this long, new requests may still come.
QUIET_SECONDS = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM; return TorchServe's exit code, 0 after a drain."""
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m sdxl_server.serving.container", description=description)
    parser.add_argument("--source", type=Path, default=Path("/opt/sdxl"), help="the folder of this project")
    parser.add_argument("--settings", type=Path, help="a model-config.yaml (default: the one of the project)")
    parser.add_argument("--model", type=Path, default=Path("/models/Base_Diffusion_model"), help="the model's folder")
    parser.add_argument("--address", default="0.0.0.0", help="where it listens")
    parser.add_argument("--port", type=int, default=8080, help="of pictures (default: %(default)s)")
    parser.add_argument("--metrics-port", type=int, default=9108, help="of /metrics and /ready (default: %(default)s)")
    parser.add_argument("--drain", type=float, default=3600, metavar="SECONDS", help="for the requests under way")
    options = parser.parse_args(arguments)
    make_archive(options.source, options.settings or options.source / "model-config.yaml", options)
    properties = {
        "inference_address": f"http://{options.address}:{options.port}",
        "disable_token_authorization": "true",
    }
    lines = (options.source / "config.properties").read_text().splitlines()
    kept = [line for line in lines if line.partition("=")[0] not in properties]
    Path("config.properties").write_text("\n".join([*kept, *(f"{k}={v}" for k, v in properties.items()), ""]))
    server = subprocess.Popen(
        [
            *("torchserve", "--start", "--foreground", "--ncs", "--ts-config", "config.properties"),
            *("--log-config", str(options.source / "log4j2.xml")),
            *("--model-store", "model_store", "--models", "diffusion_fast"),
        ]
    )
    is_told_to_end = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: is_told_to_end.set())
    while server.poll() is None:
        if is_told_to_end.wait(1):
            drain(options.metrics_port, seconds=options.drain)
            subprocess.run(["torchserve", "--stop", "--foreground"], check=False)
            server.wait()
            return 0
    return server.returncode


def make_archive(source: Path, settings: Path, options: Any) -> None:
    """Make the archive of this package's version, with the model left where it is."""
    import yaml

    content = yaml.safe_load(settings.read_text())
    content["handler"] |= {
        "model_path": str(options.model),
        "metrics_address": f"{options.address}:{options.metrics_port}",
    }
    Path("model-config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    shutil.rmtree("model_store", ignore_errors=True)  # of an earlier start
    Path("model_store").mkdir()
    subprocess.run(
        [
            *("torch-model-archiver", "--model-name", "diffusion_fast", "--version", "1.0"),
            *("--handler", source / "stable_diffusion_handler.py", "--config-file", "model-config.yaml"),
            *("--extra-files", source / "pipeline_utils.py", "--archive-format", "no-archive"),
            *("--export-path", "model_store"),
        ],
        check=True,
    )


def drain(port: int, *, seconds: float) -> None:
    """Wait until nothing has been in flight for some seconds, or for this long."""
    logger.info("Told to end: the requests under way are finished first")
    quiet = 0
    for _ in range(int(seconds)):
        quiet = quiet + 1 if count_in_flight(port) == 0 else 0
        if quiet > QUIET_SECONDS:
            return
        threading.Event().wait(1)
    logger.warning("Requests were still under way after %.0f s", seconds)


def count_in_flight(port: int) -> float:
    """Return how many requests the worker has; none where it is not there."""
    try:
        text = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text
    except requests.RequestException:
        return 0
    found = IN_FLIGHT.search(text)
    return float(found[1]) if found else 0


if __name__ == "__main__":
    sys.exit(main())
