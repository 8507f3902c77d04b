"""Adds how a stage of gpu_check.sh ended to bench/results/<gpu>.json."""

import argparse
import json
import re
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("result", type=Path)
parser.add_argument("stage")
parser.add_argument("--log", type=Path, required=True)
parser.add_argument("--exit-code", type=int, required=True)
parser.add_argument("--seconds", type=int, required=True)
args = parser.parse_args()

report = json.loads(args.result.read_text()) if args.result.exists() else {}
lines = args.log.read_text(errors="replace").splitlines()
summaries = [x.strip("= ") for x in lines if re.search(r"\d+ (passed|failed)|ERROR SUMMARY", x)]
entry = {"exit_code": args.exit_code, "seconds": args.seconds, "summary": summaries[-4:]}
if args.exit_code:
    entry["last_lines"] = lines[-40:]
figures = args.log.with_suffix(".json")
if figures.exists():  # the bench stage's own figures
    entry["figures"] = json.loads(figures.read_text())
report[args.stage] = entry
args.result.parent.mkdir(parents=True, exist_ok=True)
args.result.write_text(json.dumps(report, indent=1) + "\n")
print(f"{args.stage}: exit code {args.exit_code} after {args.seconds} s, see {args.result}")
