"""What all tests share: small models with random weights, the order of the tests, and which may be skipped."""

import gc
import os
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

from tools.random_model import make_pipeline, save_pipeline

# Imports and traces make millions of objects. With Python's own 700 a sixth of all time goes into looking at them.
gc.set_threshold(20_000, 20, 20)

ONE_SERVER = ("test_contract", "test_metrics", "test_requests", "test_page_devices", "test_webuiapi")
ONE_SITE = ("test_jobs", "test_page_jobs")
LONGEST = (
    *("server/test_instances", "server/test_deploy", "server/test_jobs", "server/test_page", "server/test_contract"),
    *("server/test_guide", "server/test_units", "server/test_soak", "server", "unit/test_benchmarks"),
    *("unit/test_shapes", "unit/test_adapters", "unit/test_pipeline", "unit/test_sizes", "unit/test_query"),
    *("unit/test_samplers", "unit/test_function", "unit/test_controls", "unit/test_lycoris", "unit/test_graph"),
)
# In CI any other skip is a failure: .ci/run installs what the tests need.
KNOWN_SKIPS = frozenset(
    {
        "this CPU has no bfloat16 arithmetic",
        "this machine has no IPv6",
        "root may write everywhere",
        "only root may give files to another user",
        "no control group can be made here",
        "it takes two processors to tell cores and sockets apart",
        "one processor is no limit",
    }
)


class FileScheduling(LoadScopeScheduling):
    """Hand out whole files, whose fixtures are built once; files that share a server go together.

    xdist 3.8 ignores its own marks for this, `--dist loadgroup`, under pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        groups = (group for group in (ONE_SERVER, ONE_SITE) if Path(path).stem in group)
        return next(groups, (path,))[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FileScheduling:
    return FileScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, so that both processes end at the same time."""
    items.sort(key=_find_place)


def pytest_collection_finish() -> None:
    """Leave what was imported, and the tests themselves, out of each later look for garbage."""
    gc.collect()
    gc.freeze()


def _find_place(item: pytest.Item) -> int:
    name = f"{item.path.parent.name}/{item.path.stem}"
    return next((place for place, long in enumerate(LONGEST) if name.startswith(long)), len(LONGEST))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let an unknown skip fail in CI."""
    report = yield
    if os.environ.get("CI") == "true" and report.skipped and isinstance(report.longrepr, Sequence):
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        if reason not in KNOWN_SKIPS:
            report.outcome = "failed"
            report.longrepr = (
                f"skipped in CI: {reason}; install what is missing, or add it to KNOWN_SKIPS in {__file__}"
            )
    return report


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
