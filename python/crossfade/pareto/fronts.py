"""`Front`: what a sweep found."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reading
from ..checks import check_number, did_you_mean
from ..decoding.settings import check_int
from . import measures

FORM = 1  # of the file that `Front.save` writes


class Estimate(NamedTuple):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False, repr=False)
class Front:
    """The points of a sweep: each method at each weighting, with what was measured of its texts.

    Attributes:
        rewards: the names of the objectives.
        prompts: what all methods answered.
        points: a dict for each: its `method`, `weights`, mean `rewards` by name, and `intervals`,
            half of the 95 % interval of each mean over the prompts. With ``kl_to``: `kl`, the mean
            of a text's divergence from it in nats, and `perplexity`, that of all texts under it,
            with `kl_interval` and `perplexity_interval`. None is what was not asked for, and what
            could not be measured or is infinite.
        texts: for each point and prompt its texts.
        scores: for each point and reward the score of each of these texts, by prompt.
        settings: the seed and the arguments of `generate`, for the record.
        interrupted: whether Ctrl-C came before the sweep was over.
    """

    rewards: tuple[str, ...]
    prompts: list[Any]
    points: list[dict[str, Any]]
    texts: list[list[list[str]]]
    scores: list[dict[str, list[list[float | None]]]]
    settings: dict[str, Any] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def methods(self) -> list[str]:
        """The names of the methods, in the order of their points."""
        return list(dict.fromkeys(point["method"] for point in self.points))

    def __repr__(self) -> str:
        """For people: each method's points, and how well weights steer it."""
        steered = self.steerability
        lines = []
        for method in self.methods:
            of = [p for p in self.points if p["method"] == method]
            whole = self.whole(method)
            best = int(measures.non_dominated(self.means(whole)).sum()) if whole else 0
            line = f"{method}: {len(of)} points, {best} of them on its front"
            if len(whole) < len(of):
                line += f", {len(of) - len(whole)} without all rewards"
            if method in steered and len(whole) > 1:
                line += f", steerability {steered[method]:.2f}"
            lines.append(line)
        prompts = f"{len(self.prompts)} prompt{'' if len(self.prompts) == 1 else 's'}"
        return "\n  ".join([f"Front({', '.join(self.rewards)}; {prompts})", *lines])

    def whole(self, method: str) -> list[int]:
        """The places of a method's points that have all rewards."""
        return [
            i
            for i, point in enumerate(self.points)
            if point["method"] == method
            and all(point["rewards"][name] is not None for name in self.rewards)
        ]

    def means(self, places: Sequence[int]) -> list[list[float]]:
        """``[points, rewards]``: the mean rewards of some points."""
        return [[self.points[i]["rewards"][name] for name in self.rewards] for i in places]

    def hypervolume(
        self, reference: Any, *, draws: int = 1000, seed: int = 0
    ) -> dict[str, Estimate]:
        """The hypervolume of each method's points above a reference, with its 95 % interval.

        The interval is of a bootstrap over prompts: each draw takes as many prompts as there are,
        with replacement and the same for all methods, and measures the volume of the means over
        these. Points that lack a reward are left out. With a single prompt it is NaN.

        Args:
            reference: a number for each reward, by its name or in the order of `rewards`.
            draws: how many bootstrap draws there are.
            seed: of these draws.

        Raises:
            TypeError, ValueError: names the argument, what it was and what it must be.
        """
        at = check_reference(reference, self.rewards)
        for name, x in (("draws", draws), ("seed", seed)):
            if x is None:
                raise TypeError(f"{name} is None; it must be an int")
        check_int("draws", draws, 1)
        check_int("seed", seed, 0, 2**63 - 1)
        n = len(self.prompts)
        generator = torch.Generator(device="cpu").manual_seed(seed)
        taken = torch.randint(n, (draws, n), generator=generator, device="cpu")
        parts = torch.zeros(draws, n, dtype=torch.float64, device="cpu")
        parts.scatter_add_(1, taken, torch.full_like(parts, 1 / n))
        found = {}
        for method in self.methods:
            places = self.whole(method)
            value = measures.hypervolume(self.means(places), at.tolist())
            low = high = math.nan
            if n > 1 and places:
                each = torch.stack([self._by_prompt(i) for i in places])  # [points, rewards, n]
                means = (each @ parts.T).permute(2, 0, 1)
                volumes = measures.volumes(means - at)
                low, high = volumes.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
            elif n > 1:
                low = high = 0.0
            found[method] = Estimate(value, low, high)
        return found

    def _by_prompt(self, place: int) -> Tensor:
        """``[rewards, prompts]`` float64: the mean score of each prompt's texts."""
        scores: dict[str, Any] = self.scores[place]
        each = [[math.fsum(own) / len(own) for own in scores[name]] for name in self.rewards]
        return torch.tensor(each, dtype=torch.float64, device="cpu")

    @property
    def correlations(self) -> dict[str, dict[str, float]]:
        """For each method and reward Spearman's correlation of its weight and its mean."""
        found = {}
        for method in self.methods:
            points = [self.points[i] for i in self.whole(method)]
            found[method] = {
                name: measures.spearman(
                    [p["weights"].get(name, 0.0) for p in points],
                    [p["rewards"][name] for p in points],
                )
                for name in self.rewards
            }
        return found

    @property
    def steerability(self) -> dict[str, float]:
        """For each method the mean of its `correlations`: 1 where each reward rises with its own
        weight, 0 where weights change nothing."""
        each = self.correlations
        return {method: math.fsum(x.values()) / len(x) for method, x in each.items()}

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON."""
        return {"front": FORM, **asdict(self)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Save all of it as a JSON file, which `load` reads."""
        text = json.dumps(self.to_dict(), ensure_ascii=False, indent=1, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Front:
        """The front that `save` wrote.

        Raises:
            ValueError: the file is none that `save` wrote. OSError: it is not there.
        """
        found = reading.parse_json(reading.read_text(os.fspath(path)), str(path))
        try:
            if found.pop("front") != FORM:
                raise ValueError
            front = cls(**{**found, "rewards": tuple(found["rewards"])})
            for point, scores, texts in zip(front.points, front.scores, front.texts, strict=True):
                for x in (point["rewards"], point["intervals"], scores):
                    if x.keys() != set(front.rewards):
                        raise ValueError
                if len(texts) != len(front.prompts) or not {"method", "weights"} <= point.keys():
                    raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ValueError(
                f"{str(path)!r} is not a front that crossfade has saved; Front.save writes one"
            ) from None
        return front

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the fronts, two rewards a panel, as a file of the kind that its name says.

        Bars are 95 % intervals. What another point of its method dominates is hollow. Needs the
        extra "plot".

        Raises:
            ValueError: no point has all rewards, or there are over 4 of these.
        """
        from . import pictures

        pictures.plot(self, Path(path))

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one HTML file of the fronts, which shows the texts of the point under the mouse, or
        of the one that is tapped. It needs nothing else, and no network.

        Raises:
            ValueError: as `plot`.
        """
        from . import page

        Path(path).write_text(page.html(self), encoding="utf-8")


def check_reference(reference: Any, names: Sequence[str]) -> Tensor:
    """``[rewards]``: a reference that is given by the names of the rewards, or in their order.

    Raises:
        TypeError, ValueError: says what it was and what it must be.
    """
    if isinstance(reference, Mapping):
        for name in reference:
            if name not in names:
                raise ValueError(
                    f"reference has {name!r:.80}; the rewards are {', '.join(names)}"
                    f"{did_you_mean(name, names)}"
                )
        missing = [name for name in names if name not in reference]
        if missing:
            raise ValueError(f"reference has no {missing[0]!r}; it must have one a reward")
        reference = [check_number(f"reference[{n!r}]", reference[n]) for n in names]
    return measures.matrix("reference", [reference], len(names))[0]
