"""The settings file of ``crossfade pareto``: what it says, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .. import formula, reading
from ..bulk import prompts as lines
from ..checks import did_you_mean
from ..loading import Loaded, Plan

NEEDED = ("models", "methods", "rewards", "prompts")
PREFIX = "w_"  # of the names of weights in formulas


@dataclass(frozen=True)
class Settings:
    """What the file says; the help of the command has the meaning of each key."""

    models: dict[str, str]
    methods: dict[str, str]
    rewards: dict[str, str]
    prompts: Any
    weights: Any = 11
    kl_to: str | None = None
    reference: Any = None
    generation: dict[str, Any] = field(default_factory=dict)
    chat: bool | None = None
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("models", "methods", "rewards"):
            x = getattr(self, name)
            if not isinstance(x, dict) or not x:
                raise TypeError(f"{name} is {x!r:.80}; it must be a mapping of names to texts")
            for key, text in x.items():
                if not isinstance(key, str) or not isinstance(text, str) or not text.strip():
                    raise TypeError(f"{name}.{key} is {text!r:.80}; it must be a text")
        if not isinstance(self.generation, dict):
            raise TypeError(f"generation is {self.generation!r:.80}; it must be a mapping")
        for name in self.generation:
            if name in ("seed", "kl_to"):
                raise ValueError(
                    f"generation.{name} is given; it must be the key {name}, beside it"
                )
        if self.kl_to is not None and not isinstance(self.kl_to, str):
            raise TypeError(f"kl_to is {self.kl_to!r:.80}; it must be a formula")
        if self.chat is not None and type(self.chat) is not bool:
            raise TypeError(f"chat is {self.chat!r:.80}; it must be true or false")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {self.dtype!r:.80}; it must be auto, float32 or another")


def read(file: str) -> Settings:
    """The settings of a YAML file.

    Raises:
        TypeError, ValueError: the file is not such YAML, or a key is wrong; names it.
        OSError: it is not there.
    """
    found = reading.parse_yaml(reading.read_text(file), file)
    if not isinstance(found, dict):
        what = "is empty" if found is None else f"has a {type(found).__name__} at its top"
        raise ValueError(f"{file} {what}; it must have the keys {', '.join(NEEDED)}")
    known = [f.name for f in fields(Settings)]
    meant = {"blends": "did you mean 'methods'?", "model": "did you mean 'models'?"}
    for key in found:
        if key not in known:
            hint = did_you_mean(key, known, meant)
            hint = hint or "; what generate takes goes under generation"
            raise ValueError(
                f"{file} has the key {key!r:.40}; the keys are {', '.join(known)}{hint}"
            )
    for key in NEEDED:
        if key not in found:
            raise ValueError(f"{file} has no key {key!r}; it must have {', '.join(NEEDED)}")
    return Settings(**found)


def plan_of(settings: Settings) -> Plan:
    """All models and rewards of the file as one plan, its formulas checked, nothing loaded.

    Raises:
        ValueError: a formula or a name is wrong; names it. OSError: a model is not there.
    """
    weights = {PREFIX + name for name in settings.rewards}
    used: set[str] = set()
    for key, text in (
        *((f"methods.{name}", text) for name, text in settings.methods.items()),
        *([] if settings.kl_to is None else [("kl_to", settings.kl_to)]),
    ):
        try:
            names = formula.names_in(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"{key} is {text!r:.80}, which is no formula ({error})") from None
        known = {*settings.models, *(weights if key != "kl_to" else ())}
        for name in sorted(names - known):
            said = f"{key} has the unknown name {name!r} (known: {', '.join(sorted(known))})"
            raise ValueError(said + did_you_mean(name, known))
        used |= names
        models = [f"{name}={path}" for name, path in settings.models.items() if name in names]
        faders = [f"{name}=0.5" for name in sorted(names & weights)]
        try:
            Plan.read(models, text, fader=faders).check()
        except ValueError as error:
            raise ValueError(str(error).replace("--blend", key)) from None
    for name in settings.models:
        if name not in used:
            raise ValueError(f"models.{name} is given, but no formula of methods or kl_to uses it")
    return Plan.of_rewards(settings.models, settings.rewards)


def method(loaded: Loaded, text: str, rewards: list[str]) -> Callable[[Mapping[str, float]], Any]:
    """The blend of a formula as a function of the weights of the rewards."""
    names = formula.names_in(text)
    terms = {name: term for name, term in loaded.terms.items() if name in names}

    def at(weights: Mapping[str, float]) -> Any:
        faders = {PREFIX + name: weights[name] for name in rewards if PREFIX + name in names}
        return formula.parse(text, **terms, **faders)

    return at


def prompts(given: Any) -> list[Any]:
    """The prompts: those listed, or the lines of a file."""
    if isinstance(given, str):
        given = lines.read_lines(given)
    if not isinstance(given, list) or not given:
        raise ValueError(f"prompts is {given!r:.80}; it must be a file or a list of texts")
    return [lines.line_of(item, i, known=()).prompt for i, item in enumerate(given)]
