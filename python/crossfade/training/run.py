"""The run of training that settings ask for: a trainer, its checkpoints, and Ctrl-C."""

from __future__ import annotations

import functools
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer import SCALER_NAME
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from ..extras import old_names
from ..models.saved_value_heads import ADAPTER_FILES, SETTINGS, WEIGHTS
from ..policies.conditioned.checks import PART
from ..progress import print_line
from . import chain, stages
from .checkpoints import checkpoints, last_complete
from .config import Settings
from .makers import MAKERS, rows_of, stage_trainer, tokenizer_of
from .processes import in_any, is_main_process, part

# One Ctrl-C may come twice within these seconds: from the terminal, and passed on by torchrun.
ONE_PRESS = 0.5


def run(s: Settings, *, resume: bool = False) -> dict[str, Any] | None:
    """Train, and save the adapter or model and its tokenizer in `output_dir`.

    Ctrl-C lets the step end, saves a checkpoint and stops; a second Ctrl-C stops at once.

    Args:
        resume: whether to go on from the last checkpoint in `output_dir`.

    Returns:
        What the trainer measured. Where several processes train, the first one returns it and the
        others None.

    Raises:
        ValueError, TypeError, OSError: something is wrong that `Settings` does not check: keys of
            `arguments` and `lora`, files, columns.
        KeyboardInterrupt: after Ctrl-C.
    """
    stop = _StopAtStep()
    chain.check(s)
    if s.kind == "metaaligner":
        return _run_stages(s, stop, resume)

    def make() -> Any:
        data = {"train": rows_of(s, "data", s.data)}
        if s.eval_data is not None:
            data["eval"] = rows_of(s, "eval_data", s.eval_data)
        return MAKERS[s.kind](s, data)

    trainer, measured = _fit(s, make, stop, resume)
    if trainer.args.should_save:
        chain.join(s, Path(s.arguments["output_dir"]))
    main = is_main_process()  # nothing knows it once the processes have parted
    part(trainer.accelerator)
    return measured if main else None


def _fit(
    s: Settings, make: Callable[[], Any], stop: _StopAtStep, resume: bool
) -> tuple[Any, dict[str, Any]]:
    """Make a trainer, train to the end and save; what it measured is given back beside it."""
    output = Path(s.arguments["output_dir"])
    last = _checkpoint(s, output) if resume else None
    if not resume and (there := checkpoints(output)):
        raise ValueError(
            f"arguments.output_dir is {str(output)!r}, which has {there[0].name} of another run; "
            "--resume goes on from it, else it must be another folder"
        )
    with old_names():
        trainer = make()
        chain.check(s, getattr(trainer, "value_model", trainer.model))
        trainer.add_callback(stop)
        stop.accelerator = trainer.accelerator
        with stop:
            result = trainer.train(resume_from_checkpoint=None if last is None else str(last))
    if stop.agreed and trainer.state.global_step < trainer.state.max_steps:
        if is_main_process():
            print_line(f"saved {checkpoints(output)[0]}; --resume goes on from there", sys.stderr)
        raise KeyboardInterrupt
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    return trainer, dict(result.metrics)


def _run_stages(s: Settings, stop: _StopAtStep, resume: bool) -> dict[str, Any] | None:
    """Train an aligner stage after stage; each begins with the weights that the last one saved."""
    with old_names():
        planned = stages.plan(s, tokenizer_of(s))
    done = stages.finished(planned) if resume else {}
    if not resume:
        stages.refuse_others(Path(s.arguments["output_dir"]))
    before, trainer = None, None
    for i, stage in enumerate(planned):
        if stage.name not in done:
            if stop.agreed:
                if is_main_process():
                    told = f"the stage {planned[i - 1].name} is done; --resume goes on from there"
                    print_line(told, sys.stderr)
                raise KeyboardInterrupt
            if is_main_process():
                print_line(f"stage {i + 1} of {len(planned)}: {stage.summary()}", sys.stderr)
            goes_on = resume and (i == 0 or bool(checkpoints(stage.folder)))
            make = functools.partial(stage_trainer, stage, before)
            trainer, done[stage.name] = _fit(stage.settings, make, stop, goes_on)
            if is_main_process():
                stage.mark(done[stage.name])
            trainer.accelerator.wait_for_everyone()
        before = stage.folder
    main = is_main_process()
    if main:
        planned[-1].copy_to(Path(s.arguments["output_dir"]))
        chain.join(s, Path(s.arguments["output_dir"]))
    if trainer is not None:
        part(trainer.accelerator)
    if not main:
        return None
    figures = ("train_loss", "train_runtime")
    return {f"{name}/{x.name}": done[x.name][name] for name in figures for x in planned}


def _checkpoint(s: Settings, output: Path) -> Path:
    """The checkpoint that `--resume` goes on from. Later ones that are damaged are printed."""
    if s.arguments.get("save_only_model"):
        raise ValueError(
            "--resume is given, and arguments.save_only_model is True; checkpoints are then "
            "without the optimizer's state, and nothing goes on from them"
        )
    files = [SETTINGS, WEIGHTS] if s.kind == "value" else []
    if s.kind == "clp":
        folders = [*s.rewards, *([] if s.shared is None else [PART])]
        files = [f"{folder}/{file}" for folder in folders for file in ADAPTER_FILES]
    elif s.lora is not None:
        files.extend(ADAPTER_FILES)
    try:
        files = files or [CONFIG_NAME, SAFE_WEIGHTS_NAME]
        scaler = [SCALER_NAME] if s.arguments.get("fp16") else []
        last, damaged = last_complete(output, [*files, *scaler])
    except ValueError as error:
        raise ValueError(f"--resume is given, but {error}") from None
    for path, why in damaged.items():
        if is_main_process():
            print_line(f"{path} is damaged ({why}): going on from {last.name}", sys.stderr)
    return last


class _StopAtStep(TrainerCallback):
    """Stops at the end of a step after Ctrl-C, with a checkpoint to go on from to the last bit.

    Attributes:
        agreed: whether one of the processes was asked, which all of them find at the same step.
        accelerator: of the trainer.
    """

    agreed = False
    accelerator: Any = None

    def __init__(self) -> None:
        self.asked = 0.0  # when, in seconds; 0 if not
        self._before: Any = None

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGINT, self._ask)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: object) -> None:
        now = time.monotonic()
        if self.asked:
            if torch.distributed.is_initialized() and now - self.asked < ONE_PRESS:
                return
            raise KeyboardInterrupt
        self.asked = now
        if is_main_process():
            print_line("\nstopping after this step; Ctrl-C again stops at once", sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.agreed = self.agreed or in_any(self.accelerator, bool(self.asked))
        if self.agreed:
            control.should_save = control.should_training_stop = True
