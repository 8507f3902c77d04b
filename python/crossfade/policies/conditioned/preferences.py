"""What a policy is asked for: how much each reward counts, and the KL to the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...blends.weights import Weight, check_weight
from ...checks import did_you_mean

TOLERANCE = 1e-4  # how far weights may be from a sum of one
KL = "kl"  # the name that the KL weight has among weights, and so no name of a reward


def preference(rewards: Sequence[str], weights: Any, kl: Any) -> tuple[dict[str, Weight], Weight]:
    """The weight of each reward, of which those of a request sum to one, and the KL weight.

    Args:
        weights: as in `reward_weights`. Or with "kl" among them, as the weightings of a sweep have
            it: then all of them sum to one, and those of the rewards are divided by what "kl"
            leaves; where it leaves nothing, all rewards count alike.
        kl: the KL weight, if `weights` has none.

    Raises:
        TypeError, ValueError: names the entry, what it was and what it must be.
    """
    if not isinstance(weights, Mapping) or KL not in weights:
        return reward_weights(rewards, weights), kl_weight(kl)
    if not isinstance(kl, (int, float)) or kl != 0:
        raise ValueError("weights has 'kl', and kl is given too; it must be in one of them")
    found = reward_weights((*rewards, KL), weights)
    weight = kl_weight(found.pop(KL))
    left: Weight = 1.0 - weight
    return {name: _part(w, left, 1 / len(found)) for name, w in found.items()}, weight


def reward_weights(rewards: Sequence[str], weights: Any) -> dict[str, Weight]:
    """The weight of each reward: those of `weights`, and 0 for rewards that it leaves out.

    Args:
        rewards: the names that there are.
        weights: numbers, or tensors or lists ``[requests]`` of them, by the names of rewards. None
            is negative, and those of each request sum to one.

    Raises:
        TypeError, ValueError: names the entry, what it was and what it must be.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(
            f"weights is a {type(weights).__name__}; it must be a dict with a weight for each of "
            f"{list(rewards)}"
        )
    for name in weights:
        if name not in rewards:
            raise ValueError(
                f"weights has {name!r}, which is no reward; it must have names of {list(rewards)}"
                f"{did_you_mean(name, rewards)}"
            )
    found = {name: check_weight(f"weights[{name!r}]", weights.get(name, 0.0)) for name in rewards}
    for name, w in found.items():
        _check_range(f"weights[{name!r}]", w, 0.0, None)
    total = _total(found)
    off = [x for x in total if not abs(x - 1) <= TOLERANCE]
    if off:
        where = "" if len(total) == 1 else f" for request {total.index(off[0])}"
        raise ValueError(f"weights sum to {off[0]:.6g}{where}; they must sum to 1")
    return found


def kl_weight(kl: Any) -> Weight:
    """The KL weight, a number or a tensor ``[requests]`` within [0, 1].

    Raises:
        TypeError, ValueError: names it, and says what it was and what it must be.
    """
    found = check_weight("kl", kl)
    _check_range("kl", found, 0.0, 1.0)
    return found


def one_for_all(rewards: Sequence[str], weights: Any, kl: Any) -> tuple[dict[str, float], float]:
    """The weights of rewards and the KL weight where all requests have the same.

    Raises:
        TypeError, ValueError: as `reward_weights` and `kl_weight`, or one is not a number.
    """
    of_rewards, weight = preference(rewards, weights, kl)
    for name, w in (*((f"weights[{n!r}]", w) for n, w in of_rewards.items()), ("kl", weight)):
        if isinstance(w, Tensor):
            raise ValueError(
                f"{name} has a number for each request; here all requests have one model, so that "
                "it must be a number"
            )
    return {n: float(w) for n, w in of_rewards.items()}, float(weight)


def by_request(
    rewards: Sequence[str], weights: Any, kl: Any
) -> list[tuple[dict[str, float], float]] | None:
    """For each request the weights of rewards and the KL weight; None if all have the same.

    Raises:
        TypeError, ValueError: as `preference`, or two are of different numbers of requests.
    """
    of_rewards, weight = preference(rewards, weights, kl)
    each = [*of_rewards.values(), weight]
    tensors = [w for w in each if isinstance(w, Tensor)]
    if not tensors:
        return None
    _check_length("weights and kl", tensors[0], tensors[-1])
    n = len(tensors[0])
    columns = [w.tolist() if isinstance(w, Tensor) else [w] * n for w in each]
    return [
        (dict(zip(of_rewards, own, strict=True)), last) for *own, last in zip(*columns, strict=True)
    ]


def times(a: Weight, b: Weight, name: str) -> Weight:
    """``a * b``, of numbers or tensors ``[requests]``.

    Raises:
        ValueError: the two are of different numbers of requests; calls them `name`.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        _check_length(name, a, b)
        return a.cpu() * b.cpu()
    return a * b


def _check_length(name: str, a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(
            f"{name} are [{len(a)}] and [{len(b)}]; they must have one length, one a request"
        )


def _part(w: Weight, whole: Weight, of_nothing: float) -> Weight:
    """``w / whole``, of numbers or tensors ``[requests]``, and `of_nothing` where `whole` is 0."""
    if not isinstance(w, Tensor) and not isinstance(whole, Tensor):
        return w / whole if whole else of_nothing
    w, whole = (torch.as_tensor(x, dtype=torch.float32, device="cpu") for x in (w, whole))
    return torch.where(whole == 0, of_nothing, w / whole)


def _check_range(name: str, w: Weight, lowest: float, highest: float | None) -> None:
    each = w.tolist() if isinstance(w, Tensor) else [w]
    for i, x in enumerate(each):
        if not (x >= lowest and (highest is None or x <= highest)):
            where = f"{name}[{i}]" if isinstance(w, Tensor) else name
            must = "it must not be negative" if highest is None else "it must be within [0, 1]"
            raise ValueError(f"{where} is {x:.6g}; {must}")


def _total(weights: Mapping[str, Weight]) -> list[float]:
    """The sum of the weights: one for all requests, or one for each."""
    counts = {name: len(w) for name, w in weights.items() if isinstance(w, Tensor)}
    if len(set(counts.values())) > 1:
        each = " and ".join(f"[{n}] for {name!r}" for name, n in counts.items())
        raise ValueError(f"weights has {each}; they must have one length, one a request")
    total = torch.zeros(max(counts.values(), default=1), dtype=torch.float64, device="cpu")
    for w in weights.values():
        total += w.cpu().double() if isinstance(w, Tensor) else w
    return total.tolist()
