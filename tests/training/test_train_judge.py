"""``crossfade train jsft`` and then ``self-judge``: from files to a model that judges its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
import torch
import yaml
from crossfade import cli, models
from safetensors.torch import load_file
from train_command import LORA, train
from trainer_runs import OLD_NAMES

pytestmark = [
    OLD_NAMES,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),  # PEFT's own
]
TEMPLATE = {"labels": ["great", "awful"], "prefix": "the film was", "system": None}
PAIR = {"prompt": "the film", "chosen": "a bright plot", "rejected": "dull"}
CHAT = [{"role": "user", "content": "the plot"}]
RATED = [{"text": "very bright", "ratings": {"a": 5}}, {"text": "w1 dull", "ratings": {"a": 1}}]
ROWS: list[dict[str, Any]] = [
    PAIR,
    {**PAIR, "principle": "own", "rationale": "the {chosen} plot"},
    {
        "prompt": CHAT,
        "chosen": [{"role": "assistant", "content": "bright"}],
        "rejected": [{"role": "assistant", "content": "w3"}],
    },
    {"prompt": "a cast", "responses": RATED},
]
ANSWER = {"prompt": "the cast", "completion": "great"}


def settings(base: str, folder: Path, rows: list[Any], **more: Any) -> dict[str, Any]:
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    arguments = {
        "output_dir": str(folder / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "save_steps": 1,
    }
    given = {"model": base, "data": str(data), "lora": LORA, "arguments": arguments}
    return {**given, "template": TEMPLATE, **more}


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(("rows", "found"), [(ROWS, 8 + 3), ([*ROWS, ANSWER], 8 + 1)])
def test_a_judge_is_trained_and_then_trains_itself(
    base: str, tmp_path: Path, rows: list[Any], found: int, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"judge_weight": 3, "principles": {"own": "very bright"}}
    given = settings(base, tmp_path, rows, **own)
    given["eval_data"] = given["data"]
    assert train("jsft", tmp_path, given, "--json") == 0
    told = capsys.readouterr()
    assert f"responses are in {found} rows" in told.err
    assert "judge_accuracy" in told.err
    assert "eval_loss/judge" in told.err
    out = Path(json.loads(told.out)["output_dir"])
    model, tokenizer = models.load(Path(base))
    wrapped = models.with_adapters(model, {"jsft": out})
    judge = cf.Judge(cf.Model(wrapped, tokenizer=tokenizer), template=TEMPLATE)
    assert judge.prefer(["the film"], ["a bright plot"], ["dull"]).isfinite().all()

    prompts = [{"prompt": "the film"}, {"prompt": CHAT}, {"prompt": "w2 w3"}]
    again = settings(f"{base}@{out}", tmp_path, [{"prompt": p["prompt"]} for p in prompts[::2]])
    again["arguments"] |= {"output_dir": str(tmp_path / "own"), "max_new_tokens": 4}
    assert train("self-judge", tmp_path, again, "--json") == 0
    said = capsys.readouterr()
    assert "judge/chosen" in said.err
    assert json.loads(said.out)["train_loss"] > 0
    whole = adapter(tmp_path / "own")
    # a run that is resumed after its first step ends in the same weights
    again["arguments"]["output_dir"] = str(tmp_path / "cut")
    again["arguments"]["max_steps"] = 1
    again["arguments"]["lr_scheduler_type"] = "constant"
    assert train("self-judge", tmp_path, again) == 0
    again["arguments"]["max_steps"] = 2
    assert train("self-judge", tmp_path, again, "--resume") == 0
    again["arguments"]["output_dir"] = str(tmp_path / "uncut")
    assert train("self-judge", tmp_path, again) == 0
    one, other = adapter(tmp_path / "cut"), adapter(tmp_path / "uncut")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert whole.keys() == one.keys()


def test_all_weights_have_a_frozen_copy_as_judge_and_reference(base: str, tmp_path: Path) -> None:
    given = settings(base, tmp_path, [{"prompt": "the film"}, {"prompt": "a cast"}])
    del given["lora"]
    given["arguments"] |= {"max_new_tokens": 4, "warmup_steps": 0}
    assert train("self-judge", tmp_path, given) == 0
    before, after = (load_file(Path(p) / "model.safetensors") for p in (base, tmp_path / "out"))
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("kind", "more", "rows", "message"),
    [
        ("jsft", {"judge_weight": 0}, [PAIR], "judge_weight is 0; it must be above 0"),
        ("jsft", {"template": "hhh"}, [PAIR], "template is 'hhh'; it must be among hh"),
        ("jsft", {"template": "hh"}, [PAIR], "labels are ('A', 'B'), which are the same token"),
        ("jsft", {"principles": ["own"]}, [PAIR], "principles has 'own'; the template knows none"),
        ("jsft", {"loss": "ipo"}, [PAIR], "loss is given; it goes with dpo and self-judge, not"),
        ("jsft", {}, [{"prompt": "a", "chosen": "b"}], "row 0 of pairs has no rejected"),
        ("sft", {}, [ANSWER], "template is given; it goes with jsft and self-judge, not with sft"),
        ("self-judge", {"loss": "modpo"}, [{"prompt": "a"}], "loss is 'modpo'; it must be another"),
        ("self-judge", {"judge_weight": 2}, [{"prompt": "a"}], "it goes with jsft, not with self"),
        ("self-judge", {}, [{"promt": "a"}], "did you mean 'prompt'"),
    ],
)
def test_mistakes(
    base: str,
    tmp_path: Path,
    kind: str,
    more: dict[str, Any],
    rows: list[Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = settings(base, tmp_path, rows, **more)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(given))
    assert cli.main(["train", kind, "--config", str(tmp_path / "train.yaml")]) == 2
    assert message in capsys.readouterr().err


def test_an_adapter_that_is_not_there_is_named(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = settings(f"{base}@nowhere", tmp_path, [{"prompt": "a"}])
    assert train("self-judge", tmp_path, given) == 2
    assert "the guide is 'nowhere'; it must be a folder" in capsys.readouterr().err
