"""The settings of `CLPTrainer`, and the weights that it draws."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import transformers

from ..checks import check_number

# Arguments of Transformers that would be ignored or fail in the middle of a run, and what they must
# be.
REFUSED: tuple[tuple[str, Any, str], ...] = (
    ("neftune_noise_alpha", None, "embeddings are not trained"),
    ("eval_do_concat_batches", True, "figures are means over all batches"),
    ("batch_eval_metrics", False, "figures are means over all batches"),
    ("include_for_metrics", [], "figures are of responses, which are sampled"),
    ("include_num_input_tokens_seen", "no", "responses are sampled while it trains"),
    ("bf16_full_eval", False, "the policy shares the base's weights, which that would convert"),
    ("fp16_full_eval", False, "the policy shares the base's weights, which that would convert"),
)


@dataclass
class CLPConfig(transformers.TrainingArguments):
    """`transformers.TrainingArguments`, and how weights are drawn and responses sampled.

    `per_device_train_batch_size` counts prompts, each of which has `num_generations` responses.

    Args:
        num_generations: how many responses a prompt gets at a step, all at the same weights; 2 at
            least, as they are each other's baseline.
        max_new_tokens: the most tokens of a response. One that reaches them is cut, and counts as
            it is.
        max_length: a prompt whose response might pass it is left out; None is no limit.
        concentration: of the Dirichlet that the weights of rewards are drawn from: 1.0 draws all
            weights alike, less draws more of single rewards. Also a list with one for each reward.
        kl: the KL weight, within [0, 1], or a list of two, between which each prompt's is drawn.
        learning_rate: 1e-4 by default, as adapters need more than a model.
        logging_steps: 10 by default.
        metric_for_best_model: "objective" by default, where `load_best_model_at_end` is on.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
    """

    num_generations: int = field(default=4, metadata={"help": "responses of a prompt at a step"})
    max_new_tokens: int = field(default=128, metadata={"help": "the most tokens of a response"})
    max_length: int | None = field(
        default=1024, metadata={"help": "tokens of a prompt and its response, at most"}
    )
    concentration: Any = field(
        default=1.0, metadata={"help": "of the Dirichlet of weights, a number or one a reward"}
    )
    kl: Any = field(default=0.1, metadata={"help": "the KL weight, or a list of two bounds"})
    learning_rate: float = field(default=1e-4, metadata={"help": "of adapters"})
    logging_steps: float = field(
        default=10, metadata={"help": "steps between the figures that are printed"}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "columns are read by their names; must be False"}
    )

    def __post_init__(self) -> None:
        for name, least in (("num_generations", 2), ("max_new_tokens", 1)):
            x = getattr(self, name)
            if isinstance(x, bool) or not isinstance(x, int) or x < least:
                raise ValueError(f"{name} is {x!r}; it must be an int of at least {least}")
        most = self.max_length
        if most is not None and (type(most) is not int or most <= self.max_new_tokens):
            raise ValueError(
                f"max_length is {most!r}; it must be an int above max_new_tokens, "
                f"{self.max_new_tokens}, or None"
            )
        for i, x in enumerate(_listed(self.concentration)):
            name = "concentration" if x is self.concentration else f"concentration[{i}]"
            if not check_number(name, x) >= 0.01:
                raise ValueError(f"{name} is {x}; it must be 0.01 at least")
        low, high = self.kl_range
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"kl is {self.kl!r}; it must be within [0, 1], or a list of two such numbers, the "
                "lower one first"
            )
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns is True; it must be False")
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {self.label_smoothing_factor}; it must be 0"
            )
        for name, must, why in REFUSED:
            if (x := getattr(self, name)) != must:
                raise ValueError(f"{name} is {x!r}; it must be {must!r}, as {why}")
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "objective"  # evaluations have no loss
        super().__post_init__()

    @property
    def kl_range(self) -> tuple[float, float]:
        """The least and the greatest KL weight."""
        each = _listed(self.kl)
        if len(each) > 2 or not each:
            raise ValueError(f"kl is {self.kl!r}; it must be a number or a list of two")
        found = [check_number("kl", x) for x in each]
        return found[0], found[-1]

    def draw(self, rewards: Sequence[str], seed: int) -> tuple[dict[str, float], float]:
        """The weights of rewards and the KL weight that belong to a seed."""
        drawn = random.Random(seed)
        each = _listed(self.concentration)
        each = each * len(rewards) if len(each) == 1 else each
        if len(each) != len(rewards):
            raise ValueError(
                f"concentration has {len(each)} numbers; it must have {len(rewards)}, one for each "
                f"of {list(rewards)}"
            )
        sizes = [drawn.gammavariate(x, 1.0) + 1e-300 for x in each]
        total = sum(sizes)
        weights = {name: x / total for name, x in zip(rewards, sizes, strict=True)}
        return weights, drawn.uniform(*self.kl_range)


def _listed(x: Any) -> list[Any]:
    return list(x) if isinstance(x, (list, tuple)) else [x]
