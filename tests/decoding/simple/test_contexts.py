"""A row that does not fit a context is refused by name, one that fills it ends, others go on."""

from __future__ import annotations

from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding.simple.contexts import context_of
from tiny_models import HEADS, IDS, SIZES, make, make_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPTJConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

SIMPLE = cf.Engine(simple=True)
ENGINES = pytest.mark.parametrize("engine", [None, SIMPLE], ids=["engine", "simple"])
DRAW: dict[str, Any] = {
    "max_new_tokens": 30,
    "do_sample": True,
    "seed": 5,
    "progress": False,
    "eos_token_id": None,
    "pad_token_id": 0,
}
CONTEXT = 24
PROMPTS = [[7, 9, 30], [5 + i for i in range(20)], [8, 9, 11, 12], [5 + i for i in range(40)]]
SHORT = [p for p in PROMPTS if len(p) <= CONTEXT]


def spread(model: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.4)
    return model.eval()


def llama(context: int = CONTEXT, **more: Any) -> PreTrainedModel:
    return spread(
        LlamaForCausalLM(
            LlamaConfig(**SIZES, **HEADS, **IDS, max_position_embeddings=context, **more)
        )
    )


def gpt2(context: int = CONTEXT, kind: Any = GPT2LMHeadModel, **more: Any) -> PreTrainedModel:
    sizes = {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return spread(kind(GPT2Config(**sizes, **IDS, **more, n_positions=context)))


def opt(context: int = CONTEXT) -> PreTrainedModel:
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "ffn_dim": 24}
    config = OPTConfig(
        **sizes,
        **IDS,
        num_attention_heads=2,
        word_embed_proj_dim=16,
        dropout=0.0,
        max_position_embeddings=context,
    )
    return spread(OPTForCausalLM(config))


MODELS = {"llama": llama, "gpt2": gpt2, "opt": opt}


@ENGINES
@pytest.mark.parametrize("shape", list(MODELS))
def test_one_prompt_that_does_not_fit_is_refused_by_name(shape: str, engine: Any) -> None:
    model = MODELS[shape]()
    few = {**DRAW, "max_new_tokens": 4}
    alone = cf.generate(model, SHORT, engine=engine, seed=[5, 5, 5], **_without(few, "seed"))
    with pytest.warns(RuntimeWarning) as told:
        out = cf.generate(model, PROMPTS, engine=engine, seed=[5] * 4, **_without(few, "seed"))
    name = cf.Model(model)._blend().names[0]
    assert [str(w.message) for w in told] == [
        f"request 3 was not decoded: its prompt has 40 tokens for {name}, whose context is 24"
    ]
    assert out.failed.tolist() == [False, False, False, True]
    assert out.ended.all()
    assert out.responses == [*alone.responses, []]


def _without(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in arguments.items() if k != name}


@ENGINES
@pytest.mark.parametrize("shape", list(MODELS))
@pytest.mark.parametrize("more", [{}, {"repetition_penalty": 1.2}, {"max_batch": 2}], ids=str)
def test_a_row_that_fills_the_context_ends(more: Any, shape: str, engine: Any) -> None:
    """The other rows go on to their own ends, each with the tokens that it has alone."""
    model = MODELS[shape]()
    with pytest.warns(RuntimeWarning, match="was ended at its token") as told:
        out = cf.generate(model, SHORT, engine=engine, **{**DRAW, **more})
    name = cf.Model(model)._blend().names[0]
    room = [CONTEXT + 1 - len(p) for p in SHORT]
    assert {str(w.message) for w in told} == {
        f"request {i} was ended at its token {n}: the context of {name}, 24 tokens, is full after "
        f"a prompt of {len(p)}"
        for i, (n, p) in enumerate(zip(room, SHORT, strict=True))
    }
    assert out.lengths.tolist() == room
    assert out.ended.all()
    assert not out.finished.any()
    assert not out.failed.any()
    if shape == "llama":  # A longer context changes nothing else in this model.
        whole = cf.generate(llama(400), SHORT, engine=engine, **{**DRAW, **more})
        assert out.responses == [r[:n] for r, n in zip(whole.responses, room, strict=True)]


@ENGINES
@pytest.mark.parametrize("shape", list(MODELS))
def test_the_last_token_is_the_one_that_generate_gives(shape: str, engine: Any) -> None:
    """As in Hugging Face, prompt and response may fill the context, without the last token."""
    model = MODELS[shape]()
    ids = torch.tensor([SHORT[1]])
    room = CONTEXT + 1 - ids.shape[1]
    theirs = model.generate(ids, attention_mask=ids.ne(0), max_new_tokens=room, do_sample=False)
    ours = cf.generate(
        model, ids, max_new_tokens=room, engine=engine
    )  # It is at its limit, so that there is no warning.
    assert torch.equal(ours.sequences, theirs)
    scores = cf.score(model, ids, ours.responses)
    torch.testing.assert_close(scores.logprobs, ours.logprobs, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"prompts\[0\] and responses\[0\] have 20 and 6 tokens"):
        cf.score(model, ids, [[*ours.responses[0], 7]])


@ENGINES
def test_every_member_has_a_context_of_its_own(engine: Any) -> None:
    """The second term has a longer prompt than the first, and the value the shortest context."""
    base = cf.Model(llama(400))
    guide = cf.Model(gpt2(30), prompt=[[9] * n for n in (20, 31, 3)], name="guide")
    value = cf.ValueHead(gpt2(18), name="value")
    with pytest.warns(RuntimeWarning) as told:
        out = cf.generate(
            base + 0.3 * guide + 0.2 * value, [[5], [6], [7] * 8], engine=engine, **DRAW
        )
    assert sorted(str(w.message) for w in told) == [
        "request 0 was ended at its token 11: the context of guide, 30 tokens, is full after a "
        "prompt of 20",
        "request 1 was not decoded: its prompt has 31 tokens for guide, whose context is 30",
        "request 2 was ended at its token 11: the context of value, 18 tokens, is full after a "
        "prompt of 8",
    ]
    assert out.lengths.tolist() == [11, 0, 11]


@ENGINES
@pytest.mark.filterwarnings("ignore:request:RuntimeWarning")
def test_samples_and_streamers(engine: Any) -> None:
    model = gpt2()
    arguments = {**DRAW, "num_return_sequences": 2, "engine": engine}
    out = cf.generate(model, [PROMPTS[3], PROMPTS[1]], **arguments)
    assert out.lengths.tolist() == [0, 0, 5, 5]
    assert out.failed.tolist() == [True, True, False, False]
    told: list[Any] = []

    class Streamer:
        def put(self, x: torch.Tensor) -> None:
            told.append(x.tolist())

        def end(self) -> None:
            told.append("end")

    again = cf.generate(model, [PROMPTS[3], PROMPTS[1]], streamer=Streamer(), **arguments)
    assert torch.equal(again.sequences, out.sequences)
    prompts, *tokens, end = told
    assert [len(p) for p in prompts] == [40] * 4
    assert torch.equal(torch.tensor(tokens).T[2:], out.sequences[2:, 40:])
    assert end == "end"
    told.clear()
    nothing = cf.generate(model, [PROMPTS[3]] * 2, streamer=Streamer(), **arguments)
    assert nothing.failed.all()
    assert [len(told), told[-1]] == [2, "end"]


@pytest.mark.filterwarnings("ignore:request:RuntimeWarning")
def test_caches_of_rows_that_do_not_fit() -> None:
    """Each row keeps its own place in a cache, and that of a refused row keeps what it held."""
    model = gpt2()
    few = {**DRAW, "max_new_tokens": 3}
    first = cf.generate(model, [[7, 9], [5, 6, 8], [8, 9, 11]], return_cache=True, **few)
    longer = [
        [*p, *r, 12] for p, r in zip([[7, 9], [5, 6, 8], [8, 9, 11]], first.responses, strict=True)
    ]
    out = cf.generate(
        model, [longer[0], PROMPTS[3], longer[2]], cache=first.cache, return_cache=True, **few
    )
    fresh = cf.generate(model, [longer[0], PROMPTS[3], longer[2]], **few)
    assert out.responses == fresh.responses
    assert out.failed.tolist() == [False, True, False]
    for cache in (out.cache, first.cache):
        again = cf.generate(model, longer, cache=cache, **few)
        assert again.responses == cf.generate(model, longer, **few).responses
    reads = cf.generate(model, [p[:2] for p in longer], cache=out.cache, **few)
    assert reads.stats.models[0].tokens == 9, "of each row the prompt's last token, and two new"


@ENGINES
def test_searches(engine: Any) -> None:
    base = llama(400)
    search = cf.ChunkBeamSearch(
        width=2, samples=2, chunk_length=4, value=cf.LogRatio(cf.Model(gpt2()), cf.Model(base))
    )
    with pytest.warns(RuntimeWarning) as told:
        out = cf.generate(
            base, [[7, 9], PROMPTS[3], PROMPTS[1]], search=search, engine=engine, **DRAW
        )
    assert sorted(str(w.message).split(":")[0] for w in told) == [
        "request 0, sample 0 was ended at its token 23",
        "request 1 was not decoded",
        "request 2, sample 0 was ended at its token 5",
    ]
    assert out.lengths.tolist() == [23, 0, 5]
    assert out.values.isfinite().tolist() == [True, False, True]


@ENGINES
@pytest.mark.parametrize("kind", ["gpt2", "roberta"])
def test_a_value_that_reads_texts_of_its_own(kind: str, engine: Any) -> None:
    """A text that the value cannot read has no value, and is kept only if nothing else is left."""
    tokenizer = make_tokenizer()
    if kind == "gpt2":
        judge = gpt2(12, GPT2ForSequenceClassification, num_labels=1)
    else:
        sizes = {
            "vocab_size": 61,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "intermediate_size": 24,
        }
        config = RobertaConfig(
            **sizes, **IDS, num_attention_heads=2, num_labels=1, max_position_embeddings=13
        )
        judge = spread(RobertaForSequenceClassification(config))
        assert context_of(judge) == 12, "positions begin behind the padding's"
    value = cf.RewardModel(judge, tokenizer)
    words = tokenizer.decode([5, 6, 7])
    search = cf.ChunkBeamSearch(width=1, samples=2, chunk_length=4, value=value)
    arguments = {**DRAW, "search": search, "tokenizer": tokenizer, "engine": engine}
    with pytest.warns(RuntimeWarning, match="has no value from its token"):
        out = cf.generate(llama(400), [words, words], **arguments)
    assert out.lengths.tolist() == [30, 30]
    assert out.values.isnan().all()


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
YARN |= {"original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("config", "context"),
    [
        (LlamaConfig(max_position_embeddings=48), 48),
        (GPT2Config(n_positions=33), 33),
        (GPTJConfig(n_positions=34), 34),
        (OPTConfig(max_position_embeddings=35), 35),
        (MptConfig(max_seq_len=36), 36),
        (BloomConfig(), None),
        (FalconConfig(alibi=True), None),
        (FalconConfig(alibi=False, max_position_embeddings=37), 37),
        (
            LlamaConfig(
                max_position_embeddings=48,
                rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            ),
            None,
        ),
        (
            LlamaConfig(
                max_position_embeddings=48,
                rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            ),
            96,
        ),
        (
            LlamaConfig(max_position_embeddings=32, rope_parameters=YARN),
            128,
        ),
        (
            LlamaConfig(max_position_embeddings=128, rope_parameters=YARN),
            128,
        ),
        (
            LlamaConfig(
                max_position_embeddings=256,
                rope_parameters={
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "rope_theta": 1e4,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
            ),
            256,
        ),
    ],
)
def test_what_configs_say(config: Any, context: int | None) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert context_of(model) == context


def test_a_prompt_alone_that_does_not_fit_fails_as_among_others() -> None:
    with pytest.warns(RuntimeWarning, match="request 0 was not decoded: its prompt has 40 tokens"):
        out = cf.generate(make("llama").__class__(llama().config), PROMPTS[3], max_new_tokens=3)
    assert out.failed.tolist() == [True]
    assert out.sequences.shape == (1, 40)


@ENGINES
@pytest.mark.parametrize("limit", [99_999_999_999, 2**63 - 1])
def test_more_tokens_than_memory_holds_are_no_matter_where_a_context_ends_before(
    limit: int, engine: Any
) -> None:
    model = llama()
    found = []
    for most in (limit, 100):
        with pytest.warns(RuntimeWarning, match="is full after a prompt of"):
            out = cf.generate(model, SHORT, engine=engine, **{**DRAW, "max_new_tokens": most})
        found.append(out.responses)
    assert found[0] == found[1]


def test_more_tokens_than_memory_holds_are_said_by_name() -> None:
    model = llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    assert context_of(model) is None
    for limit in (2**50, 2**63 - 1):
        with pytest.raises(MemoryError, match="max_new_tokens must be smaller"):
            cf.generate(model, SHORT, **{**DRAW, "max_new_tokens": limit})
