"""The ports that the servers of this machine are given."""

import subprocess
import sys
from subprocess import PIPE

from tools.server import ROOT

COUNT = 300  # of some 14,000: by chance alone two processes would have a few in common
CODE = f"from tools.server import find_free_ports; print(*find_free_ports({COUNT}), flush=True); input()"


def test_processes_that_run_at_a_time_have_different_ports() -> None:
    command = [sys.executable, "-c", CODE]
    running = [subprocess.Popen(command, cwd=ROOT, text=True, stdin=PIPE, stdout=PIPE) for _ in range(2)]
    told = [process.stdout.readline() for process in running if process.stdout]
    for process in running:
        process.communicate("\n")
    ports = " ".join(told).split()
    assert len(set(ports)) == len(ports) == 2 * COUNT
