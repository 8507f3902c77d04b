"""What the options of a server say: models, and by name what its requests may be decided by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..blends.blend import Blend, Model, ValueHead
from ..blends.values import Reward, ValueSum, as_value
from ..checks import did_you_mean
from ..drafts import PROMPT
from ..specs import Spec
from .formulas import Unloaded, blend_of, errors_of, members_of, names_of, value_of
from .loaded import Loaded
from .plan import Plan


@dataclass(frozen=True)
class Served:
    """What a server has loaded.

    Attributes:
        loaded: the models, and the default blend.
        terms: its terms as a session takes them: models in the order of the options, then values.
        values: what a search may be decided by: each value head, reward model and reward by its
            own name, and formulas of them.
        judges, drafts: blends that judge, and that guess tokens.
    """

    loaded: Loaded
    terms: Mapping[str, Model | ValueHead]
    values: Mapping[str, ValueSum]
    judges: Mapping[str, Blend]
    drafts: Mapping[str, Blend]


@dataclass(frozen=True)
class ServerPlan:
    """What options of a server say, before any model is loaded.

    Attributes:
        plan: of the models and the default blend.
        values, judges, drafts: formulas by name.
    """

    plan: Plan
    values: Mapping[str, str]
    judges: Mapping[str, str]
    drafts: Mapping[str, str]

    @classmethod
    def read(
        cls,
        model: Sequence[str],
        blend: str | None = None,
        *,
        system: Sequence[str] = (),
        fader: Sequence[str] = (),
        reward: Sequence[str] = (),
        value: Sequence[str] = (),
        judge: Sequence[str] = (),
        draft: Sequence[str] = (),
    ) -> ServerPlan:
        """Read the texts of options.

        Args:
            model, system, fader, reward: as of `Plan.read`.
            blend: as there; None is the first model that writes texts.
            value, judge, draft: each ``NAME=FORMULA``.

        Raises:
            ValueError, OSError: as of `Plan.read`.
        """
        if blend is None and len(model) > 1:
            specs = map(Spec.read, model)
            blend = next((s.name for s in specs if not _scores(s)), None)
        named = [_by_name(o, x) for o, x in (("value", value), ("judge", judge), ("draft", draft))]
        if PROMPT in named[2]:
            raise ValueError(
                f"--draft {PROMPT}=... is given; every server has a draft of that name"
            )
        used = {
            name
            for option, formulas in zip(("--value", "--judge", "--draft"), named, strict=True)
            for text in formulas.values()
            for name in names_of(option, text)
        }
        plan = Plan.read(model, blend, system=system, fader=fader, reward=reward, spare=used)
        return cls(plan, *named)

    def check(self) -> None:
        """Raise the errors of the formulas.

        Raises:
            ValueError: one cannot be read, or has a name that nothing has.
        """
        self.plan.check()
        models: dict[str, Any] = {
            name: (ValueHead if spec.is_value_head else Model)(Unloaded())
            for name, spec in self.plan.specs.items()
            if name not in self.plan.labels
        }
        models |= members_of(self.plan.outline)
        rewards = {name: Reward(max, name=name) for name in (*self.plan.labels, *self.plan.rewards)}
        heads = [name for name, x in models.items() if isinstance(x, ValueHead)]
        for name in self.values:
            if name in (*rewards, *heads):
                raise ValueError(
                    f"--value {name}=... has the name of a value that there is already"
                )
        for option, formulas, make, known in (
            ("--value", self.values, value_of, {**models, **rewards}),
            ("--judge", self.judges, blend_of, models),
            ("--draft", self.drafts, blend_of, models),
        ):
            for text in formulas.values():
                for name in names_of(option, text).difference(known, self.plan.faders):
                    meant = did_you_mean(name, known)
                    there = ", ".join(sorted(known))
                    raise ValueError(f"{option} has the unknown name {name!r} ({there}){meant}")
                with errors_of(option):
                    make(text, known, self.plan.faders)

    def load(self, device: str, dtype: str, tell: Callable[[str], object]) -> Served:
        """Load all of it. Arguments and errors are as of `Plan.load`."""
        loaded = self.plan.load(device, dtype, tell)
        named = [name for name in self.plan.specs if name in loaded.terms]
        terms = {name: loaded.terms[name] for name in (*named, *loaded.terms)}
        heads = {name: x for name, x in terms.items() if isinstance(x, ValueHead)}
        terms = {**{name: x for name, x in terms.items() if name not in heads}, **heads}
        values = {name: as_value(x) for name, x in {**heads, **loaded.others}.items()}
        known = {**loaded.terms, **loaded.others}
        for name, text in self.values.items():
            values[name] = value_of(text, known, loaded.faders)
        judges = {n: blend_of(x, loaded.plain, loaded.faders) for n, x in self.judges.items()}
        drafts = {n: blend_of(x, loaded.terms, loaded.faders) for n, x in self.drafts.items()}
        return Served(loaded, terms, values, judges, drafts)


def _scores(spec: Spec) -> bool:
    """Whether a model scores texts, and writes none."""
    return spec.is_value_head or spec.is_reward_model(in_value=False)


def _by_name(option: str, given: Sequence[str]) -> dict[str, str]:
    """The formulas of options ``NAME=FORMULA``."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, rest = text.partition("=")
        if not (equals and name.isidentifier() and rest.strip()):
            raise ValueError(f"--{option} is {text!r}; it must be NAME=FORMULA")
        if name in found:
            raise ValueError(f"--{option} {name}=... is given twice; names must differ")
        found[name] = rest
    return found
