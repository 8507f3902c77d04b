"""Saved models to read, a network that refuses, and a pickle that shows when it is loaded."""

from __future__ import annotations

import pickle
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crossfade import training
from crossfade.extras import old_names
from tiny_models import make, make_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and an adapter and a value head for it."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("saved")
    model = make()
    model.save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    training.save_value_head(training.value_model(model, rank=2), folder / "head")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    with old_names():
        peft.get_peft_model(model, config).save_pretrained(folder / "tuned")
    return folder


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved` that a test may change."""
    return shutil.copytree(saved, tmp_path / "copied")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The requests to the network, each of which is refused."""
    found: list[Any] = []

    def refuse(*args: Any, **options: Any) -> Any:
        found.append(args)
        raise OSError("no network here")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return found


class Trap:
    """An object whose pickle makes a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[bytes]:
    """A pickle; the test fails if it is loaded."""
    mark = tmp_path / "loaded"
    yield pickle.dumps(Trap(mark))
    assert not mark.exists()
