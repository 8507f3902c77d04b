"""Models whose rows depend on what is beside them: each row is what `model.generate` makes of it.

What they compute for a row depends on the lengths, states or inputs of all rows. So the reference
is `model.generate` of each row alone, whatever batch the rows are decoded in here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import crossfade as cf
import pytest
import torch
from tiny_models import EOS, HEADS, IDS, LONG, PAD, SIZES, UNTIED, VOCAB, make, make_letters
from torch import Tensor
from transformers import (
    BartConfig,
    BartForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    RwkvConfig,
    RwkvForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

CONTEXT = 10  # the tokens past which frequencies change
NEW = 8
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 8.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.5, 4.0, 8.0],
}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
ORIGINAL = {"original_max_position_embeddings": CONTEXT}
SHORT = {"max_position_embeddings": CONTEXT}
# One row stays within the context, one begins in it, and one is past it from the start.
PROMPTS = [[7, 9], [30, 12, 8, 11, 40, 6, 5], [21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32]]


def llama_dynamic() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, **IDS, **SHORT, rope_parameters=DYNAMIC))


def llama_longrope() -> PreTrainedModel:
    rope = {**LONGROPE, **ORIGINAL}
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, **IDS, **LONG, rope_parameters=rope))


def phi3() -> PreTrainedModel:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = Phi3Config(**SIZES, **heads, **IDS, **LONG, **ORIGINAL, rope_parameters=LONGROPE)
    return Phi3ForCausalLM(config)


def gemma3_dynamic() -> PreTrainedModel:
    layers = ["sliding_attention", "full_attention"]
    rope = dict(zip(layers, (PLAIN, DYNAMIC), strict=True))
    config = Gemma3TextConfig(
        **SIZES, **HEADS, **IDS, **SHORT, **UNTIED, layer_types=layers, rope_parameters=rope
    )
    return Gemma3ForCausalLM(config)


def mamba() -> PreTrainedModel:
    config = MambaConfig(vocab_size=VOCAB, hidden_size=16, state_size=4, num_hidden_layers=2, **IDS)
    return MambaForCausalLM(config)


def jamba() -> PreTrainedModel:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4}
    return JambaForCausalLM(JambaConfig(**SIZES, **heads, **IDS, **layers, num_experts=2))


def falcon_h1() -> PreTrainedModel:
    state = {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 4}
    return FalconH1ForCausalLM(FalconH1Config(**SIZES, **HEADS, **IDS, **LONG, **state))


def rwkv() -> PreTrainedModel:
    config = RwkvConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        attention_hidden_size=16,
        num_hidden_layers=2,
        intermediate_size=24,
        **IDS,
    )
    return RwkvForCausalLM(config)


def xlnet() -> PreTrainedModel:
    config = XLNetConfig(vocab_size=VOCAB, d_model=16, n_layer=2, n_head=2, d_inner=24, **IDS)
    return XLNetLMHeadModel(config)


def openai_gpt() -> PreTrainedModel:
    return OpenAIGPTLMHeadModel(
        OpenAIGPTConfig(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, **UNTIED)
    )


def bart() -> PreTrainedModel:
    """A model that counts padding among its positions, and takes no positions from outside."""
    config = BartConfig(
        vocab_size=VOCAB,
        d_model=16,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=24,
        is_decoder=True,
        is_encoder_decoder=False,
        **IDS,
        **UNTIED,
    )
    return BartForCausalLM(config)


FREQUENCIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama, dynamic": llama_dynamic,
    "llama, longrope": llama_longrope,
    "phi3": phi3,
    "gemma3, dynamic in some layers": gemma3_dynamic,
}
STATES: dict[str, Callable[[], PreTrainedModel]] = {
    "mamba": mamba,
    "jamba": jamba,
    "falcon_h1": falcon_h1,
    "rwkv": rwkv,
}
INPUTS: dict[str, Callable[[], PreTrainedModel]] = {
    "xlnet": xlnet,
    "openai-gpt": openai_gpt,
    "bart": bart,
}
EVERY = {**FREQUENCIES, **STATES, **INPUTS}


def perturbed(shape: str, seed: int = 0) -> Any:
    """A random model, in which every parameter changes something."""
    torch.manual_seed(seed)
    model: Any = EVERY[shape]().eval()
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape)
        embeds = any(x in name for x in ("embed", "lm_head", "lm_loss", "head."))
        p.data = noise * (0.6 if embeds else 0.3) if p.dim() > 1 else p.data + 0.3 * noise
    model.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=EOS)
    return model


def alone(model: Any, prompt: Sequence[int], response: Sequence[int] | None = None) -> Any:
    """The greedy tokens of one row, or a response forced on it, and their log-probs."""
    steps = iter(response or ())
    model = copy.deepcopy(model)  # Dynamic frequencies remember the longest text before.

    def forced(ids: Tensor, scores: Tensor) -> Tensor:
        if response is None:
            return scores
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([next(steps)]), 0.0)

    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=NEW if response is None else len(response),
        output_logits=True,
        return_dict_in_generate=True,
        logits_processor=[forced],
    )
    tokens = out.sequences[0, len(prompt) :]
    log_p = torch.stack([z[0] for z in out.logits]).log_softmax(-1)
    return tokens.tolist(), log_p.gather(1, tokens[:, None])[:, 0]


def close(logprobs: Tensor, expected: Sequence[Tensor]) -> None:
    for row, theirs in zip(logprobs, expected, strict=True):
        torch.testing.assert_close(row[: len(theirs)], theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", EVERY)
def test_each_row_is_what_generate_makes_of_it_alone(shape: str) -> None:
    model = perturbed(shape)
    theirs = [alone(model, p) for p in PROMPTS]
    out = cf.generate(model, PROMPTS, max_new_tokens=NEW)
    assert out.responses == [tokens for tokens, _ in theirs]
    close(out.logprobs, [log_p for _, log_p in theirs])
    assert out.stats.notes[0].startswith("the simple path: ")
    assert len({t for tokens, _ in theirs for t in tokens}) > 3


@pytest.mark.parametrize("shape", EVERY)
def test_scores_are_those_of_what_was_written(shape: str) -> None:
    model = perturbed(shape)
    texts = [[20, 33, 9, 41, 5, 17][: 6 - i] for i in range(len(PROMPTS))]
    scores = cf.score(model, PROMPTS, texts)
    close(scores.logprobs, [alone(model, p, t)[1] for p, t in zip(PROMPTS, texts, strict=True)])


@pytest.mark.parametrize("shape", EVERY)
def test_samples_of_a_search_go_on_from_their_parents(shape: str) -> None:
    """Every fork has its own state: what it wrote has the log-probs of its own text."""
    model, letters = perturbed(shape), make_letters()
    value = cf.Reward(lambda prompts, texts: [float(t.count("a") + len(t)) for t in texts])
    search = cf.ChunkBeamSearch(width=2, samples=2, chunk_length=2, value=value)
    out = cf.generate(
        model, PROMPTS, tokenizer=letters, search=search, max_new_tokens=NEW, seed=3, top_k=0
    )
    each = zip(PROMPTS, out.responses, strict=True)
    close(out.logprobs, [alone(model, prompt, response)[1] for prompt, response in each])


@pytest.mark.parametrize("shape", ["llama, dynamic", "mamba", "xlnet"])
def test_samples_of_a_request(shape: str) -> None:
    model = perturbed(shape)
    draw: dict[str, Any] = {"do_sample": True, "seed": 4, "max_new_tokens": NEW}
    out = cf.generate(model, PROMPTS, num_return_sequences=2, **draw)
    each = zip([p for p in PROMPTS for _ in range(2)], out.responses, strict=True)
    close(out.logprobs, [alone(model, prompt, response)[1] for prompt, response in each])
    assert len(set(map(tuple, out.responses))) > len(PROMPTS)


@pytest.mark.parametrize("shape", ["phi3", "mamba", "rwkv", "xlnet", "bart"])
def test_from_inside_generate(shape: str) -> None:
    model = perturbed(shape)
    blend: dict[str, Any] = {"custom_generate": cf.decode, "blend": cf.Model(model)}
    out = model.generate(torch.tensor(PROMPTS[1:2]), max_new_tokens=NEW, **blend)
    assert out[0, len(PROMPTS[1]) :].tolist() == alone(model, PROMPTS[1])[0]


def test_a_state_from_outside_is_refused() -> None:
    model = perturbed("mamba")
    ids = torch.tensor(PROMPTS[:1])
    state = model(ids, use_cache=True).cache_params
    blend: dict[str, Any] = {"custom_generate": cf.decode, "blend": cf.Model(model)}
    with pytest.raises(NotImplementedError, match="cache_params is not supported"):
        model.generate(ids, max_new_tokens=NEW, cache_params=state, **blend)


def test_terms_beside_them_are_as_ever() -> None:
    """Each term is run in its own way, and the logits of all are blended as ever."""
    models = [perturbed("phi3"), make("llama", 1), perturbed("mamba")]
    base, plain, state = map(cf.Model, models)
    out = cf.generate(base + 0.5 * (plain - state), PROMPTS, max_new_tokens=NEW)
    for i, (prompt, response) in enumerate(zip(PROMPTS, out.responses, strict=True)):
        z = [logits(m, prompt, response) for m in models]
        log_p = (z[0] + 0.5 * (z[1] - z[2])).log_softmax(-1)
        tokens = torch.tensor(response)[:, None]
        torch.testing.assert_close(
            out.logprobs[i, : len(response)], log_p.gather(1, tokens)[:, 0], atol=1e-4, rtol=1e-4
        )


def logits(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    steps = iter(response)
    out = copy.deepcopy(model).generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=len(response),
        output_logits=True,
        return_dict_in_generate=True,
        logits_processor=[
            lambda ids, z: torch.full_like(z, -torch.inf).index_fill(
                1, torch.tensor([next(steps)]), 0.0
            )
        ],
    )
    return torch.stack([z[0] for z in out.logits]).log_softmax(-1)


@pytest.mark.parametrize("shape", FREQUENCIES)
def test_within_the_original_context_the_engine_runs_them(shape: str) -> None:
    model, prompts = perturbed(shape), [p[:3] for p in PROMPTS]
    out = cf.generate(model, prompts, max_new_tokens=CONTEXT - 3)
    assert not out.stats.notes
    theirs = [alone(model, p)[0][: CONTEXT - 3] for p in prompts]
    assert out.responses == theirs
    past = cf.generate(model, prompts, max_new_tokens=CONTEXT)
    why = f"model0's RoPE frequencies change past {CONTEXT} tokens with the longest row"
    assert past.stats.notes == (f"the simple path: {why}",)


def test_frequencies_of_a_model_are_left_as_they_were() -> None:
    """What ran before changes nothing of what is written, and decoding leaves nothing behind."""
    model = perturbed("llama, dynamic")
    theirs = [alone(model, p)[0] for p in PROMPTS]
    model(torch.full((1, 40), 5))
    rotary = model.model.rotary_emb
    found = int(rotary.max_seq_len_cached), rotary.inv_freq.clone()
    assert cf.generate(model, PROMPTS, max_new_tokens=NEW).responses == theirs
    assert int(rotary.max_seq_len_cached) == found[0]
    assert torch.equal(rotary.inv_freq, found[1])


@pytest.mark.parametrize("shape", ["phi3", "mamba"])
def test_values_that_they_give(shape: str) -> None:
    """A log-ratio of two such models is the difference of the log-probs of the whole response."""
    base, tuned, ref = make("llama"), perturbed(shape, 1), perturbed(shape, 2)
    search = cf.BestOfN(2, value=cf.LogRatio(cf.Model(tuned), cf.Model(ref)))
    out = cf.generate(base, PROMPTS, search=search, max_new_tokens=NEW, seed=1)
    for i, (prompt, response) in enumerate(zip(PROMPTS, out.responses, strict=True)):
        a, b = (alone(m, prompt, response)[1].sum() for m in (tuned, ref))
        assert out.values is not None
        torch.testing.assert_close(out.values[i], a - b, atol=1e-3, rtol=1e-3)
