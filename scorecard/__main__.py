"""Put a server under load, faults and hostile input, and print a scorecard; exit with 1 when a line falls short.

It serves the demonstration model with the default settings, except those that a line changes. Each line starts its own
server. `--quick` does the same in minutes, with lower counts.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import requests

from scorecard.faults import check_cycles, check_disk, check_kills, check_stopped_worker
from scorecard.hostile import check_attacks, check_bodies, check_fuzz, check_tokens
from scorecard.load import check_crowd, check_kinds, check_leavers, check_queue, check_soak
from scorecard.site import QUICK, Line, Scale, Site
from tools.server import ServerError

LINES: dict[str, Callable[[Site, Scale], list[Line]]] = {
    "soak": check_soak,
    "kills": check_kills,
    "stopped": check_stopped_worker,
    "kinds": check_kinds,
    "crowd": check_crowd,
    "fuzz": check_fuzz,
    "attacks": check_attacks,
    "leavers": check_leavers,
    "queue": check_queue,
    "bodies": check_bodies,
    "cycles": check_cycles,
    "tokens": check_tokens,
    "disk": check_disk,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the same with lower counts, in minutes")
    parser.add_argument("--only", nargs="+", choices=LINES, default=list(LINES), metavar="LINE", help=", ".join(LINES))
    options = parser.parse_args(argv)
    scale = QUICK if options.quick else Scale()
    print(f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB", flush=True)
    all_passed = True
    with tempfile.TemporaryDirectory(prefix="soak-cache-") as cache:
        for name in options.only:
            try:
                lines = LINES[name](Site(Path(cache)), scale)
            except (ServerError, requests.RequestException, OSError) as error:
                lines = [Line(name, False, f"{type(error).__name__}: {error}"[-2000:])]
            for line in lines:
                print(f"{'pass' if line.passed else 'FAIL'}  {line.name}: {line.detail}", flush=True)
                all_passed &= line.passed
    return 0 if all_passed else 1


if __name__ == "__main__":
    sys.exit(main())
