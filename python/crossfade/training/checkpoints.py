"""Checkpoints that a run can go on from: all that is needed is there and can be read."""

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
    """The folders of checkpoints in a folder, the last one first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", p.name), p) for p in folder.glob("checkpoint-*")]
    steps = [(int(name[1]), p) for name, p in found if name and p.is_dir()]
    return [p for _, p in sorted(steps, reverse=True)]


def last_complete(folder: Path, model: Sequence[str]) -> tuple[Path, dict[Path, str]]:
    """The last checkpoint that a run can go on from, and why not from later ones.

    Args:
        folder: where a run saved its checkpoints.
        model: the files of the model that each has, see `damage`.

    Raises:
        ValueError: there is none; says why.
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
    """What keeps a run from going on from a checkpoint: it was cut while it was saved, say.

    Nothing is loaded, so that large files cost no time; what was cut is found by its end.

    Args:
        model: names of .json, .safetensors (maybe in pieces, with an index) and .pt files.
    """
    state: Any = _json(checkpoint / TRAINER_STATE_NAME)  # what is saved last
    if isinstance(state, str):
        return state
    if state.get("global_step") != int(checkpoint.name.rpartition("-")[2]):
        return f"{TRAINER_STATE_NAME} is of step {state.get('global_step')!r}"
    if any(p.is_dir() and p.name.startswith(SHARDED) for p in checkpoint.iterdir()):
        return None  # what is in these, the libraries that wrote them know
    random = sorted(p.name for p in checkpoint.glob("rng_state*.pth")) or ["rng_state.pth"]
    for name in (*model, OPTIMIZER_NAME, SCHEDULER_NAME, *random):
        if isinstance(why := READERS[Path(name).suffix](checkpoint / name), str):
            return why
    return None


def _json(file: Path) -> dict[str, Any] | str:
    """What is in a file, or why that cannot be read."""
    if not file.is_file():
        return f"{file.name} is missing"
    try:
        found = reading.parse_json(reading.read_text(file), file.name)
    except ValueError as error:
        return str(error)
    return found if isinstance(found, dict) else f"{file.name} is no object"


def _weights(file: Path) -> str | None:
    """Why tensors cannot be read from a file, or from those of its index."""
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
            with safe_open(piece, "pt"):  # compares the file's size with what its header says
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
