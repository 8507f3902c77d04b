"""The methods of ``crossfade pareto``: formulas of models and policies, and searches."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import formula
from ..blends.values import Reward
from ..checks import did_you_mean
from ..loading import Plan, value_of
from ..models.hf import is_peft
from ..models.saved import expanded, read_object
from ..models.saved_adapters import POLICY
from ..models.value_heads import shared_copy
from ..pareto.weightings import KL
from ..policies.conditioned import ConditionedPolicy
from ..search import BestOfN, ChunkBeamSearch, Search, Tournament
from ..specs import Spec, parted
from .sweeps import Settings

PREFIX = "w_"  # of the names of weights in formulas
# The keys of a method with a search, and what makes it of the key's number or numbers and a value.
SEARCHES: dict[str, Callable[[Any, Any], Search]] = {
    "best_of": BestOfN,
    "tournament": lambda n, value: Tournament(value, n),
    "search": lambda each, value: ChunkBeamSearch(each[0], each[1], each[2], value),
}
Weights = Mapping[str, float]


@dataclass(frozen=True)
class SavedPolicy:
    """A policy that is one of the models.

    Attributes:
        base: the path of the model under it.
        rewards: the names that it knows.
        place: the folder of a policy that is saved, or the folder of each reward's adapter.
    """

    base: str
    rewards: tuple[str, ...]
    place: Path | Mapping[str, Path]

    def load(self, name: str, term: Any) -> ConditionedPolicy:
        """The policy over the base's weights, which `term` has."""
        # PEFT's layers are taken out of a copy of the modules, whose weights are the same ones.
        base = shared_copy(term.model).unload() if is_peft(term.model) else term.model
        made = ConditionedPolicy
        try:
            if isinstance(self.place, Path):
                return made.load(self.place, base, tokenizer=term.tokenizer)
            return made.from_adapters(base, self.place, tokenizer=term.tokenizer)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ValueError(f"models.{name}: {error}") from None

    def at(self, policy: ConditionedPolicy, weights: Weights) -> Any:
        """The policy at a weighting, in which rewards that it does not know count 0."""
        return policy.at({n: w for n, w in weights.items() if w or n in self.rewards})


def policies_of(settings: Settings, names: Sequence[str]) -> dict[str, SavedPolicy]:
    """The policies among the models.

    Args:
        names: what is weighed: all rewards that have a weight anywhere, and perhaps "kl".

    Raises:
        ValueError: a policy does not know a reward that is weighed, or is no policy. OSError: a
            folder is not there.
    """
    found = {}
    for name, given in settings.models.items():
        if isinstance(given, Mapping):
            found[name] = _of_adapters(f"models.{name}", given, list(settings.rewards))
        else:
            base, guide = parted(given)
            folder = expanded(guide or "")
            if guide and (folder / POLICY).is_file():
                said = read_object(folder / POLICY).get("rewards")
                found[name] = SavedPolicy(base, tuple(said or ()), folder)
    for name, policy in found.items():
        for reward in names:
            if reward != KL and reward not in policy.rewards:
                raise ValueError(
                    f"models.{name} is a policy of {', '.join(policy.rewards)}, and {reward!r} is "
                    "weighed; the rewards must have the names that a policy knows, or no weight"
                )
    return found


def _of_adapters(where: str, given: Mapping[str, str], rewards: Sequence[str]) -> SavedPolicy:
    """The policy that is given as an adapter for each reward."""
    bases, place = {}, {}
    for reward, text in given.items():
        if reward not in rewards:
            raise ValueError(
                f"{where} has {reward!r:.80}; the rewards are {', '.join(rewards)}"
                f"{did_you_mean(reward, rewards)}"
            )
        spec = Spec.read(text, reward)
        if spec.guide is None or spec.is_value_head:
            raise ValueError(f"{where}.{reward} is {text!r:.80}; it must be BASE@ADAPTER")
        bases[reward], place[reward] = spec.path, spec.guide
    (first, base), *others = bases.items()
    for reward, other in others:
        if other != base:
            raise ValueError(
                f"{where} has {first!r} over {base!r} and {reward!r} over {other!r}; the adapters "
                "of a policy must be of one base"
            )
    return SavedPolicy(base, tuple(given), place)


@dataclass(frozen=True)
class Method:
    """A method of the file: a blend, and perhaps a search and arguments of generate for it alone.

    Attributes:
        blend: its formula.
        kind: the key of its search; None if there is none.
        numbers: what the file says of that search.
        value: the formula of what the search prefers.
        options: the arguments.
    """

    blend: str
    kind: str | None
    numbers: Any
    value: str
    options: Mapping[str, Any]

    @classmethod
    def read(cls, where: str, given: Any, rewards: Sequence[str]) -> Method:
        """A method as the file has it: a formula, or a mapping with one.

        Raises:
            TypeError, ValueError: a key is wrong; names it.
        """
        options = {"blend": given} if isinstance(given, str) else dict(given)
        kinds = [key for key in SEARCHES if key in options]
        if len(kinds) > 1:
            raise ValueError(
                f"{where} has {kinds[0]} and {kinds[1]}, two searches; it can have one"
            )
        if "value" in options and not kinds:
            raise ValueError(
                f"{where}.value is given without best_of, tournament or search, one of which must "
                "go with it"
            )
        kind = kinds[0] if kinds else None
        default = " + ".join(f"{PREFIX}{name} * {name}" for name in rewards)
        found = cls(
            options.pop("blend", None),
            kind,
            options.pop(kind, None),
            options.pop("value", default),
            options,
        )
        for key, text in (("blend", found.blend), ("value", found.value)):
            if not isinstance(text, str) or not text.strip():
                raise TypeError(f"{where}.{key} is {text!r:.80}; it must be a formula")
        found._check_search(f"{where}.{kind}")
        return found

    def _check_search(self, where: str) -> None:
        each = self.numbers
        if self.kind == "search" and not (isinstance(each, list) and len(each) == 3):
            raise TypeError(
                f"{where} is {each!r:.80}; it must be three numbers, such as [4, 4, 5]: how many "
                "texts stay, in how many ways each goes on, and for how many tokens"
            )
        try:
            self.search(Reward(max))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from None

    def search(self, value: Any) -> Search | None:
        """The search by a value, if there is one."""
        return None if self.kind is None else SEARCHES[self.kind](self.numbers, value)

    @property
    def formulas(self) -> dict[str, str]:
        """The formulas by what options of other commands call them."""
        found = {"--blend": self.blend}
        return found if self.kind is None else {**found, "--value": self.value}

    def at(self, terms: Mapping[str, Any], values: Mapping[str, Any], weights: Weights) -> Any:
        """What the method gives for a weighting."""
        faders = {PREFIX + name: w for name, w in weights.items()}
        used = formula.names_in(self.blend)
        own = {name: w for name, w in faders.items() if name in used}
        blend = formula.parse(self.blend, **terms, **own)
        given = {"blend": blend, **self.options}
        if self.kind is not None:
            given["search"] = self.search(value_of(self.value, {**terms, **values}, faders))
        return given


def read(settings: Settings) -> dict[str, Method]:
    """The methods of the file.

    Raises:
        TypeError, ValueError: a key of one is wrong; names it.
    """
    rewards = list(settings.rewards)
    return {
        name: Method.read(f"methods.{name}", x, rewards) for name, x in settings.methods.items()
    }


def functions(
    methods: Mapping[str, Method],
    policies: Mapping[str, SavedPolicy],
    terms: Mapping[str, Any],
    values: Mapping[str, Any],
) -> dict[str, Callable[[Weights], Any]]:
    """What a sweep calls with each weighting, of models that are loaded.

    Args:
        terms: the models, of a policy the model under it.
        values: the rewards.

    Raises:
        OSError, ValueError: a policy cannot be loaded; names it.
    """
    loaded = {name: policy.load(name, terms[name]) for name, policy in policies.items()}

    def function(method: Method) -> Callable[[Weights], Any]:
        used = set().union(*map(formula.names_in, method.formulas.values()))

        def at(weights: Weights) -> Any:
            own = {n: policies[n].at(x, weights) for n, x in loaded.items() if n in used}
            return method.at({**terms, **own}, values, weights)

        return at

    return {name: function(method) for name, method in methods.items()}


def plan_of(
    settings: Settings,
    methods: Mapping[str, Method],
    policies: Mapping[str, SavedPolicy],
    names: Sequence[str],
) -> Plan:
    """All models and rewards of the file as one plan, its formulas checked, nothing loaded.

    In the place of a policy it has the model under it.

    Args:
        names: what is weighed, the rewards and perhaps "kl".

    Raises:
        ValueError: a formula or a name is wrong; names it. OSError: a model is not there.
    """
    models = {n: policies[n].base if n in policies else x for n, x in settings.models.items()}
    used: set[str] = set()
    for name, method in methods.items():
        used |= _check(f"methods.{name}", method.formulas, settings, models, names)
    if settings.kl_to is not None:
        for name in sorted(_names("kl_to", settings.kl_to) & policies.keys()):
            raise ValueError(
                f"kl_to has {name!r}, a policy, which follows the weights; it must be of other "
                "models"
            )
        used |= _check("kl_to", {"--blend": settings.kl_to}, settings, models, ())
    for name in models:
        if name not in used:
            raise ValueError(f"models.{name} is given, but no formula of methods or kl_to uses it")
    return Plan.of_rewards(models, settings.rewards)


def _check(
    key: str,
    formulas: Mapping[str, str],
    settings: Settings,
    models: Mapping[str, str],
    names: Sequence[str],
) -> set[str]:
    """The names in the formulas of a key, of which each is checked."""
    weights = {PREFIX + name for name in names}
    used: set[str] = set()
    for option, text in formulas.items():
        own = _names(key if option == "--blend" else f"{key}.value", text)
        rewards = settings.rewards if option == "--value" else ()
        known = {*models, *weights, *rewards}
        for name in sorted(own - known):
            said = f"{key} has the unknown name {name!r} (known: {', '.join(sorted(known))})"
            raise ValueError(said + did_you_mean(name, known))
        used |= own
    functions, others = _rewards(settings, used & settings.rewards.keys())
    try:
        Plan.read(
            [*(f"{name}={path}" for name, path in models.items() if name in used), *others],
            formulas["--blend"],
            fader=[f"{name}=0.5" for name in sorted(used & weights)],
            value=formulas.get("--value"),
            reward=functions,
        ).check()
    except ValueError as error:
        said = str(error).replace("--blend", key).replace("--value", f"{key}.value")
        raise ValueError(said) from None
    return used


def _names(key: str, text: str) -> set[str]:
    try:
        return formula.names_in(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{key} is {text!r:.80}, which is no formula ({error})") from None


def _rewards(settings: Settings, names: Container[str]) -> tuple[list[str], list[str]]:
    """Some rewards as options say them: functions, and reward models."""
    found: tuple[list[str], list[str]] = ([], [])
    for name, text in settings.rewards.items():
        if name in names:
            found[":" not in text].append(f"{name}={text}")
    return found
