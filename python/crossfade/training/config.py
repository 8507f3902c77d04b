"""What the settings file of ``crossfade train KIND --config FILE`` may say."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import math
import sys
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import reading
from ..checks import did_you_mean
from ..extras import require
from . import keys

DTYPES = ("float32", "bfloat16", "float16", "auto")


@dataclass(frozen=True)
class Settings:
    """What a run of training is. All but `kind` are keys of the settings file.

    Args:
        kind: "sft", "dpo", "kto", "value", "jsft", "self-judge", "metaaligner" or "clp".
        model: a folder, an id on the Hugging Face hub, or "smollm2". With ``@FOLDER`` behind it, an
            adapter that is merged into its weights first. A new adapter, or a value head, is saved
            with it in the end, and belongs to the model without ``@FOLDER``.
        data: a .jsonl file of rows in the format of the trainer. Relative paths, here and in all
            other keys, begin at the current folder, as those of a command line do.
        arguments: of the trainer's config, which is TRL's `SFTConfig`, `DPOConfig` or `KTOConfig`,
            `ValueConfig`, `SelfJudgeConfig` or `CLPConfig`. `output_dir` must be among them. By
            default nothing is reported to trackers, and bfloat16 autocast is on if there is a GPU
            that has it.
        dtype: of the weights: "float32", "bfloat16", "float16", or "auto" for what they were saved
            in.
        eval_data: a file as `data`, to evaluate on: by default after each epoch.
        lora: arguments of PEFT's `LoraConfig`; None trains all weights.
        loss, loss_options: as in `DPOTrainer`; None leaves the loss to `arguments`.
        value: `kind` and `rank` of the head, as in `value_model`.
        judge_weight: as in `JSFTTrainer`.
        template, principles: as in `crossfade.Judge`.
        objectives, noun, margins, per_prompt, warm_up, validation: as in `metaaligner_rows`.
        stages: the names of the stages to train; they are trained in the order "warm-up", "equal",
            "better". None is all three. A mapping gives a stage arguments of its own, such as
            ``{"equal": {"num_train_epochs": 1}}``, which go before those of `arguments`.
        rewards: of a conditioned policy, by name MODULE:FUNCTION or the folder of a reward model.
        scope, shared, shared_as: as in `ConditionedPolicy.create`; `shared` has arguments of PEFT's
            `LoraConfig`, as `lora` has.
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
    judge_weight: float = 1.0
    template: Any = "hh"
    principles: Any = None
    objectives: Any = None
    noun: str = "context"
    margins: Any = 0.0
    per_prompt: int | None = None
    warm_up: float = 1.0
    validation: float = 0.0
    stages: Any = None
    rewards: Any = None
    scope: str = "full"
    shared: Any = None
    shared_as: str = "scaled"
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
        if self.kind == "clp":
            self._check_policy()
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
        for known in dataclasses.fields(self):
            goes = [kind for kind, x in keys.KINDS.items() if known.name in x.own]
            made = known.default_factory
            unset = known.default if made is dataclasses.MISSING else made()
            if goes and self.kind not in goes and getattr(self, known.name) != unset:
                raise ValueError(
                    f"{known.name} is given; it goes with {' and '.join(goes)}, not with "
                    f"{self.kind}"
                )
        if self.validation and self.eval_data is not None:
            raise ValueError(
                f"validation is {self.validation!r:.80}, and eval_data is given; it must be one of "
                "both"
            )

    def _check_policy(self) -> None:
        """Check what settings say of a conditioned policy, as far as no model is needed."""
        given = self.rewards
        if not isinstance(given, dict) or not given:
            raise TypeError(
                f"rewards is {given!r:.80}; it must be a mapping of names to MODULE:FUNCTION or to "
                "the folders of reward models"
            )
        for name, text in given.items():
            if not isinstance(name, str) or not isinstance(text, str):
                raise TypeError(f"rewards.{name} is {text!r:.80}; it must be a text")
        if self.lora is None:
            raise ValueError("lora is missing; a conditioned policy has an adapter for each reward")
        if self.shared is not None and not isinstance(self.shared, dict):
            raise TypeError(f"shared is {self.shared!r:.80}; it must be a mapping, as lora is")
        if "@" in self.model:
            raise ValueError(
                f"model is {self.model!r}; it must be a plain model, the reference of the policy"
            )

    @property
    def evaluates(self) -> bool:
        """Whether there are rows to evaluate on."""
        return self.eval_data is not None or bool(self.validation)


def read(kind: str, file: Path, overrides: Sequence[str] = ()) -> Settings:
    """The settings of a YAML file, with overrides such as ``arguments.learning_rate=1e-4``.

    Raises:
        ValueError, TypeError: the file is not such YAML, or a key is wrong; names it.
        OSError: the file, or one that it names, is not there.
    """
    if not file.exists():
        raise FileNotFoundError(f"--config is {str(file)!r}; there is no such file")
    if file.is_dir():
        raise IsADirectoryError(f"--config is {str(file)!r}, a folder; it must be a YAML file")
    found = reading.parse_yaml(reading.read_text(file), str(file))
    needed = "it must have the keys model, data and arguments"
    if found is None:
        raise ValueError(f"{file} is empty; {needed}")
    if not isinstance(found, dict):
        raise ValueError(f"{file} has a {type(found).__name__} at its top; {needed}")
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
    known = [*keys.SETTINGS, *keys.KINDS[kind].own]
    every = [f.name for f in dataclasses.fields(Settings) if f.name != "kind"]
    for key in found:
        if key not in every:
            raise ValueError(
                f"{file} has the key {key!r}; known ones are {', '.join(known)}"
                f"{meant(kind, '', key, known)}"
            )
    for key in ("model", "data", "arguments"):
        if key not in found:
            raise ValueError(f"{file} has no key {key!r}; {needed}")
    settings = Settings(kind, **found)
    for key in ("data", "eval_data"):
        if (path := getattr(settings, key)) is not None:
            _check_file(key, path, file)
    return settings


def _check_file(key: str, path: str, config: Path) -> None:
    if Path(path).suffix != ".jsonl":
        raise ValueError(f"{key} is {path!r}; it must be a .jsonl file")
    if Path(path).is_file():
        return
    why = "there is no such file"
    if not Path(path).is_absolute():
        why += " in the folder that the command runs in, where relative paths begin"
        if (beside := config.parent / path).is_file():
            why += f"; did you mean {str(beside)!r}, which is beside {config.name}?"
    raise FileNotFoundError(f"{key} is {path!r}; {why}")


def config_of(kind: str) -> Any:
    """The class of the trainer's config of a kind, whose fields are the keys of `arguments`."""
    if kind == "value":
        from .value.trainer import ValueConfig

        return ValueConfig
    if kind == "clp":
        from .clp_config import CLPConfig

        return CLPConfig
    trl = require("trl", "train")
    if kind == "self-judge":
        from .on_policy import SelfJudgeConfig

        return SelfJudgeConfig
    configs = {"sft": trl.SFTConfig, "dpo": trl.DPOConfig, "kto": trl.KTOConfig}
    return {**configs, "jsft": trl.SFTConfig, "metaaligner": trl.SFTConfig}[kind]


def names_in(config: Any) -> list[str]:
    """The names of a config's fields that may be given."""
    return [f.name for f in dataclasses.fields(config) if f.init]


def meant(kind: str, level: str, key: Any, known: Collection[str]) -> str:
    """The end of an error about an unknown key: where it belongs, or what it may have been.

    Args:
        level: the key that it was found under, or "" for the top of the file.
        known: the keys that there are in this place.
    """
    places = {name: name for name in (*keys.SETTINGS, *keys.KINDS[kind].own)}
    with contextlib.suppress(ImportError):  # that a package is missing is said at another time
        places = {name: f"lora.{name}" for name in names_in(lora_class())} | places
        places = {name: f"arguments.{name}" for name in names_in(config_of(kind))} | places
    if kind == "value":
        places |= {name: f"value.{name}" for name in keys.VALUE}
    place = places.get(str(key), keys.ELSEWHERE.get(str(key), ""))
    outer, _, name = place.rpartition(".")
    if not place:
        return did_you_mean(key, known)
    if outer == level:
        return f"; did you mean {name!r}?"
    return f"; did you mean {place}?" if outer else f"; did you mean {name}, beside {level}?"


def trainer_config(config: Any, s: Settings) -> Any:
    """The trainer's config: `arguments`, and defaults that suit a command line."""
    check_keys(s.kind, "arguments", s.arguments, config)
    names = {f.name for f in dataclasses.fields(config)}
    on_cpu = s.arguments.get("use_cpu", not torch.accelerator.is_available())
    given = {"report_to": "none", "seed": s.seed, "use_cpu": on_cpu}
    given["disable_tqdm"] = not sys.stderr.isatty()  # a bar would fill a log with its own lines
    if s.evaluates:
        given["eval_strategy"] = "epoch"
    elif s.arguments.get("eval_strategy") not in (None, False, "no"):
        raise ValueError(
            f"arguments.eval_strategy is {s.arguments['eval_strategy']!r}, and there is no "
            "eval_data; it must be given, or eval_strategy left out"
        )
    if not s.arguments.get("fp16"):
        given["bf16"] = not on_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    given = {name: x for name, x in given.items() if name in names} | s.arguments
    return _made("arguments", config, given)


def lora_class() -> Any:
    return require("peft", "adapters").LoraConfig


def lora_config(s: Settings, key: str = "lora") -> Any:
    """PEFT's config of `lora`, or of another key that has such arguments; None without it."""
    given = getattr(s, key)
    if given is None:
        return None
    config = lora_class()
    check_keys(s.kind, key, given, config, "lora")
    return _made(key, config, {"task_type": "CAUSAL_LM", **given})


def value_options(s: Settings) -> dict[str, Any]:
    """The arguments of `value_model` that `value` gives, with the kind of head."""
    for name in s.value:
        if name not in keys.VALUE:
            raise ValueError(
                f"value has the key {name!r}; known ones are {', '.join(keys.VALUE)}"
                f"{meant(s.kind, 'value', name, keys.VALUE)}"
            )
    return {"kind": "q", **s.value}


def _made(key: str, config: Any, given: Mapping[str, Any]) -> Any:
    """A config of Transformers, TRL or PEFT. Their errors, of many kinds, become ValueErrors."""
    try:
        return config(**given)
    except (ValueError, TypeError, ImportError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"{key}: {error}") from error


def check_keys(kind: str, key: str, given: Mapping[str, Any], config: Any, level: str = "") -> None:
    """Require that a config has all keys that are given, and takes values of their types.

    Args:
        key: what errors call them.
        level: where keys of this config stand in a settings file, if not under `key`.
    """
    known = {f.name: f for f in dataclasses.fields(config) if f.init}
    hints = typing.get_type_hints(config)
    for name, value in given.items():
        if name not in known:
            raise ValueError(
                f"{key} has the key {name!r}, which {config.__name__} has not"
                f"{meant(kind, level or key, name, known)}"
            )
        if value != known[name].default and not _fits(value, hints[name]):
            wanted = getattr(hints[name], "__name__", None) or str(hints[name])
            wanted = str(hints[name]) if typing.get_origin(hints[name]) else wanted
            hint = "; YAML reads no and yes as bools, unless quoted" if type(value) is bool else ""
            raise TypeError(f"{key}.{name} is {value!r:.80}; it must be of type {wanted}{hint}")


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
