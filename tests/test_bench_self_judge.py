"""The reproduction of SELF-JUDGE: its rewards, its figures, and how it is resumed."""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from crossfade import models

pytest.importorskip("trl")  # TRL needs Python 3.11
pytest.importorskip("textstat")
pytest.importorskip("wordfreq")
sys.path += [str(Path(__file__).parent.parent / "bench" / "reproduce")]

import opinions
import reviews
import self_judge
import self_judge_figures as figures
from crossfade.policies.self_judge import JudgeTemplate
from reports import self_judge as report
from tiny_models import make, make_tokenizer

TEMPLATE = JudgeTemplate(
    question="the {principle} film ?",
    prefix="the {principle} film was",
    principle="very bright",
    principles={"sentiment": "plot", "brevity": "cast", "readability": "dull", "plainness": "w1"},
    labels=("great", "awful"),
    system=None,
)


def test_rewards_of_opinions() -> None:
    plain, hard = "It was good.", "An extraordinarily multifaceted characterization."
    for reward in (opinions.readability, opinions.plainness):
        easy, difficult, nothing = reward([None] * 3, [plain, hard, "?!"])
        assert 1 >= easy > difficult >= nothing == 0
    assert opinions.plainness([None], ["the"]) == [pytest.approx(7.73 / 8)]
    # wordfreq's Zipf frequencies; textstat's index of 22 letters in 4 words of one sentence
    text = "wonders elephant an apple"
    years = 4.71 * 22 / 4 + 0.5 * 4 - 21.43
    assert opinions.readability([None], [text]) == [pytest.approx(1 - years / 20)]


def test_the_annotator_takes_the_mean_of_standardised_rewards() -> None:
    low = dict.fromkeys(opinions.REWARDS, 0.0)
    high = {name: float(k + 1) for k, name in enumerate(opinions.REWARDS)}
    annotator = opinions.Annotator([low, high])
    assert annotator.total(low) == pytest.approx(-1)
    assert annotator.total(high) == pytest.approx(1)
    assert annotator.total({**low, "plainness": high["plainness"]}) == pytest.approx(-0.5)


def test_a_difference_is_resolved_outside_of_all_noise() -> None:
    assert report.resolved((0.2, 0.1), [0.1, 0.3])
    assert not report.resolved((0.2, 0.1), [-0.1, 0.5]), "seeds disagree"
    assert not report.resolved((-0.1, 0.2), [-0.1, -0.1])


def test_a_judge_that_errs_on_close_pairs(tmp_path: Path) -> None:
    kept = {"gaps": [0.1, -2.0, 3.0, -0.2], "preferences": [0.4, 0.3, 0.9, 0.5]}
    path = tmp_path / "total.json"
    path.write_text(json.dumps({**kept, "position_bias": 0.25, "toward_first": 0.0}))
    found = figures.judge(tmp_path, "total")
    assert found["accuracy"][0] == pytest.approx((0 + 1 + 1 + 0.5) / 4)
    assert found["wide"] == (1.0, 0.0)


def any_order(name: str) -> Callable[[Sequence[Any], Sequence[str]], list[float]]:
    """A reward that orders all texts, as the words of a tiny model are all alike to real ones."""
    return lambda prompts, texts: [zlib.crc32(f"{name} {text}".encode()) / 2**32 for text in texts]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the stages make for a tiny model, of a few subjects."""
    folder = tmp_path_factory.mktemp("self_judge") / "work"
    tokenizer = make_tokenizer()
    lora = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "smollm2", lambda *_: (make("gemma3"), tokenizer))
        patch.setattr(reviews, "TRAINED", (("a film", "the plot"), ("a cast", "the cast")))
        patch.setattr(reviews, "HELD_OUT", (("w1", "w2", "w3"), ("w4",)))
        small = {"SEEDS": (0, 1), "SAMPLES": 4, "POOL": 4, "NEW": 4, "BATCH": 2}
        for name, x in {**small, "LORA": lora, "TEMPLATE": TEMPLATE}.items():
            patch.setattr(self_judge, name, x)
        patch.setattr(self_judge, "DTYPE", torch.float32)
        patch.setattr(opinions, "REWARDS", {name: any_order(name) for name in opinions.REWARDS})
        assert self_judge.main(["--work", str(folder), "--only", "pairs"]) is None
        yield folder


def test_stages_make_the_table_and_go_on(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = work / "self_judge.json"
    arguments = ["--work", str(work), "--json", str(path)]
    found: Any = self_judge.main(arguments)
    said = capsys.readouterr().out
    assert said.count("there already") == 1, "the pairs, which were made before"
    assert found == json.loads(path.read_text())
    policies = {row["policy"]: row for row in found["policies"]}
    assert list(policies) == ["base", "jsft", "sft", "dpo", "self"]
    assert [len(row["seeds"]) for row in policies.values()] == [1, 1, 2, 2, 2]
    assert list(found["rejection"]) == list(found["matches"]) == ["jsft", "self-0"]
    for rows in found["rejection"].values():
        assert [row["n"] for row in rows] == [1, 2, 4]
        for row in rows:
            assert row["best"]["total"][0] >= max(row[x]["total"][0] for x in ("judge", "any"))
        assert rows[0]["gain"] == [0, 0]
    assert report.render(found) in said
    by_stage = {row["stage"]: row["tokens"] for row in found["costs"]}
    assert list(by_stage) == list(self_judge.stages())
    assert by_stage["self-0"].keys() == {"trained", "sampled", "judged"}
    assert all(tokens for row in by_stage.values() for tokens in row.values())

    brackets = (work / "tournament-self-0" / "brackets.jsonl").read_text()
    (work / "tournament-self-0" / "brackets.jsonl").write_text(brackets.split("\n")[0] + "\n")
    (work / "tournament-self-0" / "log.json").unlink()
    (work / "judge-jsft" / "log.json").unlink()
    (work / "judge-jsft" / "total.json").unlink()
    again: Any = self_judge.main(arguments)
    assert capsys.readouterr().out.count("there already") == len(by_stage) - 2
    played = figures.read_jsonl(work / "tournament-self-0" / "brackets.jsonl")
    winners = [json.loads(line)["winners"] for line in brackets.splitlines()]
    assert [bracket["winners"] for bracket in played] == winners
    for name in ("judges", "rejection", "policies"):
        assert again[name] == found[name]

    monkeypatch.setattr(self_judge, "BETA", 0.2)
    with pytest.raises(SystemExit):
        self_judge.main(arguments)
    assert "was begun with other settings (beta)" in capsys.readouterr().err


def test_winners_of_a_pool_are_those_of_its_beginnings(work: Path) -> None:
    """The winner of the first 2, 4, ... answers comes of the matches among these alone."""
    self_judge.main(["--work", str(work)])  # what another process may have to make first
    for bracket in figures.read_jsonl(work / "tournament-self-0" / "brackets.jsonl"):
        assert bracket["winners"][0] == 0
        for played, before, after in zip(
            bracket["rounds"], bracket["winners"], bracket["winners"][1:], strict=False
        ):
            a, b, _ = played[0]
            assert before == a
            assert after in (a, b)
