"""Loading and compiling real diffusers pipelines, without a server."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from PIL import Image

from openvino_backend import CompiledFunction
from openvino_backend.precision import find_kind, read_flags
from sdxl_server.api.http import HttpRequest
from sdxl_server.api.image_metadata import describe_image
from sdxl_server.config.compile_settings import CompileConfig
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.errors import ConfigError
from sdxl_server.loading import load_pipeline
from sdxl_server.model.compiling import VAE_ENCODER
from sdxl_server.model.describe import describe_pipeline
from sdxl_server.model.dtypes import choose_dtype
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.service import Service
from tests.unit.modules import HAS_BF16
from tests.unit.pipelines import PARTS, UNET_ONLY, encode, load, make_picture
from tools.server import ROOT


@pytest.mark.parametrize("is_xl", [True, False])
def test_openvino_draws_eagers_picture(
    tiny_model: Path, tiny_sd_model: Path, cached: dict[str, Any], is_xl: bool
) -> None:
    folder = tiny_model if is_xl else tiny_sd_model
    reference = make_picture(load(folder, is_xl=is_xl))
    loaded = load(folder, cached, is_xl=is_xl, warm_up=True)
    report = describe_pipeline(loaded)
    assert reference.shape == (128, 128, 3)
    assert np.abs(make_picture(loaded) - reference).max() <= 1  # a rounding of the last bit
    assert describe_pipeline(loaded) == report  # nothing was compiled after the warm-up
    parts = PARTS if is_xl else PARTS[:4]
    assert list(report["openvino"]) == report["compiled_parts"] == parts
    assert report["openvino"].pop(VAE_ENCODER) == []  # waits for the first request with an image
    assert (report["graphs"], report["graph_breaks"]) == (len(parts) - 1, 0)
    for (graph,) in report["openvino"].values():
        assert {(model["devices"], model["precision"]) for model in graph["models"]} == {(("CPU",), "f32")}
        assert graph["operators_outside"] == ()


def test_auto_is_near_the_float32_picture(tiny_model: Path) -> None:
    reference = make_picture(load(tiny_model))
    loaded = load(tiny_model, "openvino", dtype="auto", graphs="static", warm_up=True)
    assert loaded.dtype == ("float16" if HAS_BF16 else "float32")
    (unet,) = describe_pipeline(loaded)["openvino"]["unet"]
    assert [model["precision"] for model in unet["models"]] == ["f32", "bf16" if HAS_BF16 else "f32"]
    assert np.abs(make_picture(loaded) - reference).mean() < 8  # of 255, in bfloat16; 0 in float32


@pytest.mark.parametrize("device", ["CPU", "AUTO", "HETERO:CPU"])
def test_auto_takes_the_devices_type(device: str) -> None:
    compilation = CompileConfig.parse({"backend": "openvino", "options": {"device": device}})
    dtype, chosen = choose_dtype(HandlerConfig(), compilation, device="cpu")
    assert dtype == ("float16" if HAS_BF16 else "float32")
    assert (chosen.options or {}).get("config") == ({"INFERENCE_PRECISION_HINT": "bf16"} if HAS_BF16 else None)
    mine = CompileConfig.parse({"backend": "openvino", "options": {"config": {"INFERENCE_PRECISION_HINT": "f32"}}})
    assert choose_dtype(HandlerConfig(), mine, device="cpu")[1] == mine
    assert choose_dtype(HandlerConfig(dtype="float32"), compilation, device="cpu") == ("float32", compilation)
    assert choose_dtype(HandlerConfig(), CompileConfig(), device="cuda:0") == ("float16", CompileConfig())


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"precision": "f32"}, "float32"),
        ({"config": {"INFERENCE_PRECISION_HINT": "f32"}}, "float32"),
        ({"config": {"INFERENCE_PRECISION_HINT": "float32"}}, "float32"),
        ({"config": {"INFERENCE_PRECISION_HINT": openvino.Type.f32}}, "float32"),
        ({"config": {"EXECUTION_MODE_HINT": "ACCURACY"}}, "float32"),
        ({"precision": "int8"}, "float16"),
        ({"precision": "fastest"}, "float16" if find_kind(read_flags()).fastest == "int8" else "float32"),
        # 8 bits lose more than float16 does
        ({"config": {"INFERENCE_PRECISION_HINT": "f32"}, "weight_compression": "int8_sym"}, "float16"),
    ],
)
def test_auto_suits_the_arithmetic_however_it_is_set(options: dict[str, Any], dtype: str) -> None:
    compilation = CompileConfig.parse({"backend": "openvino", "options": options})
    assert choose_dtype(HandlerConfig(), compilation, device="cpu") == (dtype, compilation)
    assert choose_dtype(HandlerConfig(dtype="bfloat16"), compilation, device="cpu") == ("bfloat16", compilation)


def test_a_hint_of_float32_draws_the_float32_image(tiny_model: Path) -> None:
    pt2 = {"backend": "openvino", "options": {"config": {"INFERENCE_PRECISION_HINT": "float32"}}}
    loaded = load(tiny_model, pt2, dtype="auto", graphs="static", warm_up=True, **UNET_ONLY)
    assert (loaded.dtype, loaded.pipeline.unet.dtype) == ("float32", torch.float32)
    assert np.abs(make_picture(loaded) - make_picture(load(tiny_model))).max() <= 1  # a rounding of the last bit


def test_a_picture_tells_the_arithmetic_that_made_it(tiny_model: Path) -> None:
    pt2 = {"backend": "openvino", "options": {"precision": "int8"}}
    loaded = load(tiny_model, pt2, dtype="auto", graphs="static", warm_up=True, **UNET_ONLY)
    request = loaded.contract.check({"prompt": "a fox"})
    told = describe_image(loaded, request, 0, unet_calls=1)["made_with"]["arithmetic"]
    assert told == describe_pipeline(loaded)["arithmetic"]
    assert told["precision"] == "int8"
    assert told["lossy"]
    (unet,) = describe_pipeline(loaded)["openvino"]["unet"]
    assert sum(model["constants"].get("i8", 0) for model in unet["models"]) > 0


def test_float16_keeps_the_vae_in_float32(tiny_model: Path) -> None:
    reference = make_picture(load(tiny_model))
    loaded = load(tiny_model, dtype="float16")
    assert (loaded.pipeline.unet.dtype, loaded.pipeline.vae.dtype) == (torch.float16, torch.float32)
    assert np.abs(make_picture(loaded) - reference).mean() < 2
    assert loaded.pipeline.vae.dtype == torch.float32


def test_parts_can_be_left_out(tiny_model: Path) -> None:
    loaded = load(tiny_model, "openvino", compile_unet=False, compile_text_encoders=False, warm_up=True)
    assert list(loaded.parts) == ["vae", VAE_ENCODER]
    assert describe_pipeline(loaded)["graphs"] == 1


@pytest.mark.parametrize("pt2", ["openvino", {"backend": "openvino", "options": {"device": "CPU"}}])
def test_openvino_beside_cuda_is_refused(tiny_model: Path, pt2: Any) -> None:
    config = HandlerConfig(model_path=tiny_model.name)
    with pytest.raises(ConfigError, match="deviceType: gpu puts PyTorch's tensors on cuda:0"):
        load_pipeline(config, CompileConfig.parse(pt2), model_dir=tiny_model.parent, device="cuda:0")


@pytest.mark.parametrize(("path", "told"), [("", b"event: compiling\n"), ("v1/images/generations", b": vae_encoder ")])
def test_a_compilation_that_a_client_waits_for_is_told(
    tiny_model: Path, cached: dict[str, Any], path: str, told: bytes
) -> None:
    service = Service(load(tiny_model, cached, warm_up=True))
    fields = {"prompt": "a red fox", "stream": True, "num_inference_steps": 2, "strength": 1}

    def draw(**more: Any) -> list[bytes]:
        call = HttpRequest(
            {"body": json.dumps({**fields, **more}).encode()}, path, "application/json", "", "*/*", "sdxl"
        )
        return [each for each in service.answer(call).steps if each is not None]

    image = encode(Image.new("RGB", (128, 128), "red"))
    told_by = [[each.startswith(told) for each in draw(**more)] for more in ({"strength": None}, {"image": image}) * 2]
    assert told_by == [[False], [True, False], [False], [False]]


def test_digest_tells_checkpoints_apart(tiny_model: Path, eager: LoadedPipeline, compiled: LoadedPipeline) -> None:
    assert compiled.weights_sha256 == eager.weights_sha256
    other = load(tiny_model)
    with torch.no_grad():
        next(iter(other.pipeline.unet.parameters())).add_(1)
    assert other.weights_sha256 != eager.weights_sha256


@pytest.mark.parametrize("is_compiled", [False, True])
def test_weights_can_be_pinned(
    tiny_model: Path, eager: LoadedPipeline, cached: dict[str, Any], is_compiled: bool
) -> None:
    digest, pt2 = eager.weights_sha256, cached if is_compiled else None
    assert load(tiny_model, pt2, weights_sha256=digest, warm_up=True).weights_sha256 == digest
    with pytest.raises(ConfigError, match=f"handler.weights_sha256 takes .* {digest}, not '0{{64}}'"):
        load(tiny_model, pt2, weights_sha256="0" * 64)


NETWORK_WATCH = """
import os, sys
def tell(event, _):  # in processes that are forked, too
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        os.write(1, event.encode())
sys.addaudithook(tell)
"""

LOAD = """
import pathlib, sys, time
from sdxl_server.loading import load_pipeline
from sdxl_server.config.compile_settings import CompileConfig
from sdxl_server.config.settings import (HandlerConfig)
pt2 = {"backend": "openvino", "options": {"weight_compression": "int8_sym"}}
folder = pathlib.Path(sys.argv[1])
config = HandlerConfig(model_path=folder.name, num_inference_steps=1, compile_text_encoders=False, graphs="static")
load_pipeline(config, CompileConfig.parse(pt2), model_dir=folder.parent)
time.sleep(1)
"""


@pytest.mark.parametrize(("program", "seen"), [(LOAD, False), ("import time, openvino; time.sleep(5)", True)])
def test_nothing_reaches_for_the_network(tiny_model: Path, tmp_path: Path, program: str, seen: bool) -> None:
    """Loading, compiling, compressing and drawing do not; OpenVINO by itself does, at its import."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "TF_BUILD", "JENKINS_URL")}
    done = subprocess.run(
        [sys.executable, "-c", NETWORK_WATCH + program, tiny_model],
        cwd=ROOT,
        env=environment | {"HOME": str(tmp_path)},  # where a user may have opted out
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert ("socket." in done.stdout) is seen


def test_inductor_needs_a_compiler(tiny_model: Path) -> None:
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ConfigError, match=r"inductor needs a C\+\+ compiler.*CXX"),
    ):
        load(tiny_model, "inductor")


@pytest.mark.parametrize(
    ("pt2", "message"),
    [
        ("tvm", "pt2.backend takes one of openvino, .*, not 'tvm'"),
        ({"backend": "inductor", "options": {"no_such_option": 1}}, "pt2.options: inductor .*no_such_option"),
    ],
)
def test_backend_that_fails_is_named(tiny_model: Path, pt2: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tiny_model, pt2, compile_unet=False, compile_text_encoders=False, warm_up=True)


def test_part_that_did_not_reach_openvino_stops_the_load(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompiledFunction, "__call__", lambda self, *inputs, **_: self._function(self._module, *inputs))
    with pytest.raises(ConfigError, match="openvino did not compile vae"):
        load(tiny_model, "openvino", compile_unet=False, compile_text_encoders=False, warm_up=True)
