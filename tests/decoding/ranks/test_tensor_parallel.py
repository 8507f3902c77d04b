"""Models in shards on two ranks of torchrun, by Transformers' own plan: the tokens are those of
whole models, and no row of logits is gathered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import calls_on_ranks as calls
import crossfade as cf
import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

IN_SHARDS = [
    *("sampled", "one model", "greedy", "truncated", "nucleus", "log-probs of terms", "a support"),
    *("a power mean", "weights of requests", "several samples", "a search", "one whole model"),
    *("a draft", "a cache", "Hugging Face's generate"),
]
GATHERED = [
    "a processor",
    "other columns",
    "the simple path",
    "adapters",
    "shards of FSDP",
    "scores",
]
SECONDS = 300  # after which ranks that wait for each other are ended


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    calls.write_models(folder)
    return folder


def on_two_ranks(script: Path, *arguments: Path) -> str:
    """What a script prints that torchrun starts twice."""
    tests = Path(calls.__file__).parents[2]
    paths = [*map(str, [tests, Path(calls.__file__).parent]), *sys.path]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    run = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, *arguments]
    ended = subprocess.run(
        [sys.executable, "-m", *map(str, run)],
        env=env,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What whole models give, and what each of two ranks got."""
    with ThreadPoolExecutor(1) as other:
        ranks = other.submit(on_two_ranks, Path(calls.__file__), folder)
        whole = calls.run(calls.whole(folder), folder)
        ranks.result()
    return whole, [json.loads((folder / f"rank{i}.json").read_text()) for i in range(2)]


def test_each_call_has_a_test(both: Any) -> None:
    assert [*both[0]] == [n for n in both[0] if n in (*IN_SHARDS, *GATHERED)]
    assert len(both[0]) == len(IN_SHARDS) + len(GATHERED)


@pytest.mark.parametrize("name", [*IN_SHARDS, *GATHERED])
def test_every_rank_gets_what_whole_models_give(both: Any, name: str) -> None:
    whole, ranks = both
    for rank in ranks:
        got = rank["calls"][name]
        assert got["tokens"] == whole[name]["tokens"]
        assert got["numbers"].keys() == whole[name]["numbers"].keys()
        for kind, numbers in whole[name]["numbers"].items():
            # The sums of layers have another order on ranks.
            torch.testing.assert_close(
                torch.tensor(got["numbers"][kind]), torch.tensor(numbers), atol=2e-4, rtol=1e-4
            )
    assert ranks[0]["calls"][name] == ranks[1]["calls"][name]


def test_notes_say_why_logits_are_gathered(both: Any) -> None:
    found = {name: " ".join(call["notes"]) for name, call in both[1][0]["calls"].items()}
    for name in IN_SHARDS:
        assert "gathered" not in found[name]
    assert "logits are gathered from 2 ranks: logits processors" in found["a processor"]
    assert "logits of other are gathered from 2 ranks: its head has" in found["other columns"]
    assert "has adapters over layers in shards" in found["adapters"]
    assert "base lies in shards that its modules gather, as of FSDP" in found["shards of FSDP"]
    assert "no draft: how many tokens pay is measured" in found["a draft"]


def test_what_ranks_send_a_step(both: Any) -> None:
    """Three rows of 24 numbers of 8 bytes each; with top-k 20 before it, 24 more. `gathers` fails
    where whole rows are gathered."""
    rows, numbers = len(calls.PROMPTS), 24
    for rank in both[1]:
        assert set(rank["gathers"]["plain"]["bytes"]) == {rows * numbers * 8}
        assert len(rank["gathers"]["plain"]["bytes"]) == calls.WRITE["max_new_tokens"]
        assert set(rank["gathers"]["top-k"]["bytes"]) == {rows * (4 + 20) * 8, rows * numbers * 8}
        assert len(rank["gathers"]["top-k"]["bytes"]) == 2 * calls.WRITE["max_new_tokens"]


def test_ranks_without_a_seed_draw_alike(both: Any) -> None:
    first, second = (rank["without a seed"] for rank in both[1])
    assert first == second


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other requests", "RanksDiffer: the list of requests differs between the 2 ranks"),
        ("other seeds", "RanksDiffer: seed differs between the 2 ranks"),
        ("other settings", "RanksDiffer: temperature differs between the 2 ranks"),
        ("other blends", "RanksDiffer: the kind of blend differs between the 2 ranks"),
        ("other engines", "RanksDiffer: engine differs between the 2 ranks"),
        ("other batches", "RanksDiffer: max_batch differs between the 2 ranks"),
        ("processors on one", "RanksDiffer: the list of logits processors differs between the 2"),
        ("a seed on one", "RanksDiffer: seed is None on some ranks alone"),
        ("other responses", "RanksDiffer: the list of responses differs between the 2 ranks"),
        ("other batches of scores", "RanksDiffer: max_batch differs between the 2 ranks"),
        ("shards that are quantised", "ValueError: model.layers.0.self_attn.q_proj.weight lies in"),
        ("a wrapper of FSDP", "ValueError: guide is wrapped by FullyShardedDataParallel"),
        ("a time limit", "NotImplementedError: max_time is set, and models are in shards"),
        ("a session", "NotImplementedError: [1]*base has models in shards on several ranks"),
    ],
)
def test_mistakes_that_would_let_ranks_wait(both: Any, name: str, words: str) -> None:
    for rank in both[1]:
        assert rank["mistakes"][name].startswith(words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a bad setting on one", "ValueError: temperature is -1.0; it must be 0"),
        ("a bad response on one", f"ValueError: responses[2] has id {calls.VOCAB}; ids must be"),
    ],
)
def test_what_one_rank_refuses_the_others_are_told(both: Any, name: str, words: str) -> None:
    first, second = (rank["mistakes"][name] for rank in both[1])
    assert second.startswith(words)
    assert first.startswith(f"RanksDiffer: rank 1 of 2 refused the call: {words}")


def test_the_script_of_the_page(both: Any, folder: Path) -> None:
    """It prints the tokens of whole models, on the first rank."""
    load = calls.whole(folder)
    tuned, base = cf.Model(load("guide")), cf.Model(load("base"))
    whole = cf.generate(base + 1.5 * (tuned - base), [[5, 9, 100]], max_new_tokens=8, seed=7)
    first, second = (rank["the page's script"] for rank in both[1])
    assert first == f"{whole.sequences.tolist()}\n"
    assert second == ""
