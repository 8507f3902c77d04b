"""What the statistics say of DPO's first step on an untied head, against our trainer's."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import tiny_models as tiny
import torch
import trl
from crossfade import dynamics
from crossfade.dynamics.states import LastStates
from crossfade.training import DPOTrainer
from statements import statements

# TRL 1.16 and PEFT use names that Transformers 5.23 has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`[a-z_.]*gradient_checkpointing:FutureWarning")
BETA = 0.3
YES, NO = 20, 21


@pytest.mark.parametrize("negatives", [8, 5])
def test_the_first_gradient_is_as_the_identity_says(tmp_path: Path, negatives: int) -> None:
    """``sqrt(2) / 4 * beta * distinguishability``, or with labels out of balance its general form;
    and after the step at least so many answers are right as the bound says."""
    tokenizer, model = tiny.make_tokenizer(), tiny.make()
    rows = statements(["film"], each=8)
    rows = [r for r in rows if r["label"]] + [r for r in rows if not r["label"]][:negatives]
    (got,) = dynamics.statistics(model, tokenizer, rows).values()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    answers = {True: (YES, NO), False: (NO, YES)}
    pairs = [
        {
            "prompt_ids": tokenizer(row["text"])["input_ids"],
            "chosen_ids": [answers[row["label"]][0]],
            "rejected_ids": [answers[row["label"]][1]],
        }
        for row in rows
    ]
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path),
        beta=BETA,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model,
        tiny.make(),
        arguments,
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.compute_loss(trainer.model, batch).backward()
    gradient = model.lm_head.weight.grad
    assert float(gradient.norm()) == pytest.approx(got.gradient_norm(BETA), rel=1e-4)
    if negatives == 8:
        exact = 2**0.5 / 4 * BETA * got.distinguishability
        assert got.gradient_norm(BETA) == pytest.approx(exact, rel=1e-9)
    expected = torch.zeros_like(gradient)
    expected[YES], expected[NO] = -BETA / 2 * got.step, BETA / 2 * got.step
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)

    states = LastStates(model)([p["prompt_ids"] for p in pairs]).float()
    moved = states @ -(gradient[YES] - gradient[NO])
    right = (moved > 0) == torch.tensor([row["label"] for row in rows])
    assert 0 < got.accuracy_bound <= float(right.float().mean())
