"""Changes to the files of saved models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crossfade.models.saved import INDEX
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"


def edit_json(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))


def edit_tensors(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def without(part: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        for key in [key for key in tensors if part in key]:
            del tensors[key]

    return change


def in_parts(folder: Path) -> dict[str, str]:
    """Save the weights of a model in two parts with an index, and return where each tensor went."""
    tensors = load_file(folder / WEIGHTS)
    places = {key: f"part-{i % 2}.safetensors" for i, key in enumerate(sorted(tensors))}
    for part in set(places.values()):
        save_file({k: t for k, t in tensors.items() if places[k] == part}, folder / part)
    (folder / WEIGHTS).unlink()
    write_index(folder, places)
    return places


def write_index(folder: Path, places: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
