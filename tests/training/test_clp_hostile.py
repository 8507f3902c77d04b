"""The training of conditioned policies where users give it what it cannot take, or base dropout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import crossfade as cf
import peft
import pytest
import tiny_models as tiny
import torch
from crossfade.policies.conditioned import PromptedPolicy
from crossfade.training.clp.learner import Learner
from test_clp import PROMPTS, REWARDS, arguments, batch_of, policy_of, shaken, short, trainer
from trained_models import make
from trainer_runs import OLD_NAMES

pytestmark = OLD_NAMES


def test_the_base_s_dropout_is_off_and_the_adapters_is_on() -> None:
    base = make().eval()
    for layer in base.model.layers:
        layer.self_attn.attention_dropout = 0.5
    mixes = torch.tensor([[0.5, 0.2], [0.0, 0.9]])
    policy = shaken(policy_of(base=base))
    batch = batch_of(policy, mixes).batch(True, "cpu")
    learner = Learner(base, policy.model, REWARDS)
    expected = learner.eval()(**batch)
    assert torch.equal(learner.train()(**batch), expected)
    with_dropout = cf.ConditionedPolicy.create(base, REWARDS, peft.LoraConfig(lora_dropout=0.5))
    learner = Learner(base, shaken(with_dropout).model, REWARDS)
    assert not torch.equal(learner.train()(**batch), learner.eval()(**batch))


@pytest.mark.parametrize(
    "change",
    [
        {"neftune_noise_alpha": 5.0},
        {"eval_do_concat_batches": False},
        {"batch_eval_metrics": True},
        {"include_for_metrics": ["inputs"]},
        {"include_num_input_tokens_seen": "all"},
        {"bf16_full_eval": True},
    ],
)
def test_arguments_that_would_be_ignored_are_refused_by_name(tmp_path: Path, change: Any) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=rf"{name} is .*; it must be .*, as "):
        arguments(tmp_path, **change)


def test_the_best_model_is_that_of_the_highest_objective(tmp_path: Path) -> None:
    made = arguments(tmp_path, load_best_model_at_end=True, eval_strategy="no", save_strategy="no")
    assert (made.metric_for_best_model, made.greater_is_better) == ("objective", True)


def test_a_trainer_may_only_evaluate(tmp_path: Path) -> None:
    made = trainer(tmp_path, train_dataset=None)
    assert made.predict(PROMPTS[:2]).metrics["test_kl"] == 0.0


def test_policies_and_names_that_cannot_be_trained(tmp_path: Path) -> None:
    prompted = PromptedPolicy(make().eval(), REWARDS, tiny.make_tokenizer())
    with pytest.raises(ValueError, match=r"policy has no adapter to train; .*create made"):
        trainer(tmp_path, prompted)
    with pytest.raises(ValueError, match="rewards has 'values', an attribute of torch's modules"):
        cf.ConditionedPolicy.create(make(), ["values"], peft.LoraConfig(r=2))
    for name in ("weight", "q_proj", "lora_A"):
        with pytest.raises(ValueError, match=rf"rewards has '{name}', a part of the names of the"):
            cf.ConditionedPolicy.create(make(), ["great", name], peft.LoraConfig(r=2))
    biased = cf.ConditionedPolicy.create(make().eval(), REWARDS, peft.LoraConfig(r=2))
    biased.model.peft_config["great"].lora_bias = True
    with pytest.raises(NotImplementedError, match="the adapter 'great' has lora_bias=True"):
        trainer(tmp_path, biased, processing_class=tiny.make_tokenizer())


def test_a_reward_that_fails_is_named_with_the_step(tmp_path: Path) -> None:
    def raises(prompts: Any, responses: Any) -> Any:
        raise KeyError("no such word")

    for fn, says in (
        (raises, r"rewards\['great'\] at step 1 failed \(KeyError: 'no such word'\)"),
        (lambda prompts, responses: [1.0], r"rewards\['great'\] at step 1: .* 1 scores"),
    ):
        with pytest.raises(ValueError, match=says):
            trainer(tmp_path, rewards={"great": fn, "short": short}).train()
