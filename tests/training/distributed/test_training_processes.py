"""Two processes train each model as one does, with batches twice as large, to rounding."""

from __future__ import annotations

import functools
import gc
import json
import shutil
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import processes_runs as runs
import pytest
import torch
import yaml
from accelerate.utils import DistributedType
from crossfade.training import config, makers, processes
from crossfade.training.clp.prompts import Prompts
from crossfade.training.value.rollouts import Rollouts
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # PEFT's own
    pytest.mark.filterwarnings("ignore:`[a-z_.]*gradient_checkpointing:FutureWarning"),
]
# Cases by name: the kind of training, the rows, the arguments, and keys beside them.
Case = tuple[str, int, dict[str, Any], dict[str, Any]]
KINDS: dict[str, Case] = {kind: (kind, 9, {}, {}) for kind in runs.OWN}
ADVANCE = {"precompute_ref_log_probs": True}
FREE = {"padding_free": True, "max_length": None, "eval_strategy": "no"}
KINDS |= {
    "sft padding-free": ("sft", 7, FREE, {}),
    "dpo by a sort": ("dpo", 7, {}, {"loss": "aot"}),
    "dpo by losses of TRL": ("dpo", 7, {"loss_type": ["sigmoid", "aot", "sft"]}, {}),
    "kto of references in advance": ("kto", 10, ADVANCE, {}),
}
MORE: dict[str, Case] = {
    f"{kind} accumulated": (kind, 7, {"gradient_accumulation_steps": 2}, {}) for kind in runs.OWN
}
MORE |= {
    "jsft padding-free": ("jsft", 9, FREE, {}),
    "dpo of references in advance": ("dpo", 10, ADVANCE, {}),
    "dpo of weighted pairs": ("dpo", 10, {"use_weighting": True}, {}),
    "kto of all weights": ("kto", 7, {"optim": "sgd"}, {"lora": None}),
    "sft checkpointed": ("sft", 10, {"gradient_checkpointing": True}, {}),
    "dpo without last batches": ("dpo", 10, {"dataloader_drop_last": True}, {}),
}
SPEEDS = ("runtime", "per_second", "flos")


def of(name: str, cases: dict[str, Case], base: str, folder: Path, count: int) -> dict[str, Any]:
    """The settings of a case for that many processes."""
    kind, rows, arguments, own = cases[name]
    at = folder / name.replace(" ", "-") / str(count)
    return {**runs.settings(kind, base, at, processes=count, rows=rows, **arguments), **own}


def histories(out: Path) -> dict[str, list[dict[str, float]]]:
    """What was logged, by folder of checkpoints: an aligner has one for each stage."""
    found = {}
    states = out.rglob("trainer_state.json")
    for file in sorted(states, key=lambda p: int(p.parent.name.partition("-")[2])):
        found[str(file.parent.parent.relative_to(out))] = json.loads(file.read_text())
    return {name: state["log_history"] for name, state in found.items()}


def check_same(one: Path, two: Path, but: Sequence[str] = ()) -> None:
    """Require the figures of all logs, `but` some, and the weights of all checkpoints, to agree."""
    curves = [histories(out) for out in (one, two)]
    assert curves[0].keys() == curves[1].keys() != set()
    for name, history in curves[0].items():
        assert len(history) == len(curves[1][name]) > 2
        for mine, its in zip(history, curves[1][name], strict=True):
            assert mine.keys() == its.keys()
            for key in mine:
                if not key.endswith((*SPEEDS, *but)):
                    assert its[key] == pytest.approx(mine[key], rel=2e-4, abs=2e-5), key
    check_weights(one, two)


def check_weights(one: Path, two: Path) -> None:
    files = [{p.relative_to(out) for p in out.rglob("*.safetensors")} for out in (one, two)]
    assert files[0] == files[1] != set()
    for file in files[0]:
        mine, its = (load_file(out / file) for out in (one, two))
        assert mine.keys() == its.keys()
        for key, x in mine.items():
            torch.testing.assert_close(its[key], x, rtol=1e-4, atol=5e-6)


def output(given: dict[str, Any]) -> Path:
    return Path(given["arguments"]["output_dir"])


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The module of the rewards, for runs of this process."""
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "processes_rewards.py").write_text(runs.REWARDS)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


Pair = Callable[[str], tuple[Path, Path]]


def pair(cases: dict[str, Case], base: str, folder: Path) -> Pair:
    """Does the runs of two processes at once, as these take long to begin, and then asks each."""
    plans = {name: of(name, cases, base, folder, 2) for name in cases}
    runs.in_turn([*plans.values()], folder / "job")

    @functools.cache
    def made(name: str) -> tuple[Path, Path]:
        alone = of(name, cases, base, folder, 1)
        runs.run(alone)
        return output(alone), output(plans[name])

    return made


@pytest.fixture(scope="module")
def trained(base: str, tmp_path_factory: pytest.TempPathFactory, rewards: Any) -> Pair:
    return pair(KINDS, base, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", KINDS)
def test_two_processes_train_as_one(name: str, trained: Pair) -> None:
    """Also where the last batch of an epoch has one row, so that one process has none."""
    check_same(*trained(name))


@pytest.fixture(scope="module")
def trained_more(base: str, tmp_path_factory: pytest.TempPathFactory, rewards: Any) -> Pair:
    return pair(MORE, base, tmp_path_factory.mktemp("more"))


@pytest.mark.sweep
@pytest.mark.parametrize("name", MORE)
def test_two_processes_train_as_one_in_other_ways(name: str, trained_more: Pair) -> None:
    ties = ("accuracies",)  # at step 0 rounding decides which of two equal rewards is larger
    check_same(*trained_more(name), ties if "in advance" in name else ())


@pytest.mark.parametrize("kind", ["dpo", "self-judge", "value", "clp"])
def test_one_process_goes_on_from_a_checkpoint_of_two(
    kind: str, trained: Pair, base: str, tmp_path: Path
) -> None:
    """Its curve is that of a run that was not stopped."""
    whole, two = trained(kind)
    given = of(kind, KINDS, base, tmp_path, 1)
    out = output(given)
    shutil.copytree(two, out)
    for step in (4, 5):
        shutil.rmtree(out / f"checkpoint-{step}")
    assert (out / "checkpoint-3" / "rng_state_1.pth").is_file()
    runs.run(given, resume=True)
    check_same(whole, out, ("num_tokens",))  # TRL counts them since a process began


CONFIGS = Path(__file__).parents[3] / "docs" / "configs"


def fsdp() -> dict[str, str]:
    """What accelerate launch says of docs/configs/fsdp.yaml to the processes that it starts."""
    given = yaml.safe_load((CONFIGS / "fsdp.yaml").read_text())["fsdp_config"]
    said = {
        name.upper(): str(x).lower() if type(x) is bool else str(x) for name, x in given.items()
    }
    return {"ACCELERATE_USE_FSDP": "true", **said}


def check_parts(base: str, folder: Path, parts: dict[str, str], **own: Any) -> str:
    """Require runs with weights in parts to train as one process does; what the runs say."""
    options = {"rows": 8, "eval_strategy": "no", "save_strategy": "no"}
    plans, kinds = [], ("sft", "dpo")
    for kind in kinds:
        given = runs.settings(kind, base, folder / kind, processes=2, **options)
        given["arguments"] |= {"use_cpu": False, **own.get("arguments", {})}
        plans.append({**given, **{k: x for k, x in own.items() if k != "arguments"}})
    said = runs.in_turn(plans, folder / "job", parts)
    for kind, plan in zip(kinds, plans, strict=True):
        alone = runs.settings(kind, base, folder / f"{kind}-1", processes=1, **options)
        runs.run({**alone, "lora": plan["lora"]})
        check_weights(output(alone), output(plan))
    return said


@pytest.mark.sweep
@pytest.mark.parametrize("lora", [runs.LORA, None])
def test_fsdp_trains_as_one_process(lora: Any, base: str, tmp_path: Path, rewards: Any) -> None:
    """FSDP2, on CPUs that Accelerate takes for GPUs."""
    assert "trained by FSDP" in check_parts(base, tmp_path, fsdp(), lora=lora)


@pytest.mark.sweep
@pytest.mark.parametrize("lora", [runs.LORA, None])
def test_deepspeed_trains_as_one_process(
    lora: Any, base: str, tmp_path: Path, rewards: Any
) -> None:
    """ZeRO 2, on CPUs that Accelerate takes for GPUs."""
    pytest.importorskip("deepspeed")
    parts = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    file = {"deepspeed": str(CONFIGS / "deepspeed_zero2.json")}
    assert "trained by DEEPSPEED" in check_parts(base, tmp_path, parts, lora=lora, arguments=file)


@pytest.mark.sweep
def test_ctrl_c_stops_both_at_one_step(base: str, tmp_path: Path) -> None:
    """One of them alone is asked; what they saved goes on to the end of a run that was not."""
    given = runs.settings("dpo", base, tmp_path, processes=2, max_steps=400, save_strategy="no")
    file = tmp_path / "dpo.yaml"
    file.write_text(yaml.safe_dump({k: x for k, x in given.items() if k != "kind"}))
    code = (
        "import os, signal, sys, threading\n"
        "if os.environ['RANK'] == '1':\n"
        "    from crossfade.training import DPOTrainer\n"
        "    plain, seen = DPOTrainer.training_step, []\n"
        "    def step(self, *args, **options):\n"
        "        seen.append(1)\n"
        "        if len(seen) == 3:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "            os.kill(os.getpid(), signal.SIGINT)  # passed on by torchrun\n"
        "        return plain(self, *args, **options)\n"
        "    DPOTrainer.training_step = step\n"
        "from crossfade import cli\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    (tmp_path / "asked.py").write_text(code)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, str(tmp_path / "asked.py"), "train", "dpo", "--config", str(file)]
    done = runs.launched(command, tmp_path)
    assert done.returncode != 0
    assert "checkpoint-3; --resume goes on from there" in done.stderr
    assert (output(given) / "checkpoint-3" / "trainer_state.json").is_file()


@pytest.mark.sweep
def test_an_error_in_one_process_ends_both(base: str, tmp_path: Path) -> None:
    """Nothing waits for the one that failed, and what it says is seen."""
    given = runs.settings("clp", base, tmp_path, processes=2, rows=8, eval_strategy="no")
    given["rewards"]["short"] = "processes_rewards:odd"
    file = tmp_path / "clp.yaml"
    file.write_text(yaml.safe_dump({k: x for k, x in given.items() if k != "kind"}))
    (tmp_path / "processes_rewards.py").write_text(runs.REWARDS)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, "-m", "crossfade", "train", "clp", "--config", str(file)]
    done = runs.launched(command, tmp_path)
    assert done.returncode != 0
    assert "the reward 'short' is nan" in done.stderr


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("rows", range(1, 14))
def test_shares_are_of_the_rows_that_one_process_reads(rows: int, drop_last: bool) -> None:
    """In their order, each once; a process without any reads one that it need not count."""
    size, count = 2, 3
    each = [processes.Shares(range(rows), size, count, i, drop_last) for i in range(count)]
    alone = [*torch.utils.data.BatchSampler(range(rows), size * count, drop_last)]
    found = [[*shares] for shares in each]
    assert [len(x) for x in each] == [len(x) for x in found] == [len(alone)] * count
    for step, batch in enumerate(alone):
        last = step == len(alone) - 1
        parts = [x[step] for x in found]
        counted = [p for p, s in zip(parts, each, strict=True) if not (last and s.stands_in)]
        assert [i for part in counted for i in part] == batch
        assert max(map(len, counted)) - min(map(len, counted)) <= 1
        assert all(len(p) == 1 for p in parts[len(counted) :])


def test_every_logger_of_training_says_it_once() -> None:
    folder = Path(processes.__file__).parent
    files = {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("*.py")}
    others = [name for name, text in files.items() if "logging.getLogger(" in text]
    assert others == ["processes.py"]


@pytest.mark.parametrize("kind", ["sft", "dpo", "value", "self-judge", "clp"])
def test_fsdp_is_refused_where_weights_would_stay_whole(
    kind: str, base: str, tmp_path: Path, monkeypatch: Any, rewards: Any
) -> None:
    """Accelerate passes over it on a CPU, and trains with copies."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="ACCELERATE_USE_FSDP is 'true'"):
        runs.run(runs.settings(kind, base, tmp_path, processes=1))


def of_processes(how: DistributedType, count: int = 2) -> Any:
    """What the checks of a trainer look at."""
    accelerator = SimpleNamespace(distributed_type=how, num_processes=count, device="cpu")
    return SimpleNamespace(accelerator=accelerator, args=SimpleNamespace(use_cpu=False))


@pytest.mark.parametrize("how", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_weights_in_parts_are_refused_by_trainers_that_need_the_whole_model(how: Any) -> None:
    processes.check_processes(of_processes(how))
    with pytest.raises(NotImplementedError, match="which SimpleNamespace does not support"):
        processes.check_processes(of_processes(how), whole=True)


def test_processes_that_would_train_alone_are_refused(monkeypatch: Any) -> None:
    """As Accelerate has it where there is no GPU, and nobody says that this is meant."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    processes.check_processes(of_processes(DistributedType.MULTI_CPU))
    with pytest.raises(ValueError, match=r"args\.use_cpu is False; it must be True"):
        processes.check_processes(of_processes(DistributedType.NO, 1))


@pytest.mark.parametrize("kind", ["jsft", "value", "clp"])
def test_what_all_processes_find_is_said_by_the_first_alone(
    kind: str, base: str, tmp_path: Path, monkeypatch: Any, rewards: Any, capsys: Any, caplog: Any
) -> None:
    """Also before they have found each other, as while rows are read."""
    arguments = {"max_new_tokens": 4, "max_length": 8} if kind == "clp" else {}
    given = config.Settings(**runs.settings(kind, base, tmp_path, processes=1, **arguments))
    rows = makers.rows_of(given, "data", given.data)
    if kind == "value":
        rows[0]["finished"] = False
    for rank, says in (("1", False), ("0", True)):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        if kind == "jsft":
            makers._of_judging(given, "train", rows, makers.tokenizer_of(given))
        elif kind == "value":
            Rollouts(rows, None, 99, "drop", "rows")
        else:
            Prompts(rows, makers.tokenizer_of(given), 99, 5, "rows")
        said = capsys.readouterr().err + caplog.text
        assert ("the train data" in said or "are left out" in said) is says


def test_a_process_alone_says_what_it_finds_whatever_its_rank(monkeypatch: Any) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes.is_main_process()


def test_the_group_of_processes_outlives_what_they_trained(tmp_path: Path) -> None:
    """Torch's destructor of a group waits for threads, with the lock that these may need."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    kept = weakref.ref(torch.distributed.group.WORLD)
    end = torch.distributed.destroy_process_group
    processes.part(SimpleNamespace(end_training=end))
    gc.collect()
    assert not torch.distributed.is_initialized()
    assert kept() is not None
