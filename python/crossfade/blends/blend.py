"""What is decoded: `Model` and `ValueHead`, the terms, and `Blend`, a weighted sum of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import elsewhere
from ..checks import explained
from ..models.adapters import check_adapter, check_mix
from ..models.hf import check_language_model, check_tokenizer, is_scalar
from ..ops.check import MAX_TERMS
from ..ops.types import Support
from .algebra import Algebra, TextValue, instead_of_blend
from .described import Described
from .mixes import Mix
from .parts import Part, used_parts
from .printing import blend_text, term_text
from .saving import (
    check_saved,
    loaded_parts,
    loaded_power,
    loaded_support,
    loaded_weight,
    plain_blend,
)
from .terms import as_term, check_name, check_prompt, check_system
from .weights import Weight, check_mean, check_power, is_zero, merge_weights

if TYPE_CHECKING:
    from .classifier import Classifier


@explained(elsewhere.TERM)
@dataclass(frozen=True)
class Model(Algebra):
    """A causal language model as a term: its next-token log-probs, given its own prompt.

    ``Model(a) + 0.8 * (Model(b) - Model(c))`` is a `Blend`. Terms are equal, and merge, if they
    have the same model object, tokenizer, adapter, system prompt and prompt; names do not count.

    Args:
        model: a Hugging Face causal LM, with adapters of its own or not, or a `peft.PeftModel` or
            `peft.PeftMixedModel` around one, on any device.
        tokenizer: its tokenizer. Without one, its token ids are taken to mean what those of the
            other terms mean.
        adapter: a PEFT adapter's name, ``"active"`` for what the model would do by itself, or None
            for the plain base. Or a mix in weight space, ``{"a": 0.7, "b": 0.3}``: every layer has
            the sum of the adapters' deltas with these weights, which are any finite numbers, or
            tensors ``[requests]``, so that each request has a model of its own, all of them rows
            of one forward. The model is asked for its adapters again at each call, as they come
            and go. Terms over one model share its weights.
        system: a system prompt, joined to every request through the chat template, or a list of one
            a request.
        prompt: replaces the request's prompt for this term: one, a list of one a request, or a
            function of the request.
        name: what formulas, errors and saved blends call it, an identifier. By default the named
            adapter or the last part of the model's path.

    Raises:
        TypeError: an argument is of the wrong kind, or the model has no language modelling head.
        ValueError: `adapter` is not an adapter of the model, or is None where the plain base is not
            there any more; `name` is not an identifier.
        NotImplementedError: the model is an encoder-decoder, or has an adapter of a kind that does
            more than to change layers token by token (learned prompts, activated LoRA, X-LoRA), or
            a mix has one that is no plain LoRA (DoRA, modules that are trained whole).
    """

    model: Any
    tokenizer: Any = field(default=None, hash=False, kw_only=True)
    adapter: str | Mapping[str, Weight] | Mix | None = field(default="active", kw_only=True)
    system: str | Sequence[str] | None = field(default=None, kw_only=True)
    prompt: str | Sequence[Any] | Callable[[Any], Any] | None = field(
        default=None, hash=False, kw_only=True
    )
    name: str | None = field(default=None, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        check_language_model(self.model, head=True)
        check_tokenizer(self.tokenizer)
        if isinstance(self.adapter, Mapping):
            object.__setattr__(self, "adapter", Mix.of(self.adapter))
        if isinstance(self.adapter, Mix):
            check_mix(self.model, self.adapter.names)
        else:
            check_adapter(self.model, self.adapter)
        check_name(self.name)
        object.__setattr__(self, "system", check_system(self.system))
        check_prompt(self.prompt)

    def __repr__(self) -> str:
        return term_text(self)

    def _blend(self) -> Blend:
        return Blend((self,), (1.0,))


@explained(elsewhere.TERM)
@dataclass(frozen=True)
class ValueHead(Algebra):
    """A model with a Q-head: its ``model(...).logits`` are values of every next token.

    As a term of a blend, ``weight * Q(v)`` is added to the log-prob of each token v after the
    models are blended (ARGS, arXiv:2402.01694; IVG's explicit value, arXiv:2409.17819).

    Args:
        model: an ``nn.Module`` with a config, called as a Hugging Face causal LM is.
        tokenizer, name: as in `Model`.

    Raises:
        TypeError, ValueError, NotImplementedError: as in `Model`.
    """

    model: Any
    tokenizer: Any = field(default=None, hash=False, kw_only=True)
    name: str | None = field(default=None, compare=False, kw_only=True)

    def __post_init__(self) -> None:
        check_language_model(self.model, head=False)
        check_tokenizer(self.tokenizer)
        check_adapter(self.model, "active")
        check_name(self.name)

    def __repr__(self) -> str:
        return term_text(self)

    def _blend(self) -> Blend:
        return Blend((), (), (self,), (1.0,))


@dataclass(frozen=True, eq=False, repr=False)
class Blend(Described):
    """Weighted next-token distributions and values, decoded as one. Immutable.

    ``log pi = log blend + sum_m value_weights[m] * values[m] - log Z``, where ``log blend`` is
    ``sum_k weights[k] * log p_k`` for ``power = 0`` and ``log (sum_k weights[k] * p_k^r)^(1/r)``
    for ``r = power != 0``, which is ``max_k log p_k`` for ``inf`` and ``min_k log p_k`` for
    ``-inf``. The pushes of `parts` are added to the former. It is usually written as a formula of
    `Model` and `ValueHead`.

    Equal terms merge. A term whose weight is the number 0 is left out and costs nothing, with two
    exceptions: the first term, from which decoding takes the generation config and the base of
    `kl_to_base`, and the support's term. A term that was left out comes last if it is added again.
    Terms of parts are terms of the blend, after those that are added by themselves; a term of
    parts alone has the weight 0.

    Args:
        terms: `Model` terms or bare models, at most 16. A blend without any can be added to
            others, and cannot be decoded.
        weights: a number or a tensor ``[requests]`` a term, of any sign. With ``power != 0`` none
            may be negative and they must sum to 1.
        values, value_weights: likewise `ValueHead` values, which are added after the models are
            blended.
        power: r of the power mean; 0 is the geometric blend, inf the union, -inf the intersection.
        support: removes tokens by the distribution of one term, ``terms[support.term]``.
        parts: at most 8 `Part`: clamped sums, and unions and intersections that are added to other
            terms. Only a blend with power 0 has any.
        classifiers, classifier_weights: `Classifier` values, and their weights.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
    """

    terms: tuple[Model, ...]
    weights: tuple[Weight, ...]
    values: tuple[ValueHead, ...] = ()
    value_weights: tuple[Weight, ...] = ()
    power: float = 0.0
    support: Support | None = None
    parts: tuple[Part, ...] = ()
    classifiers: tuple[Classifier, ...] = ()
    classifier_weights: tuple[Weight, ...] = ()

    def __post_init__(self) -> None:
        terms = tuple(as_term("terms", t, Model) for t in self.terms)
        values = tuple(as_term("values", v, ValueHead) for v in self.values)
        s = self.support
        if s is not None and not isinstance(s, Support):
            raise TypeError(
                f"support is a {type(s).__name__}; it must be a Support, such as "
                "Support(min_p=0.1), or None"
            )
        if s is not None and s.term >= len(terms):
            raise ValueError(f"support.term is {s.term}; the blend has terms 0 to {len(terms) - 1}")
        power = check_power("power", self.power)
        parts = used_parts(self.parts, power)

        total = merge_weights("weights", terms, self.weights)
        keep = set(list(total)[:1]) | ({terms[s.term]} if s else set())
        of_parts = dict.fromkeys(t for part in parts for t in part.terms)
        keep -= of_parts.keys() - set(list(total)[:1])
        total = {t: w for t, w in total.items() if t in keep or not is_zero(w)}
        total |= {t: 0.0 for t in of_parts if t not in total}
        gains = merge_weights("value_weights", values, self.value_weights)
        gains = {v: w for v, w in gains.items() if not is_zero(w)}
        for c in self.classifiers:
            if not isinstance(c, TextValue):
                raise TypeError(f"classifiers have a {type(c).__name__}; they must be Classifiers")
        pulls = merge_weights("classifier_weights", self.classifiers, self.classifier_weights)
        pulls = {c: w for c, w in pulls.items() if not is_zero(w)}
        for name, count in (("terms", len(total)), ("values", len(gains) + len(pulls))):
            if count > MAX_TERMS:
                raise ValueError(f"{name} are {count}; they must be at most {MAX_TERMS}")
        if power != 0:
            check_mean(tuple(total.values()))
        for v in gains if total else ():
            if is_scalar(v.model):
                raise TypeError(
                    f"{v} has one number for a text, and a blend adds a value of every next token; "
                    "let a search choose by it: generate(blend, inputs, search=BestOfN(16, value))"
                )

        put = object.__setattr__  # the dataclass is frozen
        put(self, "terms", tuple(total))
        put(self, "weights", tuple(total.values()))
        put(self, "values", tuple(gains))
        put(self, "value_weights", tuple(gains.values()))
        put(self, "power", power)
        put(self, "parts", parts)
        put(self, "classifiers", tuple(pulls))
        put(self, "classifier_weights", tuple(pulls.values()))
        if s is not None:
            put(self, "support", replace(s, term=self.terms.index(terms[s.term])))

    def to_dict(self) -> dict[str, Any]:
        """The blend as plain JSON: names, weights, prompts and settings, without the models.

        Raises:
            TypeError: a term's prompt is a function or not JSON, or there is a `Classifier`, which
                is added again after loading; names it.
        """
        return plain_blend(self)

    @classmethod
    def from_dict(cls, d: dict[str, Any], /, **models: Any) -> Blend:
        """The blend that `to_dict` saved, over `models` by the names in it.

        Args:
            d: what `to_dict` gave.
            models: for each name in `d` a bare model, or a `Model` (for a value a `ValueHead`)
                where there is a tokenizer. Adapter, system prompt and prompt come from `d`.

        Raises:
            TypeError: one of `models` is of the wrong kind.
            ValueError: `d` is not what `to_dict` gives (names the key), the names of `models` are
                not those in `d`, or a model has settings that contradict `d`.
        """
        check_saved(d)
        names = {m["name"] for m in (*d["terms"], *d["values"])}
        if names != set(models):
            raise ValueError(
                f"models are {sorted(models)}; they must be {sorted(names)}, the names in d"
            )
        terms = []
        for saved in d["terms"]:
            term = as_term(saved["name"], models[saved["name"]], Model)
            settings = {key: saved[key] for key in ("name", "adapter", "system", "prompt")}
            if isinstance(settings["adapter"], dict):
                settings["adapter"] = Mix.of(settings["adapter"])
            loaded = replace(term, **settings)
            if term not in (loaded, Model(term.model, tokenizer=term.tokenizer)):
                raise ValueError(f"{saved['name']} is {term}; the settings in d say {loaded}")
            terms.append(loaded)
        values = [
            replace(as_term(v["name"], models[v["name"]], ValueHead), name=v["name"])
            for v in d["values"]
        ]
        return cls(
            tuple(terms),
            tuple(loaded_weight(t["weight"]) for t in d["terms"]),
            tuple(values),
            tuple(loaded_weight(v["weight"]) for v in d["values"]),
            loaded_power(d["power"]),
            loaded_support(d["support"]),
            loaded_parts(d.get("parts", ()), {str(t.name): t for t in terms}),
        )

    @explained()
    def save(
        self, path: str | os.PathLike[str], *, sources: Mapping[str, Any] | None = None
    ) -> None:
        """Save the blend as a JSON file that `load` reads: `to_dict`, and its models' sources.

        Models are named by where they came from, and their weights are not saved: a folder, an id
        on the Hugging Face hub with its revision, or a model or guide of crossfade's. A folder
        below the file's own is written relative to the file, so that both can be moved together.
        A model whose weights are not those of its source any more is refused, as far as the first
        rows of each tensor show it. An adapter that is "active" is saved by its name.

        Args:
            path: the file, which by custom ends in ``.json``.
            sources: the sources that are not known or not right, by the name of the first term or
                value that a model computes, such as ``{"base": FOLDER}``, and of an adapter as
                ``{"base@kind": FOLDER}``. None for a model says that `load` will be given it.

        Raises:
            TypeError: as in `to_dict`, or `sources` is no mapping to paths.
            ValueError: a model, adapter or tokenizer has no known source, or other weights than
                there, or `load` could not read the file; names it. OSError: a source is not there.
        """
        from . import file_format, file_writer

        members = [
            file_format.Member(name, member.model, member.tokenizer, isinstance(member, ValueHead))
            for name, member in zip((*self.names, *self.value_names), self._members, strict=True)
        ]
        file_writer.write(path, self.to_dict(), members, sources)

    @classmethod
    @explained()
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        models: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Blend:
        """The blend that `save` saved, with its models and tokenizers, which are loaded.

        They are loaded as `crossfade.models.load` does: from safetensors alone, without code that
        comes with a model. Terms that shared a model share it again.

        Args:
            path: the file. Relative folders in it begin at its own folder.
            models: models that are loaded already, by the names in the file's ``models``: bare
                models, or `Model` and `ValueHead` terms where there is a tokenizer. They must have
                the adapters that terms name.
            device: where loaded models go; None leaves them on the CPU.
            dtype: of loaded models; None is the one that they had when the blend was saved.

        Raises:
            ValueError: the file is no saved blend (names the key), or a model is not as it was.
            OSError: the file or a source is not there. TypeError: one of `models` is no model.
        """
        from . import file_reader

        d, members = file_reader.read(path, models, device, dtype)
        kinds = {False: Model, True: ValueHead}
        return cls.from_dict(
            d, **{m.name: kinds[m.is_value](m.model, tokenizer=m.tokenizer) for m in members}
        )

    def __repr__(self) -> str:
        return blend_text(self)

    def _blend(self) -> Blend:
        return self


def as_blend(x: Any, name: str = "blend") -> Blend:
    """`x` as a blend that can be decoded: a `Blend`, a `Model`, or a bare Hugging Face model.

    Raises:
        TypeError: it is none of these. ValueError: it has values but no model.
        NotImplementedError: a bare model that `Model` refuses.
    """
    if isinstance(x, nn.Module):
        x = Model(x)
    if not isinstance(x, Algebra):
        raise TypeError(
            f"{name} is a {type(x).__name__}; it must be a Blend, a Model or a Hugging Face model"
            f"{instead_of_blend(x)}"
        )
    blend = x._blend()
    if not blend.terms:
        raise ValueError(f"{name} is {blend}, values alone; it must have at least one Model")
    return blend
