"""Training: data builders, trainers on TRL's and Transformers' own, value heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import lazy

if TYPE_CHECKING:  # type checkers take `X as X` for a public name
    from .data import pairs as pairs
    from .data import read_jsonl as read_jsonl
    from .data import rollouts as rollouts
    from .data import values as values
    from .fused_head import add_linear_logp as add_linear_logp
    from .trainers import DPOTrainer as DPOTrainer
    from .trainers import KTOTrainer as KTOTrainer
    from .trainers import SFTTrainer as SFTTrainer
    from .value_head import load_value_head as load_value_head
    from .value_head import save_value_head as save_value_head
    from .value_head import value_model as value_model
    from .value_trainer import ValueConfig as ValueConfig
    from .value_trainer import ValueTrainer as ValueTrainer

# The module that each public name comes from. It is imported when the name is first used, because
# each needs other packages, TRL among them.
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

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return lazy.attribute(__name__, name, _HOME)


def __dir__() -> list[str]:
    return __all__
