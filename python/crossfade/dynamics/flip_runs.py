"""One run of a model that learns flipped labels: its trainer, its fresh LoRA, its measurements."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from ..blends.blend import Model
from ..checks import did_you_mean
from ..extras import old_names, require
from ..models.saved_value_heads import ADAPTER_FILES
from ..training.checkpoints import checkpoints, last_complete
from .margins import Margins
from .plain import plain_model
from .questions import Pair
from .readings import read_pairs
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


@dataclasses.dataclass(frozen=True)
class Plan:
    """What all runs have in common.

    Attributes:
        steps: those that are measured.
        kept: whether checkpoints and adapters are for the user.
    """

    folder: Path
    steps: tuple[int, ...]
    every: int
    kept: bool


class Runs:
    """The runs of a call: each side's model, with the same settings of LoRA and DPO.

    Args:
        terms: the models of the sides.
        lora, training: as in `vulnerability`.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, unknown, or said in another way.
    """

    def __init__(
        self,
        terms: Mapping[str, Model],
        tokenizer: Any,
        lora: Any,
        training: Mapping[str, Any],
    ) -> None:
        self.trl, self.peft = require("trl", "train"), require("peft", "train")
        self.terms, self.tokenizer = terms, tokenizer
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
        plan: Plan,
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
