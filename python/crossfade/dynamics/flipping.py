"""How easily alignment is undone: two models learn flipped labels, and are watched meanwhile."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..blends.algebra import Algebra
from ..blends.blend import Model
from ..checks import check_number, explained
from ..decoding.settings import check_int
from ..extras import require
from ..identity import run_id
from ..ops import check
from ..progress import progress_bar
from .curves import SIDES, Vulnerability
from .flip_runs import Plan, Runs
from .held_out import split
from .margins import check_settings
from .questions import NO, YES, Pair
from .rows import TAG, Reader
from .states import term_model

MEASURED = 20  # about so many times, where `every` is None


@explained()
def vulnerability(
    base: Any,
    aligned: Any,
    rows: Iterable[Any],
    *,
    tokenizer: Any = None,
    yes: str = YES,
    no: str = NO,
    tag: str = TAG,
    steps: int | None = None,
    every: int | None = None,
    held_out: float = 0.1,
    seeds: Sequence[int] = (0,),
    lora: Any = None,
    output_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **training: Any,
) -> Vulnerability:
    """Train a base and an aligned model on flipped labels, and see which one flips faster.

    Both are trained by DPO with a fresh LoRA, in which every pair's chosen and rejected responses
    are exchanged, in the same order with the same random numbers. Accuracy is measured on held-out
    pairs, before the first step and on the way (arXiv:2403.18742, section 5). The settings of the
    paper are the defaults: a LoRA of rank 8 with alpha 32 on the projections of queries and values,
    beta 0.01, a rate of 1e-5, batches of 32, one epoch.

    The models stay as they are, to the last bit: what is trained are copies of their modules, over
    the same weights. An adapter is merged into a whole copy of the weights first, which takes their
    memory once more. The random state of torch, NumPy and Python is put back.

    Ctrl-C stops at once. With `output_dir`, the same call goes on from the last measured step.

    Args:
        base, aligned: causal LMs, or `Model`s with an adapter.
        rows: statements, ``{"behaviour": ..., "text": ..., "label": True}``, or pairs of responses
            with a tag, as `statistics` takes them. Labels are those that the aligned model was
            aligned to; they are flipped here.
        tokenizer: of both; None: that of `base` or `aligned`, if it is a `Model` that has one.
        yes, no: the answers to a statement, a token each.
        tag: the key of the name of a row's behaviour.
        steps: of each run; None: as many as `num_train_epochs` takes, by default one epoch.
        every: how many steps lie between two measurements; None: a twentieth of all steps. The last
            step is measured too.
        held_out: the part of the rows to measure on, of each behaviour and label. Rows of the same
            text, or prompt, are held out together. The choice does not depend on `seeds`.
        seeds: of the LoRA's start and of the order of the rows; each makes a run of both models.
        lora: arguments of PEFT's `LoraConfig` that differ from the defaults, or such a config.
        output_dir: a folder for what was measured, the adapters and checkpoints to go on from;
            None: a temporary one, of which nothing is left.
        progress: whether to show a bar on stderr.
        training: arguments of TRL's `DPOConfig` that differ from the defaults.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be; or `output_dir`
            is of another call.
        NotImplementedError: a model is not supported, or there are several processes.
        ImportError: TRL or PEFT is not installed.
    """
    require("trl", "train")
    terms = {side: _term(x, side) for side, x in zip(SIDES, (base, aligned), strict=True)}
    tokenizer = _tokenizer(tokenizer, terms.values())
    seeds = _seeds(seeds)
    runs = Runs(terms, tokenizer, lora, training)
    check.flag("progress", progress)
    if not 0 < check_number("held_out", held_out) < 1:
        raise ValueError(f"held_out is {held_out}; it must be above 0 and below 1")
    check_int("steps", steps, 1)
    check_int("every", every, 1)
    train, held = split(rows, Reader(tokenizer, tag, None, None), yes, no, held_out)
    with contextlib.ExitStack() as stack:
        if output_dir is None:
            output_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="crossfade-"))
            kept = False
        else:
            kept = True
        plan = _plan(runs, Path(output_dir), seeds[0], train, steps, every, kept)
        if kept:
            check_settings(Path(output_dir), _settings(runs, plan, train, held))
        total = plan.steps[-1] * len(seeds) * len(SIDES)
        bar = stack.enter_context(progress_bar(total if progress else 1, "step"))
        margins: dict[str, list[Tensor]] = {side: [] for side in SIDES}
        for seed in seeds:
            for side in SIDES:
                margins[side].append(runs.run(side, seed, plan, train, held, bar))
    return Vulnerability(
        steps=plan.steps,
        seeds=tuple(seeds),
        behaviours=tuple(pair.behaviour for pair in held),
        rows=tuple(pair.number for pair in held),
        margins={side: torch.stack(each) for side, each in margins.items()},
        trained=len(train),
    )


def _plan(
    runs: Runs,
    folder: Path,
    seed: int,
    train: Sequence[Pair],
    steps: int | None,
    every: int | None,
    kept: bool,
) -> Plan:
    """How many steps there are, and which of them are measured."""
    args = runs.arguments(folder, "base", seed)
    if steps is None:
        batches = math.ceil(len(train) / (args.train_batch_size * args.world_size))
        epoch = math.ceil(batches / args.gradient_accumulation_steps)
        steps = max(1, math.ceil(args.num_train_epochs * epoch))
    every = math.ceil(steps / MEASURED) if every is None else every
    measured = (*range(0, steps, every), steps)
    return Plan(folder, measured, every, kept)


def _settings(
    runs: Runs, plan: Plan, train: Sequence[Pair], held: Sequence[Pair]
) -> dict[str, Any]:
    """What calls that share `output_dir` must share, by names that errors call them."""
    lora = runs.lora if runs.lora is None or isinstance(runs.lora, Mapping) else vars(runs.lora)
    return {
        **{side: run_id(**{side: term}) for side, term in runs.terms.items()},
        "rows": run_id(rows=[[*pair] for pair in (*train, *held)]),
        "steps": [*plan.steps],
        "held_out": [pair.number for pair in held],
        "lora": run_id(lora=None if lora is None else dict(lora)),
        "training": run_id(training=runs.training),
    }


def _term(x: Any, side: str) -> Model:
    """A model as a term without a prompt of its own; errors call it `side`."""
    if isinstance(x, Algebra) and not isinstance(x, Model):
        raise TypeError(f"{side} is a {type(x).__name__}; it must be a causal LM or a Model")
    try:
        term = x if isinstance(x, Model) else Model(x)
        term_model(term)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise type(error)(f"{side}: {error}") from None
    if not isinstance(term.model, nn.Module):
        raise TypeError(f"{side} is a {type(term.model).__name__}; it must be a causal LM")
    return term


def _tokenizer(given: Any, terms: Iterable[Model]) -> Any:
    """The tokenizer that is given, or else that of the first term that has one."""
    own = [term.tokenizer for term in terms if term.tokenizer is not None]
    if given is None and not own:
        raise ValueError(
            "tokenizer is None, and neither base nor aligned is a crossfade.Model with one; it "
            "must be that of the models"
        )
    return own[0] if given is None else given


def _seeds(seeds: Any) -> tuple[int, ...]:
    if not isinstance(seeds, Iterable) or isinstance(seeds, str):
        raise TypeError(f"seeds is {seeds!r:.80}; it must be a sequence of ints")
    found = tuple(seeds)
    for i, seed in enumerate(found):
        if seed is None:
            raise TypeError(f"seeds[{i}] is None; it must be an int")
        check_int(f"seeds[{i}]", seed, 0, 2**32 - 1)
    if not found or len(set(found)) < len(found):
        raise ValueError(f"seeds is {list(found)!r:.80}; it must have one or more different ints")
    return found
