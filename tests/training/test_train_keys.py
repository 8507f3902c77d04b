"""What ``crossfade train KIND --help`` says of keys, defaults and data is so, and so are hints."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from crossfade import cli, reading
from crossfade.policies.metaaligner import metaaligner_rows
from crossfade.training import DPOTrainer, config, keys, rows
from crossfade.training.trainers.dpo import PAIR_LOSSES
from crossfade.training.value.rollouts import Rollouts
from tokenizer_kinds import tokenizer_of
from trainer_runs import OLD_NAMES

pytestmark = OLD_NAMES
KINDS = list(keys.KINDS)
NOT_SAID = {"target_modules": "by model"}


def stated(default: str) -> Any:
    return None if default == "none" else reading.parse_yaml(default, "a default")


def defaults(made: Any) -> dict[str, Any]:
    return {
        f.name: f.default if f.default is not dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(made)
        if (f.default, f.default_factory) != (dataclasses.MISSING,) * 2
    }


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_of_arguments(kind: str) -> None:
    found = defaults(config.config_of(kind))
    for name, (default, _) in keys.KINDS[kind].arguments.items():
        if name != "output_dir":
            assert found[name] in (stated(default), default), name  # "none" may be a text


def test_other_defaults() -> None:
    found = defaults(config.lora_class())
    for name, (default, _) in keys.LORA.items():
        if name not in NOT_SAID:
            assert stated(default) == found[name], name
    found = defaults(config.Settings)
    for name in ("dtype", "eval_data", "lora", "seed"):
        assert stated(keys.SETTINGS[name][0]) == found[name]
    own = {name for kind in keys.KINDS.values() for name in kind.own}
    assert {*keys.SETTINGS, *own} | {"kind"} == {
        f.name for f in dataclasses.fields(config.Settings)
    }


def test_losses() -> None:
    assert set(keys.LOSSES) == set(PAIR_LOSSES)
    for name, (_, options) in keys.LOSSES.items():
        parameters = inspect.signature(PAIR_LOSSES[name]).parameters.values()
        assert options == ", ".join(
            p.name if p.default is p.empty else f"{p.name}={p.default}"
            for p in parameters
            if p.name not in ("pairs", "margins")
        )


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_examples(kind: str, tmp_path: Path) -> None:
    """Each row is accepted, and the file of settings can be read."""
    for text in keys.KINDS[kind].rows:
        row = json.loads(text.replace("...", '"content": "a"'))
        if kind == "jsft":
            assert "prompt" in row  # test_train_judge.py trains on rows of each form
        elif kind == "metaaligner":
            assert metaaligner_rows([row], tokenizer_of("bytes"))
        elif kind == "value":
            ids = "prompt_ids" in row
            if ids:
                assert len(Rollouts([row], None, 1 << 20, "drop", "rows")) == 1
        else:
            what = "prompts" if kind in ("self-judge", "clp") else kind
            rows.check_rows(what, [row, row], "rows")
            assert rows.keys_of(what, row).keys() <= row.keys()
    data, file = tmp_path / "rows.jsonl", tmp_path / "train.yaml"
    data.touch()
    known = keys.KINDS[kind]
    file.write_text(f"model: {known.model}\ndata: {data}\nlora: {{r: 8}}\n{known.example}\n")
    read = config.read(kind, file)
    config.lora_config(read)
    config.value_options(read)
    output = config.trainer_config(config.config_of(kind), read).output_dir
    assert output == {"value": "head", "jsft": "judge"}.get(kind, "tuned")
    # a model that judges itself is the one that the example of jsft makes
    assert read.model == {"self-judge": "smollm2@judge"}.get(kind, "smollm2")


@pytest.mark.parametrize("kind", KINDS)
def test_help_shows_all_keys(
    kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", kind, "--help"])
    told = capsys.readouterr().out
    for name in (*keys.SETTINGS, *keys.KINDS[kind].own, *keys.KINDS[kind].arguments, *keys.LORA):
        assert f"\n  {name} " in told
    rows = [f"  {row}" for row in keys.KINDS[kind].rows]
    assert set(rows) <= set(told.splitlines())
    assert all(len(line) <= 80 for line in told.splitlines() if line not in rows)
    assert ("\n  simpo " in told) == (kind in ("dpo", "self-judge"))
    assert ("\n  rank " in told) == (kind == "value")


@pytest.mark.parametrize(
    ("kind", "what", "said"),
    [
        ("dpo", "arguments", "sync_ref_model "),
        ("sft", "arguments", "assistant_only_loss "),
        ("kto", "arguments", "undesirable_weight "),
        ("value", "arguments", "objective "),
        ("value", "lora", "layers_to_transform "),
        ("dpo", "loss", "nca_pair "),
    ],
)
def test_lists(kind: str, what: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", kind, "--list", what])
    assert f"\n  {said}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "arguments are required: KIND"),
        (["dop"], "'dop' is none of sft, dpo, kto, value, jsft, self-judge, metaaligner, clp;"),
        (["dpo"], "usage: crossfade train dpo"),
        (["dpo", "--config", "x.yaml", "--resum=1"], "usage: crossfade train dpo"),
        (["dpo", "--config", "x.yaml", "--stet", "a=1"], "no option --stet; did you mean '--set'?"),
        (["dpo"], "arguments are required: --config"),
        (["kto", "--config", "x.yaml", "--list", "loss"], "--list"),
    ],
)
def test_wrong_options(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", *argv])
    assert said in capsys.readouterr().err


def write(folder: Path, text: str) -> str:
    (folder / "rows.jsonl").touch()
    file = folder / "train.yaml"
    file.write_text(text.replace("ROWS", str(folder / "rows.jsonl")))
    return str(file)


HEAD = "model: m\ndata: ROWS\n"


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("dpo", "", "train.yaml is empty; it must have the keys model, data and arguments"),
        ("dpo", "- a", "train.yaml has a list at its top; it must have the keys"),
        ("dpo", "model: m", "train.yaml has no key 'data'; it must have the keys"),
        (
            "dpo",
            "model: m\n\tdata: x",
            "train.yaml is not YAML: found character '\\t' that cannot start any token "
            "(line 2, column 1: 'data: x')",
        ),
        (
            "dpo",
            HEAD + "seed: 1\nseed: 2",
            "is not YAML: the key 'seed' is there twice (line 4, column 1: 'seed: 2')",
        ),
        ("dpo", "modle: m", "the key 'modle'; known ones are model, data, arguments, dtype, eval_"),
        ("dpo", "modle: m", "loss, loss_options; did you mean 'model'?"),
        ("sft", "modle: m", "lora, seed; did you mean 'model'?"),
        ("dpo", "learning_rate: 1e-4", "did you mean arguments.learning_rate?"),
        ("value", "objective: fudge", "did you mean arguments.objective?"),
        ("value", "rank: 4", "did you mean value.rank?"),
        ("dpo", "rank: 4", "did you mean lora.r?"),
        ("dpo", "lr: 1e-4", "did you mean arguments.learning_rate?"),
        ("dpo", "dataset: x", "did you mean 'data'?"),
        ("dpo", HEAD.replace("ROWS", "no.jsonl") + "arguments: {output_dir: o}", "data is 'no.jso"),
        (
            "sft",
            HEAD + "loss: simpo\narguments: {output_dir: o}",
            "loss is given; it goes with dpo and self-judge, not with sft",
        ),
        (
            "kto",
            HEAD + "loss: simpo\narguments: {output_dir: o}",
            "it goes with dpo and self-judge, not with kto",
        ),
    ],
)
def test_mistakes_in_a_file(
    tmp_path: Path, kind: str, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", kind, "--config", write(tmp_path, text)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("crossfade train: error: ")
    assert message in told


@pytest.mark.parametrize(
    ("kind", "key", "given", "message"),
    [
        ("dpo", "arguments", {"learning_rat": 1}, "; did you mean 'learning_rate'?"),
        ("dpo", "arguments", {"lr": 1}, "; did you mean 'learning_rate'?"),
        ("sft", "arguments", {"batch_size": 1}, "; did you mean 'per_device_train_batch_size'?"),
        ("dpo", "arguments", {"target_modules": []}, "; did you mean lora.target_modules?"),
        ("dpo", "arguments", {"loss": "ipo"}, "; did you mean loss, beside arguments?"),
        ("dpo", "lora", {"rank": 2}, "; did you mean 'r'?"),
        ("dpo", "lora", {"target_module": 2}, "; did you mean 'target_modules'?"),
        ("dpo", "lora", {"beta": 2}, "; did you mean arguments.beta?"),
        ("value", "value", {"knd": "q"}, "known ones are kind, rank; did you mean 'kind'?"),
        ("value", "value", {"r": 2}, "known ones are kind, rank; did you mean lora.r?"),
    ],
)
def test_keys_under_other_keys(kind: str, key: str, given: Any, message: str) -> None:
    arguments = {"output_dir": "o", **(given if key == "arguments" else {})}
    others = {} if key == "arguments" else {key: given}
    read = config.Settings(kind, "m", "d", arguments, **others)
    check = {
        "arguments": lambda: config.trainer_config(config.config_of(kind), read),
        "lora": lambda: config.lora_config(read),
        "value": lambda: config.value_options(read),
    }[key]
    with pytest.raises(ValueError, match="has the key") as caught:
        check()
    assert str(caught.value).endswith(message)


def test_files_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Relative paths begin where the command runs; one that is meant from the file is seen."""
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for argument, message in (
        ("no.yaml", "--config is 'no.yaml'; there is no such file"),
        ("runs", "--config is 'runs', a folder; it must be a YAML file"),
    ):
        assert cli.main(["train", "dpo", "--config", argument]) == 2
        assert message in capsys.readouterr().err
    file = write(tmp_path / "runs", "model: m\ndata: rows.jsonl\narguments: {output_dir: o}")
    assert cli.main(["train", "dpo", "--config", str(Path(file).relative_to(tmp_path))]) == 2
    assert (
        "; did you mean 'runs/rows.jsonl', which is beside train.yaml?" in capsys.readouterr().err
    )
    monkeypatch.chdir(tmp_path / "runs")
    assert config.read("dpo", Path("train.yaml")).data == "rows.jsonl"


def test_losses_by_file(tmp_path: Path) -> None:
    """Names of losses and of their options get a hint too."""
    with pytest.raises(ValueError, match=r"loss is 'simp'; .*; did you mean 'simpo'\?"):
        DPOTrainer(None, loss="simp")
    with pytest.raises(ValueError, match=r"the key 'betta'; .*; did you mean 'beta'\?"):
        DPOTrainer(None, loss="simpo", loss_options={"betta": 1.0})
