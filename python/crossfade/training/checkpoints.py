"""Checkpoints that a run can go on from, because every file it needs is there and can be read."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from .. import reading

SHARDED = ("optimizer_", "pytorch_model_fsdp_", "global_step")  # folders of FSDP and DeepSpeed


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, which are folders themselves, the last one first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", p.name), p) for p in folder.glob("checkpoint-*")]
    steps = [(int(name[1]), p) for name, p in found if name and p.is_dir()]
    return [p for _, p in sorted(steps, reverse=True)]


def last_complete(folder: Path, model: Sequence[str]) -> tuple[Path, dict[Path, str]]:
    """The last checkpoint that a run can go on from, and what is wrong with each later one.

    Args:
        folder: where a run saved its checkpoints.
        model: the names of the model's files in each checkpoint, see `damage`.

    Raises:
        ValueError: there is no such checkpoint; says why.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in checkpoints(folder):
        why = damage(checkpoint, model)
        if why is None:
            return checkpoint, damaged
        damaged[checkpoint] = why
    if not damaged:
        raise ValueError(f"there is no checkpoint in {str(folder)!r}")
    listed = "; ".join(f"{path.name}: {why}" for path, why in damaged.items())
    raise ValueError(f"no checkpoint in {str(folder)!r} is complete ({listed})")


def damage(checkpoint: Path, model: Sequence[str]) -> str | None:
    """Why a run cannot go on from a checkpoint, or None if it can.

    A run may have been killed while it saved the checkpoint, for example. Weights are not loaded,
    so that large files cost no time; a file that was cut short is found by what is at its end.

    Args:
        model: names of files that end in .json, .safetensors or .pt. Safetensors may be in pieces,
            with an index.
    """
    state: Any = _json(checkpoint / TRAINER_STATE_NAME)  # the file that is saved last
    if isinstance(state, str):
        return state
    if state.get("global_step") != int(checkpoint.name.rpartition("-")[2]):
        return f"{TRAINER_STATE_NAME} is of step {state.get('global_step')!r}"
    if any(p.is_dir() and p.name.startswith(SHARDED) for p in checkpoint.iterdir()):
        return None  # only the libraries that wrote these folders know what must be there
    random = sorted(p.name for p in checkpoint.glob("rng_state*.pth")) or ["rng_state.pth"]
    for name in (*model, OPTIMIZER_NAME, SCHEDULER_NAME, *random):
        if isinstance(why := READERS[Path(name).suffix](checkpoint / name), str):
            return why
    return None


def _json(file: Path) -> dict[str, Any] | str:
    """The JSON object in a file, or why it cannot be read."""
    if not file.is_file():
        return f"{file.name} is missing"
    try:
        found = reading.parse_json(reading.read_text(file), file.name)
    except ValueError as error:
        return str(error)
    return found if isinstance(found, dict) else f"{file.name} is no object"


def _weights(file: Path) -> str | None:
    """Why a file of safetensors, or a piece of it that its index names, cannot be read; or None."""
    files = [file]
    index = file.with_name(f"{file.name}.index.json")
    if not file.is_file() and index.is_file():
        read = _json(index)
        pieces = read if isinstance(read, str) else read.get("weight_map")
        if not isinstance(pieces, dict):
            return f"{index.name} names no files" if pieces is None else str(pieces)
        files = [file.with_name(str(name)) for name in sorted(set(pieces.values()))]
    for piece in files:
        if not piece.is_file():
            return f"{piece.name} is missing"
        try:
            with safe_open(piece, "pt"):  # this compares the size of the file with its header
                pass
        except (SafetensorError, OSError) as error:
            return f"{piece.name} cannot be read: {error}"
    return None


def _torch(file: Path) -> str | None:
    if not file.is_file():
        return f"{file.name} is missing"
    return None if zipfile.is_zipfile(file) else f"{file.name} is cut or no file of torch"


READERS: dict[str, Callable[[Path], Any]] = {
    ".json": _json,
    ".safetensors": _weights,
    ".pt": _torch,
    ".pth": _torch,
}
