"""Decode with several language models at once: blends, values, and the kernels under them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import lazy

if TYPE_CHECKING:  # type checkers take `X as X` for a public name
    from . import dynamics as dynamics
    from . import losses as losses
    from . import metrics as metrics
    from . import models as models
    from . import ops as ops
    from . import pareto as pareto
    from . import policies as policies
    from . import presets as presets
    from . import training as training
    from .blends.blend import Blend as Blend
    from .blends.blend import Model as Model
    from .blends.blend import ValueHead as ValueHead
    from .blends.blend import as_blend as as_blend
    from .blends.classifier import Classifier as Classifier
    from .blends.power_mean import intersection as intersection
    from .blends.power_mean import power_mean as power_mean
    from .blends.power_mean import union as union
    from .blends.values import LogRatio as LogRatio
    from .blends.values import Reward as Reward
    from .blends.values import RewardModel as RewardModel
    from .blends.values import ValueSum as ValueSum
    from .blends.values import as_value as as_value
    from .decoding import Engine as Engine
    from .decoding import Output as Output
    from .decoding import Scores as Scores
    from .decoding import decode as decode
    from .decoding import generate as generate
    from .decoding import score as score
    from .decoding.session import Piece as Piece
    from .decoding.session import Request as Request
    from .decoding.session import Session as Session
    from .drafts import Draft as Draft
    from .formula import parse as parse
    from .models.quantized import quantize as quantize
    from .ops import Support as Support
    from .policies.conditioned import ConditionedPolicy as ConditionedPolicy
    from .policies.metaaligner import AlignerTemplate as AlignerTemplate
    from .policies.metaaligner import Corrections as Corrections
    from .policies.metaaligner import MetaAligner as MetaAligner
    from .policies.metaaligner import correct as correct
    from .policies.self_judge import Judge as Judge
    from .policies.self_judge import JudgeTemplate as JudgeTemplate
    from .search import BestOfN as BestOfN
    from .search import ChunkBeamSearch as ChunkBeamSearch
    from .search import ParticleFilter as ParticleFilter
    from .search import Recipe as Recipe
    from .search import Tournament as Tournament
    from .search import entropy_above as entropy_above
    from .search import sentence_end as sentence_end

# The module that each public name comes from. It is imported when the name is first used, so that
# the kernels alone, or the help of the command line, do not wait for transformers.
_HOME = {
    "AlignerTemplate": "policies.metaaligner",
    "BestOfN": "search",
    "Blend": "blends.blend",
    "ChunkBeamSearch": "search",
    "ConditionedPolicy": "policies.conditioned",
    "Classifier": "blends.classifier",
    "Corrections": "policies.metaaligner",
    "Draft": "drafts",
    "Engine": "decoding",
    "Judge": "policies.self_judge",
    "JudgeTemplate": "policies.self_judge",
    "LogRatio": "blends.values",
    "MetaAligner": "policies.metaaligner",
    "Model": "blends.blend",
    "Output": "decoding",
    "ParticleFilter": "search",
    "Piece": "decoding.session",
    "Recipe": "search",
    "Request": "decoding.session",
    "Reward": "blends.values",
    "RewardModel": "blends.values",
    "Scores": "decoding",
    "Session": "decoding.session",
    "Support": "ops",
    "Tournament": "search",
    "ValueHead": "blends.blend",
    "ValueSum": "blends.values",
    "as_blend": "blends.blend",
    "as_value": "blends.values",
    "correct": "policies.metaaligner",
    "decode": "decoding",
    "entropy_above": "search",
    "generate": "decoding",
    "intersection": "blends.power_mean",
    "parse": "formula",
    "quantize": "models.quantized",
    "power_mean": "blends.power_mean",
    "score": "decoding",
    "sentence_end": "search",
    "union": "blends.power_mean",
}
_MODULES = (
    *("dynamics", "losses", "metrics", "models", "ops", "pareto", "policies", "presets"),
    "training",
)

__all__ = sorted([*_HOME, *_MODULES])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata  # here, because it takes half the time of an import

        return metadata.version(__name__)
    return lazy.attribute(__name__, name, _HOME, _MODULES)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
