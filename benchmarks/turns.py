"""Time configurations that take turns, call by call: python -m benchmarks.turns --only NAME NAME ...

Where other work shares the machine its speed changes from one process to the next, and less from one call to the next:
the ratios of calls made one after the other say more than those of medians. Each configuration has a process of its
own, and all of them are in memory at the same time.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import openvino
import torch

from benchmarks.__main__ import MeasuringError, choose, find_last_word, make_environment
from benchmarks.configurations import PARTS, Configuration, ConfigurationError, read_configurations
from benchmarks.measure import Job, load_weights, prepare, time_calls
from benchmarks.parts import Part
from tools.server import ROOT


def answer(job: Job) -> None:
    """Make the part ready, and make a call for each line that comes; print the seconds of each."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print too
    part = Part(Path(job.model), job.part, str(job.configuration.weights), job.size)
    load_weights(part, job.configuration, Path(job.cache))
    run, tell = prepare(part, job.configuration, Path(job.cache))
    run(**part.inputs)
    print(json.dumps(tell()["ran"]), file=replies, flush=True)
    for _, (_, seconds) in zip(sys.stdin, time_calls(run, part), strict=False):
        print(json.dumps(seconds), file=replies, flush=True)


class Player:
    """A configuration in a process of its own.

    Attributes:
        ran: what runs there.
        seconds: of its calls.
    """

    def __init__(self, job: Job, folder: Path) -> None:
        self.name, self._errors = job.configuration.name, folder / f"{job.configuration.name}.log"
        environment = make_environment(Path(job.cache))
        command = [sys.executable, "-m", "benchmarks.turns", "--job", job.write()]
        pipe = subprocess.PIPE
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=errors, text=True
            )
        self.ran, self.seconds = json.loads(self._read()), list[float]()

    def play(self) -> None:
        """Make a call."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.seconds.append(float(self._read()))

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise MeasuringError(f"{self.name} has ended: {find_last_word(self._errors.read_text())}")
        return line


@contextlib.contextmanager
def start(configurations: Sequence[Configuration], options: argparse.Namespace) -> Iterator[list[Player]]:
    """Give the processes, each ready."""
    has_bf16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
        players = []
        for each in configurations:
            cache = Path(temporary, each.name)
            cache.mkdir()
            unused = {"steps": 0, "num_inference_steps": 0, "reference": "", "sheet": ""}
            about = {"model": str(options.model.resolve()), "part": options.part, "size": options.size, **unused}
            players.append(Player(Job(each.settle(has_bf16), cache=str(cache), **about), Path(temporary)))
            stack.callback(players[-1].close)
        yield players


def write_table(players: Sequence[Player]) -> str:
    """Return the seconds of each, and of the pairs of each round the ratio to the first one's."""
    first = players[0]
    lines = [
        f"| configuration | s a call: median (least–most) | × {first.name}, of pairs | what ran |",
        "|---|---|---|---|",
    ]
    for each in players:
        ratios = [other / own for other, own in zip(first.seconds, each.seconds, strict=True)]
        cells = [f"{statistics.median(row):.2f} ({min(row):.2f}–{max(row):.2f})" for row in (each.seconds, ratios)]
        lines.append(f"| {each.name} | {cells[0]} | {cells[1]} | {each.ran} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.turns", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="what to time; ratios are to the first")
    parser.add_argument("--model", type=Path, default=ROOT / "build/base", help="a pipeline's folder")
    parser.add_argument("--part", default="unet", choices=PARTS)
    parser.add_argument("--size", type=int, default=512, help="the picture's width and height in pixels")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--configurations", type=Path, default=Path(__file__).with_name("configurations.yaml"))
    parser.add_argument("--job", type=Job.read, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not options.only and not options.job:
        parser.error("--only takes the names of configurations")
    if options.job:
        with torch.no_grad():
            answer(options.job)
        return
    try:
        parts = [each for each in read_configurations(options.configurations) if each.peer is None]
        listed = {each.name: each for each in choose(parts, options.only)}
        with start([listed[name] for name in options.only], options) as players:
            for _ in range(options.rounds):
                for each in players:
                    each.play()
            print(write_table(players))
    except (ConfigurationError, MeasuringError) as error:
        sys.exit(f"benchmarks.turns: {error}")


if __name__ == "__main__":
    main()
