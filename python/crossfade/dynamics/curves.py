"""How fast two models learn flipped labels: accuracies, areas under them, and their ratio."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reading
from ..extras import require

SIDES = ("base", "aligned")
MEASURES = ("rewards", "answers")
DRAWS = 2000  # of the bootstrap
COLORS = {"base": "tab:blue", "aligned": "tab:red"}


class Curve(NamedTuple):
    """The accuracy of one model while it learns flipped labels.

    Attributes:
        mean: at each measured step, over all seeds.
        each: of each seed, at each measured step.
        area: under `mean`, divided by the number of steps: the mean accuracy of the whole run.
    """

    mean: list[float]
    each: list[list[float]]
    area: float


@dataclass(frozen=True, eq=False)
class Vulnerability:
    """How fast a base and an aligned model learn flipped labels: `vulnerability` makes it.

    With m the margin ``log p(chosen) - log p(rejected)`` of a held-out pair whose responses are
    exchanged, and m_0 that before the first step, a pair is right at a step

    - by its reward, if ``m - m_0`` is above 0. That is the accuracy of DPO's implicit rewards,
      whose reference is the model that the training began with. Both models begin at 1/2, as a
      tie counts half, wherever their own answers stand.
    - by its answer, if m is above 0: the model would choose the flipped answer. An aligned model
      begins near 0, and has a longer way to go than its base.

    Attributes:
        steps: at which accuracy was measured, the first is 0.
        seeds: of the runs of each model.
        behaviours: of each held-out pair.
        rows: of each held-out pair, the number of the row that it is of.
        margins: of "base" and of "aligned" ``[seeds, steps, pairs]`` float64.
        trained: how many pairs there were to train on.
        measure: "rewards" or "answers": what the accuracies are of.
    """

    steps: tuple[int, ...]
    seeds: tuple[int, ...]
    behaviours: tuple[str, ...]
    rows: tuple[int, ...]
    margins: Mapping[str, Tensor] = field(repr=False)
    trained: int
    measure: str = "rewards"

    @property
    def base(self) -> Curve:
        """The accuracy of the base."""
        return self._curve("base")

    @property
    def aligned(self) -> Curve:
        """The accuracy of the aligned model."""
        return self._curve("aligned")

    @property
    def ratio(self) -> float:
        """The area under the accuracy of the aligned model over that of the base.

        Above 1 the aligned model flips faster. Areas are under the whole accuracy, not under what
        is above 1/2 or above the start: they are no less than 1/2 at the first step, so that their
        ratio is stable where little was learnt. By `answers` it is infinite or NaN where the base
        gives no flipped answer at all.
        """
        base, aligned = (self.areas(side).mean() for side in SIDES)
        return float(aligned / base)

    @property
    def interval(self) -> tuple[float, float]:
        """A 95 % interval of `ratio`, by a bootstrap over held-out pairs and over seeds.

        A draw takes the same pairs and the same seeds for both models, so that what is easy or
        hard for both cancels. With one seed it says nothing of other seeds.
        """
        ratios = self.draws()
        ratios = ratios[~ratios.isnan()]
        if not len(ratios):
            return math.nan, math.nan
        low, high = ratios.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
        return low, high

    @property
    def answers(self) -> Vulnerability:
        """The same, with accuracies of the models' answers."""
        return replace(self, measure="answers")

    @property
    def by_behaviour(self) -> dict[str, Vulnerability]:
        """The same of the held-out pairs of each behaviour alone."""
        found = {}
        for behaviour in dict.fromkeys(self.behaviours):
            its = [i for i, b in enumerate(self.behaviours) if b == behaviour]
            found[behaviour] = replace(
                self,
                behaviours=(behaviour,) * len(its),
                rows=tuple(self.rows[i] for i in its),
                margins={side: m[:, :, its] for side, m in self.margins.items()},
            )
        return found

    def right(self, side: str) -> Tensor:
        """``[seeds, steps, pairs]``: 1 where a pair is right, 1/2 where it is a tie, else 0."""
        margins = self.margins[side]
        if self.measure == "rewards":
            margins = margins - margins[:, :1]
        return (margins.sign() + 1) / 2

    def areas(self, side: str) -> Tensor:
        """``[seeds, pairs]``: the area under whether a pair is right, divided by the steps."""
        steps = torch.tensor(self.steps, dtype=torch.float64)
        return torch.trapezoid(self.right(side), steps, dim=1) / steps[-1]

    def draws(self, count: int = DRAWS, seed: int = 0) -> Tensor:
        """``[count]``: the ratios of the draws of the bootstrap."""
        generator = torch.Generator().manual_seed(seed)
        seeds, pairs = (_drawn(count, n, generator) for n in self.areas("base").shape)
        base, aligned = (
            torch.einsum("ds,sp,dp->d", seeds, self.areas(side), pairs) for side in SIDES
        )
        return aligned / base

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw both accuracies over the steps, thin lines being the seeds, as a picture.

        Its kind is what the name says, such as ``.png`` or ``.svg``. Needs the extra "plot".
        """
        require("matplotlib", "plot").use("Agg")  # no display is needed
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained")
        self.draw(axes)
        figure.savefig(Path(path), dpi=130)
        pyplot.close(figure)

    def draw(self, axes: Any) -> None:
        """Draw both accuracies into the axes of a figure of matplotlib."""
        for side in SIDES:
            curve: Curve = getattr(self, side)
            if len(curve.each) > 1:
                for own in curve.each:
                    axes.plot(self.steps, own, color=COLORS[side], alpha=0.25, linewidth=0.9)
            axes.plot(
                self.steps, curve.mean, color=COLORS[side], marker="o", markersize=3.5, label=side
            )
        what = "rewards" if self.measure == "rewards" else "answers"
        axes.set_xlabel("steps on flipped labels")
        axes.set_ylabel(f"accuracy of {what} on held-out pairs")
        low, high = self.interval
        axes.set_title(f"areas {self.ratio:.2f} ({low:.2f} to {high:.2f})", fontsize="medium")
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)

    @property
    def data(self) -> dict[str, Any]:
        """All of it as JSON holds it, with the figures that are made of the margins."""
        return {
            "steps": list(self.steps),
            "seeds": list(self.seeds),
            "behaviours": list(self.behaviours),
            "rows": list(self.rows),
            "margins": {side: m.tolist() for side, m in self.margins.items()},
            "trained": self.trained,
            "measure": self.measure,
            "figures": self.figures(),
        }

    def figures(self) -> dict[str, Any]:
        """Both curves, the ratio of their areas and its interval; None where one is not finite."""
        return {
            **{side: getattr(self, side)._asdict() for side in SIDES},
            "ratio": _number(self.ratio),
            "interval": [_number(x) for x in self.interval],
        }

    @classmethod
    def joined(cls, results: Sequence[Vulnerability]) -> Vulnerability:
        """Results of other seeds, of the same held-out pairs and steps, as one.

        So each seed can have an aligned model of its own.

        Raises:
            ValueError: they are not of the same pairs and steps, or share a seed.
        """
        if not results:
            raise ValueError("results is empty; it must have at least one")
        first = results[0]
        seeds = tuple(seed for result in results for seed in result.seeds)
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"results have the seeds {list(seeds)}; they must all be different")
        for i, result in enumerate(results):
            for name in ("steps", "behaviours", "rows", "trained"):
                if getattr(result, name) != getattr(first, name):
                    raise ValueError(
                        f"results[{i}] has other {name} than results[0]; they must be the same"
                    )
        margins = {side: torch.cat([r.margins[side] for r in results]) for side in SIDES}
        return replace(first, seeds=seeds, margins=margins)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save all of it as a JSON file, which `load` reads."""
        text = json.dumps(self.data, ensure_ascii=False, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Vulnerability:
        """What `save` wrote.

        Raises:
            ValueError: the file is none that `save` wrote. OSError: it is not there.
        """
        found = reading.parse_json(reading.read_text(os.fspath(path)), str(path))
        try:
            margins = {
                side: torch.tensor(found["margins"][side], dtype=torch.float64) for side in SIDES
            }
            read = cls(
                steps=tuple(found["steps"]),
                seeds=tuple(found["seeds"]),
                behaviours=tuple(found["behaviours"]),
                rows=tuple(found["rows"]),
                margins=margins,
                trained=found["trained"],
                measure=found["measure"],
            )
            shape = (len(read.seeds), len(read.steps), len(read.rows))
            whole = all(m.shape == shape for m in margins.values())
            if not whole or len(read.behaviours) != shape[2] or read.measure not in MEASURES:
                raise ValueError
            return read
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"{str(path)!r} is not what crossfade has saved; Vulnerability.save writes it"
            ) from None

    def _curve(self, side: str) -> Curve:
        each = self.right(side).mean(dim=2)
        return Curve(each.mean(dim=0).tolist(), each.tolist(), float(self.areas(side).mean()))


def _drawn(count: int, n: int, generator: torch.Generator) -> Tensor:
    """``[count, n]`` float64: how often each of n is drawn, of n draws with replacement."""
    taken = torch.randint(n, (count, n), generator=generator)
    ones = torch.ones(count, n, dtype=torch.float64)
    return torch.zeros(count, n, dtype=torch.float64).scatter_add_(1, taken, ones)


def _number(x: float) -> float | None:
    return x if math.isfinite(x) else None
