"""``crossfade generate``: texts that a blend writes, as a JSON line for each prompt."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import judges, options, parsed, ray, searches
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
  crossfade generate --prompts prompts.jsonl --model smollm2 --draft prompt
  crossfade generate --ray 2 --prompts prompts --model smollm2 --output answers
"""
# Keys of results, which --keep must not name.
RESULT = {"index", "prompt", "settings", "text", "tokens", "logprob", "finished", "failed", "value"}
RESULT |= {"terms", "logprobs", "outputs", "blend", "run", "messages", "slot", "bracket"}
RESULT |= {"weight", "effective_sizes", "tokens_by_draft"}


def add_options(parser: argparse.ArgumentParser) -> None:
    options.add_blend_options(parser)
    options.add_sampling_options(parser, max_new_tokens=128)
    searches.add_search_options(parser)
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
    options.add_draft_options(group)
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
    ray.add_ray_options(parser)


def run(arguments: argparse.Namespace) -> int:
    from ..bulk import prompts, records

    _check(arguments)
    question = judges.question_of(arguments) if arguments.judge is not None else None
    common = parsed.writing(arguments, draws=(arguments.n or 1) > 1)
    if arguments.ray is not None:
        return ray.run(arguments, common)
    parsed.check_output(arguments.output, arguments.resume)
    lines = prompts.read_prompts(arguments.prompt, arguments.prompts, keep=arguments.keep)
    plan = parsed.plan_of(arguments)
    _check_lines(arguments, lines, plan)
    form = PlainTexts() if arguments.text else None
    with records.Results(arguments.output, resume=arguments.resume, form=form) as results:
        loaded = parsed.load(arguments, plan)
        writer = Writer(arguments, loaded, lines, common, question)
        if arguments.stream:
            writer.stream()
        else:
            writer.write(results)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse options that contradict each other."""
    parsed.check_chat(arguments)
    parsed.check_keep(arguments, RESULT)
    searched = searches.check(arguments)
    ray.check(arguments)
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
    if arguments.stream and (searched or arguments.n):
        raise ValueError(
            f"--stream and {searched or '--n'} are both given; only one text can be streamed"
        )


def _check_lines(arguments: argparse.Namespace, lines: Sequence[Line], plan: Plan) -> None:
    """Refuse lines that contradict the options, and formulas with the faders of each line."""
    from ..bulk.settings import SAMPLING

    if arguments.stream and len(lines) > 1:
        raise ValueError(
            f"--stream is given with {len(lines)} prompts; it is for one. Without it, each line is "
            "written as soon as its text has ended"
        )
    draws = searches.search_of(arguments) or (arguments.n or 1) > 1
    for i, line in enumerate(lines):
        drawn = [name for name in SAMPLING if name in line.settings]
        if arguments.greedy and drawn:
            raise ValueError(f'--greedy is given, and prompt {i} has a "{drawn[0]}", for draws')
        if draws and line.settings.get("temperature") == 0:
            raise ValueError(f'prompt {i} has the "temperature" 0, and several texts are drawn')
    parsed.check_lines(arguments, lines, plan)
