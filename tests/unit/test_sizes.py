"""Sizes, and the graphs that are compiled for them."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openvino_backend import GraphLimitError
from sdxl_server.config.compile_settings import CompileConfig
from sdxl_server.diffusion.warm_up import choose_sizes
from sdxl_server.errors import ConfigError, RequestError
from sdxl_server.model.compiling import choose_graphs
from sdxl_server.model.describe import describe_pipeline
from sdxl_server.model.loaded_pipeline import LoadedPipeline
from tests.unit.pipelines import EAGER, count_graphs, load, make_picture

TWO: dict[str, Any] = {"num_inference_steps": 2}


def test_schedulers_share_one_graph(compiled: LoadedPipeline) -> None:
    graphs = describe_pipeline(compiled)["graphs"]
    for name in ("DDIMScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"):
        make_picture(compiled, scheduler=name, **TWO)
    assert describe_pipeline(compiled)["graphs"] == graphs


def test_one_graph_too_many_is_refused(eager: LoadedPipeline) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise GraphLimitError("4 graphs are compiled already")

    full = dataclasses.replace(eager, functions={**eager.functions, "unet": refuse})
    with pytest.raises(RequestError, match="64x64 needs one more graph.*allowed_sizes and max_graphs"):
        make_picture(full, width=64, height=64)


def test_allowed_sizes_are_compiled_at_the_start(tiny_model: Path, cached: dict[str, Any]) -> None:
    sizes = ["128x128", "64x128"]
    loaded = load(tiny_model, cached, warm_up=True, allowed_sizes=sizes, graphs="static")
    report = describe_pipeline(loaded)
    assert count_graphs(loaded) == [2, 2, 0, 1, 1]
    make_picture(loaded, width=64, guidance_scale=1)
    assert describe_pipeline(loaded) == report
    with pytest.raises(RequestError, match="one of 128x128, 64x128 here, not 64x64"):
        make_picture(loaded, width=64, height=64)
    few = {**cached, "options": {**cached["options"], "max_graphs": 1}}
    with pytest.raises(ConfigError, match=r"handler.allowed_sizes names 2 sizes.*max_graphs.*is 1"):
        load(tiny_model, few, allowed_sizes=sizes, graphs="static")


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"width": 512, "height": 256}, [(128, 128)]),
        ({"width": 64, "height": 64, "max_side": 100}, [(96, 96)]),
        ({"allowed_sizes": ["256x256", "64x256", "128x256"], "width": 256, "height": 256}, [(64, 256)]),
        ({"graphs": "static"}, [(128, 128)]),
        ({"graphs": "both"}, [(128, 128), (128, 120)]),
        ({"graphs": "both", "width": 128, "height": 120}, [(128, 120), (120, 128)]),
        ({"graphs": "both", "vae_tile_side": 96}, [(128, 128), (96, 88)]),
        ({"graphs": "dynamic", "vae_tile_side": 64}, [(64, 64)]),
        ({"graphs": "both", "width": 64, "height": 64, "max_side": 64}, [(64, 64)]),
    ],
)
def test_the_warm_up_draws_as_little_as_compiles_every_graph(
    tiny_model: Path, cached: dict[str, Any], settings: dict[str, Any], sizes: list[tuple[int, int]]
) -> None:
    assert choose_sizes(load(tiny_model, cached, **settings)) == sizes


def test_no_size_takes_the_place_of_another(tiny_model: Path, cached: dict[str, Any], eager: LoadedPipeline) -> None:
    """One graph draws all sizes and kinds of guidance, and what was drawn before is no matter to a seed's bits."""
    one = {**cached, "options": {**cached["options"], "max_graphs": 1}}
    loaded = load(tiny_model, one, warm_up=True)
    before = make_picture(loaded)
    for width, height, guidance in (
        *((64, 64, 1.0), (64, 64, 5.0), (72, 200, 5.0), (72, 200, 1.0), (256, 64, 1.0), (104, 136, 5.0)),
        (120, 128, 1.0),
    ):
        fields = {"width": width, "height": height, "guidance_scale": guidance, **TWO}
        assert np.abs(make_picture(loaded, **fields) - make_picture(eager, **fields)).max() <= 1
    assert count_graphs(loaded) == [1, 1, 0, 1, 1]
    assert np.array_equal(make_picture(loaded), before)
    again = load(tiny_model, one)
    assert np.array_equal(make_picture(again, width=72, height=200), make_picture(loaded, width=72, height=200))
    assert np.array_equal(make_picture(again), before)
    assert describe_pipeline(loaded)["graphs_for"] == "dynamic"


@pytest.mark.parametrize("configured", [5.0, 1.0])
def test_static_graph_serves_both_kinds_of_guidance(
    tiny_model: Path, cached: dict[str, Any], eager: LoadedPipeline, configured: float
) -> None:
    loaded = load(tiny_model, cached, warm_up=True, graphs="static", guidance_scale=configured)
    for guidance in (5.0, 1.0):
        picture, expected = (make_picture(each, guidance_scale=guidance, **TWO) for each in (loaded, eager))
        assert np.abs(picture - expected).max() <= 1
    assert count_graphs(loaded) == [1, 1, 0, 1, 1]
    with pytest.raises(RequestError, match="width and height take one of 128x128 here, not 64x128"):
        make_picture(loaded, width=64)


def test_both_kinds_of_graphs(tiny_model: Path, cached: dict[str, Any], eager: LoadedPipeline) -> None:
    loaded = load(tiny_model, cached, warm_up=True, graphs="both", weighted_prompts=True)
    assert count_graphs(loaded) == [2, 2, 0, 1, 1]
    for fields in ({}, {"width": 64}, {"guidance_scale": 1.0}, {"width": 200, "height": 72}):
        assert np.abs(make_picture(loaded, **fields, **TWO) - make_picture(eager, **fields, **TWO)).max() <= 1
    long = "a red fox in the snow, " * 5  # 2 chunks of letters, which only the graph for any size takes
    weighted = load(tiny_model, weighted_prompts=True)
    prompts: list[dict[str, Any]] = [
        {"prompt": "a (red:1.4) fox", "negative_prompt": "[blue]"},
        {"prompt": long, "negative_prompt": "a (blue:2)"},
        {"prompt": "fox BREAK snow BREAK red", "width": 64, "prompt_2": long, "clip_skip": 1},
        {"prompt": long, "guidance_scale": 1.0},
    ]
    for fields in prompts:
        assert np.abs(make_picture(loaded, **fields, **TWO) - make_picture(weighted, **fields, **TWO)).max() <= 1
    assert count_graphs(loaded) == [2, 2, 0, 1, 1]


@pytest.mark.parametrize(
    ("pt2", "settings", "expected"),
    [
        ({"backend": "openvino"}, {}, "dynamic"),
        ({"backend": "openvino"}, {"allowed_sizes": ["128x128"]}, "static"),
        ({"backend": "openvino"}, {"allowed_sizes": ["128x128"], "graphs": "dynamic"}, "dynamic"),
        ({"backend": "openvino"}, {"allowed_sizes": ["128x128", "64x64"]}, "dynamic"),
        (None, {}, None),
    ],
)
def test_configuration_decides_which_graphs(pt2: Any, settings: dict[str, Any], expected: str | None) -> None:
    assert choose_graphs(dataclasses.replace(EAGER, **settings), CompileConfig.parse(pt2)) == expected


@pytest.mark.parametrize("pt2", [None, "inductor"])
def test_graphs_of_another_backend_are_refused(tiny_model: Path, pt2: Any) -> None:
    with pytest.raises(ConfigError, match=r"handler.graphs belongs to pt2.backend: openvino, not to (eager|inductor)"):
        load(tiny_model, pt2, graphs="static")
