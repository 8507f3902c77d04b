"""``crossfade score``: how likely a blend finds responses that are given."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .options import add_batch_options, add_blend_options, check_output, load

if TYPE_CHECKING:
    from ..blends.blend import Blend
    from ..bulk.records import Results

HELP = "Say how likely a blend of models finds given responses: log-probs and perplexities."


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data",
        metavar="FILE",
        help='a .jsonl file with a "prompt" or the "messages" of a chat, and a "response", on each '
        "line; - is stdin",
    )
    add_blend_options(parser)
    add_batch_options(parser)
    parser.add_argument(
        "--terms",
        action="store_true",
        help="also give the log-prob under each model of the blend alone",
    )


def run(arguments: argparse.Namespace) -> int:
    from ..bulk import prompts, records

    check_output(arguments.output)
    items = prompts.read_lines(arguments.data)
    with records.Results(arguments.output) as results:
        write_scores(
            load(arguments)[0],
            items,
            results=results,
            batch_size=arguments.batch_size,
            chat=arguments.chat or bool(arguments.system),
            terms=arguments.terms,
        )
    return 0


def write_scores(
    blend: Blend,
    items: Sequence[Any],
    *,
    results: Results,
    batch_size: int,
    chat: bool,
    terms: bool,
) -> None:
    """Write a JSON line for each prompt and its response, and a summary to stderr."""
    from ..bulk import records
    from ..bulk.prompts import prompt_of
    from ..decoding import score
    from ..metrics import perplexity
    from ..progress import progress_bar

    if not items:
        raise ValueError("there is nothing to score: the input is empty")
    for i, item in enumerate(items):
        if not isinstance(item, dict) or not isinstance(item.get("response"), str):
            raise ValueError(f'prompt {i} has no "response", which must be a text')
        if not item["response"]:
            raise ValueError(f'prompt {i} has an empty "response"')
    prompts = [prompt_of(item, i, chat=chat) for i, item in enumerate(items)]
    total, tokens = 0.0, 0
    with progress_bar(len(items), "response") as bar:
        for batch in records.batches(range(len(items)), batch_size):
            scores = score(
                blend,
                [prompts[i] for i in batch],
                [items[i]["response"] for i in batch],
                return_term_logprobs=terms,
            )
            for row, i in enumerate(batch):
                logprob, length = float(scores.totals[row]), int(scores.lengths[row])
                record: dict[str, Any] = {
                    "index": i,
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
    print(
        f"{len(items)} responses, {tokens} tokens, perplexity {perplexity(total, tokens):.4g}",
        file=sys.stderr,
    )
