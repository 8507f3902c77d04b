"""Training data that people write is right, or an error names the row and the key."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import tiny_models as tiny
import trl
import yaml
from crossfade import cli
from crossfade.training import DPOTrainer, config, pairs, rows, values
from crossfade.training.value.rollouts import Rollouts
from hypothesis import given, settings
from hypothesis import strategies as st
from trained_models import make, texts
from trainer_runs import KINDS, OLD_NAMES, arguments

pytestmark = OLD_NAMES

SMALL = {"max_steps": 1, "per_device_train_batch_size": 2}
CHAT = [{"role": "user", "content": "a"}]
ANSWER = [{"role": "assistant", "content": "b"}]
DPO = {"prompt": "a", "chosen": "b", "rejected": "c"}
DPO_IDS = {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}
VALUE = {"prompt_ids": [5], "completion_ids": [6], "reward": 1.0, "finished": True}


def trainer(kind: str, folder: Path, data: Any, **options: Any) -> Any:
    given: dict[str, Any] = {} if kind == "sft" else {"ref_model": make()}
    for name in ("eval_dataset", "formatting_func"):
        if name in options:
            given[name] = options.pop(name)
    return KINDS[kind][0](
        make(),
        args=arguments(kind, folder, **{**SMALL, **options}),
        train_dataset=data,
        processing_class=tiny.make_tokenizer(),
        **given,
    )


# ---- Files -------------------------------------------------------------------------------------


BAD: dict[str, tuple[str, Any, str]] = {
    "id beyond the vocabulary": ("dpo", {**DPO_IDS, "chosen_ids": [6, 61]}, "chosen_ids of row 1"),
    "negative id": ("dpo", {**DPO_IDS, "prompt_ids": [-1]}, "prompt_ids of row 2"),
    "id that is a float": ("dpo", {**DPO_IDS, "rejected_ids": [1.5]}, "rejected_ids of row 2"),
    "id that is a bool": ("dpo", {**DPO_IDS, "rejected_ids": [True]}, "rejected_ids of row 2"),
    "id of 2**63": ("dpo", {**DPO_IDS, "chosen_ids": [1 << 63]}, "has id 9223372036854775808"),
    "ids that are a text": ("dpo", {**DPO_IDS, "chosen_ids": "67"}, "chosen_ids of row 2"),
    "ids in ids": ("dpo", {**DPO_IDS, "chosen_ids": [[6]]}, "chosen_ids of row 2"),
    "no ids": ("dpo", {**DPO_IDS, "chosen_ids": []}, "chosen_ids of row 2"),
    "null ids": ("dpo", {**DPO_IDS, "chosen_ids": None}, "chosen_ids of row 2"),
    "null text": ("dpo", {**DPO, "chosen": None}, "chosen of row 2"),
    "text that is a number": ("dpo", {**DPO, "rejected": 3}, "rejected of row 2"),
    "half of a surrogate pair": ("dpo", {**DPO, "prompt": "\ud83d"}, "line 2: "),
    "chat in one key": ("dpo", {**DPO, "prompt": CHAT}, "prompt of row 2"),
    "empty chat": ("dpo", {**DPO, "chosen": []}, "chosen of row 2"),
    "message that is a text": ("dpo", {**DPO, "chosen": ["b"]}, "message 0 in chosen of row 2"),
    "message without a role": (
        "dpo",
        {**DPO, "chosen": [{"content": "b"}]},
        "message 0 in chosen of row 2",
    ),
    "message with a number": (
        "dpo",
        {**DPO, "chosen": [{"role": "assistant", "content": 1}]},
        "message 0 in chosen of row 2",
    ),
    "empty prompt": ("dpo", {**DPO, "prompt": ""}, "prompt of row 1 of the train dataset is empty"),
    "other types beside": ("dpo", {**DPO, "note": "x"}, "note of row 2"),
    "null completion": ("sft", {"prompt": "a", "completion": None}, "completion of row 2"),
    "text of SFT": ("sft", {"text": 5}, "text of row 2"),
    "messages of SFT": ("sft", {"messages": CHAT[0]}, "messages of row 2"),
    "mask of SFT": ("sft", {"input_ids": [5, 6], "completion_mask": [1]}, "completion_mask of row"),
    "reward that is null": ("value", {**VALUE, "reward": None}, "no reward"),
    "reward that is NaN": ("value", {**VALUE, "reward": float("nan")}, "reward of row 1"),
    "reward beyond floats": ("value", {**VALUE, "reward": 10**400}, "reward of row 1"),
    "id of a rollout": ("value", {**VALUE, "completion_ids": [1 << 70]}, "completion_ids of row 1"),
    "deep row": ("dpo", {**DPO, "note": 0}, "line 2 is nested more than 100 levels"),
}
GOOD: list[dict[str, Any]] = [
    DPO_IDS,
    DPO,
    {**DPO, "note": 1},
    {"prompt": "a", "completion": "b"},
    {"text": "a b"},
    {"messages": CHAT + ANSWER},
    {"input_ids": [5, 6], "completion_mask": [0, 1]},
    VALUE,
]


@pytest.mark.parametrize("name", BAD)
def test_fault_in_a_file_is_named(base: str, tmp_path: Path, name: str, capsys: Any) -> None:
    kind, bad, message = BAD[name]
    good = next(row for row in GOOD if row.keys() == bad.keys())
    lines = [json.dumps(good), json.dumps(bad)]
    if name == "deep row":
        lines[1] = lines[1].replace('"note": 0', '"note": ' + "[" * 10**5)
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(lines))
    given = {"output_dir": str(tmp_path / "out"), "max_steps": 1}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"model": base, "data": str(data), "arguments": given}))
    assert cli.main(["train", kind, "--config", str(file)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("crossfade train: error: ")
    assert message in told


# ---- Datasets ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["dataset", "stream"])
@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("dpo", {**DPO_IDS, "chosen_ids": [61]}, r"chosen_ids of row 3 .* has id 61; .* \[0, 61\)"),
        ("sft", {"prompt_ids": [5], "completion_ids": [-100]}, "completion_ids of row 3"),
        ("sft", {"input_ids": [5, 99], "labels": [-100, 5]}, "input_ids of row 3"),
        ("sft", {"input_ids": [5, 6], "labels": [-100, -5]}, "labels of row 3"),
        ("kto", {"prompt_ids": [5], "completion_ids": [], "label": True}, "completion_ids of row"),
        ("kto", {"prompt": "a", "completion": "b", "label": None}, "label of row 3"),
    ],
    ids=str,
)
def test_fault_in_a_data_set_is_named(
    tmp_path: Path, kind: str, row: dict[str, Any], message: str, stream: bool
) -> None:
    plain = {"label": True, "input_ids": [5, 6], "labels": [-100, 6]}
    good = {k: plain.get(k, "w1" if isinstance(x, str) else [6]) for k, x in row.items()}

    def made() -> Any:
        yield from [good] * 3
        yield row

    data = (datasets.IterableDataset if stream else datasets.Dataset).from_generator(made)
    with pytest.raises((ValueError, TypeError), match=message):
        trainer(kind, tmp_path, data, per_device_train_batch_size=4).train()


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([DPO], TypeError, "the train dataset is a list; it must be a datasets.Dataset"),
        (datasets.Dataset.from_list([]), ValueError, "the train dataset has no rows"),
    ],
    ids=["list", "empty"],
)
def test_what_is_no_data_set(tmp_path: Path, data: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        trainer("dpo", tmp_path, data)


def test_data_sets_to_evaluate_on(tmp_path: Path) -> None:
    good, bad = (datasets.Dataset.from_list([x] * 2) for x in (DPO, {**DPO, "chosen": None}))
    for data, name in ((bad, "the eval dataset"), ({"a": good, "b": bad}, "the b dataset")):
        with pytest.raises(ValueError, match=f"chosen of row 0 of {name} is None"):
            trainer("dpo", tmp_path, good, eval_dataset=data)
    made = trainer("dpo", tmp_path, good, eval_dataset=good)
    with pytest.raises(ValueError, match="chosen of row 0 of the eval dataset is None"):
        made.evaluate(bad)


def test_chat_that_the_template_refuses(tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'tool' %}"
        "{{ raise_exception('no tools here') }}{% endif %}{{ m['content'] }} {% endfor %}"
    )
    good = {"prompt": CHAT, "chosen": ANSWER, "rejected": ANSWER}
    bad = {**good, "rejected": [{"role": "tool", "content": "b"}]}
    data = datasets.Dataset.from_list([good, good, bad])
    with pytest.raises(ValueError, match="row 2 of the train dataset: no tools here"):
        DPOTrainer(
            make(), make(), arguments("dpo", tmp_path), None, data, processing_class=tokenizer
        )


def test_tokenizer_with_more_ids_than_the_model(tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens(["<more>"])
    data = datasets.Dataset.from_list([{**DPO, "chosen": "b <more>"}] * 2)
    with pytest.raises(ValueError, match="chosen_ids of the train dataset has id 61 once its"):
        DPOTrainer(
            make(), make(), arguments("dpo", tmp_path), None, data, processing_class=tokenizer
        )


@pytest.mark.parametrize("kind", KINDS)
def test_empty_responses_are_their_end(tmp_path: Path, kind: str) -> None:
    """An empty response is EOS alone: the model learns to end at once."""
    given = [{k: "" if k != "prompt" else x for k, x in row.items()} for row in texts(kind, 4)]
    for row, plain in zip(given, texts(kind, 4), strict=True):
        row |= {"label": plain["label"]} if kind == "kto" else {}
    made = trainer(kind, tmp_path, datasets.Dataset.from_list(given))
    made.train()
    assert made.state.global_step == 1


def test_rows_of_ones_own_format(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([{"q": "w1", "a": "w2"}] * 2)
    made = trainer("sft", tmp_path, data, formatting_func=lambda row: f"{row['q']} {row['a']}")
    made.train()


# ---- Builders ----------------------------------------------------------------------------------

RESPONSE = {"text": "b", "ids": [6], "finished": True, "rewards": {"r": 1.0}}
ROLLOUT = {"prompt": "a", "prompt_ids": [5], "responses": [RESPONSE] * 2}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, "row 1 of rows is None"),
        ({}, "prompt of row 1 of rows is missing"),
        ({**ROLLOUT, "responses": None}, "responses of row 1 of rows is None"),
        ({**ROLLOUT, "responses": [None]}, r"responses\[0\] of row 1 of rows is None"),
        ({**ROLLOUT, "responses": [{}]}, r"text of responses\[0\] of row 1 of rows is missing"),
        (
            {**ROLLOUT, "responses": [RESPONSE, {**RESPONSE, "rewards": {"r": float("nan")}}]},
            r"reward 'r' of responses\[1\] of row 1 of rows is nan",
        ),
        (
            {**ROLLOUT, "responses": [{**RESPONSE, "rewards": {"r": None}}]},
            r"reward 'r' of responses\[0\] of row 1 of rows is None",
        ),
        ({**ROLLOUT, "responses": [{**RESPONSE, "rewards": {}}]}, "must be one of"),
    ],
)
@pytest.mark.parametrize("build", [pairs, values])
def test_fault_in_rollouts_is_named(build: Any, bad: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        build([ROLLOUT, bad], "r")


# ---- Anything at all ---------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([1 << 63, -(1 << 63), 10**400]),
    st.floats(),
    st.text(max_size=4),
    st.sampled_from(["\ud83d", "role", "user", "content", ""]),
)
JSON = st.recursive(
    SCALARS,
    lambda x: st.one_of(
        st.lists(x, max_size=3),
        st.dictionaries(st.sampled_from(["role", "content", "from", "r", "x"]), x, max_size=3),
    ),
    max_leaves=6,
)
IDS = st.one_of(st.lists(st.integers(0, 60), min_size=1, max_size=4), JSON)


def rows_of(*keys: str) -> Any:
    """Rows that have most of these keys, with values that are often right."""
    found = {k: IDS if k.endswith("ids") else st.one_of(st.text(max_size=3), JSON) for k in keys}
    return st.one_of(
        st.fixed_dictionaries(found, optional={"extra": JSON}),
        st.dictionaries(st.sampled_from(keys), JSON),
    )


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["sft", "dpo", "kto"]),
    st.lists(
        st.one_of(
            rows_of("prompt_ids", "chosen_ids", "rejected_ids"),
            rows_of("prompt", "chosen", "rejected", "margins"),
            rows_of("prompt", "completion", "label", "tools"),
            rows_of("input_ids", "completion_mask", "labels"),
            rows_of("messages", "text"),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_any_rows_of_a_file(kind: str, found: list[dict[str, Any]]) -> None:
    """Rows that are accepted make a dataset, whose rows are accepted as well."""
    checked = False
    with contextlib.suppress(ValueError, TypeError):
        rows.check_rows(kind, found, "rows")
        checked = True
    if not checked:
        return
    made = datasets.Dataset.from_list(found)
    if made.column_names and rows.keys_of(kind, found[0]).keys() <= set(found[0]):
        rows.checked(made, kind, "rows", rows.LONGEST, "text", True)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            rows_of("prompt_ids", "completion_ids", "reward", "finished"),
            rows_of("prompt", "completion", "reward", "finished"),
        ),
        max_size=2,
    )
)
def test_any_rollouts(found: list[Any]) -> None:
    with contextlib.suppress(ValueError, TypeError):
        read = Rollouts(found, tiny.make_tokenizer(), 61, "score", "rows")
        assert all(0 <= i < 61 for row in read.rows for i in (*row.prompt, *row.completion))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(JSON, rows_of("prompt", "prompt_ids", "responses")), max_size=2))
def test_any_rows_to_build_from(found: list[Any]) -> None:
    for build in (pairs, values):
        with contextlib.suppress(ValueError, TypeError):
            build(found, "r")


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["model", "data", "arguments", "lora", "seed", "dtype", "loss", "value"]),
        st.one_of(
            JSON,
            st.dictionaries(
                st.sampled_from(
                    ["output_dir", "r", "learning_rate", "save_steps", "metric_for_best_model"]
                ),
                JSON,
            ),
        ),
    )
)
def test_any_settings(tmp_path_factory: pytest.TempPathFactory, found: dict[str, Any]) -> None:
    folder = tmp_path_factory.getbasetemp()
    file = folder / "any.yaml"
    if isinstance(found.get("data"), str):
        found["data"] = str(folder / "any.jsonl")
        Path(found["data"]).touch()
    file.write_text(json.dumps(found))  # YAML reads JSON
    with contextlib.suppress(ValueError, TypeError, FileNotFoundError):
        read = config.read("dpo", file)
        config.lora_config(read)
        config.trainer_config(trl.DPOConfig, read)


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", "x"), ("learning_rate", float("nan")), ("max_steps", True), ("optim", 3)],
)
def test_types_of_arguments(tmp_path: Path, name: str, value: Any) -> None:
    given = config.Settings("dpo", "m", "d", {"output_dir": str(tmp_path), name: value})
    with pytest.raises(TypeError, match=rf"arguments.{name} is .*; it must be of type"):
        config.trainer_config(trl.DPOConfig, given)
