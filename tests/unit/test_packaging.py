"""What is installed: every version pinned once, and one distribution that brings the two packages alone."""

import ast
import re
import sys
import sysconfig
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import openvino_backend
import sdxl_server

ROOT = Path(__file__).parents[2]
NAME = "torchserve-sdxl-openvino"
PACKAGES = {"openvino_backend", "sdxl_server"}
FILES = ("requirements.txt", "requirements-dev.txt")
# A torch that is built for CUDA brings these and pins them itself; the torch of constraints.txt may be another build.
CUDA = ("cuda-", "nvidia-", "triton")
INSTALLED: dict[str, metadata.Distribution] = {
    canonicalize_name(found.name): found for found in metadata.distributions(path=[sysconfig.get_path("purelib")])
}


def read_lines(name: str) -> list[str]:
    lines = (ROOT / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def read_names(name: str) -> list[str]:
    return [line for line in read_lines(name) if not line.startswith("-")]


def read_pins() -> dict[str, str]:
    """Return the version of each distribution in the constraints."""
    pairs = [line.split("==") for line in read_lines("constraints.txt")]
    return {canonicalize_name(name): version for name, version in pairs}


def read_project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project


def find_brought(name: str, extras: frozenset[str], seen: set[tuple[str, str]]) -> Iterator[str]:
    """Yield the name of a distribution, and of all that it brings along here."""
    name = canonicalize_name(name)
    for extra in {"", *extras}:
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        yield name
        for text in INSTALLED[name].requires or []:
            needed = Requirement(text)
            if not needed.marker or needed.marker.evaluate({"extra": extra}):
                yield from find_brought(needed.name, frozenset(needed.extras), seen)


def find_imported(folder: Path) -> set[str]:
    """Return the top-level modules that a folder's files import and that are neither Python's nor the project's."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - PACKAGES


def test_constraints_are_plain_pins() -> None:
    lines = read_lines("constraints.txt")
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9a-z.]+", line)] == []
    assert len(read_pins()) == len(lines)
    assert NAME not in read_pins()


@pytest.mark.parametrize("name", [*FILES, "requirements-upscaler.txt"])
def test_requirements_have_their_versions_from_the_constraints(name: str) -> None:
    assert "-c constraints.txt" in read_lines(name)
    assert [line for line in read_names(name) if not re.fullmatch(r"[A-Za-z0-9._-]+", line)] == []
    assert set(map(canonicalize_name, read_names(name))) <= read_pins().keys()


def test_dependencies_have_their_versions_from_the_constraints() -> None:
    assert [line for line in read_project()["dependencies"] if not re.fullmatch(r"[A-Za-z0-9._-]+", line)] == []


def test_everything_that_is_brought_has_its_pinned_version() -> None:
    pins = read_pins()
    seen: set[tuple[str, str]] = set()
    roots = [NAME, *(name for file in FILES for name in read_names(file))]
    brought = {name for root in roots for name in find_brought(root, frozenset(), seen) if name != NAME}
    brought = {name for name in brought if not name.startswith(CUDA)}
    assert sorted(brought - pins.keys()) == []
    versions = {name: Version(INSTALLED[name].version).public for name in brought}
    assert versions == {name: pins[name] for name in brought}


def test_what_the_packages_import_is_declared() -> None:
    modules = metadata.packages_distributions()
    imported = {module for package in PACKAGES for module in find_imported(ROOT / package)}
    project = read_project()
    optional = [name for names in project["optional-dependencies"].values() for name in names]
    declared = {canonicalize_name(name) for name in (*project["dependencies"], *optional)}
    assert {
        module for module in imported if not declared & set(map(canonicalize_name, modules.get(module, [])))
    } == set()


def test_distribution_is_the_two_packages() -> None:
    installed = INSTALLED[NAME]
    assert installed.version == sdxl_server.__version__ == openvino_backend.__version__
    assert set((installed.read_text("top_level.txt") or "").split()) == PACKAGES
    assert [(point.group, point.name) for point in installed.entry_points] == [
        ("torch_dynamo_backends", "openvino_backend")
    ]
