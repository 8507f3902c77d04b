"""``crossfade correct``: answers of a file, edited by an aligner toward objectives."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..checks import did_you_mean
from . import judges, options, parsed, searches
from .corrections import Query, Writer

if TYPE_CHECKING:
    from ..loading import Plan

HELP = "Let an aligner correct answers toward objectives, as a JSON line for each."
USAGE = "FILE --aligner PATH --objective NAME[=TEXT] [options]"
EXAMPLES = """\
A line of FILE has a "prompt" or the "messages" of a chat, and an "answer";
where it has none, --policy writes it. It may have "objectives" of its own, in
place of those of the options: a list of names, or {"name": "description"}. "id"
and "metadata" are copied to the result. Other keys are refused, unless --keep
names them.

A result has the corrected "text", the texts of each of the "rounds", whether it
came back "unchanged", and the "edit_distance" in words, from 0 to 1; with
--accept the "scores" of the answer and of the text, and with --n the texts of
the last round as "outputs". A line that cannot be corrected keeps its answer
and says why under "failed".

examples:
  crossfade correct answers.jsonl --aligner smollm2 --objective brevity
  crossfade correct answers.jsonl --aligner base@aligner --rounds 2 \\
      --objective harmlessness --objective formal="Sound like a letter" \\
      --output corrected.jsonl --resume
  crossfade correct answers.jsonl --aligner smollm2 --objective brevity \\
      --reward rewards:brevity --best-of 8 --accept brevity
  crossfade correct answers.jsonl --aligner base@aligner --draft answer \\
      --objective readability
"""
# Keys of results, which --keep must not name.
RESULT = {"index", "prompt", "messages", "answer", "objectives", "text", "rounds", "unchanged"}
RESULT |= {"edit_distance", "scores", "tokens", "finished", "failed", "run", "outputs", "value"}
RESULT |= {"slot", "bracket", "weight", "effective_sizes", "tokens_by_draft"}
OWN = ("answer", "objectives")  # what lines have beside the query
# What to say of keys that other programs have.
MEANT = {
    **dict.fromkeys(
        ("response", "completion", "output", "reply", "draft"), 'did you mean "answer"?'
    ),
    **dict.fromkeys(("aspects", "criteria", "principles"), 'did you mean "objectives"?'),
}
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
        help="a model that writes the answers that lines lack, by the options of writing; an "
        "instruct model gets texts as chats",
    )
    group.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME=PATH[@GUIDE]",
        help="a model that --value, --accept, --judge or --draft names, which may also name "
        "aligner and policy; may be given several times",
    )
    options.add_fader_option(group)
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
        metavar="FORMULA",
        help="a value, as --value is one: a correction stands only where it is higher than the "
        "answer's",
    )
    options.add_sampling_options(parser, max_new_tokens=128)
    searches.add_search_options(parser)
    group = parser.add_argument_group("queries and results")
    options.add_draft_options(group, answers=True)
    options.add_batch_options(group, "answers are corrected", chats=False)
    options.add_resume_option(group)
    group.add_argument(
        "--n",
        type=options.positive,
        metavar="N",
        help="let the last round write N corrections of each answer, which its line has as "
        '"outputs"; those of a search are its N best',
    )


def run(arguments: argparse.Namespace) -> int:
    from ..bulk import prompts, records
    from ..policies import metaaligner

    parsed.check_keep(arguments, RESULT)
    searches.check(arguments)
    question = judges.question_of(arguments) if arguments.judge is not None else None
    parsed.writing(arguments)
    parsed.check_output(arguments.output, arguments.resume)
    file = arguments.objectives_file
    own = {} if file is None else metaaligner.read_objectives(file)
    template = metaaligner.AlignerTemplate(arguments.query_noun)
    known = {**metaaligner.OBJECTIVES, **own}
    asked = _objectives(arguments.objective, known)
    items = prompts.read_lines(arguments.data)
    if not items:
        raise ValueError("there is nothing to correct: the input is empty")
    queries = [_query(item, i, arguments, asked, known) for i, item in enumerate(items)]
    if arguments.policy is not None and all(q.answer is not None for q in queries):
        raise ValueError('--policy is given, and all lines have an "answer"')
    plan = _plan(arguments)
    with records.Results(arguments.output, resume=arguments.resume) as results:
        loaded = parsed.load(arguments, plan)
        aligner = metaaligner.MetaAligner(
            loaded.terms["aligner"], noun=template.noun, objectives=own or None
        )
        search = searches.make(arguments, loaded, question)
        Writer(arguments, aligner, loaded, search, queries).write(results)
    return 0


def _plan(arguments: argparse.Namespace) -> Plan:
    """The models of the options, checked but not loaded."""
    from ..loading import Plan

    if arguments.accept is not None and ":" in arguments.accept:
        raise ValueError(
            f"--accept is {arguments.accept!r}; it must be a formula: a function is named by "
            f"--reward NAME={arguments.accept.rpartition('=')[2]} --accept NAME"
        )
    own = [name for name in ("aligner", "policy") if getattr(arguments, name) is not None]
    plan = Plan.read(
        [*(f"{name}={getattr(arguments, name)}" for name in own), *arguments.model],
        " + ".join(own),
        fader=arguments.fader,
        value=arguments.value,
        reward=arguments.reward,
        judge=arguments.judge,
        accept=arguments.accept,
        tilt=arguments.tilt,
        draft=parsed.draft_formula(arguments, ("answer", "prompt")),
    )
    searched = searches.search_of(arguments)
    if searched and plan.value is None and plan.judge is None and plan.tilt is None:
        raise ValueError("--value is missing; with several rewards it must be a formula of them")
    asked = ["--accept", "--judge", "--tilt", "--draft", *(["--value"] if searched else [])]
    used = set().union(*(plan.names.get(option, ()) for option in asked))
    for option, given in (
        ("--model", plan.specs),
        ("--reward", plan.rewards),
        ("--fader", plan.faders),
    ):
        for name in given:
            if name not in own and name not in used:
                raise ValueError(
                    f"{option} {name}=... is given, but no formula of --value, --accept, --judge "
                    "or --draft uses it"
                )
    plan.check()
    return plan


def _objectives(given: Sequence[str], known: Mapping[str, str]) -> dict[str, str]:
    """The objectives of the options, by name."""
    from ..policies.metaaligner import resolve

    found: dict[str, str] = {}
    for text in given:
        name, equals, description = text.partition("=")
        try:
            one = resolve({name: description} if equals else name, known, "--objective")
        except ValueError as error:
            raise ValueError(str(error).replace("{name: description}", "NAME=TEXT")) from None
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

    where = f"query {index}"
    if not isinstance(item, dict):
        raise ValueError(f"{where} is {item!r:.80}; it must be an object of a .jsonl file")
    for key in item:
        meant = did_you_mean(key, OWN, MEANT)
        if meant and key not in (*OWN, "prompt", "messages", "id", "metadata", *arguments.keep):
            raise ValueError(f"{where} has the unknown key {key!r}{meant}")
    answer = item.get("answer")
    if not isinstance(answer, str) and (answer is not None or arguments.policy is None):
        raise ValueError(
            f'{where} has the "answer" {answer!r:.80}; it must be a text, or --policy be given'
        )
    rest = {k: x for k, x in item.items() if k not in OWN}
    line = prompts.line_of(rest, index, keep=arguments.keep, known=(), noun="query")
    objectives = asked
    if "objectives" in item:
        objectives = resolve(item["objectives"], known, f"objectives of {where}")
    elif not asked:
        raise ValueError(f'{where} has no "objectives", and no --objective is given')
    return Query(line, answer, objectives)
