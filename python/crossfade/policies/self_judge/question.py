"""What a judge is asked, by the texts of options: ``--template`` and ``--principle``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ... import reading
from ...blends.blend import Blend
from ...checks import did_you_mean
from ...decoding.members import tokenizer_of
from ...models.instruct import has_template
from .judge import Judge
from .template import TEMPLATES, JudgeTemplate, as_template

FILES = (".yaml", ".yml", ".json")
DEFAULT = "hh"  # the template if none is given


class Question:
    """What the options say that a judge is asked, checked before any model is loaded.

    Args:
        template: its name or its file; None: the default.
        principles: each NAME or NAME=PHRASE.

    Attributes:
        template: the form of its prompt.
        principles: phrases by their names; None is the template's own question.
    """

    def __init__(self, template: str | None = None, principles: Sequence[str] = ()) -> None:
        self.template = _template(template or DEFAULT)
        self.principles = _principles(principles, self.template)

    def judge(self, blend: Blend, option: str) -> Judge:
        """The judge that a blend is; errors of its models name the option that gave them.

        Raises:
            ValueError: a label is not one token, the tokenizer has no chat template or this does
                not take a system message, or a term has a prompt of its own.
        """
        tokenizer = tokenizer_of(blend)
        if not has_template(tokenizer):
            raise ValueError(
                f"{option} is a model whose tokenizer has no chat template; a judge must have one, "
                "which its prompt goes through: name an instruct model, or save the template as "
                "chat_template.jinja in the model's folder"
            )
        try:
            return Judge(blend, tokenizer, template=self.template, principles=self.principles)
        except ValueError as error:
            said = str(error).replace("model has", "has", 1)
            said = said.replace("JudgeTemplate(system=...)", "system: in the file of --template")
            raise ValueError(f"{option}: {said}") from None

    def identity(self) -> dict[str, Any]:
        """What a judge is asked, as parts of a run's identity. The order of principles counts."""
        names = None if self.principles is None else list(self.principles.items())
        return {"template": self.template, "principles": names}


def _template(text: str) -> JudgeTemplate:
    if text in TEMPLATES:
        return TEMPLATES[text]
    suffix = Path(text).suffix.lower()
    if suffix not in FILES:
        raise ValueError(
            f"--template is {text!r}; it must be among {', '.join(TEMPLATES)}, or the .yaml or "
            f".json file of a template{did_you_mean(text, TEMPLATES)}"
        )
    parse = reading.parse_json if suffix == ".json" else reading.parse_yaml
    fields = parse(reading.read_text(text), text)
    if not isinstance(fields, dict):
        raise ValueError(f"{text} is {fields!r:.80}; it must have fields of a template")
    try:
        return as_template(fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{text}: {str(error).removeprefix('template ')}") from None


def _principles(given: Sequence[str], template: JudgeTemplate) -> dict[str, str] | None:
    if not given:
        return None
    found: dict[str, str] = {}
    for text in given:
        name, equals, phrase = text.partition("=")
        if equals and not (name.strip() and phrase.strip()):
            raise ValueError(f"--principle is {text!r}; it must be NAME or NAME=PHRASE")
        if not equals and name not in template.principles:
            known = ", ".join(template.principles) or "none"
            raise ValueError(
                f"--principle is {text!r}; the template knows {known}: another is given with its "
                f"phrase, as NAME=PHRASE{did_you_mean(name, template.principles)}"
            )
        if name in found:
            raise ValueError(f"--principle {name} is given twice; names must differ")
        found[name] = phrase if equals else template.principles[name]
    template.phrases(found)
    return found
