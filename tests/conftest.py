"""Small models with random weights, made once for the whole run."""

from pathlib import Path

import pytest

from scripts.make_random_model import make_pipeline


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Stable Diffusion XL pipeline of 0.3 M parameters, 128×128 pixels."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_pipeline("tiny").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a Stable Diffusion 1.x pipeline of the same size."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    make_pipeline("tiny-sd").save_pretrained(folder)
    return folder
