"""The traps of speculative decoding, each as a test of its own."""

from __future__ import annotations

import copy
import itertools
import time
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding.speculation.models import ModelDrafter
from drafted import (
    GREEDY,
    PROMPTS,
    SAMPLED,
    blend,
    both,
    changed,
    check_same,
    model,
    noise,
)
from streamers import Kept
from sweeps import every, product
from tiny_models import VOCAB, make, make_letters
from torch import Tensor

ONE = PROMPTS[:1]


def written(target: Any, prompts: Any = PROMPTS, **arguments: Any) -> list[list[int]]:
    return cf.generate(target, prompts, **{**SAMPLED, **arguments}).responses


@pytest.mark.parametrize(
    ("kind", "length"), product(["shared", "a copy", "a blend"], [1, 3, 8], together=1)
)
def test_the_draft_reads_the_last_guess_after_all_were_right(kind: str, length: int) -> None:
    """A draft that is the target is right for ever only if it has read all that was written."""
    target = blend() if kind == "a blend" else cf.Model(model())
    draft = cf.Model(copy.deepcopy(model())) if kind == "a copy" else target
    found = both(target, PROMPTS, cf.Draft(draft, length=length), **SAMPLED, max_new_tokens=21)
    stats = found.drafted.stats
    assert stats.right == stats.guessed
    assert stats.rounds == -(-20 // (length + 1)), "the first token of each round needs no guess"


@pytest.mark.parametrize("late", [False, True])
def test_the_draft_reads_what_was_written_while_it_rested(
    late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = itertools.cycle([0, 0, 3, 1, 0, 2])
    monkeypatch.setattr(ModelDrafter, "_count", lambda *_: next(counts))
    draft = cf.Draft(cf.Model(copy.deepcopy(model())))
    how = {**SAMPLED, "max_new_tokens": [20, 4, 23, 9, 15], "max_batch": 2 if late else None}
    stats = both(cf.Model(model()), PROMPTS, draft, **how).drafted.stats
    assert stats.right == stats.guessed > 15


@pytest.mark.parametrize("kind", ["prompt", "a model"])
def test_seeds_of_each_request(kind: str) -> None:
    """A request draws the same wherever it is, and beside requests that are greedy."""
    source = "prompt" if kind == "prompt" else cf.Model(model("qwen3", 8))
    draft, seeds, temperatures = cf.Draft(source, length=3), [5, 6, 2**40, 5, 0], [1, 0, 1.3, 1, 0]
    how: dict[str, Any] = {**SAMPLED, "max_new_tokens": 12}
    how["temperature"] = list(map(float, temperatures))
    together = both(blend(), PROMPTS, draft, **{**how, "seed": seeds}).drafted
    for i, prompt in list(enumerate(PROMPTS))[2:4]:
        own = {**how, "seed": [seeds[i]], "temperature": [float(temperatures[i])]}
        alone = cf.generate(blend(), [prompt], draft=draft, **own)
        assert alone.responses == [together.responses[i]]


def test_a_seed_of_torchs_generator() -> None:
    found = []
    for draft in (None, cf.Draft("prompt", length=2), cf.Draft(model("qwen3", 8), length=2)):
        torch.manual_seed(11)
        how = {**SAMPLED, "seed": None, "max_new_tokens": 9}
        found.append(cf.generate(blend(), PROMPTS, draft=draft, **how).responses)
        found[-1].append([int(torch.randint(1 << 40, ()))])  # The generator is where it was.
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("length", every(3, [5, 2, 30]))
def test_eos_inside_a_run(length: int) -> None:
    """Texts go on past it, and so does a model that would draw it."""
    whole = written(blend(), max_new_tokens=25)
    ends = sorted({whole[0][7], whole[1][0], whole[2][13]})
    how = {**SAMPLED, "max_new_tokens": 25, "eos_token_id": ends}
    for draft in (
        cf.Draft(texts=whole, length=length),
        cf.Draft(cf.Model(model("qwen3", 8)), length=length),
        cf.Draft(blend(), length=length),
    ):
        found = both(blend(), PROMPTS, draft, **how)
        assert found.drafted.finished.any()
        assert max(map(len, found.drafted.responses)) < 25 or not found.drafted.finished.all()


def test_eos_is_the_first_token_and_the_last() -> None:
    whole = written(blend(), max_new_tokens=6)
    for at in (0, 5):
        how = {**SAMPLED, "max_new_tokens": 6, "eos_token_id": whole[0][at]}
        drafted = both(blend(), PROMPTS, cf.Draft(texts=whole, length=8), **how).drafted
        assert drafted.finished[0]
        assert len(drafted.responses[0]) <= at + 1


@pytest.mark.parametrize(("each", "length"), product([False, True], [4, 30], together=1))
def test_stop_strings_inside_a_run(length: int, each: bool) -> None:
    target, tokenizer = blend(), make_letters()
    whole = written(target, max_new_tokens=20)
    stops = [tokenizer.decode([r[k]]) for r, k in zip(whole, (5, 0, 9, 19, 2), strict=True)]
    how: dict[str, Any] = {**SAMPLED, "max_new_tokens": 20, "tokenizer": tokenizer}
    how["stop_strings"] = [[s] for s in stops] if each else stops[:2]
    drafted = both(target, PROMPTS, cf.Draft(texts=whole, length=length), **how).drafted
    assert drafted.finished.any()
    both(target, PROMPTS, cf.Draft("prompt", length=length), max_batch=2, **how)


@pytest.mark.parametrize("kind", every(2, ["texts", "a term", "a model"]))
def test_the_limit_inside_a_run(kind: str) -> None:
    limits = [1, 2, 3, 9, 10]
    texts = written(blend(), max_new_tokens=40)
    models = {"a model": cf.Model(model("qwen3", 8)), "a term": blend().terms[0]}
    given = {"texts": texts} if kind == "texts" else {"source": models[kind]}
    how = {**SAMPLED, "max_new_tokens": limits}
    drafted = both(blend(), PROMPTS, cf.Draft(**given, length=8), **how).drafted
    assert drafted.lengths.tolist() == limits
    if kind == "texts":  # A row's last token is not guessed, nor is the one after 8 guesses.
        assert drafted.tokens_by_draft.tolist() == [0, 1, 2, 8, 8]


def test_one_new_token_needs_no_guess() -> None:
    texts = written(blend(), max_new_tokens=1)
    for draft in (
        cf.Draft(texts=texts, length=4),
        cf.Draft("prompt", length=4),
        cf.Draft(blend(), length=4),
        cf.Draft(blend().terms[0]),
    ):
        stats = both(blend(), PROMPTS, draft, **SAMPLED, max_new_tokens=1).drafted.stats
        assert (stats.rounds, stats.guessed, stats.right, stats.acceptance) == (0, 0, 0, 0.0)


class Reads:
    """A logits processor that keeps what it is given, and bans what a row wrote two tokens ago."""

    def __init__(self) -> None:
        self.seen: list[list[list[int]]] = []

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(ids.tolist())
        return scores.index_fill(1, ids[:, -2].unique(), -torch.inf)


PROCESSED: list[dict[str, Any]] = [
    {"repetition_penalty": 1.6},
    {"no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 1, "min_new_tokens": 5, "eos_token_id": 9},
    {"bad_words_ids": [[7, 9], [13]]},
    {"renormalize_logits": True, "typical_p": 0.8},
    {"prefix_allowed_tokens_fn": lambda row, ids: [(int(ids[-1]) * k) % VOCAB for k in (2, 3, 5)]},
]


@pytest.mark.parametrize(("processed", "rows"), product(PROCESSED, [4, 1], together=1))
def test_processors_read_each_position(rows: int, processed: dict[str, Any]) -> None:
    prompts = [p for p in PROMPTS if len(p) > 1][:rows]
    how = {**SAMPLED, "max_new_tokens": 14, **processed}
    plain = cf.generate(blend(), prompts, **how)
    first, *others = plain.responses
    texts: list[Any] = [first, *(changed(r, 6) for r in others[:2]), *[None] * len(others[2:])]
    found = both(blend(), prompts, cf.Draft(texts=texts, length=5), plain, **how)
    assert found.drafted.stats.right > 0
    both(blend(), prompts, cf.Draft(model("qwen3", 8), length=3), plain, **how)
    both(blend(), prompts, cf.Draft(blend().terms[0], length=3), plain, **how)


@pytest.mark.parametrize("rows", [1, 3])
def test_processors_see_every_step_once(rows: int) -> None:
    seen = []
    prompts = [[7, 9, 30], [8, 9, 11], [40, 41, 42]][:rows]
    texts = written(blend(), prompts, logits_processor=[Reads()], max_new_tokens=12)
    texts = [texts[0], *(changed(r, 5) for r in texts[1:])]
    for draft in (None, cf.Draft(texts=texts, length=4), cf.Draft(blend(), length=4)):
        processor = Reads()
        how = {**SAMPLED, "max_new_tokens": 12, "logits_processor": [processor]}
        cf.generate(blend(), prompts, draft=draft, **how)
        seen.append(processor.seen)
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize(("rows", "eos"), product([3, 1], [None, 2], together=1))
def test_a_streamer_is_told_each_token_in_order(rows: int, eos: int | None) -> None:
    """Several tokens of one round arrive one after another, and nothing after the end."""
    prompts = [[7, 9, 30], [8, 9, 11], [40, 41, 42]][:rows]
    texts = written(blend(), prompts, max_new_tokens=15)
    ends = None if eos is None else [texts[0][9], texts[-1][4]]
    told = []
    for draft in (
        None,
        cf.Draft(texts=texts, length=6),
        cf.Draft(texts=[texts[0], *noise(rows - 1, 20)], length=6),
        cf.Draft(blend(), length=6),
    ):
        kept = Kept()
        how = {**SAMPLED, "max_new_tokens": 15, "eos_token_id": ends, "pad_token_id": 0}
        out = cf.generate(blend(), prompts, draft=draft, streamer=kept, **how)
        told.append(kept.told)
        if draft is not None and draft.source is None and rows == 1:
            assert out.stats.rounds < 4
    assert all(t == told[0] for t in told)
    assert told[0][-1] == "end"
    assert len(told[0]) == 2 + max(map(len, out.responses))


def test_a_text_streamer(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import TextStreamer

    target = cf.Model(model(), tokenizer=tokenizer)
    texts = written(target, ONE, max_new_tokens=15)
    printed = []
    for draft in (None, cf.Draft(texts=texts, length=7)):
        how = {**SAMPLED, "max_new_tokens": 15, "streamer": TextStreamer(tokenizer)}
        cf.generate(target, ONE, draft=draft, **how)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""


BAD = 13  # The token after which a model says NaN.


def broken(seed: int = 0, token: int = BAD) -> Any:
    found = make("llama", seed)
    with torch.no_grad():
        found.model.embed_tokens.weight[token] = float("nan")
    return found


@pytest.mark.parametrize(("kernels", "length"), product([True, False], [2, 6], together=1))
def test_rows_that_fail_inside_a_run(length: int, kernels: bool) -> None:
    """One row fails where it fails without a draft, for the reason that the same warning gives."""
    target = cf.Model(broken()) + 0.2 * cf.Model(model("gpt2", 1))
    prompts = [p for p in PROMPTS if BAD not in p]
    sound = cf.Model(make("llama")) + 0.2 * cf.Model(model("gpt2", 1))
    whole = written(sound, prompts, max_new_tokens=12)
    forced = [[*r[:k], BAD, *r[k:]] for r, k in zip(whole, (4, 0, 7, 2), strict=True)]

    def toward(row: int, ids: Tensor) -> list[int]:
        at = len(ids) - max(map(len, prompts))
        return [forced[row][at]] if at < len(forced[row]) and row % 2 == 0 else [30, 31]

    how = {**SAMPLED, "max_new_tokens": 12, "prefix_allowed_tokens_fn": toward}
    how["engine"] = cf.Engine(kernels=kernels)
    said, outs = [], []
    for draft in (None, cf.Draft(texts=forced, length=length)):
        with pytest.warns(RuntimeWarning, match="gave logits that are NaN") as w:
            outs.append(cf.generate(target, prompts, draft=draft, **how))
        said.append(sorted(str(x.message) for x in w))
    check_same(outs[1], outs[0])
    assert said[0] == said[1]
    assert outs[0].failed.tolist() == [True, False, True, False]


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_guess_that_a_model_cannot_bear(kernels: bool, rows: int) -> None:
    """A wrong guess after which a model says NaN leaves its row, and the cache, as they are."""
    target = cf.Model(broken())
    prompts = [p for p in PROMPTS if BAD not in p][:rows]
    how = {**SAMPLED, "max_new_tokens": 14, "bad_words_ids": [[BAD]]}
    how["engine"] = cf.Engine(kernels=kernels)
    whole = cf.generate(target, prompts, **how).responses
    texts = [[*r[:3], BAD, *r[4:8], BAD, BAD, *r[8:]] for r in whole]
    drafted = both(target, prompts, cf.Draft(texts=texts, length=4), **how).drafted
    assert not drafted.failed.any()
    assert drafted.stats.right > 0


@pytest.mark.parametrize("kind", ["a term", "a model"])
def test_a_model_that_gives_nan_guesses_nothing(kind: str) -> None:
    bad = cf.Model(broken(3, token=PROMPTS[3][0]))  # It has read NaN in one prompt.
    target = cf.Model(model()) + 0.0 * bad if kind == "a term" else cf.Model(model())
    found = both(target, PROMPTS, cf.Draft(bad, length=3), **SAMPLED, max_new_tokens=10)
    assert found.drafted.tokens_by_draft[3] == 0
    assert not found.drafted.failed.any()


FIGURES: dict[str, dict[str, Any]] = {
    "term log-probs": {"return_term_logprobs": True},
    "pushes": {"return_pushes": True},
    "divergences": {"kl_to": cf.Model(make("qwen3", 4)), "return_kl_to_base": True},
    "all": {"return_term_logprobs": True, "return_kl_to_base": True, "temperature": 0.7},
}


@pytest.mark.parametrize(
    ("asked", "kind"), product([*FIGURES], ["texts", "the reference", "a term"], together=1)
)
def test_figures_are_the_verifiers(asked: str, kind: str) -> None:
    how = {**SAMPLED, "max_new_tokens": 11, **FIGURES[asked]}
    texts = written(blend(), max_new_tokens=11, temperature=how.get("temperature", 1.0))
    texts = [texts[0], *(changed(t, 5) for t in texts[1:])]
    reference = FIGURES["divergences"]["kl_to"]
    models = {"the reference": reference, "a term": blend().terms[1]}
    given = {"texts": texts} if kind == "texts" else {"source": models[kind]}
    drafted = both(blend(), PROMPTS, cf.Draft(**given, length=4), **how).drafted
    assert drafted.logprobs.isfinite().all()
    assert kind != "texts" or (drafted.tokens_by_draft > 3).all()


@pytest.mark.parametrize("kind", every(3, ["texts", "prompt", "a model"]))
def test_a_conversation_goes_on(kind: str) -> None:
    """A cache of a call with a draft serves one without, and the other way."""
    target = blend()
    how = {**SAMPLED, "max_new_tokens": 10}

    def draft(prompts: Any) -> cf.Draft:
        texts = [[*r[:4], 60, *r[5:]] for r in written(target, prompts, max_new_tokens=10)]
        given = {"texts": texts} if kind == "texts" else {"source": "prompt"}
        return (
            cf.Draft(**given, length=4)
            if kind != "a model"
            else cf.Draft(model("qwen3", 8), length=4)
        )

    plain = cf.generate(target, PROMPTS, **how)
    more = [[*p, *r, 8, 9] for p, r in zip(PROMPTS, plain.responses, strict=True)]
    again = cf.generate(target, more, **how)
    for first, second in ((True, True), (True, False), (False, True)):
        one = cf.generate(
            target, PROMPTS, draft=draft(PROMPTS) if first else None, return_cache=True, **how
        )
        check_same(one, plain)
        two = cf.generate(
            target, more, draft=draft(more) if second else None, cache=one.cache,
            return_cache=True, **how,
        )  # fmt: skip
        check_same(two, again)
        new = sum(map(len, again.responses)) + 2 * len(PROMPTS)
        if not second:  # Of the prompts it reads what is new, each response's last token too.
            assert two.stats.models[0].tokens == new


def test_criteria_of_ones_own_end_rows_inside_a_run() -> None:
    seen: list[list[list[int]]] = []

    def ends(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        seen[-1].append(ids[:, -1].tolist())
        return ids[:, -1] % 7 == 3

    how = {**SAMPLED, "max_new_tokens": 15, "stopping_criteria": [ends]}
    seen.append([])
    plain = cf.generate(blend(), PROMPTS, **how)
    whole = written(blend(), max_new_tokens=15)
    for draft in (
        cf.Draft(texts=whole, length=6),
        cf.Draft(texts=[whole[0], None, None, whole[3], None], length=6),
        cf.Draft(blend().terms[0], length=3),
    ):
        seen.append([])
        check_same(cf.generate(blend(), PROMPTS, draft=draft, **how), plain)
    assert plain.finished.any()
    assert all(s == seen[0] for s in seen)


def test_time_that_is_up_leaves_what_was_written() -> None:
    whole = written(blend(), max_new_tokens=300)

    def slow(ids: Tensor, scores: Tensor) -> Tensor:
        time.sleep(0.002)
        return scores

    how = {**SAMPLED, "max_new_tokens": 300, "max_time": 0.05, "logits_processor": [slow]}
    for draft in (cf.Draft(texts=whole, length=4), cf.Draft(blend().terms[0], length=3)):
        out = cf.generate(blend(), PROMPTS, draft=draft, **how)
        assert not out.ended.any()
        for row, all_of_it in zip(out.responses, whole, strict=True):
            assert 0 < len(row) < 300
            assert row == all_of_it[: len(row)]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.filterwarnings("ignore:interrupted when:RuntimeWarning")
def test_an_interrupt_inside_a_run_leaves_rows_as_they_are(rows: int) -> None:
    prompts = [[7, 9, 30], [8, 9, 11], [40, 41, 42]][:rows]
    whole = written(blend(), prompts, max_new_tokens=12)
    found = []
    for draft in (None, cf.Draft(texts=whole, length=5), cf.Draft(blend(), length=5)):
        kept = Kept(fails_at=8, error=KeyboardInterrupt())
        how = {**SAMPLED, "max_new_tokens": 12, "streamer": kept, "return_term_logprobs": True}
        out = cf.generate(blend(), prompts, draft=draft, **how)
        assert out.stats.interrupted
        found.append((out.responses, out.ended.tolist(), kept.told))
        assert [len(r) for r in out.responses] == [8] * rows
        assert out.responses == [r[:8] for r in whole]
        assert out.term_logprobs.shape[1] == 8
    assert found[0] == found[1] == found[2]


def test_greedy_ties_go_the_same_way() -> None:
    """Equal logits: the lowest id, whatever was guessed."""
    flat = make("llama")
    with torch.no_grad():
        flat.lm_head.weight[20:40] = flat.lm_head.weight[20]
    for draft in (cf.Draft(flat, length=3), cf.Draft(texts=noise(5, 20), length=3)):
        both(cf.Model(flat), PROMPTS, draft, **GREEDY, max_new_tokens=10)
