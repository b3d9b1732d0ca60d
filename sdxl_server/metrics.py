"""A worker's metrics for Prometheus, and the address that serves them. They hold no content of requests.

The service and the queue count requests, and the denoiser counts UNet calls. The graphs' figures come from the backend.
"""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from http import HTTPStatus
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, make_wsgi_app
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import Collector

from sdxl_server.errors import ConfigError

OUTCOME_BY_STATUS = {HTTPStatus.SERVICE_UNAVAILABLE: "busy", HTTPStatus.GATEWAY_TIMEOUT: "timeout"}

REQUESTS = Counter(
    "sdxl_requests",
    "Finished requests: picture, refused (the client's mistake), busy (the queue was full), timeout, failed, left (the "
    "client)",
    ["outcome"],
)
for _outcome in ("picture", "refused", "busy", "timeout", "failed", "left"):
    REQUESTS.labels(_outcome)  # starts at 0, so that the first event has a rate
FILTERED = Counter("sdxl_filtered_requests", "Requests that the content filter refused; they count as refused, too")
CONTROLS = Counter("sdxl_controls", "Requests that name a control", ["control"])
REQUESTS_IN_FLIGHT = Gauge("sdxl_requests_in_flight", "Requests in the worker, waiting ones too")
REQUESTS_WAITING = Gauge("sdxl_requests_waiting", "Requests in the worker without a first step")
IMAGE_SECONDS = Histogram(
    "sdxl_picture_seconds",
    "Work on an image, from the text encoders to the file, without work on other requests",
    buckets=(0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000),
)
PREVIEW_SECONDS = Histogram(
    "sdxl_preview_seconds",
    "A preview without its file: fast, or exact, which is decoded like the image",
    ["kind"],
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50),
)
UNET_CALL_SECONDS = Histogram(
    "sdxl_unet_call_seconds",
    "A UNet call. The warm-up's count too and may include compilation, unless they only infer shapes",
    buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100),
)
UNET_CALLS_MADE = Counter("sdxl_unet_calls_made", "UNet calls, in whole ones, the warm-up's too")
UNET_CALLS_SKIPPED = Counter(
    "sdxl_unet_calls_skipped", "UNet calls saved by extrapolation or without guidance, in whole ones"
)
_leaves_out_calls: ContextVar[bool] = ContextVar("leaves_out_calls", default=False)
COMPONENT_GAUGES = {
    "OpenVINOModels": ("sdxl_graphs", "Graphs that OpenVINO runs"),
    "OpenVINOModelsFromCache": ("sdxl_graphs_from_cache", "Graphs that were read from the cache"),
    "OpenVINOOperatorsOutside": ("sdxl_graphs_operators_outside", "Operators that OpenVINO does not run"),
    "OpenVINOCompileTime": ("sdxl_graphs_compile_seconds", "Seconds that the compilation of the graphs took"),
}
ComponentFigures = Mapping[str, Mapping[str, tuple[float, str]]]


class ComponentCollector(Collector):
    """Reads the figures of each component at each scrape, because graphs come and go."""

    def __init__(self, measure: Callable[[], ComponentFigures]) -> None:
        self._measure = measure

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Return a family for each of COMPONENT_GAUGES."""
        figures = self._measure()
        for name, (metric, description) in COMPONENT_GAUGES.items():
            family = GaugeMetricFamily(metric, description, labels=["part"])
            for component, values in figures.items():
                family.add_metric([component], values[name][0])
            yield family


class SilentHandler(WSGIRequestHandler):
    """Handles requests without a log."""

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


class Ipv6Server(ThreadingWSGIServer):
    """Listens on an IPv6 address; at :: on all IPv4 addresses too."""

    address_family = socket.AF_INET6

    def server_bind(self) -> None:
        """Bind as usual, whatever the system's default for :: is."""
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


def register_components(measure: Callable[[], ComponentFigures]) -> None:
    """Add the figures of the model's components."""
    REGISTRY.register(ComponentCollector(measure))


@contextlib.contextmanager
def leave_out_calls() -> Iterator[None]:
    """Count no UNet calls of the block, because they compute no numbers."""
    token = _leaves_out_calls.set(True)
    try:
        yield
    finally:
        _leaves_out_calls.reset(token)


def count_unet_call(cost: float, *, seconds: float) -> None:
    """Count a UNet call.

    Args:
        cost: the part of a whole call that was made; 0 if its output was extrapolated.
        seconds: the time that it took.
    """
    if _leaves_out_calls.get():
        return
    if cost:
        UNET_CALL_SECONDS.observe(seconds)
    UNET_CALLS_MADE.inc(cost)
    UNET_CALLS_SKIPPED.inc(1 - cost)


def count_failure(status: int) -> None:
    """Count a request that failed with this HTTP status."""
    REQUESTS.labels(OUTCOME_BY_STATUS.get(HTTPStatus(status), "refused" if status < 500 else "failed")).inc()


def serve_metrics(address: str, is_ready: threading.Event, *, drain_file: str | None = None) -> int:
    """Serve GET /metrics, and /ready with 200 or 503, in a thread.

    Args:
        address: host:port, or [IPv6 address]:port; port 0 is any free one.
        drain_file: while it exists, the answer is 503.

    Returns:
        The port.

    Raises:
        ConfigError: the address is taken or belongs to another machine.
    """
    metrics_app = make_wsgi_app()

    def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return metrics_app(environ, start_response)
        status, text = "200 OK", b"ready\n"
        if path != "/ready":
            status, text = "404 Not Found", b"the paths are /metrics and /ready\n"
        elif drain_file is not None and Path(drain_file).exists():
            status, text = "503 Service Unavailable", b"draining\n"
        elif not is_ready.is_set():
            status, text = "503 Service Unavailable", b"loading\n"
        start_response(status, [("Content-Type", "text/plain")])
        return [text]

    host, _, port = address.rpartition(":")
    server_class = Ipv6Server if host.startswith("[") else ThreadingWSGIServer
    try:
        server = make_server(host.strip("[]"), int(port), answer, server_class, handler_class=SilentHandler)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"handler.metrics_address takes a free address of this machine, one per worker, not {address} ({error})"
        ) from error
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server.server_port
