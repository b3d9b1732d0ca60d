"""What a worker counts, for Prometheus, and the address where that is read; nothing of what clients ask for is told.

Each number comes from where the thing happens: ends of requests from the service and the queue, calls of the UNet from
the denoiser, graphs from what was compiled.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, make_wsgi_app
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import Collector

from sdxl_server.errors import ConfigError

OUTCOMES = {HTTPStatus.SERVICE_UNAVAILABLE: "busy", HTTPStatus.GATEWAY_TIMEOUT: "timeout"}

REQUESTS = Counter(
    "sdxl_requests",
    "Requests that are over: picture, refused (a mistake of the client's), busy (the queue was full), timeout, failed, "
    "left (the client)",
    ["outcome"],
)
for _outcome in ("picture", "refused", "busy", "timeout", "failed", "left"):
    REQUESTS.labels(_outcome)  # at 0 from the start, so that a rate can be told of the first
IN_FLIGHT = Gauge("sdxl_requests_in_flight", "Requests in the worker, those that wait too")
WAITING = Gauge("sdxl_requests_waiting", "Requests in the worker that have not made a step")
PICTURE_SECONDS = Histogram(
    "sdxl_picture_seconds",
    "Work on a picture, from the text encoders to the file, without that on other requests between",
    buckets=(0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000),
)
PREVIEW_SECONDS = Histogram(
    "sdxl_preview_seconds",
    "A preview, without its file: fast, or exact, which is decoded as the picture is",
    ["kind"],
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50),
)
CALL_SECONDS = Histogram(
    "sdxl_unet_call_seconds",
    "A call of the UNet, the warm-up's too, in which it may be compiled",
    buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100),
)
CALLS_MADE = Counter("sdxl_unet_calls_made", "Calls of the UNet, in whole ones, the warm-up's too")
CALLS_SKIPPED = Counter("sdxl_unet_calls_skipped", "Calls of the UNet that were forecast or halved, in whole ones")
PARTS = {
    "OpenVINOModels": ("sdxl_graphs", "Graphs that OpenVINO runs"),
    "OpenVINOModelsFromCache": ("sdxl_graphs_from_cache", "Graphs that were read from the cache"),
    "OpenVINOOperatorsOutside": ("sdxl_graphs_operators_outside", "Operators that OpenVINO does not run"),
    "OpenVINOCompileTime": ("sdxl_graphs_compile_seconds", "Seconds that the compilation of the graphs took"),
}
Figures = Mapping[str, Mapping[str, tuple[float, str]]]


class PartsCollector(Collector):
    """Reads the figures of each part of the model when they are asked for; graphs come and go."""

    def __init__(self, measure: Callable[[], Figures]) -> None:
        self._measure = measure

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Return a family for each of PARTS."""
        figures = self._measure()
        for name, (shown, words) in PARTS.items():
            family = GaugeMetricFamily(shown, words, labels=["part"])
            for part, values in figures.items():
                family.add_metric([part], values[name][0])
            yield family


class SilentHandler(WSGIRequestHandler):
    """Logs no request."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def watch_parts(measure: Callable[[], Figures]) -> None:
    """Tell the figures of the model's parts too."""
    REGISTRY.register(PartsCollector(measure))


def count_failure(status: int) -> None:
    """Count a request that ended with an error of this HTTP status."""
    REQUESTS.labels(OUTCOMES.get(HTTPStatus(status), "refused" if status < 500 else "failed")).inc()


def serve_metrics(address: str, is_ready: threading.Event) -> int:
    """Answer GET /metrics, and /ready with 200 or 503, in a thread of their own.

    Args:
        address: host:port; port 0 is any that is free.

    Returns:
        The port.

    Raises:
        ConfigError: the address is taken, or is not one of this machine.
    """
    metrics_app = make_wsgi_app()

    def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return metrics_app(environ, start_response)
        status, text = ("200 OK", b"ready\n") if is_ready.is_set() else ("503 Service Unavailable", b"loading\n")
        if path != "/ready":
            status, text = "404 Not Found", b"there are /metrics and /ready\n"
        start_response(status, [("Content-Type", "text/plain")])
        return [text]

    host, _, port = address.rpartition(":")
    try:
        server = make_server(host, int(port), answer, ThreadingWSGIServer, handler_class=SilentHandler)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"handler.metrics_address takes a free address of this machine, one a worker, not {address} ({error})"
        ) from error
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server.server_port
