"""Draws architecture.svg: the walk of `inputs` down to the models, and of a logit row up again.

python docs/architecture.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

WIDTH, HEIGHT, STEP = 5.3, 0.82, 1.2
BLUE, ORANGE, GREEN, GREY = "#dbe7f5", "#fbe5cf", "#dcefdc", "#eeeeee"

# Each box: the files (within python/crossfade/), what happens there, and the colour of its folder.
DOWN = [
    ("decoding/generation.py  hook.py  scoring.py", "three ways in (and bulk/decode.py)", BLUE),
    ("decoding/call.py", "the models: terms, values, references", BLUE),
    ("decoding/inputs.py  forms.py", "requests, whatever form they came in", BLUE),
    ("decoding/inputs.py", "what each model reads, as its own ids", BLUE),
    ("decoding/job.py  settings.py  each.py", "rows, and a table of what each has", BLUE),
    ("decoding/driver.py", "engine or simple path, rows at a time", BLUE),
    ("decoding/loop.py  rows.py", "rows take slots as these are free", BLUE),
    ("decoding/engine/runner.py  group.py", "prompts are read in pieces, into caches", ORANGE),
]
UP = [
    ("decoding/results.py  writing.py", "rows of each request, padded and decoded", BLUE),
    ("decoding/driver.py", "rows that have left, in any order", BLUE),
    ("decoding/watch.py  loop.py", "stop strings, streamers; ended rows leave", BLUE),
    ("decoding/rows.py", "token and log-probs are written into the slot", BLUE),
    ("ops/blending.py", "native (csrc/), Triton (kernels/) or reference.py", GREEN),
    ("decoding/mixer.py", "the blend, with the weights of each slot", BLUE),
    (
        "decoding/engine/group.py  head.py",
        "a forward of each model, on our ops",
        ORANGE,
    ),
    ("decoding/engine/plan.py", "which models read at this step", ORANGE),
]
# What goes from each box of DOWN to the next one, and from each box of UP to the one above it.
GOES_DOWN = [
    "blend, inputs, settings",
    "inputs: texts, chats, ids, tensors",
    "Requests",
    "Prompts [requests, length] a model",
    "Job: requests x copies rows",
    "rows of any number of jobs",
    "slots, the ids that each model reads",
]
GOES_UP = [
    "Written",
    "Written: what a row wrote",
    "tokens [slots], live [slots]",
    "BlendSample: the tokens",
    "logits, and each slot's settings",
    "logits [slots, V] a model",
    "ids [rows, 1]",
]


def box(ax: Axes, x: float, y: float, files: str, text: str, colour: str, dashed: bool) -> None:
    style = {"linestyle": "--" if dashed else "-", "linewidth": 1.0, "edgecolor": "#555555"}
    shape = FancyBboxPatch(
        (x, y), WIDTH, HEIGHT, "round,pad=0,rounding_size=0.1", fc=colour, **style
    )
    ax.add_patch(shape)
    middle = x + WIDTH / 2
    ax.text(middle, y + 0.54, files, ha="center", va="center", fontsize=9, family="monospace")
    ax.text(middle, y + 0.22, text, ha="center", va="center", fontsize=9)


def arrow(
    ax: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    bend: float = 0.0,
    **style: object,
) -> None:
    how = {"arrowstyle": "-|>", "mutation_scale": 12, "color": "#333333", **style}
    ax.add_patch(FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", **how))


def draw(file: Path) -> None:
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "crossfade"})
    figure, ax = pyplot.subplots(figsize=(15, 9.2))
    left, right, beside = 0.0, 6.9, 13.4
    top = STEP * (len(DOWN) - 1)
    for i, (files, text, colour) in enumerate(DOWN):
        box(ax, left, top - i * STEP, files, text, colour, dashed=False)
    for i, (files, text, colour) in enumerate(UP):
        box(ax, right, top - i * STEP, files, text, colour, dashed=False)
    for x, title in (
        (left, "inputs, down to the models"),
        (right, "a logit row, up to the output"),
    ):
        ax.text(x + WIDTH / 2, top + HEIGHT + 0.2, title, ha="center", fontsize=11, weight="bold")
    middle, gap = WIDTH / 2, STEP - HEIGHT
    for i, text in enumerate(GOES_DOWN):
        y = top - i * STEP
        arrow(ax, (left + middle, y), (left + middle, y - gap))
        ax.text(left + middle + 0.12, y - gap / 2, text, va="center", fontsize=8.5, style="italic")
    for i, text in enumerate(GOES_UP):
        y = top - i * STEP
        arrow(ax, (right + middle, y - gap), (right + middle, y))
        ax.text(
            right + middle + 0.12,
            y - gap / 2,
            text,
            va="center",
            fontsize=8.5,
            style="italic",
        )
    # From the prompts to the first step, from one step to the next, and out.
    arrow(ax, (left + WIDTH, HEIGHT / 2), (right, HEIGHT / 2))
    between = (left + WIDTH + right) / 2
    ax.text(
        between,
        HEIGHT / 2 + 0.1,
        "each prompt's\nlast token",
        ha="center",
        fontsize=8.5,
        style="italic",
    )
    written, plan = top - 3 * STEP, 0.0
    arrow(ax, (right + WIDTH, written + 0.3), (right + WIDTH, plan + 0.5), bend=-0.2)
    ax.text(
        right + WIDTH + 0.62,
        1.9,
        "the next step",
        va="center",
        fontsize=8.5,
        style="italic",
        rotation=90,
    )
    arrow(ax, (right, top + HEIGHT / 2), (left + WIDTH, top + HEIGHT / 2))
    ax.text(between, top + HEIGHT / 2 + 0.1, "Output", ha="center", fontsize=8.5, style="italic")
    # What stands beside the walk.
    box(
        ax,
        beside,
        written + STEP,
        "decoding/search/",
        "a value scores chunks; rows fork",
        GREY,
        dashed=True,
    )
    arrow(ax, (beside, written + STEP + 0.4), (right + WIDTH, written + STEP + 0.4), linestyle="--")
    box(
        ax,
        beside,
        0.4 * STEP,
        "decoding/simple/runner.py",
        "models that the engine does not run",
        GREY,
        dashed=True,
    )
    arrow(ax, (beside, 0.4 * STEP + 0.4), (right + WIDTH, STEP + 0.2), linestyle="--")
    ax.set_xlim(-0.15, beside + WIDTH + 0.15)
    ax.set_ylim(-0.2, top + HEIGHT + 0.5)
    ax.set_axis_off()
    figure.savefig(
        file,
        bbox_inches="tight",
        dpi=110,
        metadata={"Date": None} if file.suffix == ".svg" else None,
    )


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg"))
