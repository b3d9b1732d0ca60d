"""The digest of weights: kept with the files that they are mapped from, and made anew where they may have changed."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from openvino_backend import digest_weights, weights
from openvino_backend.options import Options
from openvino_backend.weights import find_digest

pytestmark = pytest.mark.usefixtures("inference")


@pytest.fixture
def digested(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all weights that were read."""
    names: list[str] = []

    def digest(tensors: dict[str, torch.Tensor]) -> str:
        names.extend(tensors)
        return digest_weights(tensors)

    monkeypatch.setattr(weights, "digest_weights", digest)
    return names


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    write(path)
    return path


def write(path: Path, *, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    save_file({name: torch.randn(64, 64, generator=generator) for name in "ab"}, path)


def make_options(folder: Path, **options: Any) -> Options:
    return Options.parse({"model_caching": True, "cache_dir": str(folder / "cache"), **options})


def test_digest_is_kept_with_the_file(path: Path, digested: list[str]) -> None:
    options = make_options(path.parent)
    for names in (["a", "b"], []):
        tensors = load_file(path)
        assert find_digest(tensors, options) == digest_weights(tensors)
        assert digested == names
        digested.clear()
    assert find_digest(load_file(path), Options.parse({})) == digest_weights(load_file(path))
    assert digested == ["a", "b"]  # without a cache


@pytest.mark.parametrize("way", ["in its place", "over it", "over it, with its time", "copied"])
def test_other_content_has_another_digest(path: Path, digested: list[str], way: str) -> None:
    options, before = make_options(path.parent), path.stat()
    first = find_digest(load_file(path), options)
    other = path.with_name("other")
    if way == "copied":
        shutil.copy2(path, other)
    else:
        write(other, seed=1)
    if way.startswith("over"):
        shutil.copyfile(other, path)
    else:
        other.replace(path)
    if way.endswith("time"):
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    digested.clear()
    assert (find_digest(load_file(path), options) == first) is (way == "copied")
    assert digested == ["a", "b"]


def test_replaced_file_is_not_the_one_that_is_mapped(path: Path) -> None:
    options, tensors = make_options(path.parent), load_file(path)
    write(path.with_name("other"), seed=1)
    path.with_name("other").replace(path)
    write(path.with_name(f"{path.name} (deleted)"), seed=2)  # the name that the kernel gives to the mapped one now
    for each in (tensors, load_file(path), load_file(path.with_name(f"{path.name} (deleted)")), tensors):
        assert find_digest(each, options) == digest_weights(each)


def test_weights_changed_in_memory_are_read(path: Path, digested: list[str]) -> None:
    options = make_options(path.parent)
    find_digest(load_file(path), options)
    tensors = load_file(path)
    tensors["a"][0, 0] += 1
    digested.clear()
    assert find_digest(tensors, options) == digest_weights(tensors)
    assert digested == ["a", "b"]


def test_weights_beside_the_file_are_read_each_time(path: Path, digested: list[str]) -> None:
    options = make_options(path.parent)
    for number in range(2):
        for names in (["scale", "a", "b", "scale"], ["scale"]):
            digested.clear()
            tensors = {**load_file(path), "scale": torch.full((3,), float(number))}
            assert find_digest(tensors, options) == digest_weights(tensors)
            assert digested == names


def test_views_of_one_file_are_told_apart(path: Path) -> None:
    options, tensors = make_options(path.parent), load_file(path)
    for each in (tensors["a"], tensors["b"], tensors["a"][:32], tensors["a"][32:], tensors["a"].T):
        for _ in range(2):
            assert find_digest({"x": each}, options) == digest_weights({"x": each})
