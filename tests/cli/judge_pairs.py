"""Pairs of answers in the words of the small models, and the files that have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from word_models import WORDS

LETTERS = [*WORDS, "A", "B"]
PAIRS: list[dict[str, Any]] = [
    {"id": "one", "prompt": "a b c", "chosen": "d e", "rejected": "f"},
    {"prompt": "g", "first": "h i j", "second": "k"},
    {"messages": [{"role": "user", "content": "l m"}], "first": "n", "second": "o p"},
    {"prompt": "q r", "chosen": "s", "rejected": "t u", "metadata": {"x": 1}},
    {"prompt": "q r", "chosen": " ", "rejected": "t u"},
    {"prompt": "v", "first": "w x", "second": "w x"},
    {"prompt": "y", "chosen": "z", "rejected": "a z"},
]


def write(file: Path, pairs: list[Any]) -> str:
    file.write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    return str(file)
