"""What commands share: the options of models and of batches, and the checks of what was given."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any


def add_blend_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME=PATH[@GUIDE]",
        help="a model, once for each; a folder, a hub id or smollm2; GUIDE: the folder of a PEFT "
        "adapter or of a value head over it, or sentiment, brevity or sentiment_value, which ship "
        "for smollm2; NAME= may be left out if there is one model",
    )
    p.add_argument(
        "--blend", metavar="FORMULA", help='of the names, such as "base + 0.8 * (tuned - ref)"'
    )
    p.add_argument(
        "--system",
        action="append",
        default=[],
        metavar="NAME=TEXT",
        help="a system prompt for one model; implies --chat where there are prompts",
    )
    p.add_argument("--device", help="by default a GPU if torch finds one, else the CPU")
    p.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="of the weights; auto: as they were saved",
    )


def add_batch_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--chat", action="store_true", help="send texts as a user's message, by the chat template"
    )
    p.add_argument(
        "--batch-size", type=positive, default=8, help="requests at a time (%(default)s)"
    )
    p.add_argument("--output", metavar="FILE", help="by default stdout")


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return value


def check_folder(option: str, path: str | Path | None) -> None:
    """Said before the work whose result would have no place."""
    if path is not None and Path(path).is_dir():
        raise IsADirectoryError(f"{option} is {str(path)!r}, a folder; it must be a file")
    if path is not None and not Path(path).parent.is_dir():
        raise FileNotFoundError(
            f"{option} is {str(path)!r}: there is no folder {str(Path(path).parent)!r}"
        )


def load(a: argparse.Namespace, value: str | None = None) -> tuple[Any, Any]:
    """The blend, and the value if there is one."""
    from ..loading import load_blend

    quiet()
    device = device_of(a.device)
    return load_blend(a.model, a.blend, a.system, value=value, device=device, dtype=a.dtype)


def device_of(name: str | None) -> str:
    """The device asked for, or the best there is."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch's ways to say that it is not there
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device is {name!r}, which torch cannot use: {reason}") from None
    return name


def quiet() -> None:
    """No bars for each load of weights, which are done before they are read."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def check_output(output: str | None, resume: bool) -> None:
    if resume and output is None:
        raise ValueError("--resume is given without --output; it must have a file to resume")
    if output is not None and (not output or os.path.isdir(output)):
        raise ValueError(f"--output is {output!r}; it must be a file")
    if output is not None and not resume and os.path.lexists(output):
        raise ValueError(f"--output {output} exists; give --resume to go on with it, or remove it")
