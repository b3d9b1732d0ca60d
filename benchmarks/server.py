"""Measure starts, images and memory through TorchServe, for several values of `pt2` and several checkouts."""

import argparse
import contextlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import requests
import yaml

from benchmarks.turns import Figures, MeasuringError, Row, format_spread, format_starts, measure_in_turns
from scorecard.clients import Watch, measure_server
from sdxl_server.serving.client import send_request
from tools.server import ROOT, LocalServer, ServerError, make_archive, read_shipped, run_command

INDUCTOR = {"backend": "inductor", "mode": "reduce-overhead"}
DEFAULTS = [INDUCTOR, None, "openvino", {"backend": "openvino", "options": {"model_caching": True}}]
_STAGES = ("preprocess", "inference", "postprocess")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Each pt2 and checkout starts in turn, the first time with an empty cache. Then their images alternate."
    )
    parser.add_argument("pt2", nargs="*", type=yaml.safe_load, help="as YAML (default: eager, Inductor, openvino)")
    parser.add_argument("--checkouts", nargs="+", type=Path, default=[ROOT], metavar="FOLDER", help="(default: this)")
    parser.add_argument("--model", type=Path, help="a pipeline's folder (default: a tiny one with random weights)")
    parser.add_argument("--handler", type=yaml.safe_load, default={}, help="settings of the handler section as YAML")
    parser.add_argument("--keys", type=yaml.safe_load, default={}, help="TorchServe's own keys as YAML")


class MeasuredServer:
    """A server of one checkout with one value of `pt2`.

    Args:
        cache: a folder for Inductor's files.
        settings: of model-config.yaml.

    Raises:
        MeasuringError: the server did not start.
    """

    def __init__(
        self, name: str, checkout: Path, cache: Path, settings: dict[str, Any], timeout: float, _is_alone: bool
    ) -> None:
        self._name, self._timeout, self._seconds = name, timeout, list[float]()
        with contextlib.ExitStack() as stack:
            temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folder, no_model = temporary / "server", temporary / "model"  # model_path names the model's own folder
            folder.mkdir()
            no_model.mkdir()
            make_archive(folder, no_model, yaml.safe_dump(settings), root=checkout)
            environment = {"PYTHONPATH": str(checkout), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
            self._server = LocalServer(folder, timeout=timeout, root=checkout, environment=environment)
            self._watch = stack.enter_context(Watch(lambda: measure_server(self._server)))
            started = time.perf_counter()
            try:
                stack.enter_context(self._server)
            except ServerError as error:
                lines = str(error).splitlines()
                reason = [each for each in lines if "Error" in each] or lines[:1]
                raise MeasuringError(f"{name}: {reason[0][-500:]}") from error
            self.start = time.perf_counter() - started
            self._first = self.call()
            self._stack = stack.pop_all()

    def call(self) -> float:
        started = time.perf_counter()
        headers = self._server.get_headers()
        try:
            answer = send_request("POST", self._server.url, data="a red fox", headers=headers, timeout=self._timeout)
            answer.raise_for_status()
        except requests.RequestException as error:
            raise MeasuringError(f"{self._name}: {error}") from error
        self._seconds.append(time.perf_counter() - started)
        return self._seconds[-1]

    def finish(self) -> Figures:
        log = self._server.log
        stages = {
            stage: [
                float(each) for each in re.findall(rf"result=\[METRICS\]ts_handler_{stage}\.Milliseconds:([\d.]+)", log)
            ]
            for stage in _STAGES
        }
        outside = [
            1000 * seconds - sum(parts) for seconds, *parts in zip(self._seconds, *stages.values(), strict=False)
        ]
        samples = [*self._watch.samples, measure_server(self._server)]
        return {
            "first_image": self._first,
            **{f"{stage}_ms": values for stage, values in stages.items()},
            "outside_ms": outside,
            "gigabytes": max(each["MB resident"] for each in samples) / 1000,
            "ran": summarise(self._server.read_document()),
        }

    def close(self) -> None:
        self._stack.close()


def summarise(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the main facts of a server's description. Other checkouts may lack some."""
    models = {
        part: [model for graph in graphs for model in graph["models"]]
        for part, graphs in document.get("openvino", {}).items()
    }
    return {
        **{key: document[key] for key in ("backend", "dtype", "graphs", "graph_breaks") if key in document},
        **{part: [f"{each['precision']} on {'+'.join(each['devices'])}" for each in models[part]] for part in models},
        "from_cache": sum(each["loaded_from_cache"] for part in models.values() for each in part),
    }


def measure_servers(options: argparse.Namespace) -> list[Row]:
    """Measure each `pt2` of each checkout."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.model is None:
            options.model = folder / "tiny"
            run_command(sys.executable, "-m", "tools.random_model", options.model, "--size", "tiny", folder=ROOT)
        starters: dict[str, Callable[[bool], MeasuredServer]] = {}
        for pt2 in options.pt2 or DEFAULTS:
            for checkout in map(Path.absolute, options.checkouts):
                cache = folder / f"cache{len(starters)}"
                settings = complete_settings(checkout, pt2, cache, options)
                entry = yaml.safe_dump(pt2, default_flow_style=True, width=1000).splitlines()[0]
                title = f"{checkout}: {entry}" if options.checkouts[1:] else entry
                starters[title] = partial(MeasuredServer, title, checkout, cache, settings, options.timeout)
        rows = {each: Row(each) for each in starters}
        measure_in_turns(starters, rows, starts=options.starts, calls=options.calls, turns=options.turns)
    return list(rows.values())


def complete_settings(checkout: Path, pt2: Any, cache: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return a checkout's model-config.yaml with the measured settings."""
    if isinstance(pt2, dict) and (pt2.get("options") or {}).get("model_caching"):
        pt2 = {**pt2, "options": {"cache_dir": str(cache), **pt2["options"]}}
    settings = read_shipped(checkout)
    settings["handler"] |= {"profile": True, "model_path": str(options.model.resolve()), **options.handler}
    settings |= {"pt2": pt2, **options.keys}
    return {key: value for key, value in settings.items() if value is not None}


def format_servers(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Return the cells of a table."""
    return [
        {
            "pt2": row.name,
            "s to ready, cold / warm": format_starts(row.list_starts("start")),
            "s of the first image, cold / warm": format_starts(row.list_starts("first_image"), ".2f"),
            "s an image: median (least–most)": format_spread(row.seconds),
            f"× {rows[0].name}, of pairs": format_spread(row.ratios),
            "ms outside the handler": format_spread((row.find("outside_ms") or [])[1:], ".0f"),
            "GB at most, cold / warm": format_starts(row.list_starts("gigabytes")),
            "what ran": "; ".join(str(each) for each in (row.find("ran"), row.problem) if each),
        }
        for row in rows
    ]
