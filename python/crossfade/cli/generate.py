"""``crossfade generate``: a JSON line for each prompt, decoded under a blend."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .options import (
    add_batch_options,
    add_blend_options,
    check_folder,
    check_output,
    load,
    positive,
)

if TYPE_CHECKING:
    from ..blend import Blend
    from ..bulk.records import Results
    from ..search import ChunkBeamSearch

HELP = "Decode prompts under a blend; a JSON line for each."
PART = 8  # batches that are decoded, and written, together: rows of one fill places of the other


def add_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("prompt", nargs="*", help="texts; by default --prompts or lines of stdin")
    p.add_argument(
        "--prompts",
        metavar="FILE",
        help='a text a line, or .jsonl with "prompt" or "messages"; - is stdin',
    )
    add_blend_options(p)
    add_batch_options(p)
    p.add_argument("--max-new-tokens", type=int, default=128, help="%(default)s by default")
    mode = p.add_mutually_exclusive_group()
    mode.add_argument("--greedy", action="store_true", help="take the likeliest token")
    mode.add_argument("--sample", action="store_true", help="draw; the options below imply it")
    p.add_argument("--temperature", type=float, help="as in Hugging Face, as the next three")
    p.add_argument("--top-k", type=int)
    p.add_argument("--top-p", type=float)
    p.add_argument("--min-p", type=float)
    p.add_argument(
        "--seed", type=int, default=0, help="each prompt draws from it and its own index"
    )
    p.add_argument(
        "--value",
        metavar="FORMULA",
        help='what a search chooses by: a log-ratio of the names, such as "tuned - ref", or value '
        "heads",
    )
    how = p.add_mutually_exclusive_group()
    how.add_argument("--best-of", type=positive, metavar="N", help="the best of N texts")
    how.add_argument(
        "--search",
        type=_search,
        metavar="W,N,L",
        help="beams of chunks: keep W rows, continue each N times, choose after every L tokens",
    )
    p.add_argument(
        "--resume", action="store_true", help="keep what --output has and write what is missing"
    )


def run(a: argparse.Namespace) -> int:
    drawing = {
        name: getattr(a, name)
        for name in ("temperature", "top_k", "top_p", "min_p")
        if getattr(a, name) is not None
    }
    if a.greedy and drawing:
        name = next(iter(drawing)).replace("_", "-")
        raise ValueError(f"--greedy and --{name} are both given; greedy decoding does not draw")
    wanted = a.best_of is not None or a.search is not None
    if wanted != (a.value is not None):
        raise ValueError("--value goes with --best-of or --search, and they with it")
    if wanted and a.greedy:
        raise ValueError("--greedy is given; a search draws its rows")
    if a.greedy or a.sample or drawing:
        drawing["do_sample"] = not a.greedy  # else the model's generation config decides
    from ..bulk import prompts, records

    check_output(a.output, a.resume)
    check_folder("--output", a.output)
    texts = prompts.read_prompts(a.prompt, a.prompts, chat=a.chat or bool(a.system))
    with records.Results(a.output, resume=a.resume) as results:
        blend, value = load(a, a.value)
        if value is not None:
            drawing["search"] = _make_search(a, value)
        write_texts(
            blend,
            texts,
            results=results,
            batch_size=a.batch_size,
            seed=a.seed,
            max_new_tokens=a.max_new_tokens,
            **drawing,
        )
    return 0


def _make_search(a: argparse.Namespace, value: Any) -> Any:
    from ..search import BestOfN, ChunkBeamSearch

    if a.best_of is not None:
        return BestOfN(a.best_of, value)
    width, samples, chunk_length = a.search
    return ChunkBeamSearch(width, samples, chunk_length, value)


def write_texts(
    blend: Blend,
    prompts: Sequence[Any],
    *,
    results: Results,
    batch_size: int,
    seed: int,
    search: ChunkBeamSearch | None = None,
    **generation: Any,
) -> None:
    """A JSON line for each prompt that `results` does not have, in order; figures on stderr."""
    from ..bulk import records
    from ..decoding import generate
    from ..identity import run_id
    from ..progress import progress_bar

    rows = 1 if search is None else search.rows
    run = run_id(blend=blend, seed=seed, search=search, generation=generation)
    finished = results.begin(prompts, run)
    todo = [i for i in range(len(prompts)) if i not in finished]
    tokens, seconds = 0, 0.0
    with progress_bar(len(todo), "prompt") as bar:
        for part in records.batches(todo, PART * batch_size):
            out: Any = generate(
                blend,
                [prompts[i] for i in part],
                seed=[records.seed_of(seed, i) for i in part],
                search=search,
                max_batch=batch_size * rows,
                progress=bar.update,
                **generation,
            )
            texts = out.text or [None] * len(part)
            for row, i in enumerate(part):
                record = {
                    "index": i,
                    "prompt": prompts[i],
                    "text": texts[row],
                    "tokens": int(out.lengths[row]),
                    "logprob": records.number(out.logprobs[row].double().sum()),
                    "finished": bool(out.finished[row]),
                    "failed": bool(out.failed[row]),
                    "blend": str(blend),
                    "run": run,
                }
                if out.values is not None:
                    record["value"] = records.number(out.values[row])
                if out.ended[row] or not out.stats.interrupted:
                    results.write(record)
            results.flush()
            tokens += out.stats.tokens
            seconds += out.stats.seconds
            if out.stats.interrupted:
                raise KeyboardInterrupt
    kept = f", {len(finished)} kept" if finished else ""
    speed = f", {tokens / seconds:.1f} tokens/s" if seconds else ""
    print(f"{len(todo)} prompts{kept}, {tokens} tokens{speed}", file=sys.stderr)


def _search(text: str) -> tuple[int, ...]:
    numbers = tuple(map(positive, text.split(",")))
    if len(numbers) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} must be three numbers: W,N,L")
    return numbers
