"""A response, from its tokens after a prompt to its text and back, by tokenizers of every kind."""

from __future__ import annotations

from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding.inputs import encode
from crossfade.decoding.writing import TOKENS, text_after, tokens_after
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import KINDS, SENTENCEPIECE, tokenizer_of
from tokenizers import normalizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
)

PROMPTS = ["The answer is", "hel", "walk", "hello there! ", "The film was ", "("]
RESPONSES = [" yes", " world", "lo world", "ing", " a  dull cast", "."]
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def plain(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


def model_of(kind: str, seed: int = 0, cls: Any = LlamaForCausalLM, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer_of(kind)),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        **options,
    )
    model: PreTrainedModel = cls(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.5)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_response_make_the_whole_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(0, len(tokenizer) - 1), min_size=2, max_size=20), st.data())
    def check(ids: list[int], data: Any) -> None:
        cut = data.draw(st.integers(0, len(ids)))
        head, whole = plain(tokenizer, ids[:cut]), plain(tokenizer, ids)
        (written,) = text_after(tokenizer, [ids[:cut]], [ids[cut:]])
        assert whole.endswith(written)
        if "\ufffd" not in head + whole:  # no character is cut
            assert head + written == whole

    check()


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece-always"])
def test_a_character_that_ends_in_the_response_is_new(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer("caf\u00e9 \u4f60!")["input_ids"]
    for cut in range(1, len(ids)):
        head = plain(tokenizer, ids[:cut]).rstrip("\ufffd")
        assert head + text_after(tokenizer, [ids[:cut]], [ids[cut:]])[0] == "caf\u00e9 \u4f60!"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "end",
    ["hello" * 3 * TOKENS, "hello" + "<|user|>" * 2 * TOKENS, "\u4f60" * 2 * TOKENS],
    ids=["words", "special", "characters"],
)
def test_a_long_prompt_is_as_its_whole_text(kind: str, end: str) -> None:
    tokenizer = tokenizer_of(kind)
    prompt = tokenizer(end)["input_ids"]
    new = tokenizer(end + " world")["input_ids"][-3:]
    whole, head = plain(tokenizer, [*prompt, *new]), plain(tokenizer, prompt)
    assert text_after(tokenizer, [prompt], [new]) == [whole[len(head) :]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokens_of_a_response_read_as_it(kind: str, prompt: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids = tokenizer(prompt)["input_ids"]
    for response in RESPONSES:
        (new,) = tokens_after(tokenizer, [prompt], [response])
        both = tokenizer(prompt + response)["input_ids"]
        if both[: len(ids)] == ids:
            assert [*ids, *new] == both
        (read,) = text_after(tokenizer, [ids], [new])
        if kind == "wordpiece":  # This kind does not keep spaces as they were.
            assert read.split() == response.split()
        else:
            assert read == response


def test_a_response_that_tokens_cannot_say() -> None:
    tokenizer = tokenizer_of("unigram")
    found = tokens_after(tokenizer, ["\u4f60", "hello"], ["\u597d", ""])
    assert found == [[tokenizer.unk_token_id], []]


@pytest.mark.parametrize(
    ("kind", "form"),
    [*((kind, "text") for kind in KINDS), ("unigram", "ids"), ("sentencepiece-first", "padded")],
)
def test_output_text_follows_the_prompt(kind: str, form: str) -> None:
    tokenizer = tokenizer_of(kind)
    prompts = ["The answer is", "hello world, hello"]
    inputs: Any = {
        "text": prompts,
        "ids": tokenizer(prompts)["input_ids"],
        "padded": tokenizer(prompts, return_tensors="pt", padding=True),
    }[form]
    out = cf.generate(
        cf.Model(model_of(kind), tokenizer=tokenizer),
        inputs,
        max_new_tokens=12,
        do_sample=True,
        num_return_sequences=3,
        seed=5,
        max_batch=6,
        suppress_tokens=[i for t, i in tokenizer.get_vocab().items() if t.startswith("<0x")],
    )
    assert out.text is not None
    begins = 0
    for i, (text, response) in enumerate(zip(out.text, out.responses, strict=True)):
        prompt = tokenizer(prompts[i // 3])["input_ids"]
        whole = plain(tokenizer, [*prompt, *response])
        if "\ufffd" not in whole:
            assert plain(tokenizer, prompt) + text == whole
            begins += text != plain(tokenizer, response)
    if kind in SENTENCEPIECE:
        assert begins, "no response began with a space, so that the test shows nothing"


def chatting(kind: str) -> Any:
    tokenizer = KINDS[kind]()
    tokenizer.chat_template = LLAMA2
    return tokenizer


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_a_space_of_the_template_is_not_the_answers(kind: str) -> None:
    tokenizer, model = chatting(kind), model_of(kind)
    chat = [{"role": "user", "content": "hello"}]
    start = encode(chat, tokenizer, "it")
    both = encode([*chat, {"role": "assistant", "content": "yes"}], tokenizer, "it", whole=True)
    (answer,) = tokens_after(tokenizer, ["<s>[INST] hello [/INST]"], [" yes"])
    assert both[: len(start) + len(answer)] == [*start, *answer]
    one = cf.score(cf.Model(model, tokenizer=tokenizer), [chat], ["yes"])
    other = cf.score(model, [start], [answer])
    torch.testing.assert_close(one.logprobs, other.logprobs)

    read: list[str] = []
    out = cf.generate(
        cf.Model(model, tokenizer=tokenizer),
        [chat],
        prefix_allowed_tokens_fn=lambda i, ids: [
            answer[min(len(ids) - len(start), len(answer) - 1)]
        ],
        max_new_tokens=len(answer),
        search=cf.BestOfN(1, cf.Reward(lambda prompts, texts: read.extend(texts) or [0.0])),
    )
    assert out.text == ["yes"] == read
    continued = [*chat, {"role": "assistant", "content": "hello"}]
    assert cf.score(cf.Model(model, tokenizer=tokenizer), [continued], [" yes"]).lengths == len(
        tokens_after(tokenizer, ["hello"], [" yes"])[0]
    )


def test_white_space_that_the_tokens_of_a_prompt_lack_is_not_repeated() -> None:
    tokenizer, model = KINDS["unigram"](), model_of("unigram")
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()  # T5's tokenizer has this too.
    start = len(tokenizer("The answer is ")["input_ids"])
    answer = tokenizer("The answer is yes")["input_ids"][start:]
    out = cf.generate(
        cf.Model(model, tokenizer=tokenizer),
        ["The answer is ", "The answer is"],
        prefix_allowed_tokens_fn=lambda i, ids: [answer[len(ids) - start]],
        max_new_tokens=len(answer),
    )
    assert out.text == ["yes", " yes"]
    scores = cf.score(cf.Model(model, tokenizer=tokenizer), ["The answer is "], ["yes"])
    torch.testing.assert_close(scores.logprobs[0], out.logprobs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_texts_are_those_of_the_tokens_that_say_them(kind: str) -> None:
    tokenizer, model = tokenizer_of(kind), model_of(kind)
    prompt, response = "The answer is", " yes, hello"
    both, start = tokenizer(prompt + response)["input_ids"], tokenizer(prompt)["input_ids"]
    assert both[: len(start)] == start
    found = cf.score(cf.Model(model, tokenizer=tokenizer), [prompt, start], [response, response])
    expected = cf.score(model, [start], [both[len(start) :]])
    assert found.lengths.tolist() == [len(both) - len(start)] * 2
    for row in found.logprobs:
        torch.testing.assert_close(row[None], expected.logprobs)


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_values_read_what_was_written(kind: str) -> None:
    """A reward, a reward model and a log-ratio over other tokens, where prompts end in a word."""
    tokenizer, other = tokenizer_of(kind), tokenizer_of("bytes")
    prompts = ["The answer is", "hello"]
    seen: list[tuple[str, str]] = []

    def reward(prompts: list[str], texts: list[str]) -> list[float]:
        seen.extend(zip(prompts, texts, strict=True))
        return [0.0] * len(texts)

    tuned, ref = (cf.Model(model_of("bytes", i), tokenizer=other) for i in (1, 2))
    judge = model_of("bytes", 3, LlamaForSequenceClassification, num_labels=1)
    value = cf.LogRatio(tuned, ref) + cf.RewardModel(judge, other) + cf.Reward(reward)
    out = cf.generate(
        cf.Model(model_of(kind), tokenizer=tokenizer),
        prompts,
        max_new_tokens=6,
        eos_token_id=4,
        search=cf.ChunkBeamSearch(width=1, samples=3, chunk_length=3, value=value),
        seed=2,
    )
    assert out.text is not None
    assert out.value_parts is not None
    for i, (prompt, text) in enumerate(zip(prompts, out.text, strict=True)):
        ids = tokenizer(prompt)["input_ids"]
        whole = plain(tokenizer, [*ids, *out.responses[i]])
        assert prompt + text == whole
        assert (prompt, text) in seen
        expected = other(whole)["input_ids"]
        with torch.no_grad():
            score = judge(torch.tensor([expected])).logits[0, 0]
        torch.testing.assert_close(out.value_parts[i, 1], score)
        if not out.finished[i]:
            ratio = (cf.score(m, [prompt], [text]).totals[0] for m in (tuned, ref))
            a, b = ratio
            torch.testing.assert_close(out.value_parts[i, 0], a - b, rtol=1e-4, atol=1e-4)


def test_a_chunks_end_reads_the_chunk_with_its_space() -> None:
    kind = "sentencepiece-first"
    tokenizer = tokenizer_of(kind)
    seen: list[str] = []
    out = cf.generate(
        cf.Model(model_of(kind), tokenizer=tokenizer),
        ["hello"],
        max_new_tokens=4,
        eos_token_id=4,
        search=cf.ChunkBeamSearch(
            width=1,
            samples=1,
            chunk_length=2,
            value=cf.Reward(lambda prompts, texts: [0.0] * len(texts)),
            chunk_end=lambda text: bool(seen.append(text)),
        ),
        seed=3,
    )
    ids = tokenizer("hello")["input_ids"]
    new = out.responses[0]
    pieces = [(0, 1), (2, 3)]  # It is asked after each token until a chunk is full.
    expected = [text_after(tokenizer, [[*ids, *new[:a]]], [new[a:b]])[0] for a, b in pieces]
    assert seen == expected


@pytest.mark.parametrize("kind", SENTENCEPIECE)
def test_a_bos_that_a_text_begins_with_is_not_put_twice(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    assert encode("<s>hello", tokenizer, "it") == tokenizer("<s>hello")["input_ids"][1:]
    assert encode("hello", tokenizer, "it") == tokenizer("hello")["input_ids"]
    seen: list[str] = []
    cf.generate(
        cf.Model(model_of(kind), tokenizer=tokenizer),
        [tokenizer("hello")["input_ids"]],
        max_new_tokens=1,
        search=cf.BestOfN(1, cf.Reward(lambda prompts, texts: seen.extend(prompts) or [0.0])),
    )
    assert seen == ["hello"]
