"""Each line of the scorecard passes on what is shipped, and fails on a fault that is planted for it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from scorecard import __main__ as soak
from scorecard import clients
from scorecard.__main__ import LINES
from scorecard.clients import judge_growth
from scorecard.site import Line, Scale, Site
from tests.server import planted_handler
from tools.proxy import LocalProxy, find_nginx
from tools.server import LocalServer, read_shipped

SMALL = Scale(
    soak_time=5,
    soak_requests=8,
    kill_time=25,
    loads=2,
    requests_after=5,
    crowd=40,
    kinds=24,
    fuzzed=15,
    leavers=5,
    bodies=90,
    cycles=1,
)
LINE_NAMES = {"stopped": "stopped worker", "disk": "disk and ports"}
PLANTED = Path(planted_handler.__file__)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("cache"))


@dataclass(frozen=True)
class RunningSite(Site):
    """One that serves already, for the lines that change nothing of it."""

    server: LocalServer | None = None

    @contextmanager
    def serve(self, **_: Any) -> Iterator[LocalServer]:
        assert self.server
        yield self.server


@pytest.fixture(scope="module")
def running(site: Site) -> Iterator[Site]:
    with site.serve() as server:
        yield RunningSite(site.cache, server=server)


def check(name: str, site: Site, scale: Scale = SMALL) -> dict[str, bool]:
    lines = LINES[name](site, scale)
    for line in lines:
        print(line)
    return {line.name: line.passed for line in lines}


@pytest.mark.parametrize("name", ["soak", "crowd", "leavers", "queue", "tokens"])
def test_lines_of_one_server(running: Site, name: str) -> None:
    results = check(name, running)
    results.pop("memory", None)  # a few seconds tell nothing of it; the control below shows that it can fail
    assert results == dict.fromkeys(results, True)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["kinds", "fuzz", "stopped", "kills", "disk", "attacks", "bodies"])
def test_lines_with_their_own_server(site: Site, name: str) -> None:
    assert set(check(name, site).values()) == {True}


@pytest.mark.soak
@pytest.mark.skipif(find_nginx() is None, reason="nginx and openssl are not installed")
def test_cycles(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check("cycles", site) == {"cycles": True}
    monkeypatch.setattr(LocalProxy, "drain", lambda proxy: proxy.command("-s", "stop"))
    assert check("cycles", site) == {"cycles": False}  # the requests under way are cut off


@pytest.fixture(scope="module")
def faulty(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A site whose tests name the faults; its model is small, random and not compiled, to be there soon."""
    return Site(tmp_path_factory.mktemp("cache"), model=tiny_model, handler=PLANTED)


def plant(
    faulty: Site,
    *faults: str,
    properties: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
    **keys: Any,
) -> Site:
    planted = {"pt2": None, "planted": list(faults), **keys}
    return replace(faulty, keys=planted, properties=properties or {}, settings=settings or {})


@pytest.mark.soak
def test_memory_can_fail(faulty: Site) -> None:
    assert check("soak", plant(faulty, "leak"))["memory"] is False


@pytest.mark.soak
@pytest.mark.parametrize("fault", ["hang", "drip", "wrong size"])
def test_soak_can_fail(faulty: Site, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(clients, "PATIENCE", 5)
    assert check("soak", plant(faulty, fault))["soak"] is False


@pytest.mark.soak
@pytest.mark.parametrize(
    ("name", "faults", "keys"),
    [
        ("kills", ["slow recovery"], {}),
        ("stopped", [], {"responseTimeout": 10}),
        ("kinds", [], {"settings": {"allowed_sizes": ["128x128"]}}),
        ("kinds", ["other pixels"], {}),
        ("crowd", [], {"batchSize": 150, "handler": {**read_shipped()["handler"], "max_waiting": 100}}),
        ("fuzz", ["server error"], {}),
        ("attacks", ["long echo"], {}),
        ("leavers", [], {"continuousBatching": False}),
        ("queue", [], {"batchSize": 1, "jobQueueSize": 8}),
        ("disk", ["starts without a model"], {}),
    ],
)
def test_other_lines_can_fail(faulty: Site, name: str, faults: list[str], keys: dict[str, Any]) -> None:
    assert check(name, plant(faulty, *faults, **keys))[LINE_NAMES.get(name, name)] is False


@pytest.mark.soak
def test_tokens_can_fail(faulty: Site) -> None:
    # TorchServe's metrics endpoint answers without a token.
    assert check("tokens", plant(faulty, properties={"enable_metrics_api": "true"})) == {"tokens": False}


@pytest.mark.soak
def test_bodies_can_fail(faulty: Site) -> None:
    assert check("bodies", plant(faulty, properties={"vmargs": "-Xmx8g"})) == {"bodies": False}


def test_growth_is_told() -> None:
    flat = [{"MB resident": 1000 + i % 7, "threads": 50.0 + i % 3} for i in range(100)]
    assert judge_growth(flat)[0]
    assert not judge_growth([{**each, "threads": 50 + i} for i, each in enumerate(flat)])[0]
    assert not judge_growth([{**each, "MB resident": 1000 + i} for i, each in enumerate(flat)])[0]


def test_program_tells_and_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {"a": lambda *_: [Line("a", True, "well")], "b": lambda *_: [Line("b", False, "not well")]}
    monkeypatch.setattr(soak, "LINES", lines)
    assert soak.main(["--quick", "--only", "a"]) == 0
    assert soak.main([]) == 1
    assert "FAIL  b: not well" in capsys.readouterr().out
