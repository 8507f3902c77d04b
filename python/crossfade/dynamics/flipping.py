"""How easily alignment is undone: two models learn flipped labels, and are watched meanwhile."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import random
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback

from ..blends.algebra import Algebra
from ..blends.blend import Model
from ..checks import check_number, did_you_mean, explained
from ..decoding.settings import check_int
from ..extras import old_names, require
from ..identity import run_id
from ..models.saved_value_heads import ADAPTER_FILES
from ..ops import check
from ..progress import progress_bar
from ..training.checkpoints import checkpoints, last_complete
from .curves import SIDES, Vulnerability
from .held_out import split
from .margins import Margins, check_settings
from .plain import plain_model
from .questions import NO, YES, Pair
from .readings import read_pairs
from .rows import TAG, Reader
from .states import term_model
from .watch import autocast, whole

LORA = {"r": 8, "lora_alpha": 32}
TARGETS = ("q_proj", "v_proj")  # PEFT chooses for models that have no layers of these names
TRAINING = {
    "beta": 0.01,
    "learning_rate": 1e-5,
    "per_device_train_batch_size": 32,
    "num_train_epochs": 1,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_length": None,
}
MEASURED = 20  # about so many times, where `every` is None
# Arguments of DPOConfig that are said in another way, and how.
ELSEWHERE = {
    "max_steps": "steps says how many",
    "seed": "seeds has one for each run",
    "data_seed": "seeds has one for each run",
    "save_steps": "checkpoints are saved at each measured step",
    "save_strategy": "checkpoints are saved at each measured step",
    "save_total_limit": "the last checkpoint is kept",
    "eval_strategy": "every says when to measure",
    "eval_steps": "every says when to measure",
    "resume_from_checkpoint": "output_dir goes on by itself",
    "disable_tqdm": "progress says whether there is a bar",
}


@explained()
def vulnerability(
    base: Any,
    aligned: Any,
    rows: Iterable[Any],
    *,
    tokenizer: Any = None,
    yes: str = YES,
    no: str = NO,
    tag: str = TAG,
    steps: int | None = None,
    every: int | None = None,
    held_out: float = 0.1,
    seeds: Sequence[int] = (0,),
    lora: Any = None,
    output_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **training: Any,
) -> Vulnerability:
    """Train a base and an aligned model on flipped labels, and see which one flips faster.

    Both are trained by DPO with a fresh LoRA, in which every pair's chosen and rejected responses
    are exchanged, in the same order with the same random numbers. Accuracy is measured on held-out
    pairs, before the first step and on the way (arXiv:2403.18742, section 5). The settings of the
    paper are the defaults: a LoRA of rank 8 with alpha 32 on the projections of queries and values,
    beta 0.01, a rate of 1e-5, batches of 32, one epoch.

    The models stay as they are, to the last bit: what is trained are copies of their modules, over
    the same weights. An adapter is merged into a whole copy of the weights first, which takes their
    memory once more. The random state of torch, NumPy and Python is put back.

    Ctrl-C stops at once. With `output_dir`, the same call goes on from the last measured step.

    Args:
        base, aligned: causal LMs, or `Model`s with an adapter.
        rows: statements, ``{"behaviour": ..., "text": ..., "label": True}``, or pairs of responses
            with a tag, as `statistics` takes them. Labels are those that the aligned model was
            aligned to; they are flipped here.
        tokenizer: of both; None: that of `base` or `aligned`, if it is a `Model` that has one.
        yes, no: the answers to a statement, a token each.
        tag: the key of the name of a row's behaviour.
        steps: of each run; None: as many as `num_train_epochs` takes, by default one epoch.
        every: how many steps lie between two measurements; None: a twentieth of all steps. The last
            step is measured too.
        held_out: the part of the rows to measure on, of each behaviour and label. Rows of the same
            text, or prompt, are held out together. The choice does not depend on `seeds`.
        seeds: of the LoRA's start and of the order of the rows; each makes a run of both models.
        lora: arguments of PEFT's `LoraConfig` that differ from the defaults, or such a config.
        output_dir: a folder for what was measured, the adapters and checkpoints to go on from;
            None: a temporary one, of which nothing is left.
        progress: whether to show a bar on stderr.
        training: arguments of TRL's `DPOConfig` that differ from the defaults.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be; or `output_dir`
            is of another call.
        NotImplementedError: a model is not supported, or there are several processes.
        ImportError: TRL or PEFT is not installed.
    """
    work = _Work(base, aligned, tokenizer, seeds, lora, training)
    check.flag("progress", progress)
    if not 0 < check_number("held_out", held_out) < 1:
        raise ValueError(f"held_out is {held_out}; it must be above 0 and below 1")
    check_int("steps", steps, 1)
    check_int("every", every, 1)
    train, held = split(rows, Reader(work.tokenizer, tag, None, None), yes, no, held_out)
    with contextlib.ExitStack() as stack:
        if output_dir is None:
            output_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="crossfade-"))
            kept = False
        else:
            kept = True
        plan = work.plan(Path(output_dir), train, steps, every, kept)
        if kept:
            check_settings(Path(output_dir), work.settings(plan, train, held))
        total = plan.steps[-1] * len(work.seeds) * len(SIDES)
        bar = stack.enter_context(progress_bar(total if progress else 1, "step"))
        margins: dict[str, list[Tensor]] = {side: [] for side in SIDES}
        for seed in work.seeds:
            for side in SIDES:
                margins[side].append(work.run(side, seed, plan, train, held, bar))
    return Vulnerability(
        steps=plan.steps,
        seeds=work.seeds,
        behaviours=tuple(pair.behaviour for pair in held),
        rows=tuple(pair.number for pair in held),
        margins={side: torch.stack(each) for side, each in margins.items()},
        trained=len(train),
    )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What all runs have in common.

    Attributes:
        steps: those that are measured.
        kept: whether checkpoints and adapters are for the user.
    """

    folder: Path
    steps: tuple[int, ...]
    every: int
    kept: bool


class _Work:
    """The arguments of `vulnerability`, checked, and its runs."""

    def __init__(
        self,
        base: Any,
        aligned: Any,
        tokenizer: Any,
        seeds: Any,
        lora: Any,
        training: Mapping[str, Any],
    ) -> None:
        self.trl, self.peft = require("trl", "train"), require("peft", "train")
        self.terms: dict[str, Model] = {
            side: _term(x, side) for side, x in zip(SIDES, (base, aligned), strict=True)
        }
        own = [term.tokenizer for term in self.terms.values() if term.tokenizer is not None]
        if tokenizer is None and not own:
            raise ValueError(
                "tokenizer is None, and neither base nor aligned is a crossfade.Model with one; it "
                "must be that of the models"
            )
        self.tokenizer = own[0] if tokenizer is None else tokenizer
        self.seeds = _seeds(seeds)
        self.lora, self.training = lora, dict(training)
        self.adapter(())
        known = [f.name for f in dataclasses.fields(self.trl.DPOConfig) if f.init]
        for name in training:
            if name in ELSEWHERE:
                raise TypeError(f"{name} is given; it must be left out, as {ELSEWHERE[name]}")
            if name not in known:
                raise TypeError(
                    f"vulnerability got an unknown argument {name!r}, which DPOConfig has not"
                    f"{did_you_mean(name, known)}"
                )

    def plan(
        self,
        folder: Path,
        train: Sequence[Pair],
        steps: int | None,
        every: int | None,
        kept: bool,
    ) -> _Plan:
        """How many steps there are, and which of them are measured."""
        args = self.arguments(folder, "base", self.seeds[0])
        if steps is None:
            batches = math.ceil(len(train) / (args.train_batch_size * args.world_size))
            epoch = math.ceil(batches / args.gradient_accumulation_steps)
            steps = max(1, math.ceil(args.num_train_epochs * epoch))
        every = math.ceil(steps / MEASURED) if every is None else every
        measured = (*range(0, steps, every), steps)
        return _Plan(folder, measured, every, kept)

    def settings(self, plan: _Plan, train: Sequence[Pair], held: Sequence[Pair]) -> dict[str, Any]:
        """What calls that share `output_dir` must share, by names that errors call them."""
        lora = self.lora if self.lora is None or isinstance(self.lora, Mapping) else vars(self.lora)
        return {
            **{side: run_id(**{side: term}) for side, term in self.terms.items()},
            "rows": run_id(rows=[[*pair] for pair in (*train, *held)]),
            "steps": [*plan.steps],
            "held_out": [pair.number for pair in held],
            "lora": run_id(lora=None if lora is None else dict(lora)),
            "training": run_id(training=self.training),
        }

    def arguments(self, folder: Path, side: str, seed: int) -> Any:
        """The trainer's config of a run."""
        given = {
            "use_cpu": self.terms[side].model.device.type == "cpu",
            "dataloader_pin_memory": self.terms[side].model.device.type == "cuda",
            "logging_strategy": "no",
            "report_to": "none",
            **TRAINING,
            **self.training,
            "disable_tqdm": True,
            "output_dir": str(folder),
            "seed": seed,
        }
        try:
            with old_names():
                args = self.trl.DPOConfig(**given)
        except (ValueError, TypeError, ImportError) as error:
            raise ValueError(f"training: {error}") from error
        if args.world_size > 1:
            raise NotImplementedError(
                f"there are {args.world_size} processes; vulnerability runs in one"
            )
        return args

    def run(
        self,
        side: str,
        seed: int,
        plan: _Plan,
        train: Sequence[Pair],
        held: Sequence[Pair],
        bar: Any,
    ) -> Tensor:
        """The margins of the held-out pairs at each measured step, ``[steps, pairs]``."""
        folder = plan.folder / f"{side}-{seed}"
        margins = Margins(folder, plan.steps)
        if margins.whole:
            bar.update(plan.steps[-1])
            return margins.table
        args = self.arguments(folder, side, seed)
        args.max_steps = plan.steps[-1]
        args.save_strategy = "steps" if plan.kept else "no"
        args.save_steps, args.save_total_limit = plan.every, 1
        with _random_state(), old_names():
            torch.manual_seed(seed)
            trainer = self.trainer(side, args, train)
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(_Measure(margins, plan.steps, held, bar))
            trainer.train(resume_from_checkpoint=_checkpoint(folder))
            if plan.kept:
                trainer.save_model()
                for checkpoint in checkpoints(folder):
                    shutil.rmtree(checkpoint)
        return margins.table

    def trainer(self, side: str, args: Any, train: Sequence[Pair]) -> Any:
        """A trainer of a copy of a model, with a fresh adapter."""
        from ..training.trainers.dpo import DPOTrainer

        data = require("datasets", "train").Dataset.from_list(list(map(_ids, train)))
        model = plain_model(self.terms[side], side)
        layers = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        return DPOTrainer(
            model,
            args=args,
            train_dataset=data,
            processing_class=copy.deepcopy(self.tokenizer),
            peft_config=self.adapter(layers),
        )

    def adapter(self, layers: Collection[str]) -> Any:
        """The config of the adapter that is trained, in a model with layers of some names."""
        config = self.peft.LoraConfig
        if isinstance(self.lora, config):
            found = copy.deepcopy(self.lora)
            found.task_type = found.task_type or "CAUSAL_LM"
            return found
        if self.lora is not None and not isinstance(self.lora, Mapping):
            raise TypeError(
                f"lora is a {type(self.lora).__name__}; it must be a mapping of arguments of "
                "peft.LoraConfig, or such a config"
            )
        given = {"task_type": "CAUSAL_LM", **LORA, **(self.lora or {})}
        if set(TARGETS) <= set(layers):
            given.setdefault("target_modules", list(TARGETS))
        try:
            return config(**given)
        except (ValueError, TypeError) as error:
            raise ValueError(f"lora: {error}") from error


class _Measure(TrainerCallback):
    """Measures the margins of the held-out pairs at some steps."""

    def __init__(
        self, margins: Margins, steps: Sequence[int], held: Sequence[Pair], bar: Any
    ) -> None:
        self.margins, self.steps, self.bar = margins, frozenset(steps), bar
        self.pairs = list(map(_ids, held))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step)
        if state.global_step == 0:
            self._measure(0, args, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(1)
        if state.global_step in self.steps:
            self._measure(state.global_step, args, kwargs["model"])

    def _measure(self, step: int, args: Any, model: Any) -> None:
        with autocast(args, model):
            self.margins.add(step, read_pairs(whole(model), self.pairs).margins)


def _ids(pair: Pair) -> dict[str, list[int]]:
    """The columns of a pair that trainers take."""
    return {name: getattr(pair, name) for name in Pair._fields if name.endswith("_ids")}


def _term(x: Any, side: str) -> Model:
    """A model as a term without a prompt of its own; errors call it `side`."""
    if isinstance(x, Algebra) and not isinstance(x, Model):
        raise TypeError(f"{side} is a {type(x).__name__}; it must be a causal LM or a Model")
    try:
        term = x if isinstance(x, Model) else Model(x)
        term_model(term)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise type(error)(f"{side}: {error}") from None
    if not isinstance(term.model, nn.Module):
        raise TypeError(f"{side} is a {type(term.model).__name__}; it must be a causal LM")
    return term


def _seeds(seeds: Any) -> tuple[int, ...]:
    if not isinstance(seeds, Iterable) or isinstance(seeds, str):
        raise TypeError(f"seeds is {seeds!r:.80}; it must be a sequence of ints")
    found = tuple(seeds)
    for i, seed in enumerate(found):
        if seed is None:
            raise TypeError(f"seeds[{i}] is None; it must be an int")
        check_int(f"seeds[{i}]", seed, 0, 2**32 - 1)
    if not found or len(set(found)) < len(found):
        raise ValueError(f"seeds is {list(found)!r:.80}; it must have one or more different ints")
    return found


def _checkpoint(folder: Path) -> str | None:
    """The last checkpoint that a run can go on from, if there is one."""
    try:
        return str(last_complete(folder, ADAPTER_FILES)[0])
    except ValueError:
        return None


@contextlib.contextmanager
def _random_state() -> Iterator[None]:
    """Puts back what the trainer's seed changes."""
    numpy = require("numpy", "train")
    of_python, of_numpy = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(of_python)
            numpy.random.set_state(of_numpy)
