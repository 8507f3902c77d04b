"""What a blend makes needless: heads of several terms, whole rows of logits, columns, models."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...blends.blend import Blend
from ...ops import Support
from ..ranks import Shard
from .group import Group
from .lanes import after_head_of
from .lazy import Lazy
from .options import Engine
from .plan import All, Plan


class Fitting:
    """Fits groups to a blend: what it does not need is left out, as far as options allow.

    Attributes:
        models_of_logits: the models that each tensor of logits stands for, by their places.
        plan: decides which models read what at a step.
        shard: the columns of the vocabulary that this rank draws from; None: all of them. Logits
            have these columns then, or all.
        notes: what was not left out, and why.

    Args:
        models: how many of a call's models decide which tokens are drawn.
    """

    def __init__(self, groups: Sequence[Group], models: int, engine: Engine) -> None:
        self.groups, self.engine, self.models = groups, engine, models
        self.models_of_logits: list[tuple[int, ...]] = [(k,) for k in range(models)]
        self.plan: Plan = All(groups)
        self.shard: Shard | None = None
        self.notes: list[str] = []

    def fit(
        self,
        blend: Blend,
        weights: Tensor,
        vocabulary: int,
        why_each_term: str | None,
        why_whole: str | None,
        *,
        drafts: bool,
    ) -> None:
        """As of `EngineRunner`, with ``weights [slots, terms]``."""
        engine = self.engine
        why_mean = f"the blend has power {blend.power:g}" if blend.power != 0 else None
        if blend.parts:
            why_mean = "the blend has a clamp, a union or an intersection among its terms"
        if engine.share_head:
            why_support = None if blend.support is None else "the blend has a support"
            self._share_heads(weights, why_each_term or why_mean or why_support)
        self._keep_shards(why_whole)
        on_cpu = all(g.device.type == "cpu" for g in self.groups)
        in_shards = any(g.head.shard is not None for g in self.groups)
        if blend.support is not None and on_cpu and not in_shards:
            restrict = engine.restrict_guides and why_mean is None
            if engine.restrict_guides and why_mean is not None:
                self.notes.append(f"every model computes all columns: {why_mean}")
            if restrict or engine.skip_guides:
                why = "a draft" if drafts else why_each_term
                self._rest_others(blend.support, vocabulary, restrict, why)

    def _keep_shards(self, why_whole: str | None) -> None:
        """Let heads in shards stay so, where no whole rows of logits are needed.

        Those with the columns of the first one do; the logits of others are gathered.
        """
        sharded = [g for g in self.groups if g.head.shard is not None]
        shard = sharded[0].head.shard if sharded else None
        if shard is None:
            return
        if why_whole is not None:
            self.notes.append(f"logits are gathered from {shard.ranks.size} ranks: {why_whole}")
            return
        self.shard = shard
        for group in sharded:
            group.head.whole = group.head.shard != shard
            if group.head.whole:
                self.notes.append(
                    f"logits of {group.name} are gathered from {shard.ranks.size} ranks: its head "
                    f"has other columns on each than that of {sharded[0].name}"
                )

    def _share_heads(self, weights: Tensor, why: str | None) -> None:
        """Let terms over one model share its head, by blending their hidden states before it.

        Args:
            why: why no head may be shared; None if heads may.
        """
        for group in self.groups:
            own = list(group.terms[: group.own])
            blended = [k for k in own if k < weights.shape[1]]
            if len(blended) < 2:
                continue
            not_here = why or _why_not_linear(group)
            if blended != own:
                not_here = why or "others that are not blended are rows of the same forward"
            if not_here is None:
                group.head.weights = weights
            else:
                self.notes.append(f"a head for each term of {group.name}: {not_here}")
        merged = [g.terms[: g.own] for g in self.groups if g.head.weights is not None]
        together = {k for terms in merged for k in terms}
        alone = [(k,) for k in range(self.models) if k not in together]
        self.models_of_logits = sorted([*alone, *merged])

    def _rest_others(
        self, support: Support, vocabulary: int, restrict: bool, why: str | None
    ) -> None:
        """Let models other than the support's rest, or compute few columns of their heads.

        Args:
            restrict: as in `Lazy`.
            why: why all models must run in full at every step; None if they need not.
        """
        others = [g for g in self.groups if support.term not in g.terms]
        if not others and why is None:
            why = "they are rows of one forward with the support's term"
        of_values = any(k >= self.models for g in self.groups for k in g.riders)
        if why is None and (of_values or any(g.riders for g in others)):
            why = "value heads are over the rows of some"
        if why is not None:
            if self.models > 1:
                self.notes.append(f"all models run in full at every step: {why}")
            return
        skip = self.engine.skip_guides
        self.plan = Lazy(self.groups, support, vocabulary, restrict=restrict, skip=skip)
        for group in others if restrict else ():
            not_here = _why_not_some_columns(group)
            group.head.some_columns = not_here is None
            if not_here is not None:
                self.notes.append(f"all columns of the head of {group.name}: {not_here}")


NOT_PLAIN = "it is not a plain linear layer"


def _why_not_linear(group: Group) -> str | None:
    """Why a model's logits are not one linear map of its hidden states; None if they are."""
    if group.head.module is None:
        return NOT_PLAIN
    if group.head.module.bias is not None:
        return "it has a bias"
    if after_head_of(group.models[0]).is_linear:
        return None
    return "what the model makes of its outputs is not linear"


def _why_not_some_columns(group: Group) -> str | None:
    """Why some columns of a model's logits cannot be had without the others; None if they can."""
    if group.head.module is None:
        return NOT_PLAIN
    if after_head_of(group.models[0]).keeps_columns_apart:
        return None
    return "what the model makes of its outputs mixes them"
