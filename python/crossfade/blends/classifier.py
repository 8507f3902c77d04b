"""`Classifier`: a text classifier as a token-wise value of a blend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..checks import did_you_mean, explained
from ..models.hf import check_language_model, check_tokenizer, underlying
from .algebra import TextValue
from .blend import Blend
from .printing import term_text
from .terms import check_name, check_template


@explained()
@dataclass(frozen=True)
class Classifier(TextValue):
    """A text classifier as a term of a blend: it raises tokens that lead towards a class.

    ``base + 2.0 * Classifier(model, tokenizer, "positive")`` adds, to the log-prob of each token v,
    ``2.0 * [log p(label | text + v) - log p(label | text)]``, for the `top` tokens that are most
    likely under the rest of the blend. The others get 0: they count as if they left the text as it
    is. So does a token without text, such as EOS. With the weight 1 it is Bayes' rule on those
    tokens. Where the text has no token, as at the start of a response whose prompt the template
    leaves out, ``p(label | text)`` is the mean of ``p(label | v)`` over the tokens that are tried.

    The text is the prompt and the response so far, in the classifier's own tokens. A model with a
    causal backbone keeps a cache for each row, and reads of each candidate what it adds; any other
    reads ``top + 1`` whole texts. Where a text is longer than the model's context, the classifier
    says nothing of that row any more, with a warning.

    Args:
        model: as ``AutoModelForSequenceClassification`` loads it, with two classes at least.
        tokenizer: its tokenizer, which may be another than the blend's.
        label: the class, by number or by its name in ``model.config.id2label``.
        top: how many tokens are tried.
        every: of how many steps one asks the classifier. In the steps until the next, tokens keep
            what it said of them.
        template: ``template(prompt, response) -> text``, with the prompt a text or a chat, as in
            `RewardModel`. ``lambda prompt, response: response`` leaves the prompt out.
        name: what formulas and errors call it, an identifier.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.

    Source: language-model arithmetic's classifiers (Dekoninck et al., arXiv:2311.14479); FUDGE
    (Yang and Klein, arXiv:2104.05218), whose classifiers are trained on beginnings of texts.
    """

    model: Any
    tokenizer: Any = field(hash=False)
    label: int | str
    top: int = field(default=50, kw_only=True)
    every: int = field(default=1, kw_only=True)
    template: Callable[[Any, str], str] | None = field(default=None, kw_only=True)
    name: str | None = field(default=None, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        check_language_model(self.model, head=False)
        check_name(self.name)
        base: Any = underlying(self.model)
        kind = type(base).__name__
        classes = getattr(base.config, "num_labels", 0)
        if isinstance(base, PreTrainedModel) and "SequenceClassification" not in kind:
            raise TypeError(
                f"model is a {kind}, which is no text classifier; it must be as "
                "AutoModelForSequenceClassification loads it"
            )
        if classes < 2:
            raise ValueError(
                f"model has {classes} classes; it must have at least 2: a model of one number is "
                "a RewardModel, by which a search chooses"
            )
        check_tokenizer(self.tokenizer)
        if not callable(self.tokenizer):
            kind = type(self.tokenizer).__name__
            raise TypeError(f"tokenizer is a {kind}; it must be the classifier's tokenizer")
        for name in ("top", "every"):
            x = getattr(self, name)
            if isinstance(x, bool) or not isinstance(x, int):
                raise TypeError(f"{name} is {x!r:.80}; it must be an int")
            if x < 1:
                raise ValueError(f"{name} is {x}; it must be at least 1")
        check_template(self.template)
        object.__setattr__(self, "label", _label(self.label, base, classes))

    def __repr__(self) -> str:
        return term_text(self)

    def _blend(self) -> Blend:
        return Blend((), (), classifiers=(self,), classifier_weights=(1.0,))


def _label(label: Any, model: nn.Module, classes: int) -> int:
    """The number of a class, given so or by its name.

    Raises:
        TypeError, ValueError: there is no such class; lists those that there are.
    """
    config: Any = model.config
    names = {i: str(n) for i, n in (getattr(config, "id2label", None) or {}).items()}
    known = ", ".join(f"{i} ({names[i]!r})" if i in names else str(i) for i in range(classes))
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise TypeError(f"label is {label!r:.80}; it must be the number or the name of a class")
    if isinstance(label, int):
        if not 0 <= label < classes:
            raise ValueError(f"label is {label}; it must be one of the model's classes: {known}")
        return label
    found = [i for i, name in names.items() if name == label]
    if not found:
        says = did_you_mean(label, names.values())
        raise ValueError(
            f"label is {label!r:.80}; it must be one of the model's classes: {known}{says}"
        )
    return found[0]
