"""A saved model to train; and trainers send no messages and show no progress bars."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parent)]

import tiny_models as tiny

collect_ignore = []
if importlib.util.find_spec("trl") is None:  # TRL needs Python 3.11
    collect_ignore = [
        *("trainers", "test_checkpoints.py", "test_copies.py", "test_fused_head.py"),
        *("test_train_cli.py", "test_train_keys.py", "test_training_rows.py", "test_trl_parity.py"),
        *("test_on_policy.py", "test_train_judge.py", "test_train_aligner.py"),
        *("test_train_chain.py", "distributed"),
    ]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a saved model."""
    from trained_models import make

    folder = tmp_path_factory.mktemp("base")
    make().save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have TRL's own trainers send no messages, and show no progress bars."""
    monkeypatch.setenv("CI", "1")  # with this TRL sends no telemetry
    if importlib.util.find_spec("datasets") is None:
        yield
        return
    import datasets

    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
