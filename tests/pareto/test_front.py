"""Fronts: their hypervolumes with intervals, files, pictures and pages."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
from crossfade.pareto import Front, hypervolume


def made(rewards: int = 2, methods: tuple[str, ...] = ("clp", "soup"), prompts: int = 6) -> Front:
    """A front of random scores, whose means follow the weights."""
    draw = random.Random(0)
    names = tuple(f"r{k}" for k in range(rewards))
    points, texts, scores = [], [], []
    for m, method in enumerate(methods):
        for i in range(4):
            weights = {name: (1 + i * (k + 1)) / 9 for k, name in enumerate(names)}
            own = {
                name: [[w * (2 - m) + draw.random() / 3] for _ in range(prompts)]
                for name, w in weights.items()
            }
            means = {name: sum(x for (x,) in each) / prompts for name, each in own.items()}
            figures = {"kl": 1.0, "kl_interval": 0.1, "perplexity": 9.0}
            points.append(
                {
                    **{"method": method, "weights": weights, "rewards": means},
                    **{"intervals": dict.fromkeys(names, 0.05), **figures},
                    "perplexity_interval": None,
                }
            )
            texts.append([[f"{method} {i} </script> <b>& {p}"] for p in range(prompts)])
            scores.append(own)
    asked = [f"prompt {p} 'x' </script>" for p in range(prompts)]
    return Front(names, asked, points, texts, scores, {"seed": 0})


def test_hypervolume_and_its_interval_are_those_of_means_over_draws_of_prompts() -> None:
    front, at = made(), [0.1, 0.2]
    found = front.hypervolume({"r1": 0.2, "r0": 0.1}, draws=400)
    assert found == front.hypervolume(at, draws=400)
    assert found != front.hypervolume(at, draws=400, seed=1)
    draw = random.Random(1)
    for method in ("clp", "soup"):
        places = front.whole(method)
        assert found[method].value == pytest.approx(hypervolume(front.means(places), at))
        volumes = []
        for _ in range(400):
            taken = [draw.randrange(6) for _ in range(6)]
            means = [
                [sum(front.scores[i][r][p][0] for p in taken) / 6 for r in front.rewards]
                for i in places
            ]
            volumes.append(hypervolume(means, at))
        volumes.sort()
        assert found[method].low == pytest.approx(volumes[10], abs=0.05)
        assert found[method].high == pytest.approx(volumes[-10], abs=0.05)
        assert found[method].low < found[method].value < found[method].high


def test_three_rewards_have_a_volume_and_one_prompt_no_interval() -> None:
    found = made(3).hypervolume([0, 0, 0], draws=50)["clp"]
    assert found.low < found.value < found.high
    alone = made(prompts=1).hypervolume([0, 0])["clp"]
    assert alone.value > 0
    assert math.isnan(alone.low)
    assert made().hypervolume([9, 9])["clp"] == (0, 0, 0)


def test_steerability_is_of_each_method() -> None:
    front = made()
    assert front.steerability == pytest.approx({"clp": 1.0, "soup": 1.0})
    assert "clp: 4 points, 1 of them on its front, steerability 1.00" in repr(front)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"r0": 0}, "reference has no 'r1'"),
        ({"r0": 0, "r2": 1}, "reference has 'r2'; the rewards are r0, r1"),
        ([0], "reference has 1 numbers; it must have 2"),
        (0.0, "reference is 0.0; it must be a list of numbers"),
        ({"r0": 0, "r1": "x"}, r"reference\['r1'\] is 'x'; it must be a number"),
    ],
)
def test_a_wrong_reference_is_named(reference: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        made().hypervolume(reference)


def test_a_saved_front_is_loaded(tmp_path: Path) -> None:
    front = made()
    front.points[0]["rewards"]["r0"] = None
    front.scores[0]["r0"][2] = [None]
    front.save(tmp_path / "f.json")
    loaded = Front.load(tmp_path / "f.json")
    assert loaded.to_dict() == {**front.to_dict(), "rewards": ("r0", "r1")}
    assert loaded.hypervolume([0, 0]) == front.hypervolume([0, 0])
    for text in ("{}", "[]", '{"front": 1}', '{"front": 2}', "3"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match="is not a front that crossfade has saved"):
            Front.load(tmp_path / "x.json")


@pytest.mark.parametrize("rewards", [1, 2, 3])
def test_a_picture_has_a_panel_for_each_two_rewards(rewards: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made(rewards).plot(tmp_path / "f.svg")
    text = (tmp_path / "f.svg").read_text()
    assert text.count('<g id="axes_') == {1: 1, 2: 1, 3: 3}[rewards]
    made(rewards).plot(tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


def test_a_front_without_a_whole_point_is_not_drawn(tmp_path: Path) -> None:
    front = made(methods=("clp",))
    for point in front.points:
        point["rewards"]["r1"] = None
    for draw in (front.plot, front.to_html):
        with pytest.raises(ValueError, match="the front has no point with all rewards"):
            draw(tmp_path / "f.png")


def test_the_page_is_one_file_with_all_texts(tmp_path: Path) -> None:
    front = made(3)
    front.to_html(tmp_path / "f.html")
    page = (tmp_path / "f.html").read_text()
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org)|@import", page)
    assert '<meta name="viewport"' in page
    assert page.count("</script>") == 2  # a text's own is escaped
    data = json.loads(
        re.findall(r'(?s)<script type="application/json"[^>]*>(.*?)</script>', page)[0]
    )
    assert data["texts"] == front.texts
    assert data["prompts"] == front.prompts
    assert len(data["panels"]) == 3
