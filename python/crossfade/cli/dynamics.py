"""``crossfade dynamics``: a report of which behaviours of a preference set are learnt first."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ..checks import did_you_mean
from . import options, parsed

HELP = "Report which behaviours of a preference set will be learnt first."
USAGE = "DATA --model PATH --output FILE [options]"
EXAMPLES = """\
A line of DATA has a "behaviour" and either a "text" with a "label" (true or
false), or a "prompt" with a "chosen" and a "rejected" response, or all three as
"prompt_ids", "chosen_ids" and "rejected_ids". All lines are of one kind. Other
keys stay in --balanced as they are.

The report is one HTML file. Its answer is printed, too.

examples:
  crossfade dynamics statements.jsonl --model smollm2 --output report.html
  crossfade dynamics pairs.jsonl --model smollm2 --tag source \\
      --output report.html --json report.json --balanced even.jsonl
  crossfade dynamics pairs.jsonl --model smollm2 --output report.html \\
      --watch first.json second.json
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data", metavar="DATA", help="a .jsonl file, as described below; - is stdin"
    )
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        required=True,
        metavar="PATH[@ADAPTER]",
        help="the model before the training: the folder of a saved model, an id on the Hugging "
        "Face hub, or smollm2; ADAPTER is the folder of a PEFT adapter, or a guide that ships",
    )
    options.add_device_option(group)
    options.add_dtype_option(group)
    group.add_argument(
        "--max-batch",
        type=options.positive,
        metavar="N",
        help="how many texts are read at a time at most; by default as many as memory is meant for",
    )
    group = parser.add_argument_group("rows and results")
    group.add_argument(
        "--tag",
        metavar="KEY",
        default="behaviour",
        help="the key of the name of a line's behaviour (default: %(default)s)",
    )
    group.add_argument("--output", required=True, metavar="FILE", help="the HTML file to write")
    group.add_argument("--json", metavar="FILE", help="write all figures there as JSON")
    group.add_argument(
        "--watch",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="what crossfade.dynamics.Watch saved of trainings: the report compares it",
    )
    group.add_argument(
        "--balanced",
        metavar="FILE",
        help="write as many lines of DATA there, by which all behaviours are learnt about as fast",
    )
    group.add_argument(
        "--seed",
        type=int,
        metavar="N",
        default=0,
        help="of the choice and order of these lines (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    from ..bulk import prompts

    _check_files(arguments)
    rows = prompts.read_lines(arguments.data)
    where = "stdin" if arguments.data == "-" else arguments.data
    _check_rows(rows, arguments.tag, where)
    from ..decoding.settings import check_int
    from ..dynamics import rebalancing, report, runs, statistics
    from ..loading import Plan

    with parsed.option_errors("seed"):
        check_int("seed", arguments.seed, 0)
    watches = {path: runs.read(path) for path in arguments.watch}
    plan = Plan.read([arguments.model])
    (spec,) = plan.specs.values()
    if plan.labels or spec.is_value_head:
        what = "a value head" if spec.is_value_head else "a reward model"
        raise ValueError(f"--model is {arguments.model!r}, {what}; it must be a language model")
    loaded = parsed.load(arguments, plan)
    notes: list[str] = []
    with _noted(notes, where):
        stats = statistics(
            next(iter(loaded.terms.values())),
            None,
            rows,
            tag=arguments.tag,
            max_batch=arguments.max_batch,
        )
        if arguments.balanced is not None:
            tags = [row.get(arguments.tag) for row in rows]
            chosen = rebalancing.chosen(tags, stats, tag=arguments.tag, seed=arguments.seed)
            _write_lines(arguments.balanced, rows, chosen)
    found = report(
        stats,
        model=arguments.model,
        watches=watches,
        notes=notes,
        balanced=arguments.balanced,
    )
    found.to_html(arguments.output)
    if arguments.json is not None:
        found.to_json(arguments.json)
    print(found.summary)
    written = [x for x in (arguments.output, arguments.json, arguments.balanced) if x is not None]
    print(f"written: {', '.join(written)}", file=sys.stderr)
    return 0


def _check_files(arguments: argparse.Namespace) -> None:
    """Refuse files that could not be written, or that are one another."""
    outputs = {"--output": arguments.output, "--json": arguments.json}
    outputs["--balanced"] = arguments.balanced
    seen = {os.path.realpath(arguments.data): "DATA"} if arguments.data != "-" else {}
    seen |= {os.path.realpath(path): "--watch" for path in arguments.watch}
    for option, path in outputs.items():
        parsed.check_file(option, path)
        if path is not None:
            place = os.path.realpath(path)
            if place in seen:
                raise ValueError(f"{option} is {path!r}, as is {seen[place]}; they must differ")
            seen[place] = option
    for path in arguments.watch:
        if arguments.watch.count(path) > 1:
            raise ValueError(f"--watch has {path!r} twice")


def _check_rows(rows: Sequence[Any], tag: str, where: str) -> None:
    """Refuse rows of which nothing could be said, before a model is loaded."""
    from ..dynamics.rows import sides

    if not rows:
        raise ValueError(f"{where} is empty; it must have rows")
    with _errors_of(where):
        found = sides(rows, tag)
    if not found:
        keys = list(dict.fromkeys(key for row in rows for key in row))
        raise ValueError(
            f"--tag is {tag!r}, which names no behaviour in {where}; its lines have "
            f"{', '.join(keys[:8])}{did_you_mean(tag, keys)}"
        )
    if not any(len(of) == 2 for of in found.values()):
        name, of = next(iter(found.items()))
        raise ValueError(
            f"{where} has no behaviour with texts of both labels, such as {name!r} with "
            f"{next(iter(of))} only; it must have one"
        )


@contextmanager
def _errors_of(where: str) -> Iterator[None]:
    """Let errors about rows name the file that has them."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if type(error) not in (TypeError, ValueError):
            raise
        raise type(error)(_named(str(error), where)) from None


def _named(said: str, where: str) -> str:
    return re.sub(r"(^|\brow \d+ of )rows\b", lambda found: found[1] + where, said)


@contextmanager
def _noted(notes: list[str], where: str) -> Iterator[None]:
    """Keep what is warned of rows for the report; it is shown as well."""
    show = warnings.showwarning

    def keep(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
        if category is UserWarning:  # those of others have categories of their own
            message = _named(str(message), where)
            notes.append(message)
        show(message, category, *rest, **more)

    with warnings.catch_warnings(), _errors_of(where):
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = keep
        yield


def _write_lines(path: str, rows: Sequence[Mapping[str, Any]], chosen: Sequence[int]) -> None:
    from ..files import write_text

    write_text(path, "".join(json.dumps(rows[i], ensure_ascii=False) + "\n" for i in chosen))
