"""Figures of pairs under a model, against its full logits; and statements as questions."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models as tiny
import torch
from crossfade import dynamics
from crossfade.dynamics.readings import read_pairs
from statements import pairs, statements
from torch import Tensor

ANSWERS = {"yes": " great", "no": " awful"}
YES, NO = (tiny.make_tokenizer().convert_tokens_to_ids(x) for x in ("great", "awful"))


def of_ids(count: int = 7) -> list[dict[str, Any]]:
    """Pairs of many lengths; the last two have answers of one token."""
    generator = torch.Generator().manual_seed(3)

    def ids(n: int) -> list[int]:
        return torch.randint(3, tiny.VOCAB, (n,), generator=generator).tolist()

    lengths = [(2 + i, 1 + i % 4, 1 + (2 * i) % 5) for i in range(count)] + [(4, 1, 1)] * 2
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [dict(zip(names, map(ids, x), strict=True)) for x in lengths]


def literally(model: Any, rows: list[dict[str, Any]]) -> list[Tensor]:
    """The same figures from the whole logits of a text at a time."""
    found = []
    for row in rows:
        own = []
        for name in ("chosen_ids", "rejected_ids"):
            prompt, response = row["prompt_ids"], row[name]
            with torch.no_grad():
                z = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
            log_p = z.double().log_softmax(-1)[len(prompt) - 1 : -1]
            logp = log_p.gather(1, torch.tensor(response)[:, None]).sum()
            entropy = -(log_p.exp() * log_p).sum(1).mean()
            own.append((logp, log_p.max(1).values.mean(), entropy))
        found.append([own[0][0], own[1][0], own[0][1], own[0][2]])
    return [torch.stack(list(x)) for x in zip(*found, strict=True)]


def check(got: dynamics.Reading, want: list[Tensor]) -> None:
    for x, y in zip((got.chosen, got.rejected, got.argmax, got.entropy), want, strict=True):
        assert x.dtype == torch.float64
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_batch", [None, 2])
@pytest.mark.parametrize("shape", ["llama", "gpt2", "gemma3", "doubled"])
def test_figures_are_those_of_the_whole_logits(shape: str, max_batch: int | None) -> None:
    """Also where the model does more to its logits than its config says."""
    model = tiny.doubled() if shape == "doubled" else tiny.make(shape)
    check(read_pairs(model, of_ids(), max_batch=max_batch), literally(model, of_ids()))


# PEFT uses names that Transformers has renamed
@pytest.mark.filterwarnings("ignore:`[a-z_.]*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("modules", [("q_proj", "down_proj"), ("q_proj", "lm_head")])
def test_a_model_in_training_is_read_and_stays_as_it_is(modules: tuple[str, ...]) -> None:
    pytest.importorskip("peft")
    model = tiny.lora(1, tiny.make(), "tuned", modules=modules, lora_dropout=0.5)
    want = literally(model.eval(), of_ids())
    model.train()
    model.base_model.model.gradient_checkpointing_enable()
    model.base_model.model.model.layers[0].eval()  # a part that is not trained
    modes = [m.training for m in model.modules()]
    weights = {k: x.clone() for k, x in model.state_dict().items()}
    state = torch.get_rng_state()
    got = read_pairs(model, of_ids())
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(x, weights[k]) for k, x in model.state_dict().items())
    assert not got.chosen.requires_grad
    check(got, want)


def test_autocast_around_the_call_holds() -> None:
    model = tiny.make()
    with torch.autocast("cpu", torch.bfloat16):
        got = read_pairs(model, of_ids())
    plain = read_pairs(model, of_ids())
    assert float((got.chosen - plain.chosen).abs().max()) > 1e-4
    torch.testing.assert_close(got.chosen, plain.chosen, rtol=0.05, atol=0.3)


def test_a_prompt_of_two_answers_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from crossfade.decoding.engine.prefill import Prefill

    read: list[int] = []
    hidden = Prefill.hidden

    def counted(self: Any, texts: Any, *args: Any, **options: Any) -> Any:
        read.extend(map(len, texts))
        return hidden(self, texts, *args, **options)

    monkeypatch.setattr(Prefill, "hidden", counted)
    rows = dynamics.statement_pairs(statements(), tiny.make_tokenizer(), **ANSWERS)
    check(read_pairs(tiny.make(), rows), literally(tiny.make(), rows))
    assert read == [len(row["prompt_ids"]) for row in rows]


def test_mistakes_of_pairs_are_named() -> None:
    model, good = tiny.make(), of_ids()
    for wrong, error, says in (
        ({"chosen_ids": []}, ValueError, "chosen_ids of pair 1 of pairs has no tokens"),
        ({"prompt_ids": []}, ValueError, "prompt_ids of pair 1 of pairs has no tokens"),
        ({"rejected_ids": None}, ValueError, "rejected_ids of pair 1 of pairs is missing"),
        ({"rejected_ids": [99]}, ValueError, "rejected_ids of pair 1 of pairs has id 99"),
        ({"chosen_ids": [5] * 600}, ValueError, "chosen_ids of pair 1 .* context is 512"),
    ):
        with pytest.raises(error, match=says):
            read_pairs(model, [good[0], {**good[1], **wrong}])
    with pytest.raises(TypeError, match="pair 0 of pairs is a str"):
        read_pairs(model, ["text"])
    with pytest.raises(ValueError, match="max_batch is 0"):
        read_pairs(model, good, max_batch=0)
    assert read_pairs(model, []).chosen.shape == (0,)


# ---- statements as questions


def test_a_statement_is_a_pair_of_answers() -> None:
    tokenizer, rows = tiny.make_tokenizer(), statements()
    found = dynamics.statement_pairs(rows, tokenizer, **ANSWERS)
    for row, pair in zip(rows, found, strict=True):
        assert pair == {
            "behaviour": row["behaviour"],
            "prompt_ids": tokenizer(row["text"])["input_ids"],
            "chosen_ids": [YES if row["label"] else NO],
            "rejected_ids": [NO if row["label"] else YES],
        }
    flipped = dynamics.statement_pairs(rows, tokenizer, **ANSWERS, flipped=True)
    assert [x["chosen_ids"] for x in flipped] == [x["rejected_ids"] for x in found]
    renamed = [{"source": r["behaviour"], "text": r["text"], "label": r["label"]} for r in rows]
    named = dynamics.statement_pairs(renamed, tokenizer, **ANSWERS, tag="source")
    assert [x["source"] for x in named] == [x["behaviour"] for x in found]


def test_rows_that_say_nothing_are_left_out_and_mistakes_named() -> None:
    tokenizer, good = tiny.make_tokenizer(), statements()
    rows = [*good, {"text": "the film", "label": True}, {**good[0], "text": ""}]
    with pytest.warns(UserWarning, match="left out") as warned:
        found = dynamics.statement_pairs(rows, tokenizer, **ANSWERS)
    assert [str(w.message) for w in warned] == [
        "row 24 of rows is without a 'behaviour'; it is left out",
        "row 25 of rows is without a token to read; it is left out",
    ]
    assert found == dynamics.statement_pairs(good, tokenizer, **ANSWERS)
    for options, says in (
        ({"yes": " very great"}, "yes is ' very great', which is 2 tokens"),
        ({"no": " Nope"}, "no is ' Nope', which the tokenizer does not know"),
        ({"no": " great"}, "yes is ' great' and no is ' great', the same token"),
    ):
        with pytest.raises(ValueError, match=says):
            dynamics.statement_pairs(good, tokenizer, **{**ANSWERS, **options})
    with pytest.raises(TypeError, match="yes is 3; it must be a text"):
        dynamics.statement_pairs(good, tokenizer, yes=3)
    with pytest.raises(ValueError, match="rows has pairs of responses; it must have statements"):
        dynamics.statement_pairs(pairs(), tokenizer, **ANSWERS)
    with pytest.raises(TypeError, match="flipped is 1"):
        dynamics.statement_pairs(good, tokenizer, **ANSWERS, flipped=1)
