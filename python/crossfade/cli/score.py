"""``crossfade score``: how likely a blend finds responses that are given."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..checks import did_you_mean
from . import options, parsed

if TYPE_CHECKING:
    from ..bulk.prompts import Line
    from ..bulk.records import Results
    from ..loading import Loaded

HELP = "Say how likely a blend finds given responses: log-probs and perplexities."
USAGE = "FILE --model [NAME=]PATH ... [options]"
EXAMPLES = """\
A line of FILE has a "prompt" or the "messages" of a chat, and a "response". It
may also have "weights" ({"w": 0.8}, faders by name), "system" (a system prompt
for all models), and "id" and "metadata", which are copied to the result. Other
keys are refused, unless --keep names them.

example:
  crossfade score answers.jsonl \\
      --model base=smollm2 --model kind=smollm2@sentiment \\
      --blend "0.5 * base + 0.5 * kind" --terms
"""
RESULT = {"index", "logprob", "tokens", "perplexity", "terms", "response", "prompt", "messages"}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data",
        metavar="FILE",
        help='a .jsonl file with a "prompt" or the "messages" of a chat, and a "response", on each '
        "line; - is stdin",
    )
    options.add_blend_options(parser)
    group = parser.add_argument_group("prompts and results")
    options.add_batch_options(group)
    group.add_argument(
        "--terms",
        action="store_true",
        help="also give the log-prob under each model of the blend alone",
    )


def run(arguments: argparse.Namespace) -> int:
    from ..bulk import prompts, records

    parsed.check_chat(arguments)
    parsed.check_keep(arguments, RESULT)
    parsed.check_output(arguments.output)
    items = prompts.read_lines(arguments.data)
    if not items:
        raise ValueError("there is nothing to score: the input is empty")
    responses = [_response(item, i) for i, item in enumerate(items)]
    lines = [
        prompts.line_of(
            {key: x for key, x in item.items() if key != "response"},
            i,
            keep=arguments.keep,
            known=("weights", "system"),
        )
        for i, item in enumerate(items)
    ]
    plan = parsed.plan_of(arguments)
    parsed.check_lines(arguments, lines, plan)
    with records.Results(arguments.output) as results:
        write_scores(arguments, parsed.load(arguments, plan), lines, responses, results)
    return 0


def _response(item: Any, index: int) -> str:
    if not isinstance(item, dict) or not isinstance(item.get("response"), str):
        for key in item if isinstance(item, dict) and "response" not in item else ():
            if meant := did_you_mean(key, ["response"]):
                raise ValueError(f"prompt {index} has the unknown key {key!r}{meant}")
        raise ValueError(f'prompt {index} has no "response", which must be a text')
    if not item["response"]:
        raise ValueError(f'prompt {index} has an empty "response"')
    return item["response"]


def write_scores(
    arguments: argparse.Namespace,
    loaded: Loaded,
    lines: Sequence[Line],
    responses: Sequence[str],
    results: Results,
) -> None:
    """Write a JSON line for each prompt and its response, and a summary to stderr."""
    from ..bulk import records, settings
    from ..decoding import score
    from ..metrics import perplexity
    from ..progress import progress_bar

    own = [line.settings for line in lines]
    blend = loaded.blend(settings.positions(own, loaded.faders))
    chat = parsed.sends_chats(arguments, loaded, blend, lines)
    total, tokens = 0.0, 0
    with progress_bar(len(lines), "response", prints=arguments.output is None) as bar:
        for batch in records.batches(range(len(lines)), arguments.batch_size):
            scores = score(
                loaded.blend(settings.positions([own[i] for i in batch], loaded.faders)),
                [lines[i].sent(chat=chat) for i in batch],
                [responses[i] for i in batch],
                return_term_logprobs=arguments.terms,
            )
            for row, i in enumerate(batch):
                logprob, length = float(scores.totals[row]), int(scores.lengths[row])
                record: dict[str, Any] = {
                    "index": i,
                    **lines[i].carried,
                    "logprob": records.number(logprob),
                    "tokens": length,
                    "perplexity": records.number(perplexity(logprob, length)),
                }
                if scores.term_logprobs is not None:
                    sums = scores.term_logprobs[row].double().sum(dim=0).tolist()
                    record["terms"] = dict(zip(blend.names, map(records.number, sums), strict=True))
                results.write(record)
                total, tokens = total + logprob, tokens + length
            results.flush()
            bar.update(len(batch))
    plural = "" if len(lines) == 1 else "s"
    print(
        f"{len(lines)} response{plural}, {tokens} tokens, perplexity "
        f"{perplexity(total, tokens):.4g}",
        file=sys.stderr,
    )
