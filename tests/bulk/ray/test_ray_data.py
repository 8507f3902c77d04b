"""Prompts through Ray: one process's bytes, nothing lost and nothing twice, whatever is killed."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from crossfade import cli
from crossfade.bulk.prompts import read_lines
from crossfade.bulk.ray import Decoder, run, spec
from crossfade.bulk.ray import driver as ray_driver
from crossfade.bulk.ray.files import Part, files_of, mend, parts_of, read, table_of
from ray_runs import FORMULA, actors, one_process, options, prompts, results, write

# Ray sets and copies settings of its own that it will change.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def kill_an_actor(folder: Path, killed: list[int], done: threading.Event) -> None:
    """Kill one actor as soon as a new part is there, and say how many are noted by then."""
    before = set((folder / "parts").glob("*"))
    while not done.wait(0.02):
        found = actors()
        if found and set((folder / "parts").glob("*")) - before:
            killed.append(len(list((folder / "checkpoint").glob("*"))))
            os.kill(found[0], signal.SIGKILL)
            return


def same(found: dict[int, str], whole: dict[int, str], but: Collection[int] = ()) -> None:
    """All lines are there, and those of one process: but for the last digits of log-probs, which
    depend on the prompts that are read together."""
    assert found.keys() == whole.keys() | set(but)
    each = [(json.loads(found[i]), json.loads(whole[i])) for i in whole]
    for one, other in each:
        assert one.pop("logprob") == pytest.approx(other.pop("logprob"), abs=1e-4)
    assert [json.dumps(one) for one, _ in each] == [json.dumps(other) for _, other in each]


def note(output: Path, name: str, lines: dict[int, str], *, cut: bool = False) -> None:
    """A part as a driver that was killed leaves it: whole and noted, or cut and not yet noted."""
    text = "".join(f"{line}\n" for line in lines.values())
    part = output / "parts" / f"{name}.jsonl"
    checkpoint = output / "checkpoint" / f"{name}{'.pending' if cut else ''}.parquet"
    for file in (part, checkpoint):
        file.parent.mkdir(exist_ok=True)
    part.write_text(text[:-40] if cut else text)
    pq.write_table(pa.table({"index": list(lines)}), checkpoint)


def test_a_run_whose_driver_was_killed_goes_on(
    cluster: Any,
    paths: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    items, folder = prompts(60), tmp_path / "prompts"
    folder.mkdir()
    whole = one_process(write(tmp_path / "whole.jsonl", items), paths)
    write(folder / "1.jsonl", items[:20])
    bad = [{"prompt": ""}, {"prompt": "a", "colour": "red"}]
    file = write(folder / "2.jsonl", [*items[20:], *bad])
    file.write_text(file.read_text() + "{not JSON\n")
    output = tmp_path / "out"
    asked = ["generate", "--ray", "2", "--prompts", str(folder), "--output", str(output)]
    asked += options(paths)
    with monkeypatch.context() as patch:  # A driver that ends before it has begun.
        patch.setattr(ray_driver, "_work", lambda *_: sys.exit(9))
        with pytest.raises(SystemExit):
            cli.main(asked)
    note(output, "killed_0", {i: whole[i] for i in range(5, 15)})
    note(output, "killed_1", {i: whole[i] for i in range(18, 28)}, cut=True)
    kept = (output / "parts" / "killed_0.jsonl").stat().st_mtime_ns
    assert cli.main(asked) == 2
    assert "exists; resume it" in capsys.readouterr().err
    assert cli.main([*asked, "--resume", "--seed=1"]) == 2
    assert "other settings (seed)" in capsys.readouterr().err

    assert cli.main([*asked, "--resume"]) == 0, capsys.readouterr().err
    said = capsys.readouterr().err
    assert "53 prompts (3 with an error, 10 more were in the folder)" in said
    assert (output / "parts" / "killed_0.jsonl").stat().st_mtime_ns == kept
    found = results(output)
    same(found, whole, {60, 61, 62})
    for i, says in ((60, "is empty"), (61, "unknown key 'colour'"), (62, "not JSON")):
        assert says in json.loads(found[i])["error"]


def _fail(*_: Any) -> None:
    raise RuntimeError("no cluster")


def test_a_folder_must_be_gone_on_with_as_it_was_begun(
    paths: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is refused before a cluster is started."""
    file = write(tmp_path / "p.jsonl", prompts(3))
    given = spec(model=[f"base={paths['base']}"], blend="base")
    other = tmp_path / "other"
    other.mkdir()
    (other / "x").touch()
    with pytest.raises(FileExistsError, match="has files of others"):
        run(given, file, other, resume=True)
    begun = tmp_path / "begun"
    begun.mkdir()
    before = {"spec": given, "prompts": [], "format": "jsonl"}
    (begun / "run.json").write_text(json.dumps(before))
    with pytest.raises(ValueError, match=r"other settings \(prompts\)"):
        run(given, file, begun, resume=True)
    for text, says in (("{bad", "not JSON"), ("[]", "it must be what a run has written there")):
        (begun / "run.json").write_text(text)
        with pytest.raises(ValueError, match=rf"run.json.* {says}"):
            run(given, file, begun, resume=True)
    with pytest.raises(NotADirectoryError, match="a file; it must be a folder"):
        run(given, file, file)
    monkeypatch.setattr(ray_driver, "_work", _fail)
    with pytest.raises(RuntimeError, match="no cluster"):
        run(given, file, tmp_path / "failed")
    assert not any((tmp_path / "failed").iterdir())  # It can be begun again.
    folder = tmp_path / "prompts"
    folder.mkdir()
    write(folder / "p.jsonl", prompts(1))
    for output in (folder, folder / "new"):
        with pytest.raises(ValueError, match=r"which is in the folder of prompts"):
            run(given, folder, output)
    (tmp_path / "none.jsonl").touch()
    with pytest.raises(ValueError, match="there are no prompts"):
        run(given, tmp_path / "none.jsonl", tmp_path / "new")
    with pytest.raises(ValueError, match=r"must be a folder, or a file named \*.jsonl"):
        files_of(write(tmp_path / "p.csv", []))


def test_a_checkpoint_notes_what_parts_have(tmp_path: Path) -> None:
    lines = {i: json.dumps({"index": i, "text": "a\u2028"}, ensure_ascii=False) for i in range(14)}
    parts, checkpoint = tmp_path / "parts", tmp_path / "checkpoint"
    names = ("whole", "gone", "cut", "garbage", "unnoted", "misnoted")
    for i, name in enumerate(names):
        note(tmp_path, name, {2 * i: lines[2 * i], 2 * i + 1: lines[2 * i + 1]})
    note(tmp_path, "pending", {12: lines[12], 13: lines[13]}, cut=True)
    (parts / "gone.jsonl").unlink()
    (parts / "cut.jsonl").write_text((parts / "cut.jsonl").read_text()[:-9])
    (parts / "garbage.jsonl").write_text("{garbage\n")
    (checkpoint / "unnoted.parquet").unlink()
    (checkpoint / "misnoted.parquet").write_bytes(b"garbage")
    mend(parts, checkpoint)
    kept = ["misnoted", "unnoted", "whole"]
    assert sorted(x.stem for x in parts.glob("*")) == sorted([*kept, "pending"])
    assert sorted(x.stem for x in checkpoint.glob("*")) == sorted([*kept, "pending.pending"])
    noted = [i for name in kept for i in pq.read_table(checkpoint / f"{name}.parquet")["index"]]
    assert [i.as_py() for i in noted] == [10, 11, 8, 9, 0, 1]
    shutil.rmtree(checkpoint)
    (parts / "pending.jsonl").unlink()
    mend(parts, checkpoint)
    assert sorted(x.stem for x in checkpoint.glob("*")) == kept


# ---- Files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_parts_have_every_prompt_of_all_files_once(tmp_path: Path, size: int) -> None:
    items = [{"prompt": f"p{i}", "weights": {"w": 1.0} if i % 2 else None} for i in range(7)]
    (tmp_path / "a.txt").write_bytes(b"one\n\n  \ntwo\r\nthree \xff\nfour")
    pq.write_table(pa.Table.from_pylist(items), tmp_path / "b.parquet", row_group_size=3)
    write(tmp_path / "c.jsonl", [{"prompt": "x\u2028y"}, {"prompt": "z"}])
    for name in (".d.md", "_SUCCESS"):
        (tmp_path / name).touch()
    parts, sources = parts_of(files_of(tmp_path), size)
    assert max(part.count for part in parts) <= size
    assert [s.prompts for s in sources] == [4, 7, 2]
    table = pa.concat_tables([read(part) for part in parts])
    assert table["index"].to_pylist() == list(range(13))
    found = [text and json.loads(text) for text in table["line"].to_pylist()]
    assert found[:4] == ["one", "two\r", None, "four"]
    assert found[4:11] == [{k: x for k, x in item.items() if x is not None} for item in items]
    assert found[11:] == [{"prompt": "x\u2028y"}, {"prompt": "z"}]


def test_why_a_prompt_is_none_stands_beside_it(tmp_path: Path) -> None:
    day = datetime.date(2020, 1, 2)
    table = pa.table(
        {
            "prompt": ["a", "b", "c"],
            "temperature": [float("nan"), 1.0, 1.0],
            "metadata": [None, None, {"day": day}],
        }
    )
    pq.write_table(table, tmp_path / "p.parquet", row_group_size=2)
    found = read(Part(str(tmp_path / "p.parquet"), 5, 3, 0, 3))
    assert found["index"].to_pylist() == [5, 6, 7]
    assert found["line"].to_pylist() == [None, '{"prompt": "b", "temperature": 1.0}', None]
    first, none, last = found["error"].to_pylist()
    assert none is None
    for name, row, said in (("temperature", 0, first), ("metadata", 2, last)):
        assert f"is row {row} of 'p.parquet', whose column '{name}' has" in said
    (tmp_path / "p.txt").write_bytes(b"one\n\xff")
    found = read(Part(str(tmp_path / "p.txt"), 0, 2, 0, 5))
    assert found["error"].to_pylist() == [None, "is not UTF-8"]


def test_a_folder_of_prompts_has_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", prompts(1))
    (tmp_path / "q.csv").touch()
    with pytest.raises(ValueError, match=r"has 'q.csv', which is no .jsonl, .parquet, .txt file"):
        files_of(tmp_path)
    (tmp_path / "q.csv").unlink()
    (tmp_path / "more.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"has 'more.jsonl', which is a folder"):
        files_of(tmp_path)


def test_a_mark_of_utf8_is_taken_off_the_beginning_of_a_file_alone(tmp_path: Path) -> None:
    """A prompt has the same index and text as in one process."""
    for name, text in (("a.txt", "\ufeffa\n\ufeffb\n"), ("b.txt", "\ufeff\nc\n")):
        file = tmp_path / name
        file.write_text(text)
        parts, _ = parts_of([file], 1)
        found = [json.loads(x) for part in parts for x in read(part)["line"].to_pylist()]
        assert found == read_lines(str(file))


def test_maps_and_whole_floats_of_parquet_are_settings(tmp_path: Path) -> None:
    table = pa.table(
        {
            "prompt": ["a", "b"],
            "weights": pa.array([[("w", 0.5)], None], pa.map_(pa.string(), pa.float64())),
            "seed": [3.0, None],
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    found = read(Part(str(tmp_path / "p.parquet"), 0, 2, 0, 2))["line"].to_pylist()
    first = {"prompt": "a", "weights": {"w": 0.5}, "seed": 3}
    assert found == [json.dumps(first), '{"prompt": "b"}']


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"p.parquet' is no whole file of parquet"):
        parts_of(files_of(tmp_path), 8)


def test_results_as_a_table_have_columns_of_their_types() -> None:
    lines = ['{"index": 3, "text": "a", "tokens": 2}', '{"index": 4, "error": "bad"}']
    table = table_of(lines)
    assert table["tokens"].to_pylist() == [2, None]
    assert table["logprob"].type == pa.float64()
    assert table["error"].to_pylist() == [None, "bad"]
    assert table["record"].to_pylist() == lines


# ---- Longer runs --------------------------------------------------------------------------------


@pytest.mark.sweep
def test_an_actor_that_is_killed_loses_nothing(
    cluster: Any, paths: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "prompts.jsonl", prompts(300))
    whole = one_process(file, paths)
    output = tmp_path / "out"
    asked = ["generate", "--ray", "2", "--prompts", str(file), "--output", str(output)]
    killed: list[int] = []
    done = threading.Event()
    killer = threading.Thread(target=kill_an_actor, args=(output, killed, done))
    killer.start()
    try:
        assert cli.main([*asked, *options(paths)]) == 0, capsys.readouterr().err
    finally:
        done.set()
        killer.join()
    assert killed
    assert killed[0] < 5  # of the parts
    same(results(output), whole)


@pytest.mark.sweep
def test_two_thousand_prompts_and_a_driver_that_is_killed(
    paths: dict[str, str], tmp_path: Path
) -> None:
    file = write(tmp_path / "prompts.jsonl", prompts(2000))
    whole = one_process(file, paths)
    output = tmp_path / "out"
    asked = ["generate", "--ray", "2", "--prompts", str(file), "--output", str(output)]
    command = [sys.executable, "-m", "crossfade", *asked, *options(paths)]
    driver = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 300
    while len(list((output / "parts").glob("*"))) < 4:
        assert driver.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    while actors(driver.pid):
        time.sleep(0.1)
    there = len(list((output / "checkpoint").glob("*")))
    assert 0 < there < 2000 / 64
    done = subprocess.run([*command, "--resume"], stderr=subprocess.PIPE, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "more were in the folder" in done.stderr
    same(results(output), whole)


@pytest.mark.sweep
def test_a_pipeline_of_parquet(cluster: Any, paths: dict[str, str], tmp_path: Path) -> None:
    """Ray Data's own reading and writing around the class, and the folder of a run."""
    items = [{"prompt": x["prompt"]} for x in prompts(60)]
    whole = one_process(write(tmp_path / "whole.jsonl", items), paths)
    rows = [{**item, "id": i} for i, item in enumerate(items)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=7)
    models = [f"{name}={path}" for name, path in paths.items()]
    asked = spec(model=models, blend=FORMULA, fader=["w=0.8"], generation={"max_new_tokens": 12})
    found = cluster.data.read_parquet(str(tmp_path / "rows.parquet")).map_batches(
        Decoder,
        fn_constructor_kwargs=asked,
        batch_size=4,
        compute=cluster.data.ActorPoolStrategy(size=1),
    )
    texts = {row["id"]: row["text"] for row in found.take_all()}
    assert texts == {i: json.loads(line)["text"] for i, line in whole.items()}

    pq.write_table(pa.Table.from_pylist(items), tmp_path / "items.parquet")
    done = run(asked, tmp_path / "items.parquet", tmp_path / "out", actors=1)
    assert (done.rows, done.errors, done.kept) == (60, 0, 0)
    table = pq.read_table(tmp_path / "out" / "parts")
    same(dict(zip(*(table[n].to_pylist() for n in ("index", "record")), strict=True)), whole)
    again = run(asked, tmp_path / "items.parquet", tmp_path / "out", actors=1, resume=True)
    assert (again.rows, again.kept) == (0, 60)


@pytest.mark.sweep
def test_actors_with_other_models_end_the_run(
    cluster: Any, paths: dict[str, str], tmp_path: Path
) -> None:
    file = write(tmp_path / "p.jsonl", prompts(3))
    output = tmp_path / "out"
    given = spec(model=[f"base={paths['base']}"], blend="base")
    with pytest.raises(ValueError, match="the cluster of Ray has no GPU"):
        run({**given, "device": "cuda:99"}, file, output)
    assert not any(output.iterdir())
    note(output, "before", {0: '{"index": 0, "run": "other"}'})
    with pytest.raises(RuntimeError, match=r"an actor has failed: .*that of the results is other"):
        run(given, file, output, resume=True)
