"""Tasks of the evaluation harness over local data, and models that its command line names."""

from __future__ import annotations

import json
import logging
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason='it needs "crossfade[lm-eval]"')

import crossfade as cf
import lm_eval
from crossfade.integrations.lm_eval import CrossfadeLM
from harness import hflm, model_of
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from tokenizer_kinds import tokenizer_of

DOCUMENTS = [
    {"question": "Was the film bright?", "answer": "It was a very bright one.", "label": 0},
    {"question": "Who is walking?", "answer": "A cast of dull players.", "label": 1},
    {"question": "The end of the plot?", "answer": "hello world, the end.", "label": 0},
    {"question": "Is it fine?", "answer": "It's fine; don't worry.", "label": 1},
]
TASKS: dict[str, dict[str, Any]] = {
    "multiple_choice": {
        "doc_to_text": "{{question}} Yes or no?",
        "doc_to_choice": ["yes", "no", "talking and singing"],
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "loglikelihood_rolling": {
        "doc_to_text": "",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "generate_until": {
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    },
}
TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|answer|>\n{% endif %}"
)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A task of each kind, as arguments of `simple_evaluate`."""
    # It asks other programs what the machine is, which takes seconds.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(d) + "\n" for d in DOCUMENTS))
    files = {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")}
    common = {"dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
    common |= {"fewshot_split": "test", "fewshot_config": {"sampler": "first_n"}}
    given = [{"task": kind, "output_type": kind, **common, **own} for kind, own in TASKS.items()]
    return {
        "tasks": given,
        "task_manager": TaskManager(include_defaults=False),
        "bootstrap_iters": 0,
    }


def check_answers(found: Any, expected: Any) -> None:
    """That the model answered alike to every request, but for rounding."""
    a, b = found["samples"], expected["samples"]
    assert a.keys() == b.keys() == TASKS.keys()
    for task in TASKS:
        for x, y in zip(flat(a[task]), flat(b[task]), strict=True):
            assert x == (pytest.approx(y, abs=1e-4) if isinstance(y, float) else y)


def flat(x: Any) -> list[Any]:
    """The numbers and texts of answers, in the order of the documents."""
    if isinstance(x, list) and x and isinstance(x[0], dict):
        return [n for y in sorted(x, key=lambda y: y["doc_id"]) for n in flat(y["resps"])]
    return [n for y in x for n in flat(y)] if isinstance(x, (list, tuple)) else [x]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_fewshot": 2},
        {"num_fewshot": 1, "apply_chat_template": True, "system_instruction": "Be kind."},
        {"num_fewshot": 2, "apply_chat_template": True, "fewshot_as_multiturn": False},
    ],
)
def test_results_are_those_of_hflm(
    options: dict[str, Any], tasks: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_of("bytes")
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    theirs = hflm("bytes", batch_size=4)
    own = CrossfadeLM(cf.Model(model_of("bytes"), tokenizer=tokenizer))
    expected, found = (
        lm_eval.simple_evaluate(model=lm, **tasks, **options) for lm in (theirs, own)
    )
    assert found["config"]["blend"] == str(own.blend)
    for task in TASKS:
        a, b = (x["results"][task] for x in (found, expected))
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert value == (pytest.approx(b[name]) if isinstance(value, float) else b[name])
    check_answers(found, expected)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two saved models."""
    found = {}
    for seed, name in enumerate(("base", "tuned")):
        folder = tmp_path_factory.mktemp(name)
        model_of("bytes", seed).save_pretrained(folder)
        tokenizer_of("bytes").save_pretrained(folder)
        found[name] = str(folder)
    return found


def test_the_harness_makes_a_blend_of_model_args(
    folders: dict[str, str], tasks: dict[str, Any]
) -> None:
    names = {**folders, "blend": "base + 0.5 * (tuned - base)", "device": "cpu", "max_length": 99}
    text = ",".join(f"{name}={value}" for name, value in names.items())
    base, tuned = (
        cf.Model(model_of("bytes", seed), tokenizer=tokenizer_of("bytes")) for seed in (0, 1)
    )
    direct = CrossfadeLM(base + 0.5 * (tuned - base), max_length=99)
    expected = lm_eval.simple_evaluate(model=direct, **tasks)
    for given in (names, text):
        found = lm_eval.simple_evaluate(model="crossfade", model_args=given, batch_size=2, **tasks)
        check_answers(found, expected)
        assert found["config"]["blend"] == "0.5*base + 0.5*tuned"


def test_one_model_needs_no_formula(folders: dict[str, str]) -> None:
    """Its name may be the one that the harness's own models have for it."""
    lm = get_model("crossfade").create_from_arg_obj(
        {"pretrained": folders["base"], "dtype": "bfloat16", "max_gen_toks": 5},
        {"batch_size": "auto:4", "max_batch_size": 7, "device": "cpu"},
    )
    assert isinstance(lm, CrossfadeLM)
    assert (str(lm.blend), lm.max_gen_toks, lm.max_batch) == ("pretrained", 5, 7)
    assert lm.get_model_info()["model_dtype"] == "torch.bfloat16"


def test_numbers_are_faders(folders: dict[str, str]) -> None:
    args = {**folders, "blend": "base + w * (tuned - base)", "w": 0.25}
    lm = CrossfadeLM.create_from_arg_obj(args)
    assert lm.blend.weights == pytest.approx((0.75, 0.25))


def test_a_saved_blend(folders: dict[str, str], tmp_path: Path) -> None:
    args = {**folders, "blend": "base + 0.5 * (tuned - base)"}
    blend = CrossfadeLM.create_from_arg_obj(args).blend
    blend.save(tmp_path / "blend.json")
    lm = CrossfadeLM.create_from_arg_obj({"blend": str(tmp_path / "blend.json")})
    assert str(lm.blend) == str(blend)


def test_dtypes_are_checked(folders: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"dtype is 'bf16'; .* did you mean 'bfloat16'"):
        CrossfadeLM.create_from_arg_obj({"a": folders["base"], "dtype": "bf16"})


def test_system_prompts_by_name(folders: dict[str, str]) -> None:
    args = {"a": folders["base"], "b": folders["base"], "blend": "a + 0.5 * b"}
    lm = CrossfadeLM.create_from_arg_obj({**args, "system": {"b": "Be kind."}})
    assert [t.system for t in lm.blend.terms] == [None, "Be kind."]
    assert lm.blend.terms[0].model is lm.blend.terms[1].model


@pytest.mark.parametrize(
    ("args", "error", "match"),
    [
        ({}, ValueError, "model_args has no model; they must have NAME=PATH"),
        ({"max_lenght": 5}, TypeError, "max_lenght=5; .* did you mean 'max_length'"),
        ({"a": "x", "b": "y"}, ValueError, "with 2 models it must be a formula"),
        ({"a": "x", "system": "Be kind."}, TypeError, "system is 'Be kind.'; it must be a map"),
        ({"a": "x", "blend": "a + b"}, ValueError, "b"),
    ],
)
def test_bad_model_args(args: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        CrossfadeLM.create_from_arg_obj(args)


def test_models_go_to_the_cpu_where_there_is_no_gpu(
    folders: dict[str, str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness asks for cuda:0 where nothing is said."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(logging.getLogger("lm_eval"), "propagate", True)
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    lm = CrossfadeLM.create_from_arg_obj({"a": folders["base"]}, {"device": "cuda:0"})
    assert lm.device.type == "cpu"
    assert "no GPU for device cuda:0" in caplog.text


def test_the_command_line_is_the_harness_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: asked.append(sys.argv[1:]))
    monkeypatch.setattr(sys, "argv", ["lm_eval", "--model", "crossfade"])
    runpy.run_module("crossfade.integrations.lm_eval", run_name="__main__")
    assert asked == [["--model", "crossfade"]]
    assert get_model("crossfade") is CrossfadeLM
