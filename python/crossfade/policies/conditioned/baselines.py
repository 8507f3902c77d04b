"""Other ways to steer a model by weights of rewards, with the interface of `ConditionedPolicy`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ...blends.blend import Blend, Model, as_blend
from ...blends.weights import Weight
from ...checks import explained
from ...models.hf import check_language_model
from .preferences import kl_weight, reward_weights, times


class DecodedPolicy:
    """A model for each reward, blended token by token: ``kl * ref + (1 - kl) * sum_k w_k log p_k``.

    With ``kl=0`` it is multi-objective decoding (MOD, arXiv:2406.18853), with one model it is
    decoding-time realignment (DeRa, arXiv:2402.02992). A token costs a forward of every model whose
    weight is not 0; where they are adapters over one base, these are rows of one forward.

    Args:
        ref: the reference, a model or a term; None where `kl` is always 0.
        models: the model or term of each reward, by the reward's name.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
    """

    @explained()
    def __init__(self, ref: Any, models: Mapping[str, Any]) -> None:
        if not isinstance(models, Mapping) or not models:
            raise TypeError(
                f"models is {models!r:.80}; it must be a dict with a model for each reward"
            )
        self.ref = None if ref is None else as_blend(ref, "ref")
        self.models = {n: as_blend(m, f"models[{n!r}]") for n, m in models.items()}
        self.rewards = tuple(self.models)

    def at(self, weights: Mapping[str, Any], kl: Any = 0.0) -> Blend:
        """The blend at some weights; `weights` and `kl` as in `ConditionedPolicy.at`."""
        of_rewards, weight = reward_weights(self.rewards, weights), kl_weight(kl)
        left: Weight = 1.0 - weight
        parts = [(times(left, w, "weights and kl"), self.models[n]) for n, w in of_rewards.items()]
        if isinstance(weight, Tensor) or weight > 0:
            if self.ref is None:
                raise ValueError(f"kl is {weight}, and ref is None; with a ref it can be above 0")
            parts.append((weight, self.ref))
        used = [(w, blend) for w, blend in parts if isinstance(w, Tensor) or w != 0]
        found = used[0][0] * used[0][1]
        for w, blend in used[1:]:
            found += w * blend
        return found


def weights_as_text(weights: Mapping[str, float], kl: float) -> str:
    """What a prompted policy is told: ``[helpful: 0.70] [brief: 0.30] [KL: 0.10]``."""
    each = [f"[{name}: {w:.2f}]" for name, w in weights.items()]
    return " ".join([*each, f"[KL: {kl:.2f}]"])


class PromptedPolicy:
    """A model that is told the weights in its system prompt.

    The model may be trained for such prompts, or be any chat model.

    Args:
        model: a causal LM, or a term.
        rewards: their names.
        tokenizer: of the model.
        prompt: makes the system prompt of a dict of weights and the KL weight.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
    """

    @explained()
    def __init__(
        self,
        model: Any,
        rewards: Sequence[str],
        tokenizer: Any = None,
        *,
        prompt: Callable[[Mapping[str, float], float], str] = weights_as_text,
    ) -> None:
        term = model if isinstance(model, Model) else None
        check_language_model(model if term is None else term.model, head=True)
        if isinstance(rewards, str) or not rewards or not all(isinstance(r, str) for r in rewards):
            raise TypeError(f"rewards is {rewards!r:.80}; it must be a list of names")
        if not callable(prompt):
            raise TypeError(
                f"prompt is a {type(prompt).__name__}; it must be a function of the weights and kl"
            )
        self.model = model if term is None else term.model
        self.adapter: Any = "active" if term is None else term.adapter
        self.tokenizer = tokenizer or (None if term is None else term.tokenizer)
        self.rewards, self.prompt = tuple(rewards), prompt

    def at(self, weights: Mapping[str, Any], kl: Any = 0.0) -> Model:
        """The model with the system prompt for some weights.

        Args:
            weights, kl: as in `ConditionedPolicy.at`, but numbers alone: a term has one system
                prompt.
        """
        of_rewards, weight = reward_weights(self.rewards, weights), kl_weight(kl)
        for name, w in (*of_rewards.items(), ("kl", weight)):
            if isinstance(w, Tensor):
                raise NotImplementedError(
                    f"the weight of {name} is a tensor [{len(w)}]; a prompt is the same for all "
                    "requests, so that it must be a number"
                )
        numbers = {n: float(w) for n, w in of_rewards.items()}
        return Model(
            self.model,
            tokenizer=self.tokenizer,
            adapter=self.adapter,
            system=self.prompt(numbers, float(weight)),
            name="prompted",
        )
