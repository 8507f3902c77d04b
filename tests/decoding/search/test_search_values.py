"""What each kind of value sees of the rows of a search."""

from __future__ import annotations

from typing import Any

import crossfade as cf
import pytest
import torch
from search_cases import DRAW, PROMPTS, SIMPLE, TEXTS
from tiny_models import SHAPES, VOCAB, make
from transformers import PreTrainedModel, PreTrainedTokenizerFast

# PEFT asks for an attribute that this version of Transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def with_outputs(kind: Any, shape: str, labels: int, seed: int) -> PreTrainedModel:
    """A sequence or token classifier of the tiny models' shapes."""
    config = make(shape).config
    config.num_labels = labels
    torch.manual_seed(seed)
    model = kind.from_config(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.4)
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_q_heads(shape: str) -> None:
    base, q = make(shape, 0), make(shape, 1)
    out = cf.generate(base, PROMPTS, search=cf.ChunkBeamSearch(2, 3, 4, cf.ValueHead(q)), **DRAW)
    for i, (prompt, response) in enumerate(zip(PROMPTS, out.responses, strict=True)):
        value = q(torch.tensor([prompt + response])).logits[0, -2, response[-1]]
        torch.testing.assert_close(out.values[i], value.detach(), atol=1e-4, rtol=1e-4)
    assert not out.stats.notes


@pytest.mark.parametrize("shape", ["llama", "qwen3", "gpt2"])
def test_scalar_heads(shape: str) -> None:
    from transformers import AutoModelForTokenClassification

    head = with_outputs(AutoModelForTokenClassification, shape, 1, 3)
    search = cf.ChunkBeamSearch(2, 3, 4, 2 * cf.ValueHead(head))
    out = cf.generate(make(shape), PROMPTS, search=search, **DRAW)
    simple = cf.generate(make(shape), PROMPTS, search=search, engine=SIMPLE, **DRAW)
    assert torch.equal(out.sequences, simple.sequences)
    for i, (prompt, response) in enumerate(zip(PROMPTS, out.responses, strict=True)):
        value = 2 * head(torch.tensor([prompt + response])).logits[0, -1, 0]
        torch.testing.assert_close(out.values[i], value.detach(), atol=1e-4, rtol=1e-4)
    assert not out.stats.notes


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_reward_models_keep_a_cache(
    shape: str, labels: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    from transformers import AutoModelForSequenceClassification

    judge = with_outputs(AutoModelForSequenceClassification, shape, labels, 3)
    value = cf.RewardModel(judge, tokenizer, label=None if labels == 1 else 2)
    base = cf.Model(make("llama"), tokenizer=tokenizer)
    search = cf.ChunkBeamSearch(2, 3, 4, value)
    out = cf.generate(base, TEXTS, search=search, **DRAW)
    simple = cf.generate(base, TEXTS, search=search, engine=SIMPLE, **DRAW)
    assert torch.equal(out.sequences, simple.sequences)
    assert not out.stats.notes
    assert out.stats.models[-1].tokens < 0.6 * simple.stats.models[-1].tokens
    for i, (prompt, text) in enumerate(zip(TEXTS, out.text, strict=True)):
        z = judge(**tokenizer(prompt + text, return_tensors="pt")).logits[0].detach()
        wanted = z[0] if labels == 1 else z.log_softmax(-1)[2]
        torch.testing.assert_close(out.values[i], wanted, atol=1e-4, rtol=1e-4)


def test_encoders_read_whole_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(2)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=VOCAB, intermediate_size=16, num_labels=1, pad_token_id=0, **sizes
    )
    judge = BertForSequenceClassification(config).eval()
    base = cf.Model(make("llama"), tokenizer=tokenizer)
    search = cf.ChunkBeamSearch(2, 2, 4, cf.RewardModel(judge, tokenizer))
    out = cf.generate(base, TEXTS, search=search, **DRAW)
    assert "read whole texts" in out.stats.notes[0]
    for i, (prompt, text) in enumerate(zip(TEXTS, out.text, strict=True)):
        z = judge(**tokenizer(prompt + text, return_tensors="pt")).logits[0, 0].detach()
        torch.testing.assert_close(out.values[i], z, atol=1e-4, rtol=1e-4)


def test_a_reward_model_reads_chats(tokenizer: PreTrainedTokenizerFast) -> None:
    from transformers import AutoModelForSequenceClassification

    judge = with_outputs(AutoModelForSequenceClassification, "qwen3", 1, 3)
    base = cf.Model(make("llama"), tokenizer=tokenizer)
    chats = [
        [{"role": "user", "content": "the plot"}],
        [{"role": "user", "content": "a film"}, {"role": "assistant", "content": "was very"}],
    ]
    search = cf.ChunkBeamSearch(2, 2, 4, cf.RewardModel(judge, tokenizer))
    out = cf.generate(base, chats, search=search, **DRAW)
    whole = [
        [*chats[0], {"role": "assistant", "content": out.text[0]}],
        [chats[1][0], {"role": "assistant", "content": "was very" + out.text[1]}],
    ]
    for i, chat in enumerate(whole):
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        z = judge(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, 0]
        torch.testing.assert_close(out.values[i], z.detach(), atol=1e-4, rtol=1e-4)
    shouted = cf.RewardModel(judge, tokenizer, template=lambda p, r: f"great {r}")
    out = cf.generate(base, chats, search=cf.BestOfN(3, shouted), **DRAW)
    z = judge(**tokenizer("great " + out.text[0], return_tensors="pt")).logits[0, 0]
    torch.testing.assert_close(out.values[0], z.detach(), atol=1e-4, rtol=1e-4)


def test_a_reward_model_reads_the_response_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    """Before a response there is no text then; and one without words has no value."""
    from transformers import AutoModelForSequenceClassification

    judge = with_outputs(AutoModelForSequenceClassification, "qwen3", 1, 3)
    base = cf.Model(make("llama"), tokenizer=tokenizer)
    value = cf.RewardModel(judge, tokenizer, template=lambda p, r: r.replace("w2", "").strip())
    search = cf.ChunkBeamSearch(2, 2, 1, value)
    out = cf.generate(base, TEXTS, search=search, num_return_sequences=2, **DRAW)
    plain = cf.generate(base, TEXTS, search=search, num_return_sequences=2, engine=SIMPLE, **DRAW)
    assert out.responses == plain.responses
    for i, text in enumerate(out.text):
        read = value.template("", text)
        z = judge(**tokenizer(read, return_tensors="pt")).logits[0, 0].detach()
        torch.testing.assert_close(out.values.flatten()[i], z, atol=1e-4, rtol=1e-4)
    nothing = cf.RewardModel(judge, tokenizer, template=lambda p, r: "")
    for engine in (None, SIMPLE):
        out = cf.generate(
            base,
            TEXTS,
            search=cf.BestOfN(2, nothing),
            max_new_tokens=2,
            do_sample=True,
            engine=engine,
        )
        assert out.values.isnan().all()


def test_functions_see_what_grew(tokenizer: PreTrainedTokenizerFast) -> None:
    calls: list[tuple[list[Any], list[str]]] = []

    def great(prompts: list[Any], responses: list[str]) -> list[float]:
        calls.append((prompts, responses))
        return [r.count("w2") - 0.1 * len(p) for p, r in zip(prompts, responses, strict=True)]

    base = cf.Model(make("llama"), tokenizer=tokenizer)
    search = cf.ChunkBeamSearch(2, 2, 5, cf.Reward(great))
    out = cf.generate(base, TEXTS, search=search, **DRAW)
    wanted = [r.count("w2") - 0.1 * len(p) for p, r in zip(TEXTS, out.text, strict=True)]
    torch.testing.assert_close(out.values, torch.tensor(wanted))
    assert calls[0][0] == [p for p in TEXTS for _ in range(4)]
    assert all(len(p) == len(r) for p, r in calls)
    assert search.value.names == ("great",)
