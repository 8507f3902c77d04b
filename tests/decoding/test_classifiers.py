"""Classifiers as terms of a blend, against the definition written out."""

from __future__ import annotations

import math
from typing import Any

import crossfade as cf
import pytest
import torch
from tiny_models import EOS, VOCAB, make, make_letters
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

PROMPTS = ["the film was", "a great plot w3 w4"]
NEW, TOP = 7, 6
SIMPLE = cf.Engine(simple=True)


def classifier_model(shape: str = "llama", seed: int = 5) -> PreTrainedModel:
    """A classifier with opinions, of three named classes."""
    torch.manual_seed(seed)
    names = {"num_labels": 3, "id2label": {0: "bad", 1: "fair", 2: "good"}}
    if shape == "bert":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = BertConfig(vocab_size=VOCAB, intermediate_size=16, pad_token_id=0, **sizes)
        config.update(names)
        model = BertForSequenceClassification(config).eval()
    else:
        config = make(shape).config
        config.update(names)
        model = AutoModelForSequenceClassification.from_config(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.6)
    return model


@pytest.fixture(scope="module")
def base(tokenizer: PreTrainedTokenizerFast) -> cf.Model:
    return cf.Model(make("llama"), tokenizer=tokenizer, name="base")


def by_hand(
    base: cf.Model,
    judge: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    weight: float = 2.0,
    every: int = 1,
    read: Any = None,
) -> tuple[list[int], list[float]]:
    """The greedy response, and its log-probs, by the definition: in float64, a text at a time."""

    def log_c(text: str) -> float:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            return judge(ids).logits[0].double().log_softmax(-1)[2].item()

    read = read or (lambda prompt, response: prompt + response)
    ids, written, log_probs = base.tokenizer(prompt)["input_ids"], [], []
    pull = torch.zeros(VOCAB, dtype=torch.float64)
    while len(written) < NEW and EOS not in written:
        with torch.no_grad():
            z = base.model(torch.tensor([ids + written])).logits[0, -1].double()
        log_p = z.log_softmax(-1)
        if len(written) % every == 0:
            pull = torch.zeros(VOCAB, dtype=torch.float64)
            begun = base.tokenizer.decode(ids + written, skip_special_tokens=True)
            after = {}
            for v in log_p.topk(TOP).indices.tolist():
                text = base.tokenizer.decode([*ids, *written, v], skip_special_tokens=True)
                if read(prompt, text[len(prompt) :]):
                    after[v] = log_c(read(prompt, text[len(prompt) :]))
            if text := read(prompt, begun[len(prompt) :]):
                before = log_c(text)
            else:  # The class's probability before anything is known of the text.
                p = log_p[[*after]].softmax(-1)
                before = math.log(p @ torch.tensor([*after.values()]).double().exp())
            for v, log_c_v in after.items():
                pull[v] = log_c_v - before
        row = (log_p + weight * pull).log_softmax(-1)
        written.append(int(row.argmax()))
        log_probs.append(float(row.max()))
    return written, log_probs


def assert_is(out: cf.Output, want: list[tuple[list[int], list[float]]]) -> None:
    assert out.responses == [ids for ids, _ in want]
    for i, (ids, each) in enumerate(want):
        assert out.logprobs[i, : len(ids)].tolist() == pytest.approx(each, abs=2e-4)


@pytest.mark.parametrize("shape", ["llama", "gpt2", "bert"])
def test_definition(shape: str, base: cf.Model, tokenizer: PreTrainedTokenizerFast) -> None:
    """With a cache or without, in a batch or alone, and another response than the base's own."""
    judge = classifier_model(shape)
    blend = base + 2.0 * cf.Classifier(judge, tokenizer, "good", top=TOP)
    want = [by_hand(base, judge, tokenizer, p) for p in PROMPTS]
    out = cf.generate(blend, PROMPTS, max_new_tokens=NEW)
    assert_is(out, want)
    assert_is(cf.generate(blend, PROMPTS, max_new_tokens=NEW, engine=SIMPLE), want)
    assert_is(cf.generate(blend, PROMPTS, max_new_tokens=NEW, max_batch=1), want)
    assert out.responses != cf.generate(base, PROMPTS, max_new_tokens=NEW).responses
    counted = out.stats.models[-1]
    assert counted.names == ("classifier0",)
    if shape == "bert":
        assert "reads whole texts" in out.stats.notes[0]
    else:
        steps = sum(map(len, out.responses))
        assert not out.stats.notes
        assert counted.tokens <= steps * (TOP + 1) + sum(len(p.split()) for p in PROMPTS)


@pytest.mark.parametrize("shape", ["llama", "bert"])
def test_the_response_alone(shape: str, base: cf.Model, tokenizer: PreTrainedTokenizerFast) -> None:
    """A template that leaves the prompt out gives no text before the first token."""
    judge = classifier_model(shape)
    read = lambda prompt, response: response  # noqa: E731
    blend = base + 2.0 * cf.Classifier(judge, tokenizer, 2, top=TOP, template=read)
    want = [by_hand(base, judge, tokenizer, p, read=read) for p in PROMPTS]
    assert_is(cf.generate(blend, PROMPTS, max_new_tokens=NEW), want)


def test_another_tokenizer(base: cf.Model) -> None:
    """Its texts are encoded anew at each step, and may change before their end."""
    letters = make_letters()
    judge = classifier_model("qwen3")
    read = lambda prompt, response: response.replace(" ", "") or "a"  # noqa: E731
    classifier = cf.Classifier(judge, letters, 2, top=TOP, template=read)
    want = [by_hand(base, judge, letters, p, read=read) for p in PROMPTS]
    assert_is(cf.generate(base + 2 * classifier, PROMPTS, max_new_tokens=NEW), want)


def test_every_third_step(base: cf.Model, tokenizer: PreTrainedTokenizerFast) -> None:
    judge = classifier_model()
    blend = base + 2.0 * cf.Classifier(judge, tokenizer, 2, top=TOP, every=3)
    want = [by_hand(base, judge, tokenizer, p, every=3) for p in PROMPTS]
    assert want != [by_hand(base, judge, tokenizer, p) for p in PROMPTS]
    assert_is(cf.generate(blend, PROMPTS, max_new_tokens=NEW), want)


def test_weights_of_each_request(base: cf.Model, tokenizer: PreTrainedTokenizerFast) -> None:
    """Drawn rows are as they would be alone; so they are where rows come and go."""
    classifier = cf.Classifier(classifier_model(), tokenizer, 2, top=TOP)
    prompts, w = [*PROMPTS, "very dull"], [0.0, 2.0, -1.0]
    q = cf.ValueHead(make("gpt2", 3), name="q")
    how: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": True}
    for rest in (base, base + 0.1 * q):
        out = cf.generate(rest + w * classifier, prompts, seed=[1, 2, 3], **how)
        by_two = cf.generate(rest + w * classifier, prompts, seed=[1, 2, 3], max_batch=2, **how)
        assert out.responses == by_two.responses
        for i, one in enumerate(w):
            alone = cf.generate(rest + one * classifier, prompts[i : i + 1], seed=[i + 1], **how)
            assert out.responses[i] == alone.responses[0]


def test_a_search_on_top(base: cf.Model, tokenizer: PreTrainedTokenizerFast) -> None:
    """Rows fork, and what the classifier said of them forks too: both paths agree."""
    judge = classifier_model()
    blend = base + 2.0 * cf.Classifier(judge, tokenizer, "good", top=TOP, every=2)
    value = cf.Classifier(judge, tokenizer, "good")
    search = cf.ChunkBeamSearch(2, 2, 3, value)
    how: dict[str, Any] = {"max_new_tokens": 9, "seed": 4, "search": search}
    out = cf.generate(blend, PROMPTS, **how)
    assert out.responses == cf.generate(blend, PROMPTS, engine=SIMPLE, **how).responses
    assert out.responses == cf.generate(blend, PROMPTS, max_batch=4, **how).responses
    for prompt, text, got in zip(PROMPTS, out.text, out.values.tolist(), strict=True):
        ids = torch.tensor([tokenizer(prompt + text)["input_ids"]])
        want = judge(ids).logits[0].log_softmax(-1)[2].item()
        assert got == pytest.approx(want, abs=1e-4)


def test_within_a_support_and_with_processors(
    base: cf.Model, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The top tokens are those that are left; processors see the classifier's push."""
    judge = classifier_model()
    kept = base.within(cf.Support(top_k=3)) + 2 * cf.Classifier(judge, tokenizer, 2, top=TOP)
    one = cf.generate(kept, PROMPTS[:1], max_new_tokens=1, kl_to=base)
    ids = tokenizer(PROMPTS[0])["input_ids"]
    log_p = base.model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1).detach()

    def log_c(more: list[int]) -> Tensor:
        return judge(torch.tensor([ids + more])).logits[0].double().log_softmax(-1)[2].detach()

    three = log_p.topk(3)
    pull = torch.stack([log_c([v]) for v in three.indices.tolist()])
    log_pi = (three.values + 2 * pull).log_softmax(-1)
    assert one.logprobs[0, 0].item() == pytest.approx(log_pi.max().item(), abs=1e-4)
    kl = (log_pi.exp() * (log_pi - three.values)).sum().item()
    assert one.kl[0, 0].item() == pytest.approx(kl, abs=1e-4)

    blend = base + 2 * cf.Classifier(judge, tokenizer, 2, top=TOP)
    plain = cf.generate(blend, PROMPTS, max_new_tokens=NEW)
    banned = plain.responses[0][0]
    out = cf.generate(blend, PROMPTS, max_new_tokens=NEW, suppress_tokens=[banned])
    assert banned not in out.responses[0]


def test_a_text_longer_than_the_context(base: cf.Model, tokenizer: PreTrainedTokenizerFast) -> None:
    """The classifier falls silent, and the row goes on as the rest of the blend has it."""
    judge = classifier_model()
    judge.config.max_position_embeddings = 5
    blend = base + 2 * cf.Classifier(judge, tokenizer, 2, top=TOP, name="mood")
    with pytest.warns(RuntimeWarning, match=r"mood says nothing of .* it would read 6 tokens"):
        out = cf.generate(blend, [PROMPTS[1]], max_new_tokens=NEW)
    assert out.responses == cf.generate(base, [PROMPTS[1]], max_new_tokens=NEW).responses


def test_fudge(base: cf.Model, tokenizer: PreTrainedTokenizerFast) -> None:
    """Bayes' rule on the top tokens: log p(v) + log p(class | text + v), and no others."""
    judge = classifier_model()
    blend = cf.presets.fudge(base, cf.Classifier(judge, tokenizer, 2, top=TOP))
    out = cf.generate(blend, PROMPTS[:1], max_new_tokens=1)
    ids = tokenizer(PROMPTS[0])["input_ids"]
    with torch.no_grad():
        top = base.model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1).topk(TOP)
        each = [judge(torch.tensor([[*ids, v]])).logits[0].double() for v in top.indices.tolist()]
    score = top.values + torch.stack([z.log_softmax(-1)[2] for z in each])
    assert out.responses == [[int(top.indices[score.argmax()])]]
    want = score.log_softmax(-1).max().item()
    assert out.logprobs[0, 0].item() == pytest.approx(want, abs=1e-4)
    with pytest.raises(TypeError, match="classifier is a Model; it must be a Classifier"):
        cf.presets.fudge(base, base)


@pytest.mark.parametrize("shape", ["llama", "bert"])
def test_scores(shape: str, base: cf.Model, tokenizer: PreTrainedTokenizerFast) -> None:
    """Log-probs, ranks and divergences of given responses are those of writing them."""
    judge = classifier_model(shape)
    good, bad = (cf.Classifier(judge, tokenizer, k, top=TOP, every=k or 3) for k in (1, 0))
    w = torch.tensor([2.0, -1.0, 0.0])
    blend, other = base + w * good + 0.5 * bad, base + 3.0 * bad
    prompts = [*PROMPTS, "very dull"]
    draw: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": True, "seed": [1, 2, 3]}
    out = cf.generate(blend, prompts, kl_to=other, return_term_logprobs=True, **draw)
    scores = cf.score(blend, prompts, out.responses, kl_to=other, return_term_logprobs=True)
    for i, response in enumerate(out.responses):
        for name in ("logprobs", "kl", "term_logprobs"):
            got, want = (getattr(x, name)[i, : len(response)] for x in (scores, out))
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert cf.generate(blend, prompts, **draw).responses == out.responses, "kl_to changes no token"
    names = [name for s in scores.stats.models for name in s.names]
    assert names == ["base", "classifier0", "classifier1", "kl_to.classifier0"]
    assert ("reads whole texts" in "".join(scores.stats.notes)) == (shape == "bert")


@pytest.mark.parametrize("engine", [None, SIMPLE])
def test_pushes(
    engine: cf.Engine | None, base: cf.Model, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A classifier's follow those of terms: it alone makes the blend depart from the base, by
    log(pi / p_0)(y) less its expectation, the divergence."""
    blend = base + 2.0 * cf.Classifier(classifier_model(), tokenizer, 1, top=TOP)
    asked = {"return_pushes": True, "return_term_logprobs": True, "return_kl_to_base": True}
    out = cf.generate(blend, PROMPTS, max_new_tokens=3, engine=engine, **asked)
    want = out.logprobs - out.term_logprobs[..., 0] - out.kl_to_base
    torch.testing.assert_close(out.pushes[..., 1], want, atol=1e-4, rtol=1e-4)
    assert not out.pushes[..., 0].any()
    assert out.pushes[..., 1].abs().max() > 1e-3


@pytest.mark.parametrize("engine", [None, SIMPLE])
def test_divergence_from_a_classified_reference(
    engine: cf.Engine | None, base: cf.Model, tokenizer: PreTrainedTokenizerFast
) -> None:
    """KL(base || base + 2 classifier) after each token, by the definition, in float64."""
    judge = classifier_model()
    reference = base + 2.0 * cf.Classifier(judge, tokenizer, 2, top=TOP)
    out = cf.generate(base, PROMPTS, max_new_tokens=3, kl_to=reference, engine=engine)
    for i, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt)["input_ids"]
        for t in range(len(out.responses[i])):
            read = [*ids, *out.responses[i][:t]]
            with torch.no_grad():
                log_p = base.model(torch.tensor([read])).logits[0, -1].double().log_softmax(-1)
                pull = torch.zeros(VOCAB, dtype=torch.float64)
                for v in log_p.topk(TOP).indices.tolist():
                    both = [
                        tokenizer.decode(x, skip_special_tokens=True) for x in ([*read, v], read)
                    ]
                    after, before = (
                        judge(torch.tensor([tokenizer(x)["input_ids"]])).logits[0].double()
                        for x in both
                    )
                    pull[v] = after.log_softmax(-1)[2] - before.log_softmax(-1)[2]
            log_q = (log_p + 2.0 * pull).log_softmax(-1)
            want = (log_p.exp() * (log_p - log_q)).sum().item()
            assert out.kl[i, t].item() == pytest.approx(want, abs=1e-4)


def test_algebra(base: cf.Model, tokenizer: PreTrainedTokenizerFast) -> None:
    good = cf.Classifier(classifier_model(), tokenizer, "good", name="good")
    assert good.label == 2
    blend = base + 2 * good - 0.5 * good
    assert (blend.classifiers, blend.classifier_weights) == ((good,), (1.5,))
    assert str(blend) == "base + 1.5*good"
    assert str(blend / 0.4) == "2.5*base + 3.75*good"
    assert (base + 0 * good).classifiers == ()
    assert str(cf.parse("b - 2 * mood", b=base, mood=good)) == "b - 2*mood"
    assert str(cf.union(base, cf.Model(make("gpt2"), name="c")) + good) == "union(base, c) + good"
    assert "llama" in repr(good).lower()
    with pytest.raises(TypeError, match="good is a Classifier, which is not saved; save the blend"):
        blend.to_dict()
    with pytest.raises(ValueError, match="cannot be clamped: it is a sum with values"):
        blend.clamp(min=0)
    with pytest.raises(ValueError, match="good, values alone; it must have at least one Model"):
        cf.generate(good, PROMPTS)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"label": 3}, ValueError, r"label is 3; .*: 0 \('bad'\), 1 \('fair'\), 2 \('good'\)"),
        ({"label": "God"}, ValueError, r"label is 'God'; .*2 \('good'\); did you mean 'good'"),
        ({"label": None}, TypeError, "label is None; it must be the number or the name of a class"),
        ({"label": True}, TypeError, "label is True"),
        ({"top": 0}, ValueError, "top is 0; it must be at least 1"),
        ({"top": 2.0}, TypeError, "top is 2.0; it must be an int"),
        ({"every": 0}, ValueError, "every is 0; it must be at least 1"),
        ({"tokenizer": None}, TypeError, "tokenizer is a NoneType; it must be the classifier's"),
        ({"tokenizer": "gpt2"}, TypeError, "tokenizer is 'gpt2'; it must be a Hugging Face"),
        ({"template": "x"}, TypeError, "template is a str; it must be a function or None"),
        ({"template": str.upper}, TypeError, r"template is called as template\(prompt, re"),
        ({"model": make("llama")}, TypeError, "model is a LlamaForCausalLM, which is no text cla"),
        ({"model": "path"}, TypeError, "model is a str; it must be a loaded Hugging Face model"),
        ({"name": "a b"}, ValueError, "name is 'a b'; it must be an identifier"),
        ({"n": 3}, TypeError, "Classifier got an unknown argument 'n'"),
    ],
    ids=str,
)
def test_bad_arguments(
    arguments: dict[str, Any],
    error: type[Exception],
    says: str,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    given: dict[str, Any] = {"model": classifier_model(), "tokenizer": tokenizer, "label": 0}
    with pytest.raises(error, match=says):
        cf.Classifier(**{**given, **arguments})


def test_one_number_is_no_class(tokenizer: PreTrainedTokenizerFast) -> None:
    config = make("llama").config
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    with pytest.raises(ValueError, match=r"model has 1 classes; .* RewardModel"):
        cf.Classifier(model, tokenizer, 0)


def test_what_it_cannot_do(base: cf.Model, tokenizer: PreTrainedTokenizerFast) -> None:
    good = cf.Classifier(classifier_model(), tokenizer, 2, name="good")
    odd = cf.Classifier(good.model, tokenizer, 2, template=lambda p, r: 3, name="odd")
    with pytest.raises(TypeError, match="the template of odd returned 3; it must return the text"):
        cf.generate(base + odd, PROMPTS, max_new_tokens=1)
    with pytest.raises(ValueError, match="tokenizer is None; the classifier good reads texts"):
        cf.generate(cf.Model(base.model) + good, [[5, 6]], max_new_tokens=1)
    with pytest.raises(ValueError, match=r"weight of good is a tensor \[3\]; it must be \[2\]"):
        cf.generate(base + [1.0, 2.0, 3.0] * good, PROMPTS, max_new_tokens=1)
    w = [1.0, math.nan]
    with pytest.raises(ValueError, match="is nan; it must be finite"):
        base + w * good


def test_pushes_of_a_fader_of_a_session(base: cf.Model, tokenizer: PreTrainedTokenizerFast) -> None:
    """Over one model alone, all that moves a token is the classifier, and its fader's doing."""
    good = cf.Classifier(classifier_model(), tokenizer, "good", top=TOP)
    with cf.Session({"base": base, "good": good}) as session:
        asked: dict[str, Any] = {"blend": "base + w * good", "weights": {"w": 2.0}}
        asked |= {"max_new_tokens": NEW, "return_pushes": True}
        request = session.submit(PROMPTS[0], **asked)
        told = [x["w"] for piece in request for x in piece.pushes]
        pushes = request.result(60).pushes
    assert pushes is not None
    assert told == pytest.approx(pushes[0, :, 1].tolist(), abs=1e-5)
    assert any(abs(x) > 1e-3 for x in told)
