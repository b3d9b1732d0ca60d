"""The images of finished jobs, in a folder or in an object store. A job names its images; others are removed."""

import contextlib
import re

import fsspec

NAME = re.compile(r"(\d+)-\d+\.[a-z]+")


class Results:
    """Files named by lease and index, so that two attempts never share one.

    Args:
        address: a folder, or an fsspec URL.
    """

    def __init__(self, address: str) -> None:
        self._files, self._root = fsspec.core.url_to_fs(address)

    def write(self, lease: int, index: int, image: bytes, kind: str) -> str:
        """Write an image of this kind, such as png. Return its name.

        Raises:
            OSError: there is no room, or no access.
        """
        name = f"{lease}-{index}.{kind}"
        self._files.makedirs(self._root, exist_ok=True)
        self._files.pipe_file(f"{self._root}/{name}", image)
        return name

    def read(self, name: str) -> bytes | None:
        """Return an image; None if it was removed."""
        try:
            image: bytes = self._files.cat_file(f"{self._root}/{name}")
        except FileNotFoundError:
            return None
        return image

    def list_names(self) -> list[str]:
        """Return the names of all images."""
        self._files.invalidate_cache()
        with contextlib.suppress(FileNotFoundError):
            found = (path.rpartition("/")[2] for path in self._files.ls(self._root, detail=False))
            return [name for name in found if NAME.fullmatch(name)]
        return []

    def remove(self, name: str) -> None:
        """Remove an image, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(f"{self._root}/{name}")
