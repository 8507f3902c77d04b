"""``crossfade bench``: how fast the kernels are on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import check_file

HELP = "Measure how fast the kernels are on this machine."


def add_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("suite", choices=["ops"], help="ops: blending and sampling")
    p.add_argument("--quick", action="store_true", help="measure fewer cases, for a shorter time")
    p.add_argument("--json", metavar="FILE", type=Path, help="also write the figures to this file")


def run(a: argparse.Namespace) -> int:
    from .. import bench

    check_file("--json", a.json)
    report = bench.run_ops(quick=a.quick, output=a.json)
    print("\n".join(bench.table(report)))
    return 0
