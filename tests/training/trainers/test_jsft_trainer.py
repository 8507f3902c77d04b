"""Rows of answers and of judgments are trained together, with the weight that each should have."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import tiny_models as tiny
import torch
from crossfade.training import JSFTTrainer, SFTTrainer
from trained_models import make
from trainer_runs import LORA, OLD_NAMES, arguments, curve

pytestmark = OLD_NAMES
WEIGHT = 5.0


def mixed(rows: int = 12) -> list[dict[str, Any]]:
    """Every third row is an answer, the others are judgments, one of them with a rationale."""
    found = []
    for i in range(rows):
        judge = i % 3 != 0
        prompt = [3, 4, 5 + i % 5] + [6] * (4 * judge)
        answer = [8 + i % 2] + [20] * (i == 4) if judge else [10 + i, 11, 12 + i, tiny.EOS]
        found.append({"prompt_ids": prompt, "completion_ids": answer, "judge": judge})
    return found


def trainer(
    folder: Path,
    rows: list[dict[str, Any]] | None = None,
    kind: Any = JSFTTrainer,
    lora: bool = True,
    model: str = "llama",
    given: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    return kind(
        make(model),
        args=arguments("sft", folder, **{"max_grad_norm": 0.0, "warmup_steps": 0, **options}),
        train_dataset=datasets.Dataset.from_list(mixed() if rows is None else rows),
        processing_class=tiny.make_tokenizer(),
        peft_config=peft.LoraConfig(**LORA) if lora else None,
        **(given or {}),
    )


def weights_of(made: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in made.model.parameters() if p.requires_grad]


def reference(model: Any, rows: list[dict[str, Any]], weight: float) -> dict[str, Any]:
    """The loss and its parts by plain logits, one row after another."""
    total = sums = hits = labels = 0.0
    of: dict[bool, list[float]] = {True: [0.0, 0], False: [0.0, 0]}
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        nll = -logp.gather(1, ids[0, 1:, None])[:, 0][len(row["prompt_ids"]) - 1 :]
        w = weight if row["judge"] else 1.0
        total, sums = total + w * nll.sum(), sums + w * len(nll)
        of[row["judge"]][0] += nll.sum().item()
        of[row["judge"]][1] += len(nll)
        if row["judge"]:
            labels += 1
            hits += int(logp[len(row["prompt_ids"]) - 1].argmax()) == row["completion_ids"][0]
    figures = {"loss": (total / sums).item(), "judge_accuracy": hits / max(labels, 1)}
    figures |= {
        f"loss/{n}": of[k][0] / max(of[k][1], 1) for n, k in (("judge", True), ("sft", False))
    }
    return {"total": total / sums, **figures}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 3},
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 5},
        {"padding_free": True, "max_length": None},
        {"gradient_checkpointing": True},
    ],
    ids=["batch", "accumulated", "uneven", "padding_free", "checkpointing"],
)
def test_the_loss_is_the_weighted_mean_of_all_batches_of_a_step(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """Its gradient too: all weights make one step of plain SGD."""
    given = {"per_device_train_batch_size": 12, "max_steps": 1, "optim": "sgd"}
    options = {**given, "learning_rate": 1.0, "lr_scheduler_type": "constant", **options}
    made = trainer(tmp_path, lora=False, given={"judge_weight": WEIGHT}, **options)
    model = make()
    wanted = reference(model, mixed(), WEIGHT)
    before = dict(model.named_parameters())
    gradients = torch.autograd.grad(wanted["total"], list(before.values()))
    (told,) = curve(made)
    for name in ("loss", "judge_accuracy", "loss/sft", "loss/judge"):
        assert told[name] == pytest.approx(wanted[name], rel=1e-5), name
    after = dict(made.model.named_parameters())
    for (name, x), gradient in zip(before.items(), gradients, strict=True):
        torch.testing.assert_close(after[name], x - gradient, rtol=1e-4, atol=1e-5)


def test_a_weight_below_one_counts_where_a_batch_has_few_tokens(tmp_path: Path) -> None:
    """TRL takes one for a number of tokens below it; the weights of a batch may sum to less."""
    rows = [row for row in mixed() if row["judge"]][:2]
    given = {"judge_weight": 0.1}
    made = trainer(tmp_path, rows, given=given, per_device_train_batch_size=2, max_steps=1)
    (told,) = curve(made)
    assert told["loss"] == pytest.approx(reference(make(), rows, 0.1)["loss"], rel=1e-5)
    assert "loss/sft" not in told


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_weight_one_is_the_sft_trainer(tmp_path: Path, lora: bool) -> None:
    options = {"lora": lora, "gradient_accumulation_steps": 2}
    ours, plain = (
        trainer(tmp_path / kind.__name__, kind=kind, **options)
        for kind in (JSFTTrainer, SFTTrainer)
    )
    for mine, its in zip(curve(ours), curve(plain), strict=True):
        assert {k: v for k, v in mine.items() if k in its} == its
        assert {*mine} - {*its} == {"loss/sft", "loss/judge", "judge_accuracy"}
    for x, y in zip(weights_of(ours), weights_of(plain), strict=True):
        assert torch.equal(x, y)


def test_rows_without_judge_are_answers(tmp_path: Path) -> None:
    rows = mixed()
    for row in rows:
        if not row["judge"]:
            row["judge"] = None  # as a table holds it where a row had no such key
    some = trainer(tmp_path / "some", rows, given={"judge_weight": WEIGHT})
    assert curve(some) == curve(trainer(tmp_path / "all", given={"judge_weight": WEIGHT}))
    rows = [{k: v for k, v in row.items() if k != "judge"} for row in rows]
    none = curve(trainer(tmp_path / "none", rows, given={"judge_weight": WEIGHT}))
    plain = curve(trainer(tmp_path / "plain", rows, kind=SFTTrainer))
    assert [x["loss"] for x in none] == pytest.approx([x["loss"] for x in plain])
    assert "judge_accuracy" not in none[0]


def test_evaluation_counts_each_row_once(tmp_path: Path) -> None:
    """The last batch is smaller. The figures of rows are of all rows, not means of batches."""
    data = datasets.Dataset.from_list(mixed(11))
    given = {"judge_weight": WEIGHT, "eval_dataset": data}
    made = trainer(tmp_path, given=given, max_steps=1, per_device_eval_batch_size=4)
    with torch.no_grad():
        wanted = reference(make(), mixed(11), WEIGHT)
    for found in (made.evaluate(), made.evaluate(data)):
        for name in ("judge_accuracy", "loss/sft", "loss/judge"):
            assert found[f"eval_{name}"] == pytest.approx(wanted[name], rel=1e-5), name
    whole = trainer(tmp_path, given=given, max_steps=1, per_device_eval_batch_size=11)
    assert whole.evaluate()["eval_loss"] == pytest.approx(wanted["loss"], rel=1e-5)


@pytest.mark.parametrize(("model", "bf16"), [("llama", True), ("experts", False)])
def test_autocast_and_experts(tmp_path: Path, model: str, bf16: bool) -> None:
    options = {"lora": False, "model": model, "bf16": bf16, "max_steps": 1}
    told = {}
    for name, given in (("weighted", {"judge_weight": WEIGHT}), ("plain", {})):
        (told[name],) = curve(trainer(tmp_path / name, given=given, **options))
    for name in ("loss/sft", "loss/judge", "judge_accuracy"):
        assert told["weighted"][name] == told["plain"][name]
    assert told["weighted"]["loss"] != pytest.approx(told["plain"]["loss"], rel=1e-3)
    if model == "experts":
        assert told["weighted"]["aux_loss"] == told["plain"]["aux_loss"]


def test_prompt_learning(tmp_path: Path) -> None:
    adapter = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    given = {"judge_weight": WEIGHT, "peft_config": adapter}
    made = JSFTTrainer(
        make(),
        args=arguments("sft", tmp_path, max_steps=1, per_device_train_batch_size=12),
        train_dataset=datasets.Dataset.from_list(mixed()),
        processing_class=tiny.make_tokenizer(),
        **given,
    )
    (told,) = curve(made)
    counts = {True: 9.0, False: 16.0}
    parts = WEIGHT * counts[True] * told["loss/judge"] + counts[False] * told["loss/sft"]
    assert told["loss"] == pytest.approx(parts / (WEIGHT * counts[True] + counts[False]), rel=1e-5)


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_long_rows_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str
) -> None:
    """A cut from the left loses a judgment's question, one from the right its label."""
    rows = mixed()
    long = copy.deepcopy(rows[1:4])
    long[0]["prompt_ids"] = [3] * 30
    long[1]["prompt_ids"] = [3] * 9  # 10 tokens with the label
    long[2]["completion_ids"] = [4] * 30
    before = copy.deepcopy([*rows, *long])
    with caplog.at_level(logging.WARNING):
        made = trainer(tmp_path, [*rows, *long], max_length=9, truncation_mode=mode)
    assert [row["input_ids"] for row in made.train_dataset] == [
        row["prompt_ids"] + row["completion_ids"] for row in rows
    ]
    assert caplog.messages == [
        "the train dataset: 3 of 15 rows are left out, as they are longer than args.max_length, 9 "
        "tokens; 2 of them are judgments"
    ]
    assert before == [*rows, *long]
    with pytest.raises(ValueError, match="the train dataset has no row left: all are longer than"):
        trainer(tmp_path, long, max_length=9)


def test_texts_that_are_too_long_are_left_out_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"prompt": "the film was", "completion": " great" + " cast" * n + " <eos>"}
        for n in (0, 5, 1)
    ]
    made = trainer(tmp_path, rows, max_length=7)
    assert len(made.train_dataset) == 2
    assert "1 of 3 rows are left out" in caplog.text


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({}, {"judge_weight": 0}, "judge_weight is 0; it must be above 0"),
        ({}, {"judge_weight": float("nan")}, "judge_weight is nan; it must be finite"),
        ({"packing": True}, {}, "args.packing is True; it must be False"),
        ({"eval_packing": True}, {}, "args.eval_packing is True; it must be False"),
        ({"loss_type": "dft"}, {"judge_weight": 2}, "args.loss_type is 'dft', and judge_weight"),
        (
            {"label_smoothing_factor": 0.1},
            {"judge_weight": 2},
            "args.label_smoothing_factor is 0.1, and judge_weight is 2.0",
        ),
    ],
)
def test_refusals(
    tmp_path: Path, options: dict[str, Any], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, given=given, **options)


@pytest.mark.filterwarnings("ignore:`compute_loss_func` is deprecated:FutureWarning")
def test_own_losses_have_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compute_loss_func is given, and judge_weight"):
        trainer(tmp_path, given={"compute_loss_func": print, "judge_weight": 2})


def test_wrong_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "the film was", "completion": " great", "judge": True}]
    with pytest.raises(ValueError, match="has judge, but no prompt_ids and completion_ids"):
        trainer(tmp_path, rows)
    rows = [row | {"judge": 2} for row in mixed()]
    with pytest.raises(TypeError, match="judge of row 0 of the train dataset is 2; it must be a b"):
        trainer(tmp_path, rows)
