"""Each preset is its paper's formula, written out in torch and compared on random logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from crossfade import ops, presets
from crossfade.blends.blend import Blend, Model, ValueHead
from crossfade.blends.power_mean import union
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
)
LMS = [LlamaForCausalLM(CONFIG) for _ in range(4)]
BASE, TUNED, REF, OTHER = LMS
Z = dict(
    zip(
        map(id, LMS),
        torch.randn(4, 3, 64, generator=torch.Generator().manual_seed(0)) * 3,
        strict=True,
    )
)
BASE_Z, TUNED_Z, REF_Z, OTHER_Z = (z.double() for z in Z.values())
REQUESTS = 3
PER_REQUEST = torch.tensor([-0.5, 0.5, 2.0])


def decoded(blend: Blend, logits=lambda term: Z[id(term.model)]) -> Tensor:
    return ops.blend(
        [logits(t) for t in blend.terms],
        blend.row_weights(REQUESTS, "cpu"),
        [logits(v) for v in blend.values],
        blend.row_value_weights(REQUESTS, "cpu"),
        power=blend.power,
        parts=[
            ops.Part(w, p.power, p.min, p.max)
            for w, p in zip(blend.row_part_weights(1), blend.parts, strict=True)
        ],
        support=blend.support,
        backend="reference",
    )


def same(blend: Blend, score: Tensor) -> None:
    torch.testing.assert_close(decoded(blend), score.log_softmax(-1).float(), atol=1e-5, rtol=0)


def log_p(z: Tensor) -> Tensor:
    return z.log_softmax(-1)


def test_avoid():
    """lm-arithmetic's M - 0.96 union(M_bad, M), normalised by 1 - 0.96."""
    p, bad = log_p(BASE_Z), log_p(OTHER_Z)
    score = (p - 0.96 * torch.maximum(p, bad)) / 0.04
    same(presets.avoid(BASE, OTHER), score)
    same(presets.arithmetic(Model(BASE) - 0.96 * union(Model(OTHER), Model(BASE))), score)
    with pytest.raises(ValueError, match=r"lam is 1\.0; it must be below 1"):
        presets.avoid(BASE, OTHER, 1.0)
    with pytest.raises(
        ValueError, match=r"lam is tensor\(\[0\.5000, 1\.0000\]\); it must be below"
    ):
        presets.avoid(BASE, OTHER, [0.5, 1.0])
    with pytest.raises(TypeError, match="attribute has a Blend; it must be a Model"):
        presets.avoid(BASE, Model(OTHER) + Model(REF))


def test_arithmetic():
    a, b = Model(BASE, name="a"), Model(OTHER, name="b")
    same(presets.arithmetic(a - 0.6 * b), (log_p(BASE_Z) - 0.6 * log_p(OTHER_Z)) / 0.4)
    each = presets.arithmetic(a + torch.tensor([1.0, 3.0, 0.0]) * b)
    assert each.weights[1].tolist() == [0.5, 0.75, 0.0]
    with pytest.raises(ValueError, match="formula is a - b, whose weights sum to 0; it must be"):
        presets.arithmetic(a - b)
    with pytest.raises(ValueError, match=r"whose weights sum to \[0\.5, 0\.0\]; it must be above"):
        presets.arithmetic(a - torch.tensor([0.5, 1.0]) * b)
    with pytest.raises(TypeError, match="formula is a int"):
        presets.arithmetic(3)


@pytest.mark.parametrize("w", [0.8, -1, 0, PER_REQUEST])
def test_eft_and_proxy_tuning(w):
    score = log_p(BASE_Z) + torch.as_tensor(w).view(-1, 1) * (log_p(TUNED_Z) - log_p(REF_Z))
    same(presets.eft(BASE, TUNED, REF, beta=w), score)
    raw = BASE_Z + torch.as_tensor(w).view(-1, 1) * (TUNED_Z - REF_Z)
    same(presets.proxy_tuning(BASE, TUNED, REF, alpha=w), raw)


def test_eft_merges_a_base_that_is_the_reference():
    blend = presets.eft(BASE, TUNED, BASE, beta=0.25)
    assert str(blend) == "0.75*base + 0.25*tuned"
    assert blend.models.total.forwards == 2


@pytest.mark.parametrize("w", [0, 0.3, 1, 1.5, PER_REQUEST])
def test_dera(w):
    v = torch.as_tensor(w).view(-1, 1)
    same(presets.dera(REF, TUNED, w), (1 - v) * log_p(REF_Z) + v * log_p(TUNED_Z))
    # The first term is what the KL is measured to.
    assert presets.dera(REF, TUNED, w).names[0] == "ref"


@pytest.mark.parametrize(
    ("divergence", "rule"),
    [
        ("reverse_kl", lambda p, q: p**0.3 * q**0.7),
        (0, lambda p, q: p**0.3 * q**0.7),
        ("forward_kl", lambda p, q: 1 / (0.3 / p + 0.7 / q)),
        (1, lambda p, q: 1 / (0.3 / p + 0.7 / q)),
        (0.5, lambda p, q: (0.3 * p**-0.5 + 0.7 * q**-0.5) ** (-1 / 0.5)),
        (-1.0, lambda p, q: 0.3 * p + 0.7 * q),
    ],
)
def test_mod(divergence, rule):
    blend = presets.mod([BASE, TUNED], [0.3, 0.7], divergence)
    same(blend, rule(log_p(BASE_Z).exp(), log_p(TUNED_Z).exp()).log())


@pytest.mark.parametrize("w", [0.5, PER_REQUEST])
def test_genarm(w):
    blend = presets.genarm(BASE, [TUNED, REF], [w, 0.25])
    v = torch.as_tensor(w).view(-1, 1)
    same(blend, log_p(BASE_Z) + v * log_p(TUNED_Z) + 0.25 * log_p(REF_Z))
    assert blend.names == ("base", "arm0", "arm1")


@pytest.mark.parametrize("beta", [0.5, 0, PER_REQUEST])
def test_contrastive(beta):
    b = torch.as_tensor(beta).view(-1, 1)
    p = BASE_Z.softmax(-1)
    plausible = p >= 0.1 * p.amax(-1, keepdim=True)
    assert 1 < plausible.sum() < plausible.numel()
    score = (1 + b) * BASE_Z - b * TUNED_Z
    same(presets.contrastive(BASE, TUNED, beta), score.masked_fill(~plausible, -torch.inf))


@pytest.mark.parametrize("scale", [0, 1, 1.5, PER_REQUEST])
def test_cfg(scale):
    blend = presets.cfg(Model(BASE, system="s"), scale, negative_prompt=["p", "q", "r"])
    cond, uncond = BASE_Z.float(), TUNED_Z.float()
    got = decoded(blend, lambda term: cond if term.prompt is None else uncond)
    score = uncond + torch.as_tensor(scale).view(-1, 1) * (cond - uncond)
    torch.testing.assert_close(got, score.log_softmax(-1), atol=1e-5, rtol=0)
    assert all(t.model is BASE and t.system == "s" for t in blend.terms)


def test_cfg_terms():
    blend = presets.cfg(BASE, 1.5, negative_system="be rude")
    assert str(blend) == "1.5*cond - 0.5*uncond"
    cond, uncond = blend.terms
    assert uncond == replace(cond, system="be rude")
    assert len(blend.models) == 1
    assert len(presets.cfg(BASE, 1, negative_prompt="").terms) == 1  # the model alone


@pytest.mark.parametrize("w", [1.5, PER_REQUEST])
@pytest.mark.parametrize("top_k", [0, 5])
def test_args(w, top_k):
    v = torch.as_tensor(w).view(-1, 1)
    score = log_p(BASE_Z) + v * OTHER_Z
    if top_k:
        score[BASE_Z.topk(top_k).values[:, -1:] > BASE_Z] = -torch.inf
    same(presets.args(BASE, OTHER, w, top_k=top_k), score)
    same(presets.args(BASE, ValueHead(OTHER), w, top_k=top_k), score)


def test_presets_take_terms_and_blends():
    """A preset is an ordinary blend, so presets nest."""
    inner = presets.dera(Model(REF, name="r"), Model(TUNED, name="t"), 0.5)
    assert str(presets.eft(inner, TUNED, REF, 0.25)) == "0.25*r + 0.75*t"


def test_recipes_of_searches():
    """What each prints is the blend that proposes and what chooses."""
    gsi = presets.gsi(TUNED, REF, OTHER, 0.5, samples=3)
    assert str(gsi.blend) == "sampler"
    tilted = "ChunkBeamSearch(width=1, samples=3, chunk_length=32, value=0.5*value, tilt=LogRatio("
    assert str(gsi.search).startswith(tilted)
    assert gsi.search.tilt.ref == gsi.blend.terms[0]
    cards = presets.cards(BASE, OTHER, 1.5)
    assert str(cards.blend) == "base"
    assert "chunk_length=64, value=value, chunk_end=entropy_above(1.5)" in str(cards.search)
    particles = presets.particles(BASE, OTHER, 6, 0.5)
    assert str(particles.search) == "ParticleFilter(6, 32, value=value, temperature=0.5)"


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: presets.gsi(TUNED, Model(REF) + BASE_MODEL, OTHER), TypeError, "sampler"),
        (lambda: presets.gsi(TUNED, REF, OTHER, "1"), TypeError, "beta is '1'"),
        (lambda: presets.gsi(TUNED, REF, OTHER, 0), ValueError, "beta is 0; it must be above 0"),
        (lambda: presets.gsi(REF, REF, OTHER), ValueError, "target and sampler are both"),
        (lambda: presets.fudge(BASE, OTHER), TypeError, "it must be a Classifier, without its w"),
        (lambda: presets.cards(BASE, OTHER, -1), ValueError, "nats is -1"),
        (lambda: presets.particles(BASE, OTHER, 1), ValueError, "n is 1"),
        (lambda: presets.eft(BASE, TUNED, REF, beta="1"), TypeError, "beta is a str"),
        (lambda: presets.eft("base", TUNED, REF), TypeError, "str"),
        (lambda: presets.proxy_tuning(BASE, TUNED, REF, float("nan")), ValueError, "alpha is nan"),
        (lambda: presets.dera(REF, TUNED, None), TypeError, "lam is a NoneType"),
        (lambda: presets.mod([BASE, TUNED], [0.5, 0.6]), ValueError, "sum to 1.1"),
        (lambda: presets.mod([BASE, TUNED], [1.5, -0.5], "forward_kl"), ValueError, "-0.5"),
        (lambda: presets.mod([BASE], [1], "jsd"), ValueError, "divergence is 'jsd'"),
        (lambda: presets.mod([BASE], [1], None), TypeError, "divergence is None"),
        (lambda: presets.genarm(BASE, TUNED, [1]), TypeError, "arms is a LlamaForCausalLM"),
        (lambda: presets.genarm(BASE, [TUNED], 1), TypeError, "weights is a int"),
        (lambda: presets.genarm(BASE, [TUNED], [1, 2]), ValueError, "weights has 2"),
        (lambda: presets.genarm(BASE, [TUNED], ["1"]), TypeError, r"weights\[0\] is a str"),
        (lambda: presets.contrastive(BASE, TUNED, alpha=1.5), ValueError, "1.5"),
        (lambda: presets.contrastive(BASE, TUNED, alpha="x"), TypeError, "alpha is 'x'"),
        (lambda: presets.cfg(BASE, 1.5), ValueError, "negative_prompt and negative_system"),
        (lambda: presets.cfg(Model(BASE) + TUNED_MODEL, 2, negative_prompt=""), TypeError, "Blend"),
        (lambda: presets.cfg(BASE, "2", negative_prompt=""), TypeError, "scale is a str"),
        (lambda: presets.args(BASE, Model(OTHER)), TypeError, "value has a Model"),
        (lambda: presets.args(BASE, OTHER, "1"), TypeError, "weight is a str"),
        (lambda: presets.args(BASE, OTHER, top_k=-1), ValueError, "top_k is -1"),
    ],
)
def test_bad_calls(call, error, match):
    with pytest.raises(error, match=match):
        call()


TUNED_MODEL = Model(TUNED)
BASE_MODEL = Model(BASE)
