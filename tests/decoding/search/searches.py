"""What the tests of searches share: prompts, and the settings of a draw."""

from __future__ import annotations

from typing import Any

import crossfade as cf
from tiny_models import EOS

SIMPLE = cf.Engine(simple=True)
EOS_IDS = [EOS, *range(20, 30)]
PROMPTS = [[7, 9, 30, 12, 8], [40], [11, 12, 13, 14, 15, 16, 17, 18, 19], [33, 6]]
DRAW: dict[str, Any] = {
    "max_new_tokens": 13,
    "temperature": 1.2,
    "seed": 5,
    "eos_token_id": EOS_IDS,
}
TEXTS = ["the film was", "plot very", "great cast the plot"]
