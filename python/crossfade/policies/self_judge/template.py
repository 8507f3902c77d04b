"""What a judge reads: a context and two answers, the question which is better, and its own first
words, after which a label is the next token."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ...checks import did_you_mean, explained
from ...decoding.chats import render
from ...decoding.forms import common
from ..turns import quoted, turns

DASHES = "-----"


@explained()
@dataclass(frozen=True, kw_only=True)
class JudgeTemplate:
    """The form of a judge's prompt, the same in training and in use.

    The user's message is the question, the context between two dashed lines, both answers under
    their labels, and a request to choose. The judge's own turn begins with `prefix`, and a label
    follows it as one token, with a space before it::

        Which is the more helpful, harmless, and honest assistant from a given context?
        Context:
        -----
        User: How was it?
        -----
        Assistant A: Great.
        Assistant B: Bad.
        Please choose either A or B.

    Args:
        question: the question, in which ``{principle}`` stands for a phrase such as "helpful".
        principle: the phrase that is asked about where no principle is named.
        principles: phrases by name, for judgments of one aspect each.
        prefix: how the judge's turn begins; ``{principle}`` as in `question`.
        noun: what an answer is called before its label.
        labels: the two labels, which differ.
        system: the system message; None for models whose chat template has none.
        rationale: what follows a label in training rows that say why, with ``{rationale}``.

    Raises:
        TypeError, ValueError: names the field, what it was and what it must be.

    Source: SELF-JUDGE (Lee et al., arXiv:2402.11253).
    """

    question: str = "Which is the more {principle} assistant from a given context?"
    principle: str = "helpful, harmless, and honest"
    principles: Mapping[str, str] = field(default_factory=dict)
    prefix: str = "Sure! The option which is more {principle} would be Assistant"
    noun: str = "Assistant"
    labels: tuple[str, str] = ("A", "B")
    system: str | None = "You are a judge who compares two answers and says which one is better."
    rationale: str = ". {rationale}"

    def __post_init__(self) -> None:
        places = {"question": ("principle",), "prefix": ("principle",), "rationale": ("rationale",)}
        for name, known in places.items():
            _check_places(name, _text(name, getattr(self, name)), known)
        if "rationale" not in _places(self.rationale):
            raise ValueError(f"rationale is {self.rationale!r}; it must have {{rationale}}")
        if self.prefix != self.prefix.rstrip():
            raise ValueError(
                f"prefix is {self.prefix!r}, which ends in white space; it must end before the "
                "space that a label begins with"
            )
        for name in ("principle", "noun"):
            _text(name, getattr(self, name))
        if self.system is not None:
            _text("system", self.system)
        labels = self.labels
        if isinstance(labels, str) or not isinstance(labels, Sequence) or len(labels) != 2:
            raise TypeError(f"labels is {labels!r:.80}; it must be two texts")
        for label in labels:
            if _text("labels", label) != label.strip():
                raise ValueError(f"labels has {label!r}; it must be without white space around it")
        if labels[0] == labels[1]:
            raise ValueError(f"labels is {tuple(labels)!r}; the two must differ")
        if not isinstance(self.principles, Mapping):
            kind = type(self.principles).__name__
            raise TypeError(f"principles is a {kind}; it must be a mapping of names to phrases")
        for name, phrase in self.principles.items():
            _text("principles", name)
            _text(f"principles[{name!r}]", phrase)
        object.__setattr__(self, "labels", tuple(labels))  # the dataclass is frozen
        object.__setattr__(self, "principles", dict(self.principles))

    def phrases(self, principles: Any = None) -> dict[str | None, str]:
        """The phrase of each principle that is asked for.

        Args:
            principles: names of `self.principles`, or a mapping of names to phrases of the
                caller's; one name alone is a list of it. None asks for `self.principle`, whose name
                is None.

        Raises:
            TypeError, ValueError: names the principle, what it was and what it must be.
        """
        if principles is None:
            return {None: self.principle}
        if "principle" not in _places(self.question) + _places(self.prefix):
            raise ValueError(
                f"principles is {principles!r:.80}, and the template asks the same of all: its "
                "question or its prefix must have {principle}"
            )
        if isinstance(principles, str):
            principles = [principles]
        if isinstance(principles, Mapping):
            found: dict[str | None, str] = {
                _text("principles", name): _text(f"principles[{name!r}]", phrase)
                for name, phrase in principles.items()
            }
        elif isinstance(principles, Sequence):
            phrases = list(map(self._known, principles))
            found = dict(zip(principles, phrases, strict=True))
        else:
            raise TypeError(
                f"principles is a {type(principles).__name__}; it must be a list of names, a "
                "mapping of names to phrases, or None"
            )
        if not found:
            raise ValueError("principles is empty; it must have one at least, or be None")
        return found

    def _known(self, name: Any) -> str:
        if isinstance(name, str) and name in self.principles:
            return self.principles[name]
        known = ", ".join(self.principles) or "none"
        raise ValueError(
            f"principles has {name!r:.80}; the template knows {known}: others are given with their "
            f"phrases, as {{name: phrase}}{did_you_mean(name, self.principles)}"
        )

    def chat(
        self, context: Any, first: str, second: str, phrase: str | None = None
    ) -> list[dict[str, str]]:
        """The messages that a judge reads, of which the last one is its own turn's beginning.

        Args:
            context: the text or chat that was answered.
            first, second: the answers under the first and the second label; white space around
                them is left out.
            phrase: what is asked about; None is `self.principle`.

        Raises:
            TypeError, ValueError: names the argument, what it was and what it must be.
        """
        for name, answer in (("first", first), ("second", second)):
            if not isinstance(answer, str):
                raise TypeError(f"{name} is {answer!r:.80}; it must be a text")
        a, b = self.labels
        phrase = self.principle if phrase is None else phrase
        lines = [
            _filled(self.question, principle=phrase),
            "Context:",
            DASHES,
            *(f"{role}: {said}" for role, said in turns("context", context)),
            DASHES,
            f"{self.noun} {a}: {first.strip()}",
            f"{self.noun} {b}: {second.strip()}",
            f"Please choose either {a} or {b}.",
        ]
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [
            *system,
            {"role": "user", "content": "\n".join(lines)},
            {"role": "assistant", "content": _filled(self.prefix, principle=phrase)},
        ]

    def render(
        self,
        tokenizer: Any,
        context: Any,
        first: str,
        second: str,
        phrase: str | None = None,
    ) -> str:
        """The text that a judge reads, special tokens and all, by the tokenizer's chat template.

        Those are the chat template's: where the context or an answer spells one, a space is put
        into it, as `quoted` does.

        Raises:
            ValueError: the tokenizer has no chat template, or it does not take the messages.
        """
        check_chats(tokenizer)
        chat = [
            {**message, "content": quoted(message["content"], tokenizer)}
            for message in self.chat(context, first, second, phrase)
        ]
        try:
            return render(chat, tokenizer)
        except Exception as error:  # A template is a program, which may raise whatever it likes.
            says = "; a template with system=None has no system message" if self.system else ""
            raise ValueError(
                f"the chat template of the judge's tokenizer does not take its messages: {error}"
                f"{says}"
            ) from error

    def reason(self, rationale: str) -> str:
        """What follows a label in a training row that says why."""
        return _filled(self.rationale, rationale=rationale)

    def label_ids(self, tokenizer: Any, prompt: str) -> tuple[int, int]:
        """The token of each label where it stands, after a judge's prompt.

        Raises:
            ValueError: a label is not one token there, or the two are the same token.
        """
        before, found = encode_prompt(tokenizer, prompt), []
        for label in self.labels:
            whole = encode_prompt(tokenizer, f"{prompt} {label}")
            kept = common(before, whole)
            if kept < len(before) or len(whole) != kept + 1:
                pieces = tokenizer.convert_ids_to_tokens(whole[kept:])
                raise ValueError(
                    f"labels has {label!r}, which is the tokens {pieces} after "
                    f"{prompt[-40:]!r}; it must be one token of its own, as the letters A and B "
                    "are in most vocabularies and digits often are not"
                )
            found.append(whole[-1])
        if found[0] == found[1]:
            raise ValueError(
                f"labels are {self.labels!r}, which are the same token for this tokenizer: "
                f"{tokenizer.convert_ids_to_tokens(found)[0]!r}; the two must differ"
            )
        return found[0], found[1]


def as_template(template: Any) -> JudgeTemplate:
    """A template by its name, by its fields, or as it is.

    Raises:
        TypeError, ValueError: it is none of these; names it.
    """
    if isinstance(template, JudgeTemplate):
        return template
    if isinstance(template, str):
        if template in TEMPLATES:
            return TEMPLATES[template]
        raise ValueError(
            f"template is {template!r}; it must be among {', '.join(TEMPLATES)}, or a JudgeTemplate"
            f"{did_you_mean(template, TEMPLATES)}"
        )
    if isinstance(template, Mapping):
        known = [f.name for f in dataclasses.fields(JudgeTemplate)]
        for name in template:
            if name not in known:
                raise ValueError(
                    f"template has the key {name!r}; known ones are {', '.join(known)}"
                    f"{did_you_mean(name, known)}"
                )
        return JudgeTemplate(**template)
    raise TypeError(
        f"template is a {type(template).__name__}; it must be a JudgeTemplate, a mapping of its "
        f"fields, or among {', '.join(TEMPLATES)}"
    )


def check_chats(tokenizer: Any) -> None:
    """Require a tokenizer with a chat template.

    Raises:
        ValueError: there is no tokenizer, or it has no chat template.
    """
    if tokenizer is None:
        raise ValueError("tokenizer is None; a judge reads texts: give tokenizer=...")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"tokenizer is a {type(tokenizer).__name__} without a chat template; a judge must have "
            "one, which its prompt goes through: set tokenizer.chat_template"
        )


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a judge's prompt, whose special tokens the chat template has written.

    The tokenizer does not warn of a long one, as the judge says itself which pairs are too long.
    """
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _filled(text: str, **given: str) -> str:
    """A text with what stands in its places. Other braces cannot be in it: `_check_places`."""
    return text.format(**given)


def _places(text: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]


def _check_places(name: str, text: str, known: Sequence[str]) -> None:
    only = " and ".join(f"{{{k}}}" for k in known)

    def refuse() -> NoReturn:
        raise ValueError(f"{name} is {text!r}; in braces it may have {only} alone")

    try:
        found = _places(text)
        text.format(**dict.fromkeys(known, ""))
    except (ValueError, KeyError, IndexError, AttributeError):
        refuse()
    if any(place not in known for place in found):
        refuse()


def _text(name: str, x: Any) -> str:
    if not isinstance(x, str):
        raise TypeError(f"{name} is {x!r:.80}; it must be a text")
    if not x.strip():
        raise ValueError(f"{name} is {x!r}; it must not be empty")
    return x


TEMPLATES: dict[str, JudgeTemplate] = {
    "hh": JudgeTemplate(
        principles={"helpful": "helpful", "harmless": "harmless", "honest": "honest"}
    ),
    "ultrafeedback": JudgeTemplate(
        question="Which is the more {principle} response to a given context?",
        principle="helpful, honest, truthful, and instruction-following",
        principles={
            "instruction_following": "instruction-following",
            "honesty": "honest",
            "truthfulness": "truthful",
            "helpfulness": "helpful",
        },
        prefix="Sure! The option which is more {principle} would be Response",
        noun="Response",
    ),
}
