"""The engine's tokens against the simple path's, with every option on and off."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

import crossfade as cf
import pytest
import torch
from peft import PeftModel
from sweeps import product
from tiny_models import EOS, SHAPES, lora, make, make_letters
from transformers import PreTrainedModel

# PEFT asks for an attribute that this version of Transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

SIMPLE = cf.Engine(simple=True)
DRAW: dict[str, Any] = {
    "max_new_tokens": 12,
    "do_sample": True,
    "temperature": 1.3,
    "seed": 5,
    "eos_token_id": [EOS, 20, 30, 40, 50],
}
PROMPTS = [[7, 9, 30, 12, 8], [40], [11, 12, 13, 14, 15, 16, 17, 18, 19], [33, 6], [5, 5, 21]]
OPTIONS = {
    "default": {},
    "no kernels": {"kernels": False},
    "a forward a term": {"share_weights": False},
    "a head a term": {"share_head": False},
    "seldom looked at": {"sync_every": 5},
    "one of each": {"kernels": False, "share_weights": False, "share_head": False},
}
LAYERS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "others": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def same(ours: cf.Output, theirs: cf.Output) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours.finished, theirs.finished)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.sampled_logprobs, theirs.sampled_logprobs, atol=1e-4, rtol=1e-4)


def adapted(shape: str, ranks: tuple[int, int]) -> PeftModel:
    modules = LAYERS.get(shape, LAYERS["others"])
    model: Any = make(shape)
    for seed, (name, rank) in enumerate(zip(("tuned", "ref"), ranks, strict=True)):
        options = {"lora_alpha": rank / 4, "fan_in_fan_out": shape == "gpt2"}
        model = lora(seed, model, name, rank, modules, **options)
    return model.eval()


@pytest.mark.parametrize(("options", "shape"), product(list(OPTIONS), list(SHAPES), together=1))
def test_separate_models(shape: str, options: str) -> None:
    base, tuned, ref = (make(shape, seed) for seed in range(3))
    blend = cf.Model(base) + 0.8 * (cf.Model(tuned) - cf.Model(ref))
    theirs = cf.generate(blend, PROMPTS, engine=SIMPLE, **DRAW)
    same(cf.generate(blend, PROMPTS, engine=cf.Engine(**OPTIONS[options]), **DRAW), theirs)
    assert len(set(theirs.lengths.tolist())) > 1, "rows should end at different steps"


@pytest.mark.parametrize(
    ("options", "shape", "ranks"),
    product(list(OPTIONS), list(SHAPES), [(4, 4), (16, 64)], together=1),
    ids=str,
)
def test_adapters_are_rows(shape: str, ranks: tuple[int, int], options: str) -> None:
    model = adapted(shape, ranks)
    base, tuned, ref = (cf.Model(model, adapter=a) for a in (None, "tuned", "ref"))
    blend = base + 0.7 * (tuned - ref)
    theirs = cf.generate(blend, PROMPTS, engine=SIMPLE, **DRAW)
    ours = cf.generate(blend, PROMPTS, engine=cf.Engine(**OPTIONS[options]), **DRAW)
    same(ours, theirs)
    assert len(ours.stats.models) == (3 if "share_weights" in OPTIONS[options] else 1)
    assert not ours.stats.notes


@pytest.mark.parametrize(("shape", "most"), product(list(SHAPES), [1, 2, 4], together=1))
def test_rows_that_join_late(shape: str, most: int) -> None:
    """Requests take the places of those that have ended, while others go on."""
    base, guide = make(shape), make("llama", 1)
    blend = cf.Model(base) + 0.5 * cf.Model(guide, prompt=[9, 8, 7, 6])
    arguments = {**DRAW, "num_return_sequences": 2}
    theirs = cf.generate(blend, PROMPTS, engine=SIMPLE, **arguments)
    ours = cf.generate(blend, PROMPTS, max_batch=most, progress=False, **arguments)
    same(ours, theirs)
    seldom = cf.Engine(sync_every=3)
    same(
        cf.generate(blend, PROMPTS, max_batch=most, progress=False, engine=seldom, **arguments),
        theirs,
    )


def test_the_batch_stays_full() -> None:
    """Rows that end early give way, so that there are far fewer steps than in fixed batches."""
    model = make()
    prompts = [[5 + i % 50, 7 + i % 40] for i in range(40)]
    arguments = {**DRAW, "max_new_tokens": 60, "eos_token_id": [EOS, 20]}
    whole = cf.generate(model, prompts, engine=SIMPLE, **arguments)
    ours = cf.generate(model, prompts, max_batch=4, progress=False, **arguments)
    same(ours, whole)
    lengths = whole.lengths.tolist()
    fixed = sum(max(lengths[i : i + 4]) for i in range(0, 40, 4))
    ends = [0] * 4
    for n in lengths:  # Each takes the place that is free first.
        heapq.heappush(ends, heapq.heappop(ends) + n)
    assert max(ends) < 0.8 * fixed
    (stats,) = ours.stats.models
    prompts_read = 37  # At most, as the first four are read together.
    assert stats.forwards <= max(ends) + prompts_read
    # On the simple path, as with a processor, batches of the same rows are fixed.
    batches = cf.generate(model, prompts, max_batch=4, progress=False, engine=SIMPLE, **arguments)
    same(batches, whole)
    assert batches.stats.models[0].forwards == fixed


Blends = dict[str, Callable[[list[PreTrainedModel]], Any]]
BLENDS: Blends = {
    "weights a request": lambda m: (
        cf.Model(m[0]) + torch.tensor([0.0, 0.5, 1.0, -1.0, 2.0]) * cf.Model(m[0], prompt=[3, 4])
    ),
    "power mean": lambda m: cf.power_mean(
        [cf.Model(m[0]), cf.Model(m[0], prompt=[3, 4]), cf.Model(m[1])],
        weights=[0.5, 0.3, 0.2],
        r=-1.0,
    ),
    "support": lambda m: (1.5 * cf.Model(m[0]) - 0.5 * cf.Model(m[1])).within(
        cf.Support(min_p=0.2)
    ),
    "values": lambda m: cf.Model(m[0]) + 0.7 * cf.ValueHead(m[1]),
    "guidance": lambda m: cf.presets.cfg(cf.Model(m[0]), 1.5, negative_prompt=[8, 9, 10]),
}


@pytest.mark.parametrize("most", [None, 2])
@pytest.mark.parametrize("name", BLENDS)
def test_blends(name: str, most: int | None, trio: list[PreTrainedModel]) -> None:
    blend = BLENDS[name](trio)
    arguments = {**DRAW, "top_k": 20, "top_p": 0.95}
    theirs = cf.generate(blend, PROMPTS, engine=SIMPLE, **arguments)
    same(cf.generate(blend, PROMPTS, max_batch=most, progress=False, **arguments), theirs)


@pytest.mark.parametrize(
    ("most", "skip", "restrict", "cut"),
    product(
        [1, None], [True, False], [True, False], [{"min_p": 0.5}, {"top_k": 3}, {"top_p": 0.5}]
    ),
    ids=str,
)
def test_models_rest_under_a_support(
    cut: dict[str, Any], restrict: bool, skip: bool, most: int | None, trio: list[PreTrainedModel]
) -> None:
    """The distribution is the same whether other models skip steps and columns, or do not."""
    base, guide, value = trio
    blend = (
        1.5 * cf.Model(base)
        - 0.5 * cf.Model(guide)
        + 0.2 * cf.Model(guide, prompt=[9, 8])
        + 0.4 * cf.ValueHead(value)
    ).within(cf.Support(**cut))
    arguments = {**DRAW, "temperature": 1.0}
    theirs = cf.generate(blend, PROMPTS, engine=SIMPLE, **arguments)
    engine = cf.Engine(restrict_guides=restrict, skip_guides=skip)
    ours = cf.generate(blend, PROMPTS, max_batch=most, progress=False, engine=engine, **arguments)
    same(ours, theirs)
    first, guides, _ = ours.stats.models
    if most == 1 and "top_k" not in cut:
        assert (guides.forwards < first.forwards) == skip


@pytest.mark.parametrize("most", [None, 2])
def test_figures_on_demand(trio: list[PreTrainedModel], most: int | None) -> None:
    blend = cf.Model(trio[0]) + 0.8 * (cf.Model(trio[1]) - cf.Model(trio[0], prompt=[9]))
    on = {"return_term_logprobs": True, "return_kl_to_base": True}
    theirs = cf.generate(blend, PROMPTS, engine=SIMPLE, **on, **DRAW)
    ours = cf.generate(blend, PROMPTS, max_batch=most, progress=False, **on, **DRAW)
    same(ours, theirs)
    for name in ("term_logprobs", "kl_to_base"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_conversation_goes_on(shape: str) -> None:
    """No term reads anything twice, and the tokens are those of a fresh run."""
    model = adapted(shape, (4, 8))
    terms = [cf.Model(model, adapter=a, prompt=p) for a, p in ((None, None), ("tuned", None))]
    blend = terms[0] + 0.6 * terms[1] - 0.3 * cf.Model(make(shape, 3))
    first = cf.generate(blend, PROMPTS, return_cache=True, **DRAW)
    longer = [[*p, *r, 25, 26, 27] for p, r in zip(PROMPTS, first.responses, strict=True)]
    fresh = cf.generate(blend, longer, **{**DRAW, "seed": 9})
    assert first.cache is not None
    on = cf.generate(blend, longer, cache=first.cache, return_cache=True, **{**DRAW, "seed": 9})
    same(on, fresh)
    new = sum(map(len, longer)) - sum(map(len, PROMPTS)) - sum(map(len, first.responses))
    written = sum(map(len, on.responses))
    # Each row reads the last token of the first response, the three new ones, and what it writes.
    assert [m.tokens for m in on.stats.models] == [2 * (new + written), new + written]
    # From the same cache come a second turn, and another turn from the first prompt on.
    again = [[*p, *r, 31] for p, r in zip(longer, on.responses, strict=True)]
    other = [[*p[:2], 50, 51] for p in PROMPTS]
    for prompts in (again, other):
        arguments = {**DRAW, "seed": 4}
        ours = cf.generate(blend, prompts, cache=on.cache, return_cache=True, **arguments)
        same(ours, cf.generate(blend, prompts, **arguments))
    # The first call's cache knows what later calls wrote into it.
    same(cf.generate(blend, longer, cache=first.cache, **{**DRAW, "seed": 9}), fresh)
    # One row serves all samples of its request.
    arguments = {**DRAW, "num_return_sequences": 3}
    same(
        cf.generate(blend, other, cache=on.cache, **arguments),
        cf.generate(blend, other, **arguments),
    )
    same(
        cf.generate(blend, other, cache=on.cache, return_cache=True, **DRAW),
        cf.generate(blend, other, **DRAW),
    )


def test_caches_that_do_not_fit(trio: list[PreTrainedModel]) -> None:
    out = cf.generate(trio[0], PROMPTS, return_cache=True, **DRAW)
    assert repr(out.cache).startswith("PrefixCache(5 rows, up to ")
    with pytest.raises(ValueError, match="cache has 5 rows; the inputs have 2 requests of 1 rows"):
        cf.generate(trio[0], PROMPTS[:2], cache=out.cache, **DRAW)
    with pytest.raises(ValueError, match="a blend of other models"):
        cf.generate(trio[1], PROMPTS, cache=out.cache, **DRAW)
    with pytest.raises(TypeError, match="cache is a dict; it must be the cache of an Output"):
        cf.generate(trio[0], PROMPTS, cache={}, **DRAW)
    with pytest.raises(ValueError, match="max_batch is 2; with cache or return_cache"):
        cf.generate(trio[0], PROMPTS, return_cache=True, max_batch=2, **DRAW)
    with pytest.raises(ValueError, match="engine is simple"):
        cf.generate(trio[0], PROMPTS, return_cache=True, engine=SIMPLE, **DRAW)


@pytest.mark.parametrize("most", [None, 1, 2])
def test_processors_and_stop_strings(most: int | None) -> None:
    """The host looks at aligned batches, or at the last tokens of rows at different steps."""
    model, letters = make("llama"), make_letters()
    prompts = ["thethe", "oneandone", "a", "hundred"]
    plain = cf.generate(model, prompts, tokenizer=letters, **DRAW)
    stops = [letters.decode(row[2:4]) for row in plain.responses[:2]]
    for more in (
        {"stop_strings": stops},
        {"repetition_penalty": 1.4},
        {"min_new_tokens": 5, "stop_strings": stops},
    ):
        arguments = {**DRAW, **more, "tokenizer": letters, "eos_token_id": 60}
        theirs = cf.generate(model, prompts, engine=SIMPLE, **arguments)
        ours = cf.generate(model, prompts, max_batch=most, progress=False, **arguments)
        same(ours, theirs)
        fixed = most is not None and set(more) != {"stop_strings"}
        reason = "fixed batches: logits processors read all rows at one step"
        assert ours.stats.notes == ((reason,) if fixed else ())


def test_prefix_functions_know_their_request() -> None:
    model = make()

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        return [10 + row, 20 + row]

    arguments: Any = {**DRAW, "prefix_allowed_tokens_fn": allowed, "num_return_sequences": 2}
    whole = cf.generate(model, PROMPTS, engine=SIMPLE, **arguments)
    same(cf.generate(model, PROMPTS, max_batch=4, progress=False, **arguments), whole)
    assert set(whole.responses[9]) <= {19, 29}


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_by_teacher_forcing(shape: str) -> None:
    """In bfloat16 a product depends on its batch, so that log-probs of one text are compared."""
    model = make(shape).to(torch.bfloat16)
    out = cf.generate(model, PROMPTS, **DRAW)
    forced = cf.score(model, PROMPTS, out.responses)
    exact = cf.score(make(shape), PROMPTS, out.responses)
    error = (out.logprobs - exact.logprobs).abs()
    theirs = (forced.logprobs - exact.logprobs).abs()
    assert error.mean() <= 1.5 * theirs.mean() + 0.01
    assert error.max() <= 2 * theirs.max() + 0.1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"kernels": 1}, TypeError, "Engine.kernels is 1; it must be a bool"),
        ({"sync_every": 0}, ValueError, "Engine.sync_every is 0; it must be at least 1"),
        ({"sync_every": "8"}, TypeError, "Engine.sync_every is '8'; it must be an int or None"),
    ],
)
def test_settings_are_checked(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cf.Engine(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_batch": 0}, "max_batch is 0; it must be at least 1"),
        ({"max_batch": 2.5}, "max_batch is 2.5; it must be an int"),
        ({"engine": "fast"}, "engine is a str; it must be a crossfade.Engine"),
        ({"progress": "yes"}, "progress is 'yes'; it must be True or False"),
    ],
)
def test_arguments_are_checked(
    arguments: dict[str, Any], message: str, base: PreTrainedModel
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        cf.generate(base, PROMPTS, max_new_tokens=2, **arguments)


def test_progress(
    base: PreTrainedModel, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crossfade.progress.DELAY", 0.0)
    told: list[int] = []
    cf.generate(base, PROMPTS, max_batch=2, progress=told.append, **DRAW)
    assert sum(told) == len(PROMPTS)
    assert not capfd.readouterr().err
    cf.generate(base, PROMPTS, max_batch=2, **DRAW)
    assert "5/5" in capfd.readouterr().err
    cf.generate(base, PROMPTS, **DRAW)
    assert not capfd.readouterr().err, "no bar for what is one batch"


class Plain(torch.nn.Module):
    """A model of the user's own around one of Transformers."""

    def __init__(self, inner: PreTrainedModel) -> None:
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, **arguments: Any) -> Any:
        return self.inner(**arguments)


def test_what_the_engine_cannot_run_goes_the_simple_path(trio: list[PreTrainedModel]) -> None:
    base, guide = trio[:2]
    theirs = cf.generate(cf.Model(base) + 0.5 * cf.Model(guide), PROMPTS, engine=SIMPLE, **DRAW)
    noisy = make()
    for layer in noisy.model.layers:
        layer.self_attn.attention_dropout = 0.5
    for model, why in (
        (Plain(guide), "guide is not a model of Transformers"),
        (noisy.train(), "guide: it has dropout and is in training mode"),
    ):
        blend = cf.Model(base) + 0.5 * cf.Model(model, name="guide")
        out = cf.generate(blend, PROMPTS, **DRAW)
        assert out.stats.notes == (f"the simple path: {why}",)
        assert torch.equal(out.sequences, theirs.sequences) == isinstance(model, Plain)
        with pytest.raises(NotImplementedError, match=f"cache and return_cache: {why}"):
            cf.generate(blend, PROMPTS, return_cache=True, **DRAW)


def test_attention_with_more_than_the_kernel_knows(base: PreTrainedModel) -> None:
    """Sinks, biases and windows that are not told are refused at the first forward."""
    from crossfade.decoding.engine.kv_cache import KVCache
    from crossfade.decoding.engine.modules import ForwardPass, Unsupported, attention

    layer = base.model.layers[0].self_attn
    q, k = torch.zeros(1, 2, 1, 8), torch.zeros(1, 1, 1, 8)

    def call() -> ForwardPass:
        return ForwardPass(KVCache(1, 4), torch.zeros(1, dtype=torch.int64))

    attention(layer, q, k, k, None, crossfade=call())
    for arguments, why in (
        ({}, "do not hand keyword arguments on"),
        ({"crossfade": call(), "s_aux": q}, "its attention uses s_aux"),
        ({"crossfade": call(), "position_bias": q}, "its attention uses position_bias"),
    ):
        with pytest.raises(Unsupported, match=why):
            attention(layer, q, k, k, None, **arguments)
    sliding = make("gemma3").model.layers[0].self_attn
    with pytest.raises(Unsupported, match="how far they look back"):
        attention(sliding, q, k, k, None, crossfade=call())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler, of torch's own
def test_compiled(base: PreTrainedModel) -> None:
    """A compiled step gives the same tokens, and a second call compiles nothing."""
    from torch._dynamo.utils import counters

    blend = cf.Model(base) + 0.5 * cf.Model(base, prompt=[9, 8])
    theirs = cf.generate(blend, PROMPTS, engine=SIMPLE, **DRAW)
    counters.clear()
    same(cf.generate(blend, PROMPTS, engine=cf.Engine(compile=True), **DRAW), theirs)
    first = counters["stats"]["unique_graphs"]
    assert first == 1, "one graph, without breaks"
    same(cf.generate(blend, PROMPTS, engine=cf.Engine(compile=True), **DRAW), theirs)
    assert counters["stats"]["unique_graphs"] == first
    torch.compiler.reset()
