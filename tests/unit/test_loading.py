"""Folders and settings that cannot be loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sdxl_server.errors import ConfigError
from sdxl_server.model.folders import check_file_types
from tests.unit.pipelines import load


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"scheduler": "Eule"}, ["handler.scheduler", "such as Euler", "'Eule'"]),
        ({"scheduler": {"name": "Euler", "solver_order": 2}}, ["handler.scheduler takes for Euler", "'solver_order'"]),
        (
            {"scheduler": {"name": "UniPC", "solver_type": "bh1"}},
            ["handler.scheduler", "takes for solver_type one of bh2"],
        ),
        ({"max_side": 64}, ["handler.width", "width takes a whole number from 64 to 64", "not 128"]),
        ({"allowed_sizes": ["64x64"]}, ["handler.width", "take one of 64x64 here, not 128x128"]),
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


@pytest.mark.parametrize(
    "name",
    [
        *("unet/diffusion_pytorch_model.bin", "weights.ckpt", "unet/model.py", "x.pt", "unet/x.PT", "unet/weights"),
        *("x.pt2", ".pt", "unet/model.safetensors.pkl", "model.SAFETENSORS", "vae/a.so"),
    ],
)
def test_files_that_could_run_code_are_refused(tiny_model: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / name).write_bytes(b"")
    with pytest.raises(ConfigError, match=rf"{name} could run code"):
        load(folder)


def test_subfolders_that_are_links_are_looked_into(tiny_model: Path, tmp_path: Path) -> None:
    folder, elsewhere = shutil.copytree(tiny_model, tmp_path / "model"), tmp_path / "elsewhere"
    shutil.move(folder / "unet", elsewhere)
    (folder / "unet").symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(folder)
    check_file_types(folder, remedy="")
    (elsewhere / "x.bin").touch()
    with pytest.raises(ConfigError, match=r"unet/x.bin could run code"):
        check_file_types(folder, remedy="")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model_index.json", "[" * 100_000),
        ("model_index.json", json.dumps({"_class_name": ["StableDiffusionXLPipeline"]})),
        ("model_index.json", json.dumps({"_class_name": "StableDiffusionXLPipeline"})),
        ("model_index.json", json.dumps({"_class_name": "StableDiffusionXLPipeline", "unet": 5})),
        ("scheduler/scheduler_config.json", "[]"),
        ("unet/config.json", "{}"),
        ("unet/config.json", json.dumps({"sample_size": None})),
        ("unet/config.json", "\0"),
        ("vae/config.json", json.dumps({"block_out_channels": "x"})),
        ("text_encoder/config.json", json.dumps({"num_hidden_layers": -1})),
        ("tokenizer/tokenizer.json", "{}"),
    ],
)
def test_odd_files_of_a_pipeline_are_told(tiny_model: Path, tmp_path: Path, name: str, content: str) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=r"^(cannot read the pipeline in|handler.model_path takes)"):
        load(folder)


def test_truncated_weights_are_told(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot read the pipeline"):
        load(folder)
