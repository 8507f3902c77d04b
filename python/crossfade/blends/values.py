"""Values, which guide a search: they score a prompt and what is written of its response so far.

``0.5 * a + 0.5 * b`` adds values (multi-value guidance). A `ValueHead` can be a value here, and a
term of a blend besides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .. import elsewhere
from ..checks import check_called, check_number, explained
from ..models.hf import check_language_model
from ..ops import check
from ..ops.check import WEIGHT_SUM_TOLERANCE
from .algebra import Algebra, Sums, is_callable, scaled
from .blend import Blend, Model, ValueHead, as_term
from .classifier import Classifier
from .printing import settings_text, sum_text, term_text, weight_text
from .terms import check_name, check_template, default_name, distinct_names
from .weights import Weight, is_zero, merge_weights, weight_rows


class Values(Sums["ValueSum"]):
    """The operators of values. Every result is a `ValueSum`."""

    def _sum(self) -> ValueSum:
        return ValueSum((self,), (1.0,))

    def _operand(self, x: Any) -> ValueSum | None:
        if isinstance(x, Algebra) and x._blend().terms:
            blend, value = x._blend(), self._sum()
            ratio = any(isinstance(v, LogRatio) for v in value.values)
            also = "; or add the log-probs themselves: base + 0.5 * (tuned - ref)" if ratio else ""
            raise TypeError(
                f"{value} scores what was written, and {blend} has log-probs of next tokens, so "
                "they cannot be added; let a search choose by the value: generate(blend, inputs, "
                f"search=BestOfN(16, value)){also}"
            )
        if isinstance(x, (Values, Algebra)) or is_function(x):
            return _as_sum(x)
        raise TypeError(f"a {type(x).__name__} cannot be added to a value; values can")

    def _plus(self, a: ValueSum, b: ValueSum) -> ValueSum:
        return ValueSum(a.values + b.values, a.weights + b.weights)

    def _times(self, x: ValueSum, factor: Weight, *, divide: bool = False) -> ValueSum:
        return ValueSum(x.values, tuple(scaled(w, factor, x, divide=divide) for w in x.weights))


@explained(elsewhere.VALUE)
@dataclass(frozen=True)
class LogRatio(Values):
    """The implicit value: ``beta * sum_t [log p_tuned(y_t) - log p_ref(y_t)]`` of a response.

    Every generated token counts, EOS too. A model that is a term of the blend costs nothing here,
    as its log-probs are known. Another one reads each token once, a chunk at a time, and keeps a
    cache. If the vocabulary of the two is not the blend's, they read the text that was written, in
    their own tokens.

    Args:
        tuned, ref: two `Model` terms or bare causal LMs of one vocabulary. They may be one model
            with two adapters, system prompts or prompts.
        beta: the scale of the reward: the KL weight that `tuned` was trained with.
        normalize: divides by the number of tokens, so that a longer text is no better or worse
            for its length alone.
        name: what outputs and errors call the value, an identifier.

    Raises:
        TypeError, ValueError, NotImplementedError: as in `Model`.

    Source: weak-to-strong search (Zhou et al., arXiv:2405.19262), where the sum is not normalised;
    DPO's implicit reward (arXiv:2305.18290).
    """

    tuned: Any
    ref: Any
    beta: float = 1.0
    normalize: bool = field(default=False, kw_only=True)
    name: str | None = field(default=None, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        put = object.__setattr__  # the dataclass is frozen
        put(self, "tuned", as_term("tuned", self.tuned, Model))
        put(self, "ref", as_term("ref", self.ref, Model))
        if isinstance(self.beta, (list, tuple)) or getattr(self.beta, "shape", None):
            raise TypeError(
                f"beta is {self.beta!r:.80}; it must be a number: a scale for each request is a "
                "weight, as in [0.5, 1.0] * LogRatio(tuned, ref)"
            )
        put(self, "beta", check_number("beta", self.beta))
        check.flag("normalize", self.normalize)
        check_name(self.name)
        if self.tuned == self.ref:
            raise ValueError(f"tuned and ref are both {self.ref}; their ratio is 1 everywhere")

    def __repr__(self) -> str:
        settings = settings_text(self, skip=["tuned", "ref"])
        return f"LogRatio({', '.join([str(self.tuned), str(self.ref), *settings])})"


@explained(elsewhere.VALUE)
@dataclass(frozen=True)
class RewardModel(Values):
    """A sequence-classification model that reads the prompt and the response so far as text.

    A model with a causal backbone keeps a cache and reads only what is new. Any other reads the
    whole text again at each chunk's end.

    Args:
        model: as ``AutoModelForSequenceClassification`` loads it.
        tokenizer: its tokenizer.
        label: the class whose log-prob is the value. None is for models with one output, which is
            the value itself.
        template: ``template(prompt, response) -> text``, with the prompt a text or a chat. By
            default a chat goes through the tokenizer's chat template, with the response as the
            assistant's message, and a text is followed by the response.
        name: as in `LogRatio`.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
        NotImplementedError: as in `Model`.
    """

    model: Any
    tokenizer: Any = field(hash=False)
    label: int | None = field(default=None, kw_only=True)
    template: Callable[[Any, str], str] | None = field(default=None, kw_only=True)
    name: str | None = field(default=None, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        check_language_model(self.model, head=False)
        check_name(self.name)
        if not callable(self.tokenizer):
            kind = type(self.tokenizer).__name__
            raise TypeError(f"tokenizer is a {kind}; it must be a Hugging Face tokenizer")
        check_template(self.template)
        labels = getattr(self.model.config, "num_labels", 1)
        if self.label is None and labels != 1:
            raise ValueError(f"label is None; the model has {labels} classes and needs one named")
        if self.label is not None:
            if isinstance(self.label, bool) or not isinstance(self.label, int):
                raise TypeError(f"label is {self.label!r}; it must be an int or None")
            if not 0 <= self.label < labels:
                raise ValueError(f"label is {self.label}; it must be within [0, {labels})")

    def __repr__(self) -> str:
        return term_text(self)


@explained(elsewhere.VALUE)
@dataclass(frozen=True)
class Reward(Values):
    """Any Python function of texts: ``fn(prompts, responses) -> scores``.

    It is called at the end of each chunk with the rows that grew. A prompt is the text or chat that
    the caller gave; token ids are decoded first. A response is as in `Output.text`, so that the
    prompt followed by it is the whole text.

    Args:
        fn: takes two lists of one length and returns as many numbers. NaN counts as the worst.
        name: as in `LogRatio`. By default it is the function's name.
    """

    fn: Callable[[list[Any], list[str]], Sequence[float] | Tensor]
    name: str | None = field(default=None, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise TypeError(
                f"fn is a {type(self.fn).__name__}; it must be a function of two lists, prompts "
                "and responses, that returns a list of scores"
            )
        check_called("fn is called as fn(prompts, responses), with two lists", self.fn, 2)
        check_name(self.name)

    def __repr__(self) -> str:
        return f"Reward({getattr(self.fn, '__name__', type(self.fn).__name__)})"


@dataclass(frozen=True, eq=False, repr=False)
class ValueSum(Values):
    """A weighted sum of values, ``sum_m weights[m] * values[m]``. Immutable.

    Equal values merge, and a value whose weight is the number 0 is left out.

    Args:
        values: each a `LogRatio`, `ValueHead`, `RewardModel` or `Reward`.
        weights: a number or a tensor ``[requests]`` a value.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
    """

    values: tuple[Any, ...]
    weights: tuple[Weight, ...]

    def __post_init__(self) -> None:
        for v in self.values:
            if not isinstance(v, (LogRatio, RewardModel, Reward, ValueHead)):
                raise TypeError(f"values have a {type(v).__name__}; they must be values")
        total = merge_weights("weights", self.values, self.weights)
        total = {v: w for v, w in total.items() if not is_zero(w)}
        put = object.__setattr__  # the dataclass is frozen
        put(self, "values", tuple(total))
        put(self, "weights", tuple(total.values()))

    def _sum(self) -> ValueSum:
        return self

    @cached_property
    def names(self) -> tuple[str, ...]:
        """A name for each value, different from all others."""
        return distinct_names([v.name or _default_name(v) for v in self.values])

    def row_weights(self, requests: int) -> Tensor:
        """The weights of a batch as a float64 tensor ``[requests, values]``.

        Raises:
            ValueError: a weight tensor has another length; names the value.
        """
        w = weight_rows(self.names, self.weights, requests, "cpu")
        return torch.as_tensor(w, dtype=torch.float64, device="cpu").expand(requests, -1)

    def __repr__(self) -> str:
        return sum_text(self.names, self.weights)


def as_value(x: Any, name: str = "value") -> ValueSum:
    """`x` as a value that can guide a search: a value, a sum of them, or a `ValueHead`.

    A plain function becomes a `Reward`. `name` is what errors call it.

    Raises:
        TypeError: it is none of these.
        ValueError: the weights of all its parts are 0.
    """
    value = _as_sum(x, name)
    if not value.values:
        raise ValueError(f"{name} has no part whose weight is not 0")
    return value


def _as_sum(x: Any, name: str = "value") -> ValueSum:
    """The same, but that its parts may all have the weight 0: others can be added to it."""
    if callable(getattr(x, "prefer", None)) and not isinstance(x, (Values, type)):
        raise TypeError(
            f"{name} is a {type(x).__name__}, which compares two responses; it must score one: "
            "search=Tournament(judge, n=16) is the search by a judge"
        )
    if isinstance(x, Algebra):
        blend: Blend = x._blend()
        if blend.terms:
            raise TypeError(
                f"{name} is {blend}, a blend of log-probs; it must be a value, such as "
                f"{_ratio_text(blend)}"
            )
        x = ValueSum(
            (*blend.values, *map(_reward_model, blend.classifiers)),
            (*blend.value_weights, *blend.classifier_weights),
        )
    if is_function(x):
        x = Reward(x)
    if not isinstance(x, Values):
        what, instead = f"a {type(x).__name__}", ""
        if isinstance(x, nn.Module):
            what = f"a bare {type(x).__name__}"
            instead = "; LogRatio(tuned, ref) compares two, ValueHead(model) is for value heads"
            if "SequenceClassification" in type(x).__name__:
                instead = "; RewardModel(model, tokenizer) reads texts with it"
        elif isinstance(x, type):
            what = f"the class {x.__name__}"
        elif isinstance(getattr(x, "model", None), nn.Module):  # a pipeline of transformers
            instead = "; RewardModel(x.model, x.tokenizer) reads texts with its model"
        elif isinstance(x, (str, int, float)):
            what = repr(x)[:80]
        raise TypeError(
            f"{name} is {what}; it must be a LogRatio, ValueHead, RewardModel, Reward, a function "
            f"of prompts and responses, or a sum{instead}"
        )
    return x._sum()


def _reward_model(c: Classifier) -> RewardModel:
    """A classifier where a search chooses by it: the log-prob of its class, of the whole text."""
    assert isinstance(c.label, int)
    return RewardModel(c.model, c.tokenizer, label=c.label, template=c.template, name=c.name)


def is_function(x: Any) -> bool:
    """Whether this is a function of the caller's, or an object that is called like one."""
    own = isinstance(x, (type, nn.Module, Values, Algebra)) or hasattr(x, "model")
    return is_callable(x) and not own


def _ratio_text(blend: Blend) -> str:
    """The `LogRatio` that was probably meant by a blend in its place."""
    names = blend.names
    if len(names) == 2 and [w < 0 for w in blend.weights if not isinstance(w, Tensor)] == [0, 1]:
        beta = weight_text(blend.weights[0])
        return f"LogRatio({names[0]}, {names[1]}{'' if beta == '1' else f', beta={beta}'})"
    return f"LogRatio({names[0]}, ref), which compares two models"


def formula_value(formula: Blend) -> ValueSum:
    """The value that a formula means, which was read as if it were a blend.

    ``beta * (tuned - ref)`` means a `LogRatio`, and a `ValueHead` means itself. Several models less
    one reference, as in ``0.5 * a + 0.5 * b - ref``, mean a sum of ratios.

    Raises:
        ValueError: the formula is not of these forms.
    """
    weights = [float(w) for w in formula.weights if not isinstance(w, Tensor)]
    whole = len(weights) == len(formula.weights)
    refs = [t for t, w in zip(formula.terms, weights, strict=False) if w < 0]
    ratios = len(refs) == 1 and abs(sum(weights)) <= WEIGHT_SUM_TOLERANCE
    if not whole or formula.parts or formula.classifiers or (formula.terms and not ratios):
        raise ValueError(
            f"value is {formula}; it must be value heads, or weighted models less one reference, "
            "with weights that sum to 0, such as 0.5 * (tuned - ref), or a sum of both"
        )
    value: Any = ValueSum(formula.values, formula.value_weights)
    for term, weight in zip(formula.terms, weights, strict=True):
        if term not in refs:
            value = value + weight * LogRatio(term, refs[0])
    return as_value(value)


def _default_name(value: Any) -> str:
    if isinstance(value, LogRatio):
        return "log_ratio"
    if isinstance(value, Reward):
        name = getattr(value.fn, "__name__", "")
        return name if name.isidentifier() else "reward"
    return default_name(value.model, None, "value" if isinstance(value, ValueHead) else "reward")
