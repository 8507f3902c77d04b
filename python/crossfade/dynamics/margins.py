"""The margins that a run has measured so far, in a file that a later call goes on with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import reading
from ..files import write_text

FILE, SETTINGS = "margins.json", "settings.json"


class Margins:
    """Margins of held-out pairs by step, kept in a folder."""

    def __init__(self, folder: Path, steps: Sequence[int]) -> None:
        self.file, self.steps = folder / FILE, tuple(steps)
        self.found: dict[int, list[float]] = {}
        if self.file.exists():
            read = reading.parse_json(reading.read_text(self.file), str(self.file))
            self.found = {int(step): margins for step, margins in read.items()}

    def add(self, step: int, margins: Tensor) -> None:
        """Keep the margins ``[pairs]`` of a step."""
        self.found[step] = margins.tolist()
        write_text(self.file, json.dumps(self.found))

    @property
    def whole(self) -> bool:
        """Whether every step was measured."""
        return all(step in self.found for step in self.steps)

    @property
    def table(self) -> Tensor:
        """``[steps, pairs]`` float64."""
        return torch.tensor([self.found[step] for step in self.steps], dtype=torch.float64)


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Require that a folder was begun with the same settings, or note them in a new one.

    Raises:
        ValueError: it was begun with others, which are named; or it holds something else.
    """
    file = folder / SETTINGS
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir is {str(folder)!r}, a file; it must be a folder")
    if file.exists():
        before = reading.parse_json(reading.read_text(file), str(file))
        changed = [name for name, x in settings.items() if before.get(name) != x]
        if changed:
            raise ValueError(
                f"output_dir is {str(folder)!r}, which was begun with other {', '.join(changed)}; "
                "it must be another folder"
            )
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"output_dir is {str(folder)!r}, which has files of something else; it must be a new "
            "folder, or that of the same call before"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(settings))
