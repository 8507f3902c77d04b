"""TRL's trainers with the log-probs of `linear_logp`: few logits are computed, in tiles.

All that TRL documents of these classes holds: arguments, datasets, PEFT, references, metrics and
checkpoints. Products of the head are float32, also under bfloat16 autocast.

Besides TRL's formats, datasets may be of ids, with texts beside them or without: `prompt_ids` with
`chosen_ids` and `rejected_ids`, or with `completion_ids`. They are trained on as they are: sampled
tokens are not what their text would be encoded as, and nothing is put at their end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer import TRAINING_ARGS_NAME

from .. import losses
from ..extras import require
from . import rows
from .fused_head import IGNORED, class_with_logp, seated
from .kl_pairs import with_kl_responses

trl = require("trl", "train")

PAIR_LOSSES: dict[str, Callable[..., Tensor]] = {**losses.PAIR_LOSSES, "modpo": losses.modpo}
WITHOUT_REFERENCE = ("orpo", "simpo")
# of DPOConfig, what a loss of ours takes from its own options, or does without
DPO_OPTIONS = (
    "beta",
    "discopop_tau",
    "f_alpha_divergence_coef",
    "f_divergence_type",
    "label_smoothing",
    "ld_alpha",
    "loss_type",
    "loss_weights",
    "use_weighting",
)


@contextlib.contextmanager
def _own_heads(trainer: type, add: Callable[..., None]) -> Iterator[None]:
    """While a trainer of TRL's is made, it calls `add` to give its models log-probs.

    Only there are they between a model and what wraps it: PEFT, autocast, DDP.
    """
    module: Any = sys.modules[trainer.__module__]
    trls = module.add_fused_lm_head
    module.add_fused_lm_head = add
    try:
        yield
    finally:
        module.add_fused_lm_head = trls


class _NoReference(nn.Module):
    """In place of a reference that a loss does not need, so that TRL loads none."""


class _Trainer:
    """What the three have in common; to be inherited from before TRL's."""

    _trls: type
    _kind: str
    _uniform = False  # whether the loss is the mean of log-probs

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._classes = weakref.WeakKeyDictionary[nn.Module, type]()
        given = inspect.signature(self._trls).bind(*args, **kwargs)
        self._look_at(given.arguments)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_own_heads(self._trls, functools.partial(self._add_head, stack)))
            super().__init__(*given.args, **given.kwargs)
        for name in ("train", "eval"):
            self._look_at_tokens(getattr(self, f"{name}_dataset"), f"the {name} dataset")

    def _look_at(self, given: dict[str, Any]) -> None:
        """Check the rows of the data sets among a trainer's arguments."""
        model: Any = given.get("model")
        tokenizer = given.get("processing_class")
        self._known: dict[str, Any] = {
            "vocabulary": _vocabulary(model) if isinstance(model, nn.Module) else rows.LONGEST,
            "text_field": getattr(given.get("args"), "dataset_text_field", "text"),
            # where TRL loads the tokenizer, and where there is none, it is seen afterwards
            "bare": not callable(tokenizer) or bool(tokenizer("")["input_ids"]),
        }
        if given.get("formatting_func") is not None:
            return  # which may take any rows
        for key, name in (("train_dataset", "train"), ("eval_dataset", "eval")):
            data = given.get(key)
            if isinstance(data, dict):
                given[key] = {k: self._check(x, f"the {k} dataset") for k, x in data.items()}
            elif data is not None:
                given[key] = self._check(data, f"the {name} dataset")

    def _check(self, dataset: Any, name: str) -> Any:
        return rows.checked(dataset, self._kind, name, **self._known)

    def _look_at_tokens(self, prepared: Any, name: str) -> None:
        for key, data in (prepared if isinstance(prepared, dict) else {name: prepared}).items():
            rows.check_tokens(data, key, _vocabulary(self.model))

    def evaluate(self, eval_dataset: Any = None, *args: Any, **options: Any) -> Any:
        """As in TRL."""
        if eval_dataset is not None and not isinstance(eval_dataset, (str, dict)):
            eval_dataset = self._check(eval_dataset, "the eval dataset")
        return super().evaluate(eval_dataset, *args, **options)  # type: ignore[misc]

    def _add_head(self, stack: contextlib.ExitStack, model: Any, **options: Any) -> None:
        if not isinstance(model, _NoReference):
            self._classes[model] = class_with_logp(model, uniform=self._uniform, **options)
            stack.enter_context(seated(model, self._classes[model]))

    @contextlib.contextmanager
    def _heads(self) -> Iterator[None]:
        """The models with log-probs by `linear_logp`, which they have for the block alone."""
        with contextlib.ExitStack() as stack:
            for model, made in list(self._classes.items()):
                stack.enter_context(seated(model, made))
            yield

    def train(self, *args: Any, **options: Any) -> Any:
        """As in Transformers."""
        with self._heads():
            return super().train(*args, **options)  # type: ignore[misc]

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """As in Transformers."""
        with self._heads():
            return super().evaluation_loop(*args, **options)  # type: ignore[misc]

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        """As in TRL."""
        with self._heads():
            return super().compute_loss(*args, **options)  # type: ignore[misc]

    def compute_ref_log_probs(self, *args: Any, **options: Any) -> Any:
        """As in TRL."""
        with self._heads():
            return super().compute_ref_log_probs(*args, **options)  # type: ignore[misc]

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, *rest: Any, **options: Any
    ) -> Any:
        """TRL's, which leaves out rows that do not fit; `rest` ends with the dataset's name."""
        given = (dataset, processing_class, args, *rest)
        try:
            prepared = super()._prepare_dataset(*given, **options)  # type: ignore[misc]
        except Exception as error:
            if type(error).__module__.startswith("jinja2"):
                rows.check_template(dataset, processing_class, f"the {rest[-1]} dataset")
            raise
        _check_some(f"the {rest[-1]} dataset", prepared, args)
        return prepared

    def _send_telemetry(self) -> None:
        """Nothing is sent to anybody."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        # a pickle of the arguments, which nothing reads
        Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        # TRL keeps these in a file named after data and model. What they depend on besides: the
        # way they are computed, its dtype, and where sequences are cut
        ours = ("crossfade", self.accelerator.mixed_precision, str(self.data_collator))
        plain = self._precompute_model_hash
        self._precompute_model_hash = (plain, *ours, getattr(self, "ld_alpha", None))
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)  # type: ignore[misc]
        finally:
            self._precompute_model_hash = plain

    args: Any
    model: Any
    accelerator: Any
    data_collator: Any
    _precompute_model_hash: Any


class SFTTrainer(_Trainer, trl.SFTTrainer):  # type: ignore[name-defined]
    """TRL's `SFTTrainer`, by `linear_logp`.

    Datasets may have `prompt_ids` and `completion_ids`, or `input_ids` with a `completion_mask`:
    the loss is of the completions, unless `completion_only_loss` is False. Where all weights are
    trained on a CPU, the head takes three products a step and memory of twice its weight, see
    `linear_logp(uniform=True)`.
    """

    _trls = trl.SFTTrainer
    _kind = "sft"

    def __init__(self, model: Any, args: Any = None, *rest: Any, **options: Any) -> None:
        self._uniform = getattr(args, "loss_type", "nll") == "nll"
        super().__init__(model, args, *rest, **options)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, *rest: Any, **options: Any
    ) -> Any:
        ids = _ids("the dataset", dataset, ("prompt_ids", "completion_ids"))
        columns = _columns(dataset)
        if not ids and not {"input_ids", "messages", "conversations"} & columns:
            formatted = (rest[1] if len(rest) > 1 else options.get("formatting_func")) is not None
            text = args.dataset_text_field in columns or {"prompt", "completion"} <= columns
            if not formatted and not text:
                raise ValueError(
                    f"the dataset has the columns {_listed(columns)}; it must have prompt and "
                    f"completion, messages, {args.dataset_text_field}, prompt_ids and "
                    "completion_ids, or input_ids"
                )
        mask = "input_ids" in columns and "completion_mask" in columns
        if "labels" not in columns and (ids or mask):
            if args.assistant_only_loss and "assistant_masks" not in columns:
                raise ValueError(
                    "args.assistant_only_loss is True, and the dataset is of ids without "
                    "assistant_masks; it must be False"
                )
            every = args.completion_only_loss is False
            dataset = dataset.map(functools.partial(_labelled, every=every))
        return super()._prepare_dataset(dataset, processing_class, args, *rest, **options)


def _labelled(row: Mapping[str, Any], every: bool) -> dict[str, list[int]]:
    """`input_ids`, and `labels` of the completion alone or of every token."""
    if "prompt_ids" in row:
        ids = row["prompt_ids"] + row["completion_ids"]
        counts = [0] * len(row["prompt_ids"]) + [1] * len(row["completion_ids"])
    else:
        ids, counts = row["input_ids"], row["completion_mask"]
    assistant = row.get("assistant_masks", [1] * len(ids))
    masks = zip(ids, counts, assistant, strict=True)
    labels = [i if (every or c) and a else IGNORED for i, c, a in masks]
    return {"input_ids": ids, "labels": labels}


class KTOTrainer(_Trainer, trl.KTOTrainer):  # type: ignore[name-defined]
    """TRL's `KTOTrainer`, by `linear_logp`.

    Datasets may have `prompt_ids` and `completion_ids` besides `label`. The KL term's responses
    answer other prompts, also where a batch has a prompt several times or a single row
    (`training.kl_pairs`); where it has not, they are TRL's.
    """

    _trls = trl.KTOTrainer
    _kind = "kto"

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        name = f"the {dataset_name} dataset"
        columns = _columns(dataset)
        if "chosen_ids" in columns and "completion_ids" not in columns:
            raise ValueError(
                f"{name} has chosen_ids; KTO is of single responses, it must have "
                "completion_ids and label"
            )
        ids = _ids(name, dataset, ("prompt_ids", "completion_ids"))
        paired = {"chosen", "rejected"} <= columns
        if not paired and not ("label" in columns and (ids or "completion" in columns)):
            raise ValueError(
                f"{name} has the columns {_listed(columns)}; it must have prompt, completion and "
                "label, prompt_ids, completion_ids and label, or chosen and rejected"
            )
        if not ids:
            dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        elif args.max_length is not None:
            dataset = dataset.filter(lambda row: len(row["prompt_ids"]) < args.max_length)
        _check_some(name, dataset, args)
        if not self.calculate_KL:
            return dataset
        return with_kl_responses(dataset, args.per_device_train_batch_size, name)


class DPOTrainer(_Trainer, trl.DPOTrainer):  # type: ignore[name-defined]
    """TRL's `DPOTrainer`, by `linear_logp`, and with the losses of `crossfade.losses`.

    Datasets may have `prompt_ids`, `chosen_ids` and `rejected_ids`.

    Args:
        loss: a name in `crossfade.losses.PAIR_LOSSES`, or "modpo"; None leaves the loss to TRL's
            `args.loss_type`. Rewards that are logged are beta times log-ratios; without a
            reference, for "orpo" and "simpo", times mean log-probs, and no reference is loaded.
        loss_options: the loss's arguments by name, such as ``{"beta": 2.0, "gamma": 1.0}``. Those
            of `args` that TRL's own losses take must then be left as they are. "modpo" takes its
            `margins` from the dataset's column of that name: of each row the list of the other
            objectives' margins.

    Raises:
        ValueError, TypeError: a loss or an option is not known, or does not fit the others.
        NotImplementedError: `args.use_weighting`, whose weights `linear_logp` does not have.
    """

    _trls = trl.DPOTrainer
    _kind = "dpo"

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        *rest: Any,
        loss: str | None = None,
        loss_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self._pair_loss = _pair_loss(loss, loss_options, args)
        self._needs_margins = loss == "modpo"
        self._without_reference = loss in WITHOUT_REFERENCE
        self._reward_scale = _beta(loss, loss_options)
        if args is not None and args.use_weighting:
            raise NotImplementedError(
                "args.use_weighting is True; it must be False, as linear_logp does not give the "
                "sums of squared probabilities that its weights are made of. trl.DPOTrainer does"
            )
        if self._without_reference:
            _check_no_reference(loss, ref_model, args)
            ref_model = _NoReference()
        super().__init__(model, ref_model, args, *rest, **options)
        if self._without_reference:
            self.ref_model = None
        if self._needs_margins:
            self.data_collator = _WithMargins(self.data_collator)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        name = f"the {dataset_name} dataset"
        ids = _ids(name, dataset, ("prompt_ids", "chosen_ids", "rejected_ids"))
        columns = _columns(dataset)
        if not ids and not {"chosen", "rejected"} <= columns:
            raise ValueError(
                f"{name} has the columns {_listed(columns)}; it must have prompt, chosen and "
                "rejected, or prompt_ids, chosen_ids and rejected_ids"
            )
        if self._needs_margins and "margins" not in columns:
            raise ValueError(
                f"{name} has the columns {_listed(columns)}; with loss='modpo' it must have margins"
            )
        if not ids:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if args.max_length is not None and args.truncation_mode == "keep_start":
            # as TRL does with texts: of these rows nothing but the prompt would be left
            dataset = dataset.filter(lambda row: len(row["prompt_ids"]) < args.max_length)
        _check_some(name, dataset, args)
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._needs_margins and "margins" not in self._signature_columns:
            self._signature_columns.append("margins")

    def compute_ref_log_probs(self, model: Any, inputs: Mapping[str, Any]) -> Any:
        return super().compute_ref_log_probs(
            model, {name: x for name, x in inputs.items() if name != "margins"}
        )

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        if self._pair_loss is None:
            return super()._compute_loss(model, inputs, return_outputs)
        no_inputs = ("completion_mask", "margins", "ref_chosen_logps", "ref_rejected_logps")
        given = {name: x for name, x in inputs.items() if name not in no_inputs}
        given["use_cache"] = False
        if self.aux_loss_enabled:
            given["output_router_logits"] = True
        mask = inputs["completion_mask"]
        labels = inputs["input_ids"].masked_fill(mask == 0, IGNORED)
        outputs = model(**given, labels=labels, fused_lm_head=True)
        mask = mask[:, 1:]
        length = mask.shape[1]  # prompt-learning PEFT puts more before it
        chosen, rejected = outputs.log_probs[:, -length:].sum(1).chunk(2)
        pairs = losses.Pairs(
            chosen,
            rejected,
            *self._references(inputs),
            # responses that were cut away whole have log-prob 0, whatever their length
            *mask.sum(1).clamp(min=1).chunk(2),
        )
        extra = {"margins": inputs["margins"]} if self._needs_margins else {}
        loss = self._pair_loss(pairs, **extra).mean()
        metrics = {"logps/chosen": chosen, "logps/rejected": rejected}
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            metrics["aux_loss"] = outputs.aux_loss
        rewards = pairs.means if self._without_reference else pairs.log_ratios
        good, bad = (self._reward_scale * x for x in rewards)
        metrics |= {"rewards/chosen": good, "rewards/rejected": bad}
        metrics |= {"rewards/margins": good - bad, "rewards/accuracies": (good > bad).float()}
        self._record(metrics, outputs, mask, inputs["attention_mask"].sum())
        if not return_outputs:
            return loss
        with torch.no_grad():  # for `compute_metrics`, which wants logits
            return loss, model(**given)

    def _references(self, inputs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        if self._without_reference:
            return None, None
        if self.precompute_ref_logps:
            return inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        return self.compute_ref_log_probs(self.ref_model or self.model, inputs)

    def _record(
        self, metrics: dict[str, Tensor], outputs: Any, mask: Tensor, tokens: Tensor
    ) -> None:
        """Means over the batch and all processes; of `mask`'s tokens, over the responses'."""
        mode = "train" if self.model.training else "eval"
        kept = self._metrics[mode]
        for name, x in metrics.items():
            kept[name].append(self.accelerator.gather(x.detach()).mean().item())
        fields = outputs.entropy, outputs.is_top1, outputs.mean_logits  # 0 outside of responses
        chosen, rejected = (
            [self.accelerator.gather_for_metrics(x).sum().item() for x in sums]
            for sums in zip(*([h.sum() for h in x.chunk(2)] for x in (mask, *fields)), strict=True)
        )
        for name, (count, _, _, logits) in (("chosen", chosen), ("rejected", rejected)):
            kept[f"logits/{name}"].append(logits / max(count, 1))
        kept["entropy"].append((chosen[1] + rejected[1]) / max(chosen[0] + rejected[0], 1))
        kept["mean_token_accuracy"].append(chosen[2] / max(chosen[0], 1))
        if mode == "train":
            read = self.accelerator.gather_for_metrics(tokens).sum().item()
            self._total_train_tokens += read // self._tp_size
        kept["num_tokens"] = [self._total_train_tokens]


@dataclasses.dataclass
class _WithMargins:
    """A collator's batch, and the rows' margins ``[pairs, others]``."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(rows)
        counts = {len(row["margins"]) for row in rows}
        if len(counts) > 1:
            raise ValueError(f"margins has rows of {sorted(counts)} numbers; all must have as many")
        return {**batch, "margins": torch.tensor([row["margins"] for row in rows]).float()}


def _pair_loss(
    name: str | None, options: Mapping[str, Any] | None, args: Any
) -> Callable[..., Tensor] | None:
    """The loss with its options, after a look at whether they are its own."""
    if name is None:
        if options:
            raise ValueError("loss_options is given, and loss is None; it must be a name")
        return None
    if name not in PAIR_LOSSES:
        raise ValueError(f"loss is {name!r}; it must be among {', '.join(PAIR_LOSSES)}")
    loss = PAIR_LOSSES[name]
    options = dict(options or {})
    known = [p for p in inspect.signature(loss).parameters if p not in ("pairs", "margins")]
    for key in options:
        if key not in known:
            raise ValueError(f"loss_options has {key!r}; for {name} it may have {', '.join(known)}")
    needed = ("weight", "other_weights") if name == "modpo" else ()
    for key in needed:
        if key not in options:
            raise ValueError(f"loss_options has no {key!r}, which modpo must have")
    if args is not None:
        fields = {field.name: field for field in dataclasses.fields(args)}
        for key in DPO_OPTIONS:
            factory = fields[key].default_factory
            plain = fields[key].default if factory is dataclasses.MISSING else factory()
            if getattr(args, key) != plain:
                raise ValueError(
                    f"args.{key} is {getattr(args, key)!r}; with loss={name!r} it must be left at "
                    "its default, and what the loss takes be in loss_options"
                )
    bound: Callable[..., Tensor] = functools.partial(loss, **options)
    one = torch.zeros(1)
    empty = losses.Pairs(one, one, one, one, one.long() + 1, one.long() + 1)
    others = options.get("other_weights")
    width = len(others) if isinstance(others, (list, tuple)) else 0
    bound(empty, **({"margins": torch.zeros(1, width)} if name == "modpo" else {}))  # its checks
    return bound


def _beta(name: str | None, options: Mapping[str, Any] | None) -> float:
    """What a loss's rewards are of its log-ratios; 1 where it has no beta."""
    if name is None:
        return 1.0
    beta = inspect.signature(PAIR_LOSSES[name]).parameters.get("beta")
    return float((options or {}).get("beta", 1.0 if beta is None else beta.default))


def _check_no_reference(loss: str | None, ref_model: Any, args: Any) -> None:
    given = {"ref_model": ref_model is not None}
    for name in ("precompute_ref_log_probs", "sync_ref_model"):
        given[f"args.{name}"] = args is not None and getattr(args, name)
    for name, is_given in given.items():
        if is_given:
            raise ValueError(f"{name} is given; loss={loss!r} has no reference")


def _vocabulary(model: Any) -> int:
    weight = model.get_input_embeddings().weight
    return rows.LONGEST if getattr(weight, "ds_id", None) is not None else len(weight)


def _columns(dataset: Any) -> set[str]:
    return set(next(iter(dataset), {}))


def _listed(columns: set[str]) -> str:
    return ", ".join(sorted(columns)) or "of an empty dataset"


def _check_some(name: str, dataset: Any, args: Any) -> None:
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(
            f"{name} has no row left: none has a token to train on within args.max_length, "
            f"{args.max_length} tokens"
        )


def _ids(name: str, dataset: Any, needed: tuple[str, ...]) -> bool:
    """Whether a dataset is of ids."""
    columns = _columns(dataset)
    there, missing = ([x for x in needed if (x in columns) is y] for y in (True, False))
    if there and missing:
        raise ValueError(
            f"{name} has {there[0]}, but no {missing[0]}; ids must be there of all or of none"
        )
    return not missing
