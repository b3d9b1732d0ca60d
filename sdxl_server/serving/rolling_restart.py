"""Restart every instance behind HAProxy, one after another, without losing a request.

Each instance is drained: it finishes its requests and gets no new ones. Then a command restarts it, and it is put back
when it is ready. The exit code is 0 when all are back.
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

from sdxl_server.serving.client import send_request

POLL_SECONDS = 0.2


class RestartError(RuntimeError):
    """An instance has not come back. The following ones were not restarted."""


class Haproxy:
    """HAProxy's runtime API.

    Args:
        path: its `stats socket`.
        backend: the name of the instances' backend.
    """

    def __init__(self, path: Path, backend: str) -> None:
        self._path, self.backend = path, backend

    def run_command(self, command: str) -> str:
        """Return HAProxy's answer to a command.

        Raises:
            RestartError: HAProxy cannot be reached.
        """
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                connection.connect(str(self._path))
            except OSError as error:
                raise RestartError(f"no HAProxy at {self._path}: {error.strerror}") from error
            connection.sendall(f"{command}\n".encode())
            return b"".join(iter(lambda: connection.recv(65536), b"")).decode()

    def read_servers(self) -> dict[str, dict[str, str]]:
        """Return HAProxy's statistics by instance."""
        rows = csv.DictReader(self.run_command("show stat").removeprefix("# ").splitlines())
        mine = {row["svname"]: row for row in rows if row["pxname"] == self.backend}
        return {name: row for name, row in mine.items() if name not in ("FRONTEND", "BACKEND")}

    def find_ready_url(self, server: str) -> str:
        """Return the URL of an instance's readiness check."""
        lines = self.run_command(f"show servers state {self.backend}").splitlines()
        names = lines[1].removeprefix("# ").split()
        rows = [dict(zip(names, line.split(), strict=True)) for line in lines[2:] if line]
        row = next(row for row in rows if row["srv_name"] == server)
        return f"http://{row['srv_addr']}:{row['srv_check_port']}/ready"

    def set_state(self, server: str, state: str) -> None:
        """Set an instance's state: drain or ready.

        Raises:
            RestartError: HAProxy refuses it.
        """
        answer = self.run_command(f"set server {self.backend}/{server} state {state}").strip()
        if answer:
            raise RestartError(f"HAProxy on {self.backend}/{server}: {answer}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Restart all instances in turn; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sdxl_server.serving.rolling_restart", description=__doc__)
    parser.add_argument("--socket", type=Path, default=Path("/run/haproxy/admin.sock"), help="HAProxy's stats socket")
    parser.add_argument("--backend", default="pictures", metavar="NAME")
    parser.add_argument(
        "--restart",
        default="systemctl restart torchserve@{}",
        metavar="COMMAND",
        help="restarts the instance named {}, and returns when the old one has ended",
    )
    parser.add_argument(
        "--wait",
        type=float,
        default=3600,
        metavar="SECONDS",
        help="limit for requests to end and for a model to load",
    )
    options = parser.parse_args(arguments)
    haproxy = Haproxy(options.socket, options.backend)
    try:
        servers = list(haproxy.read_servers())
        if not servers:
            raise RestartError(f"{options.backend} has no servers")
        for server in servers:
            restart_instance(haproxy, server, options.restart.replace("{}", server), seconds=options.wait)
            print(f"{server}: restarted")
    except RestartError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def restart_instance(haproxy: Haproxy, server: str, command: str, *, seconds: float) -> None:
    """Drain an instance, restart it, and put it back when it is ready.

    Raises:
        RestartError: it does not finish its requests or come back in time; it stays drained.
    """
    ready_url = haproxy.find_ready_url(server)
    haproxy.set_state(server, "drain")
    wait_for(lambda: haproxy.read_servers()[server]["scur"] == "0", f"{server} has not finished its requests", seconds)
    done = subprocess.run(command, shell=True, check=False)
    if done.returncode:
        raise RestartError(f"{command} ended with {done.returncode}; {server} stays drained")
    wait_for(lambda: is_instance_ready(ready_url), f"{server} is not ready at {ready_url}", seconds)
    haproxy.set_state(server, "ready")
    wait_for(lambda: haproxy.read_servers()[server]["status"] == "UP", f"HAProxy does not see {server}", seconds)


def is_instance_ready(url: str) -> bool:
    """Ask an instance itself: HAProxy's last check may have met the old one."""
    try:
        return send_request("GET", url, timeout=5).status_code == 200
    except requests.RequestException:
        return False


def wait_for(condition: Callable[[], bool], failure: str, seconds: float) -> None:
    """Wait until a condition holds.

    Raises:
        RestartError: it does not hold in time; begins with `failure`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise RestartError(f"{failure} within {seconds:g} s")
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
