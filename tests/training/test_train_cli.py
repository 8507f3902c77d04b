"""``crossfade train``: from files to an adapter or a model; runs are stopped and resumed."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
import torch
import trl
import yaml
from crossfade import cli
from crossfade.models.saved_value_heads import ADAPTER_FILES
from crossfade.training import DPOTrainer, SFTTrainer, checkpoints, config, load_value_head
from safetensors.torch import load_file
from trained_models import make, texts

LORA = {"r": 2, "target_modules": ["q_proj", "down_proj"]}


def settings(base: str, folder: Path, kind: str = "dpo", **more: Any) -> dict[str, Any]:
    data = folder / f"{kind}.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in texts(kind)) + "\n")
    arguments = {
        "output_dir": str(folder / "out"),
        "max_steps": 4,
        "per_device_train_batch_size": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "save_steps": 2,
    }
    return {"model": base, "data": str(data), "lora": LORA, "arguments": arguments, **more}


def train(kind: str, folder: Path, given: dict[str, Any], *options: str) -> int:
    file = folder / f"{kind}.yaml"
    file.write_text(yaml.safe_dump(given))
    return cli.main(["train", kind, "--config", str(file), *options])


def losses(folder: Path, step: int) -> list[float]:
    state = json.loads((folder / "out" / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [x["loss"] for x in state["log_history"] if "loss" in x]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_adapter(base: str, tmp_path: Path, kind: str, capsys: Any) -> None:
    """An adapter is trained and saved, and ``base=PATH@OUT`` decodes with it."""
    given = settings(base, tmp_path, kind)
    eval_data = tmp_path / "eval.jsonl"
    eval_data.write_text("\n".join(json.dumps(row) for row in texts(kind, 3)))
    given["eval_data"] = str(eval_data)
    given["arguments"] |= {"eval_strategy": "steps", "eval_steps": 2}
    assert train(kind, tmp_path, given, "--json") == 0
    told = capsys.readouterr()
    report = json.loads(told.out)
    out = tmp_path / "out"
    assert report["output_dir"] == str(out)
    assert report["train_loss"] > 0
    assert "eval_loss" in told.err
    weights = load_file(out / "adapter_model.safetensors")
    assert any("lora_B" in name and x.any() for name, x in weights.items())
    assert not [p for p in out.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    state = {
        p.name for p in (out / "checkpoint-4").iterdir() if p.suffix in (".bin", ".pt", ".pth")
    }
    # torch loads these with weights_only: no pickled objects
    assert state == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    made = ["generate", "the film", "--model", f"base={base}@{out}", "--max-new-tokens", "3"]
    assert cli.main([*made, "--greedy"]) == 0
    tuned = json.loads(capsys.readouterr().out)
    assert cli.main([*made[:2], "--model", f"base={base}", *made[4:], "--greedy"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert tuned["logprob"] != plain["logprob"]


def test_all_weights(base: str, tmp_path: Path, capsys: Any) -> None:
    """Without `lora` all weights are trained. The reference is a copy; SimPO has none."""
    given = settings(base, tmp_path)
    del given["lora"]
    given |= {"loss": "simpo", "loss_options": {"beta": 1.0}}
    assert train("dpo", tmp_path, given) == 0
    assert "saved in" in capsys.readouterr().out
    out = tmp_path / "out"
    before, after = (load_file(Path(p) / "model.safetensors") for p in (base, out))
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert (out / "tokenizer.json").is_file()
    given |= {"loss": None, "loss_options": None}
    given["arguments"]["output_dir"] = str(tmp_path / "dpo")
    assert train("dpo", tmp_path, given) == 0


def test_the_reference_is_the_model_without_an_adapter_that_lies_in_its_folder(
    base: str, tmp_path: Path
) -> None:
    import peft
    from crossfade.extras import old_names

    folder = shutil.copytree(base, tmp_path / "both")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **LORA)
    with old_names():
        peft.get_peft_model(make(), lora).save_pretrained(folder)
    given = settings(str(folder), tmp_path)
    del given["lora"]
    given["arguments"] |= {"max_steps": 1, "save_steps": 1}
    assert train("dpo", tmp_path, given) == 0
    assert losses(tmp_path, 1) == [pytest.approx(math.log(2), abs=1e-4)]  # of equal models


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own
@pytest.mark.parametrize("objective", ["fudge", "cd_q"])
def test_value(base: str, tmp_path: Path, objective: str, capsys: Any) -> None:
    """A Q-head of rank 2 is trained by CD-Q, and `load_value_head` loads it."""
    given = settings(base, tmp_path, "sft", value={"rank": 2})
    lora = given.pop("lora")
    prompt, response = [5, 6, 7], [8, 9, tiny.EOS]
    rows = [
        {"prompt_ids": prompt, "completion_ids": [i, *response], "reward": i / 9, "finished": True}
        for i in range(10, 16)
    ]
    Path(given["data"]).write_text("\n".join(json.dumps(row) for row in rows))
    given["arguments"]["objective"] = objective
    given["eval_data"] = given["data"]  # after each epoch
    if objective == "fudge":
        given["lora"] = lora
    assert train("value", tmp_path, given) == 0
    assert "eval_loss" in capsys.readouterr().err
    folder = tmp_path / "out"
    before, after = make(), load_value_head(folder, make())
    ids = torch.tensor([prompt])
    assert after(input_ids=ids).logits.shape == before(input_ids=ids).logits.shape
    assert after(input_ids=ids).logits.any()
    given["value"] = {"rnk": 2}
    given["arguments"]["output_dir"] = str(tmp_path / "other")
    assert train("value", tmp_path, given) == 2
    assert "value has the key 'rnk'; known ones are kind, rank" in capsys.readouterr().err


def test_two_processes(base: str, tmp_path: Path) -> None:
    """Two processes with half a batch each train as one does, and only one of them prints."""
    given = settings(base, tmp_path, "sft", value={"rank": 2})
    del given["lora"]
    rows = [
        {"prompt_ids": [5, 6], "completion_ids": [*range(10, 11 + i % 3), tiny.EOS]}
        | {"reward": i / 9, "finished": True}
        for i in range(8)
    ]
    Path(given["data"]).write_text("\n".join(json.dumps(row) for row in rows))
    alone = {"objective": "cd_q", "optim": "sgd", "per_device_train_batch_size": 4}
    given["arguments"] |= {**alone, "dataloader_pin_memory": False}
    assert train("value", tmp_path, given) == 0
    given["arguments"]["per_device_train_batch_size"] = 2
    given["arguments"]["output_dir"] = str(tmp_path / "two")
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(given))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = ["-m", "crossfade", "train", "value", "--config", str(file), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output_dir"] == str(tmp_path / "two")
    one, two = (load_file(tmp_path / x / "value_head.safetensors") for x in ("out", "two"))
    for name, x in one.items():
        assert x.any()
        torch.testing.assert_close(two[name], x, rtol=1e-4, atol=1e-6)


def test_resume(base: str, tmp_path: Path, capsys: Any) -> None:
    """A run that is stopped and resumed has the curve of one that is not."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    assert train("dpo", whole, settings(base, whole)) == 0
    given = settings(base, cut)
    given["arguments"]["lr_scheduler_type"] = "linear"
    assert train("dpo", cut, given) == 0
    for file in (cut / "out").glob("*.safetensors"):
        file.unlink()
    shutil.rmtree(cut / "out" / "checkpoint-4")
    assert train("dpo", cut, given) == 2
    assert "checkpoint-2 of another run" in capsys.readouterr().err
    assert train("dpo", cut, given, "--resume") == 0
    assert losses(cut, 4) == losses(whole, 4)
    a, b = (load_file(x / "out" / "adapter_model.safetensors") for x in (whole, cut))
    assert all(torch.equal(a[name], b[name]) for name in a)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


DAMAGE: dict[str, tuple[Any, str]] = {
    "trainer_state.json": (Path.unlink, "trainer_state.json is missing"),
    "cut trainer_state.json": (cut, "trainer_state.json: not JSON"),
    "deep trainer_state.json": (lambda p: p.write_text("[" * 10**5), "more than 100 levels deep"),
    "wrong trainer_state.json": (lambda p: p.write_text("{}"), "is of step None"),
    "optimizer.pt": (Path.unlink, "optimizer.pt is missing"),
    "cut optimizer.pt": (cut, "optimizer.pt is cut"),
    "empty optimizer.pt": (lambda p: p.write_bytes(b""), "optimizer.pt is cut"),
    "scheduler.pt": (Path.unlink, "scheduler.pt is missing"),
    "rng_state.pth": (Path.unlink, "rng_state.pth is missing"),
    "adapter_model.safetensors": (Path.unlink, "adapter_model.safetensors is missing"),
    "cut adapter_model.safetensors": (cut, "adapter_model.safetensors cannot be read"),
    "cut adapter_config.json": (cut, "adapter_config.json: not JSON"),
}


@pytest.fixture(scope="module")
def trained(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has ended, with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    assert train("sft", folder, settings(base, folder, "sft")) == 0
    return folder


def copied(trained: Path, folder: Path, base: str) -> dict[str, Any]:
    shutil.copytree(trained / "out", folder / "out")
    return settings(base, folder, "sft")


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_checkpoint_is_named(
    trained: Path, base: str, tmp_path: Path, what: str, capsys: Any
) -> None:
    given = copied(trained, tmp_path, base)
    (harm, message), name = DAMAGE[what], what.split()[-1]
    harm(tmp_path / "out" / "checkpoint-4" / name)
    last, damaged = checkpoints.last_complete(tmp_path / "out", ADAPTER_FILES)
    assert last.name == "checkpoint-2"
    assert message in damaged[tmp_path / "out" / "checkpoint-4"]
    harm(tmp_path / "out" / "checkpoint-2" / name)
    assert train("sft", tmp_path, given, "--resume") == 2
    told = capsys.readouterr().err
    assert "no checkpoint in" in told
    assert message in told
    assert "checkpoint-2" in told


def test_killed_inside_a_checkpoint(
    trained: Path, base: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """The run goes on from the checkpoint before, and ends as a run that was not killed."""
    given = settings(base, tmp_path, "sft")
    save = SFTTrainer._save_rng_state

    def killed(self: Any, folder: str) -> None:
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        save(self, folder)

    with monkeypatch.context() as m:
        m.setattr(SFTTrainer, "_save_rng_state", killed)
        assert train("sft", tmp_path, given) == 130
    assert (tmp_path / "out" / "checkpoint-4" / "optimizer.pt").is_file()
    assert train("sft", tmp_path, given) == 2
    assert "checkpoint-4 of another run" in capsys.readouterr().err
    assert train("sft", tmp_path, given, "--resume") == 0
    assert (
        "checkpoint-4 is damaged (trainer_state.json is missing): going on from checkpoint-2"
        in (capsys.readouterr().err)
    )
    assert losses(tmp_path, 4) == losses(trained, 4)
    a, b = (load_file(x / "out" / "adapter_model.safetensors") for x in (tmp_path, trained))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resume_without_the_optimizer(
    trained: Path, base: str, tmp_path: Path, capsys: Any
) -> None:
    given = copied(trained, tmp_path, base)
    given["arguments"]["save_only_model"] = True
    assert train("sft", tmp_path, given, "--resume") == 2
    assert "arguments.save_only_model is True" in capsys.readouterr().err


def test_damaged_value_head(base: str, tmp_path: Path, capsys: Any) -> None:
    given = settings(base, tmp_path, "sft", value={"rank": 2})
    del given["lora"]
    row = {"prompt_ids": [5], "completion_ids": [6, tiny.EOS], "reward": 1.0, "finished": True}
    Path(given["data"]).write_text("\n".join([json.dumps(row)] * 4))
    assert train("value", tmp_path, given) == 0
    before = load_file(tmp_path / "out" / "value_head.safetensors")
    cut(tmp_path / "out" / "checkpoint-4" / "value_head.safetensors")
    assert train("value", tmp_path, given, "--resume") == 0
    assert "value_head.safetensors cannot be read" in capsys.readouterr().err
    after = load_file(tmp_path / "out" / "value_head.safetensors")
    assert all(torch.equal(after[name], x) for name, x in before.items())


def test_scaler_of_float16(trained: Path, base: str, tmp_path: Path) -> None:
    given = copied(trained, tmp_path, base)
    given["arguments"]["fp16"] = True
    with pytest.raises(ValueError, match=r"scaler\.pt is missing"):
        config._checkpoint(config.Settings("sft", **given), tmp_path / "out")


def test_weights_in_pieces(trained: Path, tmp_path: Path) -> None:
    """Weights may be in pieces with an index; each piece must be complete."""
    shutil.copytree(trained / "out" / "checkpoint-4", tmp_path / "checkpoint-4")
    folder = tmp_path / "checkpoint-4"
    index, piece = folder / "model.safetensors.index.json", folder / "model-1.safetensors"
    index.write_text(json.dumps({"weight_map": {"a": piece.name}}))
    files = ["model.safetensors"]
    assert checkpoints.damage(folder, files) == "model-1.safetensors is missing"
    (folder / "adapter_model.safetensors").rename(piece)
    assert checkpoints.damage(folder, files) is None
    cut(piece)
    assert "model-1.safetensors cannot be read" in str(checkpoints.damage(folder, files))
    index.write_text("{}")
    assert "names no files" in str(checkpoints.damage(folder, files))
    cut(index)
    assert "index.json: not JSON" in str(checkpoints.damage(folder, files))


def test_ctrl_c(base: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """The step ends, a checkpoint is saved, and another run can go on from it."""
    plain, step = DPOTrainer.training_step, []

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        step.append(self.state.global_step)
        if len(step) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, *args, **kwargs)

    given = settings(base, tmp_path)
    given["arguments"]["save_strategy"] = "no"
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as m:
        m.setattr(DPOTrainer, "training_step", interrupted)
        assert train("dpo", tmp_path, given) == 130
    told = capsys.readouterr().err
    assert "checkpoint-3; --resume goes on" in told
    assert step == [0, 1, 2]
    assert signal.getsignal(signal.SIGINT) is handler
    given["arguments"]["save_strategy"] = "steps"
    assert train("dpo", tmp_path, given, "--resume") == 0
    whole = tmp_path / "whole"
    whole.mkdir()
    assert train("dpo", whole, settings(base, whole)) == 0
    assert losses(tmp_path, 4) == losses(whole, 4)


def test_second_ctrl_c() -> None:
    stop = config._StopAtStep()
    with stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_overrides(base: str, tmp_path: Path) -> None:
    """1e-4 is a number here; YAML 1.1 would read it as a text."""
    file = tmp_path / "a.yaml"
    file.write_text("model: m\ndata: d.jsonl\narguments: {output_dir: o, learning_rate: 2e-5}\n")
    read = config.read("dpo", file)
    assert read.arguments["learning_rate"] == 2e-5
    sets = ["arguments.learning_rate=1e-4", "lora.r=8", "seed=3", "loss=simpo", "data=x.jsonl"]
    read = config.read("dpo", file, sets)
    assert read.arguments == {"output_dir": "o", "learning_rate": 1e-4}
    assert (read.lora, read.seed, read.loss, read.data) == ({"r": 8}, 3, "simpo", "x.jsonl")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # TRL's own
def test_defaults_give_way(base: str, tmp_path: Path) -> None:
    given = settings(base, tmp_path)
    args = config._arguments(trl.DPOConfig, config.Settings("dpo", **given, seed=5))
    assert (args.report_to, args.seed, args.bf16) == ([], 5, torch.cuda.is_available())
    given["arguments"] |= {"bf16": True, "report_to": "tensorboard"}
    args = config._arguments(trl.DPOConfig, config.Settings("dpo", **given))
    assert (args.report_to, args.bf16) == (["tensorboard"], True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": "x"}, "the key 'modle'; known ones are model, data, arguments, dtype"),
        ({"model": None}, "model is None; it must be a string"),
        ({"model": "nowhere"}, "there is no folder 'nowhere'"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"data": "rows.csv"}, "data is 'rows.csv'; it must be a .jsonl file"),
        ({"dtype": "int8"}, "dtype is 'int8'; it must be among float32"),
        ({"seed": -1}, "seed is -1"),
        ({"lora": {"rank": 2}}, "lora has the key 'rank', which LoraConfig has not"),
        ({"lora": 3}, "lora is 3; it must be a mapping"),
        ({"loss": "simp"}, "loss is 'simp'; it must be among"),
        ({"value": {"kind": "q"}}, "value is given; it goes with value"),
        ({"arguments.learning_rat": 1}, "'learning_rat', which DPOConfig has not; near to it are"),
        ({"arguments.seed": 1}, "it must be the key seed"),
        ({"arguments.output_dir": None}, "arguments.output_dir is None"),
        ({"arguments.lr_scheduler_type": "cubic"}, "arguments: cubic is not a valid"),
        ({"arguments.report_to": "paper"}, "report_to is 'paper', whose package is not installed"),
    ],
)
def test_mistakes(
    base: str, tmp_path: Path, change: dict[str, Any], message: str, capsys: Any
) -> None:
    given = settings(base, tmp_path)
    for place, value in change.items():
        *outer, last = place.split(".")
        (given[outer[0]] if outer else given)[last] = value
    assert train("dpo", tmp_path, given) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("seed", "it must be KEY=VALUE"),
        ("seed.x=1", "seed is 3, which has no keys"),
        ("data=[", "is not YAML"),
        ("data=3", "data is 3; it must be a string"),
    ],
)
def test_set_mistakes(base: str, tmp_path: Path, option: str, message: str, capsys: Any) -> None:
    assert train("dpo", tmp_path, settings(base, tmp_path, seed=3), "--set", option) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"prompt": "a", "completion": "b"}'], "must have prompt, chosen and rejected"),
        (["{"], "line 1: not JSON"),
        (["[1]"], "line 1: must be an object"),
        (
            ['{"prompt": "a"}', '{"chosen": "a"}'],
            "dpo.jsonl has the keys chosen; it must have prompt",
        ),
        ([""], "has no rows"),
    ],
)
def test_data_mistakes(
    base: str, tmp_path: Path, lines: list[str], message: str, capsys: Any
) -> None:
    given = settings(base, tmp_path)
    Path(given["data"]).write_text("\n".join(lines) + "\n")
    assert train("dpo", tmp_path, given) == 2
    assert message in capsys.readouterr().err


def test_resume_without_checkpoint(base: str, tmp_path: Path, capsys: Any) -> None:
    assert train("dpo", tmp_path, settings(base, tmp_path), "--resume") == 2
    assert "there is no checkpoint" in capsys.readouterr().err
    given = settings(base, tmp_path, "sft", loss="simpo")
    assert train("sft", tmp_path, given) == 2
    assert "loss is given; it goes with dpo, not with sft" in capsys.readouterr().err


def test_package_does_not_import_trl() -> None:
    code = (
        "import sys, crossfade, crossfade.training, crossfade.training.fused_head, crossfade.cli\n"
        "assert not {'trl', 'peft', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
