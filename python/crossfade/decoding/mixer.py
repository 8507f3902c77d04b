"""A blend's arithmetic for the rows of one call."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..blends.blend import Blend
from ..ops import BlendSample, Inputs, Part, check
from ..ops.check import Weights
from ..ops.reference import pushes_of
from .ranks import Shard

PartWeights = tuple[tuple[float, ...], ...] | Tensor


def row_weights(
    blend: Blend, requests: int, device: torch.device
) -> tuple[Weights, Weights, PartWeights, Weights]:
    """The weights of a blend as `Mixer` takes them, of its terms, values, parts and classifiers,
    for a batch of `requests`."""
    return (
        blend.row_weights(requests, device),
        blend.row_value_weights(requests, device),
        blend.row_part_weights(requests, device),
        blend.row_classifier_weights(requests, device),
    )


def rows_of(x: Any, rows: Tensor | None) -> Any:
    """What some rows ``[n]`` have of a tensor with an entry a row; anything else is of all rows."""
    return x if rows is None or not isinstance(x, Tensor) else x[rows]


class Mixer:
    """A blend of logits, each row with its own weights.

    Args:
        weights: those of terms, values, parts and classifiers, as `row_weights` gives them: K
            numbers, or a tensor ``[rows, K]``; of each part K, or a tensor ``[rows, parts, K]``.
        models_of_logits: the models that each tensor of logits stands for. Several share a head and
            come blended already. Those after the blend's own terms and values are of references.
            None: each tensor stands for one model.
        references: what divergences are measured to, each with the places of its logits among those
            of a step.

        shard: the columns of the vocabulary that this rank draws from, where logits have these, or
            all; None: they have all.

    Attributes:
        terms: how many tensors of logits stand for terms. Those of values follow them.
        said: what the blend's classifiers say of the next tokens, ``[rows, V]`` each; empty before
            they are asked.
    """

    def __init__(
        self,
        blend: Blend,
        weights: Sequence[Any],
        vocabulary: int,
        models_of_logits: Sequence[tuple[int, ...]] | None = None,
        references: Sequence[tuple[Mixer, Sequence[int]]] = (),
        shard: Shard | None = None,
    ) -> None:
        self.blend, self.vocabulary = blend, vocabulary
        k, all_own = len(blend.terms), len(blend.terms) + len(blend.values)
        each = models_of_logits or [(i,) for i in range(all_own)]
        self.models_of_logits = [models for models in each if models[0] < all_own]
        self.terms = sum(models[0] < k for models in self.models_of_logits)
        self.weights, self.value_weights, self.part_weights, self.classifier_weights = weights
        self.references, self.said = references, list[Tensor]()
        self.shard = shard

    def of(self, rows: Tensor | None) -> Mixer:
        """The same for some of the rows ``[n]``, with their own weights; for all if None."""
        if rows is None:
            return self
        few = copy.copy(self)
        each = self.weights, self.value_weights, self.part_weights, self.classifier_weights
        few.weights, few.value_weights, few.part_weights, few.classifier_weights = (
            rows_of(w, rows) for w in each
        )
        few.references = [(mixer.of(rows), places) for mixer, places in self.references]
        few.said = [x[rows] for x in self.said]
        return few

    def _term_weights(self) -> Weights:
        """The weight of each tensor of logits that stands for terms: 1 if it is blended already."""
        terms, w = self.models_of_logits[: self.terms], self.weights
        if all(len(models) == 1 for models in terms):
            return w
        if isinstance(w, Tensor):
            one = w.new_ones(len(w))
            return torch.stack([w[:, ks[0]] if len(ks) == 1 else one for ks in terms], dim=1)
        return tuple(w[ks[0]] if len(ks) == 1 else 1.0 for ks in terms)

    def _values(self, logits: Sequence[Tensor]) -> tuple[list[Tensor], Weights]:
        """What values and classifiers say of the next tokens, and their weights."""
        own, weights = [*logits[self.terms : len(self.models_of_logits)]], self.value_weights
        if not self.said:
            return own, weights
        if not own:
            return self.said, self.classifier_weights
        both = weights, self.classifier_weights
        if not any(isinstance(w, Tensor) for w in both):
            return own + self.said, (*both[0], *both[1])
        rows, like = len(self.said[0]), self.said[0]
        each = [torch.as_tensor(w, dtype=torch.float32, device=like.device) for w in both]
        return own + self.said, torch.cat([w.expand(rows, w.shape[-1]) for w in each], dim=1)

    def _inputs(self, logits: Sequence[Tensor]) -> dict[str, Any]:
        values, weights = self._values(logits)
        return {
            "logits": logits[: self.terms],
            "weights": self._term_weights(),
            "values": values,
            "value_weights": weights,
            "power": self.blend.power,
            "parts": self._parts(),
            "support": self.blend.support,
            "vocab_size": self.vocabulary,
        }

    def _parts(self) -> list[Part]:
        w = self.part_weights
        each = w.unbind(1) if isinstance(w, Tensor) else w
        return [
            Part(own, part.power, part.min, part.max)
            for own, part in zip(each, self.blend.parts, strict=True)
        ]

    def log_probs(self, logits: Sequence[Tensor]) -> Tensor:
        """``[rows, V]`` float32 under the blend."""
        return ops.blend(**self._inputs(logits))

    def sample(self, logits: Sequence[Tensor], draw: dict[str, Any]) -> BlendSample:
        if self.shard is not None:
            return self._sample_shard(self.shard, logits, draw)
        return ops.blend_sample(**self._inputs(logits), **draw)

    def _sample_shard(
        self, shard: Shard, logits: Sequence[Tensor], draw: dict[str, Any]
    ) -> BlendSample:
        """The same where the ranks have the columns of the vocabulary together."""
        columns = min(shard.end, self.vocabulary) - shard.first
        if columns > 0:
            inputs = self._inputs([shard.part(z) for z in logits])
            inputs["vocab_size"] = columns
        else:  # This rank has padding alone: a column without probability, which no token is.
            inputs = self._inputs([torch.full_like(z[..., :1], -torch.inf) for z in logits])
            inputs["vocab_size"] = 1
            inputs["mask"] = torch.zeros(1, dtype=torch.bool, device=logits[0].device)
        partial = ops.blend_sample(**inputs, **draw, first_token=shard.first, return_partial=True)
        return ops.merge([partial], shard.reduce)

    def term_log_probs(self, logits: Sequence[Tensor]) -> list[Tensor]:
        """``[rows, V]`` float32 under each term alone."""
        z = logits[: self.terms]
        return [t[:, : self.vocabulary].float().log_softmax(dim=-1) for t in z]

    def pushes(self, logits: Sequence[Tensor], log_p: Tensor, tokens: Tensor) -> Tensor:
        """`BlendSample.pushes` of tokens that were not drawn from the blend itself.

        Args:
            log_p: ``[rows, V]`` under the blend.
            tokens: ``[rows]``.
        """
        return pushes_of(Inputs(**self._inputs(logits)), log_p.double(), tokens).float()

    def divergences(self, logits: Sequence[Tensor]) -> Tensor:
        """``[rows, references]`` nats: KL(blend at temperature 1 || reference).

        Infinite where a reference excludes a token that the blend does not; NaN where the
        reference is bad.
        """
        log_p = self.log_probs(logits)
        found = []
        for reference, places in self.references:
            log_q = reference.log_probs([logits[k] for k in places])
            ratio = torch.where(log_p == -torch.inf, 0.0, log_p - log_q)
            # An exp(log_p) that is rounded to 0 must not hide a ratio that is infinite.
            nats = torch.where(ratio == torch.inf, torch.inf, log_p.exp() * ratio).sum(dim=-1)
            found.append(nats.clamp(min=0.0))  # Only rounding puts it below 0.
        return torch.stack(found, dim=1)

    def entropies(self, logits: Sequence[Tensor]) -> Tensor:
        """``[rows]`` nats: ``-sum_v p(v) log p(v)`` of the blend at temperature 1; NaN if bad."""
        log_p = self.log_probs(logits)
        # A log-prob of -inf has the probability 0, and 0 times a finite number is 0.
        return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(dim=-1)

    def scores(self, logits: Sequence[Tensor], log_p: Tensor) -> Tensor:
        """What logits processors read: the blended logits, or log-probs where there are none.

        The geometric blend has logits, ``sum_k w_k z_k + sum_m v_m q_m``: with one term of weight 1
        the model's own, so that processors which look at the sign of a logit (the repetition
        penalty) do what they do in Hugging Face. They are `log_p`, shifted so that the best token
        has its blended logit.
        """
        if self.blend.power != 0 or self.blend.parts:
            return log_p.clone()  # A processor may write into it.
        best = log_p.argmax(dim=-1, keepdim=True)
        shift = -log_p.gather(1, best)
        k = self.terms
        for group, weights in (
            (logits[:k], self._term_weights()),
            self._values(logits),
        ):
            w = torch.as_tensor(weights, dtype=torch.float32, device=log_p.device)
            w = w.expand(len(log_p), len(group))
            for i, z in enumerate(group):
                score = w[:, i : i + 1] * z.gather(1, best).float()
                shift = shift + torch.where(w[:, i : i + 1] == 0, 0.0, score)
        return log_p + shift

    def why_bad(self, row: int, logits: Sequence[Tensor], names: Sequence[str]) -> str:
        """Why no token could be chosen for a row."""
        for weights, power in ((self.weights, self.blend.power), (self.value_weights, 0.0)):
            if isinstance(weights, Tensor) and _bad(weights[row], power):
                return f"its weights are {weights[row].tolist()}"
        w = self.part_weights
        if isinstance(w, Tensor) and not w[row].isfinite().all():
            return f"the weights of its parts are {w[row].tolist()}"
        pulls = self.classifier_weights
        if isinstance(pulls, Tensor) and not pulls[row].isfinite().all():
            return f"the weights of its classifiers are {pulls[row].tolist()}"
        for name, said in zip(self.blend.classifier_names, self.said, strict=False):
            if not said[row].isfinite().all():
                return f"{name} gave a class no probability that is a number above 0"
        # This leaves out the references, whose logits come last.
        culprits = [
            " and ".join(names[k] for k in models)
            for models, z in zip(self.models_of_logits, logits, strict=False)
            if (z[row, : self.vocabulary].isnan() | z[row, : self.vocabulary].isposinf()).any()
        ]
        if culprits:
            return f"{' and '.join(culprits)} gave logits that are NaN or infinite"
        none_left = "no token has a finite score"
        if self.blend.power == -torch.inf:
            none_left += f": each is excluded by one of the terms of {self.blend}"
        return none_left


def _bad(w: Tensor, power: float) -> bool:
    """Whether a row's weights, one for each term, are such that no blend has them."""
    mean = power != 0 and ((w < 0).any() or (w.sum() - 1).abs() > check.WEIGHT_SUM_TOLERANCE)
    return bool(mean) or not bool(w.isfinite().all())
