"""Restart every instance behind HAProxy in turn, so that no request is lost; exit with 0 when all are back.

Each is drained (it gets nothing new, and finishes what it has), restarted by a command, waited for, and put back.
"""

import argparse
import csv
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import requests

PAUSE_SECONDS = 0.2


class RollingError(RuntimeError):
    """An instance has not come back; those after it have not been touched."""


class Haproxy:
    """HAProxy's own command line.

    Args:
        path: its `stats socket`.
        backend: of the instances.
    """

    def __init__(self, path: Path, backend: str) -> None:
        self._path, self.backend = path, backend

    def order(self, command: str) -> str:
        """Return the answer to a command.

        Raises:
            RollingError: HAProxy cannot be reached.
        """
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(str(self._path))
            except OSError as error:
                raise RollingError(f"no HAProxy at {self._path}: {error.strerror}") from error
            connection.sendall(f"{command}\n".encode())
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode()

    def read_servers(self) -> dict[str, dict[str, str]]:
        """Return what HAProxy tells of each instance, by its name."""
        rows = csv.DictReader(self.order("show stat").removeprefix("# ").splitlines())
        mine = {row["svname"]: row for row in rows if row["pxname"] == self.backend}
        return {name: row for name, row in mine.items() if name not in ("FRONTEND", "BACKEND")}

    def find_ready_url(self, server: str) -> str:
        """Return the address where HAProxy asks an instance whether it is ready."""
        lines = self.order(f"show servers state {self.backend}").splitlines()
        names = lines[1].removeprefix("# ").split()
        rows = [dict(zip(names, line.split(), strict=True)) for line in lines[2:] if line]
        row = next(row for row in rows if row["srv_name"] == server)
        return f"http://{row['srv_addr']}:{row['srv_check_port']}/ready"

    def set_state(self, server: str, state: str) -> None:
        """Give an instance a state: drain or ready.

        Raises:
            RollingError: HAProxy does not take it.
        """
        answer = self.order(f"set server {self.backend}/{server} state {state}").strip()
        if answer:
            raise RollingError(f"HAProxy on {self.backend}/{server}: {answer}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Restart all in turn; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sdxl_server.serving.rolling_restart", description=__doc__)
    parser.add_argument("--socket", type=Path, default=Path("/run/haproxy/admin.sock"), help="HAProxy's stats socket")
    parser.add_argument("--backend", default="pictures", metavar="NAME")
    parser.add_argument(
        "--restart",
        default="systemctl restart torchserve@{}",
        metavar="COMMAND",
        help="what restarts an instance, whose name stands for {}; it returns when the old one has gone",
    )
    parser.add_argument(
        "--wait", type=float, default=3600, metavar="SECONDS", help="for a request to end, and for a model to load"
    )
    options = parser.parse_args(arguments)
    haproxy = Haproxy(options.socket, options.backend)
    try:
        servers = list(haproxy.read_servers())
        if not servers:
            raise RollingError(f"{options.backend} has no servers")
        for server in servers:
            restart(haproxy, server, options.restart.replace("{}", server), seconds=options.wait)
            print(f"{server}: restarted")
    except RollingError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def restart(haproxy: Haproxy, server: str, command: str, *, seconds: float) -> None:
    """Drain an instance, restart it, and put it back when it is ready.

    Raises:
        RollingError: it does not end its work, or does not come back, in time; it stays drained.
    """
    ready_url = haproxy.find_ready_url(server)
    haproxy.set_state(server, "drain")
    wait_for(lambda: haproxy.read_servers()[server]["scur"] == "0", f"{server} has not ended its work", seconds)
    done = subprocess.run(command, shell=True, check=False)
    if done.returncode:
        raise RollingError(f"{command} has ended with {done.returncode}; {server} stays drained")
    wait_for(lambda: is_ready(ready_url), f"{server} is not ready at {ready_url}", seconds)
    haproxy.set_state(server, "ready")
    wait_for(lambda: haproxy.read_servers()[server]["status"] == "UP", f"HAProxy does not see {server}", seconds)


def is_ready(url: str) -> bool:
    """Ask an instance itself, since HAProxy's last look may have been at the old one."""
    try:
        return requests.get(url, timeout=5).status_code == 200
    except requests.RequestException:
        return False


def wait_for(condition: Callable[[], bool], what: str, seconds: float) -> None:
    """Wait until a condition holds.

    Raises:
        RollingError: it has not within so many seconds; says what has not come about.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RollingError(f"{what} within {seconds:g} s")
        time.sleep(PAUSE_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
