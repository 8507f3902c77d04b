"""Value heads ride on the rows of a model over the same backbone: no forward but that model's.

The truth is the path of two forwards, where each model has one of its own.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding.loop import Loop
from crossfade.models.value_heads import value_head, value_model
from crossfade.training import load_value_head, save_value_head
from tiny_models import EOS, SHAPES, VOCAB, lora, make, make_letters, make_tokenizer, spread
from torch import nn
from transformers import PreTrainedTokenizerFast

# PEFT asks for an attribute that this version of Transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

APART = cf.Engine(share_weights=False)
PROMPTS = [[7, 9, 30, 12, 8], [40, 41], [11, 12, 13, 14, 15, 16, 17], [33, 6]]
SEARCH = {"width": 2, "samples": 3, "chunk_length": 4}
DRAW: dict[str, Any] = {
    "max_new_tokens": 11,
    "do_sample": True,
    "temperature": 1.2,
    "seed": 5,
    "eos_token_id": [EOS, *range(20, 27)],
}
KINDS: dict[str, tuple[str, int | None]] = {
    "full": ("q", None),
    "low rank": ("q", 3),
    "scalar": ("scalar", None),
}


def head_over(base: Any, kind: str, seed: int = 0) -> Any:
    """A value model whose numbers are large enough to matter."""
    model = value_model(base, KINDS[kind][0], rank=KINDS[kind][1])
    spread(value_head(model), seed)
    return model.eval()


def heads_over(base: Any) -> Any:
    """A sum of three kinds of heads, a value."""
    full, low, scalar = (cf.ValueHead(head_over(base, k, i)) for i, k in enumerate(KINDS))
    return full + 0.5 * low - scalar


def both(blend: Any, inputs: Any = PROMPTS, fewer: bool = True, **settings: Any) -> cf.Output:
    """The output, which is checked against that of models which have forwards of their own."""
    given = {**DRAW, **settings}
    ours = cf.generate(blend, inputs, **given)
    theirs = cf.generate(blend, inputs, **{**given, "engine": APART})
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-4, rtol=1e-4)
    if ours.values is not None:
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.value_parts, theirs.value_parts, atol=1e-4, rtol=1e-4)
    assert fewer == (count(ours) < count(theirs))
    return ours


def count(out: cf.Output) -> int:
    return sum(m.forwards for m in out.stats.models)


def only(out: cf.Output) -> Any:
    """What the one model did that ran."""
    assert not out.stats.notes
    (found,) = out.stats.models
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_heads_in_a_blend_take_no_forward(shape: str) -> None:
    """A full head and one of low rank, of which each request has its own weights."""
    base = make(shape)
    one, two = head_over(base, "full"), head_over(base, "low rank", 1)
    blend = cf.Model(base) + torch.tensor([0.0, 0.5, 1.0, -1.0]) * cf.ValueHead(one)
    blend = blend + 0.7 * cf.ValueHead(two)
    out = both(blend)
    assert only(out).names == ("model0", "value0", "value1")
    assert only(out).forwards == 1 + out.lengths.max()  # the prompts, and a forward a token
    ids = torch.tensor(PROMPTS[:1])  # This request counts the full head for nothing.
    z, q = (m(ids, attention_mask=torch.ones_like(ids)).logits[0, -1] for m in (base, two))
    expected = (z + 0.7 * q).log_softmax(-1)[out.responses[0][0]].detach()
    torch.testing.assert_close(out.logprobs[0, 0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_search_takes_no_forward_for_its_value(shape: str, kind: str) -> None:
    """Rows fork and end before others. A scalar head has the last tokens read in the end."""
    base = make(shape)
    model = head_over(base, kind)
    search = cf.ChunkBeamSearch(**SEARCH, value=cf.ValueHead(model))
    out = both(base, search=search, num_return_sequences=2)
    assert out.finished.any(), "some rows end"
    assert len(out.lengths.unique()) > 1, "not all at the same time"
    assert only(out).forwards <= DRAW["max_new_tokens"] + 1 + (kind == "scalar")
    assert only(out).names == ("model0", "value")
    for i, prompt in enumerate(PROMPTS):
        response = out.responses[2 * i]
        z = model(torch.tensor([[*prompt, *response]])).logits[0].detach()
        expected = z[-1, 0] if kind == "scalar" else z[-2, response[-1]]
        torch.testing.assert_close(out.values[i, 0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk_length", [1, 3, None])
def test_several_heads_of_rows_that_join(chunk_length: int | None) -> None:
    """Groups take each other's places, at chunks of a token, of a few and of whole texts."""
    base = make("qwen3")
    search = cf.ChunkBeamSearch(2, 2, chunk_length, heads_over(base))
    out = both(base, search=search, max_batch=8, max_new_tokens=[9, 4, 11, 6])
    assert len(only(out).names) == 4


def test_heads_ride_beside_log_ratios_of_terms() -> None:
    """The implicit value of the blend's own terms, and explicit ones: integrated value guidance."""
    base, tuned = make("llama"), make("llama", 1)
    terms = cf.Model(base, name="base"), cf.Model(tuned, name="tuned")
    q = cf.ValueHead(head_over(base, "full"))
    value = cf.LogRatio(terms[1], terms[0]) + q + cf.ValueHead(head_over(tuned, "scalar", 1))
    blend = terms[0] + 0.3 * (terms[1] - terms[0]) + 0.2 * q
    out = both(blend, search=cf.ChunkBeamSearch(**SEARCH, value=value))
    assert len(out.stats.models) == 2, "each backbone runs once a token"


def test_heads_of_another_backbone_share_its_forward() -> None:
    """They are not over the policy's backbone: it reads a chunk at a time, for all of them."""
    base, other = make("llama"), make("llama", 1)
    one, two = (cf.ValueHead(head_over(other, kind)) for kind in ("full", "low rank"))
    out = both(base, search=cf.ChunkBeamSearch(**SEARCH, value=one - two))
    policy, values = out.stats.models
    assert len(values.names) == 2
    assert values.forwards < policy.forwards / 2
    blend = cf.Model(base) + 0.4 * one + 0.3 * two
    assert [len(m.names) for m in both(blend).stats.models] == [1, 2]
    drawn = cf.generate(blend, PROMPTS, **DRAW)
    found = cf.score(blend, PROMPTS * 2, drawn.responses * 2)
    torch.testing.assert_close(found.logprobs[:4], drawn.logprobs, atol=1e-4, rtol=1e-4)
    assert [len(m.names) for m in found.stats.models] == [1, 2]


@pytest.mark.parametrize("kind", ["low rank", "scalar"])
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_heads_with_adapters_are_rows(shape: str, kind: str, tmp_path: Path) -> None:
    """The head's own adapter has the name of another one, which the policy applies."""
    pytest.importorskip("peft")
    modules = ["c_attn", "c_fc"] if shape == "gpt2" else ["q_proj", "down_proj"]
    options = {"fan_in_fan_out": shape == "gpt2"}
    base = make(shape)
    value = head_over(base, kind)
    with_adapter = lora(3, value, "default", 3, modules, **options).eval()
    save_value_head(with_adapter, tmp_path)
    loaded = load_value_head(tmp_path, base)
    plain = head_over(base, "full", 2)
    policy = lora(4, base, "default", 2, modules, **options).eval()
    searched = cf.ValueHead(loaded) + 0.5 * cf.ValueHead(plain)
    for term in (cf.Model(policy, adapter=None), cf.Model(policy, adapter="default")):
        search = cf.ChunkBeamSearch(**SEARCH, value=searched)
        out = both(term, PROMPTS[:2], search=search)
        assert len(out.stats.models) == 1
        if kind == "low rank":
            blend = term + 0.5 * cf.ValueHead(loaded) + cf.ValueHead(plain)
            assert len(both(blend, PROMPTS[:2]).stats.models) == 1


def test_caches_serve_heads_too() -> None:
    base = make("qwen3")
    q = cf.ValueHead(head_over(base, "full"))
    search = cf.ChunkBeamSearch(**SEARCH, value=heads_over(base))
    blend = cf.Model(base) + 0.5 * q
    first = cf.generate(blend, PROMPTS, search=search, return_cache=True, **DRAW)
    longer = [[*p, *r, 9] for p, r in zip(PROMPTS, first.responses, strict=True)]
    on = cf.generate(blend, longer, search=search, cache=first.cache, **DRAW)
    anew = both(blend, longer, search=search)
    assert torch.equal(on.sequences, anew.sequences)
    torch.testing.assert_close(on.values, anew.values, atol=1e-4, rtol=1e-4)
    assert on.stats.models[0].tokens < anew.stats.models[0].tokens


def test_a_term_with_a_prompt_of_its_own_has_other_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    """A value reads the request as it is. In a blend these are rows of the same forward."""
    base = make("llama")
    q = cf.ValueHead(head_over(base, "full"), tokenizer=tokenizer)
    term = cf.Model(base, tokenizer=tokenizer, system="very dull")
    chats = [[{"role": "user", "content": "the film"}]] * 2
    assert len(both(term + q, chats).stats.models) == 1
    search = cf.ChunkBeamSearch(**SEARCH, value=q)
    assert len(both(term, chats, fewer=False, search=search).stats.models) == 2
    alike = cf.Model(base, tokenizer=make_tokenizer())  # another object, which encodes the same
    assert only(both(alike, chats, search=search)).names == ("model0", "value")


def test_boundaries_where_a_text_says_so() -> None:
    """Chunks end at words, rows at stop strings: groups are at their boundaries at any time."""
    base = make("llama")
    search = cf.ChunkBeamSearch(
        2, 2, 5, heads_over(base), chunk_end=lambda text: text.endswith(("a", "e", "n"))
    )
    term = cf.Model(base, tokenizer=make_letters())
    out = both(term, search=search, eos_token_id=None, stop_strings=["d", "th"])
    assert len(only(out).names) == 4


def test_rows_that_are_cut_have_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is up in the middle of a chunk: the last tokens are read for the scalar head alone."""
    base = make("llama")
    model = head_over(base, "scalar")
    looks, own = iter(range(99)), Loop._look

    def look(self: Loop, logits: Any) -> None:
        if next(looks) == 5:
            monkeypatch.setattr(time, "time", lambda: float("inf"))
        own(self, logits)

    monkeypatch.setattr(Loop, "_look", look)
    search = cf.ChunkBeamSearch(**SEARCH, value=cf.ValueHead(model))
    settings = {**DRAW, "eos_token_id": None}
    out = cf.generate(base, PROMPTS, search=search, max_time=1e9, **settings)
    assert out.lengths.tolist() == [6] * len(PROMPTS)
    assert only(out).forwards == 8
    for i, prompt in enumerate(PROMPTS):
        z = model(torch.tensor([[*prompt, *out.responses[i]]])).logits[0, -1, 0].detach()
        torch.testing.assert_close(out.values[i], z, atol=1e-4, rtol=1e-4)


def test_a_tournament_by_a_head() -> None:
    base = make("llama")
    out = both(base, search=cf.Tournament(heads_over(base), n=3))
    assert len(only(out).names) == 4


def test_processors_see_every_step() -> None:
    """With them all rows are at one step, so that a scalar head reads chunks by itself."""
    base = make("llama")
    q, scalar = (cf.ValueHead(head_over(base, kind)) for kind in ("full", "scalar"))
    search = cf.ChunkBeamSearch(**SEARCH, value=q + scalar)
    out = both(base, search=search, repetition_penalty=1.3)
    assert [m.names for m in out.stats.models] == [("model0", "value"), ("value_2",)]


def changed(base: Any) -> dict[str, Any]:
    """Value models that are not, or not only, heads over the very backbone of `base`."""
    found = {name: head_over(base, "full") for name in ("weights", "config", "hook")}
    with torch.no_grad():
        norm = found["weights"].base_model.norm
        norm.weight = nn.Parameter(norm.weight.clone())
    found["config"].config.rms_norm_eps = 0.3
    for module in found["config"].modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.3
    found["hook"].base_model.norm.register_forward_hook(lambda module, args, out: 2 * out)
    return found


@pytest.mark.parametrize("what", ["weights", "config", "hook"])
def test_other_backbones_have_forwards_of_their_own(what: str) -> None:
    base = make("llama")
    model = changed(base)[what]
    out = cf.generate(base, PROMPTS, search=cf.BestOfN(3, cf.ValueHead(model)), **DRAW)
    assert len(out.stats.models) == 2
    for i, prompt in enumerate(PROMPTS):
        response = out.responses[i]
        z = model(torch.tensor([[*prompt, *response]])).logits[0, -2, response[-1]].detach()
        torch.testing.assert_close(out.values[i], z, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (nn.Linear(7, VOCAB), "the head of value0? reads 7 numbers; it must read 16"),
        (nn.Linear(16, 30), "the head of value0? gives 30 numbers; it must give 61"),
    ],
)
def test_heads_of_another_width(head: nn.Module, message: str) -> None:
    base = make("llama")
    model = value_model(base)
    model.set_output_embeddings(head)
    with pytest.raises(ValueError, match=message):
        cf.generate(base, PROMPTS, search=cf.BestOfN(2, cf.ValueHead(model)), **DRAW)
    with pytest.raises(ValueError, match=message):
        cf.generate(cf.Model(base) + cf.ValueHead(model), PROMPTS, **DRAW)
