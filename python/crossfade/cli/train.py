"""``crossfade train``: trains an adapter, a model or a value function, as a file says."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

from .options import quiet

HELP = "Train an adapter, a model or a value function, with the settings of a file."


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "kind",
        choices=["sft", "dpo", "value"],
        help="sft learns from texts, dpo from pairs of which one is preferred, value from rewards",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        required=True,
        help="a YAML file with the keys model, data and arguments, which are those of the trainer, "
        "output_dir among them; it may also have dtype, eval_data, lora, loss, loss_options, value "
        "and seed",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="put VALUE in place of what the file says, such as arguments.learning_rate=1e-4",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in output_dir"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    from ..training import config
    from ..training.run import run as train

    settings = config.read(arguments.kind, arguments.config, arguments.set)
    quiet()
    with contextlib.redirect_stdout(sys.stderr):  # the trainer prints its figures as it goes
        metrics = train(settings, resume=arguments.resume)
    folder = settings.arguments["output_dir"]
    if metrics is None:  # of several processes, the first one says what was measured
        return 0
    if arguments.json:
        print(json.dumps({"output_dir": folder, **metrics}))
    else:
        figures = ", ".join(f"{name} {x:.4g}" for name, x in metrics.items())
        print(f"saved in {folder}: {figures}")
    return 0
