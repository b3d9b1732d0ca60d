"""The folder of jobs: their requests, previews and images, limited by bytes and age."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.settings import Settings
from jobs.store import Store

PREVIEW = "preview"


class Results:
    """Folders by job id. A file appears complete or not at all.

    Args:
        folder: that holds them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write_request(self, job: str, digest: str, fields: Mapping[str, Any]) -> None:
        """Store a job's request under its digest: another order may use the same id."""
        (self.folder / job).mkdir(parents=True, exist_ok=True, mode=0o700)
        self._write(job, f"{digest}.json", json.dumps(fields).encode())

    def read_request(self, job: str, digest: str) -> dict[str, Any]:
        """Return a job's request."""
        fields: dict[str, Any] = json.loads((self.folder / job / f"{digest}.json").read_bytes())
        return fields

    def write_preview(self, job: str, image: bytes) -> None:
        """Store a preview."""
        self._write(job, PREVIEW, image)

    def write_images(self, job: str, attempt: int, images: Sequence[bytes]) -> None:
        """Store the images of one attempt."""
        for index, image in enumerate(images):
            self._write(job, f"{attempt}-{index}", image)

    def list_images(self, job: str, attempt: int) -> list[Path]:
        """Return the image files of one attempt, in order."""
        found = (self.folder / job).glob(f"{attempt}-*[0-9]")
        return sorted(found, key=lambda path: int(path.name.partition("-")[2]))

    def find_preview(self, job: str) -> Path | None:
        """Return the file of the newest preview, if there is one."""
        path = self.folder / job / PREVIEW
        return path if path.exists() else None

    def remove(self, job: str) -> None:
        """Remove a job's files."""
        shutil.rmtree(self.folder / job, ignore_errors=True)

    def measure(self, job: str) -> int:
        """Return a job's size in bytes."""
        return sum(path.stat().st_size for path in (self.folder / job).glob("*"))

    def _write(self, job: str, name: str, content: bytes) -> None:
        temporary = self.folder / job / f".{name}.part"
        temporary.write_bytes(content)
        temporary.replace(temporary.with_name(name))


def remove_old(store: Store, results: Results, settings: Settings) -> list[str]:
    """Remove jobs that ended too long ago. Then remove the oldest while all take too many bytes."""
    removed = store.list_ended(before=time.time() - settings.keep_seconds)
    kept = [job for job in store.list_ended() if job not in removed]
    sizes = {job: results.measure(job) for job in kept}
    total = sum(results.measure(path.name) for path in results.folder.iterdir()) if results.folder.exists() else 0
    total -= sum(results.measure(job) for job in removed)
    for job in kept:
        if total <= settings.keep_bytes:
            break
        removed.append(job)
        total -= sizes[job]
    for job in removed:
        store.forget(job)
        results.remove(job)
    return removed
