"""From files of prompts into a folder of results, with actors of Ray between."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ... import reading
from ...extras import require
from ..records import lock
from .actor_spec import Spec, spec
from .columns import INDEX

RUN, PARTS, CHECKPOINT = "run.json", "parts", "checkpoint"
BATCHES = 8  # of a part: prompts that one task reads, and one file has
CALLS = 2  # tasks that an actor works on at a time, so that one begins before the last has ended
MEMORY = 256 << 20  # bytes of the object store of a cluster that is started here
OTHERS = 2  # CPUs of what reads and writes, and of the actor that leaves out what is there
SMALL: dict[str, Any] = {"num_cpus": 0.1}  # what tasks take that read and write
SAID = re.compile(r"(?m)^\s*(?:\w+Error): (.+)$")  # the line of a stack that says what was wrong
# Fields of a spec that change no result.
FREE = ("device", "batch_size", "expects")


@dataclass(frozen=True)
class Summary:
    """What a run has done.

    Attributes:
        rows: results that it has written.
        errors: how many of them say why their prompts failed.
        tokens: of the texts.
        kept: results that were there before.
    """

    rows: int
    errors: int
    tokens: int
    kept: int


def run(
    given: Mapping[str, Any],
    prompts: str | Path,
    output: str | Path,
    *,
    actors: int = 1,
    resume: bool = False,
    progress: bool = False,
) -> Summary:
    """Let actors work on all prompts of files, and write the results into a folder.

    Results are in files of ``output/parts``, a JSON line for each, or parquet where the prompts are
    of parquet. They have no order; ``index`` says the place of the prompt among those of all files.
    What a file of results has is noted in ``output/checkpoint`` once the file is whole: that is Ray
    Data's checkpoint, by the index. It is kept when all has been done.

    Args:
        given: what `spec` gives.
        prompts: a file, or a folder of files, named ``*.jsonl``, ``*.parquet`` or ``*.txt``.
        output: a folder, which must not exist, unless it is gone on with.
        actors: how many load the models.
        resume: whether to go on with a folder, and work on the prompts that it lacks.
        progress: whether Ray Data shows its bars.

    Raises:
        TypeError, ValueError: names what is wrong. OSError: files cannot be read or written.
        RuntimeError: an actor has failed; says why.
    """
    from .files import files_of, mend, parts_of  # which needs Ray

    asked = Spec.of(spec(**given))
    output = Path(output)
    files = files_of(prompts)
    if Path(prompts).is_dir() and output.resolve().is_relative_to(Path(prompts).resolve()):
        raise ValueError(
            f"output is {str(output)!r}, which is in the folder of prompts; it must lie elsewhere"
        )
    parts, sources = parts_of(files, BATCHES * asked.batch_size)
    total = sum(source.prompts for source in sources)
    if not total:
        raise ValueError(f"there are no prompts: {str(prompts)!r} is empty")
    if len(parts) < 2 * actors:  # so that no actor waits for others
        parts, _ = parts_of(files, max(1, -(-total // (2 * actors))))
    actors = min(actors, len(parts))
    file_format = "parquet" if all(f.suffix.lower() == ".parquet" for f in files) else "jsonl"
    what = {
        "spec": {name: x for name, x in given.items() if name not in FREE},
        "prompts": [asdict(source) for source in sources],
        "format": file_format,
    }
    with _folder(output, what, resume=resume):
        mend(output / PARTS, output / CHECKPOINT)
        told = {**given, "expects": _run_of(output)}
        counts = _work(told, parts, output, file_format, actors, progress)
    return Summary(**counts, kept=total - counts["rows"])


@contextmanager
def cluster(actors: int) -> Iterator[Any]:
    """Ray, connected to the cluster of ``RAY_ADDRESS``, or to one of this machine's own that ends
    with the block.

    One that is started here has no dashboard, listens on 127.0.0.1 alone, and tells nobody that it
    is used. Where the process is connected already, it stays so.
    """
    ray = require("ray", "ray")
    require("ray.data", "ray")
    if ray.is_initialized():
        yield ray
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.ERROR)
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",
            num_cpus=actors + OTHERS,
            include_dashboard=False,
            dashboard_host="127.0.0.1",
            _node_ip_address="127.0.0.1",
            object_store_memory=MEMORY,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _folder(output: Path, what: Mapping[str, Any], *, resume: bool) -> Iterator[None]:
    """The folder of results, locked while a run writes it. Where an error comes before any result,
    what was made here is removed again.

    Raises:
        FileExistsError: it exists, and is not gone on with. ValueError: it is of another run.
    """
    file = output / RUN
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"output is {str(output)!r}, a file; it must be a folder")
    begun = file.exists()
    if output.exists() and any(output.iterdir()) and not (resume and begun):
        ways = "resume it, remove it" if begun else "it has files of others: remove them"
        raise FileExistsError(f"output is {str(output)!r}, which exists; {ways} or name another")
    output.mkdir(parents=True, exist_ok=True)
    with open(file, "r+b" if begun else "x+b") as opened:
        lock(opened, file)
        before = opened.read()
        if before:
            _compare(before, what, file)
        else:  # It is new, or a crash came before it was written.
            opened.write(json.dumps(what, indent=1, ensure_ascii=False).encode() + b"\n")
            opened.flush()
            os.fsync(opened.fileno())
        try:
            yield
        except Exception:
            if not begun and not any((output / PARTS).glob("*")):
                for name in (PARTS, CHECKPOINT):
                    shutil.rmtree(output / name, ignore_errors=True)
                file.unlink()
            raise


def _compare(noted: bytes, what: Mapping[str, Any], file: Path) -> None:
    """Refuse to go on with results of other prompts or another spec."""
    before = reading.parse_json(noted.decode(errors="replace"), str(file))
    if not isinstance(before, dict):
        raise ValueError(f"{file} is {before!r:.80}; it must be what a run has written there")
    now = json.loads(json.dumps(what))
    differs = [name for name in now if before.get(name) != now[name]]
    if "spec" in differs:
        old, new = before.get("spec", {}), now["spec"]
        differs = sorted(k for k in {*old, *new} if old.get(k) != new.get(k)) or differs
    if differs:
        raise ValueError(
            f"{file}: the results come from other prompts, another blend or other settings "
            f"({', '.join(differs)}); a folder must be gone on with as it was begun"
        )


def _run_of(output: Path) -> str | None:
    """The identity of the run that results have; None if there are none."""
    for file in sorted((output / PARTS).glob("*.jsonl")):
        with open(file) as lines:
            for line in lines:
                if line.endswith("\n"):
                    return json.loads(line).get("run")
    for file in sorted((output / PARTS).glob("*.parquet")):
        parquet = require("pyarrow.parquet", "ray")
        pyarrow = require("pyarrow", "ray")
        try:
            found = parquet.read_table(file, columns=["run"])["run"].to_pylist()
        except pyarrow.ArrowInvalid:  # A crash has cut it.
            continue
        if found:
            return found[0]
    return None


def _work(
    given: Mapping[str, Any],
    parts: list[Any],
    output: Path,
    file_format: str,
    actors: int,
    progress: bool,
) -> dict[str, int]:
    """Run the pipeline, and count the results that were written."""
    from .decoder import LineDecoder
    from .files import Prompts, Results

    with cluster(actors) as ray, _context(output, progress):
        gpus = 1 if _on_gpus(ray, given.get("device")) else 0
        count = len(parts)  # Else Ray cuts them further.
        rows = ray.data.read_datasource(Prompts(parts), override_num_blocks=count, **SMALL)
        rows = rows.map_batches(
            LineDecoder,
            fn_constructor_kwargs=dict(given),
            batch_size=given.get("batch_size", Spec.batch_size),
            compute=ray.data.ActorPoolStrategy(size=actors, max_concurrent_calls_per_actor=CALLS),
            num_cpus=1,
            num_gpus=gpus,
        )
        results = Results(str(output / PARTS), file_format)
        try:
            rows.write_datasink(results, ray_remote_args=SMALL)
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"an actor has failed: {_cause(error)}") from error
    return results.counts


@contextmanager
def _context(output: Path, progress: bool) -> Iterator[None]:
    """Ray Data's settings for a run: its checkpoint, and how much it says."""
    data = require("ray.data", "ray")
    checkpoint = require("ray.data.checkpoint", "ray")
    context = data.DataContext.get_current()
    before = context.checkpoint_config, context.enable_progress_bars
    logger = logging.getLogger("ray.data")
    level = logger.level
    folder = (output / CHECKPOINT).resolve()
    config = checkpoint.CheckpointConfig(INDEX, str(folder), delete_checkpoint_on_success=False)
    # One actor leaves out what is there. By default there are up to ten, of 1 GiB each.
    config.checkpoint_actor_memory_bytes = MEMORY
    config.checkpoint_actor_pool_max_size = 1
    # To read which prompts are done, Ray Data would start 32 processes.
    os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")
    context.checkpoint_config, context.enable_progress_bars = config, progress
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.checkpoint_config, context.enable_progress_bars = before
        logger.setLevel(level)


def _on_gpus(ray: Any, device: str | None) -> bool:
    """Whether actors take a GPU each.

    Raises:
        ValueError: they are to, and the cluster has none, for which Ray would wait for ever.
    """
    there = ray.cluster_resources().get("GPU", 0) > 0
    if device is not None and device.startswith("cuda") and not there:
        raise ValueError(f"device is {device!r}, and the cluster of Ray has no GPU")
    return there if device is None else device.startswith("cuda")


def _cause(error: BaseException) -> str:
    """What an actor said, without the stack that Ray puts before it."""
    said = str(error)
    each: BaseException | None = error
    while each is not None:
        said, each = f"{each}\n{said}", each.__cause__
    found = SAID.findall(said)
    return found[-1] if found else type(error).__name__
