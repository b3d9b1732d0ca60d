"""A cache of models and functions in a folder that can be trusted; its entries are locked and checked.

Its content is run. So the folder, its entries and their files must belong to this user or to root. Nobody else may
write to them. If that fails, or nothing can be written, one warning says so and nothing is kept.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import openvino
import torch

from openvino_backend.options import Options
from openvino_backend.precision import read_flags

logger = logging.getLogger(__name__)

_SEAL = "seal.json"
_SETTLED = 10**9  # nanoseconds; a later change of a file has another time
_VALUE = "value"
_KEY = re.compile("[0-9a-f]{32}")
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
# Options that do not change the compiled model. `precision` acts through the options that it sets.
_WITHOUT_EFFECT = (
    "aot_autograd",
    "cache_bytes",
    "cache_dir",
    "max_graphs",
    "model_caching",
    "precision",
    "release_weights",
)
_warned: set[Path] = set()
_warning = threading.Lock()


@dataclass(frozen=True)
class _Entry:
    """The folder of a locked entry.

    Attributes:
        sealed: the digest and status of each file by name, as in the seal.
        files: the same for the files that exist; their digests are the seal's.
    """

    folder: Path
    sealed: dict[str, list[Any]]
    files: dict[str, list[Any]]


class _UntrustedError(OSError):
    """A folder whose content another user may have made."""


def name_entry(options: Options, *ingredients: Any) -> str:
    """Return the cache key of these ingredients, the options, versions, CPU flags and this package's code.

    The CPU's name is not enough: another CPU of that name may fail to run a compiled model.
    """
    settings = [
        (each.name, getattr(options, each.name)) for each in fields(options) if each.name not in _WITHOUT_EFFECT
    ]
    versions = (openvino.get_version(), torch.__version__, _digest_code())
    return hashlib.sha256(repr((settings, versions, sorted(read_flags()), *ingredients)).encode()).hexdigest()[:32]


@functools.cache
def _digest_code() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def find_folder(options: Options) -> Path:
    """Return the cache folder that the options name.

    Raises:
        RuntimeError: it is below the home folder, which is unknown.
    """
    if options.cache_dir is not None:
        return Path(options.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "openvino_backend"


@contextlib.contextmanager
def open_entry(options: Options, key: str) -> Iterator[Path | None]:
    """Yield the folder of one entry, empty or complete, or None without a cache. At the end seal its files.

    Other processes wait for the same entry. A damaged or unfinished entry is emptied.

    Args:
        key: names all that the entry depends on.
    """
    with contextlib.ExitStack() as stack:
        entry = _lock_entry(stack, options, key) if options.model_caching else None
        yield entry.folder if entry else None  # an error in the block is no error of the cache
        if entry:
            with _warn_once(entry.folder.parent):
                _seal_entry(entry)
                _trim(entry.folder.parent, options.cache_bytes)


@contextlib.contextmanager
def write_entry(folder: Path) -> Iterator[None]:
    """Empty the entry with a warning if the block cannot write to it, as on a full disk."""
    with _warn_once(folder.parent):
        try:
            yield
        except OSError:
            for path in folder.iterdir():
                path.unlink()
            raise


def keep_value(options: Options, key: str, make: Callable[[], bytes]) -> bytes:
    """Return the value of an entry. Without one, make it, and keep it if there is a cache.

    Args:
        key: names all that the value depends on.
    """
    with open_entry(options, key) as folder:
        if folder is not None and (folder / _VALUE).exists():
            return (folder / _VALUE).read_bytes()
        value = make()
        if folder is not None:
            with write_entry(folder):
                (folder / _VALUE).write_bytes(value)
        return value


def tell_change(status: os.stat_result) -> tuple[int, ...]:
    """Return numbers that change with a file's content: device, inode, bytes, mtime and ctime."""
    # Unlike mtime, ctime cannot be set.
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@contextlib.contextmanager
def _warn_once(folder: Path) -> Iterator[None]:
    """Turn a file system error into a warning, once for each folder."""
    try:
        yield
    except OSError as error:
        with _warning:
            is_first = folder not in _warned
            _warned.add(folder)
        if is_first:
            reason = error.strerror or error
            logger.warning("The cache folder %s is not used, and what is compiled is not kept: %s", folder, reason)


def _lock_entry(stack: contextlib.ExitStack, options: Options, key: str) -> _Entry | None:
    """Lock an entry until the stack is closed. Return it, or None if it cannot be opened."""
    try:
        folder = find_folder(options)
    except RuntimeError as error:
        with _warn_once(Path(options.cache_dir or "~/.cache")):
            raise OSError(f"{error}") from error
        return None
    with _warn_once(folder):
        root = _make_root(folder)
        lock = stack.enter_context((root / f"{key}.lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        with _warn_once(root / key):
            return _open_entry(root / key)
    return None


def _make_root(folder: Path) -> Path:
    """Return the folder, made if needed. If it is not trusted, return this user's own folder in it.

    Kubernetes gives containers such folders: an emptyDir has mode 0777.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    danger = _find_danger(folder.stat())
    if danger is None:
        return folder
    private = folder / f"openvino_backend-{os.geteuid()}"
    try:
        private.mkdir(mode=0o700, exist_ok=True)
        _check_trust(private)
    except OSError as error:
        raise _UntrustedError(f"{danger}; and {private.name} in it: {error.strerror or error}") from error
    return private


def _open_entry(folder: Path) -> _Entry:
    folder.mkdir(mode=0o700, exist_ok=True)
    _check_trust(folder)
    for path in folder.iterdir():
        _check_trust(path)
    sealed, last_use = _read_seal(folder), _find_last_use(folder)
    known = {name: each for name, each in sealed.items() if max(each[-2:]) + _SETTLED < last_use}
    files = _digest_files(folder, known)
    if {name: each[0] for name, each in files.items()} != {name: each[0] for name, each in sealed.items()}:
        logger.warning("The cache entry %s is damaged or unfinished; it is made anew", folder)
        shutil.rmtree(folder)
        folder.mkdir(mode=0o700)
        sealed = files = {}
    return _Entry(folder, sealed, files)


def _seal_entry(entry: _Entry) -> None:
    """Write the seal if the files have changed. Else note the time of use."""
    seal = entry.folder / _SEAL
    for path in _list_files(entry.folder):
        if path.stat().st_mode & _OTHERS_MAY_WRITE:  # the umask may let a group write
            path.chmod(stat.S_IMODE(path.stat().st_mode) & ~_OTHERS_MAY_WRITE)
    files = _digest_files(entry.folder, entry.files)
    if files != entry.sealed:
        partial = entry.folder.with_suffix(".seal")
        partial.write_text(json.dumps(files))
        partial.chmod(0o600)
        partial.replace(seal)
        logger.info("The cache entry %s takes %d bytes", entry.folder, _measure(entry.folder))
    elif files:
        os.utime(seal)


def _trim(root: Path, limit: int) -> None:
    """Remove the least recently used entries until the others fit. Locked entries stay."""
    entries = []
    for folder in root.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process may remove it
            if _KEY.fullmatch(folder.name) and _find_danger(folder.lstat()) is None:
                entries.append((_find_last_use(folder), _measure(folder), folder))
    total = sum(size for _, size, _ in entries)
    for _, size, folder in sorted(entries):
        if total <= limit:
            break
        with folder.with_suffix(".lock").open("w") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.exists():
                shutil.rmtree(folder)
                logger.info("The cache entry %s is removed, for cache_bytes: %d", folder, limit)
            total -= size


def _find_last_use(folder: Path) -> int:
    seal = folder / _SEAL
    return (seal if seal.exists() else folder).stat().st_mtime_ns


def _check_trust(path: Path) -> None:
    """Refuse a file or folder that another user may have made. Refuse links: they may lead anywhere.

    Raises:
        _UntrustedError: says why.
    """
    status = path.lstat()
    danger = _find_danger(status)
    if danger is None and not (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)):
        danger = "is neither a file nor a folder"
    if danger:
        raise _UntrustedError(f"{path.name} {danger}")


def _find_danger(status: os.stat_result) -> str | None:
    """Return how another user may have written this, or None."""
    if status.st_uid not in (os.geteuid(), 0):
        return f"belongs to user {status.st_uid}"
    if status.st_mode & _OTHERS_MAY_WRITE:
        return f"may be written by others, with mode {stat.S_IMODE(status.st_mode):o}, and its content is run"
    return None


def _read_seal(folder: Path) -> dict[str, list[Any]]:
    """Return what _digest_files found when the entry was sealed, or nothing without a valid seal."""
    try:
        seal = json.loads((folder / _SEAL).read_text())
    except (OSError, ValueError):
        return {}
    is_known = isinstance(seal, dict) and all(isinstance(each, list) and len(each) == 6 for each in seal.values())
    return seal if is_known else {}


def _list_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.name != _SEAL]


def _measure(folder: Path) -> int:
    """Return the bytes of an entry."""
    return sum(path.stat().st_size for path in _list_files(folder))


def _digest_files(folder: Path, known: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Return the SHA-256 and status of each file by name.

    Args:
        known: an earlier result. A file with the same status is not read again.
    """
    files = {}
    for path in _list_files(folder):
        told = [*tell_change(path.stat())]
        digest, *before = known.get(path.name, [None])
        if before != told:
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        files[path.name] = [digest, *told]
    return files
