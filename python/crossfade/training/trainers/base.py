"""What our trainers on TRL's have in common: log-probs by `linear_logp`, and a look at the data."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer import TRAINING_ARGS_NAME

from .. import rows
from ..fused_head import class_with_logp, seated


@contextlib.contextmanager
def own_heads(trainer: type, add: Callable[..., None]) -> Iterator[None]:
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


class NoReference(nn.Module):
    """In place of a reference that a loss does not need, so that TRL loads none."""


class LogpTrainer:
    """What the three have in common; to be inherited from before TRL's."""

    _trls: type
    _kind: str
    _uniform = False  # whether the loss is the mean of log-probs

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._classes = weakref.WeakKeyDictionary[nn.Module, type]()
        given = inspect.signature(self._trls).bind(*args, **kwargs)
        self._look_at(given.arguments)
        with contextlib.ExitStack() as stack:
            stack.enter_context(own_heads(self._trls, functools.partial(self._add_head, stack)))
            super().__init__(*given.args, **given.kwargs)
        for name in ("train", "eval"):
            self._look_at_tokens(getattr(self, f"{name}_dataset"), f"the {name} dataset")

    def _look_at(self, given: dict[str, Any]) -> None:
        """Check the rows of the data sets among a trainer's arguments."""
        model: Any = given.get("model")
        tokenizer = given.get("processing_class")
        self._known: dict[str, Any] = {
            "vocabulary": vocabulary_of(model) if isinstance(model, nn.Module) else rows.LONGEST,
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
            rows.check_tokens(data, key, vocabulary_of(self.model))

    def evaluate(self, eval_dataset: Any = None, *args: Any, **options: Any) -> Any:
        """As in TRL."""
        if eval_dataset is not None and not isinstance(eval_dataset, (str, dict)):
            eval_dataset = self._check(eval_dataset, "the eval dataset")
        return super().evaluate(eval_dataset, *args, **options)  # type: ignore[misc]

    def _add_head(self, stack: contextlib.ExitStack, model: Any, **options: Any) -> None:
        if not isinstance(model, NoReference):
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
        check_some(f"the {rest[-1]} dataset", prepared, args)
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


def vocabulary_of(model: Any) -> int:
    weight = model.get_input_embeddings().weight
    return rows.LONGEST if getattr(weight, "ds_id", None) is not None else len(weight)


def columns_of(dataset: Any) -> set[str]:
    return set(next(iter(dataset), {}))


def listed(columns: set[str]) -> str:
    return ", ".join(sorted(columns)) or "of an empty dataset"


def check_some(name: str, dataset: Any, args: Any) -> None:
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(
            f"{name} has no row left: none has a token to train on within args.max_length, "
            f"{args.max_length} tokens"
        )


def are_ids(name: str, dataset: Any, needed: tuple[str, ...]) -> bool:
    """Whether a dataset is of ids."""
    columns = columns_of(dataset)
    there, missing = ([x for x in needed if (x in columns) is y] for y in (True, False))
    if there and missing:
        raise ValueError(
            f"{name} has {there[0]}, but no {missing[0]}; ids must be there of all or of none"
        )
    return not missing
