"""``crossfade generate``: texts that a blend writes, as a JSON line for each prompt."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import judges, options
from .texts import PlainTexts, Writer

if TYPE_CHECKING:
    from ..bulk.prompts import Line
    from ..loading import Plan

HELP = "Let a blend of models answer prompts, and write a JSON line for each."
USAGE = "[PROMPT ...] --model [NAME=]PATH ... [options]"
EXAMPLES = """\
A line of --prompts FILE.jsonl, and of JSON lines on stdin, has a "prompt" or
the "messages" of a chat. It may have settings of its own, which go before those
of the options:
  "weights" ({"w": 0.8}, faders by name), "seed" (which is used as it is, so
  that equal lines give equal texts), "max_new_tokens", "temperature", "top_k",
  "top_p", "min_p", "stop" (a text or several) and "system" (a system prompt for
  all models).
"id" and "metadata" may be anything and are copied to the result. Other keys are
refused, unless --keep names them.

examples:
  crossfade generate "Why is the sky blue?" --model smollm2 --stream
  crossfade generate "Write a haiku." --model smollm2 --n 3 --text
  crossfade generate --prompts prompts.jsonl \\
      --model base=smollm2 --model kind=smollm2@sentiment \\
      --blend "base + w * (kind - base)" --fader w=0.8 \\
      --output answers.jsonl --resume
  crossfade generate "Tell me a story." --model smollm2 \\
      --reward rewards:brevity --best-of 8
  crossfade generate "Tell me a story." --model smollm2 \\
      --judge model --tournament 8
"""
# Keys of results, which --keep must not name.
RESULT = {"index", "prompt", "settings", "text", "tokens", "logprob", "finished", "failed", "value"}
RESULT |= {"terms", "logprobs", "outputs", "blend", "run", "messages", "slot", "bracket"}

SEARCHES = ("--best-of", "--search", "--tournament")


def add_options(parser: argparse.ArgumentParser) -> None:
    options.add_blend_options(parser)
    options.add_sampling_options(parser, max_new_tokens=128)
    search = parser.add_argument_group("search")
    search.add_argument(
        "--value",
        metavar="FORMULA",
        help="what a search prefers: texts that one model finds likelier than another does, such "
        'as "tuned - ref", or texts that value heads, reward models or functions of --reward '
        "score highly, by their names. A reward model is a --model that is a sequence classifier; "
        "if it has several classes, PATH@CLASS says whose log-prob counts",
    )
    search.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="[NAME=]MODULE:FUNCTION",
        help="a Python function (prompts, responses) -> scores, which --value may name; alone it "
        "is the value. MODULE is looked for in the working directory too; prompts are as they are "
        "sent, so that those of chats are lists of messages",
    )
    search.add_argument(
        "--judge",
        metavar="FORMULA",
        help="the model that compares texts in --tournament: the name of a --model, which may be "
        "the one that writes, or a blend of several",
    )
    judges.add_judge_options(search)
    how = search.add_mutually_exclusive_group()
    how.add_argument(
        "--best-of", type=options.positive, metavar="N", help="write N texts, keep the best"
    )
    how.add_argument(
        "--search",
        type=_search,
        metavar="W,N,L",
        help="keep W texts, continue each of them in N ways, and after every L tokens choose the W "
        "best again",
    )
    how.add_argument(
        "--tournament",
        type=options.positive,
        metavar="N",
        help="write N texts and let them play a knock-out tournament, whose matches --judge "
        "decides, or --value or --reward",
    )
    group = parser.add_argument_group("prompts and results")
    group.add_argument(
        "prompt", nargs="*", metavar="PROMPT", help="prompts, if not by --prompts or on stdin"
    )
    group.add_argument(
        "--prompts",
        metavar="FILE",
        help="a file with a prompt on each line, or a .jsonl file with an object on each line, as "
        "described below; - is stdin",
    )
    options.add_batch_options(group)
    options.add_resume_option(group)
    group.add_argument(
        "--n",
        type=options.positive,
        metavar="N",
        help='write N texts for each prompt, which its line has as "outputs"; those of a search '
        "are its N best",
    )
    group.add_argument(
        "--text",
        action="store_true",
        help="print the texts alone in place of JSON lines, with an empty line between two",
    )
    group.add_argument(
        "--stream",
        action="store_true",
        help="print the text of the one prompt while it is written, in place of a JSON line",
    )
    group.add_argument(
        "--logprobs",
        action="store_true",
        help='add "logprobs": for each token its id, text and log-prob under the blend',
    )
    group.add_argument(
        "--terms",
        action="store_true",
        help='add "terms": the log-prob of the text, and with --logprobs of each token, under each '
        "model of the blend alone",
    )


def run(arguments: argparse.Namespace) -> int:
    from ..bulk import prompts, records

    _check(arguments)
    question = judges.Question(arguments) if arguments.judge is not None else None
    common = options.writing(arguments, draws=(arguments.n or 1) > 1)
    options.check_output(arguments.output, arguments.resume)
    lines = prompts.read_prompts(arguments.prompt, arguments.prompts, keep=arguments.keep)
    plan = options.plan_of(arguments)
    _check_lines(arguments, lines, plan)
    form = PlainTexts() if arguments.text else None
    with records.Results(arguments.output, resume=arguments.resume, form=form) as results:
        loaded = options.load(arguments, plan)
        writer = Writer(arguments, loaded, lines, common, question)
        if arguments.stream:
            writer.stream()
        else:
            writer.write(results)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse options that contradict each other."""
    options.check_chat(arguments)
    options.check_keep(arguments, RESULT)
    searches = _check_search(arguments)
    greedy = "--greedy" if arguments.greedy else None
    if arguments.temperature == 0:
        greedy = "--temperature 0"
    if searches and greedy:
        raise ValueError(f"{greedy} is given with a search, which draws its texts at random")
    if greedy and (arguments.n or 1) > 1:
        raise ValueError(f"{greedy} and --n {arguments.n} are both given; all texts would be equal")
    width = arguments.best_of or arguments.tournament or (arguments.search or [None])[0]
    if width and (arguments.n or 1) > width:
        raise ValueError(f"--n is {arguments.n}; it must be at most {width}, as {searches} keeps")
    lines = [o for o in ("--logprobs", "--terms") if getattr(arguments, o[2:])]
    files = [o for o in ("--output", "--resume") if getattr(arguments, o[2:])]
    plain = [o for o in ("--stream", "--text") if getattr(arguments, o[2:])]
    if plain and lines:
        raise ValueError(f"{plain[0]} and {lines[0]} are both given; JSON lines alone have room")
    if plain and files:
        raise ValueError(
            f"{plain[0]} and {files[0]} are both given; {plain[0]} prints to stdout, which > FILE "
            "puts into a file"
        )
    if arguments.stream and (searches or arguments.n):
        raise ValueError(
            f"--stream and {searches or '--n'} are both given; only one text can be streamed"
        )


def _check_search(arguments: argparse.Namespace) -> str | None:
    """The option of a search, if one is given, with what decides in it and nothing else."""
    searches = _search_of(arguments)
    given = [o for o in ("--judge", "--value", "--reward") if _is_given(arguments, o)]
    decides = given[0] if given else None
    if decides == "--judge" and len(given) > 1:
        raise ValueError(
            f"--judge and {given[1]} are both given; one of them decides the matches of a "
            "tournament"
        )
    if decides == "--judge" and searches != "--tournament":
        other = f"with {searches}, which scores texts" if searches else "alone"
        raise ValueError(
            f"--judge is given {other}; it compares texts, and --tournament N must go with it"
        )
    asked = [o for o in ("--template", "--principle") if _is_given(arguments, o)]
    if asked and decides != "--judge":
        raise ValueError(f"{asked[0]} is given without --judge, whose prompt it belongs to")
    if searches and decides is None:
        judge = "--judge, " if searches == "--tournament" else ""
        raise ValueError(
            f"{searches} is given without {judge}--value or --reward, one of which must go with it"
        )
    if decides and searches is None:
        raise ValueError(
            f"{decides} is given without --best-of, --search or --tournament, one of which must go "
            "with it"
        )
    return searches


def _search_of(arguments: argparse.Namespace) -> str | None:
    """The option of a search, if one is given."""
    return next((o for o in SEARCHES if _is_given(arguments, o)), None)


def _is_given(arguments: argparse.Namespace, option: str) -> bool:
    return getattr(arguments, option[2:].replace("-", "_")) not in (None, [])


def _check_lines(arguments: argparse.Namespace, lines: Sequence[Line], plan: Plan) -> None:
    """Refuse lines that contradict the options, and formulas with the faders of each line."""
    from ..bulk.settings import SAMPLING

    if arguments.stream and len(lines) > 1:
        raise ValueError(
            f"--stream is given with {len(lines)} prompts; it is for one. Without it, each line is "
            "written as soon as its text has ended"
        )
    draws = _search_of(arguments) or (arguments.n or 1) > 1
    for i, line in enumerate(lines):
        drawn = [name for name in SAMPLING if name in line.settings]
        if arguments.greedy and drawn:
            raise ValueError(f'--greedy is given, and prompt {i} has a "{drawn[0]}", for draws')
        if draws and line.settings.get("temperature") == 0:
            raise ValueError(f'prompt {i} has the "temperature" 0, and several texts are drawn')
    options.check_lines(arguments, lines, plan)


def _search(text: str) -> tuple[int, ...]:
    numbers = tuple(map(options.positive, text.split(",")))
    if len(numbers) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} must be three numbers W,N,L, such as 4,4,5")
    return numbers
