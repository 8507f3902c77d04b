"""What ``crossfade generate`` writes: the line of each prompt, or texts alone."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import parsed, searches

if TYPE_CHECKING:
    from ..bulk.prompts import Line
    from ..decoding.stats import Stats
    from ..loading import Loaded
    from ..policies.self_judge.question import Question


class Writer:
    """Writes the text of each prompt."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        loaded: Loaded,
        lines: Sequence[Line],
        common: Mapping[str, Any],
        question: Question | None = None,
    ) -> None:
        from ..bulk import settings
        from ..bulk.texts import Texts

        self.arguments, self.lines = arguments, lines
        own = [line.settings for line in lines]
        self.texts = Texts(
            loaded,
            common,
            arguments.seed,
            searches.make(arguments, loaded, question),
            parsed.draft_of(arguments, loaded),
            arguments.n,
            arguments.logprobs,
            arguments.terms,
            faders=bool(settings.positions(own, loaded.faders)),
        )
        self.blend = self.texts.moved(lines)
        chat = parsed.sends_chats(arguments, loaded, self.blend, lines)
        self.prompts = [line.sent(chat=chat) for line in lines]
        self.generation = self.texts.arguments(lines)
        self.seeds = settings.seeds(own, arguments.seed)

    def stream(self) -> None:
        """Print the text of the one prompt while it is written."""
        from ..decoding import generate
        from .streaming import Printer

        first = self.blend.terms[0]
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "interrupted when")  # which the exit status says
            out: Any = generate(
                self.blend,
                self.prompts,
                seed=self.seeds,
                streamer=Printer(first.tokenizer, chat=not isinstance(self.prompts[0], str)),
                **self.generation,
            )
        print(flush=True)
        if out.stats.interrupted:
            raise KeyboardInterrupt
        self._say(1, 0, out.stats.tokens, time.perf_counter() - start, out.stats)

    def write(self, results: Any) -> None:
        """Write a line for each prompt that `results` lacks, and figures to stderr.

        A line is written as soon as its text has ended. What is being decoded at an interrupt is
        lost.
        """
        from ..bulk.decode import decode
        from ..bulk.texts import own
        from ..progress import progress_bar

        run = self.texts.run()
        finished = results.begin(self.prompts, run, [own(line) for line in self.lines])
        todo, tokens, start = len(self.prompts) - len(finished), 0, time.perf_counter()
        stats = None
        n, search = self.arguments.n or 1, self.texts.search
        rows = n if search is None else search.rows
        unit, prints = "prompt" if n == 1 else "text", self.arguments.output is None
        with progress_bar(todo * n, unit, prints=prints) as bar:
            for i, out in decode(
                self.blend,
                self.prompts,
                seed=self.seeds,
                skip=finished,
                max_batch=self.arguments.batch_size * rows,
                progress=bar.update,
                **self.generation,
            ):
                results.write(self.texts.record(i, self.prompts[i], self.lines[i], out, run))
                stats = out.stats
                tokens += stats.tokens
        results.finish()
        self._say(todo, len(finished), tokens, time.perf_counter() - start, stats)

    def _say(
        self, written: int, kept: int, tokens: int, seconds: float, stats: Stats | None
    ) -> None:
        """Figures on stderr, with what `stats`, of all that was written, say of guesses."""
        more = f" ({kept} more were in the file)" if kept else ""
        speed = f", {tokens / seconds:.1f} tokens/s" if tokens else ""
        plural = "" if written == 1 else "s"
        guessed = "" if self.texts.draft is None or stats is None else f"; {stats.drafted}"
        print(f"{written} prompt{plural}{more}, {tokens} tokens{speed}{guessed}", file=sys.stderr)


class PlainTexts:
    """The form of results that has the texts alone, with an empty line between two."""

    def __init__(self) -> None:
        self.first = True

    def __call__(self, record: Mapping[str, Any]) -> str:
        texts = [out["text"] for out in record.get("outputs", [record])]
        before = "" if self.first else "\n"
        self.first = False
        return before + "\n\n".join(texts)
