"""The folder of the cache: whom it trusts, how large it grows, what happens where it cannot be had."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import pwd
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from openvino_backend import CompiledFunction, cache
from openvino_backend.cache import open_entry
from openvino_backend.options import Options
from tests.unit.modules import make_module, measure_error
from tools.server import ROOT

pytestmark = pytest.mark.usefixtures("inference", "unwarned")
KEYS = ["a" * 32, "b" * 32, "c" * 32]
SOMEBODY = 12345
NOT_KEPT = "is not used, and what is compiled is not kept"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files to another user")


@pytest.fixture
def unwarned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_warned", set())


@pytest.fixture
def group_mask() -> Iterator[None]:
    """Let files be writable by the group, as many distributions do."""
    before = os.umask(0o002)
    yield
    os.umask(before)


def make_options(folder: Path, **options: Any) -> Options:
    return Options.parse({"model_caching": True, "cache_dir": str(folder), **options})


def keep(options: Options, key: str = KEYS[0], text: str = "kept") -> tuple[Path | None, bool]:
    """Write an entry if it is empty; return its folder, and whether it was there."""
    with open_entry(options, key) as folder:
        if folder is None:
            return None, False
        is_there = (folder / "file").exists()
        if not is_there:
            (folder / "file").write_text(text)
        return folder, is_there


def count_warnings(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.levelno == logging.WARNING for record in caplog.records)


def run_cached(folder: Path) -> list[tuple[bool, bool]]:
    """Compile a small module twice; return for each whether it was traced and whether the model was kept."""
    origins = []
    for _ in range(2):
        module, x = make_module(), torch.randn(4, 16)
        function = CompiledFunction(module.forward, {"model_caching": True, "cache_dir": str(folder)})
        assert measure_error(function(x), module(x)) < 1e-6
        (report,) = function.backend.reports
        origins.append((report.traced, report.models[0].loaded_from_cache))
    return origins


@pytest.mark.usefixtures("group_mask")
def test_own_entries_are_used_whatever_the_umask(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "new" / "cache"
    assert run_cached(folder) == [(True, False), (False, True)]
    assert folder.stat().st_mode & 0o777 == 0o700
    modes = {path.lstat().st_mode & 0o022 for entry in folder.iterdir() if entry.is_dir() for path in entry.iterdir()}
    assert modes == {0}
    assert count_warnings(caplog) == 0


@pytest.mark.parametrize("mode", [0o775, 0o777, 0o1777])
def test_folder_open_to_others_gets_one_of_our_own_in_it(
    tmp_path: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.chmod(mode)
    assert run_cached(tmp_path) == [(True, False), (False, True)]
    (private,) = tmp_path.iterdir()
    assert (private.name, private.stat().st_mode & 0o777) == (f"openvino_backend-{os.geteuid()}", 0o700)
    assert count_warnings(caplog) == 0


@needs_root
def test_folder_of_somebody_else_gets_one_of_our_own_in_it(tmp_path: Path) -> None:
    os.chown(tmp_path, SOMEBODY, SOMEBODY)
    folder, _ = keep(make_options(tmp_path))
    assert folder is not None
    assert folder.parent.name == f"openvino_backend-{os.geteuid()}"


@pytest.mark.parametrize("trap", ["mode", "link", pytest.param("owner", marks=needs_root)])
def test_prepared_private_folder_is_not_used(tmp_path: Path, trap: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "elsewhere").mkdir()
    private = tmp_path / f"openvino_backend-{os.geteuid()}"
    private.symlink_to(tmp_path / "elsewhere") if trap == "link" else private.mkdir()
    if trap == "mode":
        private.chmod(0o777)
    elif trap == "owner":
        os.chown(private, SOMEBODY, SOMEBODY)
    tmp_path.chmod(0o777)
    assert [keep(make_options(tmp_path), key) for key in KEYS] == [(None, False)] * 3
    assert (caplog.text.count(NOT_KEPT), count_warnings(caplog)) == (1, 1)


@pytest.mark.parametrize(
    "trap",
    [
        "entry's mode",
        "file's mode",
        "link",
        "link as file",
        pytest.param("entry's owner", marks=needs_root),
        pytest.param("file's owner", marks=needs_root),
        pytest.param("seal's owner", marks=needs_root),
    ],
)
def test_entry_of_another_makes_is_not_used(tmp_path: Path, trap: str, caplog: pytest.LogCaptureFixture) -> None:
    """Its seal is right: whoever can write the files can write that too."""
    tmp_path.chmod(0o755)
    options = make_options(tmp_path)
    folder, _ = keep(options)
    assert folder is not None
    paths = {"entry": folder, "file": folder / "file", "seal": folder / "seal.json"}
    if trap == "link":
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    elif trap == "link as file":
        (folder / "file").rename(tmp_path / "elsewhere")
        (folder / "file").symlink_to(tmp_path / "elsewhere")
    elif trap.endswith("mode"):
        paths[trap.split("'")[0]].chmod(0o777)
    else:
        os.chown(paths[trap.split("'")[0]], SOMEBODY, SOMEBODY)
    assert [keep(options) for _ in range(2)] == [(None, False)] * 2
    assert (caplog.text.count(f"{folder} {NOT_KEPT}"), count_warnings(caplog)) == (1, 1)
    assert keep(options, KEYS[1])[0] is not None  # the others are


def test_planted_pickle_is_not_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_cached(tmp_path)
    (kept,) = tmp_path.glob("*/function.bin")
    kept.write_bytes(b"cbuiltins\nexec\n(S'import torch; torch.planted = True'\ntR.")
    seal = kept.parent / "seal.json"
    seal.write_text(json.dumps(cache._digest_files(kept.parent, {})))
    kept.parent.chmod(0o777)
    assert run_cached(tmp_path) == [(True, True)] * 2
    assert not hasattr(torch, "planted")
    assert "with mode 777, and its content is run" in caplog.text
    assert count_warnings(caplog) == 1


def test_files_that_have_not_changed_since_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, digested, digest = make_options(tmp_path), [], hashlib.file_digest

    def note_and_digest(*args: Any) -> Any:
        digested.append(args)
        return digest(*args)

    monkeypatch.setattr(hashlib, "file_digest", note_and_digest)

    def count(folder: Path, age: float) -> int:
        """Return how often a file is read where the entry was used so many seconds from now."""
        os.utime(folder / "seal.json", (time.time() + age,) * 2)
        digested.clear()
        assert keep(options) == (folder, True)
        return len(digested)

    folder, _ = keep(options)
    assert folder is not None
    assert count(folder, age=0) == 1  # a change in the same moment would have the same time
    assert count(folder, age=5) == 0
    os.utime(folder / "file", (1, 1))
    assert [count(folder, age=5) for _ in range(2)] == [1, 0]
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(folder)
    (tmp_path / "copy").rename(folder)
    assert [count(folder, age=5) for _ in range(2)] == [1, 0]
    (folder / "file").write_text("lost")
    os.utime(folder / "seal.json", (time.time() + 5,) * 2)
    assert keep(options) == (folder, False)


def test_seal_of_another_kind_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = make_options(tmp_path)
    folder, _ = keep(options)
    assert folder is not None
    (folder / "seal.json").write_text(json.dumps({"file": hashlib.sha256(b"kept").hexdigest()}))  # as of older versions
    assert [keep(options) for _ in range(2)] == [(folder, False), (folder, True)]
    assert caplog.text.count("is damaged or unfinished; it is made anew") == 1


def test_entries_used_longest_ago_are_removed_first(tmp_path: Path) -> None:
    (tmp_path / "of the user's").write_text("x" * 1000)
    tmp_path.chmod(0o755)
    options = make_options(tmp_path, cache_bytes=250)
    for key in KEYS[:2]:
        folder, _ = keep(options, key, "x" * 100)
        assert folder is not None
        os.utime(folder / "seal.json", (1, 1))
    assert keep(options, KEYS[0]) == (tmp_path / KEYS[0], True)
    keep(options, KEYS[2], "x" * 100)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [KEYS[0], KEYS[2]]
    assert (tmp_path / "of the user's").exists()


def test_entry_in_use_is_not_removed(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    options = make_options(tmp_path, cache_bytes=1)
    keep(options, KEYS[0])
    with open_entry(options, KEYS[0]) as folder:
        assert folder is not None
        keep(options, KEYS[1])
        assert (folder / "file").read_text() == "kept"
    keep(options, KEYS[2])
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [KEYS[2]]


@pytest.mark.parametrize("given", ["~/models", None])
def test_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    folder, _ = keep(Options.parse({"model_caching": True, **({"cache_dir": given} if given else {})}))
    assert folder == tmp_path / ("models" if given else ".cache/openvino_backend") / KEYS[0]


def test_without_a_home_folder_nothing_is_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: int) -> None:
        raise KeyError("no such user")

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", refuse)
    assert keep(Options.parse({})) == (None, False)
    assert count_warnings(caplog) == 0
    for key in KEYS:
        assert keep(Options.parse({"model_caching": True}), key) == (None, False)
    assert "not kept: Could not determine home directory." in caplog.text
    assert count_warnings(caplog) == 1


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_folder_that_cannot_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert run_cached(tmp_path) == [(True, False)] * 2
    assert f"{tmp_path} {NOT_KEPT}: {os.strerror(number)}" in caplog.text
    assert count_warnings(caplog) == 1


def test_full_disk_is_a_warning(tmp_path: Path) -> None:
    """A limit for the size of files stands in for the disk."""
    program = (
        "import resource, sys, torch; from pathlib import Path; from tests.unit.test_cache import cache, run_cached\n"
        "hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "for limit in (1_000, 10_000_000):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))\n"
        "    cache._warned.clear()\n"
        "    with torch.no_grad(): print(run_cached(Path(sys.argv[1])), flush=True)\n"
        "    print('with', limit, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == [str([(True, False)] * 2), str([(True, False), (False, True)])], done.stderr
    full, large = done.stderr.split("with 1000\n")
    assert (full.count(NOT_KEPT), large.count(NOT_KEPT)) == (1, 0)


def test_error_of_the_block_is_none_of_the_caches(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    error = FileNotFoundError(errno.ENOENT, "no compiler")
    with pytest.raises(FileNotFoundError) as caught, open_entry(make_options(tmp_path), KEYS[0]):
        raise error
    assert caught.value is error
    assert count_warnings(caplog) == 0
