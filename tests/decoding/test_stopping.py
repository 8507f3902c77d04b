"""What ends a row: criteria, stop strings, time, and its end of text."""

from __future__ import annotations

import time
from typing import Any

import crossfade as cf
import pytest
import torch
from draw_settings import Batch
from tiny_models import EOS, make_letters
from transformers import LogitsProcessor, PreTrainedModel, StoppingCriteria


class Stop(StoppingCriteria):
    """Ends row i after i + 1 new tokens."""

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        new = input_ids.shape[1] - self.prompt
        return torch.arange(len(input_ids)) < new


def test_stopping_criteria(base: PreTrainedModel, batch: Batch) -> None:
    arguments = {"max_new_tokens": 3, "stopping_criteria": [Stop(9)], "pad_token_id": 4}
    out = cf.generate(base, batch, **arguments)
    assert out.lengths.tolist() == [1, 2, 3, 3]
    assert out.finished.tolist() == [True, True, True, False]
    theirs = base.generate(**batch, **arguments)
    assert torch.equal(out.sequences, theirs)


def test_stop_strings(base: PreTrainedModel) -> None:
    letters = make_letters()
    prompts = letters(["thethe", "oneandone"], padding=True, return_tensors="pt")
    plain = cf.generate(base, prompts, max_new_tokens=12, tokenizer=letters, eos_token_id=60)
    stop = letters.decode(plain.responses[0][3:5])[-2:]
    arguments = {
        "max_new_tokens": 12,
        "stop_strings": [stop],
        "tokenizer": letters,
        "eos_token_id": 60,
    }
    out = cf.generate(base, prompts, **arguments)
    assert torch.equal(out.sequences, base.generate(**prompts, **arguments))
    assert out.lengths[0] <= 5
    assert bool(out.finished[0])
    assert stop in out.text[0]
    # The tokenizer of a term will do as well.
    arguments.pop("tokenizer")
    named = cf.generate(cf.Model(base, tokenizer=letters), prompts, **arguments)
    assert torch.equal(named.sequences, out.sequences)
    with pytest.raises(ValueError, match="stop_strings are texts"):
        cf.generate(base, prompts, **arguments)


def test_padding_spells_no_stop_string(base: PreTrainedModel) -> None:
    """A short prompt stands in a window of many tokens, whose padding would spell a letter."""
    letters = make_letters()
    prompts = letters(["c", "oneandone"])["input_ids"]
    arguments: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 3}
    plain = cf.generate(base, prompts, **arguments)
    assert letters.decode([3]) == "a"
    stop = "aa" + letters.decode([*prompts[0], plain.responses[0][0]])
    found = cf.generate(base, prompts, **arguments, stop_strings=[stop], tokenizer=letters)
    assert found.responses == plain.responses


def test_max_time(base: PreTrainedModel, batch: Batch) -> None:
    class Slow(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            time.sleep(0.02)
            return scores

    out = cf.generate(
        base, batch, max_new_tokens=100, max_time=0.1, eos_token_id=None, logits_processor=[Slow()]
    )
    assert 1 <= int(out.lengths[0]) < 20
    assert not out.finished.any()


def test_eos_alone_ends_nothing_if_unset(base: PreTrainedModel, batch: Batch) -> None:
    out = cf.generate(base, batch, max_new_tokens=30, eos_token_id=None)
    assert out.lengths.tolist() == [30] * 4
    assert EOS in cf.generate(base, batch, max_new_tokens=30).sequences[:, 9:]
