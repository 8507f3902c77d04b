"""The CPU kernels under ThreadSanitizer, in teams of threads that are often smaller than asked for.

    python bench/races.py --rounds 3

Compiles csrc/cpu for the least instruction set with bench/races/openmp.cpp in place of libgomp, of
whose locks ThreadSanitizer knows nothing, and runs every kernel with 2, 3 and 4 threads. The exit
code is that of the program: not 0 where there is a race, or where bits differ from one thread's.
With `--sanitizer none` and `--under "valgrind -q --error-exitcode=9"` it looks for reads of memory
that nothing was put into.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
KERNELS = ("attention", "blend_sample", "linear", "logp", "search", "tape")
SANITIZERS = {"thread": ["-fsanitize=thread"], "address": ["-fsanitize=address"], "none": []}
FLAGS = ["-std=gnu++17", "-O1", "-g", "-Wno-psabi", "-Wno-maybe-uninitialized"]


def build(folder: Path, sanitizer: str, kernels: Path) -> Path:
    """Compile the program with the kernels of a folder that is laid out like csrc/cpu."""
    flags = [*FLAGS, *SANITIZERS[sanitizer]]
    sources = [kernels / f"{name}.cpp" for name in KERNELS]
    sources += [ROOT / "bench" / "races" / name for name in ("main.cpp", "openmp.cpp")]
    objects = [folder / f"{source.stem}.o" for source in sources]
    jobs = [
        subprocess.Popen(["g++", *flags, "-fopenmp", "-c", source, "-o", to])
        for source, to in zip(sources, objects, strict=True)
    ]
    codes = [job.wait() for job in jobs]
    if any(codes):
        raise SystemExit("the kernels do not compile")
    program = folder / "races"
    subprocess.run(["g++", *flags, *objects, "-o", program, "-pthread"], check=True)
    return program


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sanitizer", choices=list(SANITIZERS), default="thread")
    parser.add_argument("--under", default="", help="a program that runs it, as valgrind")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder), args.sanitizer, ROOT / "csrc" / "cpu")
        command = [*shlex.split(args.under), program, str(args.rounds)]
        return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main())
