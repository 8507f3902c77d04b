"""Stop strings of rows that come and go: each row is ended by its own, and by nobody else's."""

from __future__ import annotations

from typing import Any

import crossfade as cf
import pytest
import torch
from tiny_models import VOCAB, make_letters
from transformers import PreTrainedModel

TOKENIZER = make_letters()
GENERATOR = torch.Generator().manual_seed(2)
PROMPTS = [torch.randint(5, VOCAB, (n,), generator=GENERATOR).tolist() for n in (3, 5, 1, 8, 2, 4)]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10, "eos_token_id": 1}


@pytest.fixture(scope="module")
def plain(base: PreTrainedModel) -> list[list[int]]:
    """What the model writes where nothing ends it but EOS."""
    return cf.generate(base, PROMPTS, **GREEDY).responses


def text(ids: list[int]) -> str:
    return "".join(TOKENIZER.convert_ids_to_tokens(ids))


def stops(plain: list[list[int]]) -> list[Any]:
    """Of each row a text that it writes: over a prompt's end, at its first token, later, never."""
    return [
        [text(PROMPTS[0][-2:] + plain[0][:1])],  # ends the row at its first token
        [text(PROMPTS[1][-1:] + plain[1][:2])],
        [text(plain[2][3:5])],
        [text(PROMPTS[3])],  # what stands in the prompt alone ends nothing
        None,
        ["qqqqqqqq", text(plain[5][4:6])],
    ]


@pytest.mark.parametrize("places", [1, 2, 3, 6])
def test_rows_end_as_in_hugging_face(
    places: int, base: PreTrainedModel, plain: list[list[int]]
) -> None:
    its = stops(plain)
    out = cf.generate(
        base, PROMPTS, tokenizer=TOKENIZER, stop_strings=its, max_batch=places, **GREEDY
    )
    for i, prompt in enumerate(PROMPTS):
        alone = base.generate(
            torch.tensor([prompt]), tokenizer=TOKENIZER, stop_strings=its[i], **GREEDY
        )
        assert out.responses[i] == alone[0, len(prompt) :].tolist()
    assert len(out.responses[0]) == 1
    assert len(out.responses[1]) <= 2
    assert len(out.responses[3]) > 1
    assert out.finished[[0, 1, 2, 5]].all()


def test_the_simple_path_agrees(base: PreTrainedModel, plain: list[list[int]]) -> None:
    given = {**GREEDY, "tokenizer": TOKENIZER, "stop_strings": stops(plain)}
    engine = cf.generate(base, PROMPTS, max_batch=2, **given)
    simple = cf.generate(base, PROMPTS, engine=cf.Engine(simple=True), **given)
    assert engine.responses == simple.responses
    assert engine.finished.tolist() == simple.finished.tolist()


def test_longer_texts_that_come_later(base: PreTrainedModel, plain: list[list[int]]) -> None:
    """What is kept of prompts' ends grows when a row joins whose text is longer."""
    over = [text(PROMPTS[i][-1:] + plain[i][: i + 1]) for i in range(len(PROMPTS))]
    its: list[Any] = [[over[0]], *([x, text(plain[i])] for i, x in enumerate(over[1:], 1))]
    given = {**GREEDY, "tokenizer": TOKENIZER}
    out = cf.generate(base, PROMPTS, stop_strings=its, max_batch=2, **given)
    for i, prompt in enumerate(PROMPTS):
        alone = cf.generate(base, [prompt], stop_strings=its[i], **given)
        assert out.responses[i] == alone.responses[0]
        assert out.finished[i]
