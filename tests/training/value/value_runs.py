"""Small runs of `ValueTrainer`, and what their losses are by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from crossfade.models.value_heads import LowRankHead, value_head
from crossfade.training.value.trainer import ValueConfig, ValueTrainer
from tiny_models import (
    EOS,
    SIZES,
    VOCAB,
    spread,
)
from torch import Tensor

CHECKPOINTING = next(
    name
    # Transformers has the first name from 5.23 on, and the second one before
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in ValueConfig.__dataclass_fields__
)
WARNINGS = [
    # PEFT asks transformers for an attribute that this version of it has renamed
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    # without a GPU the data loader of torch warns of its own default
    pytest.mark.filterwarnings("ignore:.pin_memory:UserWarning"),
]
HEADS: dict[str, dict[str, Any]] = {
    "full": {},
    "low rank": {"rank": 3},
    "scalar": {"kind": "scalar"},
}
OK = {"prompt_ids": [5], "completion_ids": [6, 1], "reward": 1.0, "finished": True}
each_head = pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
each_objective = pytest.mark.parametrize("objective", ["fudge", "cd_q"])


def rows(n: int, seed: int = 0, longest: int = 9) -> list[dict[str, Any]]:
    """Random rollouts, with all that a loss can read."""
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
    """For each row the half squares and the values of its tokens, in float64, a token at a time.

    Gradients reach the head.
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
            at = len(prompt) + t  # the place of the token
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


def wide_base(std: float = 0.02) -> Any:
    """A random model that is wide enough for its hidden states to tell which tokens came."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    wide = {"hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    config = LlamaConfig(**{**SIZES, **wide, **heads}, initializer_range=std)
    return LlamaForCausalLM(config).eval()
