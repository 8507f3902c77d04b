"""Rows that value heads are trained on: ids, texts and chats, whole and cut, right and wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.models.value_heads import value_model
from crossfade.training.value.rollouts import Rollouts, collate
from tiny_models import (
    VOCAB,
    make,
    make_letters,
    make_tokenizer,
)
from value_runs import (
    OK,
    WARNINGS,
    each_objective,
    fill,
    mean,
    row_losses,
    rows,
    trainer,
)

pytestmark = WARNINGS


@each_objective
@pytest.mark.parametrize("unfinished", [None, "drop", "score"])
def test_rollouts_that_were_cut(
    objective: str, unfinished: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = make("llama")
    model, data = fill(value_model(base, "scalar")), rows(6)
    for i in (1, 4):
        data[i] |= {"finished": False, "completion_ids": data[i]["completion_ids"][:-1]}
    run = trainer(
        tmp_path, model, data, objective=objective, unfinished=unfinished, eval_dataset=data
    )
    drops = unfinished == "drop" or (unfinished is None and objective == "cd_q")
    said = "train_dataset: 2 of 6 rollouts are left out, as they were cut" in caplog.text
    assert said == drops
    kept = [r for r in data if r["finished"] or not drops]
    losses, _ = row_losses(base, model, kept, objective)
    assert run.evaluate()["eval_loss"] == pytest.approx(mean(losses), rel=1e-4)
    cut = [data[1], data[4]]
    if drops:
        with pytest.raises(ValueError, match=r"has 2 rows and none is left, as none of them is f"):
            trainer(tmp_path, model, cut, objective=objective, unfinished=unfinished)


def test_a_token_that_would_span_prompt_and_completion_leaves_the_prompt_as_it_is() -> None:
    """The base wrote its response after those ids, and `score` reads the two that way too."""
    tokenizer = make_letters()
    prompt, completion = "cba", "de"
    alone, together = (tokenizer(x)["input_ids"] for x in (prompt, prompt + completion))
    assert together[: len(alone)] != alone, "a token spans the two"
    row = {"prompt": prompt, "completion": completion, "reward": 1.0, "finished": False}
    (found,) = Rollouts([row], tokenizer, VOCAB, "score", "rows").rows
    assert found.prompt == alone
    assert tokenizer.decode(found.completion) == completion
    term = cf.Model(make(), tokenizer=tokenizer)
    read = cf.score(term, [found.prompt], [found.completion]).logprobs
    assert torch.equal(read, cf.score(term, [prompt], [completion]).logprobs)


def test_texts_and_chats() -> None:
    tokenizer = make_tokenizer()
    chat = [{"role": "user", "content": "the plot"}]
    answer = [{"role": "assistant", "content": "was very dull"}]
    common = {"reward": 1.0, "finished": True}
    data = [
        {"prompt": "the film", "completion": " was great", **common},
        {"prompt": "the film", "completion": " was great", **common, "finished": False},
        {"prompt": chat, "completion": answer, **common},
        {"prompt": [*chat, {"role": "assistant", "content": "was"}], "completion": " w3", **common},
    ]
    found = Rollouts(data, tokenizer, VOCAB, "score", "rows").rows

    def words(text: str) -> list[int]:
        return tokenizer.convert_tokens_to_ids(text.split())

    assert [(r.prompt, r.completion) for r in found] == [
        (words("the film"), words("was great <eos>")),
        (words("the film"), words("was great")),
        (words("<bos> user : the plot <eos> <bos> assistant :"), words("was very dull <eos>")),
        (words("<bos> user : the plot <eos> <bos> assistant : was"), words("w3 <eos>")),
    ]
    trained = [{"prompt": chat, "completion": answer, **common}]
    asked = cf.decoding.inputs.encode(chat, tokenizer, "x")
    assert Rollouts(trained, tokenizer, VOCAB, "score", "rows").rows[0].prompt == asked


def test_the_parts_of_a_message_are_one_text() -> None:
    tokenizer = make_tokenizer()

    def rollouts(content: Any) -> Any:
        chat = [{"role": "user", "content": content}]
        row = {"prompt": chat, "completion": " was great", "reward": 1.0, "finished": True}
        return Rollouts([row], tokenizer, VOCAB, "score", "rows").rows

    assert rollouts([{"type": "text", "text": "the plot"}]) == rollouts("the plot")


def test_a_dataset_is_rows(tmp_path: Path) -> None:
    from datasets import Dataset

    data = rows(5)
    one = Rollouts(data, None, VOCAB, "drop", "rows").rows
    assert Rollouts(Dataset.from_list(data), None, VOCAB, "drop", "rows").rows == one


def test_batches_end_in_padding() -> None:
    data = Rollouts(
        [
            {"prompt_ids": [5, 6], "completion_ids": [7], "reward": 1, "finished": True},
            {"prompt_ids": [8], "completion_ids": [9, 10, 1], "reward": -2.5, "finished": True},
        ],
        None,
        VOCAB,
        "drop",
        "rows",
    )
    batch = {k: v.tolist() for k, v in collate([data[0], data[1]]).items()}
    assert batch == {
        "labels": [[7, -100, -100], [9, 10, 1]],
        "lengths": [1, 3],
        "rewards": [1.0, -2.5],
        "input_ids": [[5, 6, 7, 0], [8, 9, 10, 1]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 1, 1]],
        "starts": [2, 1],
    }


TEXT = {"prompt": "a", "completion": "b", "reward": 1.0, "finished": True}
BAD_ROWS: dict[str, tuple[Any, type[Exception], str]] = {
    "stream": (iter([OK]), TypeError, "data is a list_iterator; it must be a list of rows"),
    "none": ([], ValueError, "data has 0 rows and none is left; it must have one"),
    "no mapping": ([OK, 3], TypeError, "row 1 of data is a int; it must be a mapping"),
    "no reward": ([{**OK, "reward": None}], ValueError, "row 0 of data has no reward; it must"),
    "no completion": ([{"prompt_ids": [5]}], ValueError, "has no completion_ids; it must have"),
    "no finished": ([{k: OK[k] for k in ("prompt_ids", "completion_ids", "reward")}], ValueError,
                    "has no finished; it must"),
    "reward": ([{**OK, "reward": "x"}], TypeError, "reward of row 0 of data is 'x'; it must be a"),
    "nan": ([{**OK, "reward": float("nan")}], ValueError, "is nan; it must be finite"),
    "finished": ([{**OK, "finished": 1}], TypeError, "finished of row 0 of data is 1; it must be"),
    "ids": ([{**OK, "prompt_ids": [5.0]}], TypeError, "prompt_ids of row 0 of data has 5.0; it"),
    "no ids": ([{**OK, "completion_ids": []}], ValueError, "completion_ids of row 0 .* no tokens"),
    "high": ([{**OK, "prompt_ids": [VOCAB]}], ValueError, r"has id 61; ids must be .* \[0, 61\)"),
    "low": ([{**OK, "completion_ids": [-1]}], ValueError, r"has id -1; ids must be within"),
    "text": ([TEXT], ValueError, "row 0 of data is text and processing_class is None; it must"),
    "two": ([{**TEXT, "completion": []}], ValueError, r"completion of row 0 .* is \[\]; it must"),
    "kinds": ([{**TEXT, "prompt": 3}], TypeError, "has the prompt 3 and the completion 'b'; they"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_ROWS.values(), ids=BAD_ROWS)
def test_what_is_wrong_in_rows_is_named(bad: tuple[Any, type[Exception], str]) -> None:
    tokenizer = None if "processing_class" in bad[2] else make_tokenizer()
    with pytest.raises(bad[1], match=bad[2]):
        Rollouts(bad[0], tokenizer, VOCAB, "score", "data")


def test_a_tokenizer_without_eos() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="row 0 of data is finished, and the tokenizer has no EOS"):
        Rollouts([TEXT], tokenizer, VOCAB, "score", "data")
