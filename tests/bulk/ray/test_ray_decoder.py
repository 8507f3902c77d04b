"""The class that Ray runs, without Ray: batches of columns in, the same with results out."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import crossfade as cf
import numpy as np
import pyarrow as pa
import pytest
from crossfade.bulk.ray import Decoder, spec
from crossfade.bulk.ray.decoder import LineDecoder
from crossfade.policies.self_judge import Judge
from ray_runs import FORMULA, one_process, options, prompts, write
from tiny_models import make, make_tokenizer


def told(paths: dict[str, str], **more: Any) -> dict[str, Any]:
    models = [f"{name}={path}" for name, path in paths.items()]
    given = {"model": models, "blend": FORMULA, "fader": ["w=0.8"]}
    return spec(**{**given, "generation": {"max_new_tokens": 12}, **more})


def column(x: list[Any]) -> Any:
    found = np.empty(len(x), dtype=object)
    found[:] = x
    return found


def called(decoder: Decoder, *batches: Any) -> list[Any]:
    async def all_of_them() -> list[Any]:
        return list(await asyncio.gather(*map(decoder, batches)))

    return asyncio.run(all_of_them())


def batches_of(items: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    names = ("prompt", "weights", "temperature", "max_new_tokens")
    return [
        {
            "id": np.arange(i, min(i + size, len(items))),
            **{name: column([x.get(name) for x in items[i : i + size]]) for name in names},
        }
        for i in range(0, len(items), size)
    ]


@pytest.mark.parametrize("size", [1, 5, 40])
def test_results_are_those_of_one_process_however_rows_are_cut(
    paths: dict[str, str], tmp_path: Path, size: int
) -> None:
    items = prompts(40)
    lines = one_process(write(tmp_path / "p.jsonl", items), paths)
    whole = [json.loads(line) for line in lines.values()]
    decoder = Decoder(**told(paths))
    found = called(decoder, *batches_of(items, size)[::-1])
    by_id = {
        int(i): {name: batch[name][at] for name in batch}
        for batch in found
        for at, i in enumerate(batch["id"])
    }
    for line in whole:
        row = by_id[line["index"]]
        assert row["error"] is None
        for name in ("text", "tokens", "finished", "failed", "blend", "run"):
            assert row[name] == line[name]
        assert row["logprob"] == pytest.approx(line["logprob"], abs=1e-4)


def test_a_later_batch_ends_while_an_earlier_one_is_decoded(paths: dict[str, str]) -> None:
    decoder = Decoder(**told(paths, generation={"eos_token_id": 60, "max_new_tokens": 400}))
    ended = []

    async def call(name: str, limit: int) -> None:
        batch = {"id": np.arange(2), "prompt": column(["a film", "the plot"])}
        await decoder({**batch, "max_new_tokens": np.array([limit, 2])})
        ended.append(name)

    async def both() -> None:
        await asyncio.gather(call("long", 400), call("short", 3))

    asyncio.run(both())
    assert ended == ["short", "long"]


def test_a_bad_row_has_an_error_and_the_others_their_texts(paths: dict[str, str]) -> None:
    decoder = Decoder(**told(paths))
    items = {
        "id": column(["a", "b", "c", "d", "e"]),
        "prompt": column(["a film", "", "the plot", "a " * 600, "dull"]),
        "weights": column([None, None, {"v": 1.0}, None, None]),
        "temperature": column([None, None, None, None, -1.0]),
        "other": np.arange(5),
    }
    with pytest.warns(RuntimeWarning, match="context"):
        (found,) = called(decoder, items)
    said = ["", "is empty", "weights has 'v'", "its prompt has", "temperature is -1"]
    assert found["error"][0] is None
    assert found["text"][0]
    for why, error in zip(said[1:], found["error"][1:], strict=True):
        assert why in error
    assert list(found["text"][[1, 2, 4]]) == [None] * 3
    assert list(found["other"]) == [0, 1, 2, 3, 4]


def test_errors_have_the_names_of_rows_and_of_their_keys(paths: dict[str, str]) -> None:
    items = [
        {"prompt": [1, 2, 99]},
        {"prompt": "a", "weights": {"v": 1}},
        {"prompt": "a", "stop": ["xyz"]},  # no token of the tiny tokenizer has these letters
        {"prompt": "a", "stop": [""]},
        {"messages": [{"role": "user"}]},
    ]
    given = LineDecoder(**told(paths))
    lines = column([*map(json.dumps, items), "{", None])
    why = column([None] * 6 + ["is not UTF-8"])
    (found,) = called(given, {"index": np.arange(7), "line": lines, "error": why})
    says = ["has id 99 for base", "weights has 'v'", "stop=['xyz']", "stop has ''", "message 0"]
    for i, (says_it, error) in enumerate(
        zip([*says, "JSON", "UTF-8"], found["error"], strict=True)
    ):
        assert error.startswith(f"prompt {i}")
        assert says_it in error
        assert "row 0" not in error


def test_a_batch_is_a_mapping_or_a_table(paths: dict[str, str]) -> None:
    with pytest.raises(TypeError, match="the batch is a list; it must be a mapping"):
        called(Decoder(**told(paths)), [{"id": 0, "prompt": "a"}])


def test_tables_of_pyarrow_get_columns(paths: dict[str, str]) -> None:
    decoder = Decoder(**told(paths, id="key"))
    table = pa.table({"key": ["x", "y"], "prompt": ["a film", "the plot"]})
    (found,) = called(decoder, table)
    assert found.column_names[:2] == ["key", "prompt"]
    assert found["tokens"].type == pa.int64()
    (again,) = called(decoder, {name: column(x) for name, x in table.to_pydict().items()})
    assert found["text"].to_pylist() == list(again["text"])


def test_types_of_tables_do_not_depend_on_what_their_rows_have(paths: dict[str, str]) -> None:
    """Ray cannot write parquet of blocks whose columns have other types."""
    decoder = Decoder(**told(paths))
    tables = [pa.table({"id": [i], "prompt": [x]}) for i, x in enumerate(["a film", ""])]
    good, bad = called(decoder, *tables)
    for name in ("text", "tokens", "logprob", "finished", "failed", "blend", "run", "error"):
        assert good.schema.field(name) == bad.schema.field(name)


def test_frames_of_pandas_get_columns(paths: dict[str, str]) -> None:
    pandas = pytest.importorskip("pandas")
    decoder = Decoder(**told(paths))
    frame = pandas.DataFrame({"id": [0, 1], "prompt": ["a film", None], "seed": [3, None]})
    (found,) = called(decoder, frame)
    (table,) = called(decoder, pa.table({"id": [0], "prompt": ["a film"], "seed": [3]}))
    assert found["text"][0] == table["text"][0].as_py()
    assert 'must have a "prompt"' in found["error"][1]


def test_a_column_with_nulls_is_one_of_floats_in_numpy(paths: dict[str, str]) -> None:
    """So are the ids and settings of a batch where one of them is null, and not of another."""
    decoder = Decoder(**told(paths))
    names = ("seed", "top_k", "max_new_tokens")
    prompt = column(["a film", "the plot"])
    rows = {name: np.array([3.0, np.nan]) for name in names}
    (found,) = called(decoder, {"id": np.arange(2), "prompt": prompt, **rows})
    assert list(found["error"]) == [None, None]
    table = {"id": [0, 1], "prompt": list(prompt), **{name: [3, None] for name in names}}
    (exact,) = called(decoder, pa.table(table))
    assert list(found["text"]) == exact["text"].to_pylist()
    drawn = {"prompt": prompt[:1], "temperature": np.array([1.0])}
    ints, floats = called(
        decoder,
        {"id": np.array([7]), **drawn},
        {"id": np.array([7.0, np.nan]), **{n: np.repeat(x, 2) for n, x in drawn.items()}},
    )
    assert ints["text"][0] == floats["text"][0]
    assert "the id is None; it must be an int or a text" in floats["error"][1]


def test_columns_may_have_any_name_that_results_do_not(paths: dict[str, str]) -> None:
    batch = {"id": np.arange(1), "prompt": column(["a"])}
    more = {"index": np.arange(1), "line": column(["a line"])}
    (found,) = called(Decoder(**told(paths)), {**batch, **more})
    assert list(found["error"]) == [None]
    assert list(found["line"]) == ["a line"]


def test_a_dataset_must_have_ids_and_room_for_results(paths: dict[str, str]) -> None:
    decoder = Decoder(**told(paths))
    with pytest.raises(ValueError, match="no column 'id'"):
        called(decoder, {"prompt": column(["a"])})
    with pytest.raises(ValueError, match=r"no column 'prompt' or 'messages' .columns: id, text"):
        called(decoder, {"id": np.arange(1), "text": column(["a"])})
    batch = {"id": np.arange(1), "prompt": column(["a"])}
    with pytest.raises(ValueError, match=r"has the column 'text'.*rename it"):
        called(decoder, {**batch, "text": column(["x"])})


# ---- The other tasks ----------------------------------------------------------------------------


def term(name: str, seed: int) -> cf.Model:
    return cf.Model(make("llama", seed), tokenizer=make_tokenizer(), name=name)


def test_scores_are_those_of_the_library(paths: dict[str, str]) -> None:
    texts, responses = ["a film", "the plot was"], ["very dull", "great"]
    batch = {"id": np.arange(3), "prompt": column([*texts, "a"])}
    batch["response"] = column([*responses, None])
    (found,) = called(Decoder(**told(paths, task="score", generation={}, chat=False)), batch)
    base, tuned = term("base", 0), term("tuned", 1)
    whole = cf.score(base + 0.8 * (tuned - base), texts, responses)
    assert list(found["logprob"][:2]) == pytest.approx(whole.totals.tolist(), abs=1e-4)
    assert list(found["tokens"][:2]) == whole.lengths.tolist()
    assert 'has the "response" None' in found["error"][2]


def test_values_are_those_of_the_library(paths: dict[str, str]) -> None:
    texts, responses = ["a film", "the plot was"], ["very dull", "great"]
    batch = {"id": np.arange(2), "prompt": column(texts), "response": column(responses)}
    asked = told(paths, task="value", value="tuned - base", generation={}, chat=False)
    (found,) = called(Decoder(**asked), batch)
    ended = [f"{text} <eos>" for text in responses]
    each = [cf.score(term(n, i), texts, ended).totals for i, n in enumerate(("base", "tuned"))]
    assert list(found["value"]) == pytest.approx((each[1] - each[0]).tolist(), abs=1e-3)


def test_corrections_are_those_of_the_library(paths: dict[str, str]) -> None:
    from crossfade.bulk.records import seed_of
    from crossfade.policies.metaaligner import MetaAligner, correct

    models = {"model": [f"base={paths['base']}"], "blend": "base", "fader": []}
    asked = told(paths, **models, task="correct", objectives=["brevity"], rounds=2)
    asked = {**asked, "generation": {"max_new_tokens": 4, "do_sample": True}}
    queries, answers = ["a film", "the plot"], ["very dull", "great"]
    batch = {"id": np.arange(3), "prompt": column([*queries, "a"])}
    (found,) = called(Decoder(**asked), {**batch, "answer": column([*answers, ""])})
    whole = correct(
        MetaAligner(term("base", 0)),
        queries,
        answers,
        "brevity",
        rounds=2,
        seed=[seed_of(0, i) for i in range(2)],
        **asked["generation"],
    )
    assert list(found["text"][:2]) == whole.text
    assert list(found["edit_distance"][:2]) == whole.edit_distance.tolist()
    assert "has the \"answer\" ''" in found["error"][2]


def test_judgments_are_those_of_the_library(paths: dict[str, str], tmp_path: Path) -> None:
    from crossfade.policies.self_judge import JudgeTemplate

    template = tmp_path / "template.json"
    template.write_text('{"labels": ["great", "awful"]}')
    models = {"model": [f"base={paths['base']}"], "blend": "base", "fader": []}
    asked = told(paths, **models, task="judge", template=str(template), generation={})
    queries, first, second = ["a film", "the plot"], ["very dull", "great"], ["bright", "great"]
    batch = {"id": np.arange(3), "prompt": column([*queries, "a"])}
    batch |= {"first": column([*first, "x"]), "second": column([*second, None])}
    (found,) = called(Decoder(**asked), batch)
    judge = Judge(
        make("llama", 0), make_tokenizer(), template=JudgeTemplate(labels=("great", "awful"))
    )
    whole = judge(queries, first, second)
    assert list(found["preference"][:2]) == pytest.approx(whole.preference.tolist(), abs=1e-5)
    assert list(found["winner"][:2]) == [
        {"a": "first", "b": "second", "tie": "tie"}[w] for w in whole.winners
    ]
    assert 'has no "second"' in found["error"][2]
    bad = pa.table({"id": [0], "prompt": ["a"], "first": ["x"], "second": [""]})
    (found,) = called(Decoder(**asked), bad)
    assert found["failed"].type == pa.string()


# ---- What a spec may be -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"tasc": "generate"}, "spec has the unknown field 'tasc'.*task"),
        ({"task": "generat"}, "task is 'generat'.*did you mean"),
        ({"generation": {"top_k": np.int64(3)}}, "spec is no plain data"),
        ({"model": "base=x"}, "model is 'base=x'; it must be a list of texts"),
        ({"model": ["base=none", "tuned=none"]}, "there is no folder 'none'"),
        ({"model": ["base=.", "tuned=."]}, "'.' has no config.json"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"reward": ["len:count"]}, "functions=True must allow"),
        ({"task": "correct"}, "objectives is empty"),
        ({"task": "value"}, "value is None"),
        ({"blend": "base + v * (tuned - bas)", "task": "judge"}, "unknown name"),
    ],
)
def test_a_spec_says_what_is_wrong_with_it(
    paths: dict[str, str], more: dict[str, Any], says: str
) -> None:
    with pytest.raises((TypeError, ValueError, OSError), match=says):
        told(paths, **more)


def test_paths_of_a_spec_hold_wherever_an_actor_works(
    paths: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(paths["base"]).parent)
    found = spec(model=["a=base", "b=tuned"], blend="a + b")
    assert found["model"] == [f"a={paths['base']}", f"b={paths['tuned']}"]


def test_what_is_gone_on_with_must_be_of_the_same_run(paths: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"the run is .*, and that of the results is other"):
        Decoder(**told(paths), expects="other")


def test_tasks_that_read_and_write_load_no_models() -> None:
    code = "import sys, crossfade.bulk.ray.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


# ---- Options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["a prompt"], "--ray is given without --prompts"),
        (["--prompts", "-", "--output", "x"], "--ray is given without --prompts"),
        (["--prompts", "p.jsonl"], "--ray is given without --output"),
        (["--prompts", "p.jsonl", "--output", "x", "--stream"], "--ray and --stream"),
        (
            ["--prompts=p.jsonl", "--output=x", "--reward=len:f", "--best-of=2"],
            "--ray-functions must allow",
        ),
        (["--prompts", "none.jsonl", "--output", "x"], "is no file and no folder"),
    ],
)
def test_options_that_ray_refuses(
    paths: dict[str, str],
    more: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cf.cli.main(["generate", "--ray", "2", *options(paths), *more]) == 2
    assert says in capsys.readouterr().err


def test_ray_functions_needs_ray(paths: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cf.cli.main(["generate", "a", "--ray-functions", *options(paths)]) == 2
    assert "--ray-functions is given without --ray" in capsys.readouterr().err
