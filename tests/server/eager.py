"""The server that the tests of requests, contract and metrics share, and waiting for events."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.server.test_backends import make_settings
from tools.server import LocalServer, find_free_ports, make_archive

LIMITS = {"num_inference_steps": 3, "max_steps": 150, "max_side": 128, "max_images": 2}
LONG = {"num_inference_steps": 150, "num_images_per_prompt": 2, "scheduler": "HeunDiscreteScheduler"}  # 598 calls
PASSED_ON, KEPT = ("OMP_NUM_THREADS", "LC_TIME"), ("MYSQL_PWD", "GH_PAT", "DATABASE_URL", "HF_TOKEN")


def wait_for(condition: Callable[[], Any], *, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it has not come about in time"
        time.sleep(0.05)


class EagerServer(LocalServer):
    """Eager PyTorch, with metrics."""

    def __init__(self, folder: Path, model: Path) -> None:
        (self.port,) = find_free_ports(1)
        settings = yaml.safe_load(make_settings(None, **LIMITS, metrics_address=f"127.0.0.1:{self.port}"))
        make_archive(folder, model, yaml.safe_dump(settings, sort_keys=False))
        super().__init__(folder)

    def read(self, path: str = "metrics") -> requests.Response:
        return requests.get(f"http://127.0.0.1:{self.port}/{path}", timeout=10)

    def read_metrics(self) -> dict[str, float]:
        """Return each sample by its name and the value of its first label."""
        samples = (each for family in text_string_to_metric_families(self.read().text) for each in family.samples)
        return {" ".join([each.name, *list(each.labels.values())[:1]]): each.value for each in samples}

    def wait_until_idle(self) -> dict[str, float]:
        """Wait until no request is in flight, and return the metrics."""
        wait_for(lambda: not self.read_metrics()["sdxl_requests_in_flight"], seconds=60)
        return self.read_metrics()

    def ask(self, headers: dict[str, str] | None = None, **fields: Any) -> requests.Response:
        body = {"prompt": "a red fox", "num_inference_steps": 2, **fields}
        return requests.post(self.url, json=body, headers={**self.get_headers(), **(headers or {})}, timeout=120)

    def leave(self, **fields: Any) -> None:
        """Ask for what takes long, and go after its first step."""
        body = {"prompt": "a red fox", **LONG, **fields}
        with requests.post(self.url, json=body, headers=self.get_headers(), stream=True, timeout=60) as answer:
            assert answer.status_code == 200
