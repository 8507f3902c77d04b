"""``crossfade generate``: texts that a blend writes, as a JSON line for each prompt."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .options import (
    TEMPERATURE,
    add_batch_options,
    add_blend_options,
    add_text_options,
    check_output,
    load,
    positive,
)

if TYPE_CHECKING:
    from ..blends.blend import Blend
    from ..bulk.records import Results
    from ..decoding import Output
    from ..search import ChunkBeamSearch

HELP = "Let a blend of models answer prompts, and write a JSON line for each."


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="*", help="prompts, if not by --prompts or on stdin")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help='a file with a prompt on each line, or a .jsonl file with a "prompt" or the '
        '"messages" of a chat on each line; - is stdin',
    )
    add_blend_options(parser)
    add_batch_options(parser)
    add_text_options(parser, max_new_tokens=128)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    mode.add_argument(
        "--sample",
        action="store_true",
        help="draw tokens at random; each of the next four options implies it",
    )
    parser.add_argument("--temperature", type=float, help=TEMPERATURE)
    parser.add_argument("--top-k", type=int, help="draw from the TOP_K likeliest tokens only")
    parser.add_argument(
        "--top-p",
        type=float,
        help="draw from the likeliest tokens only, as few as have the probability TOP_P together",
    )
    parser.add_argument(
        "--min-p",
        type=float,
        help="draw only from tokens at least MIN_P times as likely as the likeliest",
    )
    parser.add_argument(
        "--value",
        metavar="FORMULA",
        help="what a search prefers: texts that one model finds likelier than another does, such "
        'as "tuned - ref", or texts that value heads score highly, by their names',
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--best-of", type=positive, metavar="N", help="write N texts, keep the best")
    how.add_argument(
        "--search",
        type=_search,
        metavar="W,N,L",
        help="keep W texts, continue each of them in N ways, and after every L tokens choose the W "
        "best again",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the file of --output: keep its lines and write those that it lacks",
    )


def run(arguments: argparse.Namespace) -> int:
    from ..bulk import prompts, records

    drawing = _drawing(arguments)
    check_output(arguments.output, arguments.resume)
    texts = prompts.read_prompts(
        arguments.prompt, arguments.prompts, chat=arguments.chat or bool(arguments.system)
    )
    with records.Results(arguments.output, resume=arguments.resume) as results:
        blend, value = load(arguments, arguments.value)
        write_texts(
            blend,
            texts,
            results=results,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            search=None if value is None else _make_search(arguments, value),
            max_new_tokens=arguments.max_new_tokens,
            **drawing,
        )
    return 0


def _drawing(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `generate` about how tokens are drawn, of which none contradicts another."""
    names = ("temperature", "top_k", "top_p", "min_p")
    given = {
        name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None
    }
    if arguments.greedy and given:
        option = "--" + next(iter(given)).replace("_", "-")
        raise ValueError(
            f"--greedy and {option} are both given; {option} is for draws, which --greedy is not"
        )
    searches = arguments.best_of is not None or arguments.search is not None
    if searches and arguments.value is None:
        raise ValueError("--best-of or --search is given without --value, which must go with it")
    if arguments.value is not None and not searches:
        raise ValueError(
            "--value is given without --best-of or --search, one of which must go with it"
        )
    if searches and arguments.greedy:
        raise ValueError("--greedy is given with a search, which draws its texts at random")
    if arguments.greedy or arguments.sample or given:
        return {"do_sample": not arguments.greedy, **given}
    return given  # the generation config of the model says whether tokens are drawn


def _make_search(arguments: argparse.Namespace, value: Any) -> Any:
    from ..search import BestOfN, ChunkBeamSearch

    if arguments.best_of is not None:
        return BestOfN(arguments.best_of, value)
    width, samples, chunk_length = arguments.search
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
    """Write a JSON line for each prompt that `results` lacks, and figures to stderr.

    A line is written as soon as its text has ended. What is being decoded at an interrupt is lost.
    """
    from ..bulk.decode import decode
    from ..identity import run_id
    from ..progress import progress_bar

    rows = 1 if search is None else search.rows
    run = run_id(blend=blend, seed=seed, search=search, generation=generation)
    finished = results.begin(prompts, run)
    todo, tokens, start = len(prompts) - len(finished), 0, time.perf_counter()
    with progress_bar(todo, "prompt") as bar:
        for i, out in decode(
            blend,
            prompts,
            seed=seed,
            skip=finished,
            max_batch=batch_size * rows,
            progress=bar.update,
            search=search,
            **generation,
        ):
            record = {"index": i, "prompt": prompts[i], **_figures(out)}
            results.write({**record, "blend": str(blend), "run": run})
            tokens += out.stats.tokens
    results.finish()
    seconds = time.perf_counter() - start
    kept = f" ({len(finished)} more were in the file)" if finished else ""
    speed = f", {tokens / seconds:.1f} tokens/s" if tokens else ""
    print(f"{todo} prompts{kept}, {tokens} tokens{speed}", file=sys.stderr)


def _figures(out: Output) -> dict[str, Any]:
    """What the line of a prompt says of the text that it got."""
    from ..bulk.records import number

    figures = {
        "text": None if out.text is None else out.text[0],
        "tokens": int(out.lengths[0]),
        "logprob": number(out.logprobs[0].double().sum()),
        "finished": bool(out.finished[0]),
        "failed": bool(out.failed[0]),
    }
    if out.values is not None:
        figures["value"] = number(out.values[0])
    return figures


def _search(text: str) -> tuple[int, ...]:
    numbers = tuple(map(positive, text.split(",")))
    if len(numbers) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} must be three numbers W,N,L, such as 4,4,5")
    return numbers
