"""python -m jobs setup makes the tables; python -m jobs worker draws."""

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence

from jobs.database import AwayError, Database
from jobs.settings import SettingError, Settings
from jobs.worker import work


async def make_tables(settings: Settings) -> None:
    """Make the tables in JOBS_DATABASE that are missing."""
    async with Database(settings.database) as database:
        await database.make_tables()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs", description="Jobs (docs/jobs.md).")
    parser.add_argument("command", choices=["setup", "worker"], help="make the tables, or draw until SIGTERM")
    command = parser.parse_args(arguments).command
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        settings = Settings.read()
        asyncio.run(make_tables(settings) if command == "setup" else work(settings))
    except (SettingError, AwayError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
