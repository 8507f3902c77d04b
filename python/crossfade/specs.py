"""What single options say: ``--model NAME=PATH``, ``--fader NAME=NUMBER``, ``--system TEXT``."""

from __future__ import annotations

import keyword
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import models, reading
from .checks import check_number, did_you_mean
from .models import saved, saved_adapters, saved_value_heads


@dataclass(frozen=True)
class Spec:
    """What an option ``--model`` says: ``NAME=PATH`` or ``NAME=PATH@GUIDE``.

    Attributes:
        name: the term's name in formulas.
        path: the model: a folder, an id on the Hugging Face hub, or "smollm2".
        guide: the folder of an adapter or value head over the model, or None.
        label: of a reward model with several classes, the one whose log-prob is the value.
    """

    name: str
    path: str
    guide: Path | None = None
    label: str | None = None

    @classmethod
    def read(cls, text: str, default_name: str | None = None) -> Spec:
        """Read the text of an option. `default_name` is the name if the text has none."""
        name, equals, path = text.partition("=")
        if not equals:
            if default_name is None:
                raise ValueError(f"--model is {text!r}; it must be NAME=PATH")
            name, path = default_name, text
        name = unicodedata.normalize("NFKC", name)  # as it is in formulas
        if not name.isidentifier() or keyword.iskeyword(name):
            raise ValueError(
                f"--model is {text!r}; the name before = must be an identifier, "
                "of letters, digits and _"
            )
        path, guide = parted(path)
        if not path or guide == "":
            raise ValueError(f"--model is {text!r}; it must be NAME=PATH or NAME=PATH@GUIDE")
        if guide is None:
            return cls(name, path)
        try:
            return cls(name, path, _guide_folder(guide))
        except FileNotFoundError:
            if path == models.SMALL_MODEL or saved.classes_of(path) is None:
                raise
            return cls(name, path, label=guide)

    @property
    def is_value_head(self) -> bool:
        return self.guide is not None and (self.guide / saved_value_heads.SETTINGS).is_file()

    def is_reward_model(self, in_value: bool) -> bool:
        """Whether the model is a sequence classifier. One on the hub is asked only if a value
        names it, as its config must be downloaded for that."""
        if self.guide is not None or self.path == models.SMALL_MODEL:
            return False
        here = os.path.exists(os.path.expanduser(self.path))
        return self.label is not None or (
            (here or in_value) and saved.classes_of(self.path) is not None
        )

    def class_index(self) -> int | None:
        """The number of the class that a reward model's value is the log-prob of."""
        classes = saved.classes_of(self.path) or []
        if self.label in classes:
            return classes.index(self.label)
        known, said = ", ".join(classes), f"--model {self.name}={self.path}"
        if self.label is not None:
            meant = did_you_mean(self.label, classes)
            raise ValueError(f"{said}@{self.label}: its classes are {known}{meant}")
        if len(classes) > 1:
            raise ValueError(
                f"{said} has the classes {known}; it must be {said}@{classes[-1]}, say"
            )
        return None


def parted(path: str) -> tuple[str, str | None]:
    """The texts before and after the @ of a guide. Names of folders may contain an @ as well."""
    if "@" not in path or os.path.exists(os.path.expanduser(path)):
        return path, None
    places = [i for i, character in enumerate(path) if character == "@"]
    there = [i for i in places if os.path.exists(os.path.expanduser(path[:i]))]
    at = max(there or places)
    return path[:at], path[at + 1 :]


def _guide_folder(guide: str) -> Path:
    """The folder of a guide, which is given as a path or as the name of one that ships."""
    folder = Path(guide).expanduser()
    if guide in models.GUIDES and not folder.is_dir():
        return models.guide(guide)
    if not (folder / saved_value_heads.SETTINGS).is_file():
        if (folder / saved_adapters.POLICY).is_file():
            raise ValueError(
                f"the guide is {guide!r}, a conditioned policy; crossfade pareto takes it, and a "
                "folder in it is the adapter of a reward"
            )
        if not (folder / saved_adapters.ADAPTER).is_file():
            raise FileNotFoundError(
                f"the guide is {guide!r}; it must be a folder with an {saved_adapters.ADAPTER} "
                f"(pickled weights are not loaded) or a {saved_value_heads.SETTINGS}, or one that "
                f"ships: {', '.join(models.GUIDES)}{did_you_mean(guide, models.GUIDES)}"
            )
        saved_adapters.check_adapter_folder(folder, "the guide")
    return folder


def fader_of(text: str) -> tuple[str, float]:
    """The name and the position that an option ``--fader NAME=NUMBER`` gives."""
    name, equals, number = text.partition("=")
    if not (equals and name.isidentifier()) or keyword.iskeyword(name):
        raise ValueError(f"--fader is {text!r}; it must be NAME=NUMBER")
    try:
        return unicodedata.normalize("NFKC", name), check_number(f"--fader {name}", float(number))
    except ValueError:
        raise ValueError(f"--fader is {text!r}; {number!r} must be a finite number") from None


def system_of(text: str, names: Sequence[str]) -> tuple[str, str]:
    """The name and the prompt of ``--system NAME=TEXT``; a single model needs no name."""
    name, equals, prompt = text.partition("=")
    if len(names) == 1 and not name.strip().isidentifier():
        name, equals, prompt = names[0], "=", text  # the only model needs no name
    if not equals:
        raise ValueError(f"--system is {text!r}; it must be NAME=TEXT")
    if name not in names:
        known = f"the models are {', '.join(names)}" if names else "a saved blend has its own"
        raise ValueError(f"--system names {name!r}; {known}{did_you_mean(name, names)}")
    reading.check_unicode(prompt, f"--system {name}")
    return name, prompt
