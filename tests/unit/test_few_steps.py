"""Models of few steps: told by what they were saved with, drawn as diffusers draws them."""

import logging
import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml

from sdxl_server.api.warnings import list_warnings
from sdxl_server.model.describe import describe_pipeline
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.sampling.few_steps import choose_suited_defaults, describe_few_step_name
from tests.flat import ONE_LEVEL
from tests.unit.pipelines import UNET_ONLY, load, make_picture
from tools.random_model import SCHEDULER, make_pipeline, save_pipeline
from tools.server import ROOT

TRAILING: dict[str, Any] = {**SCHEDULER, "timestep_spacing": "trailing"}
ZERO_SNR: dict[str, Any] = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
LINES = re.findall(r"`(\{scheduler: .*\})`", (ROOT / "docs/models.md").read_text())
NULL: dict[str, Any] = {"num_inference_steps": None, "guidance_scale": None}


def make_folder(folder: Path, scheduler: str, *, size: str = "tiny", unet: Any = None, **settings: Any) -> Path:
    """Write a small pipeline of random weights with another scheduler, and a UNet of other settings."""
    pipeline = make_pipeline(size)
    torch.manual_seed(1)
    changed = type(pipeline.unet).from_config(pipeline.unet.config, **(unet or {}))
    own = getattr(diffusers, scheduler)(**{**SCHEDULER, **settings})
    pipeline.register_modules(unet=changed, scheduler=own)
    save_pipeline(pipeline, folder)
    return folder


@pytest.fixture(scope="module")
def turbo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As SDXL Turbo is saved."""
    return make_folder(tmp_path_factory.mktemp("models") / "turbo", "EulerAncestralDiscreteScheduler", **TRAILING)


@pytest.fixture(scope="module", params=["tiny", "tiny-sd"])
def consistent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As latent consistency models are saved, whose UNet is given the guidance."""
    folder = tmp_path_factory.mktemp("models") / f"lcm-{request.param}"
    make_folder(folder, "LCMScheduler", size=request.param, unet={"time_cond_proj_dim": 16, **ONE_LEVEL})
    if request.param == "tiny-sd":  # there diffusers has a pipeline for them
        index = folder / "model_index.json"
        index.write_text(index.read_text().replace('"StableDiffusionPipeline"', '"LatentConsistencyModelPipeline"'))
    return folder


def draw_by_diffusers(folder: Path, **arguments: Any) -> np.ndarray[Any, Any]:
    """Return the picture of the pipeline that diffusers has for a folder."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    given = {"prompt": "a red fox", "width": 128, "height": 128, **arguments}
    return np.asarray(pipeline(generator=torch.Generator().manual_seed(1), **given).images[0]).astype(int)


def list_defaults(loaded: LoadedPipeline) -> dict[str, Any]:
    return {name: loaded.contract.properties[name]["default"] for name in (*NULL, "scheduler")}


@pytest.mark.parametrize(
    ("scheduler", "settings", "steps", "guidance"),
    [
        ("EulerAncestralDiscreteScheduler", TRAILING, 4, 0),  # SDXL Turbo
        ("EulerDiscreteScheduler", TRAILING, 4, 0),  # SD Turbo, Lightning
        ("DDIMScheduler", {**TRAILING, "clip_sample": False}, 4, 0),  # Hyper-SD
        ("EulerDiscreteScheduler", {**TRAILING, "prediction_type": "sample"}, 1, 0),  # Lightning in one step
        ("LCMScheduler", SCHEDULER, 4, 0),
        ("TCDScheduler", SCHEDULER, 4, 0),
        ("EulerDiscreteScheduler", SCHEDULER, 30, 5),  # SDXL base
        ("EulerAncestralDiscreteScheduler", SCHEDULER, 30, 5),
        ("EulerDiscreteScheduler", {**TRAILING, **ZERO_SNR}, 30, 5),  # NoobAI
        ("DDIMScheduler", {**TRAILING, "prediction_type": "v_prediction"}, 30, 5),
    ],
)
def test_the_scheduler_tells_how_many_steps_suit(
    scheduler: str, settings: dict[str, Any], steps: int, guidance: float
) -> None:
    suited = choose_suited_defaults(getattr(diffusers, scheduler)(**settings), {}, scheduler)
    assert (suited.num_inference_steps, suited.guidance_scale) == (steps, guidance)
    assert bool(suited.reason) is (steps < 30)


def test_a_turbo_model_is_drawn_as_its_card_says(turbo: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        loaded = load(turbo, **NULL)
    assert "few-step model (its EulerAncestralDiscreteScheduler has timestep_spacing: trailing" in caplog.text
    expected = {"num_inference_steps": 4, "guidance_scale": 0.0, "scheduler": "EulerAncestralDiscreteScheduler"}
    assert list_defaults(loaded) == expected
    expected_picture = draw_by_diffusers(turbo, num_inference_steps=4, guidance_scale=0.0)
    assert np.array_equal(make_picture(loaded, num_inference_steps=None, guidance_scale=None), expected_picture)


def test_without_guidance_the_unet_is_given_one_row(turbo: Path) -> None:
    loaded = load(turbo, "openvino", warm_up=True, graphs="static", **UNET_ONLY, **NULL)
    assert (loaded.contract.batch, loaded.functions["unet"]._batch) == (1, 1)  # type: ignore[attr-defined]
    expected = draw_by_diffusers(turbo, num_inference_steps=4, guidance_scale=0.0)
    drawn = make_picture(loaded, num_inference_steps=None, guidance_scale=None)
    assert np.abs(drawn - expected).max() <= 1  # the last bit is rounded


@pytest.mark.parametrize(
    ("settings", "is_told"),
    [
        ({"num_inference_steps": 30, "guidance_scale": 5.0}, True),
        ({"num_inference_steps": 4, "guidance_scale": 5.0}, True),
        ({"num_inference_steps": 30, "guidance_scale": 0.0}, True),
        ({"num_inference_steps": 8, "guidance_scale": 2.0}, False),
    ],
)
def test_a_configuration_that_burns_the_pictures_is_told(
    turbo: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], is_told: bool
) -> None:
    loaded = load(turbo, **settings)
    assert list_defaults(loaded) == {**settings, "scheduler": "EulerAncestralDiscreteScheduler"}
    assert ("4 steps and a guidance of 0 suit it" in caplog.text) is is_told


def test_a_guidance_that_is_an_input_of_the_unet_reaches_it(consistent: Path) -> None:
    defaults: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 8.0}
    ways: list[dict[str, Any]] = [{}, {"guidance_scale": 2.0}, {"guidance_scale": 0.5, "num_inference_steps": 2}]
    expected = [draw_by_diffusers(consistent, **{**defaults, **way}) for way in ways]
    kind = "dynamic" if consistent.name == "lcm-tiny" else "static"
    for graphs, farthest in ((None, 0), (kind, 1)):  # the last bit is rounded
        loaded = load(consistent, graphs and "openvino", graphs=graphs, **UNET_ONLY, **NULL)
        assert list_defaults(loaded) == {**defaults, "scheduler": "LCMScheduler"}
        assert loaded.contract.batch == 1
        for way, picture in zip(ways, expected, strict=True):
            assert np.abs(make_picture(loaded, **way) - picture).max() <= farthest
        assert not graphs or len(describe_pipeline(loaded)["openvino"]["unet"]) == 1  # for any guidance


@pytest.mark.parametrize(("name", "steps"), [("LCM", 4), ({"name": "TCD", "original_inference_steps": 100}, 4)])
def test_weights_can_be_said_to_be_distilled(tiny_model: Path, name: Any, steps: int) -> None:
    loaded = load(tiny_model, scheduler=name, **NULL)
    defaults = list_defaults(loaded)
    assert (defaults["num_inference_steps"], defaults["guidance_scale"]) == (steps, 0)
    assert "EulerDiscreteScheduler" in loaded.contract.limits.samplers
    make_picture(loaded, num_inference_steps=None, guidance_scale=None)


def test_a_scheduler_for_distilled_weights_is_not_on_offer_otherwise(tiny_model: Path) -> None:
    assert "LCMScheduler" not in load(tiny_model, scheduler="DPM++ 2M").contract.limits.samplers


def test_what_a_negative_prompt_does_not_do_is_told(turbo: Path, consistent: Path) -> None:
    for folder, why in ((turbo, "guidance_scale is 0"), (consistent, "this model's UNet has the guidance as an input")):
        loaded = load(folder, **NULL)
        request = loaded.contract.check({"prompt": "a fox", "negative_prompt": "blurry"})
        assert any(each.startswith(f"negative_prompt has no effect: {why}") for each in list_warnings(loaded, request))
    guided = load(turbo, num_inference_steps=4, guidance_scale=2.0)
    request = guided.contract.check({"prompt": "a fox", "negative_prompt": "blurry"})
    assert not list_warnings(guided, request)


@pytest.mark.parametrize("line", LINES)
def test_the_lines_in_docs_are_taken(tiny_model: Path, line: str) -> None:
    settings = yaml.safe_load(line)
    loaded = load(tiny_model, max_side=512, **settings)
    assert list_defaults(loaded) | {"scheduler": None} == {
        **{name: settings[name] for name in NULL},
        "scheduler": None,
    }
    pictures = make_picture(loaded, width=64, height=64)
    assert pictures.shape == (64, 64, 3)


def test_all_kinds_are_in_docs() -> None:
    assert len(LINES) == 7


@pytest.mark.parametrize(
    ("name", "is_told"),
    [
        *((name, True) for name in ("sd_xl_turbo_1.0_fp16.safetensors", "RealVisXL_V5.0_Lightning_fp16.safetensors")),
        *((name, True) for name in ("JuggernautXL-DMD2.safetensors", "dreamshaper_lcm.safetensors", "Hyper-SDXL.ckpt")),
        *(
            (name, False)
            for name in ("sd_xl_base_1.0.safetensors", "hyperrealism.safetensors", "calcmodel.safetensors")
        ),
    ],
)
def test_a_file_that_is_named_as_few_step_models_are_is_told(name: str, is_told: bool) -> None:
    assert ("docs/models.md" in describe_few_step_name(name)) is is_told
