"""What ``crossfade generate`` writes: the line of each prompt, or texts alone."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import options, searches

if TYPE_CHECKING:
    from ..bulk.prompts import Line
    from ..decoding.stats import Stats
    from ..loading import Loaded
    from .judges import Question


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

        self.arguments, self.loaded, self.lines, self.common = arguments, loaded, lines, common
        own = [line.settings for line in lines]
        self.positions = settings.positions(own, loaded.faders)
        self.blend = loaded.blend(self.positions)
        self.chat = options.sends_chats(arguments, loaded, self.blend, lines)
        self.prompts = [line.sent(chat=self.chat) for line in lines]
        self.search = searches.make(arguments, loaded, question)
        self.draft = options.draft_of(arguments, loaded)
        saved = self.blend.terms[0].model.generation_config
        drawn = common if self.search is None else {"do_sample": True, **common}
        self.generation = settings.arguments(own, drawn, saved)
        self.seeds = settings.seeds(own, arguments.seed)
        self.formulas: dict[tuple[Any, ...], str] = {}

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
                draft=self.draft,
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
        from ..progress import progress_bar

        own = [_own(line) for line in self.lines]
        run = self._run()
        finished = results.begin(self.prompts, run, own)
        todo, tokens, start = len(self.prompts) - len(finished), 0, time.perf_counter()
        stats = None
        n = self.arguments.n or 1
        rows = n if self.search is None else self.search.rows
        unit, prints = "prompt" if n == 1 else "text", self.arguments.output is None
        with progress_bar(todo * n, unit, prints=prints) as bar:
            for i, out in decode(
                self.blend,
                self.prompts,
                seed=self.seeds,
                skip=finished,
                max_batch=self.arguments.batch_size * rows,
                progress=bar.update,
                search=self.search,
                draft=self.draft,
                num_return_sequences=n,
                return_term_logprobs=self.arguments.terms,
                **self.generation,
            ):
                record = {"index": i, "prompt": self.prompts[i], **own[i], **self._figures(out)}
                results.write({**record, "blend": self._formula(i), "run": run})
                stats = out.stats
                tokens += stats.tokens
        results.finish()
        self._say(todo, len(finished), tokens, time.perf_counter() - start, stats)

    def _run(self) -> str:
        """The identity of the run, which does not depend on settings that prompts have of their
        own: these stand in the lines."""
        from ..identity import run_id

        given = self.arguments
        parts: dict[str, Any] = {"seed": given.seed, "search": self.search}
        parts["generation"] = dict(self.common)
        if self.positions:
            parts |= {"blend": self.loaded.formula, "terms": dict(self.loaded.terms)}
            parts["faders"] = dict(self.loaded.faders)
        else:
            parts["blend"] = self.blend
        asked = {"n": given.n, "logprobs": given.logprobs, "terms": given.terms}
        parts |= {f"asked_{name}": x for name, x in asked.items() if x}
        return run_id(**parts)

    def _formula(self, i: int) -> str:
        """The blend that the text of prompt `i` is of, with its own positions of the faders."""
        weights = self.lines[i].settings.get("weights", {})
        key = tuple(sorted(weights.items()))
        if key not in self.formulas:
            self.formulas[key] = str(self.loaded.blend(weights))
        return self.formulas[key]

    def _figures(self, out: Any) -> dict[str, Any]:
        """What the line of a prompt says of its text, or of each of its texts if --n is given."""
        each = [self._text(out, row) for row in range(len(out.lengths))]
        found = each[0] if self.arguments.n is None else {"outputs": each}
        return {**found, **searches.of_prompt(out, 0)}

    def _text(self, out: Any, row: int) -> dict[str, Any]:
        from ..bulk.records import number

        length = int(out.lengths[row])
        figures = {
            "text": None if out.text is None else out.text[row],
            "tokens": length,
            "logprob": number(out.logprobs[row].double().sum()),
            "finished": bool(out.finished[row]),
            "failed": bool(out.failed[row]),
        }
        figures |= searches.figures(out, row)
        if out.tokens_by_draft is not None:
            figures["tokens_by_draft"] = int(out.tokens_by_draft[row])
        terms = None if out.term_logprobs is None else out.term_logprobs[row, :length].double()
        if terms is not None:
            figures["terms"] = self._by_term(terms.sum(dim=0).tolist())
        if self.arguments.logprobs:
            tokenizer = self.blend.terms[0].tokenizer
            ids, logprobs = out.responses[row], out.logprobs[row].tolist()
            figures["logprobs"] = [
                {
                    "id": token,
                    "token": tokenizer.decode([token]),
                    "logprob": number(logprobs[t]),
                    **({} if terms is None else {"terms": self._by_term(terms[t].tolist())}),
                }
                for t, token in enumerate(ids)
            ]
        return figures

    def _by_term(self, each: Sequence[float]) -> dict[str, float | None]:
        from ..bulk.records import number

        return dict(zip(self.blend.names, map(number, each), strict=True))

    def _say(
        self, written: int, kept: int, tokens: int, seconds: float, stats: Stats | None
    ) -> None:
        """Figures on stderr, with what `stats`, of all that was written, say of guesses."""
        more = f" ({kept} more were in the file)" if kept else ""
        speed = f", {tokens / seconds:.1f} tokens/s" if tokens else ""
        plural = "" if written == 1 else "s"
        guessed = "" if self.draft is None or stats is None else f"; {stats.drafted}"
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


def _own(line: Line) -> dict[str, Any]:
    """What a result has of its prompt's line."""
    settings = {k: x for k, x in line.settings.items() if k != "system"}  # which is in the prompt
    return {**line.carried, **({"settings": settings} if settings else {})}
