"""Prompts from files and results as JSON lines: what `crossfade generate` and `score` do.

Rows are written and flushed part by part, and at an interrupt those that have ended: it loses what
is being decoded.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from . import reading
from .blend import Blend
from .bulk import records
from .decoding import generate, score
from .identity import run_id
from .metrics import perplexity
from .progress import progress_bar
from .search import ChunkBeamSearch

PART = 8  # batches that are decoded, and written, together: rows of one fill places of the other


def read_lines(source: str) -> list[Any]:
    """The non-empty lines of a file or of stdin (``-``), as texts or as JSON objects.

    They are JSON in a file named ``*.jsonl``, and on stdin if the first one starts with ``{``.
    """
    where = "stdin" if source == "-" else source
    if source.lower().endswith(".json"):
        raise ValueError(f"{where} is JSON; it must be .jsonl with an object a line, or a text")
    text = _read_stdin() if source == "-" else reading.read_text(source)
    lines = text.split("\n")  # not splitlines: JSON may hold other line breaks as they are
    filled = [line for line in lines if line.strip()]
    starts_json = bool(filled) and filled[0].lstrip().startswith("{")
    if not (source.lower().endswith(".jsonl") or (source == "-" and starts_json)):
        return filled
    return records.objects(lines, where)


def _read_stdin() -> str:
    """The text on stdin, in UTF-8 as that of a file, whatever the terminal's encoding is."""
    if sys.stdin is None:
        raise ValueError("stdin is closed; prompts must come from there, or from a file")
    data = getattr(sys.stdin, "buffer", None)  # a text stream put in its place has none
    return sys.stdin.read() if data is None else reading.decode(data.read(), "stdin")


def read_prompts(texts: Sequence[str], source: str | None, *, chat: bool) -> list[Any]:
    """Prompts given on the command line, or from a file or stdin: texts, or chats.

    An object of a ``.jsonl`` has a ``"prompt"`` or a chat's ``"messages"``. `chat`: texts become
    the user's message of a chat.
    """
    if texts and source is not None:
        raise ValueError("prompts are given both as arguments and by --prompts; it must be one")
    if not texts and source is None and (sys.stdin is None or sys.stdin.isatty()):
        raise ValueError("no prompts are given; pass them as arguments, by --prompts or on stdin")
    items = list(texts) or read_lines("-" if source is None else source)
    prompts = [prompt_of(item, i, chat=chat) for i, item in enumerate(items)]
    if not prompts:
        raise ValueError("there are no prompts: the input is empty")
    return prompts


def prompt_of(item: Any, index: int, *, chat: bool) -> Any:
    if isinstance(item, dict):
        both = [item[key] for key in ("prompt", "messages") if item.get(key)]
        if len(both) != 1:
            raise ValueError(
                f'prompt {index} has the keys {sorted(item)}; it must have a "prompt" or "messages"'
            )
        item = both[0]
    if isinstance(item, str):
        reading.check_unicode(item, f"prompt {index}")  # of a command line that is not UTF-8
        if not item.strip():
            raise ValueError(f"prompt {index} is empty")
        return [{"role": "user", "content": item}] if chat else item
    if not isinstance(item, list):
        raise ValueError(f"prompt {index} is {item!r:.80}; it must be a text, a chat or token ids")
    return item  # generate and score check what a chat is


def run_generate(
    blend: Blend,
    prompts: Sequence[Any],
    *,
    results: records.Results,
    batch_size: int,
    seed: int,
    search: ChunkBeamSearch | None = None,
    **generation: Any,
) -> None:
    """A JSON line for each prompt that `results` does not have, in order; figures on stderr."""
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


def check_output(output: str | None, resume: bool) -> None:
    if resume and output is None:
        raise ValueError("--resume is given without --output; it must have a file to resume")
    if output is not None and (not output or os.path.isdir(output)):
        raise ValueError(f"--output is {output!r}; it must be a file")
    if output is not None and not resume and os.path.lexists(output):
        raise ValueError(f"--output {output} exists; give --resume to go on with it, or remove it")


def run_score(
    blend: Blend,
    items: Sequence[Any],
    *,
    results: records.Results,
    batch_size: int,
    chat: bool,
    terms: bool,
) -> None:
    """A JSON line for each ``{"prompt" or "messages", "response"}``; a summary on stderr."""
    if not items:
        raise ValueError("there is nothing to score: the input is empty")
    for i, item in enumerate(items):
        if not isinstance(item, dict) or not isinstance(item.get("response"), str):
            raise ValueError(f'line {i + 1} of the input has no "response"; it must be a text')
        if not item["response"]:
            raise ValueError(f'line {i + 1} of the input has an empty "response"')
    prompts = [prompt_of(item, i, chat=chat) for i, item in enumerate(items)]
    total, tokens = 0.0, 0
    with progress_bar(len(items), "response") as bar:
        for batch in records.batches(range(len(items)), batch_size):
            scores = score(
                blend,
                [prompts[i] for i in batch],
                [items[i]["response"] for i in batch],
                return_term_logprobs=terms,
            )
            for row, i in enumerate(batch):
                logprob, length = float(scores.totals[row]), int(scores.lengths[row])
                record: dict[str, Any] = {
                    "index": i,
                    "logprob": records.number(logprob),
                    "tokens": length,
                    "perplexity": records.number(perplexity(logprob, length)),
                }
                if scores.term_logprobs is not None:
                    sums = scores.term_logprobs[row].double().sum(dim=0).tolist()
                    record["terms"] = dict(zip(blend.names, map(records.number, sums), strict=True))
                results.write(record)
                total, tokens = total + logprob, tokens + length
            results.flush()
            bar.update(len(batch))
    print(
        f"{len(items)} responses, {tokens} tokens, perplexity {perplexity(total, tokens):.4g}",
        file=sys.stderr,
    )
