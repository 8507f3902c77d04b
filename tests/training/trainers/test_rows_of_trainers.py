"""What trainers do to rows: how many `max_length` leaves out or cuts is said; more is not read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from trained_models import texts
from trainer_runs import OLD_NAMES, curve, trainer

pytestmark = OLD_NAMES
OUT = "the train dataset: {} of {} rows are left out, as args.max_length, 6 tokens, leaves nothing"
CUT = "the train dataset: {} of {} rows have {} args.max_length, 6 tokens; the rest of them is cut"
RESPONSES = {
    "dpo": {"chosen_ids": [6, 7, 8], "rejected_ids": [7]},
    "kto": {"completion_ids": [6, 7, 8], "label": True},
    "sft": {"completion_ids": [6, 7, 8]},
}


def ids(kind: str) -> list[dict[str, Any]]:
    """Prompts of 1 to 7 tokens, and responses of three."""
    return [{"prompt_ids": [5 + i] * i, **RESPONSES[kind]} for i in range(1, 8)]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("crossfade")]


@pytest.mark.parametrize("kind", RESPONSES)
def test_rows_of_ids(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Prompts of 6 and 7 tokens leave no room for a response, and those of 4 and 5 not all."""
    made = trainer(kind, tmp_path, rows=ids(kind), max_length=6)
    assert len(made.train_dataset) == 5
    out, cut = said(caplog)
    assert out.startswith(OUT.format(2, 7))
    # rows of SFT are cut when they are counted: that of 3 and 3 tokens just fits
    assert cut.startswith(
        CUT.format(*((3, 5, "at least") if kind == "sft" else (2, 5, "more than")))
    )


def test_pairs_that_become_rows_of_kto(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer("kto", tmp_path, rows=texts("dpo"), max_length=6)
    (cut,) = said(caplog)
    assert cut.startswith(CUT.format(24, 24, "more than"))


@pytest.mark.parametrize("kind", RESPONSES)
def test_rows_that_fit(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    trainer(kind, tmp_path / "a", rows=ids(kind))
    trainer(kind, tmp_path / "b", rows=ids(kind), max_length=None)
    packed = {"packing": True, "padding_free": False} if kind == "sft" else {}
    trainer(kind, tmp_path / "c", rows=texts(kind), **packed)
    assert said(caplog) == []


@pytest.mark.parametrize("kind", RESPONSES)
def test_columns_by_other_names_are_not_read(tmp_path: Path, kind: str) -> None:
    rows = texts(kind)
    more = [{**row, "note": f"w{i}", "score": 0.5 * i} for i, row in enumerate(rows)]
    a, b = (curve(trainer(kind, tmp_path, rows=x)) for x in (rows, more))
    assert [x["loss"] for x in a] == [x["loss"] for x in b]


@pytest.mark.parametrize(
    ("kind", "row", "hint"),
    [
        ("dpo", {"prompt": "w1", "chosen": "w2", "reject": "w3"}, "; did you mean 'rejected'?"),
        (
            "kto",
            {"prompt": "w1", "completions": "w2", "label": True},
            "; did you mean 'completion'",
        ),
        ("sft", {"promt": "w1", "completion": "w2"}, "; did you mean 'prompt'?"),
        ("sft", {"body": "w1"}, "or input_ids"),
    ],
)
def test_columns_that_are_misspelt(
    tmp_path: Path, kind: str, row: dict[str, Any], hint: str
) -> None:
    with pytest.raises(ValueError, match=f"it must have .*{re.escape(hint)}"):
        trainer(kind, tmp_path, rows=[row] * 2)


@pytest.mark.parametrize(
    ("kind", "loss", "hint"),
    [
        ("dpo", ["sigmoid", "ipo_pair"], "has 'ipo_pair'; .*, sigmoid_norm"),
        ("kto", "kto_pair", "has 'kto_pair'; it must be among kto, apo_zero_unpaired"),
        ("sft", "nl", "has 'nl'; it must be among nll, dft.*; did you mean 'nll'"),
    ],
)
def test_losses_that_trl_does_not_have(tmp_path: Path, kind: str, loss: Any, hint: str) -> None:
    """They are refused at once, and not in the first step."""
    with pytest.raises(ValueError, match=f"args.loss_type {hint}"):
        trainer(kind, tmp_path, loss_type=loss)
