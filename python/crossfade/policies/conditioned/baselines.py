"""Other ways to steer a model by weights of rewards, with the interface of `ConditionedPolicy`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...blends.blend import Blend, Model, as_blend
from ...blends.weights import Weight
from ...checks import explained
from ...decoding.inputs import with_system
from ...models.adapters import adapter_configs
from ...models.hf import check_language_model, check_tokenizer, is_peft
from .fresh import placed, with_new_adapters
from .preferences import KL, by_request, one_for_all, preference, times


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
        _check_models(models)
        self.ref = None if ref is None else as_blend(ref, "ref")
        self.models = {n: as_blend(m, f"models[{n!r}]") for n, m in models.items()}
        self.rewards = tuple(self.models)

    def at(self, weights: Mapping[str, Any], kl: Any = 0.0) -> Blend:
        """The blend at some weights; `weights` and `kl` as in `ConditionedPolicy.at`."""
        of_rewards, weight = preference(self.rewards, weights, kl)
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


class SoupPolicy:
    """A fully trained model for each reward: ``ref + (1 - kl) * sum_k w_k (model_k - ref)``.

    A rewarded soup (arXiv:2306.04488) of models whose every parameter was trained. `at` averages
    anew at each call, into a model of its own, which costs one forward a token and the memory of a
    model. Of adapters, `ConditionedPolicy.from_adapters` makes a soup that costs no such copy, and
    serves other weights for each request.

    Args:
        base: the plain causal LM that all were trained from.
        models: the plain model of each reward, by the reward's name.
        tokenizer: of the terms that `at` gives.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
    """

    @explained()
    def __init__(self, base: Any, models: Mapping[str, Any], tokenizer: Any = None) -> None:
        _check_models(models)
        check_tokenizer(tokenizer)
        for name, model in (("base", base), *((f"models[{n!r}]", m) for n, m in models.items())):
            check_language_model(model, head=True)
            if is_peft(model) or adapter_configs(model):
                raise TypeError(
                    f"{name} is a {type(model).__name__} with PEFT adapters; it must be a plain "
                    "model"
                )
            _check_same_parameters(name, model, base)
        self.base, self.models, self.tokenizer = base, dict(models), tokenizer
        self.rewards = tuple(models)

    def at(self, weights: Mapping[str, Any], kl: Any = 0.0) -> Model:
        """The averaged model as a term; `weights` and `kl` as in `merged`."""
        return Model(self.merged(weights, kl), tokenizer=self.tokenizer, name="soup")

    @torch.no_grad()
    def merged(self, weights: Mapping[str, Any], kl: Any = 0.0) -> Any:
        """The averaged model. Sums are in float32 whatever the dtype, and are rounded once.

        Args:
            weights, kl: as in `ConditionedPolicy.at`, but numbers alone.
        """
        of_rewards, weight = one_for_all(self.rewards, weights, kl)
        model = copy.deepcopy(self.base)
        theirs = {n: dict(m.named_parameters()) for n, m in self.models.items()}
        for key, own in model.named_parameters():
            total = own.float()
            for name, w in of_rewards.items():
                if w != 0:
                    delta = theirs[name][key].to(own.device).float() - own.float()
                    total = total + (1 - weight) * w * delta
            own.copy_(total)
        model.config._name_or_path = ""  # It is not the model that was loaded from there any more.
        return model


def _check_models(models: Any) -> None:
    if not isinstance(models, Mapping) or not models:
        raise TypeError(f"models is {models!r:.80}; it must be a dict with a model for each reward")
    _check_no_kl("models", models)


def _check_no_kl(where: str, rewards: Container[str]) -> None:
    if KL in rewards:
        raise ValueError(f"{where} has {KL!r}, the name of the KL weight; rewards have others")


def _check_same_parameters(name: str, model: Any, base: Any) -> None:
    """Refuse a model whose parameters are not those of the base, by name and shape."""
    own, theirs = ({key: list(p.shape) for key, p in x.named_parameters()} for x in (base, model))
    for key in {**own, **theirs}:
        if own.get(key) != theirs.get(key):
            raise ValueError(
                f"{name} has {theirs.get(key, 'nothing')} for {key}, and base has "
                f"{own.get(key, 'nothing (or ties it to another)')}; they must be alike"
            )


PROMPTED = "prompted"  # the name of the adapter of a policy that is trained


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
        _check_no_kl("rewards", rewards)
        if not callable(prompt):
            raise TypeError(
                f"prompt is a {type(prompt).__name__}; it must be a function of the weights and kl"
            )
        self.model: Any = model if term is None else term.model
        self.base: Any = None
        self.adapter: Any = "active" if term is None else term.adapter
        self.tokenizer = tokenizer or (None if term is None else term.tokenizer)
        self.rewards, self.prompt = tuple(rewards), prompt

    @classmethod
    @explained()
    def create(
        cls,
        base: Any,
        rewards: Sequence[str],
        lora: Any,
        tokenizer: Any,
        *,
        prompt: Callable[[Mapping[str, float], float], str] = weights_as_text,
    ) -> PromptedPolicy:
        """A policy that `crossfade.training.CLPTrainer` is to train to follow its system prompts.

        It begins as the base. Its adapter, named ``prompted``, is saved as PEFT saves adapters.

        Args:
            base: the plain causal LM, the reference; its weights are shared.
            rewards, tokenizer, prompt: as above.
            lora: a `peft.LoraConfig` of the adapter, as in `ConditionedPolicy.create`.

        Raises:
            TypeError, ValueError: names the argument, what it was and what it must be.
        """
        check_language_model(base, head=True)
        config = placed(base, "lora", lora, "full")
        model = with_new_adapters(base, {PROMPTED: config}).eval()
        term = Model(model, tokenizer=tokenizer, adapter=PROMPTED)
        policy = cls(term, rewards, prompt=prompt)
        policy.base = base
        return policy

    @property
    def trained(self) -> tuple[str, ...]:
        """The name of the adapter that is trained."""
        return (PROMPTED,)

    def mix(self, weights: Mapping[str, Any], kl: Any = 0.0) -> dict[str, Weight]:
        """How much of its adapter the model has: all, whatever the weights."""
        return {PROMPTED: 1.0}

    def told(self, request: Any, weights: Mapping[str, float], kl: float) -> Any:
        """A text or a chat as the model reads it, with the system prompt for some weights."""
        return with_system(request, self.prompt(weights, kl), "the prompted policy")

    def save(self, folder: Any) -> None:
        """Save the adapter of a policy that `create` made, in the folder ``prompted`` of it."""
        self.model.save_pretrained(
            folder, selected_adapters=[PROMPTED], save_embedding_layers=False
        )

    def at(self, weights: Mapping[str, Any], kl: Any = 0.0) -> Model:
        """The model with the system prompt for some weights.

        Args:
            weights, kl: as in `ConditionedPolicy.at`. Where one is a tensor ``[requests]``, each
                request has a system prompt of its own.
        """
        each = by_request(self.rewards, weights, kl)
        if each is None:
            system: Any = self.prompt(*one_for_all(self.rewards, weights, kl))
        else:
            system = [self.prompt(*own) for own in each]
        return Model(
            self.model,
            tokenizer=self.tokenizer,
            adapter=self.adapter,
            system=system,
            name="prompted",
        )
