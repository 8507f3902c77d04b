"""What commands that search share: the options of a search, their checks, and how it is made."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from . import judges, options

if TYPE_CHECKING:
    from ..loading import Loaded
    from ..policies.self_judge.question import Question

SEARCHES = ("--best-of", "--search", "--particles", "--tournament")
# Options that belong to some searches alone.
OWN = {
    "--particle-temperature": ("--particles",),
    "--selection-temperature": ("--best-of", "--search"),
    "--chunk-entropy": ("--search", "--particles"),
    "--tilt": ("--best-of", "--search", "--particles"),
    "--budget": SEARCHES,
}


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """The options that say how rows are searched, and by what."""
    group = parser.add_argument_group("search")
    group.add_argument(
        "--value",
        metavar="FORMULA",
        help="what a search prefers: texts that one model finds likelier than another does, such "
        'as "tuned - ref", or texts that value heads, reward models or functions of --reward '
        "score highly, by their names. A reward model is a --model that is a sequence classifier; "
        "if it has several classes, PATH@CLASS says whose log-prob counts",
    )
    group.add_argument(
        "--reward",
        action="append",
        default=[],
        metavar="[NAME=]MODULE:FUNCTION",
        help="a Python function (prompts, responses) -> scores, which --value may name; alone it "
        "is the value. MODULE is looked for in the working directory too; prompts are as they are "
        "sent, so that those of chats are lists of messages",
    )
    group.add_argument(
        "--judge",
        metavar="FORMULA",
        help="the model that compares texts in --tournament: the name of a --model, which may be "
        "the one that writes, or a blend of several",
    )
    judges.add_judge_options(group)
    how = group.add_mutually_exclusive_group()
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
        "--particles",
        type=_particles,
        metavar="N,L",
        help="write N texts, and after every L tokens draw those that go on by their values, some "
        'several times (particle filtering): the texts and their "weight" are a sample of what the '
        "blend writes, times exp(value / temperature)",
    )
    how.add_argument(
        "--tournament",
        type=options.positive,
        metavar="N",
        help="write N texts and let them play a knock-out tournament, whose matches --judge "
        "decides, or --value or --reward",
    )
    group.add_argument(
        "--particle-temperature",
        type=options.number,
        metavar="T",
        help="what --particles divides values by (1)",
    )
    group.add_argument(
        "--selection-temperature",
        type=options.number,
        metavar="T",
        help="draw the texts that stay by exp(value / T), in place of keeping the best (0)",
    )
    group.add_argument(
        "--chunk-entropy",
        type=options.number,
        metavar="NATS",
        help="end a chunk of --search or --particles before L tokens where the entropy of the next "
        "token is higher",
    )
    group.add_argument(
        "--tilt",
        metavar="FORMULA",
        help='"target - sampler": the blend is the sampler alone, and texts are chosen by their '
        "log-prob under the target in place of it, besides their value",
    )
    group.add_argument(
        "--budget",
        type=options.positive,
        metavar="TOKENS",
        help="the most tokens that all texts of a prompt have together: where --max-new-tokens of "
        "each are more, fewer are written",
    )


def check(arguments: argparse.Namespace) -> str | None:
    """Refuse options of a search, and of several texts, that do not go together.

    Returns:
        The option of the search; None if there is none.
    """
    searched = search_of(arguments)
    _check_deciding(arguments, searched)
    greedy = "--greedy" if arguments.greedy else None
    if arguments.temperature == 0:
        greedy = "--temperature 0"
    if searched and greedy:
        raise ValueError(f"{greedy} is given with a search, which draws its texts at random")
    if greedy and (arguments.n or 1) > 1:
        raise ValueError(f"{greedy} and --n {arguments.n} are both given; all texts would be equal")
    for option, its in OWN.items():
        if _is_given(arguments, option) and searched not in its:
            raise ValueError(
                f"{option} is given with {searched or 'no search'}; it belongs to "
                + " or ".join(its)
            )
    if arguments.particle_temperature == 0:
        raise ValueError("--particle-temperature is 0; it must be above 0")
    _check_budget(arguments)
    several = arguments.search or arguments.particles or [None]
    width = arguments.best_of or arguments.tournament or several[0]
    if width and (arguments.n or 1) > width:
        raise ValueError(f"--n is {arguments.n}; it must be at most {width}, as {searched} keeps")
    return searched


def _check_budget(arguments: argparse.Namespace) -> None:
    """Refuse a budget smaller than its fewest rows, unless prompts may have limits of their own."""
    each, rows = arguments.max_new_tokens, 2 if arguments.particles else 1
    own = getattr(arguments, "prompts", None) is not None
    if arguments.budget is not None and not own and arguments.budget < rows * each:
        what = "a text" if rows == 1 else f"{rows} texts"
        raise ValueError(
            f"--budget is {arguments.budget}; it must be at least {rows * each}, the tokens of "
            f"{what} of --max-new-tokens {each}"
        )


def _check_deciding(arguments: argparse.Namespace, searched: str | None) -> None:
    """Refuse a search without one thing that decides in it, and that thing without a search."""
    given = [o for o in ("--judge", "--value", "--reward", "--tilt") if _is_given(arguments, o)]
    if getattr(arguments, "accept", None) and (searched is None or "--judge" in given):
        given = [o for o in given if o != "--reward"]  # which --accept names
    decides = given[0] if given else None
    if decides == "--judge" and len(given) > 1 and given[1] != "--tilt":
        raise ValueError(
            f"--judge and {given[1]} are both given; one of them decides the matches of a "
            "tournament"
        )
    if decides == "--judge" and searched != "--tournament":
        other = f"with {searched}, which scores texts" if searched else "alone"
        raise ValueError(
            f"--judge is given {other}; it compares texts, and --tournament N must go with it"
        )
    asked = [o for o in ("--template", "--principle") if _is_given(arguments, o)]
    if asked and decides != "--judge":
        raise ValueError(f"{asked[0]} is given without --judge, whose prompt it belongs to")
    if searched and decides is None:
        others = "--judge, --value or --reward"
        if searched != "--tournament":
            others = "--value, --reward or --tilt"
        raise ValueError(f"{searched} is given without {others}, one of which must go with it")
    if decides and searched is None:
        raise ValueError(
            f"{decides} is given without --best-of, --search, --particles or --tournament, one of "
            "which must go with it"
        )


def search_of(arguments: argparse.Namespace) -> str | None:
    """The option of a search, if one is given."""
    return next((o for o in SEARCHES if _is_given(arguments, o)), None)


def _is_given(arguments: argparse.Namespace, option: str) -> bool:
    return getattr(arguments, option[2:].replace("-", "_")) not in (None, [])


def _search(text: str) -> tuple[int, ...]:
    numbers = tuple(map(options.positive, text.split(",")))
    if len(numbers) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} must be three numbers W,N,L, such as 4,4,5")
    return numbers


def _particles(text: str) -> tuple[int, ...]:
    numbers = tuple(map(options.positive, text.split(",")))
    if len(numbers) != 2 or numbers[0] < 2:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be two numbers N,L, such as 8,5, the first of at least 2"
        )
    return numbers


def make(arguments: argparse.Namespace, loaded: Loaded, question: Question | None) -> Any | None:
    """The search of the options, if there is one, by a value or by the judge of a tournament.

    Args:
        question: what the judge is asked; None if there is none.
    """
    from ..bulk.searching import search_of as search_with

    judge = None
    if question is not None and loaded.judge is not None:
        judge = question.judge(loaded.judge, f"--judge {arguments.judge}")
    return search_with(loaded, judge, **settings_of(arguments))


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings of a search that are given, by the names of their options."""
    names = [*SEARCHES, *OWN]
    given = [o[2:].replace("-", "_") for o in names if o != "--tilt" and _is_given(arguments, o)]
    return {name: getattr(arguments, name) for name in given}
