"""An aligner: a model that edits an answer toward the objectives that its prompt names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from ... import elsewhere
from ...blends.blend import Blend, as_blend
from ...blends.vocabulary import check_vocabularies
from ...checks import explained
from ...decoding.members import tokenizer_of
from ..turns import quoted
from .objectives import OBJECTIVES, resolve
from .template import AlignerTemplate


class MetaAligner:
    """A model that edits an answer to a query toward any objectives, which `correct` lets do so.

    It was trained on prompts of one form, which `prompt` writes; see `AlignerTemplate`. Objectives
    that it was not trained on are new text in that prompt.

    Args:
        model: a causal LM, a `Model` (with an adapter, say) or a `Blend`. No term may have a prompt
            of its own. Value heads in a blend read the query, as the values of a search do.
        tokenizer: the one of the model; by default the first that a term has.
        noun: what prompts call the query: "context" or "query", as in the training.
        objectives: descriptions by name, beside those of the registry
            (`crossfade.policies.metaaligner.OBJECTIVES`) and before them. `read_objectives` reads
            some from a file.

    Attributes:
        blend: what writes the corrections.
        objectives: the descriptions of all names that are known.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.

    Source: MetaAligner (Yang et al., arXiv:2403.17141).
    """

    @explained(elsewhere.ALIGNER)
    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        noun: str = "context",
        objectives: Mapping[str, str] | None = None,
    ) -> None:
        self.blend = as_blend(model)
        for term in self.blend.terms:
            for name in ("system", "prompt"):
                if getattr(term, name) is not None:
                    raise ValueError(
                        f"model has the term {term} with a {name} of its own; an aligner's must "
                        "have none, as its template is the prompt"
                    )
        self.tokenizer = tokenizer_of(self.blend, tokenizer)
        if self.tokenizer is None:
            raise ValueError("tokenizer is None; an aligner reads texts: give tokenizer=...")
        self.vocabulary = check_vocabularies(self.blend, self.tokenizer)
        self.template = AlignerTemplate(noun)
        if objectives is not None and not isinstance(objectives, Mapping):
            raise TypeError(
                f"objectives is {objectives!r:.80}; it must be a mapping of names to descriptions, "
                "or None for the registry alone"
            )
        own = {} if objectives is None else resolve(objectives)
        self.objectives = {**OBJECTIVES, **own}

    def __repr__(self) -> str:
        return f"MetaAligner({self.blend}, noun={self.template.noun!r})"

    def __call__(self, queries: Any, answers: Any, objectives: Any = None, **more: Any) -> NoReturn:
        """An aligner edits by `correct`, which all options belong to."""
        raise TypeError(
            "a MetaAligner is not called; correct(aligner, queries, answers, objectives) lets it "
            "edit answers"
        )

    def prompt(self, query: Any, answer: str, objectives: Any, goal: str = "better") -> str:
        """The very text that is read; the corrected answer follows it.

        Where the query or the answer spells a special token of the tokenizer, a space is put into
        it, so that it is read as text.

        Args:
            query: the text or chat that was answered.
            answer: what is to be edited.
            objectives: names that are known, ``{name: description}``, or a list of both.
            goal: "better", or "equal" for an answer that is as good.

        Raises:
            TypeError, ValueError: names the argument, what it was and what it must be.
        """
        found = resolve(objectives, self.objectives)
        return quoted(self.template.prompt(query, answer, found, goal), self.tokenizer)

    def reading(self, prompts: Sequence[str], blend: Blend | None = None) -> Blend:
        """The aligner's blend, or another one, whose terms read these prompts: one a request.

        Whatever else reads the requests, such as the value of a search, reads them as they are.
        """
        blend = self.blend if blend is None else blend
        terms = [
            replace(t, prompt=[*prompts]) if t.prompt is None and t.system is None else t
            for t in blend.terms
        ]
        return replace(blend, terms=tuple(terms))
