"""Memory that is given back: nothing is lost, and what a file has need not be read from the disk again."""

import ctypes
import mmap
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from openvino_backend import CompiledFunction, compile_ahead
from openvino_backend.memory import release_memory
from openvino_backend.options import Options

OPTIONS = Options.parse({"release_weights": True})
COUNT, SIDE = 4, 1024  # matrices of 4 MB


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    save_file({str(index): torch.randn(SIDE, SIDE) for index in range(COUNT)}, path)
    return path


def read_resident(path: Path) -> int:
    """Return the kilobytes of a file that are mapped and in this process's memory."""
    entries = re.split(r"\n(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text())
    return sum(int(re.findall(r"Rss: +(\d+)", each)[0]) for each in entries if str(path) in each.partition("\n")[0])


def count_cached(path: Path) -> int:
    """Return the kilobytes of a file that the kernel has in memory."""
    pages = -(-path.stat().st_size // mmap.PAGESIZE)
    marks = (ctypes.c_ubyte * pages)()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        place = ctypes.addressof(ctypes.c_char.from_buffer(view))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(place), ctypes.c_size_t(len(view)), marks) == 0
    return sum(mark & 1 for mark in marks) * mmap.PAGESIZE // 1024


def test_what_a_file_has_is_dropped_and_stays_in_the_kernels_memory(path: Path) -> None:
    weights = load_file(path)
    expected = {name: each.clone() for name, each in weights.items()}
    assert read_resident(path) > 16000
    with release_memory(OPTIONS, weights.values()):
        pass
    assert read_resident(path) < 1000
    assert count_cached(path) > 16000
    assert all(torch.equal(weights[name], each) for name, each in expected.items())


@pytest.mark.parametrize("change", ["one number", "all"])
def test_what_was_changed_in_memory_stays(path: Path, change: str) -> None:
    weights = load_file(path)
    if change == "all":
        for each in weights.values():
            each.neg_()
    else:
        weights["2"][SIDE // 2, 7] = 12345.0
    expected = {name: each.clone() for name, each in weights.items()}
    with release_memory(OPTIONS, weights.values()):
        pass
    assert all(torch.equal(weights[name], each) for name, each in expected.items())


def test_memory_of_no_file_stays() -> None:
    weights = [torch.randn(SIDE, SIDE) for _ in range(COUNT)]
    expected = [each.clone() for each in weights]
    with release_memory(OPTIONS, weights):
        pass
    assert all(map(torch.equal, weights, expected))


@pytest.mark.usefixtures("inference")
def test_the_file_of_8_bit_weights_is_dropped_when_they_are_compiled(tmp_path: Path) -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(1024, 4096), torch.nn.Linear(4096, 1024)).requires_grad_(False).half()
    options = {"precision": "int8", "release_weights": True, "model_caching": True, "cache_dir": str(tmp_path)}
    for _ in range(2):
        function = CompiledFunction(layers.forward, options, dynamic_shapes={"input": (1,)})
        with compile_ahead():
            function(torch.randn(1, 5, 1024).half())
        (path,) = tmp_path.glob("*/model.bin")
        assert path.stat().st_size > 8 * 2**20
        assert read_resident(path) < 1000
