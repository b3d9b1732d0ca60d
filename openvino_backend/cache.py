"""A folder of models and functions that can be trusted: locked while it is written, checked before it is read."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from openvino_backend.errors import OpenVINOBackendError
from openvino_backend.options import Options

logger = logging.getLogger(__name__)

_SEAL = "seal.json"


def find_folder(options: Options) -> Path:
    """Return the folder of the cache.

    Raises:
        RuntimeError: it is below the home folder, and there is none.
    """
    if options.cache_dir is not None:
        return Path(options.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "openvino_backend"


@contextlib.contextmanager
def open_entry(options: Options, key: str) -> Iterator[Path | None]:
    """Give the folder of one entry, empty or whole, or None without caching; what is in it at the end is sealed.

    Another process that wants the same entry waits. An entry that is damaged, or was left unfinished, is emptied.

    Args:
        key: names all that the entry depends on.

    Raises:
        OpenVINOBackendError: the folder of the cache cannot be made or written, or others may write to it.
    """
    if not options.model_caching:
        yield None
        return
    try:
        with _lock_entry(find_folder(options), key) as folder:
            yield folder
    except OSError as error:
        raise OpenVINOBackendError(f"cannot use the cache folder {find_folder(options)}: {error}") from error


@contextlib.contextmanager
def _lock_entry(root: Path, key: str) -> Iterator[Path]:
    folder = root / key
    root.mkdir(parents=True, exist_ok=True)
    if root.stat().st_mode & stat.S_IWOTH:
        raise PermissionError("every user may write to it, and what is in it runs")
    with (root / f"{key}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder.mkdir(exist_ok=True)
        before = _list_files(folder)
        if (_read_seal(folder) or {}) != _digest_files(before):
            logger.warning("The cache entry %s is damaged or unfinished; it is made anew", folder)
            shutil.rmtree(folder)
            folder.mkdir()
            before = {}
        yield folder
        after = _list_files(folder)
        if after != before:
            partial = folder.with_suffix(".seal")
            partial.write_text(json.dumps(_digest_files(after)))
            partial.replace(folder / _SEAL)
            logger.info("The cache entry %s takes %d bytes", folder, sum(size for size, _ in after.values()))


def _read_seal(folder: Path) -> dict[str, str] | None:
    try:
        seal: dict[str, str] = json.loads((folder / _SEAL).read_text())
    except (OSError, ValueError):
        return None
    return seal


def _list_files(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return the size and the time of the last change of each file."""
    paths = (path for path in sorted(folder.iterdir()) if path.name != _SEAL)
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in paths}


def _digest_files(paths: Iterable[Path]) -> dict[str, str]:
    """Return the SHA-256 of each file by its name."""
    digests = {}
    for path in paths:
        with path.open("rb") as stream:
            digests[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests
