"""Statistics of behaviours: the states that they are of, the rows that they read, their figures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import crossfade as cf
import numpy as np
import pytest
import tiny_models as tiny
import torch
from crossfade import dynamics
from crossfade.dynamics import behaviours
from crossfade.dynamics.rows import texts_of
from crossfade.dynamics.states import LastStates
from crossfade.training.encoding import encoded
from statements import apart, pairs, statements

TOKENIZER = tiny.make_tokenizer()


def stored(model: Any, texts: list[list[int]]) -> np.ndarray:
    """The head's inputs at the last tokens, of one text after the other, by Transformers alone."""
    with torch.no_grad():
        found = [
            model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]
            for ids in texts
        ]
    return torch.stack(found).double().numpy()


def ids(rows: list[dict[str, Any]], behaviour: str, label: bool) -> list[list[int]]:
    its = [r for r in rows if r["behaviour"] == behaviour and r["label"] is label]
    return [TOKENIZER(r["text"])["input_ids"] for r in its]


def check(
    got: dynamics.Statistics, positive: np.ndarray, negative: np.ndarray, rtol: float
) -> None:
    covs = [np.cov(x, rowvar=False, bias=True) for x in (positive, negative)]
    means = [x.mean(axis=0) for x in (positive, negative)]
    size = max(np.abs(m).max() for m in means)
    np.testing.assert_allclose(got.mean_positive, means[0], rtol, rtol * size)
    np.testing.assert_allclose(got.mean_negative, means[1], rtol, rtol * size)
    found = [got.distinguishability, got.trace, got.concentration, got.concentration_error]
    expected = [
        np.linalg.norm(means[0] - means[1]),
        max(np.trace(c) for c in covs),
        max(np.linalg.eigvalsh(c)[-1] for c in covs),
        0.0,
    ]
    np.testing.assert_allclose(found, expected, rtol=20 * rtol)
    assert (got.n, got.n_positive) == (len(positive) + len(negative), len(positive))


@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_statistics_are_those_of_stored_states(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows come from a generator, in chunks that end within a behaviour."""
    monkeypatch.setattr(behaviours, "CHUNK", 5)
    model, rows = tiny.make(shape), statements()
    stats = dynamics.statistics(model, TOKENIZER, iter(rows))
    assert list(stats) == ["film", "plot"]
    for name, got in stats.items():
        sides = [stored(model, ids(rows, name, label)) for label in (True, False)]
        check(got, *sides, rtol=1e-5)


@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_the_head_gives_the_logits_of_these_states(shape: str) -> None:
    """So they were normalised once: to do so again would turn them."""
    model = tiny.make(shape)
    for name, weight in model.named_parameters():
        if "norm" in name or "ln_f" in name:
            torch.nn.init.normal_(weight, mean=1.0, std=0.5)  # else a second time changes little
    texts = [[5, 9, 11, 3], [7, 8], [4, 4, 10, 12, 6, 13]]
    states = LastStates(model)(texts)
    with torch.no_grad():
        for x, text in zip(states, texts, strict=True):
            logits = model(torch.tensor([text])).logits[0, -1]
            torch.testing.assert_close(model.lm_head(x.float()), logits, rtol=1e-4, atol=1e-5)


def test_dropout_is_off_and_the_model_stays_as_it_is() -> None:
    model = tiny.make("gpt2")
    still = LastStates(model)([[5, 9, 11]])
    model.train()
    assert torch.equal(LastStates(model)([[5, 9, 11]]), still)
    assert all(m.training for m in model.modules())


def test_batches_do_not_matter() -> None:
    model, rows = tiny.make(), statements()
    one = dynamics.statistics(model, TOKENIZER, rows, max_batch=1)
    all_ = dynamics.statistics(model, TOKENIZER, rows, max_batch=64)
    for name, got in one.items():
        torch.testing.assert_close(got.difference, all_[name].difference, rtol=1e-5, atol=1e-6)
        assert got.interval == pytest.approx(all_[name].interval, rel=1e-4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_an_adapter_has_its_own_states() -> None:
    pytest.importorskip("peft")
    base, rows = tiny.make(), statements()
    plain = dynamics.statistics(base, TOKENIZER, rows)["film"]
    tuned = tiny.lora(1, base, "one")
    active = dynamics.statistics(tuned, TOKENIZER, rows)["film"]
    sides = [stored(tuned, ids(rows, "film", label)) for label in (True, False)]
    check(active, *sides, rtol=1e-5)
    without = cf.Model(tuned, tokenizer=TOKENIZER, adapter=None)
    got = dynamics.statistics(without, None, rows)["film"]
    torch.testing.assert_close(got.difference, plain.difference)
    assert not torch.allclose(active.difference, plain.difference, rtol=0.1)


def test_bfloat16_is_near_float32() -> None:
    model, rows = tiny.make(), statements(each=12)
    exact = dynamics.statistics(model, TOKENIZER, rows)["plot"]
    got = dynamics.statistics(model.to(torch.bfloat16), TOKENIZER, rows)["plot"]
    assert got.mean_positive.dtype == torch.float64
    assert got.distinguishability == pytest.approx(exact.distinguishability, rel=0.05)
    assert got.trace == pytest.approx(exact.trace, rel=0.05)


def test_pairs_are_read_as_trainers_read_them() -> None:
    """Texts and ids of the same pairs give the same; the last token is EOS."""
    model, rows = tiny.make(), pairs()
    tagged = [{**r, "kind": r["behaviour"]} for r in rows]
    stats = dynamics.statistics(model, TOKENIZER, tagged, tag="kind")
    as_ids = []
    for row in rows:
        (prompt, chosen), (_, rejected) = (
            encoded(row["prompt"], row[side], TOKENIZER, True, "a row")
            for side in ("chosen", "rejected")
        )
        assert chosen[-1] == rejected[-1] == tiny.EOS
        ids_of = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        as_ids.append({"behaviour": row["behaviour"], **ids_of})
    films = [r for r in as_ids if r["behaviour"] == "film"]
    both = [[[*r["prompt_ids"], *r[s]] for r in films] for s in ("chosen_ids", "rejected_ids")]
    check(stats["film"], *(stored(model, side) for side in both), rtol=1e-5)
    again = dynamics.statistics(model, None, as_ids)["film"]
    torch.testing.assert_close(again.difference, stats["film"].difference)
    with pytest.raises(ValueError, match="gradient_norm holds for statements"):
        stats["film"].gradient_norm()


def test_rows_that_say_nothing_are_left_out_and_named() -> None:
    """The figures are those of the other rows alone."""
    model, good = tiny.make(), statements()
    with torch.no_grad():
        model.model.embed_tokens.weight[tiny.VOCAB - 1] = torch.nan
    lost: list[dict[str, Any]] = [
        {"text": "the film", "label": True},
        {"behaviour": None, "text": "the film", "label": True},
        {"behaviour": "film", "text": " ", "label": True},
        {"behaviour": "film", "text": f"the w{tiny.VOCAB - 20}", "label": False},
        {"behaviour": "film", "text": "the " * 513, "label": False},
        {"behaviour": "lonely", "text": "the cast", "label": True},
    ]
    with pytest.warns(UserWarning, match="left out") as warned:
        stats = dynamics.statistics(model, TOKENIZER, [*lost, *good])
    assert [str(w.message) for w in warned] == [
        "2 rows are without a 'behaviour', the first is row 0; they are left out",
        "row 2 of rows is without a token to read; it is left out",
        "row 4 of rows is with more tokens than the model's context, 512; it is left out",
        "row 3 of rows is with a state that is not finite; it is left out",
        "behaviour 'lonely' has texts of label True only; it is left out",
    ]
    assert list(stats) == ["film", "plot"]
    sides = [stored(model, ids(good, "film", label)) for label in (True, False)]
    check(stats["film"], *sides, rtol=1e-5)


def test_an_empty_text_is_one_whose_tokenizer_adds_but_its_own_tokens() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny.make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tiny.BOS)]
    )
    rows = [{"behaviour": "film", "text": "", "label": True}, *statements()]
    with pytest.warns(UserWarning, match="row 0 of rows is without a token to read"):
        dynamics.statistics(tiny.make(), tokenizer, rows)


def test_texts_that_are_there_many_times_are_one_draw_each() -> None:
    """Twenty copies of each row say no more than one: not of statements, and not of pairs."""
    model = tiny.make()
    for rows, kind, n in ((statements(["film"]), "texts", 12), (pairs(["film"]), "pairs", 5)):
        once = dynamics.statistics(model, TOKENIZER, rows)["film"]
        says = f"of {20 * n} {kind} of 'film' {n} are different; the interval counts each once$"
        with pytest.warns(UserWarning, match=says):
            often = dynamics.statistics(model, TOKENIZER, 20 * rows)["film"]
        assert often.n == 20 * once.n
        assert often.distinguishability == pytest.approx(once.distinguishability, rel=1e-4)
        assert often.interval == pytest.approx(once.interval, rel=1e-3)


def test_one_text_a_side_says_nothing_however_often_it_is_there() -> None:
    rows = 20 * statements(each=1)
    says = "of 40 texts of 'film' 2 are different; .* once .1 more behaviour has such"
    with pytest.warns(UserWarning, match=says) as warned:
        stats = dynamics.statistics(tiny.make(), TOKENIZER, rows)
    assert len(warned) == 1
    assert all(one.interval == (0.0, float("inf")) for one in stats.values())


def wrong() -> Iterator[tuple[Any, type[Exception], str]]:
    film = {"behaviour": "film", "text": "the film", "label": True}
    yield ["the film"], TypeError, "row 0 of rows is a str; it must be a mapping"
    yield [{**film, "behaviour": 3}], TypeError, "behaviour of row 0 of rows is 3"
    yield [{**film, "text": 3}], TypeError, "text of row 0 of rows is 3; it must be a text"
    says = r"label of row 1 of rows is 'yes'; it must be a bool \(true or false in JSON\)"
    yield [film, {**film, "label": "yes"}], TypeError, says
    wrong_key = {"behaviour": "film", "statement": "the film", "label": True}
    says = "text of row 1 of rows is missing; its keys are behaviour, statement, label; it must"
    yield [film, wrong_key], ValueError, says
    yield [{**film, "text": None}], TypeError, "text of row 0 of rows is None"
    yield [film, pairs()[0]], ValueError, "row 1 of rows is a pair of responses, and the first is"
    yield [{**pairs()[0], "prompt": None}], ValueError, "prompt of row 0 of rows is None"
    chat = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": " great"}]
    pair = {
        "behaviour": "film",
        "chosen": chat,
        "rejected": [*chat[:1], {**chat[1], "content": "x"}],
    }
    says = "prompt of row 0 of rows is a text, and chosen is 2 messages; .* drop prompt"
    yield [{**pair, "prompt": "the plot"}], ValueError, says
    apart = {"behaviour": "film", "chosen": " great", "rejected": "awful"}
    says = (
        "prompt of row 0 of rows is missing, and chosen and rejected begin with nothing in common"
    )
    yield [apart], ValueError, says
    yield (
        [{**pair, "rejected": " awful"}],
        TypeError,
        "rejected of row 0 of rows is ' awful'; without",
    )
    yield [], ValueError, "no behaviour with texts of both labels"


@pytest.mark.parametrize(("rows", "error", "says"), [*wrong()])
def test_wrong_rows(rows: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        dynamics.statistics(tiny.make(), TOKENIZER, rows)


@pytest.mark.parametrize(("rows", "key"), [(statements(), "text"), (pairs(), "chosen")])
def test_a_tokenizer_of_another_model(rows: list[dict[str, Any]], key: str) -> None:
    """What does not fit is the tokenizer, and not the row; given ids are the row's."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens(["unheard"])
    rows = [{**rows[0], key: "the unheard film"}, *rows[1:]]
    size = len(tokenizer)
    says = (
        f"once it is encoded: the tokenizer has {size} tokens and the model {tiny.VOCAB}; they must"
    )
    with pytest.raises(ValueError, match=says):
        dynamics.statistics(tiny.make(), tokenizer, rows)
    given = {
        "behaviour": "film",
        "prompt_ids": [5],
        "chosen_ids": [6],
        "rejected_ids": [tiny.VOCAB],
    }
    with pytest.raises(ValueError, match=f"rejected_ids of row 0 of rows has id {tiny.VOCAB}; ids"):
        dynamics.statistics(tiny.make(), tokenizer, [given])


def conversation(row: dict[str, Any], side: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row[side]},
    ]


@pytest.mark.parametrize("kind", ["texts", "chats", "ultrafeedback"])
def test_an_implicit_prompt_is_what_both_responses_begin_with(kind: str) -> None:
    """The figures are those of the same pairs with their prompts."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    explicit, implicit = [], []
    for row in pairs():
        tagged, both = {"behaviour": row["behaviour"]}, ("chosen", "rejected")
        if kind == "texts":
            explicit.append(row)
            implicit.append({**tagged, **{side: row["prompt"] + row[side] for side in both}})
        else:
            chats = {side: conversation(row, side) for side in both}
            split = {side: chat[1:] for side, chat in chats.items()}
            explicit.append({**tagged, "prompt": chats["chosen"][:1], **split})
            text = {"prompt": row["prompt"]} if kind == "ultrafeedback" else {}
            implicit.append({**tagged, **text, **chats})
    model = tiny.make()
    expected, found = (dynamics.statistics(model, tokenizer, x) for x in (explicit, implicit))
    for name, one in expected.items():
        torch.testing.assert_close(found[name].difference, one.difference)
        assert found[name].interval == pytest.approx(one.interval)


def test_an_implicit_prompt_is_trls() -> None:
    trl = pytest.importorskip("trl")
    user = {"role": "user", "content": "the film"}
    great, awful = ({"role": "assistant", "content": x} for x in (" great", " awful"))
    for chosen, rejected in (
        ("the film was great", "the film was awful"),
        ("the film was great", "the film was great"),
        ("the film was", "the film was great"),
        ([user, great], [user, awful]),
        ([user, great, user, great], [user, great, user, awful]),
        ([user, great], [user, great]),
    ):
        row = {"chosen": chosen, "rejected": rejected}
        assert texts_of(row, "a row") == tuple(trl.extract_prompt(row).values())


def test_models_whose_texts_would_not_be_read_as_they_stand() -> None:
    model = cf.Model(tiny.make(), tokenizer=TOKENIZER, system="You are kind.")
    with pytest.raises(ValueError, match="model has system='You are kind"):
        dynamics.statistics(model, None, statements())


def test_priorities() -> None:
    """By hand: d = (3, 0) and (0, 1), so b = (1.5, .5), b'd_i - b'd_j = 4, and |b| = 1.58."""
    of = {"a": [3.0, 0.0], "b": [0.0, 1.0], "c": [-3.0, 0.0], "none": [0.0, 0.0]}
    names, matrix = found = dynamics.priorities({k: apart(k, d) for k, d in of.items()})
    assert names == ("a", "b", "c", "none")
    assert found.of("a", "b") == pytest.approx(4 / (2.5**0.5 * 3))
    assert found.of("a", "c") == 0.0  # they are opposite: 0/0
    assert found.of("a", "none") == 1.0
    assert torch.equal(matrix, -matrix.T)
    assert float(matrix.abs().max()) <= 2.0
    with pytest.raises(ValueError, match="there is no behaviour 'd', but a, b, c, none"):
        found.of("a", "d")


def test_progress_counts_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that are left out, and each pair once."""
    monkeypatch.setattr(behaviours, "CHUNK", 5)
    for rows in (statements(), pairs()):
        counts: list[int] = []
        lost = [*rows[:3], {**rows[0], "behaviour": None}, *rows[3:]]
        with pytest.warns(UserWarning, match="left out"):
            dynamics.statistics(tiny.make(), TOKENIZER, lost, progress=counts.append)
        assert sum(counts) == len(lost)
        assert min(counts) >= 1
        assert len(counts) > 3
    with pytest.raises(TypeError, match="progress is 'yes'"):
        dynamics.statistics(tiny.make(), TOKENIZER, statements(), progress="yes")
