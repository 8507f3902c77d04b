"""Files of prompts as Ray Data reads them, and folders of results as it writes them."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...extras import require
from ...files import sha256
from .columns import ERROR, INDEX, LINE, TYPES, plain, row_of

pyarrow: Any = require("pyarrow", "ray")
parquet: Any = require("pyarrow.parquet", "ray")
datasource: Any = require("ray.data.datasource", "ray")

KINDS = (".jsonl", ".parquet", ".txt")
FORMATS = ("jsonl", "parquet")
PENDING = ".pending"  # how Ray ends the name of what is noted of a part that is not yet whole
Read = tuple[str | None, str | None]  # a prompt as JSON, or why it is none
REST = "record"  # the column with the whole result as JSON


@dataclass(frozen=True)
class Part:
    """Some lines of a file, which one task reads.

    Attributes:
        first: the index of the first of them, among the prompts of all files.
        count: how many prompts there are.
        start: of lines the byte at which they begin; of parquet the row.
        size: of lines how many bytes they are; of parquet rows.
    """

    path: str
    first: int
    count: int
    start: int
    size: int


@dataclass(frozen=True)
class Source:
    """A file of prompts: how many there are, and the hash of its bytes."""

    name: str
    prompts: int
    sha256: str


def files_of(path: str | Path) -> list[Path]:
    """A file of prompts, or those of a folder in the order of their names.

    What programs note in a folder, under names that begin with a dot or an underscore, is left out.

    Raises:
        FileNotFoundError: there is none. ValueError: a file is of another kind than `KINDS`, or a
            folder lies in the folder.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if not p.name.startswith((".", "_")))
        for file in found:
            if not file.is_file() or file.suffix.lower() not in KINDS:
                what = "a folder" if file.is_dir() else f"no {', '.join(KINDS)} file"
                raise ValueError(
                    f"{str(path)!r} has {file.name!r}, which is {what}; a folder of prompts must "
                    "have nothing but their files: move it elsewhere"
                )
        if not found:
            raise FileNotFoundError(f"{str(path)!r} has no {', '.join(KINDS)} file")
        return found
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} is no file and no folder")
    if path.suffix.lower() not in KINDS:
        raise ValueError(f"{str(path)!r} must be a folder, or a file named *{', *'.join(KINDS)}")
    return [path]


def parts_of(files: Sequence[Path], size: int) -> tuple[list[Part], list[Source]]:
    """The prompts of files in parts of up to `size`, and the files."""
    parts: list[Part] = []
    sources: list[Source] = []
    for file in files:
        first = sum(source.prompts for source in sources)
        cut = _rows if file.suffix.lower() == ".parquet" else _lines
        its = list(cut(str(file.resolve()), first, size))
        sources.append(Source(file.name, sum(p.count for p in its), sha256(file)))
        parts += its
    return parts, sources


def _lines(path: str, first: int, size: int) -> Iterator[Part]:
    count = start = end = 0
    with open(path, "rb") as file:
        for line in file:
            count += _is_filled(line if end else line.removeprefix(BOM_UTF8))
            end += len(line)
            if count == size:
                yield Part(path, first, count, start, end - start)
                first, start, count = first + count, end, 0
    if count:
        yield Part(path, first, count, start, end - start)


def _rows(path: str, first: int, size: int) -> Iterator[Part]:
    try:
        total = parquet.read_metadata(path).num_rows
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path!r} is no whole file of parquet: {error}") from None
    for start in range(0, total, size):
        count = min(size, total - start)
        yield Part(path, first + start, count, start, count)


def _is_filled(line: bytes) -> bool:
    return bool(line.decode(errors="replace").strip())


def read(part: Part) -> Any:
    """The prompts of a part as a table: their indices, and each as JSON, or why it is none."""
    rows = Path(part.path).suffix.lower() == ".parquet"
    items = list((_json_of_rows if rows else _json_of_lines)(part))
    index = pyarrow.array(range(part.first, part.first + len(items)), pyarrow.int64())
    lines, errors = (pyarrow.array(x, pyarrow.string()) for x in zip(*items, strict=True))
    return pyarrow.table({INDEX: index, LINE: lines, ERROR: errors})


def _json_of_lines(part: Part) -> Iterator[Read]:
    is_json = part.path.lower().endswith(".jsonl")
    with open(part.path, "rb") as file:
        file.seek(part.start)
        data = file.read(part.size)
    if not part.start:
        data = data.removeprefix(BOM_UTF8)
    for line in filter(_is_filled, data.split(b"\n")):
        yield _json_of_line(line, is_json=is_json)


def _json_of_line(line: bytes, *, is_json: bool) -> Read:
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return None, "is not UTF-8"
    return text if is_json else json.dumps(text), None


def _json_of_rows(part: Part) -> Iterator[Read]:
    file = parquet.ParquetFile(part.path)
    before = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        start, end = part.start - before, part.start + part.size - before
        if start < rows and end > 0:
            start = max(0, start)
            items = file.read_row_group(group).slice(start, end - start).to_pylist()
            for row, item in enumerate(items, before + start):
                yield _json(item, f"row {row} of {Path(part.path).name!r}")
        before += rows


def _json(item: Mapping[str, Any], where: str) -> Read:
    """A row as JSON, without what is null, as all rows have the keys of all."""
    try:
        return json.dumps(row_of(item), allow_nan=False), None
    except (TypeError, ValueError):
        name, x = next((name, x) for name, x in item.items() if not _is_json(x))
        return None, f"is {where}, whose column {name!r} has {x!r:.80}, which JSON cannot say"


def _is_json(x: Any) -> bool:
    try:
        json.dumps(plain(x), allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


class Prompts(datasource.Datasource):
    """The prompts of files, each part of them read by a task on its own."""

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__()
        self.parts = list(parts)

    def get_name(self) -> str:
        return "Prompts"

    def estimate_inmemory_data_size(self) -> int:
        return sum(part.size for part in self.parts)

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[Any]:
        """A task for each part. Ray pickles what they read, and no prompts."""
        block = require("ray.data.block", "ray")
        return [
            datasource.ReadTask(
                lambda part=part: [read(part)],
                block.BlockMetadata(part.count, part.size, [part.path], None),
            )
            for part in self.parts
        ]


class Results(datasource.BlockBasedFileDatasink):
    """A folder of files with results, one for each block.

    Attributes:
        counts: how many results were written, with errors, and of how many tokens.
    """

    def __init__(self, folder: str, file_format: str) -> None:
        super().__init__(folder, file_format=file_format)
        self.file_format = file_format
        self.counts = dict.fromkeys(("rows", "errors", "tokens"), 0)

    def write_block_to_file(self, block: Any, file: Any) -> None:
        lines = block.to_arrow()[LINE].to_pylist()
        if self.file_format == "parquet":
            parquet.write_table(table_of(lines), file)
        else:
            file.write("".join(f"{line}\n" for line in lines).encode())

    def write(self, blocks: Iterable[Any], ctx: Any) -> Any:
        """Write blocks, and count what they have."""
        blocks = list(blocks)
        super().write(iter(blocks), ctx)
        counts = dict.fromkeys(self.counts, 0)
        for block in filter(len, blocks):  # An empty one has no columns.
            lines, errors = (block[name].to_pylist() for name in (LINE, ERROR))
            counts["rows"] += len(lines)
            counts["errors"] += sum(x is not None for x in errors)
            counts["tokens"] += sum(map(_tokens, map(json.loads, lines)))
        return counts

    def on_write_complete(self, write_result: Any) -> None:
        super().on_write_complete(write_result)
        for counts in write_result.write_returns:
            for name, x in (counts or {}).items():
                self.counts[name] += x


def mend(parts: Path, checkpoint: Path) -> None:
    """Let a checkpoint note what parts have, whatever happened to either since it was written.

    A part that is not whole is taken away, and so is the note of one that is not there: their
    prompts are worked on again. What was being written when a run was killed is noted as pending,
    and left to Ray.
    """
    notes = {note.stem: note for note in checkpoint.glob("*.parquet")}
    pending = {name.removesuffix(PENDING) for name in notes if name.endswith(PENDING)}
    files = {part.stem: part for kind in FORMATS for part in parts.glob(f"*.{kind}")}
    for name in {*files, *notes} - pending - {f"{name}{PENDING}" for name in pending}:
        part, note = files.get(name), notes.get(name, checkpoint / f"{name}.parquet")
        has = None if part is None else _indices(part)
        if has is None:
            for file in (part, note):
                if file is not None:
                    file.unlink(missing_ok=True)
        elif has != _indices(note):
            checkpoint.mkdir(exist_ok=True)
            parquet.write_table(pyarrow.table({INDEX: pyarrow.array(has, pyarrow.int64())}), note)


def _indices(file: Path) -> list[int] | None:
    """The places of the prompts that a part or a note has; None if it is not whole."""
    try:
        if file.suffix == ".parquet":
            return parquet.read_table(file, columns=[INDEX])[INDEX].to_pylist()
        *lines, rest = file.read_bytes().split(b"\n")
        return None if rest else [json.loads(line)[INDEX] for line in lines]
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _tokens(record: Mapping[str, Any]) -> int:
    each = record.get("outputs", [record])
    return sum(text.get("tokens") or 0 for text in each)


def table_of(lines: Sequence[str]) -> Any:
    """Results as a table: columns of `TYPES`, and `REST` with the whole of each as JSON."""
    records = [json.loads(line) for line in lines]
    columns = {
        name: pyarrow.array([record.get(name) for record in records], kind)
        for name, kind in TYPES.items()
    }
    return pyarrow.table({**columns, REST: pyarrow.array(lines, pyarrow.string())})
