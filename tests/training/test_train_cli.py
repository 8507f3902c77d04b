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
from crossfade.training import DPOTrainer, config, load_value_head, run
from safetensors.torch import load_file
from train_command import LORA, losses, settings, train
from trained_models import make, texts


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own
@pytest.mark.parametrize("kind", ["sft", "dpo", "kto"])
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
    # torch loads these with weights_only, so they hold no pickled objects
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
    assert losses(tmp_path, 1) == [pytest.approx(math.log(2), abs=1e-4)]  # as models are equal


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
    given["eval_data"] = given["data"]  # evaluation comes after each epoch
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


@pytest.mark.sweep
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
    stop = run._StopAtStep()
    with stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_overrides(base: str, tmp_path: Path) -> None:
    """1e-4 is a number here; YAML 1.1 would read it as a text."""
    file = tmp_path / "a.yaml"
    data, other = (tmp_path / name for name in ("d.jsonl", "x.jsonl"))
    for path in (data, other):
        path.touch()
    file.write_text(f"model: m\ndata: {data}\narguments: {{output_dir: o, learning_rate: 2e-5}}\n")
    read = config.read("dpo", file)
    assert read.arguments["learning_rate"] == 2e-5
    sets = ["arguments.learning_rate=1e-4", "lora.r=8", "seed=3", "loss=simpo", f"data={other}"]
    read = config.read("dpo", file, sets)
    assert read.arguments == {"output_dir": "o", "learning_rate": 1e-4}
    assert (read.lora, read.seed, read.loss, read.data) == ({"r": 8}, 3, "simpo", str(other))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # TRL's own
def test_defaults_give_way(base: str, tmp_path: Path) -> None:
    given = settings(base, tmp_path)
    args = config.trainer_config(trl.DPOConfig, config.Settings("dpo", **given, seed=5))
    assert (args.report_to, args.seed, args.bf16) == ([], 5, torch.cuda.is_available())
    given["arguments"] |= {"bf16": True, "report_to": "tensorboard"}
    args = config.trainer_config(trl.DPOConfig, config.Settings("dpo", **given))
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
        (
            {"lora": {"target_modules": ["q_prj", "v_proj"]}},
            "lora.target_modules has 'q_prj', which is no layer of the model; it has "
            "embed_tokens, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, "
            "lm_head; did you mean 'q_proj'?",
        ),
        ({"arguments.loss_type": "sigmiod"}, "; did you mean 'sigmoid'?"),
        ({"arguments.save_strategy": False}, "YAML reads no and yes as bools, unless quoted"),
        ({"arguments.eval_strategy": "epoch"}, "is 'epoch', and there is no eval_data"),
        ({"loss": "simp"}, "loss is 'simp'; it must be among"),
        ({"value": {"kind": "q"}}, "value is given; it goes with value"),
        ({"arguments.learning_rat": 1}, "DPOConfig has not; did you mean 'learning_rate'"),
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
        (['{"prompt": "a", "chosen": "b", "reject": "c"}'], "; did you mean 'rejected'?"),
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
    assert "loss is given; it goes with dpo and self-judge, not with sft" in capsys.readouterr().err


def test_package_does_not_import_trl() -> None:
    code = (
        "import sys, crossfade, crossfade.training, crossfade.training.fused_head, crossfade.cli\n"
        "assert not {'trl', 'peft', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
