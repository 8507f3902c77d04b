"""What `ValueTrainer` and its settings refuse, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crossfade.models.value_heads import value_model
from crossfade.training.value.trainer import ValueTrainer
from tiny_models import (
    doubled,
    lora,
    make,
)
from value_runs import OK, WARNINGS, rows, settings, trainer, wide_base

pytestmark = WARNINGS

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
