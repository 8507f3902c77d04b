"""``crossfade demo``: moves a fader between two moods of a small model, and shows what it does."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..extras import require
from .options import TEMPERATURE, add_device_option, add_text_options
from .parsed import check_file, device_of, quiet

if TYPE_CHECKING:
    from .fader import Settings

OWN_SAMPLES = 16  # texts at each position to each prompt of the user's own
HELP = "Fade a small model from gloomy to cheerful, and show how its texts change."


def add_options(parser: argparse.ArgumentParser) -> None:
    positions = (-2.0, -1.0, 0.0, 1.0, 2.0)
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="a prompt of your own, in place of those of the demo; may be given several times",
    )
    parser.add_argument(
        "--weights",
        type=float,
        nargs="+",
        default=positions,
        metavar="W",
        help="positions of the fader: below 0 is gloomy, above 0 cheerful, and 0 the model itself, "
        "which is always shown (default: -2 -1 0 1 2)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        help="how many texts to write to each prompt at each position (default: 6, or "
        f"{OWN_SAMPLES} to each --prompt)",
    )
    add_text_options(parser, max_new_tokens=40)
    parser.add_argument(
        "--temperature", type=float, default=0.5, help=f"{TEMPERATURE} (default: %(default)s)"
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
    from .. import models
    from ..progress import print_line, progress_bar
    from . import fader, fader_report

    settings = _settings(arguments)
    if arguments.output.suffix != ".png":
        raise ValueError(f"--output is {str(arguments.output)!r}; it must end in .png")
    check_file("--output", arguments.output)
    quiet()
    require("vaderSentiment", "demo")  # what is missing is said before the work
    require("matplotlib", "demo")
    if not arguments.json:
        print(fader_report.plan(settings), flush=True)
    model, tokenizer = models.smollm2(device_of(arguments.device))
    found: list[fader.Position] = []
    interrupted = False
    steps = settings.max_new_tokens
    try:
        with progress_bar(
            len(settings.positions) * steps, "step", prints=not arguments.json
        ) as bar:
            for position in fader.positions(model, tokenizer, settings, bar.update):
                found.append(position)
                bar.update(len(found) * steps - bar.n)  # the steps that no text needed any more
                if len(found) == 1 and not arguments.json:
                    print_line(fader_report.first_answer(position, settings))
    except KeyboardInterrupt:
        interrupted = True
        print(
            f"interrupted after {len(found)} of {len(settings.positions)} positions",
            file=sys.stderr,
        )
    if found:
        found.sort(key=lambda position: position.weight)
        fader_report.plot(found, settings, arguments.output)
        if arguments.json:
            print(json.dumps(fader_report.report(found, settings), indent=2))
        else:
            width = max(80, min(200, shutil.get_terminal_size((110, 50)).columns))
            print(fader_report.results(found, settings, width))
        print(
            f"plot: {arguments.output.resolve()}", file=sys.stderr if arguments.json else sys.stdout
        )
    return 130 if interrupted else 0


def _settings(arguments: argparse.Namespace) -> Settings:
    from dataclasses import replace

    from .fader import Settings

    settings = Settings(
        weights=tuple(arguments.weights),
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    if arguments.prompt is not None:
        settings = replace(settings, prompts=tuple(arguments.prompt), samples=OWN_SAMPLES)
    if arguments.samples is not None:
        settings = replace(settings, samples=arguments.samples)
    return settings
