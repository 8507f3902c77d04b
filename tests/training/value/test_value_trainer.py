"""Training of value heads against loops by hand in float64, and on tasks with known values."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.models.saved_value_heads import load_value_head
from crossfade.models.value_heads import value_head, value_model
from tiny_models import (
    EOS,
    SHAPES,
    VOCAB,
    make,
)
from value_runs import (
    CHECKPOINTING,
    WARNINGS,
    each_head,
    each_objective,
    fill,
    mean,
    needed,
    row_losses,
    rows,
    trainer,
    wide_base,
)

pytestmark = WARNINGS


@each_objective
@each_head
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_gradients(
    shape: str, options: dict[str, Any], objective: str, tmp_path: Path
) -> None:
    """The first loss that is logged, and the gradient of a step over two accumulated batches."""
    base = make(shape)
    model, data = fill(value_model(base, **options)), rows(8)
    losses, _ = row_losses(base, model, data, objective)
    torch.cat(losses).mean().backward()
    truth = [p.grad.clone() for p in value_head(model).parameters()]
    before = [p.detach().clone() for p in value_head(model).parameters()]
    model.zero_grad()
    run = trainer(
        tmp_path,
        model,
        data,
        needed(base, options, objective),
        objective=objective,
        gradient_accumulation_steps=2,
        max_steps=1,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    result = run.train()
    assert result.training_loss == pytest.approx(mean(losses), rel=2e-5)
    for p, old, grad in zip(value_head(model).parameters(), before, truth, strict=True):
        torch.testing.assert_close((old - p.detach()) / 0.5, grad, atol=2e-5, rtol=2e-4)


@each_objective
@each_head
def test_evaluation(options: dict[str, Any], objective: str, tmp_path: Path) -> None:
    """The loss is the mean over all tokens, whatever the batches; NumPy gives the same figures."""
    base = make("llama")
    model, data = fill(value_model(base, **options)), rows(7, seed=1)
    run = trainer(
        tmp_path,
        model,
        None,
        needed(base, options, objective),
        objective=objective,
        eval_dataset={"one": data, "two": data[:3]},
    )
    losses, values = row_losses(base, model, data, objective)
    found = run.evaluate(data, metric_key_prefix="test")
    last = torch.stack([v[-1] for v in values]).detach()
    reward = torch.tensor([r["reward"] for r in data], dtype=torch.float64)
    truth = {
        "test_loss": torch.cat(losses).mean(),
        "test_value_mean": torch.cat(values).mean(),
        "test_reward_mean": reward.mean(),
        "test_correlation": torch.corrcoef(torch.stack([last, reward]))[0, 1],
        "test_explained_variance": 1 - (reward - last).var() / reward.var(),
    }
    for name, x in truth.items():
        assert found[name] == pytest.approx(float(x.detach()), rel=1e-4, abs=1e-5), name
    both = run.evaluate()
    assert both["eval_one_loss"] == pytest.approx(found["test_loss"])
    losses, _ = row_losses(base, model, data[:3], objective)
    assert both["eval_two_loss"] == pytest.approx(mean(losses), rel=1e-4)
    same = [{**r, "reward": 2.0} for r in data]
    assert "eval_correlation" not in run.evaluate(same)


@each_objective
@each_head
def test_kept_hidden_states_change_nothing(
    options: dict[str, Any],
    objective: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("crossfade.progress.DELAY", 0.0)
    base = make("llama")
    runs = []
    for cached in (False, True):
        torch.manual_seed(1)
        with caplog.at_level(logging.INFO, "crossfade"):
            run = trainer(
                tmp_path,
                value_model(base, **options),
                rows(13),
                needed(base, options, objective),
                eval_dataset=rows(4, seed=2),
                objective=objective,
                cache_hidden=cached,
                disable_tqdm=not cached,
                num_train_epochs=3,
            )
        assert ("13/13" in capsys.readouterr().err) == cached  # the progress bar's end
        run.train()
        runs.append((run, run.evaluate(), run.evaluate(rows(3, seed=3))))
    one, two = ([x["loss"] for x in run.state.log_history if "loss" in x] for run, *_ in runs)
    assert one == pytest.approx(two, rel=1e-4)
    assert one[0] != pytest.approx(one[-1], rel=1e-3)
    for a, b in zip(runs[0][1:], runs[1][1:], strict=True):
        assert a["eval_loss"] == pytest.approx(b["eval_loss"], rel=1e-4)
    tokens = sum(len(r["completion_ids"]) for r in rows(13))
    assert f"hidden states of {tokens} tokens: {tokens * 64 / 1e6:.3g} MB" in caplog.text


def test_expectations_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 3 tokens give the same; the base has a soft-cap, so its logits are capped."""
    from crossfade.training.value import trainer as value_trainer
    from transformers import Gemma3ForCausalLM

    config = make("gemma3").config
    config.final_logit_softcapping = 3.0
    base = Gemma3ForCausalLM(config).eval()
    base.load_state_dict(make("gemma3").state_dict())
    model, data = fill(value_model(base, rank=2)), rows(6)
    monkeypatch.setattr(value_trainer, "CHUNK", 3 * VOCAB)
    run = trainer(tmp_path, model, data, base, objective="cd_q", eval_dataset=data)
    losses, _ = row_losses(base, model, data, "cd_q")
    assert run.evaluate()["eval_loss"] == pytest.approx(mean(losses), rel=1e-4)


def has_seven(n: int, seed: int) -> list[dict[str, Any]]:
    """Rollouts of six of a few tokens. The reward tells whether token 7 is among them."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(5, 17, (n, 6), generator=generator).tolist()
    return [
        {
            "prompt_ids": [3],
            "completion_ids": [*w, EOS],
            "reward": float(7 in w),
            "finished": True,
        }
        for w in words
    ]


@pytest.mark.parametrize("options", [{"rank": 8}, {}, {"kind": "scalar"}], ids=["8", "full", "s"])
def test_it_learns_what_is_known(options: dict[str, Any], tmp_path: Path) -> None:
    base = wide_base()
    run = trainer(
        tmp_path,
        value_model(base, **options),
        has_seven(500, 1),
        eval_dataset=has_seven(200, 2),
        per_device_train_batch_size=50,
        per_device_eval_batch_size=50,
        num_train_epochs=20,
        learning_rate=1e-2,
        cache_hidden=True,
        logging_steps=10,
    )
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert after["eval_correlation"] > 0.9
    assert after["eval_explained_variance"] > 0.8
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    logged = [x for x in run.state.log_history if "loss" in x]
    assert logged[-1]["loss"] < 0.5 * logged[0]["loss"]
    assert logged[-1]["correlation"] > 0.9
    assert logged[-1]["reward_mean"] == pytest.approx(
        sum(r["reward"] for r in has_seven(500, 1)) / 500, abs=1e-6
    )


def test_cd_q_finds_the_value_under_the_base(tmp_path: Path) -> None:
    """CD-Q learns expectations under the base, even from rollouts of something else.

    The base draws three tokens, each 7, 9 or 11 whatever came before. So with k of them to go, V is
    1 if there was a 7, else 1 - (2/3)^k. In the rollouts half of all tokens are 7.
    """
    base = wide_base(std=0.2)
    few = torch.tensor([7, 9, 11])
    base.lm_head = torch.nn.Linear(192, VOCAB)
    with torch.no_grad():
        base.lm_head.weight.zero_()
        base.lm_head.bias.fill_(-torch.inf)
        base.lm_head.bias[few] = 0.0
    words = torch.cartesian_prod(*[torch.tensor([7, 7, 9, 11])] * 3).tolist()
    data = [
        {"prompt_ids": [3], "completion_ids": w, "reward": float(7 in w), "finished": True}
        for w in words
    ]
    model = value_model(base)
    run = trainer(
        tmp_path,
        model,
        data,
        base,
        objective="cd_q",
        per_device_train_batch_size=64,
        num_train_epochs=250,
        learning_rate=5e-3,
        cache_hidden=True,
        logging_steps=100,
    )
    run.train()
    q = model(torch.tensor([[3, 9, 11]])).logits[0].detach()
    assert q[0, few].tolist() == pytest.approx([1.0, 5 / 9, 5 / 9], abs=0.05)
    assert q[1, few].tolist() == pytest.approx([1.0, 1 / 3, 1 / 3], abs=0.05)
    assert q[2, few].tolist() == pytest.approx([1.0, 0.0, 0.0], abs=0.05)


@each_objective
def test_the_base_stays_as_it_is(objective: str, tmp_path: Path) -> None:
    """The backbone stays in eval mode, so dropout does not disturb training either."""
    base = make("gpt2").train()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    model = value_model(base)
    run = trainer(
        tmp_path, model, rows(8), base if objective == "cd_q" else None, objective=objective,
        max_steps=3,
    )  # fmt: skip
    run.train()
    assert not model.training
    assert base.training
    assert base.config.use_cache
    for name, p in base.named_parameters():
        assert torch.equal(p, before[name])
        assert p.requires_grad
        assert p.grad is None
    assert base.transformer.wte.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    assert value_head(model).weight.abs().sum() > 0


def test_resumed_is_as_if_never_stopped(tmp_path: Path) -> None:
    base, data = make("llama"), rows(24)
    checkpoint = tmp_path / "checkpoint-4"
    found = []
    for resume in (None, str(checkpoint)):
        run = trainer(
            tmp_path,
            value_model(base, rank=2),
            data,
            save_strategy="steps",
            save_steps=4,
            num_train_epochs=2,
        )
        run.train(resume_from_checkpoint=resume)
        assert run.state.global_step == 12
        found.append([p.detach().clone() for p in value_head(run.value_model).parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    names = {p.name for p in checkpoint.iterdir()}
    assert names >= {"value_head.safetensors", "value_head.json", "trainer_state.json"}
    assert not names & {"training_args.bin", "model.safetensors", "config.json"}
    at_four = load_value_head(checkpoint, base)
    assert not torch.equal(value_head(at_four).b, found[0][1])
    run.save_model(str(tmp_path / "saved"))
    loaded = load_value_head(tmp_path / "saved", base)
    assert torch.equal(value_head(loaded).b, found[0][1])


def test_the_best_is_loaded_at_the_end(tmp_path: Path) -> None:
    base = make("llama")
    run = trainer(
        tmp_path,
        value_model(base, rank=2),
        rows(8),
        eval_dataset=rows(6, seed=5),
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        load_best_model_at_end=True,
        num_train_epochs=6,
        learning_rate=0.3,
    )
    run.train()
    each = {x["step"]: x["eval_loss"] for x in run.state.log_history if "eval_loss" in x}
    assert min(each.values()) < each[12], "the last one should not be the best"
    assert run.evaluate()["eval_loss"] == pytest.approx(min(each.values()), rel=1e-6)


@each_objective
def test_an_adapter_is_trained_with_the_head(objective: str, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel

    base, data = make("llama"), rows(8)
    before = {k: v.clone() for k, v in base.state_dict().items()}
    model = fill(value_model(base, rank=2))
    losses, _ = row_losses(base, model, data, objective)
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    options: dict[str, Any] = {
        "objective": objective,
        "peft_config": config,
        "per_device_train_batch_size": 8,
        "max_steps": 5,
        "learning_rate": 1e-2,
    }
    its_base = base if objective == "cd_q" else None
    run = trainer(
        tmp_path / "run",
        model,
        data,
        its_base,
        **options,
        save_strategy="steps",
        save_steps=3,
        **{CHECKPOINTING: True},
    )
    run.train()
    logged = [x["loss"] for x in run.state.log_history if "loss" in x]
    assert logged[0] == pytest.approx(mean(losses), rel=1e-4)
    assert logged[-1] < logged[0]
    tuned = run.value_model
    assert isinstance(tuned, PeftModel)
    assert all("lm_head" not in n for n, _ in tuned.named_parameters() if "lora_" in n)
    assert any(p.count_nonzero() for n, p in tuned.named_parameters() if "lora_B" in n)
    for name, p in base.state_dict().items():
        assert torch.equal(p, before[name])
    run.save_model(str(tmp_path / "saved"))
    loaded = load_value_head(tmp_path / "saved", base)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded(ids).logits, tuned(ids).logits)
    out = cf.generate(base, [[5, 6]], search=cf.BestOfN(3, cf.ValueHead(tuned)), max_new_tokens=4,
                      seed=1)  # fmt: skip
    q = tuned(out.sequences[:, : 2 + out.lengths[0]]).logits[0, -2, out.responses[0][-1]]
    torch.testing.assert_close(out.values[0], q.detach(), atol=1e-4, rtol=1e-4)
    torch.manual_seed(3)
    again = trainer(tmp_path / "run", fill(value_model(base, rank=2), 1), data, its_base, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    torch.testing.assert_close(again.value_model(ids).logits, tuned(ids).logits)


def test_a_base_of_its_own_weights(tmp_path: Path) -> None:
    """If the base is not the backbone, expectations are of the base's own hidden states."""
    backbone, base = make("llama"), make("qwen3", 3)
    model, data = fill(value_model(backbone)), rows(5)
    run = trainer(tmp_path, model, data, base, objective="cd_q", eval_dataset=data)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in data:
            ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
            q = model(ids).logits[0].double()
            expected = (base(ids).logits[0].double().softmax(-1) * q).sum(-1)
            n = len(row["completion_ids"])
            value = q[-n - 1 : -1].gather(1, ids[0, -n:, None])[:, 0]
            target = torch.cat([expected[-n:-1], torch.tensor([row["reward"]])])
            total, tokens = total + float(((value - target) ** 2 / 2).sum()), tokens + n
    assert run.evaluate()["eval_loss"] == pytest.approx(total / tokens, rel=1e-4)
    with pytest.raises(ValueError, match="model is not over base's weights"):
        trainer(tmp_path, model, data, base, objective="cd_q", cache_hidden=True)


def test_bfloat16(tmp_path: Path) -> None:
    """With a bfloat16 backbone and mixed precision the head is float32 and out of autocast."""
    base = make("llama").to(torch.bfloat16)
    model, data = fill(value_model(base, rank=2)), rows(8)
    forward = model.forward
    losses, _ = row_losses(base, model, data, "fudge")
    run = trainer(tmp_path, model, data, bf16=True, per_device_train_batch_size=8, max_steps=3)
    run.train()
    logged = [x["loss"] for x in run.state.log_history if "loss" in x]
    assert logged[0] == pytest.approx(mean(losses), rel=2e-2)
    assert logged[-1] < logged[0]
    assert value_head(model).a.dtype is torch.float32
    assert model.forward == forward
    assert model(torch.tensor([[5, 6]])).logits.dtype is torch.float32
