"""Classifiers of blends: what they say of the tokens that rows may write next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from ..blends.blend import Blend
from ..blends.classifier import Classifier
from ..checks import warn
from .engine.modules import Unsupported
from .engine.options import Engine
from .forms import Ids
from .job import Classified, Row
from .mixer import Mixer
from .rows import Slots
from .search.job import NOTHING, read_whole
from .search.readers import Reader, Rereader, scalar
from .simple.term_model import TermModel
from .stats import ModelStats

BRANCHES = 128  # rows of the cache for texts with a token more, at most, unless one row needs more


class Said(NamedTuple):
    """What a classifier says of tokens after some text: their log-ratios, both ``[n]``."""

    tokens: Tensor
    values: Tensor


class Asked(NamedTuple):
    """A row's text, and the same with each of some tokens after it, as a classifier reads them."""

    slot: int
    text: Ids
    longer: list[Ids]


class Reads(Protocol):
    """Whose texts classifiers read: a row of a job, or a response that is scored."""

    @property
    def classified(self) -> Classified | None: ...

    @property
    def request(self) -> int: ...

    def __hash__(self) -> int: ...


class Classifiers:
    """Asks the classifiers of a blend and of its references before each token of rows in slots.

    Args:
        mixer: the blend and its references, which are told what the classifiers say.
        slots: how many there are.
        limit, engine: as in `EngineRunner`.
    """

    def __init__(self, mixer: Mixer, slots: int, limit: int, engine: Engine) -> None:
        self.mixer = mixer
        self.own = classifiers_of(mixer.blend, slots, limit, engine)
        self.of_references = [
            classifiers_of(r.blend, slots, limit, engine, "kl_to.") for r, _ in mixer.references
        ]

    @property
    def each(self) -> list[OneClassifier]:
        return [*self.own, *(c for some in self.of_references for c in some)]

    def ask(self, logits: Sequence[Tensor], slots: Slots, seated: Mapping[int, Row]) -> None:
        """Let the mixers know what classifiers say of the tokens that these logits are of."""
        live, new = slots.live.tolist(), slots.new.tolist()
        going = [s for s in seated if live[s]]
        written = {s: slots.written["tokens"][s, : new[s]].tolist() for s in seated}
        mixers = [(self.mixer, logits)]
        mixers += [(r, [logits[k] for k in places]) for r, places in self.mixer.references]
        for (mixer, its), classifiers in zip(mixers, (self.own, *self.of_references), strict=True):
            mixer.said = []
            if classifiers:
                log_p = mixer.log_probs(its)
                each = [c.said_of(log_p, seated, written, going) for c in classifiers]
                mixer.said = [dense(said, going, log_p.shape) for said in each]

    def stats(self) -> list[ModelStats]:
        return [s for c in self.each for s in c.reader.stats()]

    @property
    def notes(self) -> list[str]:
        return [note for c in self.each for note in c.notes]

    @property
    def cache_bytes(self) -> int:
        return sum(c.reader.cache_bytes for c in self.each)

    @property
    def peak_bytes(self) -> int:
        return sum(c.reader.peak_bytes for c in self.each)


def classifiers_of(
    blend: Blend, slots: int, limit: int, engine: Engine, prefix: str = ""
) -> list[OneClassifier]:
    """The classifiers of a blend; `prefix` comes before what errors call them."""
    return [
        OneClassifier(c, prefix + name, slots, limit, engine)
        for c, name in zip(blend.classifiers, blend.classifier_names, strict=True)
    ]


def dense(said: Sequence[Said], rows: Sequence[int], shape: Sequence[int]) -> Tensor:
    """What is said of tokens as a float32 tensor ``[rows, V]`` of this shape, 0 elsewhere.

    Args:
        rows: the row that each of `said` is about.
    """
    device = said[0].values.device if said else None
    found = torch.zeros(shape, dtype=torch.float32, device=device)
    for row, of_row in zip(rows, said, strict=True):
        found[row, of_row.tokens] = of_row.values
    return found


class OneClassifier:
    """One classifier, and what it has said.

    Attributes:
        said: by a row's request and what the row had written. It is not by slot, so that rows that
            fork have what was said of what they share. That of rows that wait in their slots is
            kept for when they go on.
    """

    def __init__(
        self, classifier: Classifier, name: str, slots: int, limit: int, engine: Engine
    ) -> None:
        self.classifier, self.name, self.slots = classifier, name, slots
        self.model = TermModel(classifier.model, name)
        self.lanes = max(1, min(slots, BRANCHES // classifier.top))
        self.notes: list[str] = []
        self.said: dict[tuple[object, ...], Said] = {}
        self.full: WeakSet[Reads] = WeakSet()  # rows whose text is longer than the context
        assert isinstance(classifier.label, int)
        self.question = scalar(classifier.label)
        self.reader: Reader | Rereader = Rereader(self.question, [self.model])
        if not engine.simple:
            places = slots + self.lanes * classifier.top
            try:
                self.reader = Reader(self.question, [self.model], [1], places, limit, engine)
            except Unsupported as reason:
                self._reread(reason)

    def _reread(self, reason: Unsupported) -> None:
        """Read whole texts from now on."""
        self.notes.append(f"{self.name} reads whole texts at every step: {reason}")
        self.reader = Rereader(self.question, [self.model])

    def said_of(
        self,
        log_p: Tensor,
        rows: Mapping[int, Reads],
        written: Mapping[int, Ids],
        going: Sequence[int],
    ) -> list[Said]:
        """What is added for the row in each of the slots `going`.

        Args:
            log_p: ``[slots, V]`` under the rest of the blend, by which tokens are the top ones.
            rows: those in all slots, of which each has `written` so much.
        """
        every = self.classifier.every
        keys: dict[int, tuple[object, ...]] = {}
        unknown: dict[tuple[object, ...], int] = {}
        for s, row in rows.items():
            known = len(written[s]) - len(written[s]) % every
            keys[s] = (id(row.classified), row.request, *written[s][:known])
        for s in going:
            if keys[s] not in self.said:
                unknown.setdefault(keys[s], s)
        new = self._ask(log_p, [*unknown.values()], rows, written)
        self.said.update(zip(unknown, new, strict=True))
        self.said = {key: self.said[key] for key in keys.values() if key in self.said}
        return [self.said[keys[s]] for s in going]

    def _ask(
        self,
        log_p: Tensor,
        slots: Sequence[int],
        rows: Mapping[int, Reads],
        written: Mapping[int, Ids],
    ) -> list[Said]:
        """What the classifier says of the top tokens of some slots."""
        if not slots:
            return []
        top = log_p[list(slots)].topk(min(self.classifier.top, log_p.shape[1]), dim=1)
        tokens = [
            ids[p > -torch.inf] for ids, p in zip(top.indices, top.values, strict=True)
        ]  # None of those that the blend excludes.
        asked = [
            Asked(s, *self._texts(rows[s], written[s], ids.tolist()))
            for s, ids in zip(slots, tokens, strict=True)
        ]
        fit = [a for a in asked if self._fits(rows[a.slot], a)]
        try:
            answers = dict(zip([a.slot for a in fit], self._answers(fit), strict=True))
        except Unsupported as reason:  # Only its first forward shows what a model does.
            self._reread(reason)
            answers = dict(zip([a.slot for a in fit], self._answers(fit), strict=True))
        return [
            Said(
                ids, _log_ratios(a, answers.get(a.slot), log_p[a.slot, ids].cpu()).to(log_p.device)
            )
            for a, ids in zip(asked, tokens, strict=True)
        ]

    def _texts(self, row: Reads, written: Ids, tokens: Ids) -> tuple[Ids, list[Ids]]:
        """What the classifier reads of a row, and of it with each of the tokens."""
        job = row.classified
        assert job is not None  # `Call.classified` makes it where there are classifiers.
        responses = [list(written), *([*written, t] for t in tokens)]
        texts = job.writing.texts([row.request] * len(responses), responses)
        prompt, known = job.texts[row.request], dict.fromkeys(texts)
        ids = {
            text: read_whole(self.classifier, self.name, prompt, text, job.chat) for text in known
        }
        first, *longer = (ids[text] for text in texts)
        return first, longer

    def _fits(self, row: Reads, asked: Asked) -> bool:
        most, longest = self.model.context, max(map(len, [asked.text, *asked.longer]))
        if most is None or longest <= most:
            return True
        if row not in self.full:
            self.full.add(row)
            warn(
                f"{self.name} says nothing of {row} any more: it would read {longest} tokens, and "
                f"its context is {most}",
                RuntimeWarning,
            )
        return False

    def _answers(self, asked: Sequence[Asked]) -> list[tuple[float, list[float]]]:
        """The log-prob of the class after each text, and after each longer one."""
        if not asked:
            return []
        if isinstance(self.reader, Rereader):
            texts = [text for a in asked for text in (a.text, *a.longer)]
            answers = iter(self._read(range(len(texts)), texts))
            return [(next(answers), [next(answers) for _ in a.longer]) for a in asked]
        reader, top = self.reader, self.classifier.top
        reader.runner.extend([max(len(text) for a in asked for text in (a.text, *a.longer))])
        before = self._read([a.slot for a in asked], [a.text for a in asked])
        after: list[list[float]] = []
        for first in range(0, len(asked), self.lanes):
            some = asked[first : first + self.lanes]
            parents = [-1] * reader.runner.slots
            places: list[int] = []
            for lane, a in enumerate(some):
                begin = self.slots + lane * top
                parents[begin : begin + len(a.longer)] = [a.slot] * len(a.longer)
                places += range(begin, begin + len(a.longer))
            reader.fork(parents)
            answers = iter(self._read(places, [text for a in some for text in a.longer]))
            after += [[next(answers) for _ in a.longer] for a in some]
        return list(zip(before, after, strict=True))

    def _read(self, places: Sequence[int], texts: Sequence[Ids]) -> list[float]:
        read = [text or NOTHING for text in texts]
        (answers,) = self.reader.read(places, [read], [[0] * len(texts)])
        return [answer for (answer,) in answers]


def _log_ratios(asked: Asked, answer: tuple[float, list[float]] | None, log_p: Tensor) -> Tensor:
    """What is added to the log-probs of some tokens: ``log p(label | text + v) - log p(label |
    text)`` of each, or 0 where ``text + v`` has no token, as where nothing is known.

    Without a text ``p(label | text)`` is the mean of what follows: ``sum_v p(v) p(label | v)``.

    Args:
        answer: ``log p(label | .)`` after the text, and after each longer one.
        log_p: ``[n]``: the log-probs of the tokens under the rest of the blend.
    """
    if answer is None:
        return torch.zeros(len(asked.longer))
    before, after = torch.tensor(answer[0]), torch.tensor(answer[1])
    none = torch.tensor([not text for text in asked.longer])
    if not asked.text:
        p = log_p.float().masked_fill(none, -torch.inf).log_softmax(dim=0)
        before = torch.where(none, -torch.inf, p + after).logsumexp(dim=0)
    return torch.where(none, 0.0, after - before)
