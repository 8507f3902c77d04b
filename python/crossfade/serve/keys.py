"""API keys: where they come from, and whether a request has one of them."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from .. import reading

VARIABLE = "CROSSFADE_API_KEY"
FORM = re.compile(r"[!-~]{8,512}")  # visible characters of ASCII, as a header can carry them


def read_keys(given: Sequence[str] = (), file: str | Path | None = None) -> list[str]:
    """The keys of the options, of a file with one a line, and of the environment.

    Raises:
        ValueError: one has another form, or the file has none. OSError: there is no such file.
    """
    keys = [(f"--api-key number {i}", key) for i, key in enumerate(given, 1)]
    if file is not None:
        lines = reading.read_text(file).splitlines()
        listed = [(f"--api-key-file {file}, line {i}", line) for i, line in enumerate(lines, 1)]
        listed = [(where, x.strip()) for where, x in listed if x.strip() and x[0] != "#"]
        if not listed:
            raise ValueError(f"--api-key-file is {str(file)!r}, which has no key")
        keys += listed
    if VARIABLE in os.environ:
        keys.append((f"the variable {VARIABLE}", os.environ[VARIABLE]))
    for where, key in keys:
        if not FORM.fullmatch(key):  # The key itself is not told: logs are read by others.
            raise ValueError(
                f"{where} is no key; it must be 8 to 512 visible characters of ASCII, without "
                "spaces"
            )
    return [key for _, key in keys]


class Keys:
    """The keys of a server, as hashes. Without any key everybody is let in.

    Args:
        keys: the keys themselves.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._hashes = [_hash(key.encode()) for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def owner(self, authorization: str | None) -> str | None:
        """Whose request this is, by its header ``Authorization: Bearer KEY``; None: nobody's.

        It takes the same time whichever key it is, and wherever a wrong one differs. The name of
        the owner is a hash, which separates what belongs to different keys.
        """
        if not self._hashes:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        given = _hash(key.strip().encode("latin-1"))
        found = [hmac.compare_digest(given, known) for known in self._hashes]
        return given.hex()[:32] if any(found) and scheme.lower() == "bearer" else None


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
