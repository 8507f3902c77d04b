"""A judge of tiny models, and judgments by their definition: full softmaxes of plain forwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import crossfade as cf
import torch
from tiny_models import make, make_tokenizer
from torch import Tensor

TEMPLATE = cf.JudgeTemplate(
    question="the {principle} film ?",
    prefix="the {principle} film was",
    principle="very bright",
    principles={"plot": "plot", "cast": "cast", "dull": "very dull"},
    labels=("great", "awful"),
    system=None,
)
CONTEXTS: list[Any] = [
    "the film was",
    [{"role": "user", "content": "the plot"}],
    [
        {"role": "system", "content": "a cast"},
        {"role": "user", "content": "the plot was"},
        {"role": "assistant", "content": "dull"},
        {"role": "user", "content": "w1 w2 the cast"},
    ],
]
FIRSTS = ["a bright plot", "w3 w4 w5", "the cast was very very bright"]
SECONDS = ["dull", "a dull dull plot w9", "w7"]


def make_judge(model: Any = None, **options: Any) -> cf.Judge:
    return cf.Judge(
        make() if model is None else model,
        tokenizer=make_tokenizer(),
        **{"template": TEMPLATE, **options},
    )


def label_probs(judge: cf.Judge, text: str) -> list[float]:
    """The probabilities of both labels after a text, of one plain forward of each term."""
    ids = torch.tensor([judge.tokenizer(text, add_special_tokens=False)["input_ids"]])
    labels = [judge.tokenizer.convert_tokens_to_ids(x.strip()) for x in judge.labels]
    total = 0.0
    with torch.no_grad():
        for term, weight in zip(judge.blend.terms, judge.blend.weights, strict=True):
            total = total + weight * term.model(ids).logits[0, -1].double().log_softmax(-1)
    return torch.as_tensor(total).softmax(-1)[labels].tolist()


def by_definition(
    judge: cf.Judge, contexts: Sequence[Any], firsts: Sequence[str], seconds: Sequence[str]
) -> Tensor:
    """``[n, P, 2]``: s_a and s_b of each pair and principle."""
    found = []
    for context, a, b in zip(contexts, firsts, seconds, strict=True):
        for p in judge.principles:
            a_ab, b_ab = label_probs(judge, judge.prompt(context, a, b, p))
            a_ba, b_ba = label_probs(judge, judge.prompt(context, b, a, p))
            found.append([(a_ab + b_ba) / 2, (b_ab + a_ba) / 2])
    return torch.tensor(found, dtype=torch.float64).view(-1, len(judge.principles), 2)
