"""Names of a package whose modules are imported when the name is first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection, Mapping
from typing import Any


def attribute(
    package: str, name: str, homes: Mapping[str, str], modules: Collection[str] = ()
) -> Any:
    """What the ``__getattr__`` of a package gives for `name`. The package keeps it from then on.

    Args:
        homes: which module of the package each name comes from.
        modules: names that are modules of the package themselves.

    Raises:
        AttributeError: the name is neither in `homes` nor in `modules`.
    """
    if name in modules:
        return importlib.import_module(f".{name}", package)
    if name not in homes:
        from .checks import did_you_mean  # here, since most imports meet no unknown name

        says = "" if name.startswith("_") else did_you_mean(name, [*homes, *modules])
        raise AttributeError(f"module {package!r} has no attribute {name!r}{says}")
    value = getattr(importlib.import_module(f".{homes[name]}", package), name)
    setattr(sys.modules[package], name, value)
    return value
