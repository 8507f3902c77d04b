"""Models that read rows' texts as these grow, for the values of a search.

`Reader` keeps caches that fork with the rows, and reads every token once. A text that is encoded
anew as it grows is read again from the first token that changed. `Rereader` reads whole texts by
Hugging Face's own modules: it is the truth in tests, and runs the models that the engine cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...models.value_heads import token_values
from ..engine.group import Group
from ..engine.head import product
from ..engine.lanes import is_product
from ..engine.options import Engine
from ..engine.prefill import Prefill, over_caches, token_log_probs
from ..engine.runner import EngineRunner
from ..forms import Ids, common
from ..runner import PromptIds
from ..simple.term_model import TermModel
from ..stats import ModelStats


class Question(NamedTuple):
    """What is asked of a model about a text.

    Attributes:
        answer: gives the answers ``[n]`` about ``tokens [n]`` from ``logits [n, V]``.
        predicted: whether these are the logits before each token, as for log-probs and Q-heads, so
            that the last token of a text is not read. False: those after it, as for scalar heads.
        every: whether every token of a response is asked about. False: only its last one.
        of_head: whether it is asked of a value head, which `token_values` answers from the hidden
            states where a model's numbers are its head's product with them.
    """

    answer: Callable[[Tensor, Tensor], Tensor]
    predicted: bool
    every: bool
    of_head: bool = False


def log_prob(vocabulary: int) -> Question:
    """Asks for ``log p(token)`` over the first `vocabulary` columns."""

    def answer(logits: Tensor, tokens: Tensor) -> Tensor:
        return token_log_probs(logits[:, :vocabulary], tokens)

    return Question(answer, predicted=True, every=True)


def q_value() -> Question:
    """Asks for the number that a Q-head gives a token at the state before it."""

    def answer(q: Tensor, tokens: Tensor) -> Tensor:
        if q.shape[1] == 1:
            raise ValueError(
                "value is a ValueHead whose model gives 1 number a token, but its config does not "
                "say num_labels=1; it must, or give a number for each next token"
            )
        return q.gather(1, tokens[:, None])[:, 0].float()

    return Question(answer, predicted=True, every=False, of_head=True)


def scalar(label: int | None = None) -> Question:
    """Asks for the number that a scalar head gives, or for the log-prob of class `label`."""

    def answer(z: Tensor, tokens: Tensor) -> Tensor:
        return z[:, 0].float() if label is None else z.float().log_softmax(dim=1)[:, label]

    return Question(answer, predicted=False, every=False, of_head=label is None)


class Reader:
    """Models over caches of their own, with a place for each slot's text.

    Attributes:
        texts: of each model and slot, the prompt and those tokens after it that have answers.
        found: of each model and slot, the answers: one for each token of the response, or one for
            its last token.
    """

    def __init__(
        self,
        question: Question,
        models: Sequence[TermModel],
        longest: Sequence[int],
        slots: int,
        limit: int,
        engine: Engine,
    ) -> None:
        self.question = question
        self.runner = EngineRunner(models, longest, slots, limit, engine, by_states=True)
        self.by_states = {
            group: bool(group.riders) or (question.of_head and is_product(group.models[0]))
            for group in self.runner.groups
        }
        self.texts: list[list[Ids]] = [[()] * slots for _ in models]
        self.found: list[list[list[float]]] = [[[]] * slots for _ in models]

    def join(
        self, slots: Sequence[int], prompts: Sequence[PromptIds], limits: Sequence[int]
    ) -> None:
        """Let rows take slots, and read their prompts to the end; see `Runner.join`."""
        self.runner.join(slots, prompts, limits)
        while self.runner.joining:
            self.runner.read()
        for slot, each in zip(slots, prompts, strict=True):
            for k, prompt in enumerate(each):  # Its last token is yet to be read.
                self.texts[k][slot] = prompt if self.question.predicted else prompt[:-1]
                self.found[k][slot] = []

    def fork(self, parents: Sequence[int]) -> None:
        """Slot i becomes what slot ``parents[i]`` is; -1 leaves it as it is."""
        sources = [i if p < 0 else p for i, p in enumerate(parents)]
        for group in self.runner.groups:
            rows, starts = [], []
            for m, lane in enumerate(group.lanes):
                texts = self.texts[lane[0]]
                rows += [m * len(sources) + s for s in sources]
                starts += [
                    max(0, common(texts[i], texts[s]) - self.question.predicted)
                    for i, s in enumerate(sources)
                ]
            group.fork(rows, torch.tensor(starts, device=group.device))
        self.texts = [[each[s] for s in sources] for each in self.texts]
        self.found = [[each[s] for s in sources] for each in self.found]

    def read(
        self, slots: Sequence[int], texts: Sequence[Sequence[Ids]], firsts: Sequence[Sequence[int]]
    ) -> list[list[list[float]]]:
        """The answers of each model k about the text of each slot, ``texts[k][i]``.

        A text is a prompt and its response, which begins at token ``firsts[k][i]``.
        """
        for group in self.runner.groups:
            unread = []
            for m, (first_model, *riders) in enumerate(group.lanes):
                for i, (slot, text) in enumerate(zip(slots, texts[first_model], strict=True)):
                    known = self._known(first_model, slot, text, firsts[first_model][i])
                    for k in riders:  # They read the same.
                        self._known(k, slot, text, firsts[k][i])
                    if known < len(text):
                        row = m * self.runner.slots + slot
                        unread.append(_Unread(m, slot, row, text, known))
            self._answer(group, unread)
        return [[self.found[k][slot] for slot in slots] for k in range(len(texts))]

    def _known(self, k: int, slot: int, text: Ids, first: int) -> int:
        """How many tokens of a text have answers already. Answers about others are forgotten."""
        known = common(self.texts[k][slot], text)
        if self.question.every:
            self.found[k][slot] = self.found[k][slot][: known - first]
        elif known == len(text) < len(self.texts[k][slot]):
            known -= 1  # The one answer that is kept is about a token that is gone.
        self.texts[k][slot] = text
        return known

    def _answer(self, group: Group, unread: Sequence[_Unread]) -> None:
        """Read on in these texts, and keep the answers in `found`."""
        every, before = self.question.every, int(self.question.predicted)
        rows, starts = [x.row for x in unread], [x.known - before for x in unread]
        ids = [
            x.text[start : len(x.text) - before] for x, start in zip(unread, starts, strict=True)
        ]
        answered = [x.known for x in unread]
        counts = [len(x) if every else 1 for x in ids]
        states = self.by_states[group]
        for i, z in over_caches(group, rows, starts, ids, counts, states=states):
            lane, slot, _, text, _ = unread[i]
            asked = text[answered[i] : answered[i] + len(z)] if every else text[-1:]
            answered[i] += len(asked) if every else 0
            for model in group.lanes[lane]:
                layer = group.layer(model) if states else None
                answers = self._ask(z, asked, layer, group.backbone.backend)
                kept = self.found[model][slot] if every else []
                self.found[model][slot] = kept + answers

    def _ask(self, z: Tensor, tokens: Ids, layer: Any, backend: str | None) -> list[float]:
        """The answers about tokens, from logits or, with a `layer`, the hidden states for it."""
        asked = torch.tensor(tokens, device=z.device)
        if layer is None:
            return self.question.answer(z, asked).tolist()
        if self.question.of_head:
            return token_values(layer, z, asked).tolist()
        return self.question.answer(product(layer, z, backend), asked).tolist()

    def stats(self) -> list[ModelStats]:
        return self.runner.stats(0, 0)

    @property
    def cache_bytes(self) -> int:
        return self.runner.cache_bytes

    @property
    def peak_bytes(self) -> int:
        return self.runner.peak_bytes


class _Unread(NamedTuple):
    """A text in a slot, in a row of a group, of which its lane has answered `known` tokens."""

    lane: int
    slot: int
    row: int
    text: Ids
    known: int


class Rereader:
    """Models that keep nothing: each text is read whole, by Hugging Face's own modules."""

    cache_bytes = peak_bytes = 0

    def __init__(self, question: Question, models: Sequence[TermModel]) -> None:
        self.question = question
        self.models = [Prefill(m) for m in models]

    def join(
        self, slots: Sequence[int], prompts: Sequence[PromptIds], limits: Sequence[int]
    ) -> None:
        pass

    def fork(self, parents: Sequence[int]) -> None:
        pass

    def read(
        self, slots: Sequence[int], texts: Sequence[Sequence[Ids]], firsts: Sequence[Sequence[int]]
    ) -> list[list[list[float]]]:
        """The answers, as `Reader.read` gives them."""
        return [self._read(*each) for each in zip(self.models, texts, firsts, strict=True)]

    def _read(
        self, model: Prefill, texts: Sequence[Ids], firsts: Sequence[int]
    ) -> list[list[float]]:
        found: list[list[float]] = [[] for _ in texts]
        if not self.question.predicted:
            for i, z in model.last_outputs(texts):
                found[i] = self.question.answer(z[None], torch.tensor(texts[i][-1:])).tolist()
            return found
        every = self.question.every
        for i, z in model.logits(texts, firsts, every=every):
            tokens = texts[i][len(texts[i]) - len(z) :]
            found[i] = self.question.answer(z, torch.tensor(tokens, device=z.device)).tolist()
        return found

    def stats(self) -> list[ModelStats]:
        return [model.stats() for model in self.models]
