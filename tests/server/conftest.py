"""What holds for all servers of the tests, the one that several files share, and the browser."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.server import test_jobs
from tests.server.browser import CHROMIUM, open_context, open_page
from tests.server.eager import KEPT, PASSED_ON, EagerServer
from tests.server.test_backends import ask_for_picture
from tools.proxy import LocalProxy
from tools.server import LocalServer


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


@pytest.fixture(scope="package")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[test_jobs.Site]:
    """Jobs with one worker, for the files of tests/conftest.py's ONE_SITE; other files have their own."""
    yield from test_jobs.serve(tmp_path_factory.mktemp("jobs"), tiny_model, 1)


@pytest.fixture(scope="module")
def nginx(server: LocalServer) -> Iterator[LocalProxy]:
    with LocalProxy(server.ports["inference_address"], key_file=server.key_file) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM)
        yield running
        running.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    with open_context(browser) as made:
        yield made


@pytest.fixture
def page(context: BrowserContext, nginx: LocalProxy) -> Page:
    return open_page(context, nginx, token=nginx.token)
