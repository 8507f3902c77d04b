"""``crossfade inspect``: the formula of a blend, and the models that it runs."""

from __future__ import annotations

import argparse
import json

from .options import add_blend_options, load

HELP = "Show the formula of a blend, and the models that it runs for every token."


def add_options(parser: argparse.ArgumentParser) -> None:
    add_blend_options(parser)
    parser.add_argument("--json", action="store_true", help="print it and the whole blend as JSON")


def run(arguments: argparse.Namespace) -> int:
    blend, _ = load(arguments)
    if arguments.json:
        costs = [cost._asdict() for cost in blend.models]
        print(json.dumps({"formula": str(blend), "models": costs, "blend": blend.to_dict()}))
    else:
        print(f"{blend}\n{blend.models}")
    return 0
