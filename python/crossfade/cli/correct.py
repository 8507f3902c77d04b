"""``crossfade correct``: answers of a file, edited by an aligner toward objectives."""

from __future__ import annotations

import argparse
import re
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import options

if TYPE_CHECKING:
    from ..bulk.prompts import Line
    from ..bulk.records import Results

HELP = "Let an aligner correct answers toward objectives, as a JSON line for each."
USAGE = "FILE --aligner PATH --objective NAME[=TEXT] [options]"
EXAMPLES = """\
A line of FILE has a "prompt" or the "messages" of a chat, and an "answer",
which --policy writes if it is given. It may have "objectives" of its own, in
place of those of the options: a list of names, or {"name": "description"}. "id"
and "metadata" are copied to the result. Other keys are refused, unless --keep
names them.

A result has the corrected "text", the texts of each of the "rounds", whether it
came back "unchanged", and the "edit_distance" in words, from 0 to 1. A line
that cannot be corrected keeps its answer and says why under "failed".

examples:
  crossfade correct answers.jsonl --aligner smollm2 --objective brevity
  crossfade correct answers.jsonl --aligner base@aligner --rounds 2 \\
      --objective harmlessness --objective formal="Sound like a letter" \\
      --output corrected.jsonl --resume
"""
# Keys of results, which --keep must not name.
RESULT = {"index", "prompt", "messages", "answer", "objectives", "text", "rounds", "unchanged"}
RESULT |= {"edit_distance", "scores", "tokens", "finished", "failed", "run"}
BAD = re.compile(r"(query|request) (\d+)( was not (?:corrected|decoded): )(.*)", re.DOTALL)
PATH = "PATH is the folder of a saved model, an id on the Hugging Face hub, or smollm2; GUIDE is "
PATH += "the folder of a PEFT adapter for it"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data",
        metavar="FILE",
        help="a .jsonl file with a query and an answer on each line, as described below; - is "
        "stdin",
    )
    group = parser.add_argument_group("models")
    group.add_argument(
        "--aligner",
        required=True,
        metavar="PATH[@GUIDE]",
        help=f"what corrects the answers. {PATH}",
    )
    group.add_argument(
        "--policy",
        metavar="PATH[@GUIDE]",
        help="a model that writes the answers first, by the options of writing; an instruct model "
        "gets texts as chats",
    )
    options.add_device_option(group)
    options.add_dtype_option(group)
    group = parser.add_argument_group("what is corrected")
    group.add_argument(
        "--objective",
        action="append",
        default=[],
        metavar="NAME[=TEXT]",
        help="what answers are corrected toward: the name of one that is known, or any name with "
        "its description; may be given several times",
    )
    group.add_argument(
        "--objectives-file",
        metavar="FILE",
        help="a YAML or JSON file of names and descriptions, which are known by their names",
    )
    group.add_argument(
        "--query-noun",
        default="context",
        metavar="NOUN",
        help="what the aligner's prompt calls the query, context or query, as its training did "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--rounds",
        type=options.positive,
        default=1,
        metavar="N",
        help="how often each answer is edited (default: %(default)s)",
    )
    group.add_argument(
        "--accept",
        metavar="[NAME=]MODULE:FUNCTION",
        help="a Python function (prompts, responses) -> scores: a correction stands only where it "
        "scores higher than the answer",
    )
    options.add_sampling_options(parser, max_new_tokens=128)
    group = parser.add_argument_group("queries and results")
    options.add_batch_options(group, "answers are corrected", chats=False)
    options.add_resume_option(group)


def run(arguments: argparse.Namespace) -> int:
    from .. import rewards
    from ..bulk import prompts, records
    from ..loading import Plan
    from ..policies import metaaligner

    options.check_keep(arguments, RESULT)
    common = options.writing(arguments)
    options.check_output(arguments.output, arguments.resume)
    file = arguments.objectives_file
    own = {} if file is None else metaaligner.read_objectives(file)
    template = metaaligner.AlignerTemplate(arguments.query_noun)
    known = {**metaaligner.OBJECTIVES, **own}
    asked = _objectives(arguments.objective, known)
    accept = None
    if arguments.accept is not None:
        try:
            accept = rewards.reward(arguments.accept)
        except ValueError as error:
            raise ValueError(str(error).replace("--reward", "--accept", 1)) from None
    items = prompts.read_lines(arguments.data)
    if not items:
        raise ValueError("there is nothing to correct: the input is empty")
    queries = [_query(item, i, arguments, asked, known) for i, item in enumerate(items)]
    names = ["aligner", *(["policy"] if arguments.policy else [])]
    plan = Plan.read([f"{n}={getattr(arguments, n)}" for n in names], " + ".join(names))
    plan.check()
    with records.Results(arguments.output, resume=arguments.resume) as results:
        terms = options.load(arguments, plan).terms
        aligner = metaaligner.MetaAligner(
            terms["aligner"], noun=template.noun, objectives=own or None
        )
        Writer(arguments, aligner, terms.get("policy"), accept, common, queries).write(results)
    return 0


class Query:
    """A line of the file: what was asked, the answer if it is there, and the objectives."""

    def __init__(self, line: Line, answer: str | None, objectives: Mapping[str, str]) -> None:
        self.line, self.answer, self.objectives = line, answer, objectives

    @property
    def own(self) -> dict[str, Any]:
        """What its result has of it, after the prompt."""
        answer = {} if self.answer is None else {"answer": self.answer}
        return {**answer, "objectives": self.objectives, **self.line.carried}


def _objectives(given: Sequence[str], known: Mapping[str, str]) -> dict[str, str]:
    """The objectives of the options, by name."""
    from ..policies.metaaligner import resolve

    found: dict[str, str] = {}
    for text in given:
        name, equals, description = text.partition("=")
        one = resolve({name: description} if equals else name, known, f"--objective {text!r}:")
        if not found.keys().isdisjoint(one):
            raise ValueError(f"--objective {name!r} is given twice; names must differ")
        found |= one
    return found


def _query(
    item: Any,
    index: int,
    arguments: argparse.Namespace,
    asked: Mapping[str, str],
    known: Mapping[str, str],
) -> Query:
    from ..bulk import prompts
    from ..policies.metaaligner import resolve

    where = f"line {index}"
    if not isinstance(item, dict):
        raise ValueError(f"{where} is {item!r:.80}; it must be an object of a .jsonl file")
    answer = item.get("answer")
    if arguments.policy is not None and answer is not None:
        raise ValueError(
            f'--policy is given, which writes the answers, and {where} has an "answer"'
        )
    if arguments.policy is None and not isinstance(answer, str):
        raise ValueError(
            f'{where} has the "answer" {answer!r:.80}; it must be a text, or --policy be given'
        )
    rest = {k: x for k, x in item.items() if k not in ("answer", "objectives")}
    line = prompts.line_of(rest, index, keep=arguments.keep, known=(), noun="line")
    objectives = asked
    if "objectives" in item:
        objectives = resolve(item["objectives"], known, f"objectives of {where}")
    elif not asked:
        raise ValueError(f'{where} has no "objectives", and no --objective is given')
    return Query(line, answer, objectives)


class Writer:
    """Writes the correction of each line."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        aligner: Any,
        policy: Any,
        accept: Any,
        common: Mapping[str, Any],
        queries: Sequence[Query],
    ) -> None:
        from ..bulk import settings
        from ..identity import run_id
        from ..models import instruct

        self.arguments, self.aligner, self.policy = arguments, aligner, policy
        self.accept, self.common, self.queries = accept, common, queries
        self.chat = policy is not None and instruct.is_instruct(policy.model, policy.tokenizer)
        self.prompts = [q.line.sent(chat=self.chat) for q in queries]
        self.seeds = settings.seeds([{} for _ in queries], arguments.seed)
        self.run = run_id(
            aligner=aligner.blend,
            policy=None if policy is None else policy,
            noun=aligner.template.noun,
            accept=accept,
            rounds=arguments.rounds,
            seed=arguments.seed,
            generation=dict(common),
        )
        self.unchanged: list[bool] = []
        self.distances: list[float] = []
        self.failed = 0

    def write(self, results: Results) -> None:
        """Write a line for each query that `results` lacks, and figures to stderr."""
        from ..bulk import records
        from ..progress import progress_bar

        given, own = self.arguments, [q.own for q in self.queries]
        kept = results.begin(self.prompts, self.run, own)
        todo = [i for i in range(len(self.queries)) if i not in kept]
        tokens, start = 0, time.perf_counter()
        with progress_bar(len(todo), "answer", prints=given.output is None) as bar:
            for batch in records.batches(todo, given.batch_size):
                out, reasons = self._correct(batch)
                for row, i in enumerate(batch):
                    results.write(self._record(i, out, row, reasons.get(row)))
                tokens += out.stats.tokens
                bar.update(len(batch))
        results.finish()
        self._say(len(todo), len(kept), tokens, time.perf_counter() - start)

    def _correct(self, batch: Sequence[int]) -> tuple[Any, dict[int, str]]:
        """The corrections of some lines, and why some of them have none."""
        from ..policies.metaaligner import correct

        policy: dict[str, Any] = {}
        if self.policy is not None:
            policy["policy_generation"] = dict(self.common)
        reasons: dict[int, str] = {}
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            out = correct(
                self.aligner,
                [self.prompts[i] for i in batch],
                self.policy or [self.queries[i].answer for i in batch],
                [self.queries[i].objectives for i in batch],
                rounds=self.arguments.rounds,
                accept=self.accept,
                seed=[self.seeds[i] for i in batch],
                **policy,
                **self.common,
            )
        for w in seen:
            text, found = str(w.message), BAD.fullmatch(str(w.message))
            if found:  # It counts within the batch; what is said has the place in the file.
                row = int(found[2])
                if row in reasons:
                    continue
                reasons[row] = found[4]
                text = f"line {batch[row]} was not corrected: {found[4]}"
            warnings.warn(text, w.category, stacklevel=2)
        if out.stats.interrupted:
            raise KeyboardInterrupt
        return out, reasons

    def _record(self, i: int, out: Any, row: int, why: str | None) -> dict[str, Any]:
        """The line of a query."""
        from ..bulk.records import number

        failed = bool(out.failed[row])
        record = {"index": i, "prompt": self.prompts[i], **self.queries[i].own}
        record["answer"] = out.answers[row]
        record |= {
            "text": out.text[row],
            "rounds": [texts[row] for texts in out.rounds],
            "unchanged": bool(out.unchanged[row]),
            "edit_distance": float(out.edit_distance[row]),
            "tokens": int(out.lengths[row]),
            "finished": bool(out.finished[row]),
            "failed": (why or "no token could be chosen") if failed else None,
        }
        if out.scores is not None:
            record["scores"] = [number(x) for x in out.scores[row]]
        self.failed += failed
        if not failed:
            self.unchanged.append(record["unchanged"])
            self.distances.append(record["edit_distance"])
        return {**record, "run": self.run}

    def _say(self, written: int, kept: int, tokens: int, seconds: float) -> None:
        said = [f"{written} answer{'' if written == 1 else 's'}"]
        aside = [f"{self.failed} failed"] if self.failed else []
        aside += [f"{kept} more were in the file"] if kept else []
        said[0] += f" ({', '.join(aside)})" if aside else ""
        if self.unchanged:
            n = len(self.unchanged)
            said.append(f"{sum(self.unchanged) / n:.1%} unchanged")
            said.append(f"edit distance {sum(self.distances) / n:.2f}")
        speed = f", {tokens / seconds:.1f} tokens/s" if tokens else ""
        print(f"{', '.join(said)}, {tokens} tokens{speed}", file=sys.stderr)
