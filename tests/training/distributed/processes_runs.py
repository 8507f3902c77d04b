"""Runs of ``crossfade train`` of every kind, by one process or in turn by two.

As a script, under torchrun: ``processes_runs.py RUNS`` does the runs of a JSON file in turn.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
EOS = 1
PROCESSES = 2
AS_GPUS = "PROCESSES_AS_GPUS"  # whether Accelerate is to take processes for those of GPUs
REWARDS = """
def great(prompts, responses):
    return [float("great" in text) + len(text) / 50 for text in responses]

def short(prompts, responses):
    return [-len(text.split()) / 6 for text in responses]

def odd(prompts, responses):
    if any("w0" in str(prompt) for prompt in prompts):
        return [float("nan")] * len(responses)
    return [0.0] * len(responses)
"""
JUDGED = {"template": {"labels": ["great", "awful"], "prefix": "the film was", "system": None}}
REWARDED = {"rewards": {"great": "processes_rewards:great", "short": "processes_rewards:short"}}
STAGED = {"objectives": {"kind": "be kind", "brief": "be brief"}}
# The settings of each kind that are its own, and those of its arguments.
OWN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sft": ({}, {}),
    "dpo": ({}, {}),
    "kto": ({}, {}),
    "value": ({"lora": None, "value": {"rank": 2}}, {"objective": "cd_q"}),
    "jsft": ({**JUDGED, "judge_weight": 3}, {"max_steps": 8}),
    "self-judge": (JUDGED, {"max_new_tokens": 4, "warmup_steps": 0}),
    "metaaligner": (STAGED, {"max_steps": 3, "eval_steps": 3}),
    "clp": (REWARDED, {"max_new_tokens": 4, "num_generations": 2, "kl": [0.1, 0.5]}),
}
MORE: dict[str, dict[str, Any]] = {"clp": {"lora": {"r": 2}}}


def rows_of(kind: str, count: int) -> list[dict[str, Any]]:
    """Rows of different lengths, and of different numbers of tokens in each process."""
    found: list[dict[str, Any]] = []
    for i in range(count):
        prompt = f"the film w{i} was" + " very" * (i % 3)
        good = " great cast" + f" w{20 + i}" * (i % 3) + " <eos>"
        bad = " awful dull plot" + f" w{30 + i}" * (i % 4) + " <eos>"
        if kind == "dpo":
            row = {"prompt": prompt, "chosen": good, "rejected": bad}
        elif kind == "sft":
            row = {"prompt": prompt, "completion": good}
        elif kind == "kto":  # some batches have none of a label in one of two processes
            row = {"prompt": prompt, "completion": bad if i % 3 else good, "label": i % 3 == 0}
        elif kind == "value":
            ids = {"prompt_ids": [5, 6 + i], "completion_ids": [*range(10, 11 + i % 4), EOS]}
            row = {**ids, "reward": i / 9, "finished": True}
        elif kind == "jsft":
            row = {"prompt": prompt, "chosen": good.strip(), "rejected": bad.strip()}
        elif kind == "metaaligner":
            row = {"prompt": prompt, "first": bad, "second": good}
            row["preferences"] = {"kind": "worse", "brief": "equal"}
        else:
            row = {"prompt": prompt}
        found.append(row)
    return found


def settings(
    kind: str, base: str, folder: Path, *, processes: int, rows: int = 9, **arguments: Any
) -> dict[str, Any]:
    """The settings of a run whose batches have four rows in all processes together.

    Of nine rows the third batch of an epoch has one, for which there are two processes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data, evaluated = folder / "rows.jsonl", folder / "evaluated.jsonl"
    for file, form in ((data, kind), (evaluated, "dpo" if kind == "self-judge" else kind)):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(form, rows)))
    own, its = OWN[kind]
    common = {
        **{"output_dir": str(folder / "out"), "max_steps": 5, "logging_steps": 1},
        **{"per_device_train_batch_size": 4 // processes, "learning_rate": 1e-2},
        **{"per_device_eval_batch_size": 4 // processes, "eval_strategy": "steps"},
        "eval_steps": 5,
        **{"save_steps": 1, "use_cpu": True, "bf16": False, "dataloader_pin_memory": False},
        # rounding decides the first steps of Adam for weights whose gradient is nearly 0
        **{"adam_epsilon": 1e-4},
    }
    given = {"kind": kind, "model": base, "data": str(data), "eval_data": str(evaluated)}
    given |= {"lora": LORA, **own, **MORE.get(kind, {})}
    return {**given, "arguments": {**common, **its, **arguments}}


def run(given: dict[str, Any], resume: bool = False) -> None:
    """A run in this process, which may be one of two."""
    from crossfade.extras import old_names
    from crossfade.training import config
    from crossfade.training.run import run as train

    with old_names():
        train(config.Settings(**given), resume=resume)


def in_turn(
    runs: Sequence[dict[str, Any]],
    folder: Path,
    parts: Mapping[str, str] | None = None,
    timeout: float = 240,
) -> str:
    """Do runs by two processes; what these say.

    Args:
        runs: the settings of each.
        folder: for files of its own.
        parts: what accelerate launch would say of weights in parts, by environment variables.
        timeout: in seconds; processes that wait for each other do not end by themselves.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "processes_rewards.py").write_text(REWARDS)
    file = folder / "runs.json"
    file.write_text(json.dumps([*runs]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={PROCESSES}", str(Path(__file__)), str(file)]
    own = {} if parts is None else {**parts, AS_GPUS: "1", "ACCELERATE_TORCH_DEVICE": "cpu"}
    done = launched(command, folder, timeout, own)
    assert done.returncode == 0, done.stderr[-9000:]
    return done.stderr


def launched(
    command: Sequence[str],
    folder: Path,
    timeout: float = 240,
    more: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command that starts processes; all of them are ended where it takes too long."""
    paths = [str(folder), str(HERE), str(HERE.parent), str(HERE.parents[1])]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    own = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "CI": "1"}
    started = subprocess.Popen(
        [*command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **own, **(more or {})},
        start_new_session=True,
    )
    try:
        out, err = started.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        out, err = started.communicate()
        raise AssertionError(f"no end after {timeout} s:\n{err[-4000:]}") from None
    return subprocess.CompletedProcess([*command], started.returncode, out, err)


def main(file: Path) -> None:
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedType

    Accelerator.end_training = lambda self: None  # the next run needs the processes' group
    if AS_GPUS in os.environ:  # else Accelerate would train with copies, as this is a CPU
        gpus = "gloo", DistributedType.MULTI_GPU
        PartialState._prepare_backend = lambda self, *_: gpus
    for given in json.loads(file.read_text()):
        run(given)
    print("trained by", PartialState().distributed_type.value, file=sys.stderr)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
