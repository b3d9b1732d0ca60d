"""Simulate one queue before many workers, for docs/scaling.md: `python -m tools.simulate_queue --seconds 41`.

Requests come at random (Poisson); a picture takes the same time on each worker, within a spread; whoever comes first
is served first, by whichever worker is free. It prints, for numbers of workers, how long requests wait at which
utilisation, and how many workers a rate of pictures takes.
"""

import argparse
import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

WORKERS = (1, 2, 3, 5, 10, 30, 100, 300, 1000)
UTILISATIONS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
MOST_BUSY = 0.95  # room for one that fails
RATES = (1, 100, 10_000)  # pictures a minute


@dataclass(frozen=True)
class Waits:
    """How long requests waited, in seconds."""

    mean: float
    most_of_95: float


def simulate(workers: int, utilisation: float, *, seconds: float, spread: float, requests: int, seed: int = 0) -> Waits:
    """Return the waits of this many requests, those of the first tenth left out, in which the queue fills.

    Args:
        seconds: that a picture takes.
        spread: by how much it may take less or more, as a share.
    """
    chance = random.Random(seed)
    free_at = [0.0] * workers
    now, waits = 0.0, []
    for _ in range(requests):
        now += chance.expovariate(workers * utilisation / seconds)
        begun = max(now, free_at[0])
        heapq.heapreplace(free_at, begun + seconds * chance.uniform(1 - spread, 1 + spread))
        waits.append(begun - now)
    counted = sorted(waits[requests // 10 :])
    return Waits(sum(counted) / len(counted), counted[int(0.95 * len(counted))])


def find_workers(rate: float, *, seconds: float, spread: float, requests: int) -> int:
    """Return the fewest workers, at MOST_BUSY at most, with which 95% of the requests wait for a picture or less."""
    workers = math.ceil(rate / 60 * seconds / MOST_BUSY)
    while True:
        utilisation = rate / 60 * seconds / workers
        if simulate(workers, utilisation, seconds=seconds, spread=spread, requests=requests).most_of_95 <= seconds:
            return workers
        workers += max(1, workers // 200)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.simulate_queue", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--seconds", type=float, required=True, help="that a picture takes, as measured")
    parser.add_argument("--spread", type=float, default=0.1, metavar="SHARE", help="by which that varies")
    parser.add_argument("--requests", type=int, default=100_000, metavar="N", help="for each figure")
    options = parser.parse_args(arguments)
    given = {"seconds": options.seconds, "spread": options.spread, "requests": options.requests}
    print(f"seconds of waiting, mean / 95% within; a picture takes {options.seconds:g} s")
    print("| workers | " + " | ".join(f"{each:.0%}" for each in UTILISATIONS) + " |")
    print("| --- |" + " --- |" * len(UTILISATIONS))
    for workers in WORKERS:
        waits = [simulate(workers, utilisation, **given) for utilisation in UTILISATIONS]
        print(f"| {workers} | " + " | ".join(f"{each.mean:.1f} / {each.most_of_95:.1f}" for each in waits) + " |")
    print("\n| pictures a minute | workers | utilisation |\n| --- | --- | --- |")
    for rate in RATES:
        workers = find_workers(rate, **given)
        print(f"| {rate:,} | {workers:,} | {rate / 60 * options.seconds / workers:.0%} |")


if __name__ == "__main__":
    main()
