"""What the trainers here have in common: log-probs from `linear_logp`, and checks of their data."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import re
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer import TRAINING_ARGS_NAME

from ...checks import did_you_mean
from .. import processes, rows
from ..fused_head import class_with_logp, seated

logger = processes.get_logger(__name__)


@contextlib.contextmanager
def own_heads(trainer: type, add: Callable[..., None]) -> Iterator[None]:
    """Have TRL call `add` in the block, where it would add its own log-probs to a trainer's models.

    It does so while a trainer is made. At that point a model has been loaded, and nothing (PEFT,
    autocast, DDP) is wrapped around it yet.
    """
    module: Any = sys.modules[trainer.__module__]
    trls = module.add_fused_lm_head
    module.add_fused_lm_head = add
    try:
        yield
    finally:
        module.add_fused_lm_head = trls


@contextlib.contextmanager
def use_cache_kept(model: Any) -> Iterator[None]:
    """Keep what a model's config says of caches, which Transformers' Trainer sets to False.

    Trainers ask for no cache at each call. The config's word would be saved with the model, whose
    `generate` would then read all tokens anew for each one that it writes.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "use_cache"):
        yield
        return
    before = config.use_cache
    try:
        yield
    finally:
        config.use_cache = before


class NoReference(nn.Module):
    """Stands in for the reference of a loss that needs none, so that TRL does not load one."""


class LogpTrainer(processes.InParallel):
    """What our trainers share. Each inherits from it first, and from TRL's trainer second."""

    _trls: type
    _kind: str
    _loss_types: tuple[str, ...] = ()  # those of TRL that its config does not name by itself
    _mean_only = False  # whether the loss is a sum or mean of the log-probs
    _of_rows = True  # whether the loss is of rows, and not of tokens that are counted beforehand

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._classes = weakref.WeakKeyDictionary[nn.Module, type]()
        self._tallies: dict[str, dict[str, tuple[float, float]]] = {"train": {}, "eval": {}}
        given = inspect.signature(self._trls).bind(*args, **kwargs)
        if given.arguments.get("args") is not None:
            self._check_loss_type(given.arguments["args"])
        self._look_at(given.arguments)
        with contextlib.ExitStack() as stack:
            stack.enter_context(own_heads(self._trls, functools.partial(self._add_head, stack)))
            with use_cache_kept(given.arguments.get("model")):
                super().__init__(*given.args, **given.kwargs)
        processes.check_processes(self)
        for name in ("train", "eval"):
            self._look_at_tokens(getattr(self, f"{name}_dataset"), f"the {name} dataset")

    def _check_loss_type(self, args: Any) -> None:
        """Refuse a loss that TRL does not have, which would fail at the first step only."""
        (field,) = (f for f in dataclasses.fields(args) if f.name == "loss_type")
        named = re.findall(r"`'(\w+)'`", field.metadata.get("help", ""))
        known = dict.fromkeys((*named, *self._loss_types))
        for name in [args.loss_type] if isinstance(args.loss_type, str) else args.loss_type:
            if name not in known:
                raise ValueError(
                    f"args.loss_type has {name!r}; it must be among {', '.join(known)}"
                    f"{did_you_mean(name, known)}"
                )

    def _look_at(self, given: dict[str, Any]) -> None:
        """Check the rows of the datasets among the arguments of a trainer."""
        model: Any = given.get("model")
        tokenizer = given.get("processing_class")
        self._known: dict[str, Any] = {
            "vocabulary": vocabulary_of(model) if isinstance(model, nn.Module) else rows.LONGEST,
            "text_field": getattr(given.get("args"), "dataset_text_field", "text"),
            # if TRL is going to load the tokenizer, nothing is known of it and nothing refused yet
            "bare": not callable(tokenizer) or bool(tokenizer("")["input_ids"]),
        }
        if given.get("formatting_func") is not None:
            return  # the function may take rows of any form
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
        """As in TRL. Rows of a dataset that is given here are checked too."""
        if eval_dataset is not None and not isinstance(eval_dataset, (str, dict)):
            eval_dataset = self._check(eval_dataset, "the eval dataset")
        return super().evaluate(eval_dataset, *args, **options)  # type: ignore[misc]

    def _add_head(self, stack: contextlib.ExitStack, model: Any, **options: Any) -> None:
        if not isinstance(model, NoReference):
            self._classes[model] = class_with_logp(model, mean_only=self._mean_only, **options)
            stack.enter_context(seated(model, self._classes[model]))

    @contextlib.contextmanager
    def _heads(self) -> Iterator[None]:
        """Give the models log-probs from `linear_logp` while a ``with`` block lasts."""
        with contextlib.ExitStack() as stack:
            for model, made in list(self._classes.items()):
                stack.enter_context(seated(model, made))
            yield

    def train(self, *args: Any, **options: Any) -> Any:
        """As in Transformers. Callbacks that have an `attach` are given the trainer before."""
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "attach"):
                callback.attach(self)
        with self._heads():
            return super().train(*args, **options)  # type: ignore[misc]

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """As in Transformers."""
        with self._heads():
            return super().evaluation_loop(*args, **options)  # type: ignore[misc]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """As in TRL; with several processes it is the loss of the batch of all of them."""
        stands_in = inputs.pop(processes.STANDS_IN, False)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._heads())
            if self._several and self._of_rows and self._exchanges() and not return_outputs:
                rows = len(inputs["input_ids"]) // self._sequences
                count = 0 if stands_in else rows
                if not self.model.training:
                    count = self._rows_that_count(rows)
                inputs = stack.enter_context(
                    processes.whole_batch(self.accelerator, inputs, rows, count)
                )
            elif self._several and not self._of_rows and self.model.training:
                stack.enter_context(processes.sums_of_all(self.accelerator, not stands_in))
            given = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
            return super().compute_loss(model, inputs, **given)  # type: ignore[misc]

    def _exchanges(self) -> bool:
        """Whether processes can exchange the rows of a batch: those of texts, each in a row."""
        return not getattr(self, "padding_free", False) and not self._is_vision_dataset

    def _divides(self) -> bool:
        return self._several and (self._exchanges() or not self._of_rows)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any
    ) -> Any:
        """As in TRL; with several processes the loss is that of the batch of all of them."""
        plain = super().prediction_step  # type: ignore[misc]
        if not self._several:
            return plain(model, inputs, *args, **options)
        with contextlib.ExitStack() as stack:
            if not self._of_rows and "labels" in inputs:
                inputs = stack.enter_context(self._tokens_of_all(inputs))
            loss, *rest = plain(model, inputs, *args, **options)
        if loss is not None:
            loss = self.accelerator.reduce(loss, reduction="mean")
        return loss, *rest

    @contextlib.contextmanager
    def _tokens_of_all(self, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Have an evaluation's loss divided by the tokens of all processes, as that of a step is.

        The batch that is given has no labels in rows that fill it up.
        """
        if not self.padding_free:
            labels = inputs["labels"].clone()
            labels[self._rows_that_count(len(labels)) :] = processes.IGNORED
            inputs = {**inputs, "labels": labels}
        count = self._get_num_items_in_batch([inputs], self.args.device)
        vars(self)["compute_loss"] = functools.partial(self.compute_loss, num_items_in_batch=count)
        try:
            yield inputs
        finally:
            del vars(self)["compute_loss"]

    def compute_ref_log_probs(self, *args: Any, **options: Any) -> Any:
        """As in TRL."""
        with self._heads():
            return super().compute_ref_log_probs(*args, **options)  # type: ignore[misc]

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, *rest: Any, **options: Any
    ) -> Any:
        """As in TRL, with errors for chats that do not fit the template, and for no rows left.

        The last of `rest` is the dataset's name; for SFT the first one is whether rows are packed.
        """
        given = (dataset, processing_class, args, *rest)
        try:
            prepared = super()._prepare_dataset(*given, **options)  # type: ignore[misc]
        except Exception as error:
            if type(error).__module__.startswith("jinja2"):
                rows.check_template(dataset, processing_class, f"the {rest[-1]} dataset")
            raise
        packed = self._kind == "sft" and bool(rest[0])
        tell_lengths(f"the {rest[-1]} dataset", dataset, prepared, args, packed=packed)
        return prepared

    def _tally(self, mode: str, found: Mapping[str, tuple[float, float]]) -> None:
        """Count figures that the next log tells of as means: a sum and a number of entries each."""
        kept = self._tallies[mode]
        for name, (x, n) in found.items():
            before = kept.get(name, (0.0, 0.0))
            kept[name] = before[0] + x, before[1] + n

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """As in TRL, with the means of what was counted since the last log."""
        mode = "train" if self.model.training else "eval"
        for name, (x, n) in self._tallies[mode].items():
            if n:
                self._metrics[mode][name] = [x / n]
        self._tallies[mode].clear()
        super().log(logs, *args, **options)  # type: ignore[misc]

    def _send_telemetry(self) -> None:
        """Send nothing, where TRL would tell its makers that it was used."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        # the arguments, which Transformers pickles and nothing reads
        Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        # TRL keeps them in a file whose name is a hash of the data and the model. They also depend
        # on who computes them, in which dtype, and where sequences are cut: this joins the hash
        ours = ("crossfade", self.accelerator.mixed_precision, str(self.data_collator))
        plain = self._precompute_model_hash
        self._precompute_model_hash = (plain, *ours, getattr(self, "ld_alpha", None))
        # a data set in memory would have a temporary file of its own in each process, of which the
        # first one alone writes
        path = getattr(dataset, "_get_cache_file_path", None)
        if self._several and path is not None:
            dataset._get_cache_file_path = lambda key: processes.of_the_first(path(key))
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)  # type: ignore[misc]
        finally:
            self._precompute_model_hash = plain
            vars(dataset).pop("_get_cache_file_path", None)

    _sequences = 1  # how many of them a row has
    _get_num_items_in_batch: Callable[..., Any]
    _is_vision_dataset: bool
    padding_free: bool
    args: Any
    model: Any
    accelerator: Any
    callback_handler: Any
    data_collator: Any
    _precompute_model_hash: Any
    _metrics: dict[str, dict[str, list[float]]]


def vocabulary_of(model: Any) -> int:
    """How many token ids a model has; without a limit if ZeRO-3 keeps its embeddings in parts."""
    weight = model.get_input_embeddings().weight
    return rows.LONGEST if getattr(weight, "ds_id", None) is not None else len(weight)


def columns_of(dataset: Any) -> set[str]:
    """The keys of the first row."""
    return set(next(iter(dataset), {}))


def columns_error(name: str, columns: set[str], wanted: str) -> ValueError:
    """The error of a dataset that lacks columns; it says which one may be misspelt.

    Args:
        wanted: the columns that there should be, as the error lists them.
    """
    known = set(re.findall(r"\w+", wanted)) - {"and", "or"}
    hints = (did_you_mean(column, known - columns) for column in sorted(columns - known))
    listed = ", ".join(sorted(columns)) or "of an empty dataset"
    return ValueError(
        f"{name} has the columns {listed}; it must have {wanted}{next(filter(None, hints), '')}"
    )


def tell_lengths(name: str, given: Any, prepared: Any, args: Any, *, packed: bool = False) -> None:
    """Log how many rows `args.max_length` cuts or leaves out, and require that one is left.

    Args:
        name: what messages call the dataset.
        given, prepared: the dataset before and after it was prepared. Of streams nothing is known.
        packed: whether rows were joined, so that they cannot be counted any more.
    """
    if not hasattr(prepared, "__len__"):
        return
    if len(prepared) == 0:
        raise ValueError(
            f"{name} has no row left: none has a token to train on within args.max_length, "
            f"{args.max_length} tokens"
        )
    if packed or args.max_length is None:
        return
    unpaired = "chosen" in given.column_names and "completion_ids" in prepared.column_names
    before = len(given) * (2 if unpaired else 1)  # KTO makes two rows of a pair
    if before > len(prepared):
        logger.warning(
            "%s: %d of %d rows are left out, as args.max_length, %d tokens, leaves nothing of what "
            "they would train",
            name,
            before - len(prepared),
            before,
            args.max_length,
        )
    # rows of SFT are cut already
    cut = "input_ids" in prepared.column_names
    reach = sum(n + cut > args.max_length for n in rows.lengths(prepared))
    if reach:
        logger.warning(
            "%s: %d of %d rows have %s args.max_length, %d tokens; the rest of them is cut off",
            name,
            reach,
            len(prepared),
            "at least" if cut else "more than",
            args.max_length,
        )


def are_ids(name: str, dataset: Any, needed: tuple[str, ...]) -> bool:
    """Whether a dataset has columns of ids: all of `needed`, or else none of them."""
    columns = columns_of(dataset)
    there, missing = ([x for x in needed if (x in columns) is y] for y in (True, False))
    if there and missing:
        raise ValueError(
            f"{name} has {there[0]}, but no {missing[0]}; ids must be there of all or of none"
        )
    return not missing
