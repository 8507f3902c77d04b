"""A callback that measures what preference training does to each behaviour while it trains."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import TrainerCallback
from transformers.integrations.fsdp import is_fsdp_managed_module

from ..checks import check_number, explained, warn
from ..decoding.settings import check_int
from ..extras import require
from . import answers
from .figures import Warned
from .questions import NO, YES, Pair, read_rows
from .record import Record, read, read_start, write_start
from .rows import TAG, Reader
from .states import term_model
from .watched import Watched

logger = logging.getLogger(__name__)
BETA = 0.1  # that of TRL's trainers, where the trainer has none


@explained()
class Watch(TrainerCallback):
    """Measures behaviours before the first step of a training, every few steps, and at its end.

    Rows that are held out are read under the model as it is then, without gradients and without
    dropout. Nothing of the training changes: the weights are those of a run without it, to the last
    bit. It watches any trainer of Transformers that trains a causal LM::

        watch = dynamics.Watch(held_out, every=20)
        trainer = training.DPOTrainer(..., callbacks=[watch])     # the trainers here
        watch.attach(trls_trainer)                                # any other

    Figures of a behaviour are means over its rows, as pairs of responses. Log-probs are of whole
    responses, in nats. The growth of a pair is that of ``log p(chosen) - log p(rejected)`` since
    step 0.

    * `loss`: DPO's, ``-log sigmoid(beta * growth)``. The reference is the model at step 0, whatever
      the trainer's own is.
    * `accuracy`: the share of pairs with a growth above 0. `plain_accuracy`: that of pairs whose
      chosen response is likelier than the other; of statements, which the model answers rightly.
      Ties count by half in both.
    * `margin`: ``log p(chosen) - log p(rejected)``. `growth`, and `growth_error`, the reach of its
      95 % interval (Student's t; None for one pair).
    * `chosen`, `rejected`: the log-probs of both responses. `argmax`, `entropy`: the log-prob of
      the most likely token, and the entropy, each a mean over the tokens of the chosen response.
    * `n`: how many pairs these are of, without those that are not finite now.
    * `head`, `head_cosine`: of statements under a head that is trained and not tied: how far its
      weights have moved along the direction in which the behaviour pulls them at step 0
      (arXiv:2403.18742, Theorem 4.1), and the cosine to it of all of the change in how the head
      tells the answers apart. `predicted` is how far gradient descent on DPO's loss over such
      statements first moves it there, for a learning rate of 1.

    They are logged as ``watch/{behaviour}/{figure}`` to `state.log_history` and to all of the
    trainer's `report_to`, and kept in `history` and in ``watch.json`` in the trainer's
    `output_dir`. A run that is resumed from a checkpoint goes on with the history up to its step,
    and with the log-probs of the first step 0, which are beside it in ``watch.safetensors``. Where
    several processes train, the first one measures, and the others wait for it at their next step.

    It warns once of a behaviour that another one starves, and of one whose responses likelihood
    leaves, see `figures.warnings`.

    Attributes:
        history: ``{"step": 20, "behaviours": {"kindness": {"loss": ..., ...}}}`` of each step that
            was measured.
        warnings: ``{"step": 40, "kind": "starved", "behaviour": ..., "text": ...}``.
        record: what ``watch.json`` holds; None before a training.
        seconds: what all measuring has taken.

    Args:
        rows: as `statistics` takes them: statements, ``{"behaviour", "text", "label"}``, which
            become pairs as in `statement_pairs`; or pairs of responses with a tag, as texts or ids,
            which are encoded as `training` does and not cut. Rows without a tag or a token, with
            more tokens than the model's context, or with a log-prob that is not finite at step 0
            are left out, with a warning.
        every: how many steps are between two measurements.
        tokenizer: of the rows; None: the trainer's.
        tag: the key of the name of a row's behaviour.
        yes, no: the answers to statements, as in `statement_pairs`.
        beta: of `loss` and `predicted`; None: the trainer's, or 0.1 if it has none.
        max_batch: how many texts share a forward at most; None: as many as memory is meant for.
        name: what files and figures are called, where a trainer has several.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be. Rows are looked
            at when training begins.
        NotImplementedError: as training begins, for a model that no process holds whole (FSDP,
            ZeRO-3), or with learned prompts.
    """

    def __init__(
        self,
        rows: Iterable[Any],
        every: int = 20,
        *,
        tokenizer: Any = None,
        tag: str = TAG,
        yes: str = YES,
        no: str = NO,
        beta: float | None = None,
        max_batch: int | None = None,
        name: str = "watch",
    ) -> None:
        if not isinstance(rows, Iterable) or isinstance(rows, (str, bytes, dict)):
            raise TypeError(f"rows is a {type(rows).__name__}; it must be a list of rows")
        self.rows = list(rows)
        if not self.rows:
            raise ValueError("rows is empty; it must have at least one row")
        check_int("every", every, 1)
        check_int("max_batch", max_batch, 1)
        if beta is not None and check_number("beta", beta) <= 0:
            raise ValueError(f"beta is {beta}; it must be above 0")
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"name is {name!r:.80}; it must be an identifier")
        self.every, self.tokenizer, self.tag = every, tokenizer, tag
        self.yes, self.no, self.beta, self.max_batch, self.name = yes, no, beta, max_batch, name
        self._record: Record | None = None
        self._watched: Watched | None = None
        self._trainer: Any = None

    @property
    def history(self) -> list[dict[str, Any]]:
        return [] if self._record is None else self._record.history

    @property
    def warnings(self) -> list[dict[str, Any]]:
        return [] if self._record is None else self._record.warnings

    @property
    def seconds(self) -> float:
        return 0.0 if self._record is None else self._record.seconds

    @property
    def record(self) -> dict[str, Any] | None:
        return None if self._record is None else dataclasses.asdict(self._record)

    @staticmethod
    def load(path: str | Path) -> dict[str, Any]:
        """What a run's ``watch.json`` holds; the path is its own, or the run's `output_dir`.

        Raises:
            OSError, ValueError: the file cannot be read, or is no such file.
        """
        path = Path(path)
        return read(path / "watch.json" if path.is_dir() else path)

    def attach(self, trainer: Any) -> Watch:
        """Watch a trainer, whose reporters hear of the figures too.

        The trainers of `crossfade.training` do this with each callback when they begin to train.

        Returns:
            The watch itself.
        """
        if not isinstance(trainer, transformers.Trainer):
            raise TypeError(
                f"trainer is a {type(trainer).__name__}; it must be a trainer of Transformers"
            )
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        self._trainer = weakref.ref(trainer)
        return self

    # ---- what a trainer calls

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **given: Any
    ) -> None:
        """Measure step 0, or take over what was seen up to the step that training goes on from."""
        model = whole(model)
        if not state.is_world_process_zero:
            return
        begun = time.perf_counter()
        reader, pairs = self._read_rows(model, given.get("processing_class"))
        before = self._before(args, pairs) if state.global_step else None
        if before is None:
            with autocast(args, model):
                tensors = Watched.begin(model, pairs, self.max_batch)
            write_start(self._file(args, "safetensors"), tensors, pairs)
        else:
            tensors = before[1]
        self._watched = watched = Watched(pairs, tensors)
        for number in watched.left_out:
            reader.left_out.add(number, "with a log-prob that is not finite")
        reader.left_out.warn()
        beta = self._beta(args, state)
        self._record = Record(
            self.every, beta, watched.kind, answers.kind_of(model), watched.counts
        )
        if before is not None:
            self._record.go_on(before[0], state.global_step)
        elif watched.answers is not None:
            self._record.predicted = watched.answers.rates(model, watched.counts, beta)
        self._note()
        if args.report_to and self._attached(state) is None:
            warn(
                "the trainer's reporters do not hear of what Watch measures, as it has not been "
                "told of the trainer; watch.attach(trainer) does that"
            )
        self._record.seconds += time.perf_counter() - begun
        if not self.history:
            self._measure(args, state, control, model)

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **given: Any
    ) -> None:
        """Measure each step that is due, and the last one."""
        last = control.should_training_stop or state.global_step >= state.max_steps
        if last or state.global_step % self.every == 0:
            self._measure(args, state, control, model)

    def on_epoch_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **given: Any
    ) -> None:
        """Measure the last step, if another callback stopped the training there."""
        if control.should_training_stop:
            self._measure(args, state, control, model)

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **given: Any
    ) -> None:
        """Measure the last step, unless the weights are those of an earlier one by now."""
        if not (args.load_best_model_at_end and state.best_model_checkpoint):
            self._measure(args, state, control, model)

    # ---- rows and files

    def _read_rows(self, model: Any, processor: Any) -> tuple[Reader, list[Pair]]:
        tokenizer = self.tokenizer or getattr(processor, "tokenizer", processor)
        term = term_model(model)
        reader = Reader(tokenizer, self.tag, term.vocabulary, term.context)
        pairs = list(read_rows(self.rows, reader, self.yes, self.no))
        if not pairs:
            reader.left_out.warn()
            raise ValueError("rows has no row left that can be watched; it must have one")
        return reader, pairs

    def _file(self, args: Any, ending: str) -> Path:
        return Path(args.output_dir, f"{self.name}.{ending}")

    def _before(
        self, args: Any, pairs: list[Pair]
    ) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """What the run that is resumed has seen; None, with a warning, if it is not there."""
        try:
            start = read_start(self._file(args, "safetensors"), pairs)
            return read(self._file(args, "json")), start
        except OSError as error:
            warn(
                f"the history before this step cannot be had ({error}); it begins here, and "
                "compares with the model as it is now"
            )
            return None

    def _beta(self, args: Any, state: Any) -> float:
        trainer = self._attached(state)
        given = (self.beta, getattr(trainer, "reward_scale", None), getattr(args, "beta", None))
        return float(next((x for x in given if x), BETA))

    def _attached(self, state: Any) -> Any:
        """The trainer whose state this is, if the watch has been told of it."""
        trainer = self._trainer and self._trainer()
        return trainer if trainer is not None and trainer.state is state else None

    def _note(self) -> None:
        """Say what the figures of the head are, where they are of statements."""
        assert self._record is not None
        if self._record.kind == "statements" and self._record.head in answers.NOTES:
            self._record.notes.append(answers.NOTES[self._record.head])
            logger.warning("%s: %s", self.name, self._record.notes[-1])

    # ---- measuring

    def _measure(self, args: Any, state: Any, control: Any, model: Any) -> None:
        """Measure the model once a step, log the figures and write them down."""
        kept, watched, step = self._record, self._watched, state.global_step
        if not state.is_world_process_zero or kept is None or watched is None:
            return
        if kept.history and kept.history[-1]["step"] >= step:
            return
        begun = time.perf_counter()
        with autocast(args, model):
            found, warned = watched.measure(whole(model), kept.beta, self.max_batch)
        kept.history.append({"step": step, "behaviours": found})
        self._warn(warned, step)
        kept.seconds += time.perf_counter() - begun
        kept.write(self._file(args, "json"))
        self._log(
            {
                f"{self.name}/{behaviour}/{name}": x
                for behaviour, own in found.items()
                for name, x in own.items()
                if x is not None
            },
            state,
            control,
        )

    def _warn(self, found: Iterable[Warned], step: int) -> None:
        """Warn of what a behaviour has not been warned of yet."""
        for kind, behaviour, text in found:
            if all((x["kind"], x["behaviour"]) != (kind, behaviour) for x in self.warnings):
                row = {"step": step, "kind": kind, "behaviour": behaviour, "text": text}
                self.warnings.append(row)
                warn(f"step {step}: {text}")

    def _log(self, logs: dict[str, float], state: Any, control: Any) -> None:
        """Log figures by the trainer, or without one to the history of its state."""
        trainer = self._attached(state)
        if trainer is None:
            state.log_history.append({**logs, "epoch": state.epoch, "step": state.global_step})
            return
        due = control.should_log  # which a log sets to False, so that the loss would not be logged
        # that of TRL's trainers also tells of the figures of training so far, and forgets them
        transformers.Trainer.log(trainer, logs)
        control.should_log = due


def whole(model: Any) -> Any:
    """The model inside what trains it on several processes.

    Raises:
        NotImplementedError: a process holds a part of its weights alone.
    """
    accelerate = require("accelerate.utils", "train")
    model = accelerate.extract_model_from_parallel(model, keep_torch_compile=False)
    parts = any(hasattr(p, x) for p in model.parameters() for x in ("ds_id", "device_mesh"))
    if parts or is_fsdp_managed_module(model):
        raise NotImplementedError(
            f"the weights of the {type(model).__name__} are in parts (FSDP, ZeRO-3 or tensor "
            "parallelism); Watch reads models that a process holds whole"
        )
    return model


def autocast(args: Any, model: Any) -> AbstractContextManager[Any]:
    """The mixed precision of a training, in which its model is read too."""
    device = next(model.parameters()).device.type
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if getattr(args, name, False):
            return torch.autocast(device, dtype)
    return contextlib.nullcontext()
