"""`ConditionedPolicy`: a reference and a delta for each reward, blended in weight space."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ...blends.blend import Model
from ...blends.saving import check_keys
from ...blends.weights import Weight
from ...checks import explained
from ...models import with_adapters
from ...models.adapters import check_mix
from ...models.saved import expanded, read_object
from ...models.saved_adapters import POLICY
from ...models.value_heads import shared_copy
from .checks import (
    PART,
    PathLike,
    check_base,
    check_choice,
    check_name,
    check_not_of_base,
    check_one_base,
    check_scope,
    check_weights_beside,
    folders_of,
)
from .fresh import placed, with_new_adapters
from .merging import merged
from .preferences import one_for_all, preference, times

SCOPES = ("full", "attention", "head")
SHARED = ("scaled", "trained")
FORMAT = 1


class ConditionedPolicy:
    """A language model with a dial for each reward and one for the KL to its reference.

    Its weights are ``ref + (1 - kl) * sum_k weights[k] * delta_k``, where ``delta_k`` is the LoRA
    of reward k. Where the deltas were trained together, for weights drawn at random, this is a
    conditioned language policy (CLP, arXiv:2407.15762). Where each was trained alone it is a
    rewarded soup (arXiv:2306.04488) or, with equal weights of those that a user asks for, a
    personalised soup (arXiv:2310.11564).

    `at` serves any weights, also others for each request of a batch, and costs one forward a token;
    `merged` gives a plain model of some. `from_adapters` and `load` make one of saved adapters,
    `create` one to be trained by `crossfade.training.CLPTrainer`.

    Attributes:
        rewards: their names.
        scope: which parameters have deltas: "full" (any linear layer), "attention" or "head".
        shared: what is trained besides and is the same for all weights: None for nothing, "scaled"
            by ``1 - kl``, so that ``kl=1`` is the reference, or "trained", and always whole.
        base: the plain model, which is left as it was given.
        model: the `peft.PeftModel` around a copy of its modules, over the same weights.
        tokenizer: that of its terms.
    """

    def __init__(
        self,
        base: Any,
        model: Any,
        rewards: tuple[str, ...],
        *,
        scope: str,
        shared: str | None,
        tokenizer: Any,
    ) -> None:
        self.base, self.model, self.rewards = base, model, rewards
        self.scope, self.shared, self.tokenizer = scope, shared, tokenizer

    def __repr__(self) -> str:
        parts = [type(self.base).__name__, f"rewards={list(self.rewards)}", f"scope={self.scope!r}"]
        parts += [f"shared={self.shared!r}"] if self.shared else []
        return f"ConditionedPolicy({', '.join(parts)})"

    @classmethod
    @explained()
    def from_adapters(
        cls,
        base: Any,
        adapters: Mapping[str, PathLike],
        *,
        scope: str = "full",
        shared: PathLike | None = None,
        shared_as: str = "scaled",
        tokenizer: Any = None,
    ) -> ConditionedPolicy:
        """A policy of an adapter for each reward, as PEFT saved them.

        Args:
            base: the plain causal LM that all of them were trained on, the reference, on the
                device where it is to run. Its modules are copied, and its weights are shared; it
                stays as it is.
            adapters: the folder of each reward's adapter, by the reward's name. They are plain LoRA
                on linear or embedding layers, of any ranks and scalings.
            scope: "full", "attention" or "head": where the adapters may be.
            shared: the folder of an adapter that all weightings have in common, such as one for the
                layers outside of `scope`.
            shared_as: "scaled": ``1 - kl`` multiplies it too; "trained": nothing does.
            tokenizer: of the terms that `at` gives.

        Raises:
            FileNotFoundError: a folder lacks an adapter as safetensors; names it.
            TypeError, ValueError: names the argument, what it was and what it must be: an adapter
                that does not fit the base, or is outside of the scope, or two of different bases.
            NotImplementedError: an adapter is no plain LoRA.
        """
        check_base(base, tokenizer)
        check_choice("scope", scope, SCOPES)
        check_choice("shared_as", shared_as, SHARED)
        folders = folders_of(adapters, shared)
        check_not_of_base(base, adapters, "adapters")
        check_one_base(base, folders)
        for name, folder in folders.items():
            where = "shared" if name == PART else f"adapters[{name!r}]"
            check_weights_beside(base, where, folder)
        with warnings.catch_warnings():
            # PEFT warns that a head with an adapter must not be merged while it is tied: `merged`
            # unties it.
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
            model = with_adapters(shared_copy(base), folders)
        check_mix(model, list(folders))
        for name in adapters:
            check_scope(model, name, scope)
        kind = None if shared is None else shared_as
        return cls(base, model, tuple(adapters), scope=scope, shared=kind, tokenizer=tokenizer)

    @classmethod
    @explained()
    def create(
        cls,
        base: Any,
        rewards: Sequence[str],
        lora: Any,
        *,
        scope: str = "full",
        shared: Any = None,
        shared_as: str = "scaled",
        tokenizer: Any = None,
    ) -> ConditionedPolicy:
        """A policy that is to be trained: the reference, whatever the weights.

        Args:
            base, scope, shared_as, tokenizer: as in `from_adapters`.
            rewards: their names.
            lora: a `peft.LoraConfig` of each reward's adapter. Where it names no `target_modules`,
                these are the linear layers of the scope; of the scope "full" all but the head.
            shared: a config of the part that all weightings have in common, by default over the
                linear layers that the scope leaves; None: they stay as they are.

        Raises:
            TypeError, ValueError: names the argument, what it was and what it must be.
            NotImplementedError: the adapter is no plain LoRA.
        """
        check_base(base, tokenizer)
        check_choice("scope", scope, SCOPES)
        check_choice("shared_as", shared_as, SHARED)
        if isinstance(rewards, str) or not isinstance(rewards, Sequence) or not rewards:
            raise TypeError(f"rewards is {rewards!r:.80}; it must be a list of names")
        check_not_of_base(base, [x for x in rewards if isinstance(x, str)], "rewards")
        for name in rewards:
            check_name(name, "rewards")
            if list(rewards).count(name) > 1:
                raise ValueError(f"rewards has {name!r} twice; names must differ")
        config = placed(base, "lora", lora, scope)
        configs = dict.fromkeys(rewards, config)
        if shared is not None:
            configs[PART] = placed(base, "shared", shared, scope, inside=False)
        model = with_new_adapters(base, configs).eval()
        check_mix(model, list(configs))
        for name in rewards:
            check_scope(model, name, scope)
        kind = None if shared is None else shared_as
        return cls(base, model, tuple(rewards), scope=scope, shared=kind, tokenizer=tokenizer)

    @classmethod
    @explained()
    def load(cls, folder: PathLike, base: Any, *, tokenizer: Any = None) -> ConditionedPolicy:
        """The policy that `save` saved, over the base that it was made of.

        Raises:
            OSError: a file is missing or cannot be read. ValueError: a file is not as it must be,
                or the adapters do not fit `base`. TypeError, NotImplementedError: as
                `from_adapters`.
        """
        path = expanded(folder)
        if not (path / POLICY).is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} has no {POLICY}; it must be a folder as ConditionedPolicy.save "
                "makes it (from_adapters takes adapters that PEFT saved)"
            )
        found, where = read_object(path / POLICY), str(path / POLICY)
        check_keys(
            where, found, {"format", "rewards", "scope", "shared"}, "it must be what save gives"
        )
        if found["format"] != FORMAT:
            raise ValueError(
                f"{where} has format {found['format']!r}; this version of crossfade reads {FORMAT}"
            )
        names, shared = found["rewards"], found["shared"]
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise ValueError(f"{where} has rewards {names!r:.80}; they must be a list of names")
        if shared not in (None, *SHARED):
            raise ValueError(f"{where} has shared {shared!r}; it must be one of {[None, *SHARED]}")
        for name in names:
            check_name(name)
        return cls.from_adapters(
            base,
            {name: path / name for name in names},
            scope=found["scope"],
            shared=None if shared is None else path / PART,
            shared_as=shared or SHARED[0],
            tokenizer=tokenizer,
        )

    def save(self, folder: PathLike) -> None:
        """Save the adapters and what they are for, and not the base.

        The folder gets ``policy.json``, and a folder for each reward as PEFT saves adapters:
        ``PeftModel.from_pretrained(base, folder / "helpful")`` is the policy at the weights
        ``{"helpful": 1}``, if it has no shared part.
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        # Without save_embedding_layers=False PEFT would look for the base on the hub.
        self.model.save_pretrained(
            path, selected_adapters=[*self.trained], save_embedding_layers=False
        )
        says = {"format": FORMAT, "rewards": list(self.rewards), "scope": self.scope}
        says["shared"] = self.shared
        (path / POLICY).write_text(json.dumps(says, indent=2) + "\n")

    @property
    def reference(self) -> Model:
        """The reference as a term that shares the policy's forward: ``kl_to=policy.reference``."""
        return Model(self.model, adapter=None, tokenizer=self.tokenizer, name="reference")

    @explained()
    def at(self, weights: Mapping[str, Any], kl: Any = 0.0) -> Model:
        """The policy at some weights of the rewards, as a term of blends.

        Args:
            weights: by the names of rewards, numbers or tensors ``[requests]`` that are not
                negative and sum to 1 within 1e-4. Rewards that are left out have the weight 0.
                With "kl" among them, as a sweep gives it, all of them sum to 1, it too, and what
                they are is ``(1 - kl) * w_k``.
            kl: how much the KL to the reference counts, within [0, 1]; 1 is the reference where
                the shared part is not "trained". Also a tensor ``[requests]``.

        Raises:
            TypeError, ValueError: names the argument, what it was and what it must be.
        """
        return Model(
            self.model, adapter=self.mix(weights, kl), tokenizer=self.tokenizer, name="policy"
        )

    @explained()
    def merged(self, weights: Mapping[str, Any], kl: Any = 0.0) -> nn.Module:
        """The policy at some weights as a plain model of the base's class, to save or to serve.

        It is a copy: the policy and the base stay as they are. An output head that is tied to the
        embeddings and has a delta is untied.

        Args:
            weights, kl: as in `at`, but numbers alone.

        Raises:
            TypeError, ValueError: names the argument, what it was and what it must be.
        """
        mix = self.mix(*one_for_all(self.rewards, weights, kl))
        return merged(self.base, self.model, {n: float(w) for n, w in mix.items()})

    @property
    def trained(self) -> tuple[str, ...]:
        """The names of all its adapters, which `crossfade.training.CLPTrainer` trains."""
        return (*self.rewards, *([PART] if self.shared else []))

    def mix(self, weights: Mapping[str, Any], kl: Any = 0.0) -> dict[str, Weight]:
        """How much of each adapter the model has at some weights, which are as in `at`."""
        of_rewards, weight = preference(self.rewards, weights, kl)
        left: Weight = 1.0 - weight
        found = {n: times(left, w, "weights and kl") for n, w in of_rewards.items()}
        if self.shared is not None:
            found[PART] = left if self.shared == "scaled" else 1.0
        return found
