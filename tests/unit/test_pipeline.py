"""Loading, compiling and generating with real diffusers pipelines, without a server."""

import dataclasses
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openvino_backend import CompiledFunction
from pipeline_utils import (
    CompileConfig,
    ConfigError,
    GenerationRequest,
    HandlerConfig,
    LoadedPipeline,
    choose_dtype,
    encode_jpeg,
    generate,
    load_pipeline,
)
from tests.unit.modules import HAS_BF16

EAGER = HandlerConfig(dtype="float32", num_inference_steps=4, warm_up=False)
PARTS = ["unet", "vae", "text_encoder", "text_encoder_2"]


def load(folder: Path, pt2: Any = None, **settings: Any) -> LoadedPipeline:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = dataclasses.replace(EAGER, **settings)
    return load_pipeline(
        dataclasses.replace(config, model_path=folder.name), CompileConfig.parse(pt2), model_dir=folder.parent
    )


def make_picture(loaded: LoadedPipeline, **options: Any) -> np.ndarray[Any, Any]:
    torch.manual_seed(0)
    config = loaded.config
    request = GenerationRequest(
        "a red fox", config.num_inference_steps, config.guidance_scale, config.width, config.height
    )
    return np.asarray(generate(loaded.pipeline, request, **options)).astype(int)


@pytest.mark.parametrize("is_xl", [True, False])
def test_openvino_draws_eagers_picture(tiny_model: Path, tiny_sd_model: Path, is_xl: bool) -> None:
    folder = tiny_model if is_xl else tiny_sd_model
    reference = make_picture(load(folder, is_xl=is_xl))
    loaded = load(folder, "openvino", is_xl=is_xl, warm_up=True)
    report = loaded.describe()
    assert reference.shape == (128, 128, 3)
    assert np.abs(make_picture(loaded) - reference).max() <= 1  # a rounding of the last bit
    assert loaded.describe() == report  # nothing was compiled after the warm-up
    parts = PARTS if is_xl else PARTS[:3]
    assert list(report["openvino"]) == report["compiled_parts"] == parts
    assert (report["graphs"], report["graph_breaks"]) == (len(parts), 0)
    for (graph,) in report["openvino"].values():
        assert {(model["devices"], model["precision"]) for model in graph["models"]} == {(("CPU",), "f32")}
        assert graph["operators_outside"] == ()


def test_auto_is_near_the_float32_picture(tiny_model: Path) -> None:
    reference = make_picture(load(tiny_model))
    loaded = load(tiny_model, "openvino", dtype="auto", warm_up=True)
    assert loaded.dtype == ("float16" if HAS_BF16 else "float32")
    (unet,) = loaded.describe()["openvino"]["unet"]
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


def test_float16_keeps_the_vae_in_float32(tiny_model: Path) -> None:
    reference = make_picture(load(tiny_model))
    loaded = load(tiny_model, dtype="float16")
    assert (loaded.pipeline.unet.dtype, loaded.pipeline.vae.dtype) == (torch.float16, torch.float32)
    assert np.abs(make_picture(loaded) - reference).mean() < 2
    assert loaded.pipeline.vae.dtype == torch.float32


def test_parts_can_be_left_out(tiny_model: Path) -> None:
    loaded = load(tiny_model, "openvino", compile_unet=False, compile_text_encoders=False, warm_up=True)
    assert list(loaded.parts) == ["vae"]
    assert loaded.describe()["graphs"] == 1


def test_size_and_steps_are_used(tiny_model: Path) -> None:
    seen: list[tuple[int, int]] = []
    loaded = load(tiny_model, width=64, height=192, num_inference_steps=3)
    picture = make_picture(loaded, on_step=lambda step, steps: seen.append((step, steps)))
    assert picture.shape == (192, 64, 3)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_guidance_is_used(tiny_model: Path) -> None:
    weak, strong = (make_picture(load(tiny_model, guidance_scale=scale)) for scale in (1.0, 20.0))
    assert np.abs(weak - strong).mean() > 1


def test_a_picture_can_be_stopped(tiny_model: Path) -> None:
    def stop(step: int, steps: int) -> None:
        raise KeyboardInterrupt(step)

    with pytest.raises(KeyboardInterrupt, match="1"):
        make_picture(load(tiny_model), on_step=stop)


def test_scheduler_is_used(tiny_model: Path) -> None:
    loaded = load(tiny_model, scheduler="DPMSolverMultistepScheduler")
    assert loaded.describe()["scheduler"] == "DPMSolverMultistepScheduler"
    assert np.abs(make_picture(loaded) - make_picture(load(tiny_model))).max() > 0


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"scheduler": "Euler"}, ["handler.scheduler", "EulerDiscreteScheduler", "'Euler'"]),
        ({"is_xl": False}, ["handler.is_xl: false", "StableDiffusionPipeline", "StableDiffusionXLPipeline"]),
    ],
)
def test_settings_that_do_not_fit_the_model(tiny_model: Path, settings: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tiny_model, **settings)
    for part in parts:
        assert part in str(caught.value)


def test_missing_model_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"handler.model_path.*Download_model.py"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.bin", "weights.ckpt", "unet/model.py", "x.pt"])
def test_files_that_could_run_code_are_refused(tiny_model: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / name).write_bytes(b"")
    with pytest.raises(ConfigError, match=rf"{name} could run code"):
        load(folder)


def test_truncated_weights_are_told(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot read the pipeline"):
        load(folder)


def test_inductor_needs_a_compiler(tiny_model: Path) -> None:
    with (
        torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(ConfigError, match=r"inductor needs a C\+\+ compiler.*CXX"),
    ):
        load(tiny_model, "inductor")


@pytest.mark.parametrize(
    ("pt2", "message"),
    [
        ("tvm", "tvm cannot run this model"),
        ({"backend": "inductor", "options": {"no_such_option": 1}}, "inductor cannot run this model.*no_such_option"),
    ],
)
def test_backend_that_fails_is_named(tiny_model: Path, pt2: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tiny_model, pt2, compile_unet=False, compile_text_encoders=False, warm_up=True)


def test_part_that_did_not_reach_openvino_stops_the_load(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompiledFunction, "__call__", lambda self, *inputs, **_: self._function(self._module, *inputs))
    with pytest.raises(ConfigError, match="openvino did not compile vae"):
        load(tiny_model, "openvino", compile_unet=False, compile_text_encoders=False, warm_up=True)


def test_jpeg_quality() -> None:
    image = Image.effect_noise((256, 256), 50).convert("RGB")
    small, large = (encode_jpeg(image, quality=quality) for quality in (10, 90))
    assert len(small) < len(large)
    assert Image.open(io.BytesIO(large)).size == (256, 256)
