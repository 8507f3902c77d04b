"""Whole texts, read in batches: what each model says of each text alone, in bounded memory."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding.engine import batching, prefill
from crossfade.decoding.engine.options import Engine
from crossfade.decoding.engine.prefill import Prefill, hidden_states, over_caches, token_log_probs
from crossfade.decoding.engine.runner import EngineRunner
from crossfade.decoding.inputs import right_pad
from crossfade.decoding.simple.own_loop import why_a_token_at_a_time
from crossfade.decoding.simple.term_model import TermModel
from tiny_models import EOS, HEADS, IDS, PAD, SHAPES, SIZES, VOCAB, make
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MoshiConfig,
    MoshiForCausalLM,
)

TEXTS = [[7, 9, 30, 12, 8], [40, 6], [11, 12, 13, 14, 15, 16, 17, 18], [33, 6, 20, 21], [5, 9, 7]]
FIRSTS = [2, 1, 3, 1, 2]


@contextmanager
def seen(model: Any) -> Iterator[list[tuple[int, int]]]:
    """The shapes of ids that a model reads."""
    shapes: list[tuple[int, int]] = []
    own = model.forward

    @functools.wraps(own)  # Its signature says what the model takes.
    def forward(*args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(kwargs["input_ids"].shape))
        return own(*args, **kwargs)

    model.forward = forward
    try:
        yield shapes
    finally:
        del model.forward


@pytest.mark.parametrize("most", [1, 12, 1024])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logits_are_those_of_each_text_alone(
    shape: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(batching.MAX_TOKENS, "cpu", most)
    model = make(shape)
    reader = Prefill(TermModel(model, "it"))
    with seen(model) as shapes:
        assert why_a_token_at_a_time(reader.model, 9) is None
        shapes.clear()  # These were read to find that out.
        found = dict(reader.logits(TEXTS, FIRSTS))
        last = dict(reader.logits(TEXTS, FIRSTS, every=False))
    assert sorted(found) == sorted(last) == list(range(len(TEXTS)))
    for i, (text, first) in enumerate(zip(TEXTS, FIRSTS, strict=True)):
        theirs = model(torch.tensor([text])).logits[0, first - 1 : -1]
        torch.testing.assert_close(found[i], theirs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(last[i], theirs[-1:], atol=1e-5, rtol=1e-5)
    assert reader.forwards == len(shapes) == {1: 10, 12: 6, 1024: 2}[most]
    assert reader.tokens == 2 * (sum(map(len, TEXTS)) - len(TEXTS)), "no text's last token"
    assert all(rows == 1 or rows * width <= most for rows, width in shapes)


@torch.no_grad()
def test_logits_at_a_time_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "MAX_LOGITS", 6 * VOCAB)
    reader = Prefill(TermModel(make(), "it"))
    held = []
    for _, z in reader.logits(TEXTS, FIRSTS):
        assert z._base is not None
        held.append(z._base.numel())
    assert max(held) <= 6 * VOCAB
    assert reader.forwards == 3
    assert len(list(reader.logits(TEXTS, FIRSTS, every=False))) == len(TEXTS)
    assert reader.forwards == 4, "one token of each is fewer than six"


@torch.no_grad()
def test_log_probs_of_tokens() -> None:
    model, (text, *_) = make(), TEXTS
    ((_, z),) = Prefill(TermModel(model, "it")).logits([text], [1])
    expected = model(torch.tensor([text])).logits[0, :-1].double().log_softmax(-1)
    tokens = torch.tensor(text[1:])
    found = token_log_probs(z, tokens)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected.gather(1, tokens[:, None])[:, 0])


@pytest.mark.parametrize("rows", [None, 1, 2])
@torch.no_grad()
def test_hidden_states_are_those_of_each_text_alone(rows: int | None) -> None:
    model = make("gemma3")
    reader = Prefill(TermModel(model, "it"))
    found = dict(reader.hidden(TEXTS, [0, *FIRSTS[1:]], rows=rows))
    for i, (text, first) in enumerate(zip(TEXTS, [0, *FIRSTS[1:]], strict=True)):
        theirs = model.model(torch.tensor([text])).last_hidden_state[0, first:]
        torch.testing.assert_close(found[i], theirs, atol=1e-5, rtol=1e-5)
    assert reader.forwards == {None: 1, 1: 5, 2: 3}[rows]
    assert reader.tokens == sum(map(len, TEXTS))


@torch.no_grad()
def test_frequencies_of_one_text_are_not_those_of_another() -> None:
    """Past the original context, RoPE frequencies follow the longest text of a forward."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    sizes = {**SIZES, **HEADS, "max_position_embeddings": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=rope)).eval()
    reader = Prefill(TermModel(model, "it"))
    found = dict(reader.hidden(TEXTS, FIRSTS))
    assert reader.forwards == len(TEXTS)
    for i, (text, first) in enumerate(zip(TEXTS, FIRSTS, strict=True)):
        theirs = copy.deepcopy(model).model(torch.tensor([text])).last_hidden_state[0, first:]
        torch.testing.assert_close(found[i], theirs, atol=1e-5, rtol=1e-5)


def test_gradients_go_through_hidden_states() -> None:
    """Training needs gradients through the function; a `Prefill` keeps none."""
    model = make()
    reader = Prefill(TermModel(model, "it"))
    for found in (
        reader.hidden(TEXTS, FIRSTS),
        reader.logits(TEXTS, FIRSTS),
        reader.last_outputs(TEXTS),
    ):
        assert not any(x.requires_grad for _, x in found)
    ids, mask = right_pad(TEXTS)
    states = hidden_states(model, ids, mask, torch.tensor(FIRSTS), 3)
    assert states.shape == (len(TEXTS), 3, SIZES["hidden_size"])
    states[1, 0].sum().backward()
    grad: Any = model.get_input_embeddings().weight.grad
    assert grad.any(dim=1).nonzero()[:, 0].tolist() == sorted(TEXTS[1])


@pytest.mark.parametrize("padding", [None, 0])
@torch.no_grad()
def test_classifiers_read_rows_together_where_they_know_padding(padding: int | None) -> None:
    torch.manual_seed(2)
    sizes = {**SIZES, "num_attention_heads": 2, "num_labels": 3}
    model = BertForSequenceClassification(BertConfig(**sizes, pad_token_id=0)).eval()
    model.config.pad_token_id = padding
    reader = Prefill(TermModel(model, "it"))
    found = dict(reader.last_outputs(TEXTS))
    for i, text in enumerate(TEXTS):
        torch.testing.assert_close(found[i], model(torch.tensor([text])).logits[0])
    assert reader.forwards == (5 if padding is None else 1)
    assert reader.tokens == sum(map(len, TEXTS))
    assert reader.stats().names == ("it",)


@torch.no_grad()
def test_caches_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "MAX_LOGITS", 3 * VOCAB)
    model = make("gemma3")
    rows = range(len(TEXTS))
    runner = EngineRunner([TermModel(model, "it")], [1], len(TEXTS), 9, Engine())
    found: dict[int, list[torch.Tensor]] = {}
    starts, lengths = [0] * len(rows), [*map(len, TEXTS)]
    for i, z in over_caches(runner.groups[0], rows, starts, TEXTS, lengths):
        assert len(z) <= 3
        found.setdefault(i, []).append(z)
    for i, text in enumerate(TEXTS):
        theirs = model(torch.tensor([text])).logits[0]
        torch.testing.assert_close(torch.cat(found[i]), theirs, atol=1e-4, rtol=1e-4)
    last = dict(over_caches(runner.groups[0], rows, starts, TEXTS, [1] * len(rows)))
    for i in rows:
        torch.testing.assert_close(last[i], found[i][-1][-1:], atol=1e-4, rtol=1e-4)


WINDOW = 4


def moshi() -> Any:
    """A model whose cache keeps the last tokens, though its layers attend to all that there are."""
    torch.manual_seed(0)
    config = MoshiConfig(
        **SIZES, **HEADS, **IDS, ffn_dim=48, sliding_window=WINDOW, max_position_embeddings=64
    )
    model = MoshiForCausalLM(config).eval()
    for p in model.parameters():
        p.data = torch.randn(p.shape) * 0.5
    model.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=EOS)
    return model


def test_a_window_that_the_cache_alone_knows() -> None:
    model = moshi()
    prompts = [t[:-1] for t in TEXTS]
    out = cf.generate(model, prompts, max_new_tokens=6, eos_token_id=None)
    scores = cf.score(model, prompts, out.responses)
    torch.testing.assert_close(scores.logprobs, out.logprobs, atol=1e-4, rtol=1e-4)
    text = prompts[2] + out.responses[2]
    whole = model(torch.tensor([text])).logits[0, -7:-1].detach()
    whole = token_log_probs(whole, torch.tensor(out.responses[2]))
    assert (whole - out.logprobs[2]).abs().max() > 0.1, "one forward would not be the same"
    why = why_a_token_at_a_time(TermModel(model, "it"), WINDOW + 1)
    assert why == "it (MoshiForCausalLM) attends to more than the 4 tokens its cache keeps"
    assert why_a_token_at_a_time(TermModel(model, "it"), WINDOW) is None
    assert why_a_token_at_a_time(TermModel(make("gemma3"), "it"), WINDOW + 1) is None
