"""``crossfade bench``: how fast the kernels are on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from .parsed import check_file

HELP = "Measure how fast the kernels are on this machine."


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suite", choices=["ops"], help="ops: blending and sampling")
    parser.add_argument(
        "--quick", action="store_true", help="measure fewer cases, for a shorter time"
    )
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="also write the figures to this file"
    )


def run(arguments: argparse.Namespace) -> int:
    from .. import bench

    check_file("--json", arguments.json)
    report = bench.run_ops(quick=arguments.quick, output=arguments.json)
    print("\n".join(bench.table(report)))
    return 0
