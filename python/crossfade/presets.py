"""Blends of the literature, by name. Models may be bare, `Model` terms, or blends of them.

Most presets give an ordinary `Blend`, which prints as its formula and can be a part of other
blends; `cards`, `gsi`, `ivg` and `particles` give a `Recipe`, a blend and its search. A preset's
cost is counted in forwards a token. It is less where terms are equal or have the weight 0, which
are not computed (see `Blend`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .blends.blend import Blend, Model, ValueHead, as_blend, as_term
from .blends.classifier import Classifier
from .blends.power_mean import power_mean, union
from .blends.values import LogRatio, ValueSum, as_value
from .blends.weights import Weight, check_sum, check_weight, holds, weight_list
from .checks import check_number, did_you_mean, explained
from .ops.check import flag
from .ops.types import Support
from .search import ChunkBeamSearch, ParticleFilter, Recipe, entropy_above

__all__ = [
    "args",
    "arithmetic",
    "avoid",
    "cards",
    "cfg",
    "contrastive",
    "dera",
    "eft",
    "fudge",
    "genarm",
    "gsi",
    "ivg",
    "mod",
    "particles",
    "proxy_tuning",
]
# The presets that give a `Recipe`, and the blends of these.
RECIPES = {
    "cards": "base",
    "gsi": "sampler",
    "ivg": "eft(base, tuned, ref)",
    "particles": "base",
}


def __dir__() -> list[str]:
    return __all__


@explained()
def eft(base: Any, tuned: Any, ref: Any, beta: Weight = 1.0) -> Blend:
    """Emulated fine-tuning: ``base + beta * (tuned - ref)``.

    What tuning did to a small model, the difference of `tuned` and its own start `ref`, is added to
    a large one. A `beta` above 1 exaggerates it, one below 0 reverses it. Three forwards, or two
    where `base` is one of the others.

    Source: Mitchell et al., arXiv:2310.12962.
    """
    beta = check_weight("beta", beta)
    return _blend(base, "base") + beta * (_blend(tuned, "tuned") - _blend(ref, "ref"))


@explained()
def proxy_tuning(base: Any, expert: Any, antiexpert: Any, alpha: Weight = 1.0) -> Blend:
    """Proxy-tuning and DExperts: ``base + alpha * (expert - antiexpert)``. Three forwards.

    The papers add raw logits where this adds log-probs. The distribution is the same, as the two
    differ by one number for all tokens.

    Source: Liu et al., arXiv:2401.08565; DExperts, Liu et al., arXiv:2105.03023.
    """
    alpha = check_weight("alpha", alpha)
    return _blend(base, "base") + alpha * (
        _blend(expert, "expert") - _blend(antiexpert, "antiexpert")
    )


@explained()
def dera(ref: Any, aligned: Any, lam: Weight) -> Blend:
    """Decoding-time realignment: ``(1 - lam) * ref + lam * aligned``. Two forwards.

    If `aligned` was trained with KL weight ``beta`` towards `ref`, this approximates training with
    ``beta / lam``. A `lam` of 0 is `ref`, 1 is `aligned`, and more than 1 is less regularised than
    either. `ref` stays a term at ``lam = 1``, since the KL to it is what `lam` moves.

    Source: Liu et al., arXiv:2402.02992.
    """
    lam = check_weight("lam", lam)
    return (1.0 - lam) * _blend(ref, "ref") + lam * _blend(aligned, "aligned")


@explained()
def mod(
    models: Sequence[Any], weights: Sequence[Weight], divergence: str | float = "reverse_kl"
) -> Blend:
    """Multi-objective decoding: a model an objective, mixed by preference weights that sum to 1.

    The rule follows from the divergence that the models were trained with:

    - ``"reverse_kl"``: ``sum_k w_k log p_k``, the geometric blend.
    - ``"forward_kl"``: ``(sum_k w_k / p_k)^-1``, the harmonic mean.
    - a number alpha: ``(sum_k w_k p_k^-alpha)^(-1/alpha)``, of which 0 and 1 are the two above.

    One forward a model. For all but reverse KL the rule is the paper's approximation: the exact
    optimum also depends on the reference model.

    Source: Shi et al., arXiv:2406.18853.
    """
    known = {"reverse_kl": 0.0, "forward_kl": 1.0}
    if isinstance(divergence, str):
        if divergence not in known:
            raise ValueError(
                f"divergence is {divergence!r}; it must be 'reverse_kl', 'forward_kl' or a number"
                f"{did_you_mean(divergence, known)}"
            )
        alpha = known[divergence]
    else:
        alpha = check_number("divergence", divergence)
    blend = power_mean(models, weights, r=-alpha)
    check_sum(blend.weights)
    return blend


@explained()
def genarm(base: Any, arms: Sequence[Any], weights: Sequence[Weight]) -> Blend:
    """GenARM: ``base + sum_i weights[i] * arms[i]``; the arms are autoregressive reward models.

    A weight is the share of its objective, divided by the KL weight beta. One forward a model.

    Source: Xu et al., arXiv:2410.08193.
    """
    if not isinstance(arms, (list, tuple)):
        raise TypeError(f"arms is a {type(arms).__name__}; it must be a list")
    weights = weight_list("weights", weights)
    if len(weights) != len(arms):
        raise ValueError(f"weights has {len(weights)} members; it must have {len(arms)}, as arms")
    blend = _blend(base, "base")
    for i, (arm, weight) in enumerate(zip(arms, weights, strict=True)):
        blend += check_weight(f"weights[{i}]", weight) * _blend(arm, f"arm{i}")
    return blend


@explained()
def contrastive(expert: Any, amateur: Any, beta: Weight = 0.5, alpha: float = 0.1) -> Blend:
    """Contrastive decoding: ``(1 + beta) * expert - beta * amateur`` on the expert's likely tokens.

    Tokens whose probability is less than `alpha` times the expert's largest are removed first. Two
    forwards. The first paper's ``log p_expert - log p_amateur`` is the limit of a large `beta` when
    sampled at the temperature `beta`.

    Source: O'Brien and Lewis, arXiv:2309.09117 (this form and the defaults); Li et al.,
    arXiv:2210.15097.
    """
    beta = check_weight("beta", beta)
    blend = (1.0 + beta) * _blend(expert, "expert") - beta * _blend(amateur, "amateur")
    return blend.within(Support(term=0, min_p=check_number("alpha", alpha)))


@explained()
def cfg(
    model: Any,
    scale: Weight,
    *,
    negative_prompt: Any = None,
    negative_system: str | None = None,
) -> Blend:
    """Classifier-free guidance: ``uncond + scale * (cond - uncond)``, one model and two prompts.

    The term `cond` reads the request. The term `uncond` reads `negative_prompt` in its place, or
    has `negative_system` as its system prompt, or both. A scale of 1 is the model itself. Two rows
    of one model. The blend is written ``scale * cond + (1 - scale) * uncond``, so that `cond` is
    its base.

    Args:
        model: a `Model` or a bare one.
        scale: how far the guidance goes.
        negative_prompt: one prompt, a list of one a request, or a function of the request, such as
            one that drops all but its end.
        negative_system: a system prompt.

    Raises:
        TypeError: `model` is something else.
        ValueError: neither of the negative prompts is given.

    Source: Sanchez et al., arXiv:2306.17806.
    """
    if negative_prompt is None and negative_system is None:
        raise ValueError(
            "negative_prompt and negative_system are None; one of them must be given, or the model "
            "is contrasted with itself"
        )
    scale = check_weight("scale", scale)
    cond = Model(model, name="cond") if isinstance(model, nn.Module) else model
    if not isinstance(cond, Model):
        raise TypeError(f"model is a {type(cond).__name__}; it must be a Model or a bare one")
    uncond = replace(
        cond,
        prompt=cond.prompt if negative_prompt is None else negative_prompt,
        system=cond.system if negative_system is None else negative_system,
        name="uncond",
    )
    return scale * cond + (1.0 - scale) * uncond


@explained()
def args(base: Any, value: Any, weight: Weight = 1.0, top_k: int = 10) -> Blend:
    """ARGS: ``base + weight * value`` on the base's `top_k` most likely tokens.

    `value` is a `ValueHead` or the bare model of one. Its Q-head scores every next token in one
    forward, where the paper runs a reward model on each candidate. A `top_k` of 0 leaves all tokens
    in. Two forwards.

    Source: Khanov et al., arXiv:2402.01694; IVG's token variant, arXiv:2409.17819.
    """
    head = ValueHead(value, name="value") if isinstance(value, nn.Module) else value
    blend = _blend(base, "base").within(Support(term=0, top_k=top_k) if top_k else None)
    return blend + check_weight("weight", weight) * as_term("value", head, ValueHead)


@explained()
def fudge(base: Any, classifier: Any, weight: Weight = 1.0) -> Blend:
    """FUDGE: ``base + weight * classifier`` on the base's ``classifier.top`` most likely tokens.

    `classifier` is a `Classifier`. With a `weight` of 1 it is Bayes' rule: the base, given that the
    text will be of the class. Other tokens are removed, where ``base + weight * classifier`` alone
    keeps them. One forward of the base, and the classifier's own for as many texts.

    Source: Yang and Klein, arXiv:2104.05218.
    """
    if not isinstance(classifier, Classifier):
        raise TypeError(
            f"classifier is a {type(classifier).__name__}; it must be a Classifier, without its "
            "weight: fudge(base, Classifier(model, tokenizer, label), weight)"
        )
    kept = _blend(base, "base").within(Support(term=0, top_k=classifier.top))
    return kept + check_weight("weight", weight) * classifier


@explained()
def avoid(base: Any, attribute: Any, lam: Weight = 0.96) -> Blend:
    """Biasing away from an attribute: ``(base - lam * union(attribute, base)) / (1 - lam)``.

    `attribute` is the base with a system prompt that asks for what is not wanted, or a model of
    that. Where the base finds a token more likely than it, nothing changes; where `attribute` does,
    the token becomes less likely. ``base - lam * attribute`` would raise tokens for being unlikely
    under `attribute` alone. Two forwards.

    Args:
        base, attribute: `Model` terms or bare models.
        lam: below 1.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.

    Source: Dekoninck et al., arXiv:2311.14479 (the toxicity experiments, lam 0.9 to 0.99).
    """
    lam = check_weight("lam", lam)
    if not holds(lam < 1):
        raise ValueError(f"lam is {lam}; it must be below 1")
    base, attribute = (
        Model(x, name=name) if isinstance(x, nn.Module) else as_term(name, x, Model)
        for name, x in (("base", base), ("attribute", attribute))
    )
    scale = 1 / (1 - lam)
    return scale * base - lam * scale * union(attribute, base)


@explained()
def arithmetic(formula: Any) -> Blend:
    """A formula as language-model arithmetic means it: divided by the sum of its weights.

    There ``a - 0.6 * b`` is sampled as ``(a - 0.6 * b) / 0.4``, so that a formula is no flatter and
    no sharper for its weights' sum. A union or an intersection counts with its own weight, values
    and classifiers with none.

    Raises:
        TypeError: `formula` is no blend. ValueError: the weights of its models sum to 0 or less.

    Source: Dekoninck et al., arXiv:2311.14479, theorem 1.
    """
    blend = as_blend(formula, "formula")
    each = [*blend.weights, *(w for part in blend.parts for w in part.weights)]
    total = sum(each, 0.0)
    if not holds(total > 0):
        sums = total.tolist() if isinstance(total, Tensor) else f"{total:g}"
        raise ValueError(f"formula is {blend}, whose weights sum to {sums}; it must be above 0")
    return blend * (1 / total)


@explained()
def ivg(
    base: Any,
    tuned: Any,
    ref: Any,
    value: Any,
    beta: Weight = 1.0,
    *,
    width: int = 4,
    samples: int = 4,
    chunk_length: int | None = 5,
) -> Recipe:
    """Integrated value guidance: an implicit value guides each token, an explicit one each chunk.

    ``base + beta * (tuned - ref)`` is sampled, and `ChunkBeamSearch` keeps the rows that `value`
    scores highest. The paper sets (width, samples, chunk_length) to (4, 4, 5) for short texts and
    to (2, 2, 30) for following instructions.

    Args:
        value: a `ValueHead`, the bare model of one, or any other value.

    Source: Liu et al., arXiv:2409.17819.
    """
    search = ChunkBeamSearch(width, samples, chunk_length, _value(value))
    return Recipe(eft(base, tuned, ref, beta), search)


@explained()
def gsi(
    target: Any,
    sampler: Any,
    value: Any,
    beta: float = 1.0,
    *,
    samples: int = 4,
    chunk_length: int | None = 32,
    chunk_end: Any = None,
    best: bool = False,
) -> Recipe:
    """Guided speculative inference: a cheap sampler proposes chunks for a target.

    Of `samples` chunks of `sampler` one goes on, drawn by ``exp(beta * V + log p_target - log
    p_sampler)`` of it. The paper also asks the target to write a chunk where that of the drawn one
    is low; here the sampler writes all of them. A chunk costs forwards of the sampler for its
    tokens, and one of the target.

    Args:
        target, sampler: `Model` terms or bare models of one vocabulary.
        beta: above 0.
        chunk_end: what else ends a chunk, as in `ChunkBeamSearch`; the paper's end with paragraphs.
        best: whether the chunk of the largest score goes on, in place of a drawn one.

    Source: Geuter et al., arXiv:2506.04118.
    """
    meant, proposes = (
        Model(x, name=name) if isinstance(x, nn.Module) else as_term(name, x, Model)
        for name, x in (("target", target), ("sampler", sampler))
    )
    if meant.model is proposes.model and meant == replace(proposes, name=meant.name):
        raise ValueError(f"target and sampler are both {proposes}; they must differ")
    beta = check_number("beta", beta)
    if beta <= 0:
        raise ValueError(f"beta is {beta:g}; it must be above 0")
    search = ChunkBeamSearch(
        1,
        samples,
        chunk_length,
        beta * _value(value),
        chunk_end,
        tilt=LogRatio(meant, proposes),
        selection_temperature=0.0 if flag("best", best) else 1.0,
    )
    return Recipe(as_blend(proposes), search)


@explained()
def cards(
    base: Any, value: Any, nats: float, *, samples: int = 4, chunk_length: int | None = 64
) -> Recipe:
    """Cascade reward sampling: the best of several segments, which end where the base is uncertain.

    A segment ends before a token whose distribution has an entropy above `nats`, or after
    `chunk_length` tokens. Of `samples` segments the one of the highest value goes on; the paper
    draws one after the other until the value of one is accepted.

    Source: Li et al., arXiv:2406.16306.
    """
    search = ChunkBeamSearch(1, samples, chunk_length, _value(value), entropy_above(nats))
    return Recipe(_blend(base, "base"), search)


@explained()
def particles(
    base: Any, value: Any, n: int = 8, temperature: float = 1.0, *, chunk_length: int | None = 32
) -> Recipe:
    """Particle filtering: a sample of ``p_base(y|x) exp(V(x, y) / temperature) / Z``.

    n rows are resampled by their values after every chunk; see `ParticleFilter`.

    Source: Puri et al., arXiv:2502.01618; Zhao et al., arXiv:2404.17546.
    """
    search = ParticleFilter(n, chunk_length, _value(value), temperature)
    return Recipe(_blend(base, "base"), search)


def _blend(x: Any, name: str) -> Blend:
    """`x` as a blend. A bare model gets the name of its role; terms and blends keep theirs."""
    return as_blend(Model(x, name=name) if isinstance(x, nn.Module) else x)


def _value(x: Any) -> ValueSum:
    """What a search chooses by. A bare model is that of a `ValueHead`."""
    return as_value(ValueHead(x, name="value") if isinstance(x, nn.Module) else x)
