"""What holds for all servers of the tests, and the one that three files share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.eager import KEPT, PASSED_ON, EagerServer
from tests.server.test_backends import ask_for_picture


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """On cores that others use too, several threads wait for each other at each step of a small model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[EagerServer]:
    """The server of the files in tests/conftest.py's ONE_SERVER; other files have their own."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (*PASSED_ON, *KEPT):
            patch.setenv(name, "1")
        with EagerServer(tmp_path_factory.mktemp("server"), tiny_model) as running:
            worker = running.find_worker()
            yield running
            ask_for_picture(running)
            assert running.find_worker() == worker  # it outlived every request
