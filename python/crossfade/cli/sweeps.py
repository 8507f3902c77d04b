"""The settings file of ``crossfade pareto``: what its keys may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .. import reading
from ..bulk import prompts as lines
from ..checks import did_you_mean

NEEDED = ("models", "methods", "rewards", "prompts")


@dataclass(frozen=True)
class Settings:
    """What the file says; the help of the command has the meaning of each key."""

    models: dict[str, Any]
    methods: dict[str, Any]
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
            for key, entry in x.items():
                if not isinstance(key, str):
                    raise TypeError(f"{name} has the name {key!r:.80}; it must be a text")
                if name == "rewards" or not isinstance(entry, Mapping) or not entry:
                    _check_text(f"{name}.{key}", entry)
        for key, entry in self.models.items():
            for reward, text in entry.items() if isinstance(entry, Mapping) else ():
                _check_text(f"models.{key}.{reward}", text)
        for name in ("generation", *(f"methods.{key}" for key in self.methods)):
            self._check_arguments(name)
        if self.kl_to is not None and not isinstance(self.kl_to, str):
            raise TypeError(f"kl_to is {self.kl_to!r:.80}; it must be a formula")
        if self.chat is not None and type(self.chat) is not bool:
            raise TypeError(f"chat is {self.chat!r:.80}; it must be true or false")
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {self.dtype!r:.80}; it must be auto, float32 or another")

    def _check_arguments(self, name: str) -> None:
        """Refuse arguments of generate that stand elsewhere in the file."""
        found = self.generation
        if name != "generation":
            found = self.methods[name.partition(".")[2]]
            if isinstance(found, str):
                return
        if not isinstance(found, dict):
            raise TypeError(f"{name} is {found!r:.80}; it must be a mapping")
        for key in ("seed", "kl_to"):
            if key in found:
                raise ValueError(f"{name}.{key} is given; it must be the key {key}, beside it")


def _check_text(name: str, x: Any) -> None:
    if not isinstance(x, str) or not x.strip():
        raise TypeError(f"{name} is {x!r:.80}; it must be a text")


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
    meant = {
        "blends": "did you mean 'methods'?",
        "model": "did you mean 'models'?",
        "policies": "a policy is one of the models, as NAME: BASE@FOLDER",
    }
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


def prompts(given: Any) -> list[Any]:
    """The prompts: those listed, or the lines of a file."""
    if isinstance(given, str):
        given = lines.read_lines(given)
    if not isinstance(given, list) or not given:
        raise ValueError(f"prompts is {given!r:.80}; it must be a file or a list of texts")
    return [lines.line_of(item, i, known=()).prompt for i, item in enumerate(given)]
