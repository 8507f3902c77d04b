"""Optional dependencies: they are imported where they are used, and an error names the extra."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# The Python that packages of extras need where it is later than what crossfade needs.
NEEDS = {"trl": (3, 11)}


def require(module: str, extra: str) -> Any:
    """The module of that name. If it is not installed, the `ImportError` says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise  # it is installed, but something that it imports is not
        how = f'run: pip install "crossfade[{extra}]"'
        needed = NEEDS.get(module.split(".")[0], (3,))
        if sys.version_info < needed:
            had = sys.version_info
            how = f"it needs Python {'.'.join(map(str, needed))}, and this is {had[0]}.{had[1]}"
        raise ImportError(f"{module} is not installed; {how}", name=module) from error


@contextmanager
def old_names() -> Iterator[None]:
    """Silences one warning: TRL 1.16 and PEFT 0.21 use names that Transformers 5.23 has changed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`[a-z_.]*gradient_checkpointing", FutureWarning)
        yield
