"""The texts that a blend writes for prompts of files: what is decoded, and the result of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..blends.blend import Blend
from ..identity import run_id
from . import settings
from .records import number

if TYPE_CHECKING:
    from ..decoding.output import Output
    from ..loading import Loaded
    from .prompts import Line


@dataclass
class Texts:
    """How texts are written for all prompts of a run, and what their results say.

    Attributes:
        loaded: the models.
        common: the arguments of `decode` that all prompts share.
        seed: what the seed of each prompt is made of.
        search, draft: as of `decode`.
        n: texts of each prompt; None: one, which its result has without a list.
        logprobs: whether results have each token.
        terms: whether they have the log-probs under each model of the blend.
        faders: whether the formula has faders, which prompts may move.
    """

    loaded: Loaded
    common: Mapping[str, Any]
    seed: int = 0
    search: Any = None
    draft: Any = None
    n: int | None = None
    logprobs: bool = False
    terms: bool = False
    faders: bool = False
    _formulas: dict[tuple[Any, ...], str] = field(default_factory=dict)

    def arguments(self, lines: Sequence[Line]) -> dict[str, Any]:
        """The arguments of `decode` for some prompts, each with what it has of its own."""
        drawn = self.common if self.search is None else {"do_sample": True, **self.common}
        saved = self.moved(lines[:1]).terms[0].model.generation_config
        return {
            **settings.arguments([line.settings for line in lines], drawn, saved),
            "search": self.search,
            "draft": self.draft,
            "num_return_sequences": self.n or 1,
            "return_term_logprobs": self.terms,
        }

    def moved(self, lines: Sequence[Line], *, each: bool = False) -> Blend:
        """The blend of some prompts, with their own positions of the faders.

        Args:
            each: whether every fader of the blend is a tensor ``[prompts]``, also where no prompt
                moves it, so that these prompts are rows of one batch with prompts that do.
        """
        own = [line.settings for line in lines]
        positions = settings.positions(own, self.loaded.faders)
        if each and self.loaded.saved is None:
            positions = {
                name: torch.as_tensor(w, dtype=torch.float64).expand(len(lines))
                for name, w in positions.items()
            }
        return self.loaded.blend(positions)

    def run(self) -> str:
        """The identity of the run, which does not depend on settings that prompts have of their
        own: these stand in the results."""
        parts: dict[str, Any] = {"seed": self.seed, "search": self.search}
        parts["generation"] = dict(self.common)
        if self.faders:
            parts |= {"blend": self.loaded.formula, "terms": dict(self.loaded.terms)}
            parts["faders"] = dict(self.loaded.faders)
        else:
            parts["blend"] = self.loaded.blend()
        asked = {"n": self.n, "logprobs": self.logprobs, "terms": self.terms}
        parts |= {f"asked_{name}": x for name, x in asked.items() if x}
        return run_id(**parts)

    def record(self, index: Any, prompt: Any, line: Line, out: Output, run: str) -> dict[str, Any]:
        """The result of a prompt.

        Args:
            index: the place, or the id, of the prompt.
            prompt: what the models read.
            out: its output, of one request.
        """
        record = {"index": index, "prompt": prompt, **own(line), **self._figures(line, out)}
        return {**record, "blend": self._formula(line), "run": run}

    def _formula(self, line: Line) -> str:
        """The blend that the text of a prompt is of, with its own positions of the faders."""
        weights = line.settings.get("weights", {})
        key = tuple(sorted(weights.items()))
        if key not in self._formulas:
            self._formulas[key] = str(self.loaded.blend(weights))
        return self._formulas[key]

    def _figures(self, line: Line, out: Output) -> dict[str, Any]:
        """What a result says of its text, or of each of its texts if `n` is given."""
        each = [self._text(line, out, row) for row in range(len(out.lengths))]
        found = each[0] if self.n is None else {"outputs": each}
        return {**found, **of_prompt(out, 0)}

    def _text(self, line: Line, out: Output, row: int) -> dict[str, Any]:
        length = int(out.lengths[row])
        figures: dict[str, Any] = {
            "text": None if out.text is None else out.text[row],
            "tokens": length,
            "logprob": number(out.logprobs[row].double().sum()),
            "finished": bool(out.finished[row]),
            "failed": bool(out.failed[row]),
        }
        figures |= of_search(out, row)
        if out.tokens_by_draft is not None:
            figures["tokens_by_draft"] = int(out.tokens_by_draft[row])
        if not (self.terms or self.logprobs):
            return figures
        blend = self.moved([line])
        terms = None if out.term_logprobs is None else out.term_logprobs[row, :length].double()
        if terms is not None:
            figures["terms"] = _by_term(blend, terms.sum(dim=0).tolist())
        if self.logprobs:
            tokenizer = blend.terms[0].tokenizer
            ids, logprobs = out.responses[row], out.logprobs[row].tolist()
            figures["logprobs"] = [
                {
                    "id": token,
                    "token": tokenizer.decode([token]),
                    "logprob": number(logprobs[t]),
                    **({} if terms is None else {"terms": _by_term(blend, terms[t].tolist())}),
                }
                for t, token in enumerate(ids)
            ]
        return figures


def own(line: Line) -> dict[str, Any]:
    """What a result has of its prompt's line."""
    settings = {k: x for k, x in line.settings.items() if k != "system"}  # which is in the prompt
    return {**line.carried, **({"settings": settings} if settings else {})}


def _bracket(rounds: Sequence[Sequence[Any]]) -> list[list[list[Any]]]:
    """A tournament as JSON has it: of each round the matches, each with a, b, prob and winner."""
    return [[[m.a, m.b, number(m.prob), m.winner] for m in matches] for matches in rounds]


def of_search(out: Any, row: int) -> dict[str, Any]:
    """What a result says of one text that a search gave."""
    found: dict[str, Any] = {}
    if out.values is not None:
        found["value"] = number(out.values.flatten()[row])
    if out.weights is not None:
        found["weight"] = number(out.weights.flatten()[row])
    if out.slots is not None:
        found["slot"] = int(out.slots.flatten()[row])
    return found


def of_prompt(out: Any, request: int) -> dict[str, Any]:
    """What a result says of all texts of a prompt that a search gave."""
    found: dict[str, Any] = {}
    if out.bracket is not None:
        found["bracket"] = _bracket(out.bracket[request])
    if out.effective_sizes is not None:
        found["effective_sizes"] = list(map(number, out.effective_sizes[request]))
    return found


def _by_term(blend: Blend, each: Sequence[float]) -> dict[str, float | None]:
    return dict(zip(blend.names, map(number, each), strict=True))
