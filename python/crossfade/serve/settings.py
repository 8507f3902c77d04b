"""What a server is told when it starts."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .keys import Keys
from .limits import Limits

LOOPBACK = ("localhost", "127.0.0.1", "::1")
PAGE = Path(__file__).parent / "page"


@dataclass(frozen=True)
class Settings:
    """What a server is told when it starts.

    Attributes:
        name: what /v1/models calls the default blend, where it is not a single term.
        values: what a search may be decided by, by name.
        judges: what may compare the texts of a tournament, by name.
        drafts: blends that may guess tokens, by name.
        keys: who is let in.
        hosts: names and addresses by which the server is called; others are refused.
        origins: pages of other servers whose scripts may ask.
        limits: how much may be asked for.
        page: the folder of the page at /.
        pulse: seconds after which a stream says again that it is there.
    """

    name: str = "crossfade"
    values: Mapping[str, Any] = field(default_factory=dict)
    judges: Mapping[str, Any] = field(default_factory=dict)
    drafts: Mapping[str, Any] = field(default_factory=dict)
    keys: Keys = field(default_factory=Keys)
    hosts: frozenset[str] = frozenset(LOOPBACK)
    origins: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    page: Path = PAGE
    pulse: float = 15.0


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # It is a name, which may mean anything.
        return False


def check_host(host: str, keys: Keys) -> None:
    """Refuse to let other machines in without a key.

    Raises:
        ValueError: says how to give one.
    """
    if not is_loopback(host) and not keys:
        raise ValueError(
            f"--host is {host!r}, which other machines reach, and there is no key; give "
            "--api-key-file FILE, or set CROSSFADE_API_KEY"
        )
