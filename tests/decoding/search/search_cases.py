"""What the tests of searches share: prompts, the settings of a draw, and a model of few words."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import crossfade as cf
import torch
from crossfade import ops
from tiny_models import EOS
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

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


def few_words(seed: int, words: int = 5) -> PreTrainedModel:
    """A model whose every token is often drawn."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=words, num_attention_heads=2, **sizes)).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.5)
    return model


def log_ratio(tuned: Any, ref: Any) -> Callable[[list[int], list[int]], float]:
    """The value of a response that follows a prompt, from whole texts."""

    @functools.cache
    @torch.no_grad()
    def of(prompt: tuple[int, ...], response: tuple[int, ...]) -> float:
        ids = torch.tensor([prompt + response])
        at = torch.tensor(response)[:, None]
        total = 0.0
        for sign, model in ((1, tuned), (-1, ref)):
            log_p = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            total += sign * float(log_p.gather(1, at).double().sum())
        return total

    return lambda prompt, response: of(tuple(prompt), tuple(response))


def last_logits(model: PreTrainedModel) -> Callable[[list[int]], torch.Tensor]:
    """A function that gives ``[1, V]``, the logits after a text, which it reads whole but once."""

    @functools.cache
    def logits(text: tuple[int, ...]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([text])).logits[:, -1]

    return lambda text: logits(tuple(text))


def entropy(logits: torch.Tensor) -> float:
    """Nats, of the distribution that a row of logits has."""
    log_p = logits[0].double().log_softmax(-1)
    return -float((log_p.exp() * log_p).sum())


@torch.no_grad()
def by_hand(
    model: PreTrainedModel,
    prompt: list[int],
    request: int,
    score: Callable[[list[int], list[int]], float],
    width: int,
    samples: int,
    chunk_length: int | None,
    duplicate_finished: bool = False,
    most_entropy: float = float("inf"),
) -> list[tuple[float, list[int]]]:
    """The rows that stay at the end, the best first, by lists and whole texts without a cache."""
    limit, after = DRAW["max_new_tokens"], last_logits(model)
    rows: list[list[int] | None] = [[] for _ in range(width * samples)]

    def ended(row: list[int]) -> bool:
        return len(row) == limit or (bool(row) and row[-1] in EOS_IDS)

    while True:
        for slot, row in enumerate(rows):
            begun = 0 if row is None else len(row)
            while row is not None and not ended(row) and len(row) < begun + (chunk_length or limit):
                logits = after(prompt + row)
                if len(row) > begun and entropy(logits) > most_entropy:
                    break
                stream = request + (slot << 32)
                drawn = ops.blend_sample(
                    [logits], [1.0], temperature=1.2, seed=5, stream=stream, step=len(row)
                )
                row.append(int(drawn.tokens))
        scored = [(score(prompt, r), slot, r) for slot, r in enumerate(rows) if r is not None]
        best = sorted(scored, key=lambda x: (-x[0], x[1]))[:width]
        if all(ended(r) for _, _, r in best):
            return [(value, r) for value, _, r in best]
        rows = []
        for _, _, r in best:
            one = ended(r) and not duplicate_finished
            rows += [list(r), *[None if one else list(r) for _ in range(samples - 1)]]
