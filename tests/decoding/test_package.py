"""`import crossfade` is cheap, and everything it names is there."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import crossfade as cf
import pytest


def test_import_waits_for_nothing_heavy() -> None:
    # the command line's help should not wait some seconds for torch and transformers
    check = "import crossfade, sys; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_public_names() -> None:
    for name in cf.__all__:
        assert getattr(cf, name) is not None
        assert name in dir(cf)
    assert cf.__version__ == version("crossfade")
    with pytest.raises(AttributeError, match="has no attribute 'beam_search'"):
        _ = cf.beam_search
