"""``crossfade demo``: moves a fader between two guides that compete, and plots what it does."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from ..extras import require
from .options import TEMPERATURE, add_device_option, add_text_options, check_file, device_of, quiet

HELP = "Fade a small model from praise to brevity, and plot what that does to its texts."


def add_options(parser: argparse.ArgumentParser) -> None:
    positions = (0.0, 0.25, 0.5, 0.75, 1.0)
    parser.add_argument(
        "--weights",
        type=float,
        nargs="+",
        default=positions,
        metavar="W",
        help="positions of the fader: 0 is praise, 1 is brevity (default: 0 0.25 0.5 0.75 1)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=8,
        help="how many texts to write about each of 8 movies (default: %(default)s)",
    )
    add_text_options(parser, max_new_tokens=40)
    parser.add_argument(
        "--temperature", type=float, default=0.7, help=f"{TEMPERATURE} (default: %(default)s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("crossfade-demo.png"),
        help="the .png file of the plot (default: %(default)s)",
    )
    add_device_option(parser)
    parser.add_argument(
        "--json", action="store_true", help="print the figures and all texts as JSON"
    )


def run(arguments: argparse.Namespace) -> int:
    """Decode, print and plot. After Ctrl-C, do so with the positions that are finished."""
    from dataclasses import asdict

    from .. import models
    from . import fader
    from .fader_report import plot, side_by_side, table

    settings = fader.Settings(
        tuple(arguments.weights),
        arguments.samples,
        arguments.max_new_tokens,
        arguments.temperature,
        arguments.seed,
    )
    if arguments.output.suffix != ".png":
        raise ValueError(f"--output is {str(arguments.output)!r}; it must end in .png")
    check_file("--output", arguments.output)
    quiet()
    require("vaderSentiment", "demo")  # what is missing is said before the work
    require("matplotlib", "demo")
    require("peft", "demo")
    model, tokenizer = models.smollm2(device_of(arguments.device))
    found: list[fader.Position] = []
    interrupted = False
    try:
        for position in fader.positions(model, tokenizer, settings):
            found.append(position)  # noqa: PERF402 (after Ctrl-C `found` must hold what is finished)
    except KeyboardInterrupt:
        interrupted = True
        print(
            f"interrupted after {len(found)} of {len(settings.weights)} positions", file=sys.stderr
        )
    if found:
        plot(found, arguments.output)
        if arguments.json:
            figures = [asdict(p) for p in found]
            print(json.dumps({"settings": asdict(settings), "positions": figures}, indent=2))
        else:
            width = max(80, min(200, shutil.get_terminal_size((110, 50)).columns))
            print(f"{side_by_side(found, width=width)}\n{fader.FORMULA}\n\n{table(found)}")
            print(f"\n± is a 95 % interval over {len(found[0].texts)} texts of a position.")
        print(
            f"plot: {arguments.output.resolve()}", file=sys.stderr if arguments.json else sys.stdout
        )
    return 130 if interrupted else 0
