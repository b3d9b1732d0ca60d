"""Digests of weights files: SHA-256, and AutoV2 as model sites show it."""

import hashlib
from pathlib import Path


def digest_file(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def compute_autov2(sha256: str) -> str:
    """Return the short form of a file's digest on model sites, AutoV2."""
    return sha256[:10]
