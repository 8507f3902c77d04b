"""``crossfade bench``: the kernels on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import check_folder

HELP = "Measure the kernels on this machine."


def add_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("suite", choices=["ops"], help="ops: blend and sample")
    p.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    p.add_argument("--json", metavar="FILE", type=Path, help="also write the figures here")


def run(a: argparse.Namespace) -> int:
    from .. import bench

    check_folder("--json", a.json)
    report = bench.run_ops(quick=a.quick, output=a.json)
    print("\n".join(bench.table(report)))
    return 0
