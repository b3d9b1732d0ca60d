"""Measure parts and whole images: each configuration runs in processes of its own, in turns with the first one."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.configurations import IMAGE, Configuration
from benchmarks.machine import describe_machine
from benchmarks.turns import (
    Measured,
    MeasuredProcess,
    MeasuringError,
    Row,
    format_number,
    format_spread,
    format_starts,
    measure_in_turns,
)
from benchmarks.worker import Job
from tools.server import ROOT

PEERS = ROOT / ".venv-peers/bin/python"
REFERENCE = Configuration("reference", "f32", "float32")  # eager PyTorch


def compare_configurations(
    part: str, chosen: Sequence[Configuration], options: argparse.Namespace, folder: Path
) -> list[Row]:
    """Measure all configurations of a part, or of whole images. The folder takes caches and the reference results.

    Raises:
        MeasuringError: the reference failed.
    """
    capabilities = describe_machine()["openvino_capabilities"]
    settled = {each.name: each.settle("BF16" in capabilities) for each in chosen}

    def start(configuration: Configuration, is_alone: bool) -> Measured:
        cache = folder / part / configuration.name
        cache.mkdir(parents=True, exist_ok=True)
        files = {"reference": str(folder / f"{part}.pt"), "images": str(options.images or "")} if is_alone else {}
        job = Job(configuration, str(options.model), part, options.size, options.steps, str(cache), **files)
        python = sys.executable if configuration.peer is None else str(PEERS)
        return MeasuredProcess(job, python=python, timeout=options.timeout)

    reference = Row(REFERENCE.name)
    starters = {REFERENCE.name: partial(start, REFERENCE)}
    measure_in_turns(starters, {REFERENCE.name: reference}, starts=1, calls=options.calls, turns=0)
    if reference.problem:
        raise MeasuringError(f"errors need eager PyTorch in float32, which failed: {reference.problem}")
    rows = {name: Row(name, problem=find_obstacle(each, part, capabilities)) for name, each in settled.items()}
    starters = {name: partial(start, each) for name, each in settled.items() if rows[name].problem is None}
    if starters:
        measure_in_turns(starters, rows, starts=options.starts, calls=options.calls, turns=options.turns)
    return list(rows.values())


def find_obstacle(configuration: Configuration, part: str, capabilities: Sequence[str]) -> str | None:
    """Return why a configuration cannot run here, or None."""
    if configuration.arithmetic == "bf16" and "BF16" not in capabilities:
        return f"no bfloat16 arithmetic among the CPU's {', '.join(capabilities)}"
    if configuration.native is not None and part == IMAGE:
        return "openvino.convert_model converts parts only; measure it with `parts`"
    if configuration.peer is not None and part != IMAGE:
        return f"{configuration.peer['library']} draws whole images only; measure it with `images`"
    if configuration.peer is not None and not PEERS.exists():
        return "its environment is missing; run make peers"
    return None


def format_comparison(rows: Sequence[Row], part: str) -> list[dict[str, str]]:
    """Return the cells of a table."""
    first = next((row.name for row in rows if row.ratios), rows[0].name)
    return [
        {
            "configuration": row.name,
            "s a call: median (least–most)": format_spread(row.seconds),
            f"× {first}, of pairs": format_spread(row.ratios),
            "error": format_number(row.find("error"), ".2g"),
            **({"drawn right": format_number(row.find("score"), ".0%")} if part == IMAGE else {}),
            "s to the first, cold / warm": format_starts(row.list_starts("start")),
            "GB, cold / warm": format_starts(row.list_starts("gigabytes")),
            "what ran": "; ".join(filter(None, (row.find("ran"), row.find("problem"), row.problem))),
        }
        for row in rows
    ]
