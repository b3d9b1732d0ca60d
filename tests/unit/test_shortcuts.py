"""Calls of the UNet that are left out: which, what takes their place, and that a seed's picture holds."""

import dataclasses
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler

from sdxl_server.config.compile_settings import CompileConfig
from sdxl_server.config.settings import HandlerConfig
from sdxl_server.diffusion import generation
from sdxl_server.diffusion.denoiser import Denoiser
from sdxl_server.diffusion.generation import bind_adapters, build_image_pipeline, generate, run_to_end
from sdxl_server.diffusion.progress import GeneratedImage
from sdxl_server.errors import NotFiniteError, RequestError
from sdxl_server.loading import load_pipeline
from sdxl_server.model.describe import describe_pipeline
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from sdxl_server.sampling.step_plan import build_step_plan, spread_calls
from tests.spoiled import spoil_model
from tools.server import ROOT

PROMPT = "a large white star on a blue background, left"
FIELDS = {"prompt": PROMPT, "seed": 1, "guidance_scale": 1.5}
SMALL = {"width": 64, "height": 64}  # where the plan is all that counts
EVERY_SHORTCUT = {"num_inference_steps": 8, "unet_calls": 5, "guidance_interval": [0.2, 0.8]}


@pytest.fixture(scope="module")
def demo() -> LoadedPipeline:
    config = HandlerConfig(model_path="demo/model", dtype="float32", warm_up=False)
    return load_pipeline(config, CompileConfig(), model_dir=ROOT)


@pytest.fixture(scope="module")
def full(demo: LoadedPipeline) -> GeneratedImage:
    """All 30 steps without a shortcut."""
    return draw(demo)


def draw(demo: LoadedPipeline, **fields: Any) -> GeneratedImage:
    return draw_all(demo, **fields)[0]


def draw_all(demo: LoadedPipeline, **fields: Any) -> list[GeneratedImage]:
    return run_to_end(generate(demo, demo.contract.check({**FIELDS, **fields})))


def test_adapters_are_prepared_once_for_all_images(demo: LoadedPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = []

    def count(*given: Any) -> Any:
        prepared.append(given)
        return bind_adapters(*given)

    monkeypatch.setattr(generation, "bind_adapters", count)
    assert len(draw_all(demo, num_images_per_prompt=2, num_inference_steps=1)) == 2
    assert len(prepared) == 1


def measure_psnr(one: GeneratedImage, other: GeneratedImage) -> float:
    apart = np.asarray(one.image).astype(float) - np.asarray(other.image)
    return float(10 * np.log10(255**2 / (apart**2).mean()))


@pytest.mark.parametrize(
    ("count", "total", "places"),
    [
        (11, 30, [0, 2, 4, 7, 11, 14, 18, 22, 25, 27, 29]),
        (4, 5, [0, 1, 3, 4]),
        (4, 4, [0, 1, 2, 3]),
        (9, 3, [0, 1, 2]),
    ],
)
def test_calls_are_spread_over_the_steps(count: int, total: int, places: list[int]) -> None:
    assert spread_calls(count, total=total) == places


@pytest.mark.parametrize("total", [5, 8, 30, 59, 150])
def test_as_many_calls_as_asked_for_and_the_ends_among_them(total: int) -> None:
    for count in range(4, total + 1):
        places = spread_calls(count, total=total)
        assert len(set(places)) == count
        assert (places[0], places[-1]) == (0, total - 1)


def test_a_forecast_is_nearer_than_as_many_plain_steps(demo: LoadedPipeline, full: GeneratedImage) -> None:
    forecast, plain = draw(demo, unet_calls=11), draw(demo, num_inference_steps=11)
    assert (full.unet_calls, forecast.unet_calls, plain.unet_calls) == (30, 11, 11)
    assert measure_psnr(forecast, full) > max(measure_psnr(plain, full) + 5, 45)


def test_as_many_calls_as_steps_is_the_full_picture(demo: LoadedPipeline) -> None:
    full = draw(demo, num_inference_steps=6)
    assert draw(demo, num_inference_steps=6, unet_calls=6).image.tobytes() == full.image.tobytes()
    assert draw(demo, num_inference_steps=6, guidance_interval=[0, 1]).image.tobytes() == full.image.tobytes()


def test_every_scheduler_forecasts(demo: LoadedPipeline) -> None:
    for name in demo.contract.limits.samplers:
        fields = {"num_inference_steps": 16, "scheduler": name, **SMALL}
        full, forecast = draw(demo, **fields), draw(demo, **fields, unet_calls=10)
        assert forecast.unet_calls == 10, name
        assert measure_psnr(forecast, full) > 25, name


def test_outside_the_interval_half_is_run(demo: LoadedPipeline) -> None:
    fields = {"num_inference_steps": 10, "guidance_scale": 4.0, **SMALL}
    picture = draw(demo, **fields, guidance_interval=[0.25, 0.75])
    assert picture.unet_calls == 7.5
    full, unguided = draw(demo, **fields), draw(demo, **{**fields, "guidance_scale": 1.0})
    assert measure_psnr(picture, full) < 60
    assert measure_psnr(picture, unguided) < 60
    nothing = draw(demo, **fields, guidance_interval=[0.95, 0.96])
    assert nothing.unet_calls == 5
    assert measure_psnr(nothing, unguided) > 50  # half a batch of two, and one alone


@pytest.mark.parametrize(("graphs", "price"), [("static", 1), pytest.param("dynamic", 0.5, marks=pytest.mark.soak)])
def test_the_interval_holds_with_each_kind_of_graphs(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: str, price: float
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    fields = {"num_inference_steps": 4, "guidance_scale": 4.0, "guidance_interval": [0.25, 0.75]}
    config = HandlerConfig(model_path=tiny_model.name, dtype="float32", guidance_interval=[0.2, 0.8], warm_up=False)
    eager = load_pipeline(config, CompileConfig(), model_dir=tiny_model.parent)
    expected = draw(eager, **fields)
    served = dataclasses.replace(config, graphs=graphs, warm_up=True)
    loaded = load_pipeline(served, CompileConfig.parse("openvino"), model_dir=tiny_model.parent)
    graphs_before = describe_pipeline(loaded)["openvino"]["unet"]
    picture = draw(loaded, **fields)
    assert measure_psnr(picture, expected) > 45  # compiled and eager, in float32
    assert measure_psnr(picture, draw(eager, **{**fields, "guidance_interval": [0, 1]})) < 45
    halves = 8 - 2 * expected.unet_calls
    assert halves > 0
    assert picture.unet_calls == 4 - halves * (1 - price)
    assert describe_pipeline(loaded)["openvino"]["unet"] == graphs_before


def test_the_first_guided_step_is_called(demo: LoadedPipeline) -> None:
    for begin in (0.1, 0.25, 0.4, 0.6):
        fields = {**FIELDS, **SMALL, "unet_calls": 8, "guidance_interval": [begin, 0.9]}
        plan = build_image_pipeline(demo, demo.contract.check(fields), demo.functions).unet.plan
        assert plan.costs[plan.guided.index(True)] == 1
        assert sum(cost > 0 for cost in plan.costs) == 8
        assert draw(demo, **fields).unet_calls == plan.total


@pytest.mark.parametrize(
    ("fields", "calls"),
    [
        ({"unet_calls": 10, "denoising_end": 0.5}, 5),
        ({"unet_calls": 10, "denoising_end": 0.25}, 4),
        ({"unet_calls": 31}, 30),
    ],
)
def test_calls_are_shortened_in_proportion(demo: LoadedPipeline, fields: dict[str, Any], calls: int) -> None:
    assert demo.contract.count_calls(demo.contract.check({**FIELDS, **fields})) == calls


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"guidance_interval": [0.5, 0.5]}, "the second greater, not 0.5 and 0.5"),
        ({"guidance_interval": [0, 2]}, "two numbers from 0 to 1, not"),
        ({"guidance_interval": [0.5]}, "two numbers from 0 to 1, not"),
        ({"unet_calls": 3}, "a whole number from 4 to 300, not 3"),
    ],
)
def test_mistakes_are_told(demo: LoadedPipeline, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told) as caught:
        demo.contract.check({**FIELDS, **fields})
    assert caught.value.param == next(iter(fields))


@pytest.mark.parametrize("shortcut", [*EVERY_SHORTCUT, "all"])
def test_a_seeds_picture_is_the_same_alone_in_flight_and_among_others(demo: LoadedPipeline, shortcut: str) -> None:
    chosen = EVERY_SHORTCUT if shortcut == "all" else {"num_inference_steps", shortcut}
    fields: dict[str, Any] = {**SMALL, **{name: EVERY_SHORTCUT[name] for name in chosen}}
    alone = [draw(demo, **{**fields, "seed": seed}).image.tobytes() for seed in range(3)]
    together = draw_all(demo, **{**fields, "seed": 0, "num_images_per_prompt": 3})
    assert [each.image.tobytes() for each in together] == alone
    running = [generate(demo, demo.contract.check({**FIELDS, **fields, "seed": seed})) for seed in range(3)]
    ended: dict[int, bytes] = {}
    while len(ended) < len(running):
        for seed, steps in enumerate(running):
            try:
                if seed not in ended:
                    next(steps)
            except StopIteration as end:
                ended[seed] = end.value[0].image.tobytes()
    assert [ended[seed] for seed in range(3)] == alone


def test_the_configuration_gives_the_default(demo: LoadedPipeline) -> None:
    config = HandlerConfig.parse({"model_path": "demo/model", "dtype": "float32", "unet_calls": 5, "warm_up": False})
    loaded = load_pipeline(dataclasses.replace(config, guidance_interval=[0.2, 0.8]), CompileConfig(), model_dir=ROOT)
    request = loaded.contract.check({"prompt": PROMPT})
    assert (request.unet_calls, tuple(request.guidance_interval or ())) == (5, (0.2, 0.8))
    assert (
        loaded.contract.count_calls(
            loaded.contract.check({"prompt": PROMPT, "unet_calls": 30, "guidance_interval": [0, 1]})
        )
        == 30
    )


TIMESTEPS = [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]
SIGMAS = [4000.0, 20.0, 6.0, 2.0, 1.0, 0.4, 0.0]


@pytest.mark.parametrize(
    ("fields", "calls"),
    [
        ({"timesteps": TIMESTEPS}, 10),
        ({"timesteps": TIMESTEPS, "scheduler": "DPMSolverMultistepScheduler"}, 10),
        ({"timesteps": TIMESTEPS, "scheduler": "DDPM"}, 10),
        ({"timesteps": TIMESTEPS, "denoising_end": 0.5}, 4),
        ({"sigmas": SIGMAS}, 6),
    ],
)
def test_a_schedule_is_taken(demo: LoadedPipeline, full: GeneratedImage, fields: dict[str, Any], calls: int) -> None:
    assert demo.contract.count_calls(demo.contract.check({**FIELDS, **fields})) == calls
    picture = draw(demo, **fields)
    assert picture.unet_calls == calls
    apart = np.abs(np.asarray(picture.image).astype(int) - np.asarray(full.image)).mean()
    assert apart < (40 if "denoising_end" in fields else 4)  # levels: 29, and at most 2.1


def test_a_schedule_that_is_the_samplers_own_draws_its_picture(demo: LoadedPipeline) -> None:
    request = demo.contract.check({**FIELDS, "num_inference_steps": 7})
    own = build_image_pipeline(demo, request, demo.functions).scheduler.timesteps
    timesteps = [int(each) for each in own]
    assert draw(demo, timesteps=timesteps).image.tobytes() == draw(demo, num_inference_steps=7).image.tobytes()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"timesteps": [10, 20]}, "timesteps takes numbers that fall, not"),
        ({"sigmas": [10, 1]}, "numbers that fall, to 0.001 or more and then 0, not"),
        ({"sigmas": [0.0]}, r"to 0.001 or more and then 0, not \[0.0\]"),
        ({"sigmas": [3.0, 5e-324, 0.0]}, "to 0.001 or more and then 0, not"),
        ({"timesteps": [1000]}, "a list of falling whole numbers from 999 to 0, not"),
        ({"timesteps": TIMESTEPS, "scheduler": "DDIMScheduler"}, "taken by .*EulerDiscreteScheduler.*not by DDIMSch"),
        ({"sigmas": SIGMAS, "scheduler": "UniPC"}, "taken by EulerDiscreteScheduler, not by UniPCMultistepScheduler"),
        (
            {"timesteps": TIMESTEPS, "scheduler": {"name": "DPM++ 2M", "use_karras_sigmas": True}},
            "with these timesteps",
        ),
        ({"sigmas": SIGMAS, "scheduler": "DDPMScheduler"}, "sigmas is taken by EulerDiscreteScheduler, not by DDPMSch"),
        ({"schedule": "StableDiffusionXLTimesteps"}, "a model that predicts the noise, not v_prediction"),
        ({"schedule": "AYS"}, "one of StableDiffusionTimesteps"),
    ],
)
def test_schedules_that_cannot_be_taken_are_told(demo: LoadedPipeline, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError, match=told) as caught:
        demo.contract.check({**FIELDS, **fields})
    assert caught.value.param == next(iter(fields))


def test_two_schedules_are_one_too_many(demo: LoadedPipeline) -> None:
    with pytest.raises(RequestError, match="timesteps and sigmas are one thing"):
        demo.contract.check({**FIELDS, "timesteps": TIMESTEPS, "sigmas": SIGMAS})


def test_aligned_steps_fit_a_model_that_predicts_the_noise(tiny_model: Path) -> None:
    config = HandlerConfig(model_path=tiny_model.name, dtype="float32", warm_up=False)
    tiny = load_pipeline(config, CompileConfig(), model_dir=tiny_model.parent)
    assert draw(tiny, schedule="StableDiffusionXLTimesteps").unet_calls == 10
    assert draw(tiny, schedule="StableDiffusionXLSigmas").unet_calls == 10
    assert draw(tiny, timesteps=TIMESTEPS, scheduler="Heun").unet_calls == 19
    assert draw(tiny, timesteps=TIMESTEPS, scheduler="DPM++ SDE").unet_calls == 10


def test_an_interval_of_all_is_none_for_a_scheduler_without_training_timesteps(demo: LoadedPipeline) -> None:
    scheduler = EDMEulerScheduler()
    scheduler.set_timesteps(5)
    request = demo.contract.check({**FIELDS, "guidance_interval": [0, 1]})
    plan = build_step_plan(scheduler, request, unet_config={}, half=0.5)
    assert plan.costs == (1,) * 5
    request = dataclasses.replace(request, guidance_interval=(0.2, 0.8))
    with pytest.raises(RequestError, match="guidance_interval takes shares of the training timesteps"):
        build_step_plan(scheduler, request, unet_config={}, half=0.5)
    assert build_step_plan(scheduler, request, unet_config={"time_cond_proj_dim": 256}, half=0.5) == plan


@pytest.mark.parametrize("fields", [{"unet_calls": 4}, {"guidance_interval": [0.2, 0.8]}])
def test_numbers_that_are_not_finite_name_the_step_and_not_the_call(
    tiny_model: Path, tmp_path: Path, fields: dict[str, Any]
) -> None:
    folder = spoil_model(tiny_model, tmp_path / "model", "late")
    config = HandlerConfig(model_path=folder.name, dtype="float32", warm_up=False)
    loaded = load_pipeline(config, CompileConfig(), model_dir=folder.parent)
    with pytest.raises(NotFiniteError, match="seed 1 failed in step 7: the UNet's output"):
        draw(loaded, **{"num_inference_steps": 10, **fields})


def test_a_forecast_that_is_not_finite_is_no_picture(demo: LoadedPipeline) -> None:
    """In float16 the line through two finite outputs leaves the numbers there are."""
    request = demo.contract.check({**FIELDS, "num_inference_steps": 12, "unet_calls": 4, "guidance_scale": 1.0})
    pipeline = build_image_pipeline(demo, request, demo.functions)
    unet, scheduler = pipeline.unet, pipeline.scheduler
    outputs = iter([60000.0, -60000.0])
    denoiser = Denoiser(
        demo.pipeline.unet, lambda x, *_: (torch.full_like(x, next(outputs)),), request, scheduler, unet.plan
    )
    sample = torch.zeros(1, 4, 16, 16, dtype=torch.float16)
    with pytest.raises(NotFiniteError, match="the extrapolated output of the UNet holds numbers that are not finite"):
        deque((denoiser(sample, timestep) for timestep in scheduler.timesteps), maxlen=0)
    assert denoiser.done == denoiser.plan.costs.index(0, denoiser.plan.costs.index(1, 1)) + 1
    assert denoiser.calls == 2
