"""``crossfade score``: the library's figures."""

from __future__ import annotations

import json
from pathlib import Path

import crossfade as cf
import pytest
from word_models import WORDS, trio


def test_score_gives_the_librarys_figures(paths, blend, run, tmp_path: Path) -> None:
    pairs = [("a b c", "d e"), ("f", "g h i"), ("j k", "l")]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": p, "response": r}) for p, r in pairs))
    found = run("score", str(file), *trio(paths), "--terms", "--batch-size", "2")
    ids = [[[WORDS.index(w) for w in text.split()] for text in pair] for pair in pairs]
    prompts, responses = zip(*ids, strict=True)
    expected = cf.score(blend, list(prompts), list(responses), return_term_logprobs=True)
    assert [r["tokens"] for r in found] == [2, 3, 1]
    assert [r["logprob"] for r in found] == pytest.approx(expected.totals.tolist())
    assert [r["perplexity"] for r in found] == pytest.approx(expected.perplexity.tolist(), rel=1e-4)
    tuned = expected.term_logprobs[:, :, 1].sum(dim=1).tolist()
    assert [r["terms"]["tuned"] for r in found] == pytest.approx(tuned)
