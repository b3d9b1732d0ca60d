"""Schedulers with a real pipeline."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demo.measure import choose_prompts
from demo.oracle import judge_picture
from sdxl_server.api.image_metadata import describe_image
from sdxl_server.diffusion.generation import generate, run_to_end
from sdxl_server.errors import ConfigError, RequestError
from sdxl_server.model.describe import describe_pipeline
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.request.samplers import ALIASES
from tests.unit.pipelines import load, make_picture
from tools.server import ROOT


def test_a_scheduler_that_needs_more_steps_is_warmed_up_with_them(tiny_model: Path, cached: dict[str, Any]) -> None:
    loaded = load(tiny_model, cached, warm_up=True, scheduler="PNDMScheduler")
    assert describe_pipeline(loaded)["scheduler"] == "PNDMScheduler"
    with pytest.raises(ConfigError, match="handler.num_inference_steps"):
        load(tiny_model, scheduler="PNDMScheduler", num_inference_steps=1)


def test_every_scheduler_makes_pictures_or_says_what_it_needs(eager: LoadedPipeline) -> None:
    """Near Euler's picture: it is 54 levels from another seed's, and none is further than 18, in one step 35."""
    euler = {steps: make_picture(eager, num_inference_steps=steps) for steps in (5, 1)}
    for name in eager.contract.limits.samplers:
        for steps, most in ((5, 25), (1, 45)):
            if (name, steps) != ("PNDMScheduler", 1):
                picture = make_picture(eager, scheduler=name, num_inference_steps=steps)
                assert np.abs(picture - euler[steps]).mean() < most, (name, steps)
    with pytest.raises(RequestError, match="PNDMScheduler cannot make an image in 1 steps"):
        make_picture(eager, scheduler="PNDMScheduler", num_inference_steps=1)


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_distilled_models_have_their_own_scheduler(tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(ROOT / "demo/model", tmp_path / "model")
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": name, "clip_sample": False}))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", name]}))
    loaded = load(folder, warm_up=True)
    assert list(loaded.contract.limits.samplers) == [describe_pipeline(loaded)["scheduler"]] == [name]
    prompt = choose_prompts(1, seed=3)[0]
    fields = {"prompt": prompt.text, "seed": prompt.seed, "guidance_scale": 1.5, "num_inference_steps": 8}
    request = loaded.contract.check({**fields, "scheduler": {"name": name, "original_inference_steps": 100}})
    (picture,) = run_to_end(generate(loaded, request))
    assert judge_picture(picture.image, prompt.scene).is_right
    with pytest.raises(
        RequestError, match=f"^scheduler takes a sampler that suits this model, such as {name[:3]}, not 'Euler'"
    ):
        loaded.contract.check({"prompt": "x", "scheduler": "Euler"})


def test_scheduler_with_options_is_used_and_told(tiny_model: Path) -> None:
    karras = ALIASES["DPM++ 2M Karras"]
    loaded = load(tiny_model, scheduler="dpm++ 2m karras")
    assert describe_pipeline(loaded)["scheduler"] == karras
    request = loaded.contract.check({"prompt": "x", "seed": 1})
    assert describe_image(loaded, request, 0, unet_calls=4)["request"]["scheduler"] == karras
    plain = make_picture(loaded, scheduler="DPMSolverMultistepScheduler")  # has nothing of the configured options
    assert np.array_equal(plain, make_picture(load(tiny_model), scheduler={"name": "DPM++ 2M"}))
    assert not np.array_equal(plain, make_picture(loaded))
    with pytest.raises(RequestError, match="scheduler takes for solver_type one of bh2, not 'bh1'"):
        make_picture(loaded, scheduler={"name": "UniPC", "solver_type": "bh1"})


def test_scheduler_is_used(tiny_model: Path) -> None:
    loaded = load(tiny_model, scheduler="DPMSolverMultistepScheduler")
    assert describe_pipeline(loaded)["scheduler"] == "DPMSolverMultistepScheduler"
    assert np.abs(make_picture(loaded) - make_picture(load(tiny_model))).max() > 0
