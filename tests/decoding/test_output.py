"""What outputs, scores and searches print, for people."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.decoding.stats import ModelStats, Stats

STATS = Stats(96, 3.2, (ModelStats(("base", "kind"), 49, 98),), 8192, 123_456_789, ("a note",))


def output(rows: int, text: str | None) -> cf.Output:
    """Each row has one new token less than the one before it."""
    lengths = torch.arange(20, 20 - rows, -1)
    zeros = torch.zeros(rows, 20)
    flags = torch.zeros(rows, dtype=torch.bool)
    return cf.Output(
        sequences=torch.arange(22).expand(rows, -1),
        prompt_length=2,
        lengths=lengths,
        text=None if text is None else [text] * rows,
        logprobs=zeros,
        sampled_logprobs=zeros,
        finished=flags,
        failed=flags,
        ended=~flags,
        stats=STATS,
    )


def test_an_output_shows_texts_and_why_they_end() -> None:
    x = output(4, "The film was\n" + 20 * "great ")
    ended, finished, failed = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0]]).bool()
    x = replace(x, ended=ended, finished=finished, failed=failed)
    shown = "'The film was\\ngreat great great great great great great great'..."
    assert repr(x).splitlines() == [
        "Output(4 rows, 96 tokens in 3.2 s, 30 tokens/s)",
        f"  0: 20 tokens, at its limit: {shown}",
        f"  1: 19 tokens, finished: {shown}",
        f"  2: 18 tokens, failed: {shown}",
        f"  3: 17 tokens, cut short: {shown}",
    ]


def test_an_output_without_texts_shows_ids_and_values() -> None:
    x = replace(output(1, None), values=torch.tensor([0.51234]))
    assert repr(x).splitlines()[1] == (
        "  0: 20 tokens, at its limit, value 0.5123: "
        "ids [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]..."
    )
    assert repr(replace(x, lengths=torch.tensor([1]))).endswith(
        "0: 1 token, at its limit, value 0.5123: ids [2]"
    )


def test_an_output_of_many_rows_is_short() -> None:
    lines = repr(output(20, "The film")).splitlines()
    assert len(lines) == 10
    assert lines[-1] == "  ... and 12 more"


def test_stats() -> None:
    assert repr(STATS).splitlines() == [
        "Stats(96 tokens in 3.2 s, 30 tokens/s; caches 8.19 kB, peak 123 MB)",
        "  base, kind: 49 forwards, 98 tokens read",
        "  note: a note",
    ]
    assert "tokens/s, interrupted;" in repr(replace(STATS, interrupted=True))
    assert replace(STATS, seconds=0.0).tokens_per_second == 0.0


def test_scores() -> None:
    x = cf.Scores(
        logprobs=torch.full((2, 2), -1.0),
        ranks=torch.zeros(2, 2, dtype=torch.int64),
        lengths=torch.tensor([2, 2]),
        stats=Stats(4, 1.0, (), 0, 0),
    )
    assert repr(x).splitlines() == [
        "Scores(2 responses)",
        "  0: 2 tokens, log-prob -2, perplexity 2.718",
        "  1: 2 tokens, log-prob -2, perplexity 2.718",
    ]
    many = cf.Scores(
        logprobs=torch.full((20, 2), -1.0),
        ranks=torch.zeros(20, 2, dtype=torch.int64),
        lengths=torch.full((20,), 2),
        stats=Stats(40, 1.0, (), 0, 0),
    )
    assert repr(many).endswith("... and 12 more")


def test_searches() -> None:
    def brief(prompts: list[Any], texts: list[str]) -> list[float]:
        return [0.0 for _ in texts]

    assert repr(cf.BestOfN(16, brief)) == "BestOfN(16, value=brief)"
    assert repr(cf.ChunkBeamSearch(value=0.5 * cf.Reward(brief), duplicate_finished=True)) == (
        "ChunkBeamSearch(width=4, samples=4, chunk_length=5, value=0.5*brief, "
        "duplicate_finished=True)"
    )


def test_an_output_has_no_items() -> None:
    x = output(1, "The film")
    for use in (lambda: x[0], lambda: x["text"], lambda: list(x)):
        with pytest.raises(TypeError, match=r"no item .*: sequences\[i\] are the tokens of row i"):
            use()
