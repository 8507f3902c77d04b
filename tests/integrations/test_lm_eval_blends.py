"""Blends in the evaluation harness: their scores, prompts, samples and searches."""

from __future__ import annotations

import logging
from typing import Any

import crossfade as cf
import pytest
import torch

pytest.importorskip("lm_eval", reason='it needs "crossfade[lm-eval]"')

from crossfade.integrations.lm_eval import CrossfadeLM
from harness import model_of, requests
from lm_eval.api.model import CachingLM
from tokenizer_kinds import tokenizer_of

TOKENIZER = tokenizer_of("bytes")
CHAT = (
    "{% for m in messages %}{% if refuse_system is defined and m['role'] == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}<|user|>{{ m['role'] }}:{{ m['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|answer|>\n{% endif %}"
)
PAIRS = [("The film was", " dull"), ("The film was", " bright"), ("hello there", " world")]


def term(seed: int, **options: Any) -> cf.Model:
    return cf.Model(model_of("bytes", seed), tokenizer=TOKENIZER, **options)


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(TOKENIZER, "chat_template", CHAT)
    return TOKENIZER


def log_p(seed: int, prompt: str, response: str) -> torch.Tensor:
    """The log-probs ``[tokens, V]`` before each token of a response under one model alone."""
    before, after = (TOKENIZER.encode(t, add_special_tokens=False) for t in (prompt, response))
    with torch.no_grad():
        logits = model_of("bytes", seed)(torch.tensor([before + after])).logits[0]
    return logits[len(before) - 1 : -1].log_softmax(-1)


def answer(log_p: torch.Tensor, response: str) -> tuple[float, bool]:
    ids = torch.tensor(TOKENIZER.encode(response, add_special_tokens=False))
    log_p = log_p.log_softmax(-1)
    total = log_p.gather(1, ids[:, None]).sum()
    return float(total), bool((log_p.argmax(-1) == ids).all())


def test_scores_are_those_of_a_direct_computation() -> None:
    lm = CrossfadeLM(term(0) + 0.8 * (term(1) - term(2)))
    found = lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    for pair, (total, greedy) in zip(PAIRS, found, strict=True):
        a, b, c = (log_p(seed, *pair) for seed in range(3))
        expected = answer(a + 0.8 * (b - c), pair[1])
        assert total == pytest.approx(expected[0], abs=1e-4)
        assert greedy == expected[1]
    (rolling,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [("hello",)]), True)
    a, b, c = (log_p(seed, "<s>", "hello") for seed in range(3))
    assert rolling == pytest.approx(answer(a + 0.8 * (b - c), "hello")[0], abs=1e-4)


class Bad(torch.nn.Module):
    """A value head that has no values after the first token of " dull"."""

    def __init__(self) -> None:
        super().__init__()
        self.model = model_of("bytes", 1)
        self.config = self.model.config

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        output = self.model(input_ids=input_ids, **kwargs)
        output.logits[input_ids == TOKENIZER.encode(" dull")[0]] = float("nan")
        return output


def test_what_the_blend_cannot_score_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("lm_eval"), "propagate", True)
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    lm = CrossfadeLM(term(0) + cf.ValueHead(Bad(), tokenizer=TOKENIZER))
    pairs = [("The film was", " dull, very dull"), ("hello there", " world")]
    found = lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    assert [total != total for total, _ in found] == [True, False]
    assert not found[0][1]
    assert "NaN for 1 of 2 requests" in caplog.text


def test_the_shortest_context_counts(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("lm_eval"), "propagate", True)
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    long, short = term(0), cf.Model(model_of("bytes", 1, context=16), tokenizer=TOKENIZER)
    assert CrossfadeLM(long).max_length == 512
    lm = CrossfadeLM(long + 0.5 * short)
    assert lm.max_length == 16
    asked = requests("loglikelihood", [("hello world, " * 9, " yes")])
    assert lm.loglikelihood(asked, disable_tqdm=True)[0][0] < 0
    assert "1 of 1 contexts are too long" in caplog.text


def test_a_system_prompt_is_joined_to_the_context(chat: Any) -> None:
    lm = CrossfadeLM(term(0) + 0.5 * term(1, system="Be kind."))
    (found,) = lm.loglikelihood(requests("loglikelihood", [("The film was ", "bright")]), True)
    own = "<|user|>system:Be kind.\n<|user|>user:The film was\n<|answer|>\n"
    a, b = log_p(0, "The film was", " bright"), log_p(1, own, " bright")
    assert found[0] == pytest.approx(answer(a + 0.5 * b, " bright")[0], abs=1e-4)
    for asked in (
        lambda: lm.loglikelihood(requests("loglikelihood", [("", "hello")]), True),
        lambda: lm.loglikelihood_rolling(requests("loglikelihood_rolling", [("hello",)]), True),
    ):
        with pytest.raises(NotImplementedError, match="has a system prompt"):
            asked()


def test_a_system_prompt_is_joined_to_the_harness_own_chat(chat: Any) -> None:
    """Not to a text with the marks of a chat, which the harness makes of it."""
    lm = CrossfadeLM(term(0) + 0.5 * term(1, system="Be kind."))
    context = lm.apply_chat_template([{"role": "user", "content": "The film?"}])
    (found,) = lm.loglikelihood(requests("loglikelihood", [(context, "bright")]), True)
    own = "<|user|>system:Be kind.\n<|user|>user:The film?\n<|answer|>\n"
    a, b = log_p(0, context, "bright"), log_p(1, own, "bright")
    assert found[0] == pytest.approx(answer(a + 0.5 * b, "bright")[0], abs=1e-4)
    settings = {"until": [], "max_gen_toks": 4}
    (text,) = lm.generate_until(requests("generate_until", [(context, settings)]), True)
    out = cf.generate(
        term(0) + 0.5 * term(1, system="Be kind."),
        [[{"role": "user", "content": "The film?"}]],
        max_new_tokens=4,
    )
    assert text == TOKENIZER.decode(out.responses[0], skip_special_tokens=True)


def test_chat_templates(chat: Any) -> None:
    lm = CrossfadeLM(term(0), chat_template_args={"refuse_system": True})
    history = [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}]
    assert lm.apply_chat_template(history) == "<|user|>user:hello\n<|answer|>\n"
    open_chat = [*history[1:], {"role": "assistant", "content": "yes"}]
    assert lm.apply_chat_template(open_chat, add_generation_prompt=False).endswith("yes")
    assert lm.chat_template(True) == CHAT
    assert lm.tokenizer_name == TOKENIZER.name_or_path.replace("/", "__")


def test_samples_follow_their_seed() -> None:
    settings = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 6}
    asked = requests("generate_until", [("hello", settings)] * 3)

    def written(**options: Any) -> list[str]:
        return CrossfadeLM(term(0) + 0.5 * term(1), **options).generate_until(asked, True)

    assert written(seed=1) == written(seed=1, batch_size=1) != written(seed=2)
    assert len(set(written(seed=1))) == 3  # The harness repeats a request to have more samples.
    other = [requests("generate_until", [("hello", {**settings, "top_k": k})])[0] for k in (0, 300)]
    found = CrossfadeLM(term(0), seed=1).generate_until(other, True)
    assert found[0] != found[1]  # Where settings differ, the draws do too.
    torch.manual_seed(5)
    first, second = written(), written()
    torch.manual_seed(5)
    assert first == written() != second


def test_a_recipe_searches_whatever_tasks_say() -> None:
    value = cf.Reward(lambda prompts, responses: [float(r.count("o")) for r in responses])
    recipe = cf.Recipe(term(0), cf.BestOfN(6, value))
    asked = requests("generate_until", [("hello", {"until": [], "max_gen_toks": 6})])
    options = {"do_sample": True, "top_k": 9}
    (found,) = CrossfadeLM(recipe, seed=0, generation=options).generate_until(asked, True)
    (plain,) = CrossfadeLM(term(0), seed=0, generation=options).generate_until(asked, True)
    assert found.count("o") > plain.count("o")
    asked = requests("loglikelihood", PAIRS)
    expected = CrossfadeLM(term(0)).loglikelihood(asked, True)
    assert CrossfadeLM(recipe).loglikelihood(asked, True) == expected


@pytest.mark.parametrize("by", ["id", "text"])
def test_tasks_see_what_follows_the_thinking(by: str) -> None:
    asked = requests("generate_until", [("hello", {"until": [], "max_gen_toks": 8})])
    (whole,) = CrossfadeLM(term(0)).generate_until(asked, True)
    (ids,) = cf.generate(term(0), "hello", max_new_tokens=8).responses
    end = ids[3]
    last = len(ids) - ids[::-1].index(end)
    think = end if by == "id" else TOKENIZER.decode([end])
    (found,) = CrossfadeLM(term(0), think_end_token=think).generate_until(asked, True)
    assert found == TOKENIZER.decode(ids[last:]).lstrip()
    assert len(found) < len(whole)


def test_answers_are_cached(tmp_path: Any) -> None:
    """As soon as they are there, so that a run that stops goes on from them."""
    lm = CrossfadeLM(term(0))
    cached = CachingLM(lm, str(tmp_path / "answers.db"))
    asks = {
        "loglikelihood": PAIRS,
        "loglikelihood_rolling": [("hello world",)],
        "generate_until": [("hello", {"until": ["e"], "max_gen_toks": 4})],
    }
    found = {kind: getattr(lm, kind)(requests(kind, given)) for kind, given in asks.items()}
    for kind in asks:
        setattr(lm, kind, None)  # All is in the cache by now.
    again = {kind: getattr(cached, kind)(requests(kind, given)) for kind, given in asks.items()}
    cached.dbdict.close()
    assert again == found


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 0}, 'batch_size is 0; it must be an int from 1 on, or "auto"'),
        ({"batch_size": "many"}, "batch_size is 'many'"),
        ({"max_length": 0}, "max_length is 0; it must be at least 1"),
        ({"seed": -1}, "seed is -1; it must be at least 0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        CrossfadeLM(term(0), **options)
    with pytest.raises(ValueError, match="tokenizer is None; the harness needs one"):
        CrossfadeLM(model_of("bytes"))
