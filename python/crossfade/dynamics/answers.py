"""How the output head's weights of the answers yes and no move, and how they were said to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.hf import underlying
from .questions import Pair
from .readings import has_linear_head, logits_of
from .states import LastStates, term_model

NOTES = {
    "frozen": "the head is frozen: what is watched is the margin of the logits of yes and no",
    "tied": "the head is tied to the embeddings, which change for other reasons too: what is "
    "watched is the margin of the logits of yes and no",
}


def kind_of(model: Any) -> str:
    """Whether a model's head is "trained", "frozen", or "tied" to embeddings that are trained."""
    bare: Any = underlying(model)
    head, embeddings = bare.get_output_embeddings(), bare.get_input_embeddings()
    if not any(p.requires_grad for p in head.parameters()):
        return "frozen"
    return "tied" if getattr(head, "weight", None) is embeddings.weight else "trained"


@dataclass(frozen=True, eq=False)
class Answers:
    """Where the head's weights of two answers begin, and where each behaviour will pull them.

    At step 0 the gradient of DPO's loss on the head is ``-(beta / 2) (e_yes - e_no) stepᵀ`` for a
    behaviour's statements (`Statistics.step`; arXiv:2403.18742, Theorem 4.1). So a behaviour pulls
    the head along ``u = (e_yes - e_no) / sqrt(2)  stepᵀ / |step|``, which is a matrix of norm 1.

    Attributes:
        yes, no: the tokens of the answers, in either order.
        start: ``[H]`` float64: the head's row of yes less that of no, at step 0.
        steps: ``[behaviours, H]`` float64: the `step` of each, positive being what answers yes.
    """

    yes: int
    no: int
    start: Tensor
    steps: Tensor

    @classmethod
    def of(
        cls, model: Any, pairs: Sequence[Pair], yes: int, no: int, max_batch: int | None = None
    ) -> Answers:
        """Those of a model before its training.

        Args:
            pairs: statements, whose responses are these two tokens.

        Raises:
            NotImplementedError: the head reads something else than the states of the backbone.
        """
        states = LastStates(model)([pair.prompt_ids for pair in pairs], max_batch)
        signed = states * torch.tensor([[1.0 if p.chosen_ids[0] == yes else -1.0] for p in pairs])
        own: dict[str, list[int]] = {}
        for i, pair in enumerate(pairs):
            own.setdefault(pair.behaviour, []).append(i)
        steps = torch.stack([signed[places].mean(0) for places in own.values()])
        return cls(yes, no, difference(model, yes, no), steps)

    def moved(self, model: Any) -> list[dict[str, float | None]]:
        """How far the head has moved along each behaviour's u, and the cosine to it of all of the
        change in how it tells yes from no."""
        change = difference(model, self.yes, self.no) - self.start
        along = self._units @ change
        length = float(change.norm())
        return [
            {"head": x / math.sqrt(2), "head_cosine": x / length if length else None}
            for x in along.tolist()
        ]

    def rates(self, model: Any, counts: Mapping[str, int], beta: float) -> dict[str, float] | None:
        """How far gradient descent first moves the head along each behaviour's u, for a learning
        rate of 1, by DPO's mean loss over all these statements.

        For one behaviour it is `Statistics.gradient_norm`. With several, each also pulls along the
        directions of the others.

        Args:
            counts: how many statements each behaviour has.

        Returns:
            The rate of each; None where logits are more than a multiple of the head's products.
        """
        term = term_model(model)
        bare: Any = underlying(term.runs)
        logits = logits_of(bare)
        if not has_linear_head(term) or logits.softcap is not None:
            return None
        shares = torch.tensor([*counts.values()]).double()
        mean = (shares / shares.sum()) @ self.steps
        # the derivative of a logit by the product of its row with what the head reads
        scale = logits.scale / LastStates(model).scale
        rates = scale * beta / math.sqrt(2) * (self._units @ mean)
        return dict(zip(counts, rates.tolist(), strict=True))

    @property
    def _units(self) -> Tensor:
        lengths = self.steps.norm(dim=1, keepdim=True)
        return self.steps / lengths.where(lengths > 0, 1.0)


@torch.enable_grad()
def difference(model: Any, yes: int, no: int) -> Tensor:
    """``[H]`` float64 on the CPU: the head's row of one token less that of another.

    Rows are derivatives of logits by what the head reads, so that adapters on the head count.
    """
    bare: Any = underlying(term_model(model).runs)
    head = bare.get_output_embeddings()
    like = next(p for p in head.parameters() if p.is_floating_point())
    width = bare.config.get_text_config().hidden_size
    x = torch.zeros(1, width, dtype=like.dtype, device=like.device, requires_grad=True)
    with torch.autocast(x.device.type, enabled=False):
        logits = head(x)[0]
    rows = [torch.autograd.grad(logits[t], x, retain_graph=True)[0][0] for t in (yes, no)]
    first, second = (row.to("cpu", torch.float64) for row in rows)
    return first - second
