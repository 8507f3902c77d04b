"""`Watch`, while our trainers and TRL's own train."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import tiny_models as tiny
import torch
import transformers
import trl
from crossfade import dynamics, training
from crossfade.dynamics import figures
from statements import pairs, statements
from test_readings import literally
from watched_runs import ANSWERS, OLD_NAMES, Recorder, arguments, rows_of_ids, trainer, weights

pytestmark = OLD_NAMES


class Literal(transformers.TrainerCallback):
    """Reads pairs by whole logits, after each step and before the first."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.found: dict[int, list[torch.Tensor]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        modes = [(module, module.training) for module in model.modules()]
        # a copy would not do: the forward that TRL gives a model is its own, and not its copy's
        self.found[state.global_step] = literally(model.eval(), self.rows)
        for module, mode in modes:
            module.training = mode

    on_step_end = on_train_begin


@pytest.mark.parametrize("trls", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"lora": {"lora_dropout": 0.5}},
        {"lora": {"modules_to_save": ["lm_head"]}},
        {"model": lambda: tiny.make("gpt2")},
    ],
    ids=["adapter", "adapter and head", "all weights"],
)
def test_figures_are_those_of_the_whole_logits(
    tmp_path: Path, trls: bool, options: dict[str, Any]
) -> None:
    """Of pairs as texts, which are encoded as trainers encode them."""
    rows, beta = pairs(each=6), 0.3
    watch = dynamics.Watch(rows, every=2)
    given = {k: x() if callable(x) else x for k, x in options.items()}
    if "model" in given:
        given["others"] = {"ref_model": tiny.make("gpt2")}
    literal = Literal([])
    made = trainer(
        tmp_path, watch, trls=trls, rows=rows, callbacks=[literal], beta=beta, max_steps=3, **given
    )
    literal.rows = [dict(row) for row in made.train_dataset]
    made.train()
    assert [row["step"] for row in watch.history] == [0, 2, 3]
    assert watch.record == dynamics.Watch.load(tmp_path)
    assert watch.seconds > 0
    assert (watch.record["beta"], watch.record["kind"]) == (beta, "pairs")
    assert watch.record["behaviours"] == {"film": 6, "plot": 6}
    for row in watch.history:
        for behaviour, got in row["behaviours"].items():
            own = torch.tensor([x["behaviour"] == behaviour for x in rows])
            now, start = (
                dynamics.Reading(*(x[own] for x in literal.found[step]))
                for step in (row["step"], 0)
            )
            want = {**figures.of(now, start, beta), "n": 6}
            assert got.keys() == want.keys()
            for name in got:
                assert got[name] == pytest.approx(want[name], rel=1e-4, abs=2e-5), name
    assert watch.history[0]["behaviours"]["film"]["loss"] == pytest.approx(math.log(2))
    assert abs(watch.history[-1]["behaviours"]["film"]["growth"]) > 0.05  # it was trained


def head_alone(shape: str = "llama") -> Any:
    model = tiny.make(shape).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    return model


def scaled() -> Any:
    """A model that divides its logits."""
    shape = {**tiny.SIZES, **tiny.HEADS, **tiny.LONG, **tiny.IDS}
    torch.manual_seed(0)
    model = transformers.GraniteForCausalLM(transformers.GraniteConfig(**shape, logits_scaling=2.5))
    torch.nn.init.normal_(model.lm_head.weight)
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    return model


@pytest.mark.parametrize(
    ("behaviours", "make"),
    [(["film"], head_alone), (["film", "plot"], head_alone), (["film", "plot"], scaled)],
)
def test_the_first_step_moves_the_head_as_the_theorem_says(
    tmp_path: Path, behaviours: list[str], make: Any
) -> None:
    """Also with labels out of balance, and with behaviours that pull on the same answers."""
    rows = statements(behaviours, each=5)
    if len(behaviours) > 1:
        rows = [r for i, r in enumerate(rows) if i not in (1, 5)]
    rate, beta, model = 0.2, 0.3, make()
    stats = dynamics.statistics(model, tiny.make_tokenizer(), rows)
    watch = dynamics.Watch(rows, every=1, **ANSWERS)
    made = trainer(
        tmp_path,
        watch,
        model=model,
        rows=dynamics.statement_pairs(rows, tiny.make_tokenizer(), **ANSWERS),
        others={"ref_model": make()},
        beta=beta,
        max_steps=1,
        per_device_train_batch_size=len(rows),
        optim="sgd",
        learning_rate=rate,
        lr_scheduler_type="constant",
        max_grad_norm=0,
    )
    made.train()
    assert (watch.record["kind"], watch.record["head"]) == ("statements", "trained")
    predicted = watch.record["predicted"]
    if len(behaviours) == 1:
        assert predicted["film"] == pytest.approx(stats["film"].gradient_norm(beta), rel=1e-6)
    for behaviour in behaviours:
        first, second = (row["behaviours"][behaviour] for row in watch.history)
        assert (first["head"], first["head_cosine"]) == (0, None)
        assert second["head"] == pytest.approx(rate * predicted[behaviour], rel=1e-4)
        if len(behaviours) == 1:
            assert second["head_cosine"] == pytest.approx(1, rel=1e-6)
        else:
            assert second["head_cosine"] < 0.9999


def test_nothing_is_predicted_of_soft_capped_logits(tmp_path: Path) -> None:
    config = copy.deepcopy(tiny.gemma3().config)
    config.final_logit_softcapping = 3.0
    model = transformers.Gemma3ForCausalLM(config)
    watch = dynamics.Watch(statements(), every=1, **ANSWERS)
    others = {"ref_model": copy.deepcopy(model)}
    rows = rows_of_ids()
    trainer(tmp_path, watch, model=model, others=others, rows=rows, max_steps=1).train()
    assert watch.record["head"] == "trained"
    assert watch.record["predicted"] is None
    assert watch.history[-1]["behaviours"]["film"]["head"] != 0


def test_it_reads_in_the_mixed_precision_of_the_training(tmp_path: Path) -> None:
    rows = rows_of_ids()
    watch = dynamics.Watch(rows, every=9)
    made = trainer(tmp_path, watch, lora={}, rows=rows, bf16=True, max_steps=1)
    own = [row for row in rows if row["behaviour"] == "film"]
    plain = dynamics.read_pairs(made.model, own).chosen.mean()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = dynamics.read_pairs(made.model, own).chosen.mean()
    made.train()
    got = watch.history[0]["behaviours"]["film"]["chosen"]
    assert got == pytest.approx(float(mixed), rel=1e-6)
    assert got != pytest.approx(float(plain), rel=1e-6)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize(
    ("name", "head"), [("tied", "tied"), ("frozen", "frozen"), ("copy", "trained")]
)
def test_it_says_what_the_head_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, head: str
) -> None:
    """An adapter may train a copy of the head, and so unties it."""
    config = copy.deepcopy(tiny.llama().config)
    config.tie_word_embeddings = name != "frozen"
    model = transformers.LlamaForCausalLM(config)
    lora = {"tied": None, "frozen": {}, "copy": {"modules_to_save": ["lm_head"]}}[name]
    watch = dynamics.Watch(statements(), every=1, **ANSWERS)
    made = trainer(tmp_path, watch, model=model, lora=lora, rows=rows_of_ids(), max_steps=1)
    made.train()
    assert watch.record["head"] == head
    figures_now = watch.history[-1]["behaviours"]["film"]
    if head == "trained":
        assert watch.record["notes"] == []
        assert figures_now["head"] != 0
    else:
        (note,) = watch.record["notes"]
        assert note.startswith(f"the head is {head}")
        assert note in caplog.text
        assert "head" not in figures_now
        assert watch.record["predicted"] is None


@pytest.mark.parametrize(
    "options",
    [
        {"lora": {"lora_dropout": 0.5}},
        {
            "lora": {"lora_dropout": 0.5},
            "trls": True,
            "gradient_checkpointing": True,
            "rows": pairs(),
        },
        {"lora": {"lora_dropout": 0.5}, "bf16": True},
        {"model": lambda: head_alone("llama")},
    ],
    ids=["dropout", "checkpointing", "bf16", "head"],
)
def test_weights_are_those_of_a_run_without_it(tmp_path: Path, options: dict[str, Any]) -> None:
    found = []
    for watch in (dynamics.Watch(statements(), every=1, **ANSWERS), None):
        given = {k: x() if k == "model" else x for k, x in options.items()}
        made = trainer(tmp_path / str(watch is None), watch, **{"rows": rows_of_ids(), **given})
        made.train()
        found.append((weights(made), [x for x in made.state.log_history if "loss" in x]))
    (first, logs), (second, plain) = found
    assert first.keys() == second.keys()
    assert all(torch.equal(x, second[name]) for name, x in first.items())
    assert logs == plain


@pytest.mark.parametrize("trls", [False, True])
def test_reporters_hear_of_the_figures(tmp_path: Path, trls: bool) -> None:
    """And of all that they hear of without it."""
    recorder = Recorder()
    watch = dynamics.Watch(pairs(), every=2)
    made = trainer(tmp_path, watch, trls=trls, callbacks=[recorder])
    made.train()
    heard = [x for x in recorder.heard if "watch/film/loss" in x]
    assert [x["step"] for x in heard] == [0, 2, 4]
    assert heard == [x for x in made.state.log_history if "watch/film/loss" in x]
    for logs, row in zip(heard, watch.history, strict=True):
        for behaviour, own in row["behaviours"].items():
            for name, x in own.items():
                assert logs[f"watch/{behaviour}/{name}"] == x
    losses = [x for x in recorder.heard if "loss" in x]
    assert [x["step"] for x in losses] == [1, 2, 3, 4]
    assert all("rewards/margins" in x for x in losses)
    assert not any("rewards/margins" in x for x in heard)


def test_a_trainer_that_it_has_not_been_told_of(tmp_path: Path) -> None:
    """Then figures are in the history of its state, and a warning says so if it has reporters."""
    watch = dynamics.Watch(pairs(), every=4)
    made = trainer(tmp_path, trls=True, callbacks=[watch])
    made.args.report_to = ["tensorboard"]
    with pytest.warns(UserWarning, match="reporters do not hear .*attach"):
        made.train()
    steps = [x["step"] for x in made.state.log_history if "watch/film/loss" in x]
    assert steps == [0, 4]


@pytest.mark.parametrize("kind", ["kto", "sft"])
def test_trainers_of_other_losses(tmp_path: Path, kind: str) -> None:
    made, config = {
        "kto": (training.KTOTrainer, trl.KTOConfig),
        "sft": (training.SFTTrainer, trl.SFTConfig),
    }[kind]
    rows = [{"prompt": r["prompt"], "completion": r["chosen"], "label": True} for r in pairs()]
    if kind == "kto":
        rows += [{**r, "completion": x["rejected"], "label": False} for r, x in zip(rows, pairs())]  # noqa: B905
    watch = dynamics.Watch(pairs(), every=2)
    model, reference = tiny.make(), {"ref_model": tiny.make()} if kind == "kto" else {}
    options = {"beta": 0.2} if kind == "kto" else {}
    made(
        model,
        args=arguments(tmp_path, config, **options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny.make_tokenizer(),
        callbacks=[watch],
        **reference,
    ).train()
    assert watch.record["beta"] == (0.2 if kind == "kto" else 0.1)
    first, *_, last = (row["behaviours"]["film"] for row in watch.history)
    assert last["chosen"] > first["chosen"]


def test_the_beta_of_a_loss_of_ours(tmp_path: Path) -> None:
    watch = dynamics.Watch(pairs(), every=4)
    others = {"loss": "sigmoid", "loss_options": {"beta": 0.7}}
    trainer(tmp_path / "a", watch, lora={}, others=others, max_steps=1).train()
    assert watch.record["beta"] == 0.7
    given = dynamics.Watch(pairs(), every=4, beta=0.4)
    trainer(tmp_path / "b", given, lora={}, others=others, max_steps=1).train()
    assert given.record["beta"] == 0.4
    assert given.history[-1]["behaviours"]["film"]["loss"] != pytest.approx(
        watch.history[-1]["behaviours"]["film"]["loss"], rel=1e-6
    )


# ---- runs that stop, and go on


def test_a_resumed_run_goes_on_with_its_history(tmp_path: Path) -> None:
    """What was seen after the checkpoint is measured again; step 0 is that of the first run."""
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "rows": rows_of_ids()}
    made, watch = [], []
    for _ in range(2):
        watch.append(dynamics.Watch(statements(), every=2, **ANSWERS))
        made.append(trainer(tmp_path, watch[-1], model=head_alone(), **options))
    made[0].train()
    file = tmp_path / "watch.json"
    whole = json.loads(file.read_text())
    torn = copy.deepcopy(whole)
    for row in torn["history"][2:]:
        row["behaviours"]["film"]["loss"] = 99.0
    for step in (2, 4):
        said = {"step": step, "kind": "starved", "behaviour": "plot", "text": "a starves b"}
        torn["warnings"].append(said)
    file.write_text(json.dumps(torn))
    made[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    got = json.loads(file.read_text())
    assert [row["step"] for row in got["history"]] == [0, 2, 4, 6]
    assert got["seconds"] > whole["seconds"]
    assert got["warnings"] == torn["warnings"][:1]
    assert {**got, "seconds": 0, "warnings": []} == {**whole, "seconds": 0}
    assert watch[1].history == got["history"]


def test_a_resumed_run_with_other_rows_or_no_history(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "lora": {}}
    trainer(tmp_path, dynamics.Watch(pairs(), every=2), **options).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    other = trainer(tmp_path, dynamics.Watch(pairs(each=4)), **options)
    with pytest.raises(ValueError, match=r"rows are not those that .*watch.safetensors is of"):
        other.train(resume_from_checkpoint=checkpoint)
    (tmp_path / "watch.safetensors").unlink()
    watch = dynamics.Watch(pairs(), every=2)
    again = trainer(tmp_path, watch, **options)
    with pytest.warns(UserWarning, match="history before this step cannot be had"):
        again.train(resume_from_checkpoint=checkpoint)
    assert [row["step"] for row in watch.history] == [2, 4]
    assert watch.history[0]["behaviours"]["film"]["accuracy"] == 0.5


class StopAt(transformers.TrainerCallback):
    def __init__(self, step: int, event: str) -> None:
        self.step = step
        setattr(self, event, self.stop)

    def stop(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("event", ["on_step_end", "on_epoch_end"])
def test_a_run_that_is_stopped_is_measured_at_its_end(tmp_path: Path, event: str) -> None:
    watch = dynamics.Watch(pairs(), every=5)
    made = trainer(tmp_path, watch, lora={}, max_steps=20)
    made.add_callback(StopAt(3, event))  # after the watch
    made.train()
    assert made.state.global_step < 20
    assert [row["step"] for row in watch.history] == [0, made.state.global_step]


def test_another_process_measures_nothing(tmp_path: Path) -> None:
    watch = dynamics.Watch(pairs())
    state = transformers.TrainerState(is_world_process_zero=False)
    args, control = arguments(tmp_path), transformers.TrainerControl()
    for event in (watch.on_train_begin, watch.on_step_end, watch.on_train_end):
        event(args, state, control, model=tiny.make(), processing_class=tiny.make_tokenizer())
    assert (watch.history, watch.record, watch.seconds) == ([], None, 0)
    assert not [*tmp_path.iterdir()]


# ---- rows and arguments


def messages(warned: Any) -> list[str]:
    return [str(w.message) for w in warned if w.category is UserWarning]


def test_rows_that_cannot_be_watched_are_left_out(tmp_path: Path) -> None:
    good = pairs()
    tokenizer = tiny.make_tokenizer()
    ids = {"behaviour": "film", "prompt_ids": [9], "chosen_ids": [8], "rejected_ids": [9]}
    texts = [
        *good,
        {**good[0], "behaviour": None},
        {**good[0], "chosen": " great" * 600},
    ]
    watch = dynamics.Watch(texts, every=4, tokenizer=tokenizer)
    with pytest.warns(UserWarning, match="left out") as warned:
        trainer(tmp_path / "a", watch, lora={}, max_steps=1).train()
    assert messages(warned) == [
        "row 10 of rows is without a 'behaviour'; it is left out",
        "row 11 of rows is with more tokens than the model's context, 512; it is left out",
    ]
    assert watch.record["behaviours"] == {"film": 5, "plot": 5}
    rows = [ids, {**ids, "prompt_ids": []}, {**ids, "rejected_ids": []}]
    watch = dynamics.Watch(rows, every=4)
    with pytest.warns(UserWarning, match="left out") as warned:
        trainer(tmp_path / "b", watch, lora={}, max_steps=1).train()
    assert messages(warned) == [
        "row 1 of rows is without a token before its responses; it is left out",
        "row 2 of rows is with a response of no tokens; it is left out",
    ]
    assert watch.record["behaviours"] == {"film": 1}
    assert watch.history[-1]["behaviours"]["film"]["growth_error"] is None


def test_figures_that_are_not_finite(tmp_path: Path) -> None:
    """At step 0 the row is left out; later means are of the others, and a warning says so."""
    model = tiny.make()
    with torch.no_grad():
        model.model.embed_tokens.weight[50] = math.nan  # of w31
    bad = {**pairs()[0], "prompt": "the w31"}
    watch = dynamics.Watch([*pairs(), bad], every=1)

    class Break(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            with torch.no_grad():
                model.get_input_embeddings().weight[42] = math.nan  # of w23, in one prompt

    rows = [
        r | {"prompt": f"{r['prompt']} w23" if i == 0 else r["prompt"]}
        for i, r in enumerate(pairs())
    ]
    watch = dynamics.Watch([*rows, bad], every=1)
    vocabulary = tiny.make_tokenizer().get_vocab()
    assert (vocabulary["w31"], vocabulary["w23"]) == (50, 42)
    made = trainer(tmp_path, watch, model=model, lora={}, callbacks=[Break()], max_steps=1)
    with pytest.warns(UserWarning, match="finite") as warned:
        made.train()
    assert messages(warned) == [
        "row 10 of rows is with a log-prob that is not finite; it is left out",
        "step 1: 1 of 5 pairs of 'film' have figures that are not finite; means are of the others",
    ]
    assert watch.record["behaviours"] == {"film": 5, "plot": 5}
    film = watch.history[-1]["behaviours"]["film"]
    assert film["n"] == 4
    assert math.isfinite(film["loss"])
    assert [x["kind"] for x in watch.warnings] == ["not finite"]
    with torch.no_grad():
        made.model.get_input_embeddings().weight.fill_(math.nan)
    found, _ = watch._watched.measure(made.model, 0.1, None)
    assert found["film"] == {**dict.fromkeys(figures.NAMES), "n": 0}
    json.loads((tmp_path / "watch.json").read_text(), parse_constant=pytest.fail)


def test_warnings_are_given_once_and_kept(tmp_path: Path) -> None:
    """Two behaviours that want other answers to the same statements; one of them is trained."""
    film = statements(["film"], each=8)
    flipped = [{**r, "behaviour": "plot", "label": not r["label"]} for r in film]
    watch = dynamics.Watch([*film, *flipped], every=1, **ANSWERS)
    rows = dynamics.statement_pairs(film, tiny.make_tokenizer(), **ANSWERS)
    made = trainer(tmp_path, watch, rows=rows, max_steps=8, learning_rate=2e-2)
    with pytest.warns(UserWarning, match="step .: 'film' starves 'plot'") as warned:
        made.train()
    starved = [x for x in watch.warnings if x["kind"] == "starved"]
    assert [x["behaviour"] for x in starved] == ["plot"]
    assert len([w for w in warned if "starves" in str(w.message)]) == 1
    assert dynamics.Watch.load(tmp_path / "watch.json")["warnings"] == watch.warnings


def test_two_watches_of_one_trainer(tmp_path: Path) -> None:
    one, other = dynamics.Watch(pairs(), every=4), dynamics.Watch(pairs(), every=2, name="seen")
    recorder = Recorder()
    made = trainer(tmp_path, one, lora={}, callbacks=[recorder, other])
    made.train()
    assert {p.name for p in tmp_path.glob("*.json")} >= {"watch.json", "seen.json"}
    assert any("seen/film/loss" in x for x in recorder.heard)
    assert dynamics.Watch.load(tmp_path / "seen.json")["every"] == 2


def test_mistakes_are_named(tmp_path: Path) -> None:
    for options, error, says in (
        ({"every": 0}, ValueError, "every is 0"),
        ({"every": "epoch"}, TypeError, "every is 'epoch'"),
        ({"every": True}, TypeError, "every is True"),
        ({"beta": -1}, ValueError, "beta is -1; it must be above 0"),
        ({"max_batch": 0}, ValueError, "max_batch is 0"),
        ({"name": "a/b"}, ValueError, "name is 'a/b'; it must be an identifier"),
        ({"rows": []}, ValueError, "rows is empty"),
        ({"rows": "rows.jsonl"}, TypeError, "rows is a str; it must be a list"),
        ({"rows": None}, TypeError, "rows is a NoneType"),
        ({"evry": 3}, TypeError, "unknown argument 'evry'; did you mean 'every'"),
    ):
        with pytest.raises(error, match=says):
            dynamics.Watch(**{"rows": pairs(), **options})
    with pytest.raises(TypeError, match="trainer is a SimpleNamespace"):
        dynamics.Watch(pairs()).attach(SimpleNamespace())
    for rows, says in (
        ([{**pairs()[0], "chosen": None}], "chosen of row 0 of rows is None"),
        ([statements()[0], pairs()[0]], "row 1 of rows is a pair"),
    ):
        watch = dynamics.Watch(rows, **ANSWERS)
        with pytest.raises(ValueError, match=says):
            trainer(tmp_path, watch, lora={}).train()
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match="no row left"),
    ):
        trainer(tmp_path, dynamics.Watch([{"text": "the", "label": True}]), lora={}).train()
    with pytest.raises(FileNotFoundError, match="there is no file"):
        dynamics.Watch.load(tmp_path / "none.json")
    for text, says in (("[]", "has no 'every'"), ("{", "not JSON")):
        (tmp_path / "watch.json").write_text(text)
        with pytest.raises(ValueError, match=says):
            dynamics.Watch.load(tmp_path)
