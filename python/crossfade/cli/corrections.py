"""What ``crossfade correct`` writes: the line of each answer, with its corrections."""

from __future__ import annotations

import argparse
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import parsed

if TYPE_CHECKING:
    from ..bulk.prompts import Line
    from ..bulk.records import Results
    from ..decoding.stats import Stats
    from ..loading import Loaded

BAD = re.compile(
    r"(?:query|request) (\d+)(, sample \d+,)?( was not (?:corrected|decoded): )(.*)", re.DOTALL
)


class Query:
    """A line of the file: what was asked, the answer if it is there, and the objectives."""

    def __init__(self, line: Line, answer: str | None, objectives: Mapping[str, str]) -> None:
        self.line, self.answer, self.objectives = line, answer, objectives

    @property
    def own(self) -> dict[str, Any]:
        """What its result has of it, after the prompt."""
        answer = {} if self.answer is None else {"answer": self.answer}
        return {**answer, "objectives": self.objectives, **self.line.carried}


class Writer:
    """Writes the correction of each line."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        aligner: Any,
        loaded: Loaded,
        search: Any,
        queries: Sequence[Query],
    ) -> None:
        from ..bulk import settings
        from ..identity import run_id
        from ..models import instruct

        self.arguments, self.aligner, self.queries = arguments, aligner, queries
        self.search, self.accept = search, loaded.accept
        self.draft = parsed.draft_of(arguments, loaded)
        self.policy: Any = loaded.terms.get("policy")
        self.common = parsed.writing(arguments, draws=(arguments.n or 1) > 1)
        self.of_policy = parsed.writing(arguments)
        instructed = self.policy is not None and instruct.is_instruct(
            self.policy.model, self.policy.tokenizer
        )
        self.prompts = [q.line.sent(chat=instructed and q.answer is None) for q in queries]
        self.seeds = settings.seeds([{} for _ in queries], arguments.seed)
        more = {} if arguments.n is None else {"n": arguments.n}
        self.run = run_id(
            aligner=aligner.blend,
            policy=self.policy,
            noun=aligner.template.noun,
            search=search,
            accept=self.accept,
            rounds=arguments.rounds,
            seed=arguments.seed,
            generation=dict(self.common),
            **more,
        )
        self.stats: list[Stats] = []
        self.unchanged: list[bool] = []
        self.distances: list[float] = []
        self.failed = 0

    def write(self, results: Results) -> None:
        """Write a line for each query that `results` lacks, and figures to stderr.

        Ctrl-C ends it; lines whose corrections had ended are written.
        """
        from ..progress import progress_bar

        given, own = self.arguments, [q.own for q in self.queries]
        kept = results.begin(self.prompts, self.run, own)
        todo = [i for i in range(len(self.queries)) if i not in kept]
        tokens, start = 0, time.perf_counter()
        with progress_bar(len(todo), "answer", prints=given.output is None) as bar:
            for batch in self._batches(todo):
                out, reasons = self._correct(batch)
                for place in self._done(batch, out):
                    results.write(self._record(batch[place], out, place, reasons.get(place)))
                if out.stats.interrupted:
                    raise KeyboardInterrupt
                self.stats.append(out.stats)
                tokens += out.stats.tokens
                bar.update(len(batch))
        results.finish()
        self._say(len(todo), len(kept), tokens, time.perf_counter() - start)

    def _batches(self, todo: Sequence[int]) -> Iterator[Sequence[int]]:
        """Lines to correct at a time: with an answer, or without one."""
        from ..bulk import records

        for batch in records.batches(todo, self.arguments.batch_size):
            for lacks in (False, True):
                alike = [i for i in batch if (self.queries[i].answer is None) == lacks]
                if alike:
                    yield alike

    def _correct(self, batch: Sequence[int]) -> tuple[Any, dict[int, str]]:
        """The corrections of some lines, and why some of them have none."""
        from ..policies.metaaligner import correct

        answers: Any = [self.queries[i].answer for i in batch]
        given: dict[str, Any] = dict(self.common)
        if answers[0] is None:
            answers, given["policy_generation"] = self.policy, dict(self.of_policy)
        reasons: dict[int, str] = {}
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            out = correct(
                self.aligner,
                [self.prompts[i] for i in batch],
                answers,
                [self.queries[i].objectives for i in batch],
                rounds=self.arguments.rounds,
                search=self.search,
                accept=self.accept,
                draft=self.draft,
                seed=[self.seeds[i] for i in batch],
                num_return_sequences=self.arguments.n or 1,
                progress=False,
                **given,
            )
        for w in seen:
            text, found = str(w.message), BAD.fullmatch(str(w.message))
            if found:  # It counts within the batch; what is said has the place in the file.
                place, sample, why = int(found[1]), found[2] or "", found[4]
                if place in reasons and not sample:
                    continue
                reasons[place] = why
                text = f"line {batch[place]}{sample} was not corrected: {why}"
            if not text.startswith("interrupted"):  # which the exit status says
                warnings.warn(text, w.category, stacklevel=2)
        return out, reasons

    def _done(self, batch: Sequence[int], out: Any) -> list[int]:
        """The places of lines that are whole: all, but for those that Ctrl-C has cut."""
        if not out.stats.interrupted:
            return [*range(len(batch))]
        if len(out.rounds) < self.arguments.rounds or self.accept is not None:
            return []
        n = len(out.text) // len(batch)
        return [i for i in range(len(batch)) if bool(out.ended[i * n : i * n + n].all())]

    def _record(self, i: int, out: Any, place: int, why: str | None) -> dict[str, Any]:
        """The line of a query."""
        from ..bulk.texts import of_prompt

        n = len(out.text) // len(out.answers)
        rows = range(place * n, place * n + n)
        each = [self._text(out, row) for row in rows]
        failed = all(x["failed"] for x in each)
        record = {"index": i, "prompt": self.prompts[i], **self.queries[i].own}
        record["answer"] = out.answers[place]
        *before, _ = out.rounds
        if self.arguments.n is None:
            record |= {**each[0], "rounds": [*(t[place] for t in before), each[0]["text"]]}
        else:
            record |= {"outputs": each, "rounds": [t[place] for t in before]}
        record["failed"] = (why or "no token could be chosen") if failed else None
        record |= of_prompt(out, place)
        self.failed += failed
        if not failed:
            right = [x for x in each if not x["failed"]]
            self.unchanged += [x["unchanged"] for x in right]
            self.distances += [x["edit_distance"] for x in right]
        return {**record, "run": self.run}

    def _text(self, out: Any, row: int) -> dict[str, Any]:
        """What a line says of one of its corrections."""
        from ..bulk.records import number
        from ..bulk.texts import of_search

        found = {
            "text": out.text[row],
            "unchanged": bool(out.unchanged[row]),
            "edit_distance": float(out.edit_distance[row]),
            "tokens": int(out.lengths[row]),
            "finished": bool(out.finished[row]),
            "failed": bool(out.failed[row]),
        }
        if out.tokens_by_draft is not None:
            found["tokens_by_draft"] = int(out.tokens_by_draft[row])
        if out.scores is not None:
            found["scores"] = [number(x) for x in out.scores[row]]
        return {**found, **of_search(out, row)}

    def _say(self, written: int, kept: int, tokens: int, seconds: float) -> None:
        from ..decoding.stats import together

        said = [f"{written} answer{'' if written == 1 else 's'}"]
        aside = [f"{self.failed} failed"] if self.failed else []
        aside += [f"{kept} more were in the file"] if kept else []
        said[0] += f" ({', '.join(aside)})" if aside else ""
        if self.unchanged:
            n = len(self.unchanged)
            said.append(f"{sum(self.unchanged) / n:.1%} unchanged")
            said.append(f"edit distance {sum(self.distances) / n:.2f}")
        speed = f", {tokens / seconds:.1f} tokens/s" if tokens else ""
        if self.draft is not None and self.stats:
            speed += f"; {together(self.stats).drafted}"
        print(f"{', '.join(said)}, {tokens} tokens{speed}", file=sys.stderr)
