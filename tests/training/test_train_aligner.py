"""``crossfade train metaaligner``: from files, stage after stage, to a model that corrects."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any, NamedTuple

import crossfade as cf
import peft
import pytest
import torch
from crossfade import cli, models
from crossfade.policies.metaaligner import metaaligner_rows
from crossfade.training import SFTTrainer, stages
from safetensors.torch import load_file
from train_command import LORA, train

# PEFT's own
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
NAMES = {"kind": "be kind", "brief": "be brief"}
PAIR = {
    "prompt": "the film",
    "first": "a dull plot",
    "second": "bright",
    "preferences": {"kind": "worse", "brief": "equal"},
}
RATED = [{"text": "very bright", "rewards": {"kind": 5, "brief": 2}}]
RATED += [{"text": "w1 dull", "rewards": {"kind": 1, "brief": 2.5}}]
ROWS = [*({**PAIR, "prompt": f"the w{i}"} for i in range(6)), {"prompt": "q", "responses": RATED}]


def settings(base: str, folder: Path, rows: list[Any] = ROWS, **more: Any) -> dict[str, Any]:
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    arguments = {
        "output_dir": str(folder / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
    }
    given = {"model": base, "data": str(data), "lora": {**LORA, "lora_dropout": 0.2}}
    return {**given, "arguments": arguments, "objectives": NAMES, "margins": 1, **more}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (p for p in folder.glob("*.safetensors"))
    return load_file(file)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(x, other[k]) for k, x in one.items())


class Whole(NamedTuple):
    """A run that nothing interrupted.

    Attributes:
        begun: for each stage its folder, the adapter that it began with, and its rows.
    """

    out: Path
    begun: list[tuple[Path, dict[str, torch.Tensor], list[dict[str, Any]]]]
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def whole(base: str, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    plain, begun = SFTTrainer.train, []

    def seen(self: Any, *args: Any, **options: Any) -> Any:
        begun.append((Path(self.args.output_dir), adapter_of(self.model), [*self.train_dataset]))
        return plain(self, *args, **options)

    told = [io.StringIO(), io.StringIO()]
    with (
        pytest.MonkeyPatch.context() as m,
        contextlib.redirect_stdout(told[0]),
        contextlib.redirect_stderr(told[1]),
    ):
        m.setattr(SFTTrainer, "train", seen)
        assert train("metaaligner", folder, settings(base, folder), "--json") == 0
    return Whole(folder / "out", begun, told[0].getvalue(), told[1].getvalue())


def adapter_of(model: Any) -> dict[str, torch.Tensor]:
    return {k: x.clone() for k, x in peft.get_peft_model_state_dict(model).items()}


def test_an_aligner_is_trained_in_three_stages(
    base: str, tmp_path: Path, whole: Whole, capsys: pytest.CaptureFixture[str]
) -> None:
    out, begun = whole.out, whole.begun
    expected = "the train data: 7 pairs give 7 warm-up, 7 equal, 7 better rows; compared by"
    assert expected in whole.stderr
    for i, name in enumerate(("warm-up", "equal", "better")):
        assert f"stage {i + 1} of 3: {name}, 7 rows" in whole.stderr
    report = json.loads(whole.stdout)
    assert report["output_dir"] == str(out)
    assert report["train_loss/equal"] > 0
    # each stage has its own rows, with a loss on the answer, and begins where the last one ended
    rows = metaaligner_rows(ROWS, models.load(Path(base))[1], NAMES, margins=1)
    assert [folder.name for folder, *_ in begun] == ["warm-up", "equal", "better"]
    for folder, _, trained in begun:
        for row, expected in zip(trained, rows.of(folder.name), strict=True):
            before, after = expected["prompt_ids"], expected["completion_ids"]
            assert row["input_ids"] == [*before, *after]
            assert row["labels"] == [-100] * len(before) + after
    assert same(begun[1][1], weights(out / "warm-up"))
    assert same(begun[2][1], weights(out / "equal"))
    assert not same(weights(out / "equal"), weights(out / "better"))
    assert same(weights(out), weights(out / "better"))
    assert not (out / stages.MARK).exists()
    # it corrects, in Python and on the command line
    model, tokenizer = models.load(Path(base))
    wrapped = models.with_adapters(model, {"own": out})
    aligner = cf.MetaAligner(cf.Model(wrapped, tokenizer=tokenizer, adapter="own"))
    corrected = cf.correct(aligner, ["the film"], ["a dull plot"], NAMES, max_new_tokens=3)
    assert len(corrected.text) == 1
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"prompt": "the film", "answer": "a dull plot"}\n')
    command = ["correct", str(asked), "--aligner", f"{base}@{out}", "--objective", "kind=be kind"]
    assert cli.main([*command, "--max-new-tokens", "3", "--greedy"]) == 0
    assert json.loads(capsys.readouterr().out)["failed"] is None


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (2, "the stage warm-up is done; --resume goes on from there"),
        (3, "equal/checkpoint-1; --resume goes on"),
    ],
)
def test_a_run_that_is_resumed_ends_in_the_same_weights(
    base: str,
    tmp_path: Path,
    whole: Whole,
    step: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain, steps = SFTTrainer.training_step, []

    def interrupted(self: Any, *args: Any, **options: Any) -> Any:
        steps.append(self.state.global_step)
        if len(steps) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, *args, **options)

    given = settings(base, tmp_path)
    with monkeypatch.context() as m:
        m.setattr(SFTTrainer, "training_step", interrupted)
        assert train("metaaligner", tmp_path, given) == 130
    assert len(steps) == step
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert train("metaaligner", tmp_path, given, "--resume") == 0
    assert same(weights(tmp_path / "out"), weights(whole.out))


def test_a_run_that_was_killed_goes_on_with_the_stages_that_it_lacks(
    base: str, tmp_path: Path, whole: Whole, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(whole.out, tmp_path / "out")
    expected = weights(out)
    (out / "adapter_model.safetensors").unlink()
    shutil.rmtree(out / "better")
    (out / "equal" / stages.MARK).unlink()  # killed after its last checkpoint
    given = settings(base, tmp_path)
    assert train("metaaligner", tmp_path, given, "--resume", "--json") == 0
    told = capsys.readouterr()
    assert [f"stage {i} of 3" in told.err for i in (1, 2, 3)] == [False, True, True]
    assert json.loads(told.out)["train_loss/warm-up"] > 0
    assert same(weights(out), expected)
    # nothing is left to do
    assert train("metaaligner", tmp_path, given, "--resume") == 0
    assert "stage" not in capsys.readouterr().err
    assert same(weights(out), expected)
    # what was trained otherwise is no part of this run
    for key, x, message in (
        ("margins", 0, "the stage 'warm-up' in '{0}/warm-up' was trained with other rows; they"),
        ("seed", 3, "was trained with other seed 0, which is now 3; they must be the same"),
        ("stages", ["equal"], "other after ['warm-up'], which is now []"),
        (
            "arguments",
            {**given["arguments"], "learning_rate": 0.5, "logging_steps": 9},
            "was trained with other arguments.learning_rate 0.01, which is now 0.5;",
        ),
    ):
        shutil.copyfile(whole.out / "equal" / stages.MARK, out / "equal" / stages.MARK)
        assert train("metaaligner", tmp_path, {**given, key: x}, "--resume") == 2
        assert message.format(out) in capsys.readouterr().err
    assert train("metaaligner", tmp_path, given) == 2
    assert "which has the stage 'warm-up' of another run; --resume" in capsys.readouterr().err
    given["arguments"]["output_dir"] = str(out / "warm-up")
    assert train("metaaligner", tmp_path, given) == 2
    assert "which has checkpoint-2 of a run without stages; it must" in capsys.readouterr().err


def test_all_weights_in_a_stage_alone_and_in_two(base: str, tmp_path: Path) -> None:
    given = settings(base, tmp_path, stages=["equal"])
    del given["lora"]
    assert train("metaaligner", tmp_path, given) == 0
    assert [p.name for p in (tmp_path / "out").iterdir() if p.is_dir()] == ["equal"]
    one = weights(tmp_path / "out")
    given["stages"] = {"equal": None, "better": {"learning_rate": 1e-30, "num_train_epochs": 1}}
    assert train("metaaligner", tmp_path, given, "--resume") == 0
    two = weights(tmp_path / "out")
    assert one.keys() == two.keys()
    for name, x in one.items():  # the last stage's own rate leaves them as they were
        torch.testing.assert_close(two[name], x, rtol=0, atol=1e-12)
    assert not same(one, weights(Path(base)))


def test_each_stage_is_evaluated_on_its_rows(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = settings(base, tmp_path, validation=0.4, stages=["better"])
    given["arguments"] |= {"max_steps": -1, "num_train_epochs": 1}
    assert train("metaaligner", tmp_path, given) == 0
    told = capsys.readouterr().err
    assert told.count("eval_loss") == 1
    assert "better rows for validation" in told
    other = settings(base, tmp_path, eval_data=given["data"], stages=["better"])
    other["arguments"] |= {**given["arguments"], "output_dir": str(tmp_path / "other")}
    assert train("metaaligner", tmp_path, other) == 0
    told = capsys.readouterr().err
    assert told.count("eval_loss") == 1
    assert "the eval data: 7 pairs give" in told


ALONE = [{**PAIR, "preferences": {"kind": "worse"}}]


@pytest.mark.parametrize(
    ("more", "rows", "message"),
    [
        ({"stages": ["warmup"]}, ROWS, "stages has 'warmup'; known ones are warm-up, equal, bett"),
        ({"stages": ["equal", "equal"]}, ROWS, "stages has 'equal' twice; each must be there once"),
        ({"stages": []}, ROWS, "stages is empty; it must have one at least"),
        ({"stages": "equal"}, ROWS, "stages is 'equal'; it must be a list of names, or a mapping"),
        ({"stages": {"equal": 3}}, ROWS, "stages.equal is 3; it must be a mapping of arguments"),
        ({"stages": {"equal": {"seed": 3}}}, ROWS, "stages.equal has 'seed'; all stages must have"),
        (
            {"stages": {"equal": {"learning_rat": 3}}},
            ROWS,
            "stages.equal has the key 'learning_rat', which SFTConfig has not; did you mean 'learn",
        ),
        ({"objectives": ["knd"]}, ROWS, "objectives has 'knd'; known ones are harmlessness"),
        ({"objectives": None}, ROWS, "preferences of row 0 of pairs has 'kind', which is no obj"),
        ({"margins": {"knd": 1}}, ROWS, "margins['knd'] is of no objective; these are brief, kind"),
        ({"noun": " x"}, ROWS, "noun is ' x'; it must be a word without white space around it"),
        ({"validation": 2}, ROWS, "validation is 2; it must be a share within [0, 1)"),
        ({"validation": 0.1, "eval_data": "x.jsonl"}, ROWS, "and eval_data is given; it must be"),
        ({}, ALONE, "the stage 'warm-up' has no rows to train on (1 pairs give 0 warm-up, 0 equal"),
        (
            {"stages": ["better"], "validation": 1e-9},
            ALONE,
            "the stage 'better' has no rows to evaluate on (1 pairs give 0 warm-up, 0 equal, 1",
        ),
        ({}, [], "which has no rows"),
        ({}, [{"prompt": "q", "first": "a"}], "row 0 of pairs has no second; it must have first"),
    ],
)
def test_mistakes(
    base: str,
    tmp_path: Path,
    more: dict[str, Any],
    rows: list[Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train("metaaligner", tmp_path, settings(base, tmp_path, rows, **more)) == 2
    told = capsys.readouterr().err
    assert told.splitlines()[-1].startswith("crossfade train: error: ")
    assert message in told


def test_other_kinds_have_no_stages(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = settings(base, tmp_path, [{"prompt": "a", "completion": "b"}], stages=["equal"])
    del given["objectives"], given["margins"]
    assert train("sft", tmp_path, given) == 2
    assert "stages is given; it goes with metaaligner, not with sft" in capsys.readouterr().err


def test_nothing_is_resumed_without_a_checkpoint(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("metaaligner", tmp_path, settings(base, tmp_path), "--resume") == 2
    assert "--resume is given, but there is no checkpoint in" in capsys.readouterr().err
