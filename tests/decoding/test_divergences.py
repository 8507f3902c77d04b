"""Divergences from a reference at every step: `kl_to`, against float64 by hand."""

from __future__ import annotations

import json
import warnings
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.blends.blend import as_blend
from crossfade.ops import Support
from tiny_models import VOCAB, lora, make, make_tokenizer
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

PROMPTS = [[5, 9, 13, 7], [11, 6]]
ENGINES = [cf.Engine(), cf.Engine(simple=True)]
each_engine = pytest.mark.parametrize("engine", ENGINES, ids=["engine", "simple"])


@pytest.fixture(scope="module")
def members() -> dict[str, Any]:
    """Blends are made of p and h, and of none of the others; x and y share the weights of p."""
    p, h, other, q = make("llama", 0), make("gpt2", 1), make("qwen3", 2), make("llama", 3)
    adapted = lora(5, lora(4, make("llama", 0), "x"), "y")
    return {
        "p": cf.Model(p, name="p"),
        "h": cf.Model(h, name="h"),
        "other": cf.Model(other, name="other"),
        "prompted": cf.Model(p, prompt=[[8, 21], [30, 9, 4]], name="prompted"),
        "x": cf.Model(adapted, adapter="x", name="x"),
        "y": cf.Model(adapted, adapter="y", name="y"),
        "plain": cf.Model(adapted, adapter=None, name="plain"),
        "q": cf.ValueHead(q, name="q"),
    }


def by_hand(blend: Any, request: int, written: list[int]) -> Tensor:
    """``[V]`` float64: the blend's next token, by each model's own forward and the formulas."""
    blend = as_blend(blend)

    def logits(member: Any) -> Tensor:
        prompts = getattr(member, "prompt", None) or PROMPTS
        ids = torch.tensor([prompts[request] + written])
        adapter = getattr(member, "adapter", "active")
        if adapter not in ("active", None):
            member.model.set_adapter(adapter)
        with torch.no_grad():
            if adapter is None:
                with member.model.disable_adapter():
                    return member.model(ids).logits[0, -1].double()
            return member.model(ids).logits[0, -1].double()

    def number(w: Any) -> Any:
        return w[request].double() if isinstance(w, Tensor) else w

    p = torch.stack([logits(t).log_softmax(-1) for t in blend.terms])
    w = torch.tensor([number(x) for x in blend.weights], dtype=torch.float64)[:, None]
    if blend.power == 0:
        mixed = torch.where(w == 0, 0.0, w * p).sum(0)
    else:
        mixed = (w.log() + blend.power * p).logsumexp(0) / blend.power
    for value, weight in zip(blend.values, blend.value_weights, strict=True):
        mixed = mixed + number(weight) * logits(value)
    if (s := blend.support) is not None:
        own = p[s.term]
        if s.top_k:
            mixed = mixed.masked_fill(own < own.topk(s.top_k).values[-1], -torch.inf)
        mixed = mixed.masked_fill(own.exp() < s.min_p * own.exp().max(), -torch.inf)
    return mixed.log_softmax(-1)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    ratio = torch.where(p == -torch.inf, 0.0, p - q)
    return torch.where(ratio == torch.inf, torch.inf, p.exp() * ratio).sum()


def check(kl: Tensor | None, responses: list[list[int]], blend: Any, reference: Any) -> None:
    """Compare every entry of `kl`; the rows of a request are its samples."""
    assert kl is not None
    copies = len(responses) // len(PROMPTS)
    for row, response in enumerate(responses):
        for t in range(len(response)):
            at = row // copies, response[:t]
            expected = divergence(by_hand(blend, *at), by_hand(reference, *at))
            torch.testing.assert_close(kl[row, t].double(), expected, atol=2e-5, rtol=2e-5)
        assert (kl[row, len(response) :] == 0).all()
    assert (kl >= 0).all()


REFERENCES = {
    "a term that is not the first": lambda m: m["h"],
    "a model that is not in the blend": lambda m: m["other"],
    "a bare model": lambda m: m["other"].model,
    "a prompt of its own": lambda m: m["prompted"],
    "a blend": lambda m: 0.5 * m["other"] + 0.4 * m["p"] - 0.2 * m["h"],
    "weights a request": lambda m: torch.tensor([0.2, 1.5]) * m["h"] + 0.5 * m["prompted"],
    "a power mean": lambda m: cf.power_mean([m["other"], m["p"]], [0.3, 0.7], r=-1.0),
    "a mixture with weights a request": lambda m: cf.power_mean(
        [m["other"], m["h"]], [torch.tensor([0.3, 0.9]), torch.tensor([0.7, 0.1])], r=1.0
    ),
    "a value": lambda m: m["h"] + 0.5 * m["q"],
    "a support, which excludes": lambda m: (m["p"] + m["h"]).within(Support(term=0, top_k=9)),
    "adapters of one model": lambda m: 0.6 * m["x"] + 0.6 * m["y"] - 0.2 * m["plain"],
}


@each_engine
@pytest.mark.parametrize("which", REFERENCES)
def test_divergence_from(which: str, engine: cf.Engine, members: dict[str, Any]) -> None:
    blend = 0.4 * members["p"] + 0.6 * members["h"] + 0.0 * members["other"]
    reference = REFERENCES[which](members)
    arguments: dict[str, Any] = {"max_new_tokens": 3, "do_sample": True, "seed": 3}
    out = cf.generate(blend, PROMPTS, engine=engine, kl_to=reference, **arguments)
    if isinstance(reference, torch.nn.Module):
        reference = cf.Model(reference)
    check(out.kl, out.responses, blend, reference)
    infinite = which == "a support, which excludes"
    assert bool(out.kl.isinf().any()) == infinite
    assert out.kl_to_base is None
    without = cf.generate(blend, PROMPTS, engine=engine, **arguments)
    assert torch.equal(without.sequences, out.sequences)
    # A reference may be further rows of a forward, which then rounds otherwise on some processors.
    torch.testing.assert_close(without.logprobs, out.logprobs, atol=1e-5, rtol=1e-5)
    assert without.kl is None


BLENDS = {
    "a support": lambda m: (m["p"] + m["x"]).within(Support(term=0, min_p=0.2)) + 0.3 * m["q"],
    "a power mean": lambda m: cf.power_mean([m["x"], m["y"]], [0.5, 0.5], r=0.5),
    "weights a request": lambda m: torch.tensor([0.5, 2.0]) * m["plain"] + 0.5 * m["h"],
    "a shared head": lambda m: 0.5 * m["x"] + 0.5 * m["y"],
    "a first term of weight 0": lambda m: 0 * m["other"] + m["p"] + 0.5 * (m["h"] - m["p"]),
}


@each_engine
@pytest.mark.parametrize("which", BLENDS)
def test_divergence_of(which: str, engine: cf.Engine, members: dict[str, Any]) -> None:
    """There are several samples, and `return_kl_to_base` is asked for beside `kl_to`."""
    blend, reference = BLENDS[which](members), 0.5 * members["p"] + members["y"]
    out = cf.generate(
        blend,
        PROMPTS,
        engine=engine,
        kl_to=reference,
        return_kl_to_base=True,
        num_return_sequences=2,
        max_new_tokens=3,
        do_sample=True,
        seed=3,
        return_term_logprobs=True,
    )
    assert out.term_logprobs.shape[-1] == len(blend.terms)
    check(out.kl, out.responses, blend, reference)
    check(out.kl_to_base, out.responses, blend, blend.terms[0])


@each_engine
def test_in_a_search(engine: cf.Engine, members: dict[str, Any]) -> None:
    """A row that forks takes along what was measured of it."""
    blend, reference = members["p"] + 0.5 * members["h"], members["other"]
    search = cf.ChunkBeamSearch(
        width=2, samples=2, chunk_length=2, value=cf.LogRatio(members["h"], members["p"])
    )
    out = cf.generate(
        blend, PROMPTS, engine=engine, search=search, kl_to=reference, max_new_tokens=5, seed=2
    )
    check(out.kl, out.responses, blend, reference)


def test_rows_that_come_and_go(members: dict[str, Any]) -> None:
    """A row that takes the place of another brings its own weights of the reference."""
    blend = members["p"] + 0.5 * members["h"]
    reference = torch.tensor([0.2, 1.5]) * members["h"] + 0.5 * members["other"]
    arguments: dict[str, Any] = {"max_new_tokens": 4, "do_sample": True, "seed": 1}
    out = cf.generate(blend, PROMPTS, kl_to=reference, max_batch=1, **arguments)
    check(out.kl, out.responses, blend, reference)


def test_with_logits_processors(members: dict[str, Any]) -> None:
    blend = members["p"] + 0.5 * members["h"]
    out = cf.generate(
        blend, PROMPTS, kl_to=members["other"], max_new_tokens=3, repetition_penalty=1.3
    )
    check(out.kl, out.responses, blend, members["other"])


def test_of_given_responses(members: dict[str, Any]) -> None:
    blend, reference = members["p"] + 0.5 * members["h"], members["h"] + 0.2 * members["prompted"]
    scores = cf.score(blend, PROMPTS, [[7, 12, 30], [8]], kl_to=reference)
    check(scores.kl, [[7, 12, 30], [8]], blend, reference)
    assert cf.score(blend, PROMPTS, [[7], [8]]).kl is None


def test_in_a_conversation(members: dict[str, Any]) -> None:
    """A call goes on from the caches of another, among them that of the reference."""
    blend, reference = members["p"] + 0.5 * members["h"], members["other"]
    arguments: dict[str, Any] = {"max_new_tokens": 3, "kl_to": reference, "return_cache": True}
    out = cf.generate(blend, PROMPTS, **arguments)
    longer = [[*prompt, *new, 9] for prompt, new in zip(PROMPTS, out.responses, strict=True)]
    again = cf.generate(blend, longer, cache=out.cache, **arguments)
    fresh = cf.generate(blend, longer, **arguments)
    assert torch.equal(again.sequences, fresh.sequences)
    torch.testing.assert_close(again.kl, fresh.kl, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="other models"):
        cf.generate(blend, longer, cache=out.cache, max_new_tokens=3)


def test_no_distance_from_itself(members: dict[str, Any]) -> None:
    blend = (members["p"] + 0.5 * members["h"]).within(Support(term=1, top_k=7))
    out = cf.generate(blend, PROMPTS, kl_to=blend, max_new_tokens=3)
    assert out.kl.max() < 1e-5


def test_a_reference_costs_what_the_blend_does_not_run(members: dict[str, Any]) -> None:
    tokenizer = make_tokenizer()
    p = cf.Model(members["p"].model, tokenizer=tokenizer, name="p")
    x, y = members["x"], members["y"]

    def run(reference: Any) -> dict[tuple[str, ...], int]:
        out = cf.generate(p + x, PROMPTS, kl_to=reference, max_new_tokens=3)
        return {s.names: s.forwards for s in out.stats.models}

    alone = run(None)
    # This reference has no tokenizer of its own, and gets the blend's.
    assert run(0.5 * x + cf.Model(members["p"].model)) == alone
    assert run(y).keys() == {("p",), ("x", "kl_to.y")}
    assert run(members["h"]).keys() == {("p",), ("x",), ("kl_to.h",)}


def test_a_reference_over_the_model_of_terms_is_told(members: dict[str, Any]) -> None:
    x, y, plain = (members[name] for name in ("x", "y", "plain"))
    out = cf.generate(0.5 * x + 0.5 * y, PROMPTS, kl_to=plain, max_new_tokens=1)
    assert out.stats.notes == (
        "a head for each term of x: the divergence of each step is asked for",
    )


@each_engine
def test_a_bad_reference_harms_nobody(engine: cf.Engine, members: dict[str, Any]) -> None:
    bad = make("gpt2", 7)
    with torch.no_grad():
        bad.transformer.wte.weight[9] = float("nan")  # Only the first prompt has this token.
    blend = members["p"] + 0.5 * members["h"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = cf.generate(blend, PROMPTS, engine=engine, kl_to=bad, max_new_tokens=1)
    without = cf.generate(blend, PROMPTS, engine=engine, max_new_tokens=1)
    assert torch.equal(out.sequences, without.sequences)
    assert out.kl.isnan().tolist() == [[True], [False]]


def test_a_smaller_reference_reads_what_is_written(members: dict[str, Any]) -> None:
    """Models of one family pad their vocabularies to different lengths: padding does not count."""
    torch.manual_seed(8)
    config = LlamaConfig(
        vocab_size=VOCAB - 2,
        hidden_size=16,
        num_hidden_layers=1,
        intermediate_size=24,
        num_attention_heads=2,
    )
    small, p = cf.Model(LlamaForCausalLM(config).eval()), members["p"]
    scores = cf.score(p, PROMPTS[:1], [[7]], kl_to=small)
    expected = divergence(by_hand(p, 0, [])[: VOCAB - 2].log_softmax(-1), by_hand(small, 0, []))
    torch.testing.assert_close(scores.kl[0, 0].double(), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=rf"within \[0, {VOCAB - 2}\)"):
        cf.score(p, PROMPTS[:1], [[VOCAB - 1]], kl_to=small)


def test_what_is_no_reference(members: dict[str, Any]) -> None:
    blend = members["p"] + members["h"]

    def run(reference: Any, **arguments: Any) -> Any:
        return cf.generate(blend, PROMPTS, kl_to=reference, max_new_tokens=1, **arguments)

    with pytest.raises(TypeError, match="kl_to is a str; it must be a Blend"):
        run("p")
    with pytest.raises(TypeError, match="kl_to is a bool"):
        cf.score(blend, PROMPTS, [[5], [6]], kl_to=True)
    with pytest.raises(ValueError, match="kl_to is q, values alone"):
        run(0.0 * members["q"] + members["q"])
    with pytest.raises(ValueError, match=r"weight of other is a tensor \[3\]; it must be \[2\]"):
        run(torch.ones(3) * members["other"])
    mine, theirs = make_tokenizer(), _swapped()
    with pytest.raises(ValueError, match="vocabularies differ: token 8"):
        run(cf.Model(members["other"].model, tokenizer=theirs), tokenizer=mine)


def _swapped() -> Any:
    """The tokenizer of a few words, of which two have changed places."""
    core = json.loads(make_tokenizer().backend_tokenizer.to_str())
    words = core["model"]["vocab"]
    words["great"], words["awful"] = words["awful"], words["great"]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(core)))
