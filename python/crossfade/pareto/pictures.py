"""Pictures of fronts: two rewards a panel, a colour and a marker for each method."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..extras import require
from . import measures
from .weightings import said

if TYPE_CHECKING:
    from .fronts import Front

# Okabe and Ito's colours, which people with any vision tell apart, but for the yellow one.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*"
MOST = 4  # rewards, which make six panels


def pairs(front: Front) -> list[tuple[str, str | None]]:
    """The rewards of each panel, across and up; a single reward stands over its weight.

    Raises:
        ValueError: there is nothing to draw, or too much.
    """
    if not any(front.whole(method) for method in front.methods):
        raise ValueError("the front has no point with all rewards, so that there is none to draw")
    if len(front.rewards) > MOST:
        raise ValueError(f"the front has {len(front.rewards)} rewards; at most {MOST} are drawn")
    return [*itertools.combinations(front.rewards, 2)] or [(front.rewards[0], None)]


def coordinates(front: Front, place: int, across: str, up: str | None) -> tuple[float, float]:
    """Where a point stands in a panel."""
    point = front.points[place]
    if up is None:
        return point["weights"].get(across, 0.0), point["rewards"][across]
    return point["rewards"][across], point["rewards"][up]


def labels(across: str, up: str | None) -> tuple[str, str]:
    """What the axes of a panel are called."""
    return (f"weight of {across}", across) if up is None else (across, up)


def plot(front: Front, path: Path) -> None:
    """Draw a front; `Front.plot` says how."""
    panels = pairs(front)
    require("matplotlib", "plot").use("Agg")  # no display is needed
    from matplotlib import pyplot

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = (7.2, 5.4) if len(panels) == 1 else (4.6 * columns, 4.2 * rows)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes, (across, up) in zip(grid.flat, panels, strict=False):
        for number, method in enumerate(front.methods):
            _draw(axes, front, method, number, across, up)
        axes.set_xlabel(labels(across, up)[0])
        axes.set_ylabel(labels(across, up)[1])
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(0.12)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    handles, names = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(4, len(names)))
    what = "bars: 95 % intervals"
    if len(front.rewards) > 1:
        what += "; hollow: another point of the method is as good in all and better in one"
    figure.supxlabel(what, fontsize="small", color="0.35")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw(axes: Any, front: Front, method: str, number: int, across: str, up: str | None) -> None:
    places = front.whole(method)
    if not places:
        return
    from matplotlib import patheffects

    color, marker = COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]
    best = measures.non_dominated(front.means(places)).tolist()
    if up is None:
        best = [True] * len(places)
    x, y = zip(*(coordinates(front, i, across, up) for i in places), strict=True)
    halves = [front.points[i]["intervals"] for i in places]
    axes.errorbar(
        x,
        y,
        xerr=None if up is None else [own[across] or 0.0 for own in halves],
        yerr=[own[across if up is None else up] or 0.0 for own in halves],
        **{"fmt": "none", "ecolor": color, "alpha": 0.3, "linewidth": 1.2},
    )
    if len(front.rewards) <= 2:  # points of a triangle have no order
        axes.plot(x, y, color=color, alpha=0.5, linewidth=1.2)
    filled = [color if b else "white" for b in best]
    axes.scatter(x, y, s=42, c=filled, edgecolors=color, marker=marker, zorder=3)
    axes.scatter([], [], s=42, c=color, marker=marker, label=method)
    if number == 0 and len(places) > 1 and up is not None and len(front.rewards) == 2:
        for at in (0, -1):
            axes.annotate(
                said(front.points[places[at]]["weights"]),
                (x[at], y[at]),
                xytext=(0, 9),
                textcoords="offset points",
                ha="center",
                fontsize="small",
                color=color,
                zorder=4,
                path_effects=[patheffects.withStroke(linewidth=3, foreground="white")],
            )
