"""``crossfade train KIND --config FILE``: what the file may say, and the run that it asks for."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import signal
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer import SCALER_NAME
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from .. import models, reading
from ..extras import old_names, require
from ..models.saved_value_heads import ADAPTER_FILES, SETTINGS, WEIGHTS
from . import rows
from .checkpoints import checkpoints, last_complete
from .data import read_jsonl

KINDS = ("sft", "dpo", "value")
DTYPES = ("float32", "bfloat16", "float16", "auto")


@dataclass(frozen=True)
class Settings:
    """What a run of training is. All but `kind` are keys of the settings file.

    Args:
        kind: "sft", "dpo" or "value".
        model: a folder, an id on the Hugging Face hub, or "smollm2".
        data: a .jsonl file of rows in the format of the trainer.
        arguments: of the trainer's config, which is TRL's `SFTConfig` or `DPOConfig`, or
            `ValueConfig`. `output_dir` must be among them. By default nothing is reported to
            trackers, and bfloat16 autocast is on if there is a GPU that has it.
        dtype: of the weights: "float32", "bfloat16", "float16", or "auto" for what they were saved
            in.
        eval_data: a file as `data`, to evaluate on: by default after each epoch.
        lora: arguments of PEFT's `LoraConfig`; None trains all weights.
        loss, loss_options: as in `DPOTrainer`; None leaves the loss to `arguments`.
        value: `kind` and `rank` of the head, as in `value_model`.
        seed: of everything that is random.

    Raises:
        ValueError, TypeError: names the key, what it was and what it must be.
    """

    kind: str
    model: str
    data: str
    arguments: dict[str, Any]
    dtype: str = "float32"
    eval_data: str | None = None
    lora: dict[str, Any] | None = None
    loss: str | None = None
    loss_options: dict[str, Any] | None = None
    value: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("model", "data", "eval_data", "loss"):
            x = getattr(self, name)
            if not isinstance(x, str) and not (x is None and name in ("eval_data", "loss")):
                raise TypeError(f"{name} is {x!r}; it must be a string")
        for name in ("arguments", "lora", "loss_options", "value"):
            x = getattr(self, name)
            if not isinstance(x, dict) and not (x is None and name in ("lora", "loss_options")):
                raise TypeError(f"{name} is {x!r}; it must be a mapping of names to values")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it must be among {', '.join(DTYPES)}")
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 32:  # as NumPy wants it
            raise ValueError(f"seed is {self.seed!r}; it must be an int within [0, 2**32)")
        if not isinstance(self.arguments.get("output_dir"), str):
            raise ValueError(
                f"arguments.output_dir is {self.arguments.get('output_dir')!r}; it must be a folder"
            )
        if "seed" in self.arguments:
            raise ValueError("arguments.seed is given; it must be the key seed, beside arguments")
        for name in ("loss", "loss_options"):
            if self.kind != "dpo" and getattr(self, name) is not None:
                raise ValueError(f"{name} is given; it goes with dpo, not with {self.kind}")
        if self.kind != "value" and self.value:
            raise ValueError(f"value is given; it goes with value, not with {self.kind}")


def read(kind: str, file: Path, overrides: Sequence[str] = ()) -> Settings:
    """The settings of a YAML file, with overrides such as ``arguments.learning_rate=1e-4``."""
    found = reading.parse_yaml(reading.read_text(file), str(file))
    if not isinstance(found, dict):
        raise ValueError(f"{file} has {type(found).__name__} at its top; it must have keys")
    for text in overrides:
        place, equals, value = text.partition("=")
        *outer, last = place.split(".")
        if not equals or not all([*outer, last]):
            raise ValueError(f"--set is {text!r}; it must be KEY=VALUE, or KEY.KEY=VALUE")
        at = found
        for name in outer:
            if at.get(name) is None:
                at[name] = {}
            at = at[name]
            if not isinstance(at, dict):
                raise ValueError(f"--set is {text!r}; {name} is {at!r}, which has no keys")
        at[last] = reading.parse_yaml(value, f"--set {place}")
    known = [f.name for f in dataclasses.fields(Settings) if f.name != "kind"]
    for key in found:
        if key not in known:
            raise ValueError(f"{file} has the key {key!r}; known ones are {', '.join(known)}")
    for key in ("model", "data", "arguments"):
        if key not in found:
            raise ValueError(f"{file} has no key {key!r}, which it must have")
    return Settings(kind, **found)


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
    make_trainer = {"sft": _sft, "dpo": _dpo, "value": _value}[s.kind]
    output = Path(s.arguments["output_dir"])
    last = _checkpoint(s, output) if resume else None
    if not resume and (there := checkpoints(output)):
        raise ValueError(
            f"arguments.output_dir is {str(output)!r}, which has {there[0].name} of another run; "
            "--resume goes on from it, else it must be another folder"
        )
    data = {"train": _rows(s, "data", s.data)}
    if s.eval_data is not None:
        data["eval"] = _rows(s, "eval_data", s.eval_data)
    stop = _StopAtStep()
    with old_names():
        trainer = make_trainer(s, data)
        trainer.add_callback(stop)
        with stop:
            result = trainer.train(resume_from_checkpoint=None if last is None else str(last))
    if stop.asked and trainer.state.global_step < trainer.state.max_steps:
        if _is_main_process():
            print(f"saved {checkpoints(output)[0]}; --resume goes on from there", file=sys.stderr)
        raise KeyboardInterrupt
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    measured = dict(result.metrics) if _is_main_process() else None
    trainer.accelerator.end_training()
    return measured


def _checkpoint(s: Settings, output: Path) -> Path:
    """The checkpoint that `--resume` goes on from. Later ones that are damaged are printed."""
    if s.arguments.get("save_only_model"):
        raise ValueError(
            "--resume is given, and arguments.save_only_model is True; checkpoints are then "
            "without the optimizer's state, and nothing goes on from them"
        )
    files = [SETTINGS, WEIGHTS] if s.kind == "value" else []
    if s.lora is not None:
        files.extend(ADAPTER_FILES)
    try:
        files = files or [CONFIG_NAME, SAFE_WEIGHTS_NAME]
        scaler = [SCALER_NAME] if s.arguments.get("fp16") else []
        last, damaged = last_complete(output, [*files, *scaler])
    except ValueError as error:
        raise ValueError(f"--resume is given, but {error}") from None
    for path, why in damaged.items():
        if _is_main_process():
            print(f"{path} is damaged ({why}): going on from {last.name}", file=sys.stderr)
    return last


def _is_main_process() -> bool:
    """Whether this process is the one, of several, that prints what all have done."""
    parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not parallel or torch.distributed.get_rank() == 0


class _StopAtStep(TrainerCallback):
    """Stops at the end of a step after Ctrl-C, with a checkpoint to go on from to the last bit."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGINT, self._ask)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if _is_main_process():
            print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True


def _sft(s: Settings, data: Mapping[str, Any]) -> Any:
    from .trainers.sft import SFTTrainer, trl

    return _trainer(SFTTrainer, s, data, _arguments(trl.SFTConfig, s), _load(s))


def _dpo(s: Settings, data: Mapping[str, Any]) -> Any:
    from .trainers.dpo import WITHOUT_REFERENCE, DPOTrainer, trl

    args = _arguments(trl.DPOConfig, s)
    options: dict[str, Any] = {"loss": s.loss, "loss_options": s.loss_options}
    if s.lora is None and s.loss not in WITHOUT_REFERENCE and not args.precompute_ref_log_probs:
        # TRL would load the reference by itself, along with an adapter in the model's folder
        options["ref_model"] = _load(s)[0]
    return _trainer(DPOTrainer, s, data, args, _load(s), **options)


def _value(s: Settings, data: Mapping[str, Any]) -> Any:
    from ..models.value_heads import value_model
    from .value.trainer import ValueConfig, ValueTrainer

    args = _arguments(ValueConfig, s)
    value = {"kind": "q", **s.value}
    for name in value:
        if name not in ("kind", "rank"):
            raise ValueError(f"value has the key {name!r}; known ones are kind, rank")
    base, tokenizer = _load(s)
    base = base.to(args.device)
    torch.manual_seed(s.seed)
    model = value_model(base, value["kind"], rank=value.get("rank"))
    needs_base = args.objective == "cd_q" and value["kind"] == "q"
    given = {"base": base} if needs_base else {}
    return _trainer(ValueTrainer, s, data, args, (model, tokenizer), **given)


def _trainer(
    trainer: Any,
    s: Settings,
    data: Mapping[str, Any],
    args: Any,
    loaded: tuple[Any, Any],
    **options: Any,
) -> Any:
    model, tokenizer = loaded
    for name in args.report_to:
        if name not in get_available_reporting_integrations():
            raise ValueError(f"arguments.report_to is {name!r}, whose package is not installed")
    return trainer(
        model,
        args=args,
        train_dataset=data["train"],
        eval_dataset=data.get("eval"),
        processing_class=tokenizer,
        peft_config=None if s.lora is None else _lora(s.lora),
        **options,
    )


def _load(s: Settings) -> tuple[Any, Any]:
    dtype = s.dtype if s.dtype == "auto" else getattr(torch, s.dtype)
    return models.load(models.folder_of(s.model), dtype=dtype)


def _arguments(config: Any, s: Settings) -> Any:
    """The trainer's config: `arguments`, and defaults that suit a command line."""
    _check_keys("arguments", s.arguments, config)
    names = {f.name for f in dataclasses.fields(config)}
    on_cpu = s.arguments.get("use_cpu", not torch.accelerator.is_available())
    given = {"report_to": "none", "seed": s.seed, "use_cpu": on_cpu}
    if s.eval_data is not None:
        given["eval_strategy"] = "epoch"
    if not s.arguments.get("fp16"):
        given["bf16"] = not on_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    given = {name: x for name, x in given.items() if name in names} | s.arguments
    return _made("arguments", config, given)


def _lora(options: Mapping[str, Any]) -> Any:
    config = require("peft", "adapters").LoraConfig
    _check_keys("lora", options, config)
    return _made("lora", config, {"task_type": "CAUSAL_LM", **options})


def _made(key: str, config: Any, given: Mapping[str, Any]) -> Any:
    """A config of Transformers, TRL or PEFT. Their errors, of many kinds, become ValueErrors."""
    try:
        return config(**given)
    except (ValueError, TypeError, ImportError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"{key}: {error}") from error


def _check_keys(key: str, given: Mapping[str, Any], config: Any) -> None:
    """Require that a config has all keys that are given, and takes values of their types."""
    known = {f.name: f for f in dataclasses.fields(config) if f.init}
    hints = typing.get_type_hints(config)
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known)
            hint = f"; near to it are {', '.join(near)}" if near else ""
            raise ValueError(f"{key} has the key {name!r}, which {config.__name__} has not{hint}")
        if value != known[name].default and not _fits(value, hints[name]):
            wanted = getattr(hints[name], "__name__", None) or str(hints[name])
            wanted = str(hints[name]) if typing.get_origin(hints[name]) else wanted
            raise TypeError(f"{key}.{name} is {value!r:.80}; it must be of type {wanted}")


def _fits(x: Any, hint: Any) -> bool:
    """Whether a value from YAML fits a type. Types that YAML does not have fit any value."""
    kind = typing.get_origin(hint) or hint
    if kind in (typing.Union, types.UnionType):
        return any(_fits(x, part) for part in typing.get_args(hint))
    if kind is typing.Literal:
        return x in typing.get_args(hint)
    if kind is float:
        return type(x) in (int, float) and not math.isnan(x)
    if kind is list:  # TRL and Transformers take a name for a list with that name
        return isinstance(x, (list, str))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return isinstance(x, str)
    if kind in (bool, int, str, dict, type(None)):
        return type(x) is kind
    return True


def _rows(s: Settings, key: str, path: str) -> Any:
    """The rows of a .jsonl file, in the form that the trainer takes."""
    if Path(path).suffix != ".jsonl":
        raise ValueError(f"{key} is {path!r}; it must be a .jsonl file")
    found = read_jsonl(path)
    if not found:
        raise ValueError(f"{key} is {path!r}, which has no rows")
    if s.kind == "value":
        return found
    rows.check_rows(s.kind, found, path, str(s.arguments.get("dataset_text_field", "text")))
    return require("datasets", "train").Dataset.from_list(found)
