"""``crossfade inspect``: the formula of a blend, and the models that it runs."""

from __future__ import annotations

import argparse
import json

from . import options, parsed

HELP = "Show the formula of a blend, and the models that it runs for every token."
USAGE = "--model [NAME=]PATH ... [options]"
EXAMPLES = """\
example:
  crossfade inspect --model base=smollm2 --model kind=smollm2@sentiment \\
      --blend "base + w * (kind - base)" --fader w=0.8
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    options.add_blend_options(parser)
    parser.add_argument("--json", action="store_true", help="print it and the whole blend as JSON")


def run(arguments: argparse.Namespace) -> int:
    plan = parsed.plan_of(arguments)
    plan.check()
    loaded = parsed.load(arguments, plan)
    blend = loaded.blend()
    chat = loaded.answers_chats(blend)
    if arguments.json:
        costs = [cost._asdict() for cost in blend.models]
        found = {"formula": str(blend), "models": costs, "chat": chat, "blend": blend.to_dict()}
        print(json.dumps(found))
    else:
        print(f"{blend}\n{blend.models}")
        print(f"texts are sent {'as chats' if chat else 'as they are'} by default")
    return 0
