"""KTO's mismatched responses answer other prompts, and are those of TRL where these do too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny_models as tiny
import trl
from crossfade.training import KTOTrainer
from crossfade.training.trainers.kto import CHUNK, mismatched, with_kl_responses
from hypothesis import given, settings
from hypothesis import strategies as st
from trained_models import make
from trainer_runs import OLD_NAMES

pytestmark = OLD_NAMES


def ids_of(prompts: Sequence[int]) -> list[dict[str, Any]]:
    """Row i answers its prompt with the id 10 + i."""
    return [
        {"prompt_ids": [5, 40 + p], "completion_ids": [10 + i], "label": i % 2 == 0}
        for i, p in enumerate(prompts)
    ]


def made(folder: Path, kind: Any, rows: list[dict[str, Any]], stream: bool = False) -> Any:
    args = trl.KTOConfig(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=3,
        report_to="none",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    found = datasets.Dataset.from_list(rows)
    return kind(
        make(),
        make(),
        args=args,
        train_dataset=found.to_iterable_dataset() if stream else found,
        processing_class=tiny.make_tokenizer(),
    )


def responses(trainer: Any) -> list[list[int]]:
    return [row["KL_completion_ids"] for row in trainer.train_dataset]


PROMPTS = {
    "pairs": [0, 0, 1, 1, 2, 2, 3],
    "a batch of one prompt": [0, 0, 0, 1, 1, 1],
    "two of three": [0, 1, 0, 2, 2, 3],
    "one row left": [0, 1, 2, 3],
    "one row left, of the same prompt": [0, 1, 2, 2],
}


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("stream", [False, True], ids=["dataset", "stream"])
def test_no_response_is_to_its_own_prompt(tmp_path: Path, name: str, stream: bool) -> None:
    prompts = PROMPTS[name]
    trainer = made(tmp_path, KTOTrainer, ids_of(prompts), stream)
    for i, (response,) in enumerate(responses(trainer)):
        assert prompts[response - 10] != prompts[i]
    trainer.train()


def test_texts_with_equal_prompts(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"the film w{p}", "completion": f" w{i}", "label": i % 2 == 0}
        for i, p in enumerate([1, 1, 2, 2])
    ]
    trainer = made(tmp_path, KTOTrainer, rows)
    given = trainer.train_dataset
    own = {tuple(r["completion_ids"]): r["prompt_ids"] for r in given}
    for row in given:
        assert own[tuple(row["KL_completion_ids"])] != row["prompt_ids"]


def test_trls_own_where_prompts_differ(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"the film w{i}", "completion": f" w{10 + i}", "label": i % 2 == 0}
        for i in range(6)
    ]
    ours, theirs = (responses(made(tmp_path, k, rows)) for k in (KTOTrainer, trl.KTOTrainer))
    assert ours == theirs


def test_one_prompt_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the train dataset has one prompt in all its rows"):
        made(tmp_path, KTOTrainer, ids_of([0, 0, 0]))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=24), st.integers(1, 6))
def test_any_prompts(prompts: list[int], size: int) -> None:
    if len(set(prompts)) == 1:
        with pytest.raises(ValueError, match="one prompt"):
            mismatched(prompts, size)
        return
    found = mismatched(prompts, size)
    assert all(prompts[i] != prompts[j] for i, j in enumerate(found))
    for start in range(0, len(prompts), size):
        batch = range(start, min(start + size, len(prompts)))
        most = max(Counter(prompts[i] for i in batch).values())
        if 2 * most <= len(batch):  # then an order of the batch's own responses exists
            assert sorted(found[start : start + size]) == list(batch)


def test_stream_of_many_batches() -> None:
    """A response comes from the chunk of the row, or from the one before."""
    prompts = [i // 2 for i in range(2 * CHUNK)] + [CHUNK - 1]
    stream = datasets.Dataset.from_list(ids_of(prompts)).to_iterable_dataset()
    found = [row["KL_completion_ids"][0] - 10 for row in with_kl_responses(stream, 2, "rows")]
    assert all(prompts[i] != prompts[j] for i, j in enumerate(found))
