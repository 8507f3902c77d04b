"""The stages in which an aligner is trained. Each is a run of its own, in a folder of its own.

Source: MetaAligner (Yang et al., arXiv:2403.17141), section 3.2.2.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import reading
from ..checks import did_you_mean
from ..files import write_text
from ..policies.metaaligner.data import STAGES, AlignerRows, metaaligner_rows
from ..progress import print_line
from .checkpoints import checkpoints
from .config import Settings, check_keys, config_of, trainer_config
from .data import read_jsonl
from .processes import is_main_process

MARK = "trained.json"  # lies in the folder of a stage that was trained to its end
# Arguments of a trainer that begin so do not change what is learnt.
WITHOUT_EFFECT = ("output_dir", "logging", "save", "eval", "report", "disable_tqdm", "run_name")


@dataclass(frozen=True)
class Stage:
    """A stage of a run.

    Attributes:
        settings: of this stage alone.
        data: its rows, under "train" and, if there are some, "eval".
        after: the names of the stages before it in the run.
    """

    name: str
    settings: Settings
    data: dict[str, list[dict[str, Any]]]
    after: list[str]

    @property
    def folder(self) -> Path:
        return Path(self.settings.arguments["output_dir"])

    def summary(self) -> str:
        """Its name and its number of rows."""
        return f"{self.name}, {len(self.data['train'])} rows"

    def record(self) -> dict[str, Any]:
        """What its result depends on, as JSON has it."""
        s = self.settings
        arguments = {k: x for k, x in s.arguments.items() if not k.startswith(WITHOUT_EFFECT)}
        kept = {"model": s.model, "dtype": s.dtype, "lora": s.lora, "seed": s.seed}
        rows = hashlib.sha256(json.dumps(self.data["train"]).encode()).hexdigest()
        record = {"after": self.after, **kept, "arguments": arguments, "rows": rows}
        return json.loads(json.dumps(record, default=str))

    def mark(self, metrics: Mapping[str, Any]) -> None:
        """Note that it was trained to its end; the note is whole, whenever the process ends."""
        text = json.dumps({"record": self.record(), "metrics": metrics}, indent=1)
        write_text(self.folder / MARK, text)

    def copy_to(self, folder: Path) -> None:
        """Copy what it saved, without its checkpoints."""
        for file in self.folder.iterdir():
            if file.is_file() and file.name != MARK:
                shutil.copyfile(file, folder / file.name)


def plan(s: Settings, tokenizer: Any) -> list[Stage]:
    """The stages that settings ask for, in their order.

    Args:
        tokenizer: of the model.

    Raises:
        ValueError, TypeError, OSError: `stages`, the data or the arguments of a stage are wrong.
    """
    output = Path(s.arguments["output_dir"])
    parts = {
        name: replace(s, arguments={**s.arguments, **own, "output_dir": str(output / name)})
        for name, own in _own_arguments(s).items()
    }
    for part in parts.values():
        trainer_config(config_of(s.kind), part)  # wrong arguments are found before any training
    found = {"train": _rows(s, "data", s.data, tokenizer, s.validation)}
    if s.eval_data is not None:
        found["eval"] = _rows(s, "eval_data", s.eval_data, tokenizer, 0.0)
    if is_main_process():
        for key, rows in found.items():
            print_line(f"the {key} data: {rows.summary()}", sys.stderr)
    planned: list[Stage] = []
    for name, part in parts.items():
        data = {key: rows.of(name) for key, rows in found.items()}
        if s.validation:
            data["eval"] = found["train"].of(name, "validation")
        for key, what in (("train", "train"), ("eval", "evaluate")):
            if key in data and not data[key]:
                raise ValueError(
                    f"the stage {name!r} has no rows to {what} on "
                    f"({found.get(key, found['train']).summary()}); stages must name those that "
                    "have some"
                )
        planned.append(Stage(name, part, data, [stage.name for stage in planned]))
    return planned


def finished(planned: Sequence[Stage]) -> dict[str, dict[str, Any]]:
    """What was measured in the stages of a run that were trained to their end.

    Raises:
        ValueError: one was trained on other rows or by other settings; names them.
    """
    found = {}
    for stage in planned:
        file = stage.folder / MARK
        if not file.is_file():
            break
        noted: Any = reading.parse_json(reading.read_text(file), str(file))
        was, now = (_flat(x) for x in (noted["record"], stage.record()))
        for key in {**was, **now}:
            if was.get(key) != now.get(key):
                values = f" {was.get(key)!r:.80}, which is now {now.get(key)!r:.80}"
                told = key + ("" if key == "rows" else values)
                raise ValueError(
                    f"--resume is given, but the stage {stage.name!r} in {str(stage.folder)!r} was "
                    f"trained with other {told}; they must be the same, or output_dir another"
                )
        found[stage.name] = noted["metrics"]
    return found


def refuse_others(output: Path) -> None:
    """Require that nothing of another run is in a folder."""
    for name in STAGES:
        if (output / name / MARK).exists() or checkpoints(output / name):
            raise ValueError(
                f"arguments.output_dir is {str(output)!r}, which has the stage {name!r} of another "
                "run; --resume goes on from it, else it must be another folder"
            )
    if there := checkpoints(output):
        raise ValueError(
            f"arguments.output_dir is {str(output)!r}, which has {there[0].name} of a run without "
            "stages; it must be another folder"
        )


def _own_arguments(s: Settings) -> dict[str, dict[str, Any]]:
    """The arguments that each stage of a run has of its own, in the order of the stages."""
    given = s.stages
    if given is None:
        return {name: {} for name in STAGES}
    if not isinstance(given, (list, Mapping)):
        raise TypeError(
            f"stages is {given!r:.80}; it must be a list of names, or a mapping of names to "
            "arguments of their own"
        )
    if not given:
        raise ValueError("stages is empty; it must have one at least")
    found: dict[str, dict[str, Any]] = {}
    for name in given:
        if name not in STAGES:
            raise ValueError(
                f"stages has {name!r:.80}; known ones are {', '.join(STAGES)}"
                f"{did_you_mean(name, STAGES)}"
            )
        if name in found:
            raise ValueError(f"stages has {name!r} twice; each must be there once")
        own = given[name] if isinstance(given, Mapping) else None
        if own is not None and not isinstance(own, dict):
            raise TypeError(f"stages.{name} is {own!r:.80}; it must be a mapping of arguments")
        for key in ("output_dir", "seed"):
            if key in (own or {}):
                raise ValueError(f"stages.{name} has {key!r}; all stages must have the same")
        found[name] = own or {}
        check_keys(s.kind, f"stages.{name}", found[name], config_of(s.kind), "arguments")
    return {name: found[name] for name in STAGES if name in found}


def _rows(s: Settings, key: str, path: str, tokenizer: Any, validation: float) -> AlignerRows:
    found = read_jsonl(path)
    if not found:
        raise ValueError(f"{key} is {path!r}, which has no rows")
    return metaaligner_rows(
        found,
        tokenizer,
        s.objectives,
        noun=s.noun,
        margins=s.margins,
        per_prompt=s.per_prompt,
        warm_up=s.warm_up,
        validation=validation,
        seed=s.seed,
    )


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {f"arguments.{key}": x for key, x in record["arguments"].items()}
    return {**{key: x for key, x in record.items() if key != "arguments"}, **arguments}
