"""``crossfade train``: trains an adapter, a model or a value function, as a file says."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..training import keys
from .parsed import quiet

HELP = "Train an adapter, a model or a value function, with the settings of a file."
WIDTH = 80  # of the texts at the end of --help, whose rows of data alone may be longer
LISTED = {
    "arguments": "every key of arguments, with its default",
    "lora": "every key of lora",
    "loss": "the losses, with their formulas",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(
        dest="kind",
        required=True,
        metavar="KIND",
        title="kinds",
        description="each KIND has a --help, with the keys of the settings and a row of data",
    )
    for name, kind in keys.KINDS.items():
        added = kinds.add_parser(
            name,
            help=kind.does,
            description=kind.does,
            epilog=_epilog(name, kind),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _add_options(added, name)


def _add_options(parser: argparse.ArgumentParser, kind: str) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        required=True,
        help="a YAML file with the settings, whose keys are below",
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
    listed = [what for what in LISTED if what != "loss" or "loss" in keys.KINDS[kind].own]
    parser.add_argument(
        "--list",
        action=_List,
        choices=listed,
        help=f"show {'; '.join(f'{what}: {LISTED[what]}' for what in listed)}; and exit",
    )
    parser.add_argument(
        "--traceback",
        action="store_true",
        default=argparse.SUPPRESS,  # else it would undo one that stands before the kind
        help="after an error, show where in the code it happened",
    )


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


def _epilog(name: str, kind: keys.Kind) -> str:
    """The keys of a kind's settings, a row of its data in each form, and a settings file."""
    parts = [
        "keys of the file (relative paths begin at the folder that the command runs in):",
        _table(keys.SETTINGS | kind.own),
        f"arguments, of crossfade.training.{kind.trainer}; --list arguments for all:",
        _table(kind.arguments),
        "lora, of PEFT's LoraConfig; --list lora for all:",
        _table(keys.LORA),
    ]
    if "value" in kind.own:
        parts += ["value:", _table(keys.VALUE)]
    if "loss" in kind.own:
        losses = {loss: (options, what) for loss, (what, options) in keys.LOSSES.items()}
        parts += ["loss, with the loss_options that it takes:", _table(losses)]
    parts += [
        "a row of data, in any one of these forms; other columns are not read:",
        "\n".join(f"  {row}" for row in kind.rows),
        "\n".join(textwrap.wrap(f"{kind.forms} {kind.columns}", WIDTH)),
        f"such as train.yaml, for crossfade train {name} --config train.yaml:",
        textwrap.indent(
            f"model: {kind.model}\ndata: rows.jsonl\n"
            "lora: {r: 8, target_modules: [q_proj, v_proj, o_proj]}\n" + kind.example,
            "  ",
        ),
    ]
    return "\n\n".join(parts).replace(":\n\n", ":\n")


def _table(rows: Mapping[str, tuple[str, str]]) -> str:
    """Lines of a name, a default in brackets and a meaning."""
    lines = []
    left = max(len(name) for name in rows) + 4
    for name, (default, meaning) in rows.items():
        text = f"{meaning} [{default}]" if default else meaning
        lines += textwrap.wrap(
            text,
            WIDTH,
            initial_indent=f"  {name}".ljust(left),
            subsequent_indent=" " * left,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


class _List(argparse.Action):
    """Prints everything that a key of the settings may hold, as the libraries document it."""

    def __call__(
        self, parser: argparse.ArgumentParser, _: Any, what: Any, option: str | None = None
    ) -> None:
        kind = parser.prog.rpartition(" ")[2]
        try:
            print(_table(_losses() if what == "loss" else _fields(kind, what)), flush=True)
        except ImportError as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n")
        except BrokenPipeError:  # whoever reads the output, such as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            parser.exit(1)
        parser.exit()


def _fields(kind: str, what: str) -> dict[str, tuple[str, str]]:
    import dataclasses

    from ..training import config

    found = {}
    for field in dataclasses.fields(
        config.lora_class() if what == "lora" else config.config_of(kind)
    ):
        if field.init:
            made = field.default_factory
            default = field.default if made is dataclasses.MISSING else made()
            said = " ".join(str(field.metadata.get("help", "")).split())
            none = default is dataclasses.MISSING or default is None
            found[field.name] = ("none" if none else json.dumps(default, default=str), said)
    return found


def _losses() -> dict[str, tuple[str, str]]:
    from ..training.trainers.dpo import PAIR_LOSSES

    found = {}
    for name, loss in PAIR_LOSSES.items():
        said = (loss.__doc__ or "").partition("Args:")[0].replace("``", "")
        found[name] = (keys.LOSSES[name][1], " ".join(said.split()))
    return found
