"""A folder of compiled models that can be trusted: locked while it is written, checked before it is read."""

import contextlib
import fcntl
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_SEAL = "seal.json"


@contextlib.contextmanager
def open_entry(root: Path, key: str) -> Iterator[Path]:
    """Give the folder of one compiled model, empty or whole; what is in it at the end is sealed.

    Another process that wants the same entry waits. An entry that is damaged, or was left unfinished, is emptied.

    Args:
        root: the folder of the cache.
        key: names all that the compiled model depends on.

    Raises:
        OSError: the folder cannot be made or written.
    """
    folder = root / key
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists() and _read_seal(folder) != _digest_files(folder):
            logger.warning("The cache entry %s is damaged or unfinished; it is made anew", folder)
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        yield folder
        files = _digest_files(folder)
        if _read_seal(folder) != files:
            partial = folder / f"{_SEAL}.part"
            partial.write_text(json.dumps(files))
            partial.replace(folder / _SEAL)
            logger.info(
                "The cache entry %s takes %d bytes", folder, sum(path.stat().st_size for path in folder.iterdir())
            )


def _read_seal(folder: Path) -> dict[str, str] | None:
    try:
        seal: dict[str, str] = json.loads((folder / _SEAL).read_text())
    except (OSError, ValueError):
        return None
    return seal


def _digest_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each of OpenVINO's files."""
    files: dict[str, str] = {}
    for path in sorted(folder.glob("*.blob")):
        with path.open("rb") as stream:
            files[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return files
