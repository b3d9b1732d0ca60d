"""One configuration in a process of its own: `python -m benchmarks.worker JOB`.

It replies with a JSON line to its start and to each line of stdin. At the end of stdin it replies with a record.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.configurations import IMAGE, Configuration
from benchmarks.machine import read_peak_memory


@dataclass(frozen=True)
class Job:
    """One process to run.

    Attributes:
        configuration: with its arithmetic and the type of its weights chosen.
        model: the pipeline's folder.
        part: a part's name, or IMAGE.
        size: the image's width and height in pixels.
        steps: denoising steps of an image.
        cache: the folder of this configuration's cache.
        reference: the file of the results to compare with, written if it is missing; empty compares nothing.
        images: a folder for the images, or empty.
    """

    configuration: Configuration
    model: str
    part: str
    size: int
    steps: int
    cache: str
    reference: str = ""
    images: str = ""

    @classmethod
    def read(cls, text: str) -> "Job":
        raw = json.loads(text)
        return cls(**{**raw, "configuration": Configuration(**raw["configuration"])})


@dataclass(frozen=True)
class Engine:
    """A loaded part or pipeline.

    Attributes:
        call: makes the call of this number; numbers have different inputs.
        describe: reports what ran, after a call.
        judge: returns the error of results, and other figures about them.
    """

    call: Callable[[int], Any]
    describe: Callable[[], dict[str, Any]]
    judge: Callable[[list[Any]], dict[str, Any]]


def compute_error(results: Sequence[torch.Tensor], reference: Path) -> dict[str, Any]:
    """Return the relative L2 distance of results to the reference. Write the reference if it is missing."""
    result = torch.cat([each.detach().float().flatten() for each in results])
    if not bool(result.isfinite().all()):
        return {"error": None, "problem": "results are not finite"}
    if not reference.exists():
        torch.save(result, reference)
        return {"error": 0.0}
    expected = torch.load(reference, weights_only=True)
    return {"error": float((result - expected).norm() / expected.norm())}


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print too
    # When memory runs out, the kernel ends this process before others.
    Path("/proc/self/oom_score_adj").write_text("1000")
    job, results = Job.read(sys.argv[1]), list[Any]()
    load: Callable[[Job], Engine]
    if job.part == IMAGE:
        from benchmarks.images import load_images as load
    else:
        from benchmarks.engines import load_part as load

    def reply(value: Any) -> None:
        print(json.dumps(value), file=replies, flush=True)

    def time_call(number: int) -> float:
        started = time.perf_counter()
        result = engine.call(number)
        seconds = time.perf_counter() - started
        if job.reference:
            results.append(result)
        return seconds

    with torch.no_grad():
        started = time.perf_counter()
        engine = load(job)
        time_call(0)
        reply(time.perf_counter() - started)
        for number, _ in enumerate(sys.stdin, 1):
            reply(time_call(number))
        record = {"gigabytes": read_peak_memory(), **engine.describe()}
        reply({**(engine.judge(results) if results else {}), **record})


if __name__ == "__main__":
    main()
