"""What a model does after its head decides on shared heads, restricted guides and value heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.models.after_head import after_head
from tiny_models import HEADS, IDS, LONG, SIZES, UNTIED, VOCAB, make, make_letters
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
)

PROMPTS = [[5, 9, 13, 21, 7], [17, 23], [31, 8, 50]]
SIMPLE = cf.Engine(simple=True)
DRAW: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "seed": 3}


class Changed(LlamaForCausalLM):
    """A model that changes its logits by `change`."""

    change: Callable[[Tensor], Tensor]

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        **options: Any,
    ) -> Any:
        output = super().forward(input_ids, attention_mask, position_ids, **options)
        output.logits = type(self).change(output.logits)
        return output


def changed(change: Callable[[Tensor], Tensor], seed: int = 0) -> PreTrainedModel:
    model = make("llama", seed)
    model.__class__ = type("Changed", (Changed,), {"change": staticmethod(change)})
    return model


def capped(z: Tensor) -> Tensor:
    return 5 * torch.tanh(z / 5)


def centred(z: Tensor) -> Tensor:
    return z - z.mean(-1, keepdim=True)


def sharpened(z: Tensor) -> Tensor:
    return 2 * z.log_softmax(-1)


def banned(z: Tensor) -> Tensor:
    return torch.cat([z[..., :40], torch.full_like(z[..., 40:50], -torch.inf), z[..., 50:]], -1)


def biased(z: Tensor) -> Tensor:
    return z + torch.arange(VOCAB) % 3


def wide(z: Tensor) -> Tensor:
    return z.clamp(-400, 400)


# To each change: whether a head can be shared, and whether columns can be computed alone.
CHANGES = {
    "nothing": (lambda z: z, True, True),
    "a scale": (lambda z: z / 3, True, True),
    "a scale of 1": (lambda z: z * 1.0, True, True),
    "a cap": (capped, False, True),
    "a wide cap": (wide, False, True),
    "the mean taken off": (centred, True, False),
    "a log-softmax": (sharpened, False, False),
    "tokens that are banned": (banned, False, True),
    "a bias": (biased, False, True),
    "a column of others": (lambda z: torch.cat([z[..., 1:], z[..., :1]], -1), True, False),
}


def left_out(out: cf.Output) -> tuple[str, ...]:
    """The notes, but for that of classes of the tests' own, which run every step."""
    return tuple(n for n in out.stats.notes if ": its modules run every step" not in n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CHANGES)
def test_what_comes_after_the_head_is_seen(name: str, dtype: torch.dtype) -> None:
    change, linear, apart = CHANGES[name]
    found = after_head(changed(change).to(dtype))
    assert found.is_linear == linear
    assert found.keeps_columns_apart == apart
    assert found.is_nothing == (name in ("nothing", "a scale of 1"))
    assert found.reads == 1


@pytest.mark.parametrize("name", CHANGES)
def test_a_head_is_shared_where_logits_are_its_linear_map(name: str) -> None:
    change, linear, _ = CHANGES[name]
    model = changed(change)
    blend = 1.5 * cf.Model(model, name="m") - 0.7 * cf.Model(model, prompt=[9, 8, 30])
    theirs = cf.generate(blend, PROMPTS, engine=SIMPLE, **DRAW)
    out = cf.generate(blend, PROMPTS, **DRAW)
    assert out.responses == theirs.responses
    torch.testing.assert_close(out.logprobs, theirs.logprobs, rtol=1e-4, atol=1e-4)
    note = "a head for each term of m: what the model makes of its outputs is not linear"
    assert left_out(out) == (() if linear else (note,))


@pytest.mark.parametrize("power", [0.0, 1.0])
@pytest.mark.parametrize("name", CHANGES)
def test_few_columns_of_a_guide_where_they_stand_alone(name: str, power: float) -> None:
    change, _, apart = CHANGES[name]
    guide = changed(change, 2)
    terms = [cf.Model(make("llama", 1), name="m"), cf.Model(guide, name="guide")]
    weights = [0.3, 0.7]
    blend = cf.power_mean(terms, weights, power) if power else 0.3 * terms[0] + 0.7 * terms[1]
    blend = blend.within(cf.Support(top_k=2))
    theirs = cf.generate(blend, PROMPTS, engine=SIMPLE, **DRAW)
    out = cf.generate(blend, PROMPTS, **DRAW)
    assert out.responses == theirs.responses
    torch.testing.assert_close(out.logprobs, theirs.logprobs, rtol=1e-4, atol=1e-4)
    if power != 0:
        assert left_out(out) == ("every model computes all columns: the blend has power 1",)
    else:
        note = "all columns of the head of guide: what the model makes of its outputs mixes them"
        assert left_out(out) == (() if apart else (note,))


def family(config: Any, model: Callable[[Any], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    made = model(config).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made


@pytest.mark.parametrize(
    ("config", "model", "linear"),
    [
        (CohereConfig, CohereForCausalLM, True),
        (GraniteConfig, GraniteForCausalLM, True),
        (Gemma2Config, Gemma2ForCausalLM, False),
    ],
)
def test_families_that_scale_or_cap(config: Any, model: Any, linear: bool) -> None:
    fields = {**SIZES, **HEADS, **LONG, **IDS, **UNTIED}
    fields |= {"logits_scaling": 3.0} if model is GraniteForCausalLM else {}
    made = family(config(**fields), model)
    blend = 1.5 * cf.Model(made, name="m") - 0.7 * cf.Model(made, prompt=[9, 8, 30])
    theirs = cf.generate(blend, PROMPTS, engine=SIMPLE, **DRAW)
    out = cf.generate(blend, PROMPTS, **DRAW)
    assert out.responses == theirs.responses
    torch.testing.assert_close(out.logprobs, theirs.logprobs, rtol=1e-4, atol=1e-4)
    assert bool(left_out(out)) != linear


HOOKS: dict[str, Callable[[Any], Any]] = {
    "the head": lambda m: m.lm_head.register_forward_hook(lambda h, a, z: capped(z)),
    "the model": lambda m: m.register_forward_hook(
        lambda h, a, output: setattr(output, "logits", sharpened(output.logits))
    ),
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_hooks_after_the_head_are_no_part_of_it(hook: Callable[[Any], Any]) -> None:
    model, guide = make("llama", 0), make("llama", 1)
    for m in (model, guide):
        hook(m)
    shared = 1.5 * cf.Model(model) - 0.7 * cf.Model(model, prompt=[9, 8, 30])
    guided = (0.3 * cf.Model(model) + 0.7 * cf.Model(guide)).within(cf.Support(top_k=2))
    for blend in (shared, guided):
        theirs = cf.generate(blend, PROMPTS, engine=SIMPLE, **DRAW)
        out = cf.generate(blend, PROMPTS, **DRAW)
        assert out.responses == theirs.responses
        torch.testing.assert_close(out.logprobs, theirs.logprobs)
        assert "has a forward hook" in out.stats.notes[0]


REFUSED = {name: CHANGES[name][0] for name in CHANGES if not name.startswith(("noth", "a scale o"))}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_value_heads_are_over_models_that_leave_logits_alone(
    change: Callable[[Tensor], Tensor],
) -> None:
    from crossfade.training import value_model

    with pytest.raises(NotImplementedError, match="computes something between"):
        value_model(changed(change))


def test_hooks_are_after_the_head_too() -> None:
    """A hook on the head itself counts as well: it sees the outputs before anybody."""
    for hook in HOOKS.values():
        model = make("llama")
        hook(model)
        assert not after_head(model).is_nothing


def test_what_the_head_reads() -> None:
    model = make("llama")
    model.lm_head.register_forward_pre_hook(lambda h, a: (a[0] * 2,))
    found = after_head(model)
    assert found.reads == 2
    assert found.is_nothing


# Where an option is asked for and not followed, a note says why.


def terms() -> tuple[cf.Model, cf.Model, cf.Model]:
    one, other = make("llama", 0), make("llama", 1)
    return cf.Model(one, name="m"), cf.Model(one, prompt=[9, 8]), cf.Model(other, name="g")


@pytest.mark.parametrize(
    ("blend", "options", "notes"),
    [
        (lambda m, p, g: m + 0.5 * p, {}, ()),
        (
            lambda m, p, g: m + 0.5 * p,
            {"return_term_logprobs": True},
            ("a head for each term of m: the log-probs of each term are asked for",),
        ),
        (
            lambda m, p, g: m + 0.5 * p,
            {"return_pushes": True},
            ("a head for each term of m: the pushes of each term are asked for",),
        ),
        (
            lambda m, p, g: m + 0.5 * p,
            {"return_kl_to_base": True},
            ("a head for each term of m: the divergence of each step is asked for",),
        ),
        (
            lambda m, p, g: m + 0.5 * p,
            {"kl_to": make("llama", 1)},
            ("a head for each term of m: the divergence of each step is asked for",),
        ),
        (
            lambda m, p, g: (m + 0.5 * g).within(cf.Support(top_k=2)),
            {"kl_to": make("llama", 2)},
            ("all models run in full at every step: the divergence of each step is asked for",),
        ),
        (
            lambda m, p, g: cf.power_mean([m, p], [0.5, 0.5], 1.0),
            {},
            ("a head for each term of m: the blend has power 1",),
        ),
        (
            lambda m, p, g: (m + 0.5 * p).within(cf.Support(top_k=2)),
            {},
            (
                "a head for each term of m: the blend has a support",
                "all models run in full at every step: they are rows of one forward with the "
                "support's term",
            ),
        ),
        (
            lambda m, p, g: (m + 0.5 * g).within(cf.Support(top_k=2)),
            {"return_term_logprobs": True},
            ("all models run in full at every step: the log-probs of each term are asked for",),
        ),
        (
            lambda m, p, g: (m + 0.5 * g).within(cf.Support(top_k=2)),
            {"engine": cf.Engine(restrict_guides=False, skip_guides=False)},
            (),
        ),
        (
            lambda m, p, g: m + 0.5 * p,
            {"engine": cf.Engine(sync_every=4), "stop_strings": ["zzz"]},
            ("sync_every is 1 and not 4: the host looks at the rows after each step",),
        ),
    ],
)
def test_options_that_are_left_out_are_named(
    blend: Any, options: dict[str, Any], notes: tuple[str, ...]
) -> None:
    out = cf.generate(blend(*terms()), PROMPTS, tokenizer=make_letters(), **DRAW, **options)
    assert left_out(out) == notes
