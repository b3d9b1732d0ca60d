"""Run TorchServe as the one process of a container or unit: make the archive, serve, and drain on SIGTERM.

The archive, keys and the cache go into the working directory, and logs to standard output. The model stays where it is.
The user needs no name and no home.
"""

import argparse
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import requests

from sdxl_server.errors import ConfigError
from sdxl_server.model.sources import check_has_pipeline
from sdxl_server.serving.client import send_request

logger = logging.getLogger(__name__)

IN_FLIGHT_LINE = re.compile(r"^sdxl_requests_in_flight (\S+)$", re.MULTILINE)
# Kubernetes removes a pod from its services after SIGTERM. New requests may come until then.
IDLE_SECONDS = 5
DRAIN_FILE = Path("draining")


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM; return TorchServe's exit code, 0 after a drain."""
    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    description = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m sdxl_server.serving.container", description=description)
    parser.add_argument("--source", type=Path, default=Path("/opt/sdxl"), help="the folder of this project")
    parser.add_argument("--settings", type=Path, help="a model-config.yaml (default: the one of the project)")
    parser.add_argument("--model", type=Path, default=Path("/models/Base_Diffusion_model"), help="the model's folder")
    parser.add_argument(
        "--address", default="0.0.0.0", help="IPv4 address or name to listen on (default: all addresses, of IPv6 too)"
    )
    parser.add_argument("--port", type=int, default=8080, help="of the inference API (default: %(default)s)")
    parser.add_argument(
        "--management-port", type=int, default=8081, help="of the management API on loopback (default: %(default)s)"
    )
    parser.add_argument("--metrics-port", type=int, default=9108, help="of /metrics and /ready (default: %(default)s)")
    parser.add_argument("--drain", type=float, default=3600, metavar="SECONDS", help="limit for requests in flight")
    parser.add_argument(
        "--open", action="store_true", help="ask for no API key: where only a proxy that checks keys reaches the port"
    )
    options = parser.parse_args(arguments)
    if ":" in options.address:
        parser.error(f"--address takes an IPv4 address or a name, not {options.address}; 0.0.0.0 means all of IPv6 too")
    try:
        DRAIN_FILE.unlink(missing_ok=True)  # of an earlier start
        Path("config.properties").touch()
    except OSError as error:
        parser.error(f"user {os.getuid()} cannot write into {Path.cwd()} ({error}): mount a folder of this user there")
    try:
        check_has_pipeline(str(options.model), Path.cwd())
    except ConfigError as error:  # the worker would say it again and again, for minutes
        print(f"ConfigError: {error}", file=sys.stderr)
        return 1
    make_archive(options.source, options.settings or options.source / "model-config.yaml", options)
    properties = {
        "inference_address": f"http://{options.address}:{options.port}",
        "management_address": f"http://127.0.0.1:{options.management_port}",
        "disable_token_authorization": str(options.open).lower(),
    }
    lines = (options.source / "config.properties").read_text().splitlines()
    kept = [line for line in lines if line.partition("=")[0] not in properties]
    Path("config.properties").write_text("\n".join([*kept, *(f"{k}={v}" for k, v in properties.items()), ""]))
    write_log_settings(options.source / "log4j2.xml", Path("log4j2.xml"))
    server = subprocess.Popen(
        [
            *("torchserve", "--start", "--foreground", "--ncs", "--ts-config", "config.properties"),
            *("--log-config", "log4j2.xml"),
            *("--model-store", "model_store", "--models", "diffusion_fast"),
        ],
        env={"USER": "sdxl", **os.environ, "HOME": str(Path.cwd())},
    )
    is_stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: is_stopping.set())
    while server.poll() is None:
        if is_stopping.wait(1):
            drain(server, options.address, options.metrics_port, seconds=options.drain)
            subprocess.run(["torchserve", "--stop", "--foreground"], check=False)
            server.wait()
            return 0
    return server.returncode


def make_archive(source: Path, settings: Path, options: Any) -> None:
    """Make the model archive. The model stays where it is."""
    import yaml

    content = yaml.safe_load(settings.read_text())
    content["handler"] |= {
        "model_path": str(options.model),
        "metrics_address": f"{find_metrics_host(options.address)}:{options.metrics_port}",
        "drain_file": str(DRAIN_FILE.resolve()),
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


def write_log_settings(source: Path, target: Path) -> None:
    """Write TorchServe's log settings without files. The runtime or journal keeps what goes to standard output."""
    settings = ElementTree.parse(source)
    for parent in list(settings.iter()):
        for child in list(parent):
            if child.tag == "RollingFile" or child.tag == "AppenderRef" and child.get("ref") != "STDOUT":
                parent.remove(child)
    settings.write(target)


def find_metrics_host(address: str) -> str:
    """Return what the worker listens on where TorchServe listens on `address`.

    In Java 0.0.0.0 means all addresses, of IPv6 too. In Python it is [::].
    """
    return "[::]" if address == "0.0.0.0" and socket.has_dualstack_ipv6() else address


def drain(server: "subprocess.Popen[bytes]", address: str, port: int, *, seconds: float) -> None:
    """Let no more requests come, and wait until none has been in flight for some seconds.

    Args:
        server: without it there is nothing to wait for.
        address: of the worker's metrics.
        seconds: the longest time to wait.
    """
    logger.info("Stopping: the requests in flight are finished first")
    DRAIN_FILE.touch()  # /ready answers 503
    host = "127.0.0.1" if address == "0.0.0.0" else address
    idle, deadline = 0, time.monotonic() + seconds
    while server.poll() is None and idle <= IDLE_SECONDS:
        if time.monotonic() > deadline:
            logger.warning("Requests were still in flight after %.0f s", seconds)
            return
        idle = 0 if is_busy(f"http://{host}:{port}/metrics") else idle + 1
        time.sleep(1)


def is_busy(url: str) -> bool:
    """Say whether the worker has requests. One that does not answer may have some."""
    try:
        text = send_request("GET", url, timeout=5).text
    except requests.RequestException:
        return True
    found = IN_FLIGHT_LINE.search(text)
    return found is None or float(found[1]) > 0


if __name__ == "__main__":
    sys.exit(main())
