"""Measure pictures through the server, one configuration of `pt2` after the other; one line of JSON for each."""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests
import yaml

from scorecard.clients import Watch, measure_server
from tools.server import ROOT, LocalServer, make_archive, read_shipped, run_command


def make_model() -> Path:
    """Return the folder of the small model, made at the first call."""
    folder = ROOT / "build" / "tiny-sdxl"
    if not (folder / "model_index.json").exists():
        run_command(sys.executable, "-m", "tools.random_model", folder, "--size", "tiny", folder=ROOT)
    return folder


def measure(
    pt2: Any, handler: dict[str, Any], keys: dict[str, Any], *, model: Path, requests_made: int
) -> dict[str, Any]:
    """Serve some pictures and return the times in seconds, and what ran."""
    settings = read_shipped()
    settings["handler"] |= {"profile": True, **handler}
    settings |= {"pt2": pt2, **keys}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_archive(
            folder, model, yaml.safe_dump({key: value for key, value in settings.items() if value is not None})
        )
        server, started = LocalServer(folder, timeout=3600), time.perf_counter()
        with Watch(lambda: measure_server(server)) as watch, server:
            ready, times = time.perf_counter() - started, []
            for _ in range(requests_made):
                started = time.perf_counter()
                answer = requests.post(server.url, data="a red fox", headers=server.get_headers(), timeout=3600)
                answer.raise_for_status()
                times.append(time.perf_counter() - started)
            ran, resident = server.read_document(), measure_server(server)["MB resident"]
            stages = {
                stage: [
                    float(value)
                    for value in re.findall(rf"result=\[METRICS\]ts_handler_{stage}\.Milliseconds:([\d.]+)", server.log)
                ]
                for stage in ("preprocess", "inference", "postprocess")
            }
    outside = [1000 * seconds - sum(parts) for seconds, *parts in zip(times, *stages.values(), strict=True)]
    return {
        "pt2": pt2,
        "ready": round(ready, 1),
        "first": round(times[0], 2),
        "later_median": round(statistics.median(times[1:]), 2),
        "later_spread": [round(min(times[1:]), 2), round(max(times[1:]), 2)],
        "inference_ms_median": round(statistics.median(stages["inference"][1:]), 1),
        "postprocess_ms": [round(value, 1) for value in stages["postprocess"]],
        "outside_ms_median": round(statistics.median(outside[1:]), 1),
        "outside_ms_spread": [round(min(outside[1:]), 1), round(max(outside[1:]), 1)],
        "resident_gigabytes": round(resident / 1000, 1),
        "peak_gigabytes": round(max(sample["MB resident"] for sample in watch.samples) / 1000, 1),
        "ran": summarise(ran),
    }


def summarise(ran: dict[str, Any]) -> dict[str, Any]:
    """Return the part of the server's description that a table has room for."""
    models = {
        part: [model for graph in graphs for model in graph["models"]]
        for part, graphs in ran.get("openvino", {}).items()
    }
    return {
        **{key: ran[key] for key in ("backend", "dtype", "graphs", "graph_breaks")},
        **{part: [f"{each['precision']} on {'+'.join(each['devices'])}" for each in models[part]] for part in models},
        "from_cache": sum(each["loaded_from_cache"] for part in models.values() for each in part),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pt2", nargs="*", help="configurations as YAML (default: docs/benchmarks.md's first table)")
    parser.add_argument("--model", type=Path, help="a pipeline's folder (default: a small one with random weights)")
    parser.add_argument("--handler", default="{}", help="settings of the handler section as YAML")
    parser.add_argument("--keys", default="{}", help="TorchServe's own keys of model-config.yaml as YAML")
    parser.add_argument("--requests", type=int, default=5, metavar="N", help="from 2 (default: %(default)s)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # so that Inductor starts cold too
        cached = {"backend": "openvino", "options": {"model_caching": True, "cache_dir": cache}}
        inductor = {"backend": "inductor", "mode": "reduce-overhead"}
        chosen = [yaml.safe_load(text) for text in options.pt2] or [None, inductor, "openvino", cached, cached]
        for pt2 in chosen:
            figures = measure(
                pt2,
                yaml.safe_load(options.handler),
                yaml.safe_load(options.keys),
                model=options.model or make_model(),
                requests_made=options.requests,
            )
            print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
