"""Instructions and bytes a token of the Triton kernels, counted in their machine code, with no GPU.

Of `blend_tiles` it counts what a program runs that takes a whole tile. Of branches that is the
shortest way that loads all inputs: the temperature is 1, and no term has a weight of 0. `choose`,
which has loops, runs once a row: the whole of its code is counted, once, over the tokens of a row.
That says how long the code is and not what it runs, which grows with groups and searches.

    python bench/triton_code.py [capability, 90 unless given]
"""

import re
import sys

import torch
import triton
from crossfade.ops import Draw, Inputs
from crossfade.ops.triton import blending
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

ROWS, VOCAB, TERMS = 64, 151_936, 3
CUTS = ({}, {"top_k": 50, "top_p": 0.9})
WIDTHS = {".128": 16, ".64": 8, ".U16": 2, ".U8": 1}  # bytes; 4 of any other load


class Driver:
    """What Triton asks of a driver to compile a kernel."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(sys.argv[1]) if len(sys.argv) > 1 else 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def instructions(sass: str) -> tuple[list[str], dict[int, int]]:
    """The instructions, and where the jumps among them go."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if line.startswith("LBB"):
            labels[line[:-1]] = len(code)
        elif "\t" in line:
            code.append(line.split("\t")[1])
    found = ((n, re.search(r"BRA (LBB\d+)", op)) for n, op in enumerate(code))
    return code, {n: labels[to[1]] for n, to in found if to}


def program(code: list[str], jumps: dict[int, int]) -> list[str]:
    """The shortest way from the first instruction to the end that has the most loads."""
    best = {n: (0, 1, -1) for n, op in enumerate(code) if op.startswith("EXIT")}
    before: dict[int, tuple[int, int, int]] = {}
    while best != before:  # of each instruction: minus the loads, the length, the next one
        before = dict(best)
        for n in range(len(code) - 1, -1, -1):
            to = {jumps.get(n, n + 1), *([n + 1] if code[n].startswith("@") else [])}
            ways = [(*best[m][:2], m) for m in to if m in best and m != n]
            if ways and not code[n].startswith("EXIT"):
                loads, length, m = min(ways)
                best[n] = loads - ("LDG" in code[n]), length + 1, m
    way, n = [], 0
    while n >= 0:
        way.append(code[n])
        n = best[n][2]
    return way


def report(name: str, code: list[str], tokens: float) -> None:
    read = sum(next((n for w, n in WIDTHS.items() if w in op), 4) for op in code if "LDG" in op)
    special = sum("MUFU" in op for op in code)
    print(
        f"{name:44} {len(code) / tokens:6.1f} instructions a token, "
        f"{special / tokens:4.1f} of them special, {read / tokens:4.1f} bytes read"
    )


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    run, called = JITFunction.run, ""

    def compile_only(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        kernel = run(self, *args, **{**kwargs, "warmup": True})
        code, jumps = instructions(kernel.asm["sass"])
        threads = 32 * kernel.metadata.num_warps
        if self.__name__ == "choose":
            report(f"{called} {self.__name__}", code, VOCAB / threads)
        else:
            report(f"{called} {self.__name__}", program(code, jumps), kwargs["BLOCK"] / threads)
        return kernel

    JITFunction.run = compile_only
    for dtype in (torch.float32, torch.bfloat16):
        inputs = Inputs([torch.empty(ROWS, VOCAB, dtype=dtype)] * TERMS, (1.0, 0.5, -0.5))
        for cut in CUTS:
            called = f"{str(dtype)[6:]} {cut or 'plain'}".replace("'", "")
            blending.blend_sample(inputs, Draw(inputs, **cut, seed=0, step=0), False, False)


if __name__ == "__main__":
    main()
