"""What a `Watch` has seen, as it stands on disk: figures as JSON, and where they began."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import reading
from ..files import write_bytes, write_text


@dataclass
class Record:
    """The history of a run, and what its figures are of.

    Attributes:
        every: after how many steps the model was measured.
        beta: of the DPO losses.
        kind: "statements" or "pairs".
        head: "trained", "frozen" or "tied".
        behaviours: how many pairs each has.
        predicted: how far gradient descent first moves the head along each behaviour's direction,
            for a learning rate of 1; None where nothing says it.
        notes: what else there is to know of the figures.
        history: of each step that was measured, ``{"step": ..., "behaviours": {name: figures}}``.
        warnings: ``{"step": ..., "kind": ..., "behaviour": ..., "text": ...}``.
        seconds: what measuring took.
    """

    every: int
    beta: float
    kind: str
    head: str
    behaviours: dict[str, int]
    predicted: dict[str, float] | None = None
    notes: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def write(self, path: Path) -> None:
        """Write it in place of what was there; the file is whole, whenever the process ends."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"
        write_text(path, text)

    def go_on(self, before: Mapping[str, Any], step: int) -> None:
        """Take over what was seen up to a step that training goes on from."""
        self.history = [row for row in before["history"] if row["step"] <= step]
        self.warnings = [row for row in before["warnings"] if row["step"] <= step]
        self.predicted, self.seconds = before["predicted"], before["seconds"]


def read(path: Path) -> dict[str, Any]:
    """A record that was written.

    Raises:
        OSError: the file is not there, or cannot be read.
        ValueError: it is no such record; says why.
    """
    found = reading.parse_json(reading.read_text(path), str(path))
    names = [f.name for f in dataclasses.fields(Record)]
    missing = [name for name in names if not isinstance(found, dict) or name not in found]
    if missing:
        raise ValueError(f"{path} has no {missing[0]!r}; it must be a file that Watch wrote")
    if not isinstance(found["history"], list):
        raise ValueError(f"history of {path} is {found['history']!r:.80}; it must be a list")
    return found


def write_start(path: Path, start: Mapping[str, Tensor], pairs: Sequence[Any]) -> None:
    """Keep what a run's figures are compared with, so that it can be resumed."""
    tensors = {name: x.contiguous() for name, x in start.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, safetensors.torch.save(tensors, {"pairs": fingerprint(pairs)}))


def read_start(path: Path, pairs: Sequence[Any]) -> dict[str, Tensor]:
    """What `write_start` kept.

    Raises:
        OSError: the file is not there, or cannot be read.
        ValueError: it is of other pairs.
    """
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("pairs") != fingerprint(pairs):
                raise ValueError(
                    f"rows are not those that {path} is of; a run that is resumed must watch the "
                    "same rows (or remove that file, and its history begins anew)"
                )
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise OSError(f"{path} cannot be read: {error}") from None


def fingerprint(pairs: Sequence[Any]) -> str:
    """What tells pairs from others."""
    return hashlib.sha256(json.dumps([list(pair) for pair in pairs]).encode()).hexdigest()
