"""``crossfade train --resume``: from the last checkpoint that is complete, and to the same end."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
from crossfade.models.saved_value_heads import ADAPTER_FILES
from crossfade.training import SFTTrainer, checkpoints, config, run
from safetensors.torch import load_file
from train_command import losses, settings, train


def test_resume(base: str, tmp_path: Path, capsys: Any) -> None:
    """A run that is stopped and resumed has the curve of one that is not."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    assert train("dpo", whole, settings(base, whole)) == 0
    given = settings(base, cut)
    given["arguments"]["lr_scheduler_type"] = "linear"
    assert train("dpo", cut, given) == 0
    for file in (cut / "out").glob("*.safetensors"):
        file.unlink()
    shutil.rmtree(cut / "out" / "checkpoint-4")
    assert train("dpo", cut, given) == 2
    assert "checkpoint-2 of another run" in capsys.readouterr().err
    assert train("dpo", cut, given, "--resume") == 0
    assert losses(cut, 4) == losses(whole, 4)
    a, b = (load_file(x / "out" / "adapter_model.safetensors") for x in (whole, cut))
    assert all(torch.equal(a[name], b[name]) for name in a)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


DAMAGE: dict[str, tuple[Any, str]] = {
    "trainer_state.json": (Path.unlink, "trainer_state.json is missing"),
    "cut trainer_state.json": (cut, "trainer_state.json: not JSON"),
    "deep trainer_state.json": (lambda p: p.write_text("[" * 10**5), "more than 100 levels deep"),
    "wrong trainer_state.json": (lambda p: p.write_text("{}"), "is of step None"),
    "optimizer.pt": (Path.unlink, "optimizer.pt is missing"),
    "cut optimizer.pt": (cut, "optimizer.pt is cut"),
    "empty optimizer.pt": (lambda p: p.write_bytes(b""), "optimizer.pt is cut"),
    "scheduler.pt": (Path.unlink, "scheduler.pt is missing"),
    "rng_state.pth": (Path.unlink, "rng_state.pth is missing"),
    "adapter_model.safetensors": (Path.unlink, "adapter_model.safetensors is missing"),
    "cut adapter_model.safetensors": (cut, "adapter_model.safetensors cannot be read"),
    "cut adapter_config.json": (cut, "adapter_config.json: not JSON"),
}


@pytest.fixture(scope="module")
def trained(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has ended, with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    assert train("sft", folder, settings(base, folder, "sft")) == 0
    return folder


def copied(trained: Path, folder: Path, base: str) -> dict[str, Any]:
    shutil.copytree(trained / "out", folder / "out")
    return settings(base, folder, "sft")


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_checkpoint_is_named(
    trained: Path, base: str, tmp_path: Path, what: str, capsys: Any
) -> None:
    given = copied(trained, tmp_path, base)
    (harm, message), name = DAMAGE[what], what.split()[-1]
    harm(tmp_path / "out" / "checkpoint-4" / name)
    last, damaged = checkpoints.last_complete(tmp_path / "out", ADAPTER_FILES)
    assert last.name == "checkpoint-2"
    assert message in damaged[tmp_path / "out" / "checkpoint-4"]
    harm(tmp_path / "out" / "checkpoint-2" / name)
    assert train("sft", tmp_path, given, "--resume") == 2
    told = capsys.readouterr().err
    assert "no checkpoint in" in told
    assert message in told
    assert "checkpoint-2" in told


def test_killed_inside_a_checkpoint(
    trained: Path, base: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """The run goes on from the checkpoint before, and ends as a run that was not killed."""
    given = settings(base, tmp_path, "sft")
    save = SFTTrainer._save_rng_state

    def killed(self: Any, folder: str) -> None:
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        save(self, folder)

    with monkeypatch.context() as m:
        m.setattr(SFTTrainer, "_save_rng_state", killed)
        assert train("sft", tmp_path, given) == 130
    assert (tmp_path / "out" / "checkpoint-4" / "optimizer.pt").is_file()
    assert train("sft", tmp_path, given) == 2
    assert "checkpoint-4 of another run" in capsys.readouterr().err
    assert train("sft", tmp_path, given, "--resume") == 0
    assert (
        "checkpoint-4 is damaged (trainer_state.json is missing): going on from checkpoint-2"
        in (capsys.readouterr().err)
    )
    assert losses(tmp_path, 4) == losses(trained, 4)
    a, b = (load_file(x / "out" / "adapter_model.safetensors") for x in (tmp_path, trained))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resume_without_the_optimizer(
    trained: Path, base: str, tmp_path: Path, capsys: Any
) -> None:
    given = copied(trained, tmp_path, base)
    given["arguments"]["save_only_model"] = True
    assert train("sft", tmp_path, given, "--resume") == 2
    assert "arguments.save_only_model is True" in capsys.readouterr().err


def test_damaged_value_head(base: str, tmp_path: Path, capsys: Any) -> None:
    given = settings(base, tmp_path, "sft", value={"rank": 2})
    del given["lora"]
    row = {"prompt_ids": [5], "completion_ids": [6, tiny.EOS], "reward": 1.0, "finished": True}
    Path(given["data"]).write_text("\n".join([json.dumps(row)] * 4))
    assert train("value", tmp_path, given) == 0
    before = load_file(tmp_path / "out" / "value_head.safetensors")
    cut(tmp_path / "out" / "checkpoint-4" / "value_head.safetensors")
    assert train("value", tmp_path, given, "--resume") == 0
    assert "value_head.safetensors cannot be read" in capsys.readouterr().err
    after = load_file(tmp_path / "out" / "value_head.safetensors")
    assert all(torch.equal(after[name], x) for name, x in before.items())


def test_scaler_of_float16(trained: Path, base: str, tmp_path: Path) -> None:
    given = copied(trained, tmp_path, base)
    given["arguments"]["fp16"] = True
    with pytest.raises(ValueError, match=r"scaler\.pt is missing"):
        run._checkpoint(config.Settings("sft", **given), tmp_path / "out")


def test_weights_in_pieces(trained: Path, tmp_path: Path) -> None:
    """Weights may be in pieces with an index; each piece must be complete."""
    shutil.copytree(trained / "out" / "checkpoint-4", tmp_path / "checkpoint-4")
    folder = tmp_path / "checkpoint-4"
    index, piece = folder / "model.safetensors.index.json", folder / "model-1.safetensors"
    index.write_text(json.dumps({"weight_map": {"a": piece.name}}))
    files = ["model.safetensors"]
    assert checkpoints.damage(folder, files) == "model-1.safetensors is missing"
    (folder / "adapter_model.safetensors").rename(piece)
    assert checkpoints.damage(folder, files) is None
    cut(piece)
    assert "model-1.safetensors cannot be read" in str(checkpoints.damage(folder, files))
    index.write_text("{}")
    assert "names no files" in str(checkpoints.damage(folder, files))
    cut(index)
    assert "index.json: not JSON" in str(checkpoints.damage(folder, files))
