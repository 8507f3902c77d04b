"""What options say of models, blends and values, read and checked before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

from .. import rewards
from ..blends import file_reader
from ..blends.blend import Blend, Model, ValueHead
from ..blends.values import Reward, RewardModel
from ..checks import did_you_mean
from ..drafts import PROMPT
from ..models import saved
from ..specs import Spec, fader_of, system_of
from .formulas import Unloaded, blend_of, errors_of, members_of, names_of, tilt_of, value_of
from .loaded import Loaded, dtype_of, load_terms

S = TypeVar("S", bound=Any)
SINGLE = "model"  # the name of a single model that is given without one


@dataclass(frozen=True)
class Plan:
    """What options say of models, blend and value, before any of the models is loaded.

    Attributes:
        specs: the models, by the name of each.
        blend: the formula of the blend.
        faders: the positions of names in the formulas that are no models.
        systems: the system prompts of terms.
        value: the formula of the value that searches ask, or None.
        rewards: Python functions in that formula.
        labels: of each model that is a reward model the class whose log-prob is the value, or None
            where the model has one output.
        file: the file that the blend was saved in, or None if it is a formula of `specs`.
        outline: the blend in that file, with models that are not loaded.
        judge: the formula of the blend that judges in a tournament, or None.
        accept: the formula of the value that a correction must raise, or None.
        tilt: the formula of a search's tilt, or None.
        draft: the formula of the blend that guesses tokens, or None.
        spare: whether there may be models, rewards and faders that no formula uses, as a server
            has, whose requests bring formulas of their own.
    """

    specs: Mapping[str, Spec]
    blend: str
    faders: Mapping[str, float] = field(default_factory=dict)
    systems: Mapping[str, str] = field(default_factory=dict)
    value: str | None = None
    rewards: Mapping[str, Reward] = field(default_factory=dict)
    labels: Mapping[str, int | None] = field(default_factory=dict)
    file: str | None = None
    outline: Blend | None = None
    judge: str | None = None
    accept: str | None = None
    tilt: str | None = None
    draft: str | None = None
    spare: bool = False

    @classmethod
    def of_rewards(cls, models: Mapping[str, str], rewards: Mapping[str, str]) -> Plan:
        """The models and the rewards of a settings file, checked.

        Args:
            models: a path by the name of each.
            rewards: MODULE:FUNCTION, or the path of a reward model, by the name of each.

        Raises:
            ValueError, OSError: as `read` and `check`, of the key ``rewards``.
        """
        functions = {name: text for name, text in rewards.items() if ":" in text}
        others = {name: text for name, text in rewards.items() if name not in functions}
        try:
            plan = cls.read(
                [f"{name}={path}" for name, path in {**models, **others}.items()],
                " + ".join(models),
                value=" + ".join(rewards),
                reward=[f"{name}={text}" for name, text in functions.items()],
            )
            plan.check()
        except ValueError as error:
            said = str(error).replace("--reward", "rewards").replace("--value", "rewards")
            raise ValueError(said) from None
        return plan

    @classmethod
    def read(
        cls,
        model: Sequence[str],
        blend: str | None = None,
        *,
        system: Sequence[str] = (),
        fader: Sequence[str] = (),
        value: str | None = None,
        reward: Sequence[str] = (),
        judge: str | None = None,
        accept: str | None = None,
        tilt: str | None = None,
        draft: str | None = None,
        spare: Collection[str] | None = None,
    ) -> Plan:
        """Read the texts of options.

        Args:
            model: each ``NAME=PATH`` or ``NAME=PATH@GUIDE``, or a single ``PATH``.
            blend: a formula of these names; None if there is a single model. Or a file of
                `Blend.save`, whose name ends in ``.json``, which names its models itself.
            system: each ``NAME=TEXT``, the system prompt of a term.
            fader: each ``NAME=NUMBER``, for names in the formulas that are no models.
            value: a formula of the value that searches ask; None is the only reward.
            reward: each ``MODULE:FUNCTION`` or ``NAME=MODULE:FUNCTION``.
            judge: a formula of the models that judge, most often a name.
            accept: a formula of the value that a correction must raise.
            tilt: a formula of two models, ``target - sampler``.
            draft: a formula of the models that guess tokens, most often a name.
            spare: names in formulas that are read elsewhere; those given need be in no formula.

        Raises:
            ValueError: an option is malformed or does not fit the others. OSError: a model or
                adapter is not there.
        """
        file = blend.strip() if blend is not None and file_reader.is_file(blend) else None
        outline = None if file is None else _outline(file)
        if not model and outline is None:
            raise ValueError(
                "no model is given; it must be --model NAME=PATH, once for each model, or --blend "
                "FILE.json with a saved blend"
            )
        single = SINGLE if len(model) == 1 else None
        specs = _by_name("--model", [Spec.read(text, single) for text in model])
        functions = _by_name("--reward", [rewards.reward(text) for text in reward])
        positions = [fader_of(text) for text in fader]
        twice = [*specs, *functions, *(name for name, _ in positions), *members_of(outline)]
        for name in twice:
            if twice.count(name) > 1:
                raise ValueError(
                    f"the name {name} is given twice, by --model, --reward, --fader or the file of "
                    "--blend; names must differ"
                )
        if outline is not None:
            blend = str(outline)
        if value is None and accept is None and spare is None and len(functions) > 1:
            raise ValueError(
                "--value is missing; with several rewards it must be a formula of them"
            )
        if value is None and spare is None and len(functions) == 1:
            value = next(iter(functions))
        deciding = set(spare or ())
        for option, text, name in (
            ("--value", value, "reward"),
            ("--judge", judge, "judge"),
            ("--accept", accept, "reward"),
            ("--tilt", tilt, "target"),
            ("--draft", draft, "small"),
        ):
            if text is not None and text not in {**specs, **functions} and os.path.isdir(text):
                raise ValueError(
                    f"{option} is {text!r}, a folder; it must be a formula: --model {name}={text} "
                    f"{option} {name}"
                )
            deciding |= set() if text is None else names_of(option, text)
        if blend is None:
            if len(specs) > 1:
                others = [name for name in specs if name not in deciding]
                raise ValueError(
                    f"--blend is missing; with {len(specs)} models it must be a formula of their "
                    f"names, such as {' + '.join(others or specs)!r}"
                )
            blend = next(iter(specs))
        labels = {n: s.class_index() for n, s in specs.items() if s.is_reward_model(n in deciding)}
        prompts = dict(system_of(text, list(specs)) for text in system)
        for name in prompts:
            if name in labels or specs[name].is_value_head:
                what = "a reward model" if name in labels else "a value head"
                raise ValueError(f"--system names {name!r}, {what}; it must name a model")
        faders = dict(positions)
        return cls(
            specs,
            blend,
            faders,
            prompts,
            value,
            functions,
            labels,
            file,
            outline,
            judge,
            accept,
            tilt,
            draft,
            spare is not None,
        )

    @property
    def formulas(self) -> dict[str, str]:
        """The formulas by their options."""
        each = {
            "--blend": self.blend,
            **self.values,
            "--judge": self.judge,
            "--tilt": self.tilt,
            "--draft": self.draft,
        }
        return {option: text for option, text in each.items() if text is not None}

    @property
    def values(self) -> dict[str, str | None]:
        """The formulas of values by their options."""
        return {"--value": self.value, "--accept": self.accept}

    @cached_property
    def names(self) -> dict[str, set[str]]:
        """The names in each formula, by its option."""
        return {option: names_of(option, text) for option, text in self.formulas.items()}

    @property
    def free(self) -> set[str]:
        """The names in the formulas that are no models and no rewards: those of faders."""
        given = {*self.specs, *self.rewards, *members_of(self.outline)}
        return set().union(*self.names.values()) - given

    def _check_names(self) -> None:
        """Refuse a reward in the blend or the judge, and what no formula uses."""
        for option, names in self.names.items():
            for name in names if option not in self.values else ():
                if name in self.labels or name in self.rewards:
                    raise ValueError(
                        f"{option} has {name!r}, a reward; it can be in --value, by which a search "
                        "chooses"
                    )
        if self.spare:
            return
        used = set().union(*self.names.values())
        for option, given in (
            ("--model", self.specs),
            ("--reward", self.rewards),
            ("--fader", self.faders),
        ):
            for name in given:
                if name not in used:
                    where = " and ".join(f"{o} {text!r}" for o, text in self.formulas.items())
                    verb = "does" if len(self.formulas) == 1 else "do"
                    meant = did_you_mean(name, self.free) if option == "--fader" else ""
                    raise ValueError(
                        f"{option} {name}=... is given, but {where} {verb} not use it{meant}"
                    )

    def _instead_of(self, option: str, name: str) -> str:
        """The end of an error about a name in a formula that nothing has."""
        single = next(iter(self.specs.values())) if len(self.specs) == 1 else None
        if single is not None and single.name == SINGLE:
            return f"; a single model without a name is called {SINGLE}"
        if option in ("--judge", "--draft"):
            return f"; a {option[2:]} is a model: --model {name}=PATH"
        if option in self.values:
            return f"; it is given as --model {name}=PATH or --reward {name}=MODULE:FUNCTION"
        return f"; a fader is given as --fader {name}=NUMBER"

    def check(self, own: Mapping[str, float] | None = None) -> None:
        """Raise the errors of the formulas, with positions of faders that a prompt has of its own.

        Raises:
            ValueError: a formula cannot be read, has a name that is not given, or lacks one that
                is; `own` has a name that is no fader.
        """
        own = own or {}
        for name in own:
            if name not in self.free:
                known = ", ".join(sorted(self.free))
                what = f"the faders are {known}" if known else "the formula has no faders"
                meant = did_you_mean(name, self.free)
                raise ValueError(f"weights has {name!r}; {what}{meant}")
            for option, names in self.names.items():
                if option != "--blend" and name in names:
                    raise ValueError(
                        f"weights has {name!r}, which {option} uses; it is one for all"
                    )
        faders = {**self.faders, **own}
        given = [*self.specs, *self.rewards, *faders, *members_of(self.outline)]
        for option, names in self.names.items():
            for name in sorted(names.difference(given)):
                meant = did_you_mean(name, [*given, PROMPT] if option == "--draft" else given)
                raise ValueError(
                    f"{option} has the unknown name {name!r} (known: {', '.join(sorted(given))})"
                    + (meant or self._instead_of(option, name))
                )
        self._check_names()
        terms: dict[str, Any] = {
            name: (ValueHead if spec.is_value_head else Model)(Unloaded())
            for name, spec in self.specs.items()
            if name not in self.labels
        }
        terms |= members_of(self.outline)
        with errors_of("--blend"):
            blend_of(self.blend, terms, faders)
        for option, text in (("--judge", self.judge), ("--draft", self.draft)):
            if text is not None:
                with errors_of(option):
                    blend_of(text, terms, faders)
        others = {n: Reward(max, name=n) for n in (*self.labels, *self.rewards)}
        for option, text in self.values.items():
            if text is not None:
                with errors_of(option):
                    value_of(text, {**terms, **others}, faders)
        if self.tilt is not None:
            with errors_of("--tilt"):
                tilt_of(self.tilt, {**terms, **others}, faders)

    def load(
        self,
        device: str = "cpu",
        dtype: str = "auto",
        tell: Callable[[str], object] = lambda path: None,
    ) -> Loaded:
        """Load the models. Terms over the same path share one.

        Args:
            device: where the models go.
            dtype: of the models, or "auto" for what they were saved in.
            tell: is called with each path before it is loaded.

        Raises:
            ValueError, OSError: a model is not there or cannot be loaded. ImportError: names what
                is not installed.
        """
        terms: dict[str, Any] = {}
        kept = [s for name, s in self.specs.items() if name not in self.labels]
        for path in dict.fromkeys(spec.path for spec in kept):
            same = [spec for spec in kept if spec.path == path]
            tell(path)
            terms |= load_terms(path, same, device, dtype)
        judging = dict(terms)  # All that a judge reads is its own prompt.
        for name, text in self.systems.items():
            terms[name] = replace(terms[name], system=text)
        blend = None
        if self.file is not None:
            number = None if dtype == "auto" else dtype_of(dtype)
            blend = Blend.load(self.file, device=device, dtype=number)
            terms |= members_of(blend)
            judging |= members_of(blend)
        others = self.load_rewards(device, dtype)
        value, accept = (
            None if text is None else value_of(text, {**terms, **others}, self.faders)
            for text in self.values.values()
        )
        judge = None if self.judge is None else blend_of(self.judge, judging, self.faders)
        ratio = None if self.tilt is None else tilt_of(self.tilt, terms, self.faders)
        draft = None if self.draft is None else blend_of(self.draft, terms, self.faders)
        return Loaded(
            self.blend,
            terms,
            self.faders,
            value,
            blend,
            judge,
            accept,
            ratio,
            draft,
            others,
            judging,
        )

    def load_rewards(self, device: Any, dtype: str) -> dict[str, Any]:
        """The functions and the reward models, by name; arguments and errors are as in `load`."""
        found: dict[str, Any] = dict(self.rewards)
        for name, label in self.labels.items():
            model, tokenizer = saved.load_classifier(self.specs[name].path, device, dtype_of(dtype))
            found[name] = RewardModel(model, tokenizer, label=label, name=name)
        return found


def _outline(file: str) -> Blend:
    """The blend of a file, with models that are not loaded.

    Raises:
        ValueError: the file is no saved blend, or has weights for each request.
    """
    _, _, d = file_reader.described(file)
    members = [*d["terms"], *d["values"]]
    for member in members:
        if isinstance(member["weight"], list):
            raise ValueError(
                f"--blend is {file!r}, in which {member['name']} has {len(member['weight'])} "
                "weights, one a request; on the command line each must be a number"
            )
    for term in d["terms"]:
        term["adapter"] = "active"  # The adapters are not loaded either.
    return Blend.from_dict(d, **{member["name"]: Unloaded() for member in members})


def _by_name(option: str, given: Sequence[S]) -> dict[str, S]:
    names = [x.name for x in given]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{option} {name}=... is given twice; names must differ")
    return dict(zip(names, given, strict=True))
