"""A trainer of value heads on rollouts of the base, by CD-FUDGE or CD-Q."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

from ...decoding.engine.prefill import Prefill
from ...decoding.simple.term_model import TermModel
from ...losses import cd_q, expected_value, fudge
from ...models.hf import text_config, underlying
from ...models.saved_value_heads import load_into, save_value_head
from ...models.value_heads import value_head
from ...progress import progress_bar
from ..processes import STANDS_IN, InParallel, check_processes, get_logger, is_main_process
from .learner import Base, Learner, adapted, check_trained, trained_in_backbone
from .rollouts import IGNORED, Rollouts, collate

logger = get_logger(__name__)
CHUNK = 1 << 23  # how many logits (tokens times vocabulary) are computed at a time


@dataclass
class ValueConfig(transformers.TrainingArguments):
    """`transformers.TrainingArguments`, and how values are to be learnt.

    Args:
        objective: "fudge" (`losses.fudge`) or "cd_q" (`losses.cd_q`).
        unfinished: what to do with rollouts that were cut before EOS. "drop" leaves them out and
            logs how many; "score" keeps them, with their reward at the last token. None is "drop"
            for CD-Q, whose targets come from the reward at EOS, and "score" for FUDGE.
        cache_hidden: whether to compute the hidden states of all responses once and keep them in
            memory, in the backbone's dtype. After that only the head is computed. An adapter cannot
            be trained then, because it would change the hidden states.
        learning_rate: 1e-3 by default: a head that begins at 0 needs a larger one than a model.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
    """

    objective: str = field(default="fudge", metadata={"help": "fudge or cd_q"})
    unfinished: str | None = field(
        default=None, metadata={"help": "drop or score rollouts that were cut before EOS"}
    )
    cache_hidden: bool = field(
        default=False, metadata={"help": "compute the hidden states once and keep them in memory"}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "of the head"})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "columns are read by their names; must be False"}
    )

    def __post_init__(self) -> None:
        if self.objective not in ("fudge", "cd_q"):
            raise ValueError(f"objective is {self.objective!r}; it must be 'fudge' or 'cd_q'")
        if self.unfinished not in (None, "drop", "score"):
            raise ValueError(f"unfinished is {self.unfinished!r}; it must be 'drop' or 'score'")
        if not isinstance(self.cache_hidden, bool):
            raise TypeError(f"cache_hidden is {self.cache_hidden!r}; it must be a bool")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns is True; it must be False")
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {self.label_smoothing_factor}; it must be 0"
            )
        if not self.eval_do_concat_batches:
            raise ValueError("eval_do_concat_batches is False; it must be True")
        if self.neftune_noise_alpha is not None:
            raise ValueError(
                f"neftune_noise_alpha is {self.neftune_noise_alpha}; it must be None, as the "
                "backbone's embeddings are not trained"
            )
        super().__post_init__()

    @property
    def drops(self) -> bool:
        return (self.unfinished or ("drop" if self.objective == "cd_q" else "score")) == "drop"


class ValueTrainer(InParallel, transformers.Trainer):
    """A `transformers.Trainer` that trains a value head.

    The loss is the mean of ``(V_t - target_t)^2 / 2`` over all tokens of the batch, of accumulated
    batches and of all processes. In the paper it is a sum over the tokens of a response; as there,
    a response with more tokens weighs more, but the size of the loss does not depend on lengths.
    Values and losses are float32 even under mixed precision.

    Rows of datasets are rollouts of the base. Each has `reward` (a float), `finished` (whether it
    ended by itself), and either `prompt_ids` and `completion_ids`, with EOS if it ended, or
    `prompt` and `completion`, which are texts or lists of messages that `processing_class` encodes.
    Ids that were sampled are better: a text that is encoded again may give other ids.

    Training and evaluation log the loss, the means of values and of rewards, and how well the value
    of the last token predicts the reward: `correlation` and `explained_variance`, which is
    ``1 - Var(r - V) / Var(r)``. Checkpoints hold the head and the adapter, as `save_value_head`
    saves them, and the state of Transformers; training can be resumed from them.

    Args:
        model: what `value_model` or `load_value_head` gave.
        args: the settings.
        train_dataset, eval_dataset: lists of rows, or datasets that have a length. `eval_dataset`
            may also be a dict of these.
        processing_class: a tokenizer; only rows of texts need one.
        base: the causal LM over whose next tokens, at temperature 1, CD-Q takes expectations. It
            must be given for CD-Q with a Q-head, and only then. If `model` shares its weights, the
            backbone runs once for both.
        peft_config: the config of a PEFT adapter to train on the backbone along with the head. The
            attribute `value_model` is then a `peft.PeftModel`, and `base` stays as it is.
        callbacks, optimizers: as in Transformers.

    Attributes:
        value_model: the model that is trained, for `crossfade.ValueHead`; in eval mode after
            `train`.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
        NotImplementedError: the model's weights are spread over processes.

    Source: Mudgal et al., arXiv:2310.17022.
    """

    def __init__(
        self,
        model: Any,
        args: ValueConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        base: Any = None,
        peft_config: Any = None,
        callbacks: list[transformers.TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if not isinstance(args, ValueConfig):
            raise TypeError(f"args is a {type(args).__name__}; it must be a ValueConfig")
        head = value_head(model)
        kind: Any = underlying(model).value_kind
        if peft_config is not None:
            model = adapted(model, head, peft_config)
        check_trained(model)
        if args.cache_hidden and trained_in_backbone(model):
            raise ValueError(
                "cache_hidden is True, but an adapter is trained, which changes the hidden states; "
                "it must be False"
            )
        self._base: Base | None = None
        needs_base = args.objective == "cd_q" and kind == "q"
        if needs_base and base is None:
            raise ValueError("base is None; with objective 'cd_q' a Q-head needs its base")
        if base is not None and not needs_base:
            raise ValueError(
                f"base is given, but objective {args.objective!r} of a {kind} head has no use for "
                "it; it must be None"
            )
        if needs_base:
            self._base = Base(base, model, args)

        self.value_model = model
        self._sizes = (text_config(model).vocab_size, "drop" if args.drops else "score")
        self._tokenizer = processing_class
        self._seen: list[tuple[Tensor, ...]] = []
        data = {"train_dataset": train_dataset}
        if isinstance(eval_dataset, dict):
            data |= {f"eval_dataset[{k!r}]": v for k, v in eval_dataset.items()}
        else:
            data["eval_dataset"] = eval_dataset
        read = {k: None if v is None else self._rollouts(v, k) for k, v in data.items()}
        train = read.pop("train_dataset")
        self.args: Any = args  # Transformers sets it as well; this tells type checkers
        super().__init__(
            model=Learner(model),
            args=args,
            data_collator=collate,
            train_dataset=train,
            eval_dataset=(
                dict(zip(eval_dataset, read.values(), strict=True))
                if isinstance(eval_dataset, dict)
                else read["eval_dataset"]
            ),
            processing_class=processing_class,
            compute_metrics=_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_processes(self, whole=True)
        if args.cache_hidden:
            for rollouts in (train, *read.values()):
                if rollouts is not None:
                    self._cache(rollouts)

    def train(self, *args: Any, **options: Any) -> Any:
        """As in Transformers. The model is in eval mode afterwards."""
        self._seen = []
        try:
            return super().train(*args, **options)
        finally:
            self.value_model.eval()

    # ---- data

    def _rollouts(self, rows: Any, name: str) -> Rollouts:
        return Rollouts(rows, self._tokenizer, *self._sizes, name)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in Transformers. Rows that the trainer was not made with are read now."""
        return super().get_eval_dataloader(self._ready(eval_dataset, "eval_dataset"))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As `get_eval_dataloader`."""
        return super().get_test_dataloader(self._ready(test_dataset, "test_dataset"))

    def _ready(self, rows: Any, name: str) -> Any:
        if rows is None or isinstance(rows, (str, Rollouts)):
            return rows
        rollouts = self._rollouts(rows, name)
        if self.args.cache_hidden:
            self._cache(rollouts)
        return rollouts

    @torch.no_grad()
    def _cache(self, rollouts: Rollouts) -> None:
        """Keep the hidden states of all tokens; rows of about one length share a forward."""
        learner: Any = self.model
        texts = [[*r.prompt, *r.completion] for r in rollouts.rows]
        firsts = [len(r.prompt) - learner.before for r in rollouts.rows]
        kept: Tensor | None = None
        learner.eval()
        model = Prefill(TermModel(learner.model, "model"))
        states = model.hidden(
            [text[: len(text) - learner.before] for text in texts],
            firsts,
            rows=self.args.eval_batch_size,
        )
        hidden = self.args.disable_tqdm or not is_main_process()
        with nullcontext() if hidden else progress_bar(len(texts), "row") as bar:
            for i, found in states:
                if kept is None:
                    kept = torch.empty(
                        rollouts.spans[-1][1], found.shape[-1], dtype=found.dtype, device="cpu"
                    )
                start, end = rollouts.spans[i]
                kept[start:end] = found
                if bar is not None:
                    bar.update(1)
        assert kept is not None
        rollouts.hidden = kept
        logger.info("hidden states of %d tokens: %.3g MB in memory", len(kept), kept.nbytes / 1e6)

    # ---- the loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The mean loss of a token, see the class."""
        stands_in = inputs.pop(STANDS_IN, False)
        values, losses = self._losses(model, inputs)
        if stands_in:
            losses = 0 * losses
        if num_items_in_batch is None:
            loss = losses.sum() / inputs["lengths"].sum()
        else:  # the number counts the tokens of all accumulated batches
            loss = losses.sum() / num_items_in_batch
            if self.args.average_tokens_across_devices:  # and of all processes, which are averaged
                loss = loss * self.accelerator.num_processes
        outputs = self._summary(values, losses, inputs)
        if model.training:
            counted = slice(0 if stands_in else None)
            self._seen.append(tuple(x[counted] for x in (*outputs, inputs["rewards"])))
        return (loss, outputs) if return_outputs else loss

    def _losses(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The values ``[B, T]``, and the loss of each row ``[B]``."""
        read = {k: v for k, v in inputs.items() if k not in ("lengths", "rewards")}
        values, hidden = model(**read)
        rewards, lengths = inputs["rewards"], inputs["lengths"]
        if self.args.objective == "fudge":
            return values, fudge(values, rewards, lengths)
        expected = torch.zeros_like(values)
        if self._base is None:  # targets are the values after the tokens that came next
            expected[:, :-1] = values.detach()[:, 1:]
        else:
            with torch.no_grad(), torch.autocast(values.device.type, enabled=False):
                self._expect(expected, hidden, inputs)
        return values, cd_q(values, expected, rewards, lengths)

    def _expect(self, expected: Tensor, hidden: Tensor, inputs: dict[str, Any]) -> None:
        """Fill in the mean Q-value over the base's next tokens, after each token but the last."""
        assert self._base is not None
        learner = self.accelerator.unwrap_model(self.model)
        own = hidden
        if not self._base.shared:
            own = learner.hidden(
                self._base.model,
                *(inputs[k] for k in ("input_ids", "attention_mask", "starts")),
                expected.shape[1],
            )
        # what is expected after a token is read from the state before the next one
        asked = inputs["labels"][:, 1:] != IGNORED
        states, own = hidden[:, 1:][asked], own[:, 1:][asked]
        head = value_head(self.value_model)
        rows = max(1, CHUNK // head.out_features)
        found = [
            expected_value(self._base.logits(b), head(h))
            for h, b in zip(states.split(rows), own.split(rows), strict=True)
        ]
        if found:
            expected[:, :-1][asked] = torch.cat(found)

    # ---- metrics

    def _summary(
        self, values: Tensor, losses: Tensor, inputs: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        """For each row the value of the last token, the sum of values, the loss, and the length."""
        lengths = inputs["lengths"]
        values = values.detach().masked_fill(inputs["labels"] == IGNORED, 0.0)
        last = values.gather(1, lengths[:, None] - 1)[:, 0]
        return last, values.sum(dim=1), losses.detach(), lengths

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """The figures of each row. `_metrics` makes the loss of them: a mean over all tokens."""
        batch: Any = self._prepare_inputs(inputs)
        with torch.no_grad():
            values, losses = self._losses(model, batch)
        return None, self._summary(values, losses, batch), batch["rewards"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in Transformers, with the metrics of the rows since the last log."""
        if "loss" in logs and self._seen:
            parts = [torch.cat(x).double().cpu() for x in zip(*self._seen, strict=True)]
            self._seen = []
            sums = _sums(*parts)
            if self.accelerator.num_processes > 1:
                sums = self.accelerator.gather(sums[None].to(self.args.device)).sum(dim=0)
            logs |= _statistics(sums)
            logs.pop("loss_mean")  # Transformers logs the loss by itself
        super().log(logs, start_time)

    # ---- files

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = output_dir or self.args.output_dir or "."
        if not self.args.should_save:
            return
        save_value_head(self.value_model, folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_into(self.value_model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        load_into(self.value_model, self.state.best_model_checkpoint)


def _metrics(found: transformers.EvalPrediction) -> dict[str, float]:
    parts = [torch.as_tensor(x).double() for x in (*found.predictions, found.label_ids)]
    metrics = _statistics(_sums(*parts))
    return {"loss": metrics.pop("loss_mean"), **metrics}


def _sums(last: Tensor, values: Tensor, losses: Tensor, lengths: Tensor, rewards: Tensor) -> Tensor:
    """Sums over rows, which several processes can add up; `_statistics` needs no more."""
    ones = torch.ones_like(last)
    each = (ones, lengths, values, losses, last, rewards, last**2, rewards**2, last * rewards)
    return torch.stack([x.sum() for x in each])


def _statistics(sums: Tensor) -> dict[str, float]:
    """Means over tokens and rows, and what `ValueTrainer` logs; without any variance less."""
    n, tokens, values, losses, last, rewards, last2, rewards2, product = sums.tolist()
    found = {
        "loss_mean": losses / tokens,
        "value_mean": values / tokens,
        "reward_mean": rewards / n,
    }
    a, b = last2 / n - (last / n) ** 2, rewards2 / n - (rewards / n) ** 2
    cross = product / n - last / n * rewards / n
    if b > 1e-12 * max(rewards2 / n, 1e-300):
        found["explained_variance"] = 1 - (a + b - 2 * cross) / b
        if a > 1e-12 * max(last2 / n, 1e-300):
            found["correlation"] = cross / math.sqrt(a * b)
    return found
