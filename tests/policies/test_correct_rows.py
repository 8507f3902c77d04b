"""Bad rows keep their answers and the others are corrected; bad arguments raise before any work."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding.engine.group import Group
from crossfade.metrics import edit_distance
from test_correct import ANSWERS, GREEDY, QUERIES, SETS, aligner_of
from test_correct_ends import Words
from tiny_models import EOS, make, make_tokenizer
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast


def always(text: str) -> Callable[[list[Any], list[str]], list[float]]:
    """A reward that prefers the answers in `ANSWERS`, or all others."""

    def reward(prompts: list[Any], responses: list[str]) -> list[float]:
        assert all(p in QUERIES for p in prompts)
        return [float((r in ANSWERS) == (text == "old")) for r in responses]

    return reward


@pytest.mark.parametrize("rounds", [1, 3])
def test_bad_rows_keep_their_answers_and_the_others_are_corrected(rounds: int) -> None:
    aligner = aligner_of()
    chat = [{"role": "user", "content": " "}]
    queries = [*QUERIES, " ", "the plot", "the cast", chat]
    answers = [*ANSWERS, "w1", "", "film " * 600, "w2"]
    draw: dict[str, Any] = {"max_new_tokens": 7, "do_sample": True, "seed": 3, "rounds": rounds}
    with pytest.warns(RuntimeWarning) as seen:
        out = cf.correct(aligner, queries, answers, [*SETS, *SETS], **draw)
    said = [str(w.message) for w in seen]
    assert len(said) == 4, "each is named once, whatever the rounds"
    assert said[0] == "query 4 was not corrected: its query is ' ', without a word"
    assert said[1] == f"query 7 was not corrected: its query is {chat}, without a word"
    assert said[2] == "query 5 was not corrected: its answer is '', without a word"
    assert re.fullmatch(
        r"request 6 was not decoded: its prompt has \d+ tokens for model0, whose context is 512",
        said[3],
    )
    assert out.failed.tolist() == [False] * 4 + [True] * 4
    assert out.text[4:] == answers[4:]
    assert out.unchanged[4:].all()
    assert out.lengths[4:].tolist() == [0, 0, 0, 0]
    alone = cf.correct(aligner, QUERIES, ANSWERS, SETS, **draw)
    assert [r[:4] for r in out.rounds] == alone.rounds, "the others draw as if alone"
    assert len(out.rounds) == rounds


def test_a_whole_batch_may_be_bad() -> None:
    with pytest.warns(RuntimeWarning) as seen:
        out = cf.correct(aligner_of(), ["a", "the"], ["", " "], "bright", rounds=2, **GREEDY)
    assert len(seen) == 2
    assert out.failed.all()
    assert out.text == ["", " "]


def test_settings_of_each_query_stay_with_it() -> None:
    aligner = aligner_of()
    with pytest.warns(RuntimeWarning, match="query 1 was"):
        out = cf.correct(
            aligner, QUERIES, ["w1", "", "w2", "w3"], SETS, rounds=2, do_sample=True,
            max_new_tokens=[2, 3, 4, 5], temperature=[0.0, 1.0, 1.0, 1.0], seed=[4, 5, 6, 7],
        )  # fmt: skip
    assert out.lengths.tolist() == [2, 0, 4, 5]
    alone = cf.correct(aligner, QUERIES[2], "w2", SETS[2], rounds=2, do_sample=True,
                       max_new_tokens=4, seed=[6])  # fmt: skip
    assert alone.text == [out.text[2]]


def test_an_aligner_that_writes_nothing_leaves_the_answer() -> None:
    with pytest.warns(RuntimeWarning, match="query 0 was not corrected: the aligner wrote ''"):
        out = cf.correct(
            aligner_of(), "the film", "w3", "bright", rounds=2, max_new_tokens=5,
            do_sample=False, prefix_allowed_tokens_fn=lambda i, ids: [EOS],
        )  # fmt: skip
    assert out.text == ["w3"]
    assert out.failed.all()
    assert out.rounds == [["w3"], ["w3"]]


def test_a_query_that_a_policy_does_not_answer_fails() -> None:
    with pytest.warns(RuntimeWarning) as seen:
        out = cf.correct(
            aligner_of(), ["film " * 600, "the plot"], make(seed=3), "bright", **GREEDY
        )
    assert [str(w.message)[:24] for w in seen] == ["request 0 was not decode"]
    assert out.failed.tolist() == [True, False]
    assert out.answers[0] == out.text[0] == ""
    with pytest.warns(RuntimeWarning, match="query 0 was not corrected: its answer is ''"):
        out = cf.correct(
            aligner_of(), ["the plot"], make(seed=3), "bright", **GREEDY,
            policy_generation={"prefix_allowed_tokens_fn": lambda i, ids: [EOS]},
        )  # fmt: skip
    assert out.failed.all()


@pytest.mark.parametrize("rounds", [1, 2])
def test_accept_keeps_the_answer_unless_the_new_one_scores_higher(rounds: int) -> None:
    aligner = aligner_of()
    plain = cf.correct(aligner, QUERIES, ANSWERS, SETS, rounds=rounds, **GREEDY)
    options: dict[str, Any] = {"rounds": rounds, **GREEDY}
    old = cf.correct(aligner, QUERIES, ANSWERS, SETS, accept=always("old"), **options)
    assert old.text == ANSWERS
    assert old.unchanged.all()
    assert old.edit_distance.tolist() == [0.0] * 4
    assert old.scores is not None
    assert old.scores.tolist() == [[1.0, 1.0]] * 4
    new = cf.correct(aligner, QUERIES, ANSWERS, SETS, accept=always("new"), **options)
    assert new.rounds[0] == plain.rounds[0]
    assert new.text == plain.rounds[0], "the second round's are no better than the first's"
    assert new.scores is not None
    assert new.scores.tolist() == [[0.0, 1.0]] * 4
    nothing = cf.correct(
        aligner, QUERIES, ANSWERS, SETS, accept=lambda p, r: [float("nan")] * len(r), **options
    )
    assert nothing.text == ANSWERS, "NaN is the worst"
    nan = cf.Reward(lambda p, r: [float("nan")] * len(r))
    weighed = torch.tensor([0.0, 1.0, 0.0, 1.0]) * nan + cf.Reward(always("new"))
    some = cf.correct(aligner, QUERIES, ANSWERS, SETS, accept=weighed, **options)
    assert some.text == [(plain.rounds[0], ANSWERS)[i % 2][i] for i in range(4)]


def test_accept_scores_texts_as_models_read_them() -> None:
    aligner, tokenizer = aligner_of(), make_tokenizer()
    tuned, ref = (cf.Model(make(seed=s), tokenizer=tokenizer) for s in (1, 2))
    config = make().config
    config.num_labels = 1
    torch.manual_seed(0)
    reward = LlamaForSequenceClassification(config).eval()
    model = cf.RewardModel(reward, tokenizer)
    for value in (cf.LogRatio(tuned, ref), 0.5 * cf.LogRatio(tuned, ref) + 2.0 * model, model):
        out = cf.correct(aligner, QUERIES, ANSWERS, SETS, accept=value, **GREEDY)
        plain = cf.correct(aligner, QUERIES, ANSWERS, SETS, **GREEDY)
        before = by_definition(value, ANSWERS, tuned, ref, reward, tokenizer)
        after = by_definition(value, plain.text, tuned, ref, reward, tokenizer)
        for i in range(4):
            better = after[i] > before[i]
            assert out.text[i] == (plain.text if better else ANSWERS)[i]
            assert out.scores is not None
            wanted = [before[i], after[i] if better else before[i]]
            assert out.scores[i].tolist() == pytest.approx(wanted, abs=1e-4)


def by_definition(
    value: Any, texts: list[str], tuned: Any, ref: Any, reward: Any, tokenizer: Any
) -> list[float]:
    """The value of texts that answer `QUERIES`, EOS included, by plain forwards."""
    found = []
    for query, text in zip(QUERIES, texts, strict=True):
        chat = not isinstance(query, str)
        prompt = (
            tokenizer.apply_chat_template(query, tokenize=False, add_generation_prompt=True)
            if chat
            else query
        )
        before = tokenizer(prompt)["input_ids"]
        ids = torch.tensor([[*before, *tokenizer(text)["input_ids"], EOS]])
        total = 0.0
        for part, weight in zip(value._sum().values, value._sum().weights, strict=True):
            with torch.no_grad():
                if isinstance(part, cf.LogRatio):
                    sums = []
                    for m in (tuned, ref):
                        log_p = m.model(ids).logits[0, :-1].double().log_softmax(-1)
                        picked = log_p[torch.arange(len(log_p)), ids[0, 1:]]
                        sums.append(float(picked[len(before) - 1 :].sum()))
                    total += weight * (sums[0] - sums[1])
                else:
                    whole = f"{query}{text}"
                    if chat:
                        whole = tokenizer.apply_chat_template(
                            [*query, {"role": "assistant", "content": text}], tokenize=False
                        )
                    read = torch.tensor([tokenizer(whole)["input_ids"]])
                    total += weight * float(reward(read).logits)
        found.append(total)
    return found


def test_a_text_that_no_value_can_read_is_not_accepted() -> None:
    small = make(seed=2)
    small.config.max_position_embeddings = 8
    value = cf.LogRatio(cf.Model(small), cf.Model(make(seed=1)))
    with pytest.warns(RuntimeWarning, match="a response to request 0 has no value: .* is 8"):
        out = cf.correct(aligner_of(), ["the"], ["w1 w2"], "bright", accept=value,
                         max_new_tokens=9, do_sample=False)  # fmt: skip
    assert out.text == ["w1 w2"]


def test_the_edit_distance_is_in_words() -> None:
    assert edit_distance("a b c", "a b c") == 0.0
    assert edit_distance("a  b\nc", "a b c") == 0.0
    assert edit_distance("a b c d", "a x c") == 0.5, "one replaced, one deleted, of four"
    assert edit_distance("", "a b") == edit_distance("a b", "c") == 1.0
    assert edit_distance("", "") == 0.0
    assert edit_distance("a b", "b a b") == pytest.approx(1 / 3)
    out = cf.correct(aligner_of(), QUERIES, ANSWERS, SETS, **GREEDY)
    assert out.edit_distance.dtype == torch.float32
    wanted = [edit_distance(a, b) for a, b in zip(ANSWERS, out.text, strict=True)]
    assert out.edit_distance.tolist() == pytest.approx(wanted)
    assert out.unchanged.tolist() == [a == b for a, b in zip(ANSWERS, out.text, strict=True)]


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"objectives": "kindnes"}, ValueError, "objectives has 'kindnes'; known ones are harmless"),
    ({"objectives": []}, ValueError, "objectives is empty"),
    ({"objectives": [["bright"], ["dull"]]}, ValueError, "has 2 sets; it must have 4"),
    ({"answers": ["a"]}, ValueError, "answers_or_policy has 1 answers; it must have 4"),
    ({"answers": ["a", None, "b", "c"]}, TypeError, r"answers_or_policy\[1\] is None"),
    ({"answers": 3}, TypeError, "answers_or_policy is a int; it must be a list of texts"),
    ({"queries": []}, ValueError, "queries is empty"),
    ({"queries": 3}, TypeError, "queries is a int; it must be a list of texts or chats"),
    ({"queries": {"role": "user", "content": "a"}}, TypeError, r"is a dict; .*: \[message\]"),
    (
        {"queries": [None, "a", "b", "c"]},
        TypeError,
        r"query is None; it must be a text or a c",
    ),
    ({"queries": [[1, 2], "a", "b", "c"]}, TypeError, r"queries\[0\]: query is token ids"),
    ({"rounds": 0}, ValueError, "rounds is 0; it must be at least 1"),
    ({"rounds": None}, TypeError, "rounds is None; it must be an int"),
    ({"draft": "prompt"}, ValueError, "draft is 'prompt'; it must be 'answer', or a crossfade.D"),
    ({"draft": 3}, TypeError, "draft is a int; it must be a crossfade.Draft"),
    ({"draft": cf.Draft(texts=["a"])}, ValueError, "draft.texts has 1 entries; it must have 4"),
    ({"draft": "answer", "engine": cf.Engine(simple=True)}, ValueError, "engine is simple, which"),
    ({"accept": 3}, TypeError, "accept is 3; it must be a LogRatio"),
    ({"accept": make()}, TypeError, "accept is a bare LlamaForCausalLM; it must be a LogRatio"),
    ({"queries": ["a", "\ud800", "b", "c"]}, ValueError, r"queries\[1\]: query: .* surrogate"),
    ({"answers": ["a", "\ud800", "b", "c"]}, ValueError, r"answers_or_policy\[1\]: .* surrogate"),
    (
        {"queries": [[{"role": "user", "content": [{"type": "image"}]}], "a", "b", "c"]},
        NotImplementedError,
        r"queries\[0\]: query, message 0, has a part of the type 'image'",
    ),
    ({"streamer": 3, "rounds": 2}, TypeError, "streamer is a int; it must have put and end"),
    ({"streamer": Words(), "rounds": 2, "max_batch": 3}, ValueError, "max_batch is 3; with a stre"),
    ({"seed": [1, 2]}, ValueError, "seed has 2 entries; it must have 4"),
    ({"tokenizer": make_tokenizer()}, NotImplementedError, "tokenizer is not supported by cross"),
    ({"return_cache": True}, NotImplementedError, "return_cache is not supported by crossfade.c"),
    ({"policy_generation": {}}, ValueError, "policy_generation is given, and answers are given"),
    ({"max_tokens": 3}, TypeError, "unknown argument 'max_tokens'; how many new tokens"),
    ({"temperature": [1.0], "do_sample": True, "rounds": 2}, ValueError, "temperature has 1 entri"),
    ({"num_return_sequences": 3, "rounds": 2}, ValueError, "num_return_sequences is 3 and do_sam"),
    ({"max_batch": 0, "rounds": 2}, ValueError, "max_batch is 0"),
    ({"search": 3}, TypeError, "search is a int; it must be a search"),
]


@pytest.mark.parametrize(("given", "error", "says"), BAD)
@pytest.mark.parametrize("by_policy", [False, True])
def test_arguments_are_refused_before_any_work(
    given: dict[str, Any], error: type[Exception], says: str, by_policy: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if by_policy and not given.keys().isdisjoint({"answers", "policy_generation"}):
        pytest.skip("it is about answers")
    monkeypatch.setattr(Group, "step", None)
    monkeypatch.setattr(Group, "__init__", None)
    given = dict(given)
    answers = given.pop("answers", make(seed=3) if by_policy else ANSWERS)
    with pytest.raises(error, match=says):
        cf.correct(
            aligner_of(), given.pop("queries", QUERIES), answers, given.pop("objectives", SETS),
            **{"max_new_tokens": 5, **given},
        )  # fmt: skip


def test_arguments_of_a_policy_are_refused() -> None:
    for own, error, says in [
        ({"num_return_sequences": 2}, ValueError, "policy_generation has num_return_sequences=2"),
        ({"max_tokens": 2}, TypeError, "unknown argument 'max_tokens'"),
        ([1], TypeError, "policy_generation is a list; it must be a mapping"),
    ]:
        with pytest.raises(error, match=says):  # type: ignore[call-overload]
            cf.correct(aligner_of(), QUERIES, make(), SETS, policy_generation=own, **GREEDY)


def test_aligners_are_checked_when_they_are_made() -> None:
    tokenizer: PreTrainedTokenizerFast = make_tokenizer()
    with pytest.raises(ValueError, match="tokenizer is None; an aligner reads texts"):
        cf.MetaAligner(make())
    with pytest.raises(ValueError, match="with a system of its own; an aligner's must have none"):
        cf.MetaAligner(cf.Model(make(), tokenizer=tokenizer, system="a"))
    with pytest.raises(TypeError, match=r"objectives is \['brevity'\]; it must be a mapping"):
        cf.MetaAligner(make(), tokenizer, objectives=["brevity"])
    with pytest.raises(TypeError, match="'aspects'; here they are objectives"):
        cf.MetaAligner(make(), tokenizer, aspects={})
    with pytest.raises(TypeError, match="aligner is a LlamaForCausalLM; it must be a MetaAligner"):
        cf.correct(make(), "a", "w1", "brevity")
    with pytest.raises(TypeError, match="'answers'; the answers, or the policy that writes them"):
        cf.correct(aligner_of(), "a", answers="w1", objectives="brevity")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda al: cf.correct(al, ["a"], ["b"]),
            "correct lacks objectives; it takes aligner, que",
        ),
        (lambda al: al(["a"], ["b"], ["brevity"]), r"not called; correct\(aligner, queries, answ"),
        (lambda al: al(["a"], ["b"]), "a MetaAligner is not called; correct"),
        (lambda al: cf.BestOfN(2, al), "value is a MetaAligner; it must be a LogRatio"),
        (lambda al: cf.generate(al, ["a"]), "blend is a MetaAligner; .* Hugging Face model$"),
    ],
)
def test_an_aligner_is_no_function_and_no_blend(call: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        call(cf.MetaAligner(make("llama"), make_tokenizer()))
