"""``crossfade judge``: which of two answers a model finds better, for each pair of a file."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import judges, options, parsed

if TYPE_CHECKING:
    from ..bulk.pairs import Pair
    from ..bulk.records import Results
    from ..policies.self_judge import Judge, Judgments

HELP = "Let a model judge pairs of answers, and write a JSON line for each."
USAGE = "FILE --model [NAME=]PATH ... [options]"
EXAMPLES = """\
A line of FILE has a "prompt" or the "messages" of a chat, and two answers:
"first" and "second", or "chosen" and "rejected", where it is known that the
first one is better, so that the accuracy is known too. An answer is a text or,
as in TRL's data, a list of one message; "chosen" and "rejected" may be whole
chats without a "prompt". "id" and "metadata" are copied to the result. Other
keys are refused, unless --keep names them.

Both orders of a pair are read. A result has "first" and "second", the scores of
the two answers, "preference", the probability that the first one is better, and
the "winner": first, second or tie. "orders" has what these are made of: of each
principle the probabilities of both labels, in both orders. A pair that cannot
be judged says why under "failed".

examples:
  crossfade judge pairs.jsonl --model smollm2
  crossfade judge pairs.jsonl --model smollm2 --template ultrafeedback \\
      --principle helpfulness --principle polite="polite and kind" \\
      --output judged.jsonl --resume
"""
# Keys of results, which --keep must not name.
RESULT = {"index", "prompt", "messages", "answers", "first", "second", "chosen", "rejected", "run"}
RESULT |= {"preference", "winner", "principles", "orders", "correct", "failed"}

WINNERS = {"a": "first", "b": "second", "tie": "tie", None: None}  # as results call them


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data",
        metavar="FILE",
        help="a .jsonl file with a pair of answers on each line, as described below; - is stdin",
    )
    options.add_blend_options(parser, system=False)
    judges.add_judge_options(parser.add_argument_group("what is asked"))
    group = parser.add_argument_group("pairs and results")
    options.add_batch_options(group, "pairs are judged", chats=False)
    options.add_resume_option(group)
    group.add_argument(
        "--json",
        action="store_true",
        help="print the figures about all pairs as JSON, in place of their lines and of the "
        "sentence on stderr; --output gets the lines all the same",
    )


def run(arguments: argparse.Namespace) -> int:
    from ..bulk import pairs, records

    parsed.check_keep(arguments, RESULT)
    parsed.check_output(arguments.output, arguments.resume)
    question = judges.question_of(arguments)
    found = pairs.read_pairs(arguments.data, keep=arguments.keep)
    plan = parsed.plan_of(arguments)
    plan.check()
    with records.Results(arguments.output, resume=arguments.resume) as results:
        blend = parsed.load(arguments, plan).blend()
        single = len(arguments.model) == 1
        option = f"--model {arguments.model[0]}" if single else f"--blend {arguments.blend}"
        judge = question.judge(blend, option)
        Writer(arguments, judge, question.identity(), found).write(results)
    return 0


class Writer:
    """Writes the judgment of each pair, and figures about all of them."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        judge: Judge,
        asked: Mapping[str, Any],
        pairs: Sequence[Pair],
    ) -> None:
        from ..identity import run_id

        self.arguments, self.judge, self.pairs = arguments, judge, pairs
        self.run = run_id(blend=judge.blend, tokenizer=judge.tokenizer, **asked)
        self.own = [{"answers": [pair.first, pair.second], **pair.carried} for pair in pairs]
        self.found: dict[int, tuple[Any, str | None]] = {}  # the orders, and why there are none

    def write(self, results: Results) -> None:
        """Write a line for each pair that `results` lacks, and figures.

        A batch is the same, whatever the file had: scores depend on it in their last digits.
        """
        from ..bulk import records
        from ..progress import progress_bar

        given = self.arguments
        kept = results.begin([p.prompt for p in self.pairs], self.run, self.own, self._take)
        todo, tokens, start = len(self.pairs) - len(kept), 0, time.perf_counter()
        prints = given.output is None and not given.json
        with progress_bar(todo, "pair", prints=prints) as bar:
            for batch in records.batches(range(len(self.pairs)), given.batch_size):
                new = [i for i in batch if i not in kept]
                if not new:
                    continue
                judgments = self._judge([self.pairs[i] for i in batch])
                for i in new:
                    record = self._record(i, judgments, i - batch[0])
                    self._keep(record)
                    if prints or given.output is not None:
                        results.write(record)
                    self._warn(i, record["failed"])
                tokens += sum(m.tokens for m in judgments.stats.models)
                bar.update(len(new))
        results.finish()
        self._say(self._figures(len(kept), tokens, time.perf_counter() - start))

    def _judge(self, pairs: Sequence[Pair]) -> Judgments:
        with warnings.catch_warnings():
            # They count within the batch; `_warn` says the place in the file.
            warnings.filterwarnings("ignore", r"pair \d+ was not judged")
            return self.judge(
                [p.prompt for p in pairs], [p.first for p in pairs], [p.second for p in pairs]
            )

    def _warn(self, index: int, why: str | None) -> None:
        if why is not None:
            warnings.warn(f"pair {index} was not judged: {why}", RuntimeWarning, stacklevel=2)

    def _record(self, index: int, judgments: Judgments, row: int) -> dict[str, Any]:
        """The line of a pair."""
        why, pair = judgments.reasons[row], self.pairs[index]
        record = {"index": index, "prompt": pair.prompt, **self.own[index]}
        figures: dict[str, Any] = dict.fromkeys(("first", "second", "preference", "winner"))
        if why is None:
            figures = {
                "first": float(judgments.first[row]),
                "second": float(judgments.second[row]),
                "preference": float(judgments.preference[row]),
                "winner": WINNERS[judgments.winners[row]],
            }
        if judgments.principles != (None,):
            scores = judgments.by_principle[row].tolist()
            named = dict(zip(judgments.principles, scores, strict=True))
            figures["principles"] = None if why else named
        if pair.labelled:
            winner = figures["winner"]
            figures["correct"] = None if winner in (None, "tie") else winner == "first"
        orders = None if why else judgments.orders[row].tolist()
        return {**record, **figures, "orders": orders, "failed": why, "run": self.run}

    def _keep(self, record: Mapping[str, Any]) -> None:
        """Keep of a line what the figures are made of."""
        self.found[record["index"]] = record["orders"], record["failed"]

    def _take(self, record: Mapping[str, Any]) -> None:
        """Keep a line that the file has.

        Raises:
            KeyError, TypeError, ValueError: it is none that is written here.
        """
        import torch

        orders, why = record["orders"], record["failed"]
        given = torch.tensor([] if orders is None else orders, dtype=torch.float64)
        whole = given.shape == (len(self.judge.principles), 2, 2) and bool(given.isfinite().all())
        if not (whole and why is None) and not (orders is None and isinstance(why, str)):
            raise ValueError("orders and failed do not go together")
        self._keep(record)

    def _figures(self, kept: int, tokens: int, seconds: float) -> dict[str, Any]:
        """The figures about all pairs, those that the file had before among them."""
        from ..bulk.records import number

        whole = self._judgments(range(len(self.pairs)))
        labelled = self._judgments([i for i, pair in enumerate(self.pairs) if pair.labelled])
        accuracy, interval = labelled.accuracy([True] * len(labelled))
        bias, first = whole.position_bias, whole.toward_first
        return {
            "pairs": len(whole),
            "failed": int(whole.failed.sum()),
            "kept": kept,
            "position_bias": number(bias),
            "toward": dict(
                zip(self.judge.template.labels, (number(first), number(bias - first)), strict=True)
            ),
            "labelled": int((~labelled.failed).sum()),
            "accuracy": number(accuracy),
            "accuracy_interval": number(interval),
            "tokens_read": tokens,
            "seconds": seconds,
            "run": self.run,
        }

    def _judgments(self, indices: Sequence[int]) -> Judgments:
        """The judgments of some pairs, as one batch would have given them."""
        import torch

        from ..decoding.stats import Stats
        from ..policies.self_judge import Judgments

        principles = self.judge.principles
        none = [[[math.nan] * 2] * 2] * len(principles)
        orders = [none if self.found[i][0] is None else self.found[i][0] for i in indices]
        return Judgments(
            torch.tensor(orders, dtype=torch.float64).view(-1, len(principles), 2, 2),
            principles,
            tuple(self.found[i][1] for i in indices),
            Stats(0, 0.0, (), 0, 0),
        )

    def _say(self, figures: Mapping[str, Any]) -> None:
        """Print the figures: one JSON object on stdout, or a sentence on stderr."""
        if self.arguments.json:
            print(json.dumps(figures))
            return
        plural = "" if figures["pairs"] == 1 else "s"
        said = [f"{figures['pairs']} pair{plural}"]
        aside = [f"{figures['failed']} failed"] if figures["failed"] else []
        aside += [f"{figures['kept']} were in the file"] if figures["kept"] else []
        said[0] += f" ({', '.join(aside)})" if aside else ""
        if figures["position_bias"] is not None:
            toward = [f"{x:.1%} toward {label}" for label, x in figures["toward"].items()]
            said.append(f"the order alone decides {figures['position_bias']:.1%}")
            said[-1] += f" ({', '.join(toward)})"
        if figures["accuracy"] is not None:
            interval = figures["accuracy_interval"]
            wide = "" if interval is None else f" ± {interval:.1%}"
            said.append(f"accuracy {figures['accuracy']:.1%}{wide} of {figures['labelled']}")
        if figures["tokens_read"]:
            said.append(f"{figures['tokens_read']} tokens read")
        print(", ".join([*said, f"{figures['seconds']:.1f} s"]), file=sys.stderr)
