"""Names of a package that are imported at their first use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any


def attribute(package: str, name: str, homes: Mapping[str, str]) -> Any:
    """What a package's ``__getattr__`` gives: the name from its module, which it keeps.

    Args:
        homes: the module of each name, within the package.

    Raises:
        AttributeError: the name has none.
    """
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{homes[name]}", package), name)
    setattr(sys.modules[package], name, value)
    return value
