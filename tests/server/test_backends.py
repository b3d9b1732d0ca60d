"""Each backend behind a real TorchServe: a picture, what ran, and the guide's metrics. OpenVINO: test_units."""

import base64
import io
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import pytest
import requests
import yaml
from PIL import Image

from tests.flat import ONE_LEVEL
from tools.random_model import make_pipeline, save_pipeline
from tools.server import LocalServer, ServerError, make_archive, read_shipped

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", os.environ.get("CXX", "c++")))), reason="Inductor needs a C++ compiler"
)


class Served(Protocol):
    """What the checks use of a running server."""

    @property
    def url(self) -> str: ...

    @property
    def log(self) -> str: ...

    def get_headers(self) -> dict[str, str]: ...

    def read_document(self) -> dict[str, Any]: ...


def make_settings(pt2: Any, **handler: Any) -> str:
    """Return the shipped model-config.yaml with another pt2 and some other settings of the handler."""
    settings = read_shipped()
    settings["handler"] |= {"num_inference_steps": 4, "profile": True, **handler}
    settings["pt2"] = pt2
    if pt2 is None:
        del settings["pt2"]
    return yaml.safe_dump(settings, sort_keys=False)


def ask_for_picture(server: Served) -> Image.Image:
    answer = requests.post(server.url, data="a red fox", headers=server.get_headers(), timeout=120)
    assert answer.status_code == 200, answer.text
    assert answer.headers["Content-Type"] == "image/jpeg"
    picture = Image.open(io.BytesIO(answer.content))
    picture.load()
    assert picture.format == "JPEG"
    assert picture.size == (128, 128)
    return picture


def ask_for_array(server: Served, **fields: Any) -> list[bytes]:
    """Return the pixels of each picture."""
    fields = {"prompt": "a red fox", "output_format": "png", **fields}
    headers = {**server.get_headers(), "Accept": "application/json"}
    answer = requests.post(server.url, json=fields, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    files = [base64.b64decode(each["b64_json"]) for each in answer.json()["data"]]
    return [Image.open(io.BytesIO(file)).tobytes() for file in files]


ANSWERS_TO_SEEDS = 4 + 4 + 1


def check_seeds(server: Served, *, images: int = 4) -> None:
    """Check that a seed means the same picture alone, beside others and as one of several, to the last bit."""
    alone = [ask_for_array(server, seed=seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        beside = list(pool.map(lambda seed: ask_for_array(server, seed=seed), range(4)))
    assert beside == alone
    assert [[each] for each in ask_for_array(server, seed=0, num_images_per_prompt=images)] == alone[:images]
    assert len({each for (each,) in alone}) == 4


def check_pictures(server: Served) -> dict[str, Any]:
    """Ask a server that has just started for pictures; return what it says of itself."""
    before = server.read_document()
    first, second = ask_for_picture(server), ask_for_picture(server)
    assert first.tobytes() != second.tobytes()  # each picture starts from noise of its own
    report: dict[str, Any] = server.read_document()
    check_seeds(server)
    assert report == server.read_document() == before  # the warm-up had compiled everything
    for stage in ("preprocess", "inference", "postprocess"):
        found = re.findall(rf"result=\[METRICS\]ts_handler_{stage}\.Milliseconds:([\d.e-]+)\|", server.log)
        assert len(found) == 2 + ANSWERS_TO_SEEDS  # one for each request, not for each step
        assert all(float(value) > 0 for value in found)
    outside = re.findall(r"result=\[METRICS\]OpenVINOOperatorsOutside\.Count:([\d.]+)\|#Part:(\w+)", server.log)
    assert dict((part, float(value)) for value, part in outside) == dict.fromkeys(report.get("openvino", {}), 0)
    return report


@pytest.fixture(scope="module")
def flat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small model with a UNet of one level."""
    pipeline, folder = make_pipeline("tiny"), tmp_path_factory.mktemp("models") / "flat"
    pipeline.register_modules(unet=pipeline.unet.from_config(pipeline.unet.config, **ONE_LEVEL))
    save_pipeline(pipeline, folder)
    return folder


@pytest.mark.soak
@needs_compiler
def test_inductor_makes_pictures(tmp_path: Path, flat_model: Path) -> None:
    # Inductor takes a minute for each part; the UNet stands for all.
    left_out = dict.fromkeys(("compile_vae", "compile_text_encoders"), False)
    pt2 = {"compile": {"enable": True, "backend": "inductor"}}
    make_archive(tmp_path, flat_model, make_settings(pt2, **left_out))
    with LocalServer(tmp_path) as server:
        check_report(check_pictures(server), "inductor", ["unet"])


def check_report(report: dict[str, Any], backend: str, parts: list[str]) -> None:
    assert (report["backend"], report["graphs"], report["graph_breaks"]) == (backend, len(parts), 0)
    assert report["processors"]["torch_threads"] <= report["processors"]["logical"]
    assert report["compiled_parts"] == parts
    assert "openvino" not in report


@pytest.mark.soak
def test_wrong_configuration_stops_the_server(tmp_path: Path, tiny_model: Path) -> None:
    """Other settings: test_handler."""
    make_archive(tmp_path, tiny_model, make_settings("openvino", width=100))
    with pytest.raises(ServerError) as caught, LocalServer(tmp_path):
        pass
    assert "ConfigError: handler.width takes a whole number from 64 to 4096" in str(caught.value)
