"""Optional dependencies: imported where they are used, with an error that names the extra."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def require(module: str, extra: str) -> Any:
    """Import `module`, or raise an `ImportError` that says which extra of crossfade brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise  # installed, but one of its own dependencies is broken
        raise ImportError(
            f'{module} is not installed; run: pip install "crossfade[{extra}]"', name=module
        ) from error


@contextmanager
def old_names() -> Iterator[None]:
    """No warnings of TRL 1.16's and PEFT 0.21's names for what Transformers 5.23 renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`[a-z_.]*gradient_checkpointing", FutureWarning)
        yield
