"""Run a PostgreSQL of its own in a temporary folder, for the tests."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Self

from tools.server import find_free_ports

ACCOUNT = "nobody"  # PostgreSQL refuses to run as root


def find_postgres() -> Path | None:
    """Return the folder of its programs, None where it is not installed. Debian's is not in PATH."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    found = shutil.which("initdb")
    return Path(found).resolve().parent if found else next(reversed(folders), None)


class LocalPostgres:
    """A PostgreSQL on loopback with the database `jobs`, started on entry and removed on exit.

    Attributes:
        folder: of its files and its log.
        address: of the database, for libpq.
    """

    def __init__(self) -> None:
        (self.port,) = find_free_ports(1)
        self.address = f"postgresql://jobs@127.0.0.1:{self.port}/jobs"

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-"))
        if os.geteuid() == 0:
            shutil.chown(self.folder, ACCOUNT)
        self._run("initdb", "--username", "jobs", "--auth", "trust", "--no-sync", "--pgdata", "data")
        self.start()
        self._run("createdb", "--host", "127.0.0.1", "--port", str(self.port), "--username", "jobs", "jobs")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    def start(self) -> None:
        """Start it, after `stop`."""
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c max_connections=200"
        self._run("pg_ctl", "start", "--wait", "--pgdata", "data", "--log", "log", "--options", options)

    def stop(self, mode: str = "immediate") -> None:
        """Stop it: immediate is a crash."""
        self._run("pg_ctl", "stop", "--pgdata", "data", "--mode", mode)

    def find_pid(self) -> int:
        """Return its process, whose children serve the connections."""
        return int((self.folder / "data" / "postmaster.pid").read_text().split()[0])

    def run_sql(self, *statements: str) -> str:
        """Run statements as the owner; return what psql prints."""
        commands = [f"--command={statement}" for statement in statements]
        return self._run("psql", "--no-psqlrc", "--quiet", "--tuples-only", "--no-align", *commands, self.address)

    def _run(self, program: str, *arguments: str) -> str:
        account = ACCOUNT if os.geteuid() == 0 else None
        command = [str((find_postgres() or Path()) / program), *arguments]
        environment = {"LC_ALL": "C.UTF-8", "PATH": os.environ["PATH"]}
        done = subprocess.run(
            command, cwd=self.folder, env=environment, user=account, capture_output=True, text=True, timeout=60
        )
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stderr}")
        return done.stdout.strip()
