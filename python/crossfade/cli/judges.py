"""What commands with a judge share: the options of its prompt."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..policies.self_judge.question import Question


def add_judge_options(group: Any) -> None:
    """The options that say what a judge is asked."""
    group.add_argument(
        "--template",
        metavar="NAME|FILE",
        help="how a judge is asked: hh (the default) or ultrafeedback, or a .yaml or .json file "
        "with fields of crossfade.policies.self_judge.JudgeTemplate, such as question and labels",
    )
    group.add_argument(
        "--principle",
        action="append",
        default=[],
        metavar="NAME|NAME=PHRASE",
        help="an aspect that is judged by itself, such as helpful, which the template knows, or "
        'polite="polite and kind"; may be given several times: the majority decides. By default '
        "one question asks about all",
    )


def question_of(arguments: argparse.Namespace) -> Question:
    """What the options say that a judge is asked.

    Raises:
        ValueError, OSError: they name no template, or a principle that it does not know.
    """
    from ..policies.self_judge.question import Question

    return Question(arguments.template, arguments.principle)
