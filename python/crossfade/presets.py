"""Blends of the literature, by name. Models may be bare, `Model` terms, or blends of them.

Every preset is an ordinary `Blend`: what it prints is its formula, and it can go on into others;
`ivg` is a `Recipe`, a blend and its search.
Cost is counted in forwards a token; what merges or has weight 0 is not computed (see `Blend`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from .blend import Blend, Model, ValueHead, as_blend, as_term, power_mean
from .ops.types import Support
from .search import ChunkBeamSearch, Recipe
from .weights import Weight, check_number, check_sum, check_weight


def eft(base: Any, tuned: Any, ref: Any, beta: Weight = 1.0) -> Blend:
    """Emulated fine-tuning: ``base + beta * (tuned - ref)``.

    What tuning did to a small model (`tuned` against its own start, `ref`) is added to a large one.
    `beta` above 1 exaggerates it, below 0 reverses it. Three forwards; `base` may be `ref` or
    `tuned`, which merge.

    Source: Mitchell et al., arXiv:2310.12962.
    """
    beta = check_weight("beta", beta)
    return _blend(base, "base") + beta * (_blend(tuned, "tuned") - _blend(ref, "ref"))


def proxy_tuning(base: Any, expert: Any, antiexpert: Any, alpha: Weight = 1.0) -> Blend:
    """Proxy-tuning, DExperts: ``base + alpha * (expert - antiexpert)``. Three forwards.

    The papers add raw logits and this adds log-probs: the same distribution, as normalisers cancel.

    Source: Liu et al., arXiv:2401.08565; DExperts, Liu et al., arXiv:2105.03023.
    """
    alpha = check_weight("alpha", alpha)
    return _blend(base, "base") + alpha * (
        _blend(expert, "expert") - _blend(antiexpert, "antiexpert")
    )


def dera(ref: Any, aligned: Any, lam: Weight) -> Blend:
    """Decoding-time realignment: ``(1 - lam) * ref + lam * aligned``. Two forwards.

    If `aligned` was trained with KL weight ``beta`` towards `ref`, this approximates training with
    ``beta / lam``: 0 is `ref`, 1 is `aligned`, above 1 is less regularised than either. `ref` stays
    a term at ``lam = 1``, since the KL to it is what the fader moves.

    Source: Liu et al., arXiv:2402.02992.
    """
    lam = check_weight("lam", lam)
    return (1.0 - lam) * _blend(ref, "ref") + lam * _blend(aligned, "aligned")


def mod(
    models: Sequence[Any], weights: Sequence[Weight], divergence: str | float = "reverse_kl"
) -> Blend:
    """Multi-objective decoding: one model an objective, mixed by preference weights of sum 1.

    The rule is that of the divergence which the models were trained with:

    - ``"reverse_kl"``: ``sum_k w_k log p_k``, the geometric blend.
    - ``"forward_kl"``: ``(sum_k w_k / p_k)^-1``, the harmonic mean.
    - a number alpha: ``(sum_k w_k p_k^-alpha)^(-1/alpha)``; 0 and 1 are the two above.

    One forward a model. For all but reverse KL the rule is the paper's decoding heuristic: the
    exact optimum has the reference model in it too.

    Source: Shi et al., arXiv:2406.18853.
    """
    known = {"reverse_kl": 0.0, "forward_kl": 1.0}
    if isinstance(divergence, str):
        if divergence not in known:
            raise ValueError(
                f"divergence is {divergence!r}; it must be 'reverse_kl', 'forward_kl' or a number"
            )
        alpha = known[divergence]
    else:
        alpha = check_number("divergence", divergence)
    blend = power_mean(models, weights, r=-alpha)
    check_sum(blend.weights)
    return blend


def genarm(base: Any, arms: Sequence[Any], weights: Sequence[Weight]) -> Blend:
    """GenARM: ``base + sum_i weights[i] * arms[i]``, arms being autoregressive reward models.

    A weight is one over the KL weight beta, times the objective's share. One forward a model.

    Source: Xu et al., arXiv:2410.08193.
    """
    for name, x in (("arms", arms), ("weights", weights)):
        if not isinstance(x, (list, tuple)):
            raise TypeError(f"{name} is a {type(x).__name__}; it must be a list")
    if len(weights) != len(arms):
        raise ValueError(f"weights has {len(weights)} members; it must have {len(arms)}, as arms")
    blend = _blend(base, "base")
    for i, (arm, weight) in enumerate(zip(arms, weights, strict=True)):
        blend += check_weight(f"weights[{i}]", weight) * _blend(arm, f"arm{i}")
    return blend


def contrastive(expert: Any, amateur: Any, beta: Weight = 0.5, alpha: float = 0.1) -> Blend:
    """Contrastive decoding: ``(1 + beta) * expert - beta * amateur`` on the expert's likely tokens.

    Tokens with less than `alpha` times the expert's largest probability are removed first. Two
    forwards. The original's ``log p_expert - log p_amateur`` is the limit of a large `beta` at a
    temperature of `beta`.

    Source: O'Brien and Lewis, arXiv:2309.09117 (this form and the defaults); Li et al.,
    arXiv:2210.15097.
    """
    beta = check_weight("beta", beta)
    blend = (1.0 + beta) * _blend(expert, "expert") - beta * _blend(amateur, "amateur")
    return blend.within(Support(term=0, min_p=check_number("alpha", alpha)))


def cfg(
    model: Any,
    scale: Weight,
    *,
    negative_prompt: Any = None,
    negative_system: str | None = None,
) -> Blend:
    """Classifier-free guidance: ``uncond + scale * (cond - uncond)``, one model and two prompts.

    `cond` reads the request. `uncond` reads `negative_prompt` in its place (one, a list of one a
    request, or a function of the request, such as one that drops all but its end) or has
    `negative_system` for a system prompt, or both. A scale of 1 is the model itself. Two rows of
    one model; written ``scale * cond + (1 - scale) * uncond``, so that `cond` is the base.

    Raises:
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


def args(base: Any, value: Any, weight: Weight = 1.0, top_k: int = 10) -> Blend:
    """ARGS: ``base + weight * value`` on the base's `top_k` most likely tokens (0: on all).

    `value` is a `ValueHead` or the bare model of one: a Q-head scores every next token in one
    forward, where the paper runs a reward model on each candidate. Two forwards.

    Source: Khanov et al., arXiv:2402.01694; IVG's token variant, arXiv:2409.17819.
    """
    head = ValueHead(value, name="value") if isinstance(value, nn.Module) else value
    blend = _blend(base, "base").within(Support(term=0, top_k=top_k) if top_k else None)
    return blend + check_weight("weight", weight) * as_term("value", head, ValueHead)


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
    """Integrated value guidance: the implicit value a token, the explicit one a chunk.

    ``base + beta * (tuned - ref)`` is sampled, and `ChunkBeamSearch` keeps the rows that `value`
    scores highest. The paper's settings of (width, samples, chunk_length): 4, 4, 5 for short texts
    and 2, 2, 30 for following instructions.

    Args:
        value: a `ValueHead`, the bare model of one, or any other value.

    Source: Liu et al., arXiv:2409.17819.
    """
    head = ValueHead(value, name="value") if isinstance(value, nn.Module) else value
    search = ChunkBeamSearch(width, samples, chunk_length, head)
    return Recipe(eft(base, tuned, ref, beta), search)


def _blend(x: Any, name: str) -> Blend:
    """A bare model under its role's name; terms and blends as they are."""
    return as_blend(Model(x, name=name) if isinstance(x, nn.Module) else x)
