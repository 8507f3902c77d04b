"""The state machine of tests/decoding/test_loop.py, longer and from another seed.

    python bench/loop_fuzz.py --examples 300 --seed 1 --json bench/results/loop_fuzz.json

Rows join, leave and change in running loops at random; each must write what it writes alone. A run
that fails is shrunk, which takes minutes, and printed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

TESTS = Path(__file__).parent.parent / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "decoding")]

import test_loop  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=300, help="of each kind (default 300)")
    parser.add_argument("--steps", type=int, default=50, help="events of a run (default 50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    how = settings(
        database=None,
        deadline=None,
        max_examples=args.examples,
        stateful_step_count=args.steps,
        suppress_health_check=list(HealthCheck),
    )
    seen: dict[str, Any] = {}
    for kind in test_loop.KINDS:
        joined = [0]

        class Machine(test_loop.Machine):
            def teardown(self, joined: list[int] = joined) -> None:
                super().teardown()
                joined[0] += len(self.rows)

        Machine.kind = kind
        start = time.monotonic()
        run_state_machine_as_test(hypothesis.seed(args.seed)(Machine), settings=how)
        seconds = round(time.monotonic() - start, 1)
        seen[kind] = {"runs": args.examples, "rows": joined[0], "seconds": seconds}
        print(kind, seen[kind], flush=True)
    if args.json is not None:
        report = {"seed": args.seed, "events of a run": args.steps, "kinds": seen, "failures": 0}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
