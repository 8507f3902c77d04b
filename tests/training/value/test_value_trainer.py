"""Value heads' training against loops by hand in float64, and on tasks whose truth is known."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.models.saved_value_heads import load_value_head
from crossfade.models.value_heads import LowRankHead, value_head, value_model
from crossfade.training.value.rollouts import Rollouts, collate
from crossfade.training.value.trainer import ValueConfig, ValueTrainer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "decoding"))

from tiny_models import (
    EOS,
    SHAPES,
    VOCAB,
    doubled,
    lora,
    make,
    make_letters,
    make_tokenizer,
    spread,
)

pytestmark = [
    # PEFT asks transformers for an attribute that this version of it has renamed
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    # torch's data loader, of its own argument, without a GPU
    pytest.mark.filterwarnings("ignore:.pin_memory:UserWarning"),
]
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")  # its name from 5.23 on
    if name in ValueConfig.__dataclass_fields__
)
HEADS: dict[str, dict[str, Any]] = {
    "full": {},
    "low rank": {"rank": 3},
    "scalar": {"kind": "scalar"},
}
each_head = pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
each_objective = pytest.mark.parametrize("objective", ["fudge", "cd_q"])


def rows(n: int, seed: int = 0, longest: int = 9) -> list[dict[str, Any]]:
    """Random rollouts: all that a loss can see."""
    generator = torch.Generator().manual_seed(seed)

    def ids(most: int) -> list[int]:
        length = int(torch.randint(1, most + 1, (), generator=generator))
        return torch.randint(5, VOCAB, (length,), generator=generator).tolist()

    rewards = torch.randn(n, generator=generator).tolist()
    return [
        {
            "prompt_ids": ids(5),
            "completion_ids": [*ids(longest), EOS],
            "reward": r,
            "finished": True,
        }
        for r in rewards
    ]


def fill(model: Any, seed: int = 0) -> Any:
    spread(value_head(model), seed)
    return model


def settings(folder: Path, **options: Any) -> ValueConfig:
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return ValueConfig(output_dir=str(folder), **{**defaults, **options})


def trainer(folder: Path, model: Any, train: Any, base: Any = None, **options: Any) -> ValueTrainer:
    own = {k: options.pop(k) for k in ("eval_dataset", "processing_class", "peft_config")
           if k in options}  # fmt: skip
    return ValueTrainer(model, settings(folder, **options), train, base=base, **own)


def needed(base: Any, options: dict[str, Any], objective: str) -> Any:
    return base if objective == "cd_q" and options.get("kind") != "scalar" else None


def row_losses(
    base: Any, model: Any, data: list[dict[str, Any]], objective: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Of each row, the half squares and the values of its tokens, in float64, one by one.

    Differentiable in the head.
    """
    losses, values = [], []
    head = value_head(model)
    for row in data:
        prompt, response, reward = row["prompt_ids"], row["completion_ids"], row["reward"]
        ids = torch.tensor([prompt + response])
        hidden = base.base_model(input_ids=ids)[0][0].detach().double()
        p = base(ids).logits[0].detach().double().softmax(-1)
        if isinstance(head, LowRankHead):
            q = hidden @ head.a.double().T @ head.b.double().T
        else:
            bias = 0.0 if head.bias is None else head.bias.double()
            q = hidden @ head.weight.double().T + bias
        seen, found = [], []
        for t, token in enumerate(response):
            at = len(prompt) + t  # of the token
            scalar = model.value_kind == "scalar"
            seen.append(q[at, 0] if scalar else q[at - 1, token])
            target = torch.tensor(reward, dtype=torch.float64)
            if objective == "cd_q" and t < len(response) - 1:
                target = q[at + 1, 0] if scalar else (p[at] * q[at]).sum()
            found.append((seen[-1] - target.detach()) ** 2 / 2)
        losses.append(torch.stack(found))
        values.append(torch.stack(seen))
    return losses, values


def mean(losses: list[Tensor]) -> float:
    return float(torch.cat(losses).mean().detach())


@each_objective
@each_head
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_gradients(
    shape: str, options: dict[str, Any], objective: str, tmp_path: Path
) -> None:
    """The first logged loss and the gradient of a step over two accumulated batches."""
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
    """The loss is the mean over all tokens, whatever the batches; figures as NumPy has them."""
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
        assert ("13/13" in capsys.readouterr().err) == cached  # a bar of the rows
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
    """Chunks of 3 tokens, and a base with a soft-cap, whose expectations are of capped logits."""
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
    """Six of a few tokens; the reward says whether token 7 is among them."""
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


def wide_base(std: float = 0.02) -> Any:
    """A model wide enough for its random features to remember a token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        initializer_range=std,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


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
    """A base that draws 7, 9 or 11 whatever came, until three are there: V is 1 - (2/3)^k or 1.

    The rollouts have 7 half the time: expectations are the base's all the same.
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
    """Of dropout, too, training sees nothing: the backbone stays in eval mode."""
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
    """Expectations over another base than the backbone's: its own hidden states are read."""
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
    """A backbone in bfloat16 with mixed precision: the head is float32 and its forward clean."""
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


# ---- data


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
    """As where the base wrote, and as `score` reads the two."""
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


OK = {"prompt_ids": [5], "completion_ids": [6, 1], "reward": 1.0, "finished": True}
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


BAD_CONFIGS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "objective": ({"objective": "x"}, ValueError, "objective is 'x'; it must be 'fudge' or"),
    "unfinished": ({"unfinished": "x"}, ValueError, "unfinished is 'x'; it must be 'drop' or"),
    "cache": ({"cache_hidden": 1}, TypeError, "cache_hidden is 1; it must be a bool"),
    "columns": ({"remove_unused_columns": True}, ValueError, "remove_unused_columns is True; it"),
    "parts": ({"eval_do_concat_batches": False}, ValueError, "eval_do_concat_batches is False; it"),
    "noise": ({"neftune_noise_alpha": 5.0}, ValueError, "neftune_noise_alpha is 5.0; it must be"),
    "smoothing": ({"label_smoothing_factor": 0.1}, ValueError, "is 0.1; it must be 0"),
}


@pytest.mark.parametrize("bad", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_what_is_wrong_in_settings_is_named(
    bad: tuple[dict[str, Any], type[Exception], str], tmp_path: Path
) -> None:
    with pytest.raises(bad[1], match=bad[2]):
        settings(tmp_path, **bad[0])


def trained_embeddings() -> Any:
    model = value_model(make("llama"))
    model.model.embed_tokens.requires_grad_(True)
    return model


def peft_config(**options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})


def prompt_tuning() -> Any:
    from peft import PromptTuningConfig

    return PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")


BAD_TRAINERS: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "args": (lambda p: ValueTrainer(value_model(make()), 3), TypeError, "args is a int; it must"),  # type: ignore[arg-type]
    "model": (lambda p: trainer(p, make(), [OK]), TypeError, "model is a LlamaForCausalLM; it"),
    "no base": (
        lambda p: trainer(p, value_model(make()), [OK], objective="cd_q"),
        ValueError,
        "base is None; with objective 'cd_q' a Q-head needs its base",
    ),
    "base of fudge": (
        lambda p: trainer(p, value_model(make()), [OK], make()),
        ValueError,
        "base is given, but objective 'fudge' of a q head has no use for it; it must be None",
    ),
    "base of a scalar": (
        lambda p: trainer(p, value_model(make(), "scalar"), [OK], make(), objective="cd_q"),
        ValueError,
        "objective 'cd_q' of a scalar head has no use",
    ),
    "base with adapters": (
        lambda p: trainer(p, value_model(make()), [OK], lora(0, make(), "x"), objective="cd_q"),
        TypeError,
        "base is a PeftModelForCausalLM; it must be a causal LM without",
    ),
    "base of another size": (
        lambda p: trainer(p, value_model(wide_base()), [OK], make(), objective="cd_q"),
        ValueError,
        r"base has a head of shape \[61, 16\]; it must be \[61, 192\]",
    ),
    "base with more than a head": (
        lambda p: trainer(p, value_model(make()), [OK], doubled(), objective="cd_q"),
        NotImplementedError,
        "base is a Doubled, whose logits are more than its head's",
    ),
    "trained": (
        lambda p: trainer(p, trained_embeddings(), [OK]),
        ValueError,
        "model.embed_tokens.weight of model requires a gradient, but it is the backbone's",
    ),
    "peft_config": (
        lambda p: trainer(p, value_model(make()), [OK], peft_config=3),
        TypeError,
        "peft_config is a int; it must be a peft.PeftConfig",
    ),
    "prompt tuning": (
        lambda p: trainer(p, value_model(make()), [OK], peft_config=prompt_tuning()),
        ValueError,
        "peft_config is of prompt learning",
    ),
    "adapter on the head": (
        lambda p: trainer(
            p, value_model(make()), [OK], peft_config=peft_config(target_modules=["lm_head"])
        ),
        ValueError,
        "peft_config puts an adapter on the head; it must leave",
    ),
    "two adapters": (
        lambda p: trainer(p, lora(0, value_model(make()), "x"), [OK], peft_config=peft_config()),
        ValueError,
        "peft_config is given, but model has an adapter already",
    ),
    "cached adapter": (
        lambda p: trainer(
            p, value_model(make()), [OK], peft_config=peft_config(), cache_hidden=True
        ),
        ValueError,
        "cache_hidden is True, but an adapter is trained, which changes",
    ),
}


@pytest.mark.parametrize("bad", BAD_TRAINERS.values(), ids=BAD_TRAINERS)
def test_what_is_wrong_is_named(
    bad: tuple[Callable[[Path], Any], type[Exception], str], tmp_path: Path
) -> None:
    with pytest.raises(bad[1], match=bad[2]):
        bad[0](tmp_path)


def test_a_checkpoint_of_another_head(tmp_path: Path) -> None:
    base = make("llama")
    run = trainer(tmp_path, value_model(base, rank=2), rows(4), max_steps=1, save_strategy="epoch")
    run.train()
    other = trainer(tmp_path, value_model(base, "scalar"), rows(4), max_steps=2)
    with pytest.raises(ValueError, match=r"json has kind 'q'; it must be 'scalar', as model has"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
