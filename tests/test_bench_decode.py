"""The decoding bench: all of it runs, and a contender that does something else is found."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import decode  # noqa: E402
import decode_peers as peers  # noqa: E402
import decode_queue  # noqa: E402
from crossfade.bench import timing  # noqa: E402

# PEFT asks transformers for an attribute that this version of it has renamed
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the bench would measure the GPU"),
]
CONTENDERS = {
    "single": ["Hugging Face", "crossfade"],
    "single, bfloat16": ["Hugging Face", "crossfade"],
    "LoRA guides": ["three forwards", "PEFT mixed batch", "crossfade"],
    "separate models": ["three forwards", "crossfade"],
}
SIZES = decode.Sizes([2], prompt=9, short=4, long=6, rounds=1)


@pytest.fixture(autouse=True)
def steady_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads are so small here that a machine that does other things makes any time of them."""
    monkeypatch.setattr(decode, "read_gb_per_s", lambda *_: 4.0)


def test_a_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "decode.json"
    decode.main(["--quick", "--json", str(path)])
    results = json.loads(path.read_text())
    assert set(results) == {"command", "machine", "versions", "settings", "rows", "queue"}
    found = [(r["set"], r["contender"], r["batch"]) for r in results["rows"]]
    assert found == [(s, c, b) for b in (1, 2) for s in CONTENDERS for c in CONTENDERS[s]]
    for row in results["rows"]:
        assert len(row["steps_ms"]) == 2
        assert row["read_ms"] > 0
        assert row.get("notes", []) == []
    queue = results["queue"]
    assert queue["tokens"] == sum(queue["lengths"])
    assert queue["ideal_ratio"] >= 1
    text = decode.render(results)
    assert text in capsys.readouterr().out
    assert text.count("| PEFT mixed batch |") == 1


@pytest.fixture(scope="module")
def contests() -> dict[str, peers.Contest]:
    args = argparse.Namespace(quick=True, compile=False, only=["single", "lora", "models"])
    (found,) = peers.cpu_contests(args)
    return {c.name: c for c in found}


def of_other_weights(contest: peers.Contest) -> Any:
    recipe: Any = contest.runs["three forwards"]
    return peers.Recipe(recipe.start, weights=(1.0, -0.8, 0.8))


def of_swapped_adapters(contest: peers.Contest) -> Any:
    return peers.mixed_batch(contest.models[0], ["ref", "tuned"])


def of_the_base_alone(contest: peers.Contest) -> Any:
    return peers.ours(contest.blend.terms[0])


def of_another_model(contest: peers.Contest) -> Any:
    return peers.hugging_face(peers.random_model(peers.TINY, "cpu", torch.float32, seed=5))


def with_too_few_tokens(contest: peers.Contest) -> Any:
    return lambda ids, new, sample: contest.runs["crossfade"](ids, new - 1, sample)


def at_another_temperature(contest: peers.Contest) -> Any:
    def run(ids: torch.Tensor, new: int, sample: bool) -> cf.Output:
        setting = {**peers.SAMPLING, "temperature": 1.0} if sample else {}
        out = cf.generate(contest.blend, ids, max_new_tokens=new, do_sample=sample, **setting)
        assert isinstance(out, cf.Output)
        return out

    return run


@pytest.mark.parametrize(
    ("name", "contender", "broken"),
    [
        ("LoRA guides", "three forwards", of_other_weights),
        ("LoRA guides", "PEFT mixed batch", of_other_weights),
        ("LoRA guides", "PEFT mixed batch", of_swapped_adapters),
        ("LoRA guides", "crossfade", of_the_base_alone),
        ("LoRA guides", "crossfade", at_another_temperature),
        ("separate models", "three forwards", of_other_weights),
        ("separate models", "crossfade", of_the_base_alone),
        ("single", "Hugging Face", of_another_model),
        ("single", "crossfade", with_too_few_tokens),
    ],
)
def test_a_broken_contender_is_told(
    name: str,
    contender: str,
    broken: Callable[[peers.Contest], Any],
    contests: dict[str, peers.Contest],
) -> None:
    contest = contests[name]
    runs = {**contest.runs, contender: broken(contest)}
    with pytest.raises(peers.Wrong, match=name):
        decode.measure([dataclasses.replace(contest, runs=runs)], 2, SIZES, 1, 10.0, "cpu")


def test_reads_are_beside_what_they_bound(
    contests: dict[str, peers.Contest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are of the contest's own weights, before and after each turn of a contender."""
    contest = contests["LoRA guides"]
    seen: list[Any] = []
    rates = iter([1.0, 2.0, 4.0, 16.0])

    def read(weights: list[torch.Tensor], device: str) -> float:
        assert [w.data_ptr() for w in weights] == [w.data_ptr() for w in contest.weights]
        seen.append("read")
        return next(rates)

    def step(run: Any, *_: Any) -> float:
        seen.append(next(name for name, r in contest.runs.items() if r is run))
        return 1e6

    monkeypatch.setattr(decode, "read_gb_per_s", read)
    monkeypatch.setattr(decode, "step_ms", step)
    found = decode.measure([contest], 2, SIZES, 1, 10.0, "cpu")
    names = CONTENDERS["LoRA guides"]
    assert seen == ["read", names[0], "read", names[1], "read", names[2], "read"]
    assert [r["read_gb_per_s"] for r in found] == [1.5, 3.0, 10.0]
    needed = contest.bytes(2, 9 + 3)  # in the middle of 6 new tokens
    assert found[1]["read_ms"] == pytest.approx(needed * (1 / 2 + 1 / 4) / 2 / 1e6, abs=0.01)


def test_a_step_that_beats_its_read_fails(
    contests: dict[str, peers.Contest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "read_gb_per_s", lambda *_: 1e-9)
    with pytest.raises(timing.FasterThanItsFloor, match="single, batch 2: 'Hugging Face' takes"):
        decode.measure([contests["single"]], 2, SIZES, 1, 10.0, "cpu")


@pytest.mark.parametrize(("interrupted", "rate"), [(0, 4.0), (3, 4.0), (4, 20 / 405)])
def test_the_speed_of_reads(interrupted: int, rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight of 10 kB is read in three pieces, twice, at 4 kB a microsecond: in 5 of them.

    An interrupted read takes 100 us more, and is left out if at least half are not. The small
    weight is not read.
    """
    monkeypatch.setattr(decode, "PIECE", 4000)
    weights = [torch.ones(2500), torch.ones(10, 5)]
    read: list[int] = []
    timed = 0

    def sample(call: Callable[[], Any]) -> timing.Sample:
        nonlocal timed
        call()
        timed += 1
        late = timed <= interrupted
        return timing.Sample(read[-1] / 4000 + 100 * late, late)

    monkeypatch.setattr(timing, "read", lambda x: read.append(x.nbytes))
    monkeypatch.setattr(timing, "timed", sample)
    assert decode.weights_gb_per_s(weights) == pytest.approx(rate)
    assert read == 3 * [4000, 4000, 2000]


def test_weights_of_a_step(contests: dict[str, peers.Contest]) -> None:
    """An embedding that is not the head too is looked up, and adapters are read as well."""
    model = contests["single"].models[0]
    whole = sum(p.nbytes for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    assert sum(w.nbytes for w in peers.weights_of(model)) == whole - embedding.nbytes
    model.lm_head.weight, own = embedding, model.lm_head.weight
    try:
        assert sum(w.nbytes for w in peers.weights_of(model)) == whole - own.nbytes
    finally:
        model.lm_head.weight = own
    assert sum(w.nbytes for w in contests["LoRA guides"].weights) > whole - embedding.nbytes


def rows(steps: dict[tuple[str, str], list[float]]) -> list[dict[str, Any]]:
    return [
        {"set": s, "contender": c, "batch": 1, "steps_ms": times} for (s, c), times in steps.items()
    ]


def test_a_straw_man_is_flagged() -> None:
    """A recipe is flagged if its time, in Hugging Face's greedy steps, is not what is known."""
    greedy, mixed = ("single", "Hugging Face"), ("LoRA guides", "PEFT mixed batch")
    known = 118 / 65.6
    for factor, flagged in ((1.1, False), (1.3, True), (0.7, True)):
        slow = [known * factor * t for t in (10.0, 20.0, 30.0)]
        (entry,) = decode.baselines(rows({greedy: [10.0, 20.0, 30.0], mixed: slow}))
        assert entry["flagged"] == flagged
        assert entry["off"] == pytest.approx(factor - 1, abs=1e-3)


def test_steps_of_a_queue() -> None:
    lengths = [5, 1, 1, 1, 2, 6]
    assert decode_queue.fixed_steps(lengths, 2) == 5 + 1 + 6
    # One place has the rows of 5 and 6 steps, the other one those of 1, 1, 1 and 2.
    assert decode_queue.queue_steps(lengths, 2) == 5 + 6
    assert decode_queue.queue_steps(lengths, 6) == 6


def test_ends_make_lengths_unequal() -> None:
    generator = torch.Generator().manual_seed(0)
    written = torch.randint(0, 500, (64, 64), generator=generator).tolist()
    ends = set(peers.ends_for(written, shortest=2, mean=32))
    lengths = [peers.cut(row, ends) for row in written]
    assert 2 <= min(lengths) < 10
    assert max(lengths) == 64
    assert 24 < sum(lengths) / 64 <= 32
