"""What tests of compiled modules begin with, one cache of compiled models, and pipelines that many tests share."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_server.model.loaded_pipeline import LoadedPipeline
from tests.unit.pipelines import load


@pytest.fixture
def inference() -> Iterator[None]:
    """Forget what was compiled, seed the random numbers, and leave out gradients."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache for all processes of a run, so that a part is traced and compiled once; its keys are digests."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache-home"))
        yield folder / "cache-home"


@pytest.fixture(scope="session")
def cached(cache_home: Path) -> dict[str, Any]:
    """OpenVINO with that cache."""
    options = {"model_caching": True, "cache_dir": str(cache_home / "openvino_backend")}
    return {"backend": "openvino", "options": options}


@pytest.fixture(scope="session")
def eager(tiny_model: Path) -> LoadedPipeline:
    """The small pipeline in eager PyTorch; tests leave it as it is."""
    return load(tiny_model)


@pytest.fixture(scope="session")
def compiled(tiny_model: Path, cached: dict[str, Any]) -> LoadedPipeline:
    """The same, compiled by OpenVINO."""
    return load(tiny_model, cached, warm_up=True)
