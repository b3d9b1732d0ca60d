"""Measure in turns: start by start, then call by call.

Other work on a machine changes its speed within minutes. So the ratio of two calls in direct succession says more than
the ratio of two medians. The first row stays in memory. Each other row joins it, alternates with it and leaves.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from benchmarks.worker import Job
from tools.server import ROOT

Figures = dict[str, Any]


class MeasuringError(RuntimeError):
    """A measured process failed. The message has its last line."""


class Measured(Protocol):
    """A started configuration; `start` is the seconds until it was ready.

    `call` makes a call and returns its seconds. `finish` returns what ran, the memory and other figures.
    """

    start: float

    def call(self) -> float: ...
    def finish(self) -> Figures: ...
    def close(self) -> None: ...


class MeasuredProcess:
    """A process of benchmarks.worker.

    Args:
        python: the interpreter of its environment.
        timeout: seconds for one reply.

    Raises:
        MeasuringError: the process failed.
    """

    def __init__(self, job: Job, *, python: str = sys.executable, timeout: float) -> None:
        self._name, self._log, self._timeout = job.configuration.name, Path(job.cache, "worker.log"), timeout
        # Inductor's cache is the user's own by default.
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "TORCHINDUCTOR_CACHE_DIR": job.cache}
        command, pipe = [python, "-m", "benchmarks.worker", json.dumps(dataclasses.asdict(job))], subprocess.PIPE
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=log, text=True
            )
        self.start = float(self._read())

    def call(self) -> float:
        with contextlib.suppress(BrokenPipeError):  # _read() reports the reason
            self._stdin.write("\n")
            self._stdin.flush()
        return float(self._read())

    def finish(self) -> Figures:
        self._stdin.close()
        return dict(self._read())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def _stdin(self) -> Any:
        return self._process.stdin

    def _read(self) -> Any:
        timer = threading.Timer(self._timeout, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()  # type: ignore[union-attr]
        timed_out = not timer.is_alive()
        timer.cancel()
        if line:
            return json.loads(line)
        code = self._process.wait()
        problem = f"exit code {code}: {(self._log.read_text().strip().splitlines() or ['no message'])[-1][:500]}"
        if timed_out:
            problem = f"no reply within {self._timeout:g} s"
        elif code == -9:
            problem = "the process was killed; memory may have run out"
        raise MeasuringError(f"{self._name}: {problem}")


@dataclass
class Row:
    """Figures of one configuration.

    Attributes:
        starts: figures of each start alone; the first one has an empty cache.
        turns: figures of the start in turns.
        seconds: of its calls in turns.
        ratios: seconds of the first row's call, divided by the seconds of the call after it.
        problem: why figures are missing, or None.
    """

    name: str
    starts: list[Figures] = field(default_factory=list)
    turns: Figures = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    problem: str | None = None

    def find(self, key: str) -> Any:
        """Return the last known value of a figure, or None."""
        return next((each[key] for each in (self.turns, *reversed(self.starts)) if each.get(key) is not None), None)

    def list_starts(self, key: str) -> list[Any]:
        """Return a figure of all starts, the cold one first."""
        return [each[key] for each in (*self.starts, self.turns) if key in each]


def measure_in_turns(
    starters: Mapping[str, Callable[[bool], Measured]],
    rows: Mapping[str, Row],
    *,
    starts: int,
    calls: int,
    turns: int,
) -> None:
    """Fill the rows: `starts` starts of each alone, with `calls` calls, then its `turns` with the first one.

    Args:
        starters: start each configuration; their argument says whether it is alone.
    """
    for name in tqdm([*starters] * starts, desc="alone", disable=None):
        if rows[name].problem is None:
            _measure_alone(starters[name], rows[name], calls)
    base, *others = [name for name in starters if rows[name].problem is None] or [""]
    if base and not others:
        rows[base].seconds = [each for start in rows[base].starts for each in start["calls"]]
    with contextlib.ExitStack() as stack:
        first: Measured | None = None
        for name in tqdm(others, desc="in turns", disable=None):
            try:
                first = first or stack.enter_context(contextlib.closing(starters[base](False)))
                _take_turns(first, rows[base], starters[name], rows[name], turns)
            except MeasuringError as error:
                rows[name].problem = str(error)
                stack.close()  # one of the two has failed
                first = None
        if first is not None:
            rows[base].turns = {"start": first.start, **first.finish()}


def _measure_alone(start: Callable[[bool], Measured], row: Row, calls: int) -> None:
    try:
        with contextlib.closing(start(True)) as measured:
            seconds = [measured.call() for _ in range(calls)]
            row.starts.append({"start": measured.start, "calls": seconds, **measured.finish()})
    except MeasuringError as error:
        row.problem = str(error)


def _take_turns(first: Measured, base: Row, start: Callable[[bool], Measured], row: Row, turns: int) -> None:
    """Alternate calls of two rows."""
    with contextlib.closing(start(False)) as other:
        for _ in range(turns):
            own = first.call()
            row.seconds.append(other.call())
            base.seconds.append(own)
            base.ratios.append(1.0)
            row.ratios.append(own / row.seconds[-1])
        row.turns = {"start": other.start, **other.finish()}


def format_spread(values: Sequence[float], form: str = ".3g") -> str:
    """Return the median, the least and the most."""
    if not values:
        return "–"
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def format_number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def format_starts(values: Sequence[float], form: str = ".1f") -> str:
    """Return the value of the cold start and the median of the warm ones."""
    warm = statistics.median(values[1:]) if values[1:] else None
    return f"{format_number(values[0], form)} / {format_number(warm, form)}" if values else "–"


def format_table(columns: Sequence[Mapping[str, str]]) -> str:
    """Return a Markdown table of rows that map headings to cells."""
    headings = list(columns[0])
    lines = [headings, ["---"] * len(headings), *(list(row.values()) for row in columns)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
