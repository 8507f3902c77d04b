"""What chat templates are given besides the chat, and messages that call tools."""

from __future__ import annotations

from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade import identity
from crossfade.bulk.decode import decode
from tiny_models import make, make_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

CHAT = [{"role": "user", "content": "the film"}]
CALL = {"type": "function", "function": {"name": "plot", "arguments": {"w20": 1}}}
TOLD = [*CHAT, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "dull"}]
PLOT = {"type": "function", "function": {"name": "plot", "description": "a very dull plot"}}
# It prints what it is given, and as "None" a content that is not there.
KNOWING = (
    "{% for t in tools or [] %}system : {{ t.function.name }} {% endfor %}"
    "{% if style %}system : {{ style }} {% endif %}"
    "{% for m in messages %}<bos> {{ m.role }} : {{ m.content }} "
    "{% for c in m.tool_calls or [] %}cast {{ c.function.name }} {% endfor %}"
    "{% if not (loop.last and continue_final_message) %}<eos> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bos> assistant : {% endif %}"
)


@pytest.fixture(scope="module")
def knowing() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = KNOWING
    return tokenizer


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make("llama")


def read(output: Any, tokenizer: Any) -> str:
    return tokenizer.decode(output.sequences[0, : output.prompt_length])


def test_they_reach_the_hook(model: PreTrainedModel, knowing: PreTrainedTokenizerFast) -> None:
    given: dict[str, Any] = {"tools": [PLOT], "chat_template_kwargs": {"style": "bright"}}
    ids = knowing.apply_chat_template(
        [CHAT],
        tools=[PLOT],
        style="bright",
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    kind = cf.Model(model, tokenizer=knowing, system="great")
    blend = cf.Model(model, tokenizer=knowing) + kind
    how: dict[str, Any] = {"max_new_tokens": 5, "return_dict_in_generate": True, **given}
    hook: dict[str, Any] = {"custom_generate": cf.decode, "blend": blend, **how}
    theirs = model.generate(**ids, **hook, blend_inputs=CHAT)
    ours = cf.generate(blend, CHAT, **how)
    assert torch.equal(theirs.sequences, ours.sequences)
    assert theirs.text == ours.text
    with pytest.raises(ValueError, match=r"tools are given, and .* pass blend_inputs="):
        model.generate(**ids, **{**hook, "blend": model})


def test_every_terms_template_gets_them(
    model: PreTrainedModel, knowing: PreTrainedTokenizerFast
) -> None:
    """The first term's template reads nothing of it, the second one's does."""
    plain = make_tokenizer()
    how: dict[str, Any] = {
        "max_new_tokens": 2,
        "tools": [PLOT],
        "chat_template_kwargs": {"style": "bright"},
        "return_term_logprobs": True,
    }
    blend = cf.Model(model, tokenizer=plain) + cf.Model(make("gpt2", 1), tokenizer=knowing)
    found = cf.generate(blend, CHAT, **how)
    assert read(found, plain) == "<bos> user : the film <eos> <bos> assistant :"
    text = "system : plot system : bright <bos> user : the film <eos> <bos> assistant :"
    ids = knowing(text, add_special_tokens=False)["input_ids"]
    other = cf.Model(make("gpt2", 1), tokenizer=knowing, prompt=ids)
    same = cf.generate(cf.Model(model, tokenizer=plain) + other, CHAT, max_new_tokens=2)
    assert torch.equal(found.sequences, same.sequences)
    assert torch.equal(found.logprobs, same.logprobs)


def test_each_way_in_takes_them(model: PreTrainedModel, knowing: PreTrainedTokenizerFast) -> None:
    term = cf.Model(model, tokenizer=knowing)
    how: dict[str, Any] = {"tools": [PLOT], "chat_template_kwargs": {"style": "dull"}}
    out = cf.generate(term, CHAT, max_new_tokens=3, **how)
    ((_, alone),) = decode(term, [CHAT], max_new_tokens=3, **how)
    assert read(out, knowing).startswith("system : plot system : dull <bos> user")
    assert torch.equal(alone.sequences, out.sequences)
    scores = cf.score(term, CHAT, out.responses, **how)
    torch.testing.assert_close(scores.logprobs, out.logprobs)
    texts = cf.score(term, CHAT, out.text, **how)
    torch.testing.assert_close(texts.logprobs, out.logprobs)


def test_a_reward_model_reads_them(
    model: PreTrainedModel, knowing: PreTrainedTokenizerFast
) -> None:
    from transformers import LlamaForSequenceClassification

    config = model.config.__class__(**{**model.config.to_dict(), "num_labels": 1})
    torch.manual_seed(0)
    value = cf.RewardModel(LlamaForSequenceClassification(config).eval(), knowing)
    search = cf.BestOfN(2, value)
    term = cf.Model(model, tokenizer=knowing)
    how: dict[str, Any] = {"search": search, "max_new_tokens": 2, "seed": 3}
    with_tools = cf.generate(term, CHAT, tools=[PLOT], **how)
    answer = {"role": "assistant", "content": with_tools.text[0]}
    text = knowing.apply_chat_template([*CHAT, answer], tools=[PLOT], tokenize=False)
    ids = knowing(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    torch.testing.assert_close(with_tools.values, value.model(ids).logits[0])


def test_functions_are_tools(model: PreTrainedModel, knowing: PreTrainedTokenizerFast) -> None:
    def plot(of: str) -> str:
        """Tells the plot of a film.

        Args:
            of: the film's name.
        """
        return of

    out = cf.generate(cf.Model(model, tokenizer=knowing), CHAT, tools=[plot], max_new_tokens=2)
    assert read(out, knowing).startswith("system : plot <bos> user")


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_calls_need_no_content(
    content: dict[str, Any], model: PreTrainedModel, knowing: PreTrainedTokenizerFast
) -> None:
    """A template that would print a content that is not there as "None" gets an empty one."""
    chat = [CHAT[0], {"role": "assistant", **content, "tool_calls": [CALL]}, TOLD[2]]
    out = cf.generate(cf.Model(model, tokenizer=knowing), chat, max_new_tokens=2)
    assert read(out, knowing) == (
        "<bos> user : the film <eos> <bos> assistant : cast plot <eos> "
        "<bos> <unk> : dull <eos> <bos> assistant :"
    )


def test_a_template_that_fails_without_content_gets_an_empty_one(model: PreTrainedModel) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = KNOWING.replace("{{ m.content }}", "{{ m.content + '' }}")
    out = cf.generate(cf.Model(model, tokenizer=tokenizer), TOLD, max_new_tokens=2)
    assert "assistant : cast plot" in read(out, tokenizer)


def test_other_arguments_make_another_run_and_read_a_cache_as_far_as_it_goes(
    model: PreTrainedModel, knowing: PreTrainedTokenizerFast
) -> None:
    term = cf.Model(model, tokenizer=knowing)
    style = {"style": "dull"}
    first = cf.generate(term, CHAT, max_new_tokens=3, return_cache=True)
    plain = cf.generate(term, CHAT, max_new_tokens=3, chat_template_kwargs=style)
    cached = cf.generate(
        term, CHAT, max_new_tokens=3, chat_template_kwargs=style, cache=first.cache
    )
    assert torch.equal(plain.sequences, cached.sequences)
    assert identity.run_id(generation={"tools": [PLOT]}) != identity.run_id(
        generation={"tools": [{**PLOT, "type": "other"}]}
    )


@pytest.mark.parametrize(
    ("inputs", "how", "error", "says"),
    [
        (CHAT, {"chat_template_kwargs": {"styel": 1}}, ValueError, "'styel'.*did you mean 'style'"),
        (CHAT, {"chat_template_kwargs": {"tools": [PLOT]}}, ValueError, "pass them as tools="),
        (CHAT, {"chat_template_kwargs": {"tokenize": True}}, ValueError, "'tokenize', which foll"),
        (CHAT, {"chat_template_kwargs": ["style"]}, TypeError, "is a list; it must be a mapping"),
        (CHAT, {"tools": PLOT}, TypeError, "tools is a dict; it must be a list"),
        (CHAT, {"tools": ["plot"]}, TypeError, r"tools\[0\] is 'plot'"),
        (CHAT, {"tools": [lambda x: x]}, ValueError, "chat template of base cannot take"),
        ("the film", {"tools": [PLOT]}, ValueError, "request 0 is no chat, and tools is for chat"),
        (
            [CHAT, [5, 6]],
            {"chat_template_kwargs": {"style": 1}},
            ValueError,
            r"request 1 is no chat, and chat_template_kwargs\['style'\]",
        ),
        (TOLD[:2], {}, ValueError, "role 'tool' must follow"),
        (
            [*CHAT, {"role": "assistant", "tool_calls": CALL}],
            {},
            TypeError,
            "tool_calls .* must be a list",
        ),
        ([*CHAT, {"role": "assistant"}], {}, TypeError, "it must have 'content'"),
        ([*CHAT, {"role": "tool", "tool_calls": []}], {}, TypeError, "it must have 'content'"),
    ],
)
def test_mistakes(
    inputs: Any,
    how: dict[str, Any],
    error: type[Exception],
    says: str,
    model: PreTrainedModel,
    knowing: PreTrainedTokenizerFast,
) -> None:
    term = cf.Model(model, tokenizer=knowing, name="base")
    with pytest.raises(error, match=says):
        cf.generate(term, inputs, max_new_tokens=2, **how)


def test_a_template_without_tools_refuses_them(model: PreTrainedModel) -> None:
    term = cf.Model(model, tokenizer=make_tokenizer(), name="base")
    with pytest.raises(ValueError, match="the chat template of base reads none"):
        cf.generate(term, CHAT, max_new_tokens=2, tools=[PLOT])
    with pytest.raises(ValueError, match="message 1 has tool_calls, and it has no place for them"):
        cf.generate(term, TOLD, max_new_tokens=2)


def test_a_terms_own_chat_counts(model: PreTrainedModel, knowing: PreTrainedTokenizerFast) -> None:
    """A text is a chat for a term with a system prompt."""
    term = cf.Model(model, tokenizer=knowing, system="very bright")
    out = cf.generate(term, "the film", max_new_tokens=2, tools=[PLOT])
    assert read(out, knowing).startswith("system : plot <bos> system : very bright")
