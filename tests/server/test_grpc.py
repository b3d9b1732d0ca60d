"""Calls by TorchServe's other ways: gRPC, which the shipped config.properties closes, and the management API's.

Where an operator opens gRPC, no call may end the worker.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import requests

from tests.server.eager import wait_for
from tests.server.test_backends import ask_for_picture, make_settings
from tools.server import LocalServer, find_free_ports, make_archive

SERVICE = "/org.pytorch.serve.grpc.inference.InferenceAPIsService/"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[LocalServer]:
    folder = tmp_path_factory.mktemp("server")
    make_archive(folder, tiny_model, make_settings(None, max_side=128, warm_up=False))
    opened = {"grpc_inference_address": "127.0.0.1", "grpc_inference_port": str(find_free_ports(1)[0])}
    with LocalServer(folder, properties=opened) as running:
        yield running


@pytest.fixture(scope="module")
def worker(server: LocalServer) -> int:
    """The worker's process before the first call."""
    return server.find_worker()


def encode(number: int, value: bytes) -> bytes:
    """Return a field of a protobuf message, for values of up to 127 bytes."""
    return bytes([number << 3 | 2, len(value)]) + value


def call(server: LocalServer, method: str, **fields: Any) -> list[bytes]:
    """Call a method that takes a PredictionsRequest; return its messages as they are."""
    body = encode(1, b"body") + encode(2, json.dumps(fields).encode())
    message = encode(1, server.model.encode()) + encode(3, body)
    metadata = tuple((name.lower(), value) for name, value in server.get_headers().items())
    properties = (server.folder / "config.properties").read_text().splitlines()
    (port,) = (line.partition("=")[2] for line in properties if line.startswith("grpc_inference_port="))
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        return list(channel.unary_stream(SERVICE + method, bytes, bytes)(message, timeout=20, metadata=metadata))


@pytest.mark.parametrize("method", ["Predictions", "StreamPredictions"])
@pytest.mark.parametrize("fields", [{"prompt": "a red fox"}, {"prompt": "a red fox", "width": 3}, {}])
def test_each_call_gets_a_status(server: LocalServer, worker: int, method: str, fields: dict[str, Any]) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call(server, method, **fields)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "ask over HTTP" in (caught.value.details() or "")
    assert server.find_worker() == worker


def test_a_request_that_torchserve_repeats_for_ever_ends_it(server: LocalServer, worker: int) -> None:
    """It would serve nothing else. A supervisor starts it again. Until then the worker has outlived every call."""
    ask_for_picture(server)
    assert server.find_worker() == worker
    address = f"http://127.0.0.1:{server.ports['management_address']}/models/{server.model}?customized=true"
    requests.get(address, headers=server.get_headers("management"), timeout=60)
    wait_for(lambda: not server.find_processes())
    assert "it ends now" in server.log
