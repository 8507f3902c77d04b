"""A blend as the model of Hugging Face's text-generation pipeline."""

from __future__ import annotations

from typing import Any

import crossfade as cf
import pytest
import torch
from tiny_models import make, make_letters, make_tokenizer
from transformers import TextGenerationPipeline, pipeline

BASE, TUNED, TOKENIZER = make("llama", 0), make("llama", 1), make_tokenizer()
BLEND = cf.Model(BASE, tokenizer=TOKENIZER) + 0.5 * cf.Model(TUNED, tokenizer=TOKENIZER)
GENERATION: dict[str, Any] = {"do_sample": True, "seed": 3, "top_k": 7, "max_new_tokens": 8}
# A pipeline has defaults of its own, among them a temperature of 0.7.
GENERATION["temperature"] = 1.0
HOOK: dict[str, Any] = {"custom_generate": cf.decode, "blend": BLEND, **GENERATION}
TEXTS = ["the film was", "a very dull plot"]
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]


@pytest.fixture(scope="module")
def pipe() -> TextGenerationPipeline:
    return pipeline("text-generation", model=BASE, tokenizer=TOKENIZER)


def written(inputs: Any, **arguments: Any) -> list[str]:
    return cf.generate(BLEND, inputs, **{**GENERATION, **arguments}).text


def test_texts(pipe: TextGenerationPipeline) -> None:
    (text,) = written(TEXTS[0])
    assert pipe(TEXTS[0], **HOOK, return_full_text=False) == [{"generated_text": text.strip()}]
    assert pipe(TEXTS[0], **HOOK)[0]["generated_text"].startswith(TEXTS[0])


def test_a_batch_is_a_call(pipe: TextGenerationPipeline) -> None:
    """The place in the batch decides the stream: by default every text is a batch of its own."""
    together = pipe(TEXTS, **HOOK, return_full_text=False, batch_size=2)
    assert [x["generated_text"] for (x,) in together] == [t.strip() for t in written(TEXTS)]
    each = pipe(TEXTS, **HOOK, return_full_text=False)
    alone = [written(text)[0].strip() for text in TEXTS]
    assert [x["generated_text"] for (x,) in each] == alone
    assert alone[1] != written(TEXTS)[1].strip()


def test_chats_and_samples(pipe: TextGenerationPipeline) -> None:
    found = pipe(CHATS[0], **HOOK, num_return_sequences=2)
    answers = [x["generated_text"][-1] for x in found]
    texts = written(CHATS[0], num_return_sequences=2)
    assert answers == [{"role": "assistant", "content": text} for text in texts]


def test_a_system_prompt_needs_the_chat(pipe: TextGenerationPipeline) -> None:
    blend = BLEND + cf.Model(BASE, tokenizer=TOKENIZER, system="great")
    hook = {**HOOK, "blend": blend}
    with pytest.raises(ValueError, match="pass blend_inputs="):
        pipe(CHATS[0], **hook)
    found = pipe(CHATS[0], **hook, blend_inputs=CHATS[0])
    (text,) = cf.generate(blend, CHATS[0], **GENERATION).text
    assert found[0]["generated_text"][-1]["content"] == text


def test_log_probs_come_with_the_texts(pipe: TextGenerationPipeline) -> None:
    (found,) = pipe(TEXTS[0], **HOOK, return_dict_in_generate=True, kl_to=BASE)
    ours = cf.generate(BLEND, TEXTS[0], kl_to=BASE, **GENERATION)
    for name in ("logprobs", "kl"):  # Transformers 5.17 puts each into a list more.
        theirs = torch.tensor(found[name]).flatten()
        assert torch.allclose(theirs, getattr(ours, name)[0], atol=1e-5)


def test_stop_strings(pipe: TextGenerationPipeline) -> None:
    """The pipeline's own `stop_sequence` needs the tokenizer that a function does not get."""
    letters = make_letters()
    arguments = {**HOOK, "blend": BASE, "max_new_tokens": 40, "return_tensors": True}
    arguments["blend_tokenizer"] = letters
    (whole,) = pipe(TEXTS[0], **arguments)
    ids = whole["generated_token_ids"]
    stop = letters.decode(ids[6])
    (found,) = pipe(TEXTS[0], **arguments, blend_stop_strings=[stop])
    assert len(found["generated_token_ids"]) <= 7 < len(ids)
    assert found["generated_token_ids"] == ids[: len(found["generated_token_ids"])]
