"""Small models with random weights, made once for the whole run."""

from pathlib import Path

import pytest

from tools.random_model import make_pipeline, save_pipeline


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Stable Diffusion XL pipeline of 0.3 M parameters, 128×128 pixels."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_pipeline(make_pipeline("tiny"), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Stable Diffusion 1.x pipeline of the same size."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    save_pipeline(make_pipeline("tiny-sd"), folder)
    return folder
