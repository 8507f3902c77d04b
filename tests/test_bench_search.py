"""The search bench: its baseline is the official algorithm, and a wrong value is found."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
import torch
from torch import Tensor

TESTS = Path(__file__).parent
BENCH = TESTS.parent / "bench"
sys.path.append(str(BENCH))

import search  # noqa: E402
import search_heads  # noqa: E402
import search_peers as peers  # noqa: E402
from reports.search import APART, FOUR, ONE, PLAIN, SCALAR  # noqa: E402
from search_peers import Shape  # noqa: E402
from tiny_models import VOCAB, make  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure the GPU")
SHAPE = Shape(width=2, samples=3, chunk_length=4, prompt=7, new=10)  # chunks of 4, 4 and 2
CONTENDERS = [search.OFFICIAL, search.OURS, search.BLENDED]


@pytest.fixture(scope="module")
def models() -> list[Any]:
    found = [make(seed=seed) for seed in range(3)]
    for model in found:
        model.generation_config.eos_token_id = None
    return found


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, VOCAB, (1, SHAPE.prompt), generator=torch.Generator().manual_seed(0))


def test_the_baseline_scores_as_crossfade_does(models: list[Any], ids: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    responses = torch.randint(3, VOCAB, (5, 9), generator=generator)
    prompts = ids.expand(5, -1)
    with torch.inference_mode():
        sequences = torch.cat([prompts, responses], dim=1)
        values = peers.implicit_values(models, sequences, SHAPE.prompt)
    tuned, ref = (
        cf.score(m, prompts.tolist(), responses.tolist()).logprobs.sum(1) for m in models[1:]
    )
    torch.testing.assert_close(values, tuned - ref, rtol=0, atol=1e-4)


def test_the_best_are_kept_and_ties_go_to_the_lower_row() -> None:
    generator = torch.Generator().manual_seed(0)
    shape = Shape(3, 4, 1, 1, 1)
    for _ in range(50):
        values = torch.randint(0, 6, (shape.rows,), generator=generator).float()
        each = values.tolist()
        best = sorted(range(shape.rows), key=lambda row: (-each[row], row))[:3]
        expected = [row for row in best for _ in range(4)]
        assert peers.parents_of(values, shape).tolist() == expected


def test_the_baseline_searches(
    models: list[Any], ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a boundary the rows that were kept go on, each with the caches of its own text."""
    kept, logits, values = [ids.repeat(SHAPE.rows, 1)], [], []

    def read(model: Any, unread: Tensor, cache: Any) -> Tensor:
        logits.append(last(model, unread, cache))
        return logits[-1]

    def score(models: list[Any], sequences: Tensor, prompt: int) -> Tensor:
        values.append(implicit_values(models, sequences, prompt))
        before = kept[-1].tolist()  # each of these begins its row
        assert [row[: len(before[0])] for row in sequences.tolist()] == before
        kept.append(sequences[peers.parents_of(values[-1], SHAPE)])
        return values[-1]

    last, implicit_values = peers.last, peers.implicit_values
    monkeypatch.setattr(peers, "last", read)
    monkeypatch.setattr(peers, "implicit_values", score)
    torch.manual_seed(0)
    found = peers.official(models, ids, SHAPE)
    assert [k.shape[1] - SHAPE.prompt for k in kept] == [0, 4, 8, 10]
    for sequences, first in zip(kept, (0, 4, 8), strict=False):
        with torch.inference_mode():
            truth = models[0](sequences).logits[:, -1]
        torch.testing.assert_close(logits[first], truth, rtol=1e-4, atol=1e-4)
        assert len(sequences.unique(dim=0)) <= SHAPE.width
    assert found.value == values[-1].max()
    assert found.response == kept[-1][0, SHAPE.prompt :].tolist()


@pytest.mark.parametrize("every", [1, 2])
def test_the_tokens_that_the_baseline_reads(models: list[Any], ids: Tensor, every: int) -> None:
    """The base reads each token but the last once; value models read all at each boundary."""
    read = [0, 0, 0]

    def count(index: int) -> Any:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            read[index] += kwargs["input_ids"].numel()

        return models[index].register_forward_pre_hook(hook, with_kwargs=True)

    handles = [count(i) for i in range(3)]
    found = peers.official(models, ids, SHAPE, every)
    for handle in handles:
        handle.remove()
    scored = 6 * sum(7 + t for t in ((4, 8, 10) if every == 1 else (4, 10)))
    assert read == [6 * (7 + 9), scored, scored]
    assert found.base_tokens == read[0]
    # All boundaries count, whether they are timed or not.
    assert found.value_tokens == 2 * 6 * sum(7 + t for t in (4, 8, 10))
    assert len(found.response) == SHAPE.new
    peers.check("official", models, ids, SHAPE, found)


def test_scoring_is_summed_up() -> None:
    """A sum of times that grow steadily is exact, as the last boundary is always timed."""
    for boundaries, every in ((52, 8), (9, 8), (10, 1), (1, 8)):
        timed = peers.scored(boundaries, every)
        assert (timed[0], timed[-1]) == (0, boundaries - 1)
        assert max(b - a for a, b in zip(timed, [*timed[1:], timed[-1]], strict=True)) <= every
        total = peers.summed_up({i: 3.0 + 2.0 * i for i in timed}, boundaries)
        assert total == pytest.approx(sum(3.0 + 2.0 * i for i in range(boundaries)))


def test_a_wrong_value_is_told(models: list[Any], ids: Tensor) -> None:
    found = peers.official(models, ids, SHAPE)
    for wrong in (
        dataclasses.replace(found, value=found.value + 0.01),
        dataclasses.replace(found, value=float("nan")),
        dataclasses.replace(found, response=found.response[:-1]),
        dataclasses.replace(found, response=[3, *found.response[1:-1], 4]),
    ):
        with pytest.raises(peers.Wrong, match="one"):
            peers.check("one", models, ids, SHAPE, wrong)
    swapped = [models[0], models[2], models[1]]
    with pytest.raises(peers.Wrong, match="one"):
        peers.check("one", swapped, ids, SHAPE, found)


@pytest.mark.parametrize("blended", [False, True])
def test_the_tokens_that_crossfade_reads(models: list[Any], ids: Tensor, blended: bool) -> None:
    """Each model reads the prompt once, and each token once at most."""
    found = peers.ours(models, ids, SHAPE, blended)
    peers.check("ours", models, ids, SHAPE, found)
    once = SHAPE.prompt + SHAPE.rows * SHAPE.new
    assert found.base_tokens <= once
    assert found.value_tokens <= 2 * once


def test_a_missed_goal_is_told() -> None:
    def row(name: str, shape: Shape, *seconds: float) -> dict[str, Any]:
        return {"shape": dataclasses.asdict(shape), "contender": name, "rounds_s": list(seconds)}

    one, other = Shape(4, 4, 5, 60, 50), Shape(4, 4, 5, 300, 50)
    rows = [row(search.OURS, one, 1.0, 2.0, 9.0), row(search.OFFICIAL, one, 5.0, 10.0, 9.0)]
    rows += [row(search.OURS, other, 10.0), row(search.OFFICIAL, other, 99.0)]
    (line,) = search.missed(rows)
    assert line.startswith(str(other))
    assert search.ratio(rows, dataclasses.asdict(one), search.OFFICIAL) == 5.0


def test_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "search.json"
    search.main(["--quick", "--json", str(path)])
    results = json.loads(path.read_text())
    assert set(results) == {"command", "machine", "versions", "settings", "rows", "heads"}
    forwards = {r["contender"]: len(r["forwards"]) for r in results["heads"]}
    assert forwards == {PLAIN: 1, ONE: 1, FOUR: 1, SCALAR: 1, APART: 2}
    found = [(Shape(**r["shape"]), r["contender"]) for r in results["rows"]]
    assert found == [(s, c) for s in search.QUICK for c in CONTENDERS]
    assert [len(r["rounds_s"]) for r in results["rows"]] == [3, 3, 3, 1, 1, 1]
    text = search.render(results)
    assert text in capsys.readouterr().out
    assert text.count(f"| {search.OFFICIAL} * |") == 1
    assert "timed at every 8th boundary" in text
    assert f"| {FOUR} |" in text


def test_goals_of_heads_are_over_plain_sampling() -> None:
    shape = {"width": 4}
    rows = [
        {"shape": shape, "contender": name, "processor_s": seconds}
        for name, seconds in ((PLAIN, [2.0, 3.0, 1.0]), (ONE, [2.4, 3.0, 1.3]), (FOUR, [2.0] * 3))
    ]
    (line,) = search_heads.missed(rows)
    assert line.startswith(f"{ONE}, ")
    assert "1.20 times" in line


def test_a_wrong_value_of_a_head_is_found(models: list[Any], ids: Tensor) -> None:
    heads = search_heads.Heads(models[0], ids, SHAPE)
    out = heads.runs[FOUR]()
    heads.check(FOUR, out)
    with pytest.raises(search.peers.Wrong, match=ONE):
        heads.check(ONE, out)
