"""The sampling loop: places are filled with rows, all advance in step, and are filled again."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checks import warn
from ..ops import BlendSample
from .drawing import Drawing
from .engine.graph import Stepper
from .job import Row
from .mixer import Mixer
from .news import News, Teller
from .places import Places
from .rows import Slots, Written
from .runner import PromptIds, Runner
from .stats import ModelStats
from .strays import Strays
from .watch import Watch

if TYPE_CHECKING:
    from .classifiers import Classifiers
    from .speculation.rounds import Rounds


# The numbers of slots that steps feed where not all have a row. They are few, as each is recorded
# or compiled anew.
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


@dataclass
class Happened:
    """What came of some steps of a loop.

    Attributes:
        news: the tokens that rows got since the last `advance`; empty unless the loop `tells`.
        left: rows that have left their places, because they have ended or were cut.
    """

    news: list[News] = field(default_factory=list)
    left: list[Written] = field(default_factory=list)


class Loop:
    """Decodes rows that join, in the slots of a runner, until each has ended.

    What a row gets does not depend on the rows beside it, nor on when these join, end or leave.

    Args:
        places: the slots that rows take, in this order.
        aligned: the row of each slot, where all rows start at once; they are to `join` together.
        stepper: calls steps, as they are or as a captured graph.
        every: how many steps pass before the host looks at what the device has done.
        tells: whether `Happened` has the tokens that rows got.
        remembers: whether it runs for long. What a row has read and written stays in its slot's
            caches then, for the prompt of a later row that begins alike, and steps of few rows feed
            few slots, which pays once they are recorded.
        strays: looks at some tokens, where the blend may leave what its terms would write.
        classifiers: those of the blend and of its references; None if there are none.
        rounds: steps that check guesses; None if nothing guesses.

    Attributes:
        waiting: rows that have joined and have no slot yet.
        seated: the rows in slots.
        places: the slots that rows can take.
        begun: how many rows have had a slot.
        stepped: the slots ``[n]`` that the last step fed; None: all.
        report: is told why a row failed; a warning by default.
        refilled: whether more rows are to join when others end.
    """

    def __init__(
        self,
        runner: Runner,
        mixer: Mixer,
        slots: Slots,
        places: Iterable[int],
        aligned: Sequence[Row] | None = None,
        stepper: Stepper | None = None,
        every: int = 1,
        tells: bool = False,
        remembers: bool = False,
        strays: Strays | None = None,
        classifiers: Classifiers | None = None,
        rounds: Rounds | None = None,
    ) -> None:
        self.strays, self.classifiers, self.rounds = strays, classifiers, rounds
        self.runner, self.mixer, self.slots = runner, mixer, slots
        self.stepper, self.every = stepper or Stepper(capture=False), every
        self.watch = Watch(slots, aligned)
        self.drawing = Drawing(mixer, slots, self.watch)
        others = aligned, classifiers, rounds
        self.feeds_some = remembers and all(x is None for x in others)
        self.stepped: Tensor | None = None
        self.waiting: deque[Row] = deque()
        self.changed: dict[Row, dict[str, Tensor]] = {}  # values that waiting rows will have
        self.seated: dict[int, Row] = {}
        self.reading: dict[int, PromptIds] = {}  # the prompts that slots have not read to the end
        self.places = Places(runner, places, remembers=remembers)
        self.left: list[Written] = []  # rows that left since `advance` last gave them
        self.begun = 0
        self.refilled = False
        self.taken = 0  # tokens of the rows that have left
        self.warned: set[Row] = set()  # rows in slots that failed, of which a warning has told why
        self.remembers = remembers
        self.report: Callable[[Row, str], object] = lambda row, why: warn(why, RuntimeWarning)
        self.teller = Teller(slots) if tells else None

    @property
    def free_places(self) -> int:
        """How many more rows could join and get a slot at once."""
        return len(self.places.free) - len(self.waiting)

    def join(self, rows: Iterable[Row]) -> None:
        """Let rows take slots as these become free: first come, first seated."""
        self.waiting.extend(rows)

    @torch.no_grad()
    def cancel(self, rows: Iterable[Row]) -> None:
        """Let rows leave as they are. The next `advance` gives what they have written."""
        gone = set(rows)
        for row in [row for row in self.waiting if row in gone]:
            self.waiting.remove(row)
            self.changed.pop(row, None)
            self.left.append(self.slots.nothing(row))
        self._leave([s for s, row in self.seated.items() if row in gone], cut=True)

    def change(self, row: Row, name: str, value: Tensor) -> None:
        """Give a row another value of the table, from its next token on or from its first.

        Raises:
            ValueError: the table has no value of that name for each row, or the row is not here.
        """
        slots = [s for s, r in self.seated.items() if r is row]
        if not slots and row not in self.waiting:
            raise ValueError(f"{row} is not being decoded; {name} can be changed of rows that are")
        self.slots.change(slots, name, value)
        if not slots:
            self.changed.setdefault(row, {})[name] = value

    @torch.no_grad()
    def advance(self) -> Happened | None:
        """Seat rows that wait, take some steps, and look at what came of them.

        Returns:
            What happened; None if there is no row left to decode.
        """
        self._seat()
        if not self.seated and not self.left:
            return None
        self._read()
        if self._under_way:
            for _ in range(self._steps):
                if self.rounds is None:
                    logits = self.stepper(self.step, self.reserve())
                else:
                    logits = self.rounds.step(self)
            self._look(logits)
        news = [] if self.teller is None else self.teller.take()
        happened, self.left = Happened(news, self.left), []
        return happened

    def step(self) -> list[Tensor]:
        """Let every model read the last tokens, draw the next ones and write these down.

        Returns:
            The logits that the tokens were drawn from.
        """
        self.stepped = self._to_feed()
        logits = self.runner.step(self.slots.tokens, self.slots.live, self.stepped)
        waits = self.write(logits, self.sample(logits))
        if waits is not None:
            self.runner.take_back(waits.long())
        return logits

    def sample(self, logits: list[Tensor]) -> BlendSample:
        """The next token of each slot, once classifiers have said what they have to say."""
        if self.classifiers is not None:
            self.classifiers.ask(logits, self.slots, self.seated)
        return self.drawing.sample(logits, self.stepped)

    def _to_feed(self) -> Tensor | None:
        """The slots of the rows under way, and maybe some others; None: all slots.

        A row's numbers are the same whatever slots are fed beside it.
        """
        if not (self.feeds_some and self.runner.feeds_some):
            return None
        slots = [s for s in self.seated if s not in self.reading]
        size = next((n for n in SIZES if n >= len(slots)), len(self.slots.each))
        if size >= len(self.slots.each):
            return None
        others = (s for s in range(len(self.slots.each)) if s not in slots)
        slots += islice(others, size - len(slots))
        return torch.tensor(sorted(slots), device=self.slots.device)

    def write(
        self, logits: list[Tensor], sample: BlendSample, source: Tensor | None = None
    ) -> Tensor | None:
        """Write down the next tokens of live rows.

        Args:
            sample: what was drawn from the logits.
            source: as in `Runner.values`, where `logits` are those of other slots.

        Returns:
            The rows that wait before their tokens, as `Slots.write` gives them.
        """
        columns = self.drawing.columns(logits, self.stepped)
        return self.slots.write(sample, columns, self.runner.values(sample.tokens, source))

    @property
    def _steps(self) -> int:
        """How many steps pass before the host looks. A search may override it."""
        return self.every

    def stats(self) -> list[ModelStats]:
        """What each model has done so far."""
        others = [] if self.classifiers is None else self.classifiers.stats()
        return [*self.runner.stats(self.drawn() + self._undrawn(), self.begun), *others]

    def _undrawn(self) -> int:
        """How many tokens were read so far after which none was drawn. A search may add some."""
        unkept = 0 if self.rounds is None else self.rounds.unkept
        return int(self.slots.waited) + unkept

    @property
    def notes(self) -> list[str]:
        """What was not done as it was asked for, and why."""
        others = [] if self.classifiers is None else self.classifiers.notes
        captured = [] if self.stepper.note is None else [self.stepper.note]
        return [*captured, *self.runner.notes, *others]

    @property
    def cache_bytes(self) -> int:
        others = 0 if self.classifiers is None else self.classifiers.cache_bytes
        return self.runner.cache_bytes + others

    @property
    def peak_bytes(self) -> int:
        """The most memory that caches and what rows have written took."""
        others = 0 if self.classifiers is None else self.classifiers.peak_bytes
        return self.runner.peak_bytes + others + self.slots.nbytes

    def drawn(self) -> int:
        """Tokens drawn so far."""
        return self.taken + int(self.slots.new[[*self.seated]].sum())

    def cut(self) -> list[Written]:
        """Let all rows leave as they are, also those that have no slot yet."""
        self.cancel([*self.waiting, *self.seated.values()])
        left, self.left = self.left, []
        return left

    def _seat(self) -> None:
        """Give free slots to waiting rows."""
        seated = {}
        while self.places.free and self.waiting:
            row = self.waiting.popleft()
            seated[self.places.take(row)] = row
        if seated:
            self._occupy(seated)

    def _occupy(self, seated: dict[int, Row]) -> None:
        """Put rows into these slots, whose prompts `_read` reads from now on."""
        rows = list(seated.values())
        self.slots.seat([*seated], rows)
        for slot, row in seated.items():
            for name, value in self.changed.pop(row, {}).items():
                self.slots.change([slot], name, value)
        self.watch.seat(seated)
        self.reading |= {slot: row.prompt_ids for slot, row in seated.items()}
        self.seated.update(seated)  # after the rest, which an interrupt would find undone
        self.begun += len(seated)
        self.runner.join(
            [*seated],
            [r.prompt_ids for r in rows],
            [r.limit for r in rows],
            [r.mixes for r in rows],
        )

    def _read(self) -> None:
        """Read a piece of the prompts of new rows, and let those begin that are read to the end.

        While no row is decoding, all prompts advance together, so that short ones start at the same
        step.
        """
        while self.reading:
            ready = self.runner.read(each=not self._under_way)
            for slot in ready:
                del self.reading[slot]
            self._start([s for s in ready if s in self.seated])
            # Kept until now because other rows shared their prompt.
            cancelled = [s for s in ready if s not in self.seated]
            self.runner.leave(cancelled)
            self.places.give_back(cancelled)
            if self._under_way or self.remembers:
                return  # Where it runs for long, rows may join or be cancelled between two pieces.

    def _start(self, slots: Sequence[int]) -> None:
        """Let rows write whose prompts have been read. A search overrides it."""
        if self.rounds is not None:
            self.rounds.drafter.join({s: self.seated[s] for s in slots})
        self.slots.start(slots)

    @property
    def _under_way(self) -> bool:
        """Whether any row in a slot has read its prompt to the end."""
        return bool(self.seated.keys() - self.reading.keys())

    def reserve(self, tokens: int = 1) -> bool:
        """The host's part of a step that feeds so many tokens of each row; True if buffers moved,
        so that a captured step is void."""
        moved = self.runner.reserve(tokens)
        return self.slots.reserve(tokens) or moved

    def _look(self, logits: list[Tensor]) -> None:
        """Wait for the device, and let the rows leave that have ended or have no more time."""
        if self.rounds is None:
            self.see(logits)
        if self.teller is not None:
            self.teller.look({s: r for s, r in self.seated.items() if s not in self.reading})
        slots = self.slots
        live, failed = torch.stack([slots.live, slots.failed]).tolist()
        stopped = [s for s in self.seated if not live[s] and s not in self.reading]
        for slot in stopped:
            if failed[slot] and self.seated[slot] not in self.warned:
                self.warned.add(self.seated[slot])
                self._warn(slot, logits)
        self._leave(self._ended(stopped, logits))
        now = time.time()
        late = [s for s, row in self.seated.items() if is_late(row, now)]
        waiting = [row for row in self.waiting if is_late(row, now)]
        if late or waiting:
            self._time_is_up(late)
            self.cancel([*(self.seated[s] for s in late), *waiting])

    def see(self, logits: list[Tensor] | None) -> None:
        """Look at the tokens that were just drawn.

        Args:
            logits: that they were drawn from, if these are those of a step.
        """
        if self.strays is not None and logits is not None and self.strays.due(self.every):
            terms = self.runner.apart(logits)
            if terms is not None:
                self.strays.look(terms, self.slots, self.stepped)
        self.watch.look()
        self._after_step()

    def _after_step(self) -> None:
        """What else the host does after every step. A search overrides it."""

    def _ended(self, stopped: list[int], logits: list[Tensor]) -> list[int]:
        """Which of the slots whose rows have stopped are free now. A search overrides it.

        Args:
            logits: of the last step.
        """
        return stopped

    def _time_is_up(self, slots: list[int]) -> None:
        """Called before the rows in these slots leave, as time is up. A search overrides it."""

    def _leave(self, slots: Sequence[int], *, cut: bool = False) -> None:
        """Let the rows in these slots leave; `cut` says that they are not done."""
        if not slots:
            return
        left = self.slots.take({s: self.seated[s] for s in slots}, cut=cut)
        if self.remembers and self.rounds is None:
            for slot, written in zip(slots, left, strict=True):
                if slot not in self.reading:
                    self.runner.holds(slot, written.row.prompt_ids, written.ids)
        self.left += left  # first, so that an interrupt takes nothing from rows that are done
        self.taken += sum(map(len, left))
        for slot in slots:
            del self.seated[slot]
        self.watch.leave(slots)
        for written in left:
            if self.teller is not None:
                self.teller.leave(written.row)
            self.warned.discard(written.row)
        # A prompt is read to its end as long as any of the rows that share it is there.
        wanted = {id(ids) for s, ids in self.reading.items() if s in self.seated}
        dropped = [s for s, ids in self.reading.items() if id(ids) not in wanted]
        for s in dropped:
            del self.reading[s]
        gone = [s for s in slots if s not in self.reading]
        gone += [s for s in dropped if s not in slots]
        self.runner.leave(gone)
        self.places.give_back(gone)

    def _warn(self, slot: int, logits: list[Tensor]) -> None:
        """Warn of a row that failed, and say why.

        A stopped row is fed its last token again at each step, so these logits still show the
        fault.
        """
        place = slot if self.stepped is None else self.stepped.tolist().index(slot)
        names = [m.name for m in self.runner.models]
        why = self.mixer.of(self.stepped).why_bad(place, logits, names)
        row = self.seated[slot]
        self.report(row, f"{row} was ended at its token {int(self.slots.new[slot])}: {why}")


def is_late(row: Row, now: float) -> bool:
    """Whether a row's time is up, at a time as ``time.time()`` counts it."""
    return row.job.deadline is not None and now > row.job.deadline
