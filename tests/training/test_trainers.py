"""Our trainers against TRL's own, step by step, and what each promises besides."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
import trl
from conftest import make, texts
from crossfade.ops import logp, logp_tiles
from crossfade.training import DPOTrainer, KTOTrainer, SFTTrainer, add_linear_logp
from crossfade.training.fused_head import Logits
from torch.utils._python_dispatch import TorchDispatchMode

LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
KINDS = {
    "sft": (SFTTrainer, trl.SFTTrainer, trl.SFTConfig),
    "dpo": (DPOTrainer, trl.DPOTrainer, trl.DPOConfig),
    "kto": (KTOTrainer, trl.KTOTrainer, trl.KTOConfig),
}

# TRL 1.16 and PEFT say by the old names what Transformers 5.23 renamed
pytestmark = pytest.mark.filterwarnings("ignore:`[a-z_.]*gradient_checkpointing:FutureWarning")


def arguments(kind: str, folder: Path, **options: Any) -> Any:
    defaults = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return KINDS[kind][2](**{**defaults, **options})


def trainer(
    kind: str,
    folder: Path,
    *,
    trls: bool = False,
    model: str = "llama",
    lora: bool | dict[str, Any] = True,
    rows: list[dict[str, Any]] | None = None,
    adapter: Any = None,
    others: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Ours, or TRL's own, over the same model, rows and seed."""
    if lora and adapter is None:
        adapter = peft.LoraConfig(**{**LORA, **(lora if isinstance(lora, dict) else {})})
    given = dict(others or {})
    if kind != "sft" and adapter is None and given.get("loss") not in ("orpo", "simpo"):
        given["ref_model"] = make(model).eval()
    return KINDS[kind][trls](
        make(model),
        args=arguments(kind, folder, **options),
        train_dataset=datasets.Dataset.from_list(texts(kind) if rows is None else rows),
        processing_class=tiny.make_tokenizer(),
        peft_config=adapter,
        **given,
    )


def curve(made: Any) -> list[dict[str, float]]:
    made.train()
    return [x for x in made.state.log_history if "loss" in x]


def check_same(kind: str, folder: Path, rtol: float = 2e-5, **options: Any) -> Any:
    """Every figure that is logged, of every step."""
    runs = {t: trainer(kind, folder / str(t), trls=t, **options) for t in (False, True)}
    for run in runs.values():
        run.train()
    ours, theirs = (runs[t].state.log_history for t in (False, True))
    assert len(ours) == len(theirs) > 1
    skipped = ("runtime", "per_second", "flos")
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.keys() == its.keys()
        for name in mine:
            if not name.endswith(skipped):
                assert mine[name] == pytest.approx(its[name], rel=rtol, abs=rtol), name
    assert ours[0]["loss"] != pytest.approx(ours[1].get("loss"), rel=1e-4)  # weights did move
    return runs[False]


# ---- The same curves as TRL's ------------------------------------------------------------------


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("model", ["llama", "tied", "softcap", "scale", "scaling"])
def test_dpo(tmp_path: Path, model: str, lora: bool) -> None:
    made = check_same("dpo", tmp_path, model=model, lora=lora)
    assert made.model.training


@pytest.mark.parametrize("kind", ["sft", "kto"])
@pytest.mark.parametrize("model", ["tied", "softcap"])
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
    """Where a trained head's loss is a mean of log-probs, as that of plain SFT is."""
    calls: list[int] = []

    to_keep = logp.to_keep

    def recorded_to_keep(*args: Any) -> int:
        calls.append(to_keep(*args))
        return calls[-1]

    monkeypatch.setattr(logp, "to_keep", recorded_to_keep)
    check_same(kind, tmp_path, **{"lora": False, **options})
    recorded = [x for x in calls if x != logp_tiles.NOTHING]  # checks and references have none
    assert set(recorded) == {kept} - {logp_tiles.NOTHING}
    assert not recorded or len(recorded) == 3  # steps


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_experts_balance(tmp_path: Path, kind: str) -> None:
    made = check_same(kind, tmp_path, model="experts", lora=False)
    assert made.state.log_history[0]["aux_loss"] > 0


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
def test_steps_of_parts(tmp_path: Path, kind: str) -> None:
    """Accumulated gradients, activations made again, and evaluation between steps."""
    rows = datasets.Dataset.from_list(texts(kind, 4))
    options = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "eval_steps": 2}
    options |= {"eval_strategy": "steps", "per_device_train_batch_size": 2, "max_steps": 2}
    check_same(kind, tmp_path, others={"eval_dataset": rows}, **options)


@pytest.mark.parametrize("loss", ["ipo", "robust", "aot", "sft"])
def test_losses_of_trl(tmp_path: Path, loss: str) -> None:
    smoothing = {"label_smoothing": 0.1} if loss == "robust" else {}
    check_same("dpo", tmp_path, loss_type=loss, lora=False, **smoothing)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trained_copy_of_head(tmp_path: Path, kind: str) -> None:
    """PEFT's `modules_to_save`: the head is a wrapper, the reference the head within it."""
    made = check_same(kind, tmp_path, lora={"modules_to_save": ["lm_head"]})
    head = made.model.get_base_model().lm_head
    copy = head.modules_to_save["default"].weight
    assert not torch.equal(copy, head.original_module.weight)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_prompt_learning(tmp_path: Path, kind: str) -> None:
    adapter = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    check_same(kind, tmp_path, adapter=adapter)


def test_bfloat16_autocast(tmp_path: Path) -> None:
    """As TRL's, whose head rounds products to bfloat16 there."""
    check_same("sft", tmp_path, rtol=3e-2, bf16=True, lora=False)


# ---- The first step ----------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_policy_is_reference(tmp_path: Path, lora: bool, bf16: bool) -> None:
    """To the last bit before the first step, so the loss is log 2 as float32 has it."""
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


# ---- The head alone ----------------------------------------------------------------------------


def ids_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(tiny.VOCAB, (3, 11), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.4, -100)
    return ids, labels


@pytest.mark.parametrize("name", ["llama", "tied", "softcap", "scale", "scaling", "bias"])
def test_every_field(name: str) -> None:
    """Against float64 log-softmax of the model's own logits."""
    model, ids = make(name).eval(), ids_and_labels()[0]
    labels = ids_and_labels()[1]
    z = model(input_ids=ids).logits[:, :-1].double()
    temperature = 1.7
    z, targets = z / temperature, labels[:, 1:]
    log_p, mask = z.log_softmax(-1), targets != -100
    logp = log_p.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    add_linear_logp(model, temperature, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    found = model(input_ids=ids, labels=labels, fused_lm_head=True)
    expected = {
        "log_probs": logp,
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "mean_logits": z.mean(-1),
        "is_top1": z.argmax(-1) == targets,
        "label_mask": mask,
    }
    for field, want in expected.items():
        got = getattr(found, field)
        want = want & mask if want.dtype == torch.bool else (want * mask).float()
        torch.testing.assert_close(got.detach(), want.detach(), rtol=1e-4, atol=2e-5, msg=field)
    want = -(logp * mask).sum() / mask.sum()
    torch.testing.assert_close(found.loss, want.float(), rtol=1e-5, atol=1e-6)
    sevenths = model(input_ids=ids, labels=labels, fused_lm_head=True, num_items_in_batch=7).loss
    torch.testing.assert_close(sevenths, found.loss * mask.sum() / 7)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    same = model(input_ids=ids, shift_labels=shifted, fused_lm_head=True)
    torch.testing.assert_close(same.log_probs[:, :-1], found.log_probs)

    grads = []
    for loss in (want.float(), found.loss):
        model.zero_grad()
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5)


def test_own_calls_are_left(tmp_path: Path) -> None:
    model, (ids, labels) = make().eval(), ids_and_labels()
    before = model(input_ids=ids, labels=labels)
    generated = model.generate(ids, max_new_tokens=3, do_sample=False, attention_mask=ids * 0 + 1)
    add_linear_logp(model)
    after = model(input_ids=ids, labels=labels)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)
    again = model.generate(ids, max_new_tokens=3, do_sample=False, attention_mask=ids * 0 + 1)
    assert torch.equal(generated, again)


def test_no_labels_at_all() -> None:
    """A microbatch may have none: its gradient is 0, not an error."""
    model, ids = make(), ids_and_labels()[0]
    add_linear_logp(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    found = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    found.loss.backward()
    assert found.loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("scale", "softcap"), [(1.0, None), (0.25, None), (3.0, None), (0.25, 2.0), (3.0, 2.0)]
)
def test_scale_and_softcap(scale: float, softcap: float | None) -> None:
    """``c tanh(s x / c) / T`` with a cap and a temperature alone."""
    x = torch.linspace(-9, 9, 31, dtype=torch.float64)
    z = scale * x
    z = z if softcap is None else softcap * (z / softcap).tanh()
    cap, temperature = Logits(scale, softcap, 1.3).settings()
    y = x if cap == 0 else cap * (x / cap).tanh()
    torch.testing.assert_close(y / temperature, z / 1.3)


def test_autocast_leaves_the_head_alone() -> None:
    model, (ids, labels) = make(), ids_and_labels()
    add_linear_logp(model)
    hidden: list[torch.Tensor] = []
    model.base_model.register_forward_hook(lambda _, __, out: hidden.append(out[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    log_p = (hidden[0][:, :-1].double() @ model.lm_head.weight.double().T).log_softmax(-1)
    targets = labels[:, 1:]
    want = log_p.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1) * (targets != -100)
    torch.testing.assert_close(found, want.float(), rtol=1e-5, atol=1e-5)


class _Logits(TorchDispatchMode):
    """Whether an operation makes a float tensor of tokens and vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, list[int]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dim() < 2:
                continue
            if x.shape[-1] == tiny.VOCAB and x.shape[-2] != tiny.SIZES["hidden_size"]:
                self.found.append((str(func), list(x.shape)))
        return result


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_no_logits_in_a_step(tmp_path: Path, kind: str, lora: bool) -> None:
    """Below the op, whose tiles its own tests see to; TRL's step does make them."""
    for trls in (False, True):
        made = trainer(kind, tmp_path, trls=trls, lora=lora)
        batch = next(iter(made.get_train_dataloader()))
        made.create_optimizer_and_scheduler(1)
        made.current_gradient_accumulation_steps = 1
        with _Logits() as mode:
            made.training_step(made.model, batch, torch.tensor(5))
        assert bool(mode.found) == trls, mode.found


# ---- Losses of crossfade -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("sigmoid", {"lora": True}),
        ("sigmoid", {"lora": False}),
        ("apo_zero", {"lora": True}),
        ("apo_zero", {"lora": False}),
        ("sigmoid", {"lora": False, "model": "experts"}),
        ("sigmoid", {"adapter": peft.PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=3)}),
    ],
    ids=str,
)
def test_loss_that_trl_has_too(tmp_path: Path, loss: str, options: dict[str, Any]) -> None:
    own = trainer("dpo", tmp_path / "a", **options, others={"loss": loss})
    trls = trainer("dpo", tmp_path / "b", trls=True, **options, loss_type=loss)
    for a, b in zip(curve(own), curve(trls), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=2e-5, abs=2e-5), name


def pair_sums(made: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs ``[2, pairs]`` of the first batch in float64, and the lengths."""
    batch = next(iter(made.get_train_dataloader()))
    with torch.no_grad():
        z = made.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    mask = batch["completion_mask"][:, 1:]
    log_p = z[:, :-1].double().log_softmax(-1)
    logp = log_p.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1) * mask
    return logp.sum(1).view(2, -1), mask.sum(1).view(2, -1)


@pytest.mark.parametrize("loss", ["orpo", "simpo"])
def test_losses_without_reference(tmp_path: Path, loss: str) -> None:
    """By hand, from the model's own logits; no reference is made."""
    options = {"lam": 0.7} if loss == "orpo" else {"beta": 1.5, "gamma": 0.3}
    others = {"loss": loss, "loss_options": options}
    made = trainer("dpo", tmp_path, lora=False, others=others, max_steps=4)
    assert made.ref_model is None
    sums, lengths = pair_sums(made)
    chosen, rejected = sums / lengths
    if loss == "simpo":
        want = -F.logsigmoid(1.5 * (chosen - rejected) - 0.3)
    else:
        odds = [m - torch.log(1 - m.exp()) for m in (chosen, rejected)]
        want = -chosen - 0.7 * F.logsigmoid(odds[0] - odds[1])
    torch.manual_seed(made.args.seed)
    steps = curve(made)
    assert steps[0]["loss"] == pytest.approx(float(want.mean()), rel=1e-4)
    scale = 1.5 if loss == "simpo" else 1.0
    margin = scale * float((chosen - rejected).mean())
    assert steps[0]["rewards/margins"] == pytest.approx(margin, rel=1e-4, abs=1e-5)
    assert steps[-1]["rewards/margins"] > steps[0]["rewards/margins"]
    assert steps[0]["logps/chosen"] == pytest.approx(float(sums[0].mean()), rel=1e-4)


def test_modpo(tmp_path: Path) -> None:
    """At the start there is no margin but the other objectives', of all rows' in one batch."""
    rows = [{**row, "margins": [0.5 * i, -1.0]} for i, row in enumerate(texts(rows=4))]
    options = {"weight": 0.4, "other_weights": [0.2, 0.4], "beta": 0.3}
    others = {"loss": "modpo", "loss_options": options}
    given = {"rows": rows, "per_device_train_batch_size": 4}
    first = curve(trainer("dpo", tmp_path / "a", others=others, **given))[0]
    want = [math.log1p(math.exp((0.2 * 0.5 * i - 0.4) / 0.4)) for i in range(4)]
    assert first["loss"] == pytest.approx(sum(want) / 4, rel=1e-5)
    # weight 1 and no others is DPO, references made before or not
    rows = [{**row, "margins": []} for row in rows]
    others["loss_options"] = {"weight": 1.0, "other_weights": [], "beta": 0.1}
    given["rows"] = rows
    eval_rows = datasets.Dataset.from_list(rows)
    for ready in (False, True):
        made = trainer(
            "dpo", tmp_path / "b", others=others, precompute_ref_log_probs=ready, **given
        )
        plain = curve(trainer("dpo", tmp_path / "c", **{**given, "rows": texts(rows=4)}))
        for a, b in zip(curve(made), plain, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert made.evaluate(eval_rows)["eval_loss"] < math.log(2)


# ---- Rows of ids -------------------------------------------------------------------------------


def encoded(kind: str) -> list[dict[str, Any]]:
    """Rows with texts that say something else than the ids beside them."""
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
    """As the texts that they encode are, whatever the texts beside them."""
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
    """Whether rows have prompt_ids and completion_ids, or a mask."""
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


@pytest.mark.parametrize("texts_too", [True, False])
@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
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


# ---- Checkpoints -------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_resumed_run(tmp_path: Path, lora: bool) -> None:
    """Goes on to the bit, from files that are read as weights alone."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "lora": lora}
    whole = curve(trainer("dpo", tmp_path / "a", **options))
    again = trainer("dpo", tmp_path / "b", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    rest = [x for x in again.state.log_history if "loss" in x]
    assert [x["loss"] for x in rest] == [x["loss"] for x in whole]
    assert rest[-1]["step"] == 5
    assert again.state.log_history[-1]["step"] == 5


# ---- Refusals ----------------------------------------------------------------------------------


def test_adapter_on_head(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lm_head"):
        trainer("dpo", tmp_path, lora={"target_modules": ["lm_head"]})


def test_head_of_another_kind() -> None:
    class Scaled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = make()
    model.lm_head = Scaled(16, tiny.VOCAB, bias=False)
    with pytest.raises(NotImplementedError, match="LlamaForCausalLM is a Scaled"):
        add_linear_logp(model)


def test_logits_that_config_does_not_tell() -> None:
    """A scale by a name that nobody knows is found by its effect."""
    model = make()
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        out.logits = out.logits * 1.5
        return out

    model.forward = forward
    with pytest.raises(NotImplementedError, match="more to its logits"):
        add_linear_logp(model)
    assert model.forward is forward
    scale = make("scale")
    scale.config.logit_scale = -0.5
    with pytest.raises(ValueError, match=r"-0\.5"):
        add_linear_logp(scale)


def test_modes_are_put_back() -> None:
    model = make()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    add_linear_logp(model)
    assert [m.training for m in model.modules()] == modes


def test_fields_that_are_not_there() -> None:
    with pytest.raises(NotImplementedError, match="log_sum_sq_probs"):
        add_linear_logp(make(), outputs=("log_probs", "log_sum_sq_probs"))


@pytest.mark.parametrize("temperature", [0, -1.0])
def test_temperatures_that_are_none(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature is {temperature}"):
        add_linear_logp(make(), temperature)


def test_weight_in_pieces_is_trls() -> None:
    model, (ids, labels) = make(), ids_and_labels()
    add_linear_logp(model)
    want = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    model.lm_head.weight.ds_id = 1  # as ZeRO-3 marks a parameter
    with pytest.warns(UserWarning, match="in pieces"):
        found = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    torch.testing.assert_close(found, want)


def test_weighting(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="use_weighting"):
        trainer("dpo", tmp_path, use_weighting=True)


@pytest.mark.parametrize(
    ("others", "options", "message"),
    [
        ({"loss": "dpo"}, {}, "loss is 'dpo'; it must be among sigmoid, "),
        ({"loss_options": {"beta": 1.0}}, {}, "loss is None"),
        ({"loss": "simpo", "loss_options": {"lam": 1.0}}, {}, "'lam'; for simpo it may have beta"),
        ({"loss": "simpo", "loss_options": {"beta": -1.0}}, {}, "beta is -1.0"),
        ({"loss": "sigmoid"}, {"beta": 0.5}, "args.beta is 0.5"),
        ({"loss": "sigmoid"}, {"loss_type": "ipo"}, r"args.loss_type is \['ipo'\]"),
        ({"loss": "simpo"}, {"precompute_ref_log_probs": True}, "has no reference"),
        ({"loss": "modpo"}, {}, "no 'weight'"),
        (
            {"loss": "modpo", "loss_options": {"weight": 1.0, "other_weights": [1.0]}},
            {},
            "must have margins",
        ),
    ],
)
def test_losses_that_do_not_fit(
    tmp_path: Path, others: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer("dpo", tmp_path, others=others, **options)


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
    """TRL's own trainers of the same process keep their own log-probs."""
    import trl.trainer.dpo_trainer as module

    before = module.add_fused_lm_head
    with pytest.raises(ValueError, match="columns"):
        trainer("dpo", tmp_path, rows=[{"prompt": "a"}])
    trainer("dpo", tmp_path)
    assert module.add_fused_lm_head is before
