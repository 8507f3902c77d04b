"""Files that are written whole or not at all, and what tells one file from another."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file. One that is there keeps what it has until the new one is whole.

    Raises:
        OSError: the folder is not there, or cannot be written.
    """
    place = Path(path).resolve()  # so that a link stays one
    if place.exists() and not place.is_file():  # such as /dev/stdout, or a folder
        place.write_bytes(data)
        return
    beside = place.with_name(f".{place.name[:100]}.{os.getpid()}")
    try:
        beside.write_bytes(data)
        if place.exists():
            shutil.copymode(place, beside)
        os.replace(beside, place)
    finally:
        beside.unlink(missing_ok=True)


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file of any size, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
