"""Training: rows made from rewards, trainers on those of TRL and Transformers, and value heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import lazy

if TYPE_CHECKING:  # type checkers take `X as X` for a public name
    from ..models.saved_value_heads import load_value_head as load_value_head
    from ..models.saved_value_heads import save_value_head as save_value_head
    from ..models.value_heads import value_model as value_model
    from .clp.trainer import CLPTrainer as CLPTrainer
    from .clp_config import CLPConfig as CLPConfig
    from .data import pairs as pairs
    from .data import read_jsonl as read_jsonl
    from .data import rollouts as rollouts
    from .data import values as values
    from .fused_head import add_linear_logp as add_linear_logp
    from .on_policy import SelfJudgeConfig as SelfJudgeConfig
    from .on_policy import SelfJudgeTrainer as SelfJudgeTrainer
    from .ratings import rated_pairs as rated_pairs
    from .trainers.dpo import DPOTrainer as DPOTrainer
    from .trainers.jsft import JSFTTrainer as JSFTTrainer
    from .trainers.kto import KTOTrainer as KTOTrainer
    from .trainers.sft import SFTTrainer as SFTTrainer
    from .value.trainer import ValueConfig as ValueConfig
    from .value.trainer import ValueTrainer as ValueTrainer

# The module that each public name comes from. It is imported when the name is first used, because
# the modules need different packages, such as TRL, which may not be installed.
_HOME = {
    "CLPConfig": "clp_config",
    "CLPTrainer": "clp.trainer",
    "DPOTrainer": "trainers.dpo",
    "JSFTTrainer": "trainers.jsft",
    "KTOTrainer": "trainers.kto",
    "SFTTrainer": "trainers.sft",
    "SelfJudgeConfig": "on_policy",
    "SelfJudgeTrainer": "on_policy",
    "ValueConfig": "value.trainer",
    "ValueTrainer": "value.trainer",
    "add_linear_logp": "fused_head",
    "load_value_head": ".models.saved_value_heads",
    "pairs": "data",
    "rated_pairs": "ratings",
    "read_jsonl": "data",
    "rollouts": "data",
    "save_value_head": ".models.saved_value_heads",
    "value_model": ".models.value_heads",
    "values": "data",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    return lazy.attribute(__name__, name, _HOME)


def __dir__() -> list[str]:
    return __all__
