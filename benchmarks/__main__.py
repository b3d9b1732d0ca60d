"""Measure parts of a model, or whole pictures, under each configuration, in processes that take turns; write a report.

Each configuration runs in a process of its own, in rounds: in the first one its cache is empty, in the later ones it is
kept. What stands in the output folder's results.jsonl already is not measured again.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from benchmarks.configurations import LIBRARIES, PARTS, PICTURE, Configuration, ConfigurationError, read_configurations
from benchmarks.report import write_report
from demo.measure import GUIDANCE
from tools.server import ROOT

Record = dict[str, Any]
PEERS = ROOT / ".venv-peers/bin/python"


class MeasuringError(RuntimeError):
    """A process ended without a record; the message is its last word."""


class Run:
    """All measurements of one model on one machine.

    Args:
        listed: all configurations of the file, also those that are not to be measured now.

    Attributes:
        machine: what benchmarks.machine says of it.
    """

    def __init__(self, options: argparse.Namespace, listed: Iterable[Configuration]) -> None:
        self._options = options
        self.machine = run_module("benchmarks.machine", timeout=options.timeout)
        self._has_bf16 = "BF16" in self.machine["openvino_capabilities"]
        self._listed = [dataclasses.asdict(each.settle(self._has_bf16)) for each in listed]
        steady = {name: value for name, value in self.machine.items() if name != "peak_gigaflops"}
        about = {"model": name_model(options.model), "size": options.size, **steady}
        about |= {"steps": options.steps, "num_inference_steps": options.num_inference_steps}
        self._id = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
        self._file: Path = options.output / "results.jsonl"
        kept = [json.loads(line) for line in self._file.read_text().splitlines()] if self._file.exists() else []
        self._records = {_make_key(each): each for each in kept if each["run"] == self._id and "configuration" in each}
        self._append({"run": self._id, "machine": self.machine, "model": options.model.name, "size": options.size})
        # What else the machine does at the time only makes a peak lower.
        peaks = [each["machine"]["peak_gigaflops"] for each in kept if each["run"] == self._id and "machine" in each]
        for name, rate in self.machine["peak_gigaflops"].items():
            self.machine["peak_gigaflops"][name] = max([rate, *(each[name] for each in peaks)])

    @property
    def records(self) -> list[Record]:
        """The measurements so far of what is listed, the last one of each, failed ones included."""
        return [each for each in self._records.values() if each["configuration"] in self._listed]

    def measure(self, configuration: Configuration, part: str, number: int) -> None:
        """Measure one configuration in one round, unless that has been done, and write the report anew."""
        settled = configuration.settle(self._has_bf16)
        entry = {"configuration": dataclasses.asdict(settled), "part": part, "round": number}
        if "failed" not in self._records.get(_make_key(entry), {"failed": "never tried"}):
            return
        started = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "load_average": os.getloadavg()[0]}
        figures: Record
        if reason := self._find_obstacle(settled, part):
            figures = {"skipped": reason}
        else:
            figures = self._run(settled, part, number)
        self._records[_make_key(entry)] = record = {"run": self._id, **entry, **started, **figures}
        self._append(record)

    def _find_obstacle(self, configuration: Configuration, part: str) -> str | None:
        """Return why a configuration cannot be measured here, or None."""
        if configuration.arithmetic == "bf16" and not self._has_bf16:
            return f"no bfloat16 arithmetic among the CPU's {', '.join(self.machine['openvino_capabilities'])}"
        if configuration.native is not None and part == PICTURE:
            return "openvino.convert_model converts parts, not the whole"
        if configuration.peer is not None and part != PICTURE:
            return f"{LIBRARIES[configuration.peer['library']].name} makes whole pictures only (--parts {PICTURE})"
        if configuration.peer is not None and not PEERS.exists():
            return "its environment is missing; make peers makes it"
        return None

    def _run(self, configuration: Configuration, part: str, number: int) -> Record:
        output: Path = self._options.output
        cache = output / "cache" / f"{configuration.name}-{part}"
        if number == 1:
            shutil.rmtree(cache, ignore_errors=True)
        cache.mkdir(parents=True, exist_ok=True)
        job = {
            "configuration": dataclasses.asdict(configuration),
            "model": str(self._options.model),
            "part": part,
            "size": self._options.size,
            "steps": self._options.steps,
            "num_inference_steps": self._options.num_inference_steps,
            "cache": str(cache),
            "reference": str(output / f"reference-{part}-{self._id}.pt"),
            "sheet": str(output / f"{configuration.name}.jpg"),
        }
        python = sys.executable if configuration.peer is None else str(PEERS)
        module = "benchmarks.pictures" if part == PICTURE else "benchmarks.measure"
        try:
            return run_module(module, json.dumps(job), python=python, cache=cache, timeout=self._options.timeout)
        except MeasuringError as error:
            return {"failed": str(error)}

    def _append(self, record: Record) -> None:
        with self._file.open("a") as stream:
            stream.write(json.dumps(record) + "\n")


def _make_key(record: Record) -> str:
    return json.dumps([record[name] for name in ("configuration", "part", "round")])


def run_module(
    name: str, *arguments: str, timeout: float, cache: Path | None = None, python: str = sys.executable
) -> Record:
    """Run a module in a process of its own and return the JSON on its last line.

    Args:
        timeout: in seconds.
        cache: see make_environment.

    Raises:
        MeasuringError: it failed, or took too long.
    """
    environment = make_environment(cache)
    command = [python, "-m", name, *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise MeasuringError(f"not finished after {timeout:g} s") from None
    if done.returncode:
        word = "killed, as where memory runs out" if done.returncode == -9 else find_last_word(done.stderr)
        raise MeasuringError(f"exit code {done.returncode}: {word}")
    return json.loads(done.stdout.splitlines()[-1])


def make_environment(cache: Path | None) -> dict[str, str]:
    """Return the environment of a process that measures.

    Args:
        cache: for Inductor, whose folder is the user's own otherwise.
    """
    inductor = {} if cache is None else {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    return {**os.environ, "TOKENIZERS_PARALLELISM": "false", **inductor}


def find_last_word(errors: str) -> str:
    """Return the last line of what a process said, which names what went wrong, cut short."""
    return (errors.strip().splitlines()[-1:] or ["no message"])[0][:500]


def name_model(folder: Path) -> list[Any]:
    """Return what tells one model from another without reading its weights."""
    files = [(path.relative_to(folder), path.stat()) for path in sorted(folder.rglob("*.safetensors"))]
    return [[str(name), about.st_size, about.st_mtime_ns] for name, about in files]


def choose(configurations: Sequence[Configuration], only: Iterable[str]) -> list[Configuration]:
    """Return the configurations of these names, or all, and always the first, which the errors are measured against.

    Raises:
        ConfigurationError: a name that is not there.
    """
    names = [each.name for each in configurations]
    for name in only:
        if name not in names:
            raise ConfigurationError(f"--only takes {', '.join(names)}, not {name!r}")
    return [each for each in configurations if not only or each.name in (names[0], *only)]


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the small model of this project, in a few minutes")
    parser.add_argument("--model", type=Path, help="a pipeline's folder (default: build/base, at SDXL's real size)")
    parser.add_argument("--size", type=int, help="width and height in pixels (default: 512; quick: 128)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these and the first one")
    parser.add_argument("--parts", nargs="+", default=["unet"], choices=(*PARTS, PICTURE), help="(default: unet)")
    parser.add_argument("--rounds", type=int, default=2, help="the first is a cold start (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="calls to time in each process (default: 3; quick: 20)")
    parser.add_argument("--num-inference-steps", type=int, help="of a whole picture (default: 4; quick: 10)")
    parser.add_argument("--timeout", type=float, default=1800, metavar="SECONDS", help="for one process")
    parser.add_argument("--output", type=Path, help="a folder (default: build/benchmarks)")
    parser.add_argument("--configurations", type=Path, default=Path(__file__).with_name("configurations.yaml"))
    parser.add_argument("--shortcuts", action="store_true", help="judge what leaves out calls of the UNet instead")
    parser.add_argument("--errors", action="store_true", help="tell where the error of 8 bits comes from instead")
    parser.add_argument("--prompts", type=int, default=100, help="with --shortcuts (default: %(default)s)")
    parser.add_argument("--calls", type=int, nargs="+", default=[11, 8], help="with --shortcuts (default: 11 8)")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="with --shortcuts (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="with --shortcuts; auto: as served (default: %(default)s)")
    parser.add_argument(
        "--pt2", type=yaml.safe_load, default="openvino", help="with --shortcuts, as in model-config.yaml"
    )
    parser.add_argument(
        "--handler", type=yaml.safe_load, default={}, help="with --shortcuts, further settings: {vae_path: ...}"
    )
    options = parser.parse_args(argv)
    if options.shortcuts:
        options.quick, options.num_inference_steps = options.model is None, options.num_inference_steps or 30
    options.model = (options.model or ROOT / ("demo/model" if options.quick else "build/base")).resolve()
    options.size = options.size or (128 if options.quick else 512)
    options.steps = options.steps or (20 if options.quick else 3)
    options.num_inference_steps = options.num_inference_steps or (10 if options.quick else 4)
    options.output = (options.output or ROOT / "build/benchmarks").resolve()
    if not (options.model / "model_index.json").exists():
        parser.error(
            f"--model takes the folder of a pipeline, which {options.model} is not; "
            "python -m tools.random_model build/base --size base makes one"
        )
    if options.errors and PICTURE in options.parts:
        parser.error(f"--errors takes --parts {', '.join(PARTS)}, not {PICTURE}")
    return options


def judge_shortcuts(options: argparse.Namespace) -> None:
    """Write the table of shortcuts, and show it."""
    from benchmarks.shortcuts import judge_ways, list_ways

    output: Path = options.output / "shortcuts"
    output.mkdir(parents=True, exist_ok=True)
    size = {"width": options.size, "height": options.size}
    settings = {"dtype": options.dtype, "guidance_scale": options.guidance, **size, **options.handler}
    ways = list_ways(options.num_inference_steps, options.calls)
    if unknown := [name for name in options.only if name not in ways]:
        sys.exit(f"benchmarks: --only takes {', '.join(map(repr, ways))}, not {unknown[0]!r}")
    chosen = {name: fields for name, fields in ways.items() if not options.only or name in ("full", *options.only)}
    judge_ways(options.model, chosen, settings=settings, pt2=options.pt2, count=options.prompts, output=output)
    print((output / "shortcuts.md").read_text())


def judge_errors(options: argparse.Namespace) -> None:
    """Write the table of errors, and show it."""
    from benchmarks.errors import write_errors

    path = options.output / "errors.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_errors(options.model, options.parts, size=options.size, path=path)
    print(path.read_text())


def main(argv: Sequence[str] | None = None) -> None:
    options = read_options(argv)
    if options.shortcuts or options.errors:
        (judge_shortcuts if options.shortcuts else judge_errors)(options)
        return
    try:
        listed = read_configurations(options.configurations)
        configurations = choose(listed, options.only)
    except ConfigurationError as error:
        sys.exit(f"benchmarks: {error}")
    options.output.mkdir(parents=True, exist_ok=True)
    run = Run(options, listed)
    planned = [
        (configuration, part, number)
        for part in options.parts
        for number in range(1, options.rounds + 1)
        for configuration in configurations
    ]
    for configuration, part, number in (bar := tqdm(planned, disable=None, unit="process")):
        bar.set_postfix_str(f"{configuration.name}, {part}, round {number}")
        run.measure(configuration, part, number)
        write_report(options.output, run.machine, run.records, title=f"{options.model.name}, {options.size}² pixels")
    shutil.rmtree(options.output / "cache", ignore_errors=True)


if __name__ == "__main__":
    main()
