"""The comparison of searches: what it is made of, and how it is resumed."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade import models
from crossfade.extras import old_names

pytest.importorskip("trl")  # TRL needs Python 3.11
sys.path += [str(Path(__file__).parent.parent / "bench" / "reproduce")]

import reviews
import searches
import searches_figures as figures
from reports import searches as report
from tiny_models import lora, make, make_tokenizer

VALUE = cf.Reward(lambda prompts, texts: [0.0] * len(texts))


def test_the_best_of_n_over_all_choices_of_n() -> None:
    values = [0.3, 2.0, -1.0, 0.7, 0.5]
    for n in range(1, 6):
        chosen = [max(c, key=values.__getitem__) for c in itertools.combinations(range(5), n)]
        expected = [chosen.count(i) / len(chosen) for i in range(5)]
        assert figures.rank_weights(values, n) == pytest.approx(expected)


def test_chunks_are_counted_and_their_choices_bounded() -> None:
    beams = cf.ChunkBeamSearch(2, 2, 5, VALUE)
    out: Any = SimpleNamespace(lengths=torch.tensor([1, 5, 6]))
    assert searches.chunks(beams, out) == [1, 1, 2]
    assert searches.chunks(cf.BestOfN(4, VALUE), out) == searches.chunks(None, out) == [1, 1, 1]
    out.entropies = torch.tensor([[9.0, 0, 0, 0, 0, 0], [0, 3, 3, 0, 1, 9], [9, 0, 3, 0, 0, 3]])
    cut = cf.ChunkBeamSearch(2, 2, None, VALUE, cf.entropy_above(2))
    assert searches.chunks(cut, out) == [1, 3, 3], "the first token begins a chunk in any case"
    assert searches.choice(beams, 3) == pytest.approx(math.log(4 * 2 * 2))
    assert searches.choice(cf.ParticleFilter(4, 5, VALUE), 3) == pytest.approx(math.log(4**3))
    assert searches.choice(None, 1) == 0


def texts(rewards: list[float], seconds: float) -> figures.Texts:
    prompts = [{"reward": [x]} for x in rewards]
    run = {"prompts": prompts, "seconds": [seconds * len(prompts)], "read": [0.0]}
    return figures.Texts(run, [[1.0]] * len(prompts))


def test_fewer_rows_at_equal_seconds() -> None:
    one, four = texts([0.0, 1.0], 1.0), texts([2.0, 1.0], 4.0)
    assert figures.at_seconds(one, four, "reward", 4.0) == pytest.approx([2, 1])
    assert figures.at_seconds(one, four, "reward", 2.0) == pytest.approx([1, 1])
    assert figures.at_seconds(one, four, "reward", 0.5) == pytest.approx([0, 1]), "no extrapolation"
    curve = [texts([x], x) for x in (1.0, 2.0, 4.0)]
    at = {0.5: 1.0, 1.0: 1.0, 2.5: 3.0, 3.0: 4.0, 9.0: 4.0}
    for n, expected in at.items():
        assert figures.best_at(curve, "reward", n) == pytest.approx([expected])


def test_stages_make_the_table_and_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for i, name in enumerate(reviews.REWARDS):
        with old_names():
            lora(i, make(), "default").save_pretrained(tmp_path / name)
    tokenizer = make_tokenizer()
    monkeypatch.setattr(models, "smollm2", lambda *_: (make(), tokenizer))
    monkeypatch.setattr(models, "guide", lambda name: tmp_path / name)
    small: dict[str, Any] = {
        "PROMPTS": 3,
        "BLOCK": 2,
        "NEW": 6,
        "BUDGET": 24,
        "POOL": 5,
        "DTYPE": torch.float32,
    }
    small |= {"DTYPE": torch.float32, "PICTURE": tmp_path / "searches.png"}
    for name, x in small.items():
        monkeypatch.setattr(searches, name, x)
    work = tmp_path / "work"
    arguments = ["--work", str(work), "--json", str(tmp_path / "searches.json")]
    assert searches.main(["--work", str(work), "--only", "threshold", "prompts-0"]) is None
    found: Any = searches.main(arguments)
    said = capsys.readouterr().out
    assert said.count("there already") == 2
    assert found == json.loads((tmp_path / "searches.json").read_text())
    assert report.render(found) in said
    assert (tmp_path / "searches.png").stat().st_size > 10_000
    for objective in reviews.REWARDS:
        rows = {row["method"]: row for row in found["methods"][objective]}
        assert len(rows) == 10
        for row in rows.values():
            for figure in (row["kl"], row["perplexity"], row[objective]):
                assert all(map(math.isfinite, figure))
        assert rows["base"]["kl"] == [0, 0]
        assert rows["best of n"]["kl"][0] == pytest.approx(math.log(4) - 3 / 4)
        assert rows["IVG"]["kl_of_policy"] != [0, 0]
        assert rows["CBS"]["tokens_best"][0] == pytest.approx(
            rows["CBS"][objective][0] - rows["best of n"][objective][0]
        )
        assert not {"tokens_cbs", "seconds_cbs"} & rows["CBS"].keys()
        assert len(found["best"][objective]) == 5

    (work / "prompts-2" / "log.json").unlink()
    (work / "prompts-2" / "brevity-IVG.json").unlink()
    again: Any = searches.main(arguments)
    for a, b in zip(again["methods"]["brevity"], found["methods"]["brevity"], strict=True):
        assert a["brevity"] == b["brevity"]
        assert a["method"] == "IVG" or a["seconds"] == b["seconds"]
    assert report.summary(again).count("\n") == 8, "a head, EFT and six searches"
