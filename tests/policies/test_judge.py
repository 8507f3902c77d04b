"""Judgments are what their definition says, mirror swapped pairs, and survive bad ones."""

from __future__ import annotations

import logging
import math
import random
from typing import Any

import crossfade as cf
import pytest
import torch
from judge_cases import CONTEXTS, FIRSTS, SECONDS, TEMPLATE, by_definition, make_judge
from tiny_models import lora, make, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
SHAPES = ["llama", "gpt2", "gemma3"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("principles", [None, ["plot", "dull"], {"own": "bright"}])
def test_judgments_equal_the_definition(shape: str, principles: Any) -> None:
    judge = make_judge(make(shape), principles=principles)
    found = judge(CONTEXTS, FIRSTS, SECONDS)
    wanted = by_definition(judge, CONTEXTS, FIRSTS, SECONDS)
    assert found.by_principle.shape == (3, 1 if principles is None else len(principles), 2)
    assert torch.allclose(found.by_principle, wanted, rtol=1e-5, atol=1e-7)
    assert torch.allclose(found.first, wanted[..., 0].mean(1), rtol=1e-5)
    assert torch.allclose(found.second, wanted[..., 1].mean(1), rtol=1e-5)
    assert found.preference.dtype == torch.float64
    assert not found.failed.any()
    assert len({round(float(x), 6) for x in wanted.flatten()}) == wanted.numel(), "all differ"


def test_a_blend_judges() -> None:
    tokenizer = make_tokenizer()
    a, b = (cf.Model(make(seed=s), tokenizer=tokenizer, name=f"m{s}") for s in (1, 2))
    judge = make_judge(a + 0.7 * (b - a))
    found = judge(CONTEXTS, FIRSTS, SECONDS).by_principle
    assert torch.allclose(found, by_definition(judge, CONTEXTS, FIRSTS, SECONDS), rtol=1e-5)


def test_an_adapter_that_is_switched_off_does_not_judge() -> None:
    pytest.importorskip("peft")
    plain = make_judge(make())(CONTEXTS, FIRSTS, SECONDS).by_principle
    wrapped = lora(3, make(), "policy")
    tokenizer = make_tokenizer()
    off, on = (
        make_judge(cf.Model(wrapped, tokenizer=tokenizer, adapter=name))(CONTEXTS, FIRSTS, SECONDS)
        for name in (None, "policy")
    )
    assert torch.allclose(off.by_principle, plain, rtol=1e-5)
    assert not torch.allclose(on.by_principle, plain, rtol=1e-2)


def test_saved_settings_of_generation_play_no_part() -> None:
    """The official judge calls `generate`, whose saved temperature and truncation warp scores."""
    model = make()
    plain = make_judge(model)(CONTEXTS, FIRSTS, SECONDS).by_principle
    model.generation_config.update(
        do_sample=True, temperature=0.1, top_k=1, top_p=0.1, repetition_penalty=3.0,
        suppress_tokens=[8, 9], max_new_tokens=1,
    )  # fmt: skip
    assert torch.equal(make_judge(model)(CONTEXTS, FIRSTS, SECONDS).by_principle, plain)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_swapped_pair_mirrors_to_the_last_bit(shape: str) -> None:
    """Also where some pairs of a batch are swapped and others are not."""
    judge = make_judge(make(shape), principles=["plot", "cast"])
    contexts = [CONTEXTS[i % 3] for i in range(12)]
    chance = random.Random(0)
    words = ["the", "a", "film", "plot", "great", "bright", "dull", "w1", "w2"]
    firsts, seconds = (
        [" ".join(chance.choices(words, k=chance.randint(1, 9))) for _ in contexts] for _ in "ab"
    )
    straight = judge(contexts, firsts, seconds)
    for swaps in ([True] * 12, [chance.random() < 0.5 for _ in contexts]):
        pairs = [
            (b, a) if swap else (a, b) for a, b, swap in zip(firsts, seconds, swaps, strict=True)
        ]
        turned = judge(contexts, *map(list, zip(*pairs, strict=True)))
        for i, swap in enumerate(swaps):
            ab, one = straight.by_principle[i], turned.by_principle[i]
            assert torch.equal(one.flip(-1) if swap else one, ab)
            p, q = float(straight.preference[i]), float(turned.preference[i])
            assert q == pytest.approx(1 - p if swap else p, abs=1e-12)


def test_equal_answers_tie_and_the_first_wins() -> None:
    judge = make_judge(principles=["plot", "cast"])
    found = judge(["the film"], ["a plot"], ["a plot"])
    assert torch.equal(found.first, found.second)
    assert found.preference.tolist() == [0.5]
    assert found.first_wins.tolist() == [True]


def test_pairs_that_cannot_be_judged_leave_the_others(recwarn: pytest.WarningsRecorder) -> None:
    judge = make_judge()
    long = "w1 " * 600
    contexts = ["the film", "a cast", long, "the plot", "the film"]
    firsts = ["great", "", "bright", " \n", "w1"]
    seconds = ["awful", "dull", "dull", "w2", long]
    found = judge(contexts, firsts, seconds)
    assert found.failed.tolist() == [False, True, True, True, True]
    alone = judge(contexts[:1], firsts[:1], seconds[:1])
    assert torch.allclose(found.by_principle[0], alone.by_principle[0], rtol=1e-5)
    assert found.by_principle[1:].isnan().all()
    assert found.preference[1:].isnan().all()
    assert found.first_wins[1:].tolist() == [False] * 4
    said = [str(w.message) for w in recwarn]
    assert said[0] == "pair 1 was not judged: its first answer is '', without a word"
    assert "pair 2 was not judged: its prompt has " in said[1]
    assert "tokens, and the context of model0 is 512" in said[1]
    assert said[2].startswith("pair 3 was not judged: its first answer is ' \\n'")
    assert said[3].startswith("pair 4 was not judged: its prompt has ")


def test_no_pair_is_judged_at_no_cost() -> None:
    found = make_judge()([], [], [])
    assert len(found) == 0
    assert found.by_principle.shape == (0, 1, 2)
    assert math.isnan(found.position_bias)


def test_prefer_gives_the_probabilities() -> None:
    judge = make_judge()
    found = judge.prefer(CONTEXTS, FIRSTS, SECONDS)
    assert torch.equal(found, judge(CONTEXTS, FIRSTS, SECONDS).preference)
    with judge.keeping() as reading:
        assert torch.allclose(reading.prefer(CONTEXTS, FIRSTS, SECONDS), found, rtol=1e-5)
        again = reading.prefer(CONTEXTS[:2], FIRSTS[:2], ["w7", "w8"])
    assert torch.allclose(again, judge.prefer(CONTEXTS[:2], FIRSTS[:2], ["w7", "w8"]), rtol=1e-5)


def test_the_prompt_is_the_text_that_is_read() -> None:
    judge = make_judge(principles=["plot"])
    text = judge.prompt("the film", "great", " awful ")
    assert text == (
        "<bos> user : the plot film ?\nContext:\n-----\nUser: the film\n-----\n"
        "Assistant great: great\nAssistant awful: awful\nPlease choose either great or awful. "
        "<eos> <bos> assistant : the plot film was"
    )
    assert judge.prompt("the film", "great", "awful", "plot") == text
    assert judge.labels == (" great", " awful")
    with pytest.raises(ValueError, match="principle is 'cast'; it must be among plot"):
        judge.prompt("the film", "great", "awful", "cast")
    with pytest.raises(ValueError, match=r"principle is \['plot'\]; it must be among plot"):
        judge.prompt("the film", "great", "awful", ["plot"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="second is None; it must be a text"):
        judge.prompt("the film", "great", None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"template": "hhh"}, "template is 'hhh'; it must be among hh, ultrafeedback"),
        ({"template": 3}, "template is a int; it must be a JudgeTemplate"),
        ({"template": {"nuon": "x"}}, "did you mean 'noun'"),
        ({"principles": ["polt"]}, "principles has 'polt'; .* did you mean 'plot'"),
        ({"principles": [["plot"]]}, r"principles has \['plot'\]; the template knows plot, cast"),
        ({"principles": []}, "principles is empty"),
        ({"principles": 3}, "principles is a int; it must be a list of names"),
        ({"max_batch": 0}, "max_batch is 0; it must be at least 1"),
        ({"temperature": 1.0}, "a judge generates nothing"),
        ({"system": "You judge."}, r"template=JudgeTemplate\(\.\.\.\)"),
        ({"aspects": ["plot"]}, "aspects to judge are principles"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make_judge(**arguments)


def test_a_judge_needs_a_chat_template() -> None:
    with pytest.raises(ValueError, match="tokenizer is None; a judge reads texts"):
        cf.Judge(make())
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="without a chat template; a judge must have one"):
        cf.Judge(make(), tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="System role not supported; a template with system=None"):
        cf.Judge(make(), tokenizer)
    assert cf.Judge(make(), tokenizer, template=TEMPLATE).labels == (" great", " awful")


def test_terms_with_prompts_or_weights_of_their_own_are_refused() -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match="with a system of its own"):
        make_judge(cf.Model(make(), tokenizer=tokenizer, system="the"))
    with pytest.raises(ValueError, match="with a prompt of its own"):
        make_judge(cf.Model(make(), tokenizer=tokenizer, prompt="the"))
    a, b = (cf.Model(make(seed=s), tokenizer=tokenizer) for s in (1, 2))
    with pytest.raises(ValueError, match="must be numbers"):
        make_judge(a + torch.tensor([0.5, 0.7]) * b)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (("the film", ["a"], ["b"]), TypeError, "contexts is 'the film'; it must be a list"),
        ((CONTEXTS[1], ["a"], ["b"]), TypeError, "contexts is one chat; it must be a list"),
        ((["a", "b"], ["a"], ["b", "c"]), ValueError, "firsts has 1 entries; it must have 2"),
        ((["a"], ["a"], []), ValueError, "seconds has 0 entries; it must have 1"),
        ((["a"], [None], ["b"]), TypeError, r"firsts\[0\] is None; it must be a text"),
        (([[3, 4]], ["a"], ["b"]), TypeError, r"contexts\[0\] is token ids; it must be a text"),
        (([7], ["a"], ["b"]), TypeError, r"contexts\[0\] is 7; it must be a text"),
    ],
)
def test_wrong_pairs_are_named(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_judge()(*given)


@pytest.mark.model
def test_the_small_model_judges_by_the_named_templates(smollm2_folder: Any) -> None:
    model, tokenizer = cf.models.smollm2()
    for name in ("hh", "ultrafeedback"):
        judge = cf.Judge(model, tokenizer, template=name)
        text = judge.prompt("How was it?", "Great.", "Bad.")
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            p = model(ids).logits[0, -1].double().softmax(-1)
        a, b = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in judge.labels)
        assert len(a) == len(b) == 1
        found = judge(["How was it?"], ["Great."], ["Bad."]).orders[0, 0, 0]
        assert torch.allclose(found, p[[*a, *b]], rtol=1e-5)
    assert TEMPLATE.labels == ("great", "awful")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda judge: judge(prompts=["a"], firsts=["b"]), "'prompts'; what was answered are the"),
        (lambda judge: judge(["a"], chosen=["b"], rejected=["c"]), "'chosen'; the answers a are f"),
        (lambda judge: judge(["a"], ["b"], rejected=["c"]), "'rejected'; the answers b are second"),
        (lambda judge: judge.prefer(["a"], ["b"], ["c"], batch_size=2), r"; Judge\(model, max_bat"),
        (lambda judge: judge(["a"], ["b"]), "a Judge lacks seconds; it takes contexts, firsts, s"),
        (lambda judge: cf.generate(judge, ["a"]), "blend is a Judge; .* Hugging Face model$"),
        (lambda judge: judge.blend + judge, "a Judge cannot be added to a blend; terms, values "),
    ],
)
def test_calls_that_cannot_be(call: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        call(make_judge())


def test_a_long_pair_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """The tokenizer has a warning of its own for texts that are longer than it was saved for."""
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 60
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        tokenizer("w1 " * 61)
        assert "longer than the specified maximum" in caplog.text
        tokenizer.deprecation_warnings.clear()
        caplog.clear()
        judge = cf.Judge(make(), tokenizer, template=TEMPLATE)
        with pytest.warns(RuntimeWarning, match="pair 0 was not judged: its prompt has"):
            judge(["the film"], ["w1 " * 600], ["w2"])
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "longer than the specified maximum" not in caplog.text
