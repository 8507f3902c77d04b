"""Our trainers give the curves of TRL's own, whatever rows, adapters and options they have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import tiny_models as tiny
import torch
from crossfade.ops.logp import api as logp_api
from crossfade.ops.logp import tiles as logp_tiles
from sweeps import every, product
from trained_models import texts
from trainer_runs import OLD_NAMES, check_same, curve, trainer

pytestmark = OLD_NAMES


@pytest.mark.parametrize(
    ("model", "lora"),
    product(["llama", "tied", "softcap", "scale", "scaling"], [True, False], together=1),
)
def test_dpo(tmp_path: Path, model: str, lora: bool) -> None:
    made = check_same("dpo", tmp_path, model=model, lora=lora)
    assert made.model.training


@pytest.mark.parametrize(
    ("kind", "model"), product(["sft", "kto"], ["tied", "softcap"], together=1)
)
def test_other_trainers(tmp_path: Path, kind: str, model: str) -> None:
    check_same(kind, tmp_path, model=model, lora=model == "softcap")


@pytest.mark.parametrize(
    ("kind", "options", "kept"),
    [
        ("sft", {}, logp_tiles.SUM),
        ("sft", {"loss_type": "dft"}, logp_tiles.NOTHING),
        ("sft", {"lora": True}, logp_tiles.MEAN),
        ("dpo", {}, logp_tiles.NOTHING),
    ],
    ids=str,
)
def test_gradients_in_the_forward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, Any], kept: int
) -> None:
    """SFT trains the head by a mean of log-probs, so its gradients are made in the forward pass."""
    calls: list[int] = []

    to_keep = logp_api.to_keep

    def recorded_to_keep(*args: Any) -> int:
        calls.append(to_keep(*args))
        return calls[-1]

    monkeypatch.setattr(logp_api, "to_keep", recorded_to_keep)
    check_same(kind, tmp_path, **{"lora": False, **options})
    # checks and references need no gradients
    recorded = [x for x in calls if x != logp_tiles.NOTHING]
    assert set(recorded) == {kept} - {logp_tiles.NOTHING}
    assert not recorded or len(recorded) == 3  # one a step


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_experts_balance(tmp_path: Path, kind: str) -> None:
    made = check_same(kind, tmp_path, model="experts", lora=False)
    assert made.state.log_history[0]["aux_loss"] > 0


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_steps_of_parts(tmp_path: Path, kind: str) -> None:
    """Gradients are accumulated, activations recomputed, and steps interrupted by evaluation."""
    rows = datasets.Dataset.from_list(texts(kind, 4))
    options = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "eval_steps": 2}
    options |= {"eval_strategy": "steps", "per_device_train_batch_size": 2, "max_steps": 2}
    check_same(kind, tmp_path, others={"eval_dataset": rows}, **options)


@pytest.mark.parametrize("loss", every(2, ["ipo", "robust", "aot", "sft"], keep=["robust"]))
def test_losses_of_trl(tmp_path: Path, loss: str) -> None:
    smoothing = {"label_smoothing": 0.1} if loss == "robust" else {}
    check_same("dpo", tmp_path, loss_type=loss, lora=False, **smoothing)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trained_copy_of_head(tmp_path: Path, kind: str) -> None:
    """With PEFT's `modules_to_save` the head is a wrapper; the reference reads the head inside."""
    made = check_same(kind, tmp_path, lora={"modules_to_save": ["lm_head"]})
    head = made.model.get_base_model().lm_head
    copy = head.modules_to_save["default"].weight
    assert not torch.equal(copy, head.original_module.weight)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_prompt_learning(tmp_path: Path, kind: str) -> None:
    adapter = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    check_same(kind, tmp_path, adapter=adapter)


def test_bfloat16_autocast(tmp_path: Path) -> None:
    """The curve is only near TRL's, whose head rounds products to bfloat16."""
    check_same("sft", tmp_path, rtol=3e-2, bf16=True, lora=False)


@pytest.mark.parametrize(("bf16", "lora"), product([False, True], [True, False], together=1))
def test_policy_is_reference(tmp_path: Path, lora: bool, bf16: bool) -> None:
    """Before the first step the two are equal to the last bit, so the loss is float32's log 2."""
    made = trainer("dpo", tmp_path, lora=lora, bf16=bf16, max_steps=1)
    (first,) = curve(made)
    assert first["loss"] == float(torch.tensor(2.0).log())
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0
    assert first["rewards/accuracies"] == 0


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_precomputed_references(tmp_path: Path, lora: bool) -> None:
    options = {"lora": lora, "per_device_train_batch_size": 4}
    ready = trainer("dpo", tmp_path / "a", precompute_ref_log_probs=True, **options)
    assert {"ref_chosen_logps", "ref_rejected_logps"} <= set(ready.train_dataset.column_names)
    ready, online = curve(ready), curve(trainer("dpo", tmp_path / "b", **options))
    for a, b in zip(ready, online, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["rewards/margins"] == pytest.approx(b["rewards/margins"], abs=1e-5)


def encoded(kind: str) -> list[dict[str, Any]]:
    """Rows that have ids, and beside them texts that say something else."""
    tokenizer = tiny.make_tokenizer()
    rows = []
    for row in texts(kind):
        ids = {
            f"{name}_ids": tokenizer(text)["input_ids"]
            for name, text in row.items()
            if isinstance(text, str)
        }
        rows.append({k: "w9" if isinstance(v, str) else v for k, v in row.items()} | ids)
    return rows


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_ids_are_trained_on(tmp_path: Path, kind: str) -> None:
    """Ids give the curve of the texts that they encode, whatever texts are beside them."""
    of_ids = curve(trainer(kind, tmp_path / "a", rows=encoded(kind)))
    of_texts = curve(trainer(kind, tmp_path / "b"))
    for a, b in zip(of_ids, of_texts, strict=True):
        for name in a:
            assert a[name] == b[name], name


def test_ids_without_texts(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k.endswith("_ids")} for row in encoded("dpo")]
    of_ids = curve(trainer("dpo", tmp_path / "a", rows=rows))
    assert of_ids == curve(trainer("dpo", tmp_path / "b", rows=encoded("dpo")))


@pytest.mark.parametrize("every", [None, False])
def test_labels_of_completions(tmp_path: Path, every: bool | None) -> None:
    """Labels are the same for rows of prompt_ids and completion_ids, and rows with a mask."""
    prompt, response = [5, 6, 7], [8, 9, tiny.EOS]
    forms: list[dict[str, Any]] = [
        {"prompt_ids": prompt, "completion_ids": response},
        {"input_ids": prompt + response, "completion_mask": [0, 0, 0, 1, 1, 1]},
    ]
    for form in forms:
        made = trainer("sft", tmp_path, rows=[form] * 2, completion_only_loss=every)
        row = made.train_dataset[0]
        assert row["input_ids"] == prompt + response
        assert row["labels"] == ([-100] * 3 if every is None else prompt) + response


def test_masks_of_assistants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 1, 1, 1]}
    masked = {**row, "assistant_masks": [1, 1, 0, 1]}
    made = trainer("sft", tmp_path, rows=[masked] * 2)
    assert made.train_dataset[0]["labels"] == [-100, 6, -100, 8]
    marked = tiny.make_tokenizer()
    marked.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }} <eos>"
        "{% endgeneration %}{% else %}{{ m.content }} {% endif %}{% endfor %}"
    )
    monkeypatch.setattr(tiny, "make_tokenizer", lambda: marked)
    user, assistant = ({"role": r, "content": "w9"} for r in ("user", "assistant"))
    chat = {"prompt": [user], "completion": [assistant]}
    for columns in (row, {"prompt_ids": [5], "completion_ids": [6]}):
        with pytest.raises(ValueError, match="the dataset is of ids without assistant_masks"):
            trainer("sft", tmp_path, rows=[{**chat, **columns}] * 2, assistant_only_loss=True)


@pytest.mark.parametrize(
    ("kind", "texts_too"), product(["sft", "dpo", "kto"], [True, False], together=1)
)
def test_prompts_that_all_fill_all(tmp_path: Path, kind: str, texts_too: bool) -> None:
    rows = texts(kind) if texts_too else encoded(kind)
    for row in rows:
        if texts_too:
            row["prompt"] = " ".join(["w9"] * 20)
        else:
            row["prompt_ids"] = [7] * 20
    with pytest.raises(ValueError, match=r"has no row left: none has a token .*, 8 tokens"):
        trainer(kind, tmp_path, rows=rows, max_length=8)


def test_prompts_that_fill_all(tmp_path: Path) -> None:
    rows = encoded("dpo")
    rows[3]["prompt_ids"] = [7] * 20
    assert len(trainer("dpo", tmp_path, rows=rows, max_length=20).train_dataset) == len(rows) - 1


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_resumed_run(tmp_path: Path, lora: bool) -> None:
    """A resumed run ends with the same bits, and loads no pickled objects."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "lora": lora}
    whole = curve(trainer("dpo", tmp_path / "a", **options))
    again = trainer("dpo", tmp_path / "b", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    rest = [x for x in again.state.log_history if "loss" in x]
    assert [x["loss"] for x in rest] == [x["loss"] for x in whole]
    assert rest[-1]["step"] == 5
    assert again.state.log_history[-1]["step"] == 5


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("dpo", {"prompt": "a", "completion": "b"}, "must have prompt, chosen and rejected"),
        ("dpo", {"prompt_ids": [5], "chosen_ids": [6]}, "no rejected_ids"),
        (
            "dpo",
            {"prompt": "a", "chosen": "b", "rejected": "c", "chosen_ids": [6]},
            "no prompt_ids",
        ),
        ("sft", {"prompt": "a", "completion": "b", "completion_ids": [6]}, "no prompt_ids"),
        (
            "kto",
            {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7], "prompt": "a"},
            "KTO is of single responses",
        ),
        ("sft", {"prompt": "a", "chosen": "b"}, "must have prompt and completion"),
        ("sft", {"prompt_ids": [5], "chosen_ids": [6]}, "no completion_ids"),
        ("kto", {"prompt": "a", "completion": "b"}, "completion and label"),
    ],
)
def test_columns_that_are_not_there(
    tmp_path: Path, kind: str, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(kind, tmp_path, rows=[row] * 3)


def test_trls_modules_are_as_before(tmp_path: Path) -> None:
    """TRL's own trainers in the same process keep computing log-probs in their own way."""
    import trl.trainer.dpo_trainer as module

    before = module.add_fused_lm_head
    with pytest.raises(ValueError, match="columns"):
        trainer("dpo", tmp_path, rows=[{"prompt": "a"}])
    trainer("dpo", tmp_path)
    assert module.add_fused_lm_head is before
