"""Training: data builders, trainers on TRL's and Transformers' own, value heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import lazy

if TYPE_CHECKING:
    from .data import pairs, read_jsonl, rollouts, values
    from .fused_head import add_linear_logp
    from .trainers import DPOTrainer, KTOTrainer, SFTTrainer
    from .value_head import load_value_head, save_value_head, value_model
    from .value_trainer import ValueConfig, ValueTrainer

# Imported at their first use: each needs other packages than the rest, TRL among them.
_HOME = {
    "DPOTrainer": "trainers",
    "KTOTrainer": "trainers",
    "SFTTrainer": "trainers",
    "ValueConfig": "value_trainer",
    "ValueTrainer": "value_trainer",
    "add_linear_logp": "fused_head",
    "load_value_head": "value_head",
    "pairs": "data",
    "read_jsonl": "data",
    "rollouts": "data",
    "save_value_head": "value_head",
    "value_model": "value_head",
    "values": "data",
}

__all__ = [
    "DPOTrainer",
    "KTOTrainer",
    "SFTTrainer",
    "ValueConfig",
    "ValueTrainer",
    "add_linear_logp",
    "load_value_head",
    "pairs",
    "read_jsonl",
    "rollouts",
    "save_value_head",
    "value_model",
    "values",
]


def __getattr__(name: str) -> Any:
    return lazy.attribute(__name__, name, _HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
