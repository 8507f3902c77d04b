"""What self-judged training refuses, and judges that give no probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl
from crossfade.training import SelfJudgeTrainer
from test_on_policy import Judge, arguments, trainer
from trained_models import make
from trainer_runs import OLD_NAMES

pytestmark = OLD_NAMES


class TakesOne:
    def prefer(self, pairs: Any) -> list[float]:
        return [0.5 for _ in pairs]


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        ({}, {"lora": None}, ValueError, "ref_model is None, and all weights are trained; it must"),
        (
            {"loss": "aot"},
            {},
            ValueError,
            "loss is 'aot'; it must be another one, as this one sorts",
        ),
        ({"loss": "modpo"}, {}, ValueError, "loss is 'modpo'; .* needs margins"),
        ({"loss": None}, {}, ValueError, "loss is None; .* is left to args.loss_type"),
        ({"loss": "simp"}, {}, ValueError, "did you mean 'simpo'"),
        (
            {},
            {"judge": print},
            TypeError,
            "judge is a builtin_function_or_method; it must have pre",
        ),
        (
            {},
            {"judge": TakesOne()},
            TypeError,
            "judge is a TakesOne, whose prefer is called as prefer.contexts, firsts, seconds",
        ),
        ({}, {"prompts": [{"promt": "a"}]}, ValueError, "did you mean 'prompt'"),
        (
            {},
            {"prompts": [{"prompt": 3}]},
            TypeError,
            "prompt of row 0 of the train dataset is 3; ",
        ),
        ({}, {"prompts": [{"prompt_ids": [99]}]}, ValueError, r"has id 99; ids must be within"),
        ({}, {"temperature": 0.0}, ValueError, "temperature is 0.0; it must be above 0"),
        ({}, {"top_p": 1.5}, ValueError, r"top_p is 1.5; it must be within \(0, 1\]"),
        ({}, {"max_new_tokens": 0}, ValueError, "max_new_tokens is 0; it must be an int of at lea"),
        ({}, {"precompute_ref_log_probs": True}, ValueError, "precompute_ref_log_probs is True"),
    ],
)
def test_refusals(
    tmp_path: Path,
    given: dict[str, Any],
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        trainer(tmp_path, given=given, **options)


def test_other_configs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="args is a DPOConfig; it must be a SelfJudgeConfig"):
        SelfJudgeTrainer(make(), args=arguments(tmp_path, trl.DPOConfig), judge=Judge())


@pytest.mark.parametrize(
    ("gives", "error", "message"),
    [
        ([0.5], ValueError, "judge returned 1 probabilities; it must return 4, one a pair"),
        ([2.0] * 4, ValueError, "judge returned 2.0 for a pair; it must return probabilities, wi"),
        ([float("inf")] * 4, ValueError, "judge returned inf for a pair"),
        (None, TypeError, "judge returned None; it must return a number for each pair"),
    ],
)
def test_judges_that_give_something_else(
    tmp_path: Path, gives: Any, error: type[Exception], message: str
) -> None:
    """They get the words that they get in a tournament."""

    class Other:
        def prefer(self, *_: Any) -> Any:
            return gives

    with pytest.raises(error, match=message):
        trainer(tmp_path, Other(), max_steps=1).train()
