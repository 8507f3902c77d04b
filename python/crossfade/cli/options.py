"""What several commands share: options for models and batches, and checks of what is given."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

TEMPERATURE = "below 1 likely tokens become likelier still, above 1 less so"


def add_blend_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which models are loaded and how they are blended."""
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME=PATH[@GUIDE]",
        help="a model and its name in the formula; give the option once for each model. PATH is "
        "the folder of a saved model, an id on the Hugging Face hub, or smollm2. GUIDE is the "
        "folder of a PEFT adapter or of a value head for that model; sentiment, brevity and "
        "sentiment_value, which are for smollm2, come with crossfade. A single model needs no NAME",
    )
    parser.add_argument(
        "--blend",
        metavar="FORMULA",
        help='how the models are blended, by their names, such as "base + 0.8 * (tuned - ref)"; '
        "a single model needs none",
    )
    parser.add_argument(
        "--system",
        action="append",
        default=[],
        metavar="NAME=TEXT",
        help="a system prompt that only this model reads; it makes prompts chats, as --chat does",
    )
    add_device_option(parser)
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="the number format of the weights; auto keeps the one that they were saved in",
    )


def add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        help="where the models run, such as cpu or cuda:1; by default a GPU if torch finds one, "
        "else the CPU",
    )


def add_text_options(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    """The options of commands that write texts; a text has at most `max_new_tokens` by default."""
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        help="how many tokens a text may have (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="the same seed gives the same texts (default: %(default)s)",
    )


def add_batch_options(parser: argparse.ArgumentParser) -> None:
    """The options of commands that read many prompts and write a line for each."""
    parser.add_argument(
        "--chat",
        action="store_true",
        help="send each text as a user's message, in the form of the model's chat template",
    )
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=8,
        help="how many prompts are worked on at a time (default: %(default)s)",
    )
    parser.add_argument("--output", metavar="FILE", help="where results go; by default to stdout")


def positive(text: str) -> int:
    """The type of an option that is a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return value


def check_file(option: str, path: str | Path | None) -> None:
    """Refuse a file that could not be written, before the work whose result it is to hold."""
    if path is not None and Path(path).is_dir():
        raise IsADirectoryError(f"{option} is {str(path)!r}, a folder; it must be a file")
    if path is not None and not Path(path).parent.is_dir():
        raise FileNotFoundError(
            f"{option} is {str(path)!r}: there is no folder {str(Path(path).parent)!r}"
        )


def check_output(output: str | None, resume: bool | None = None) -> None:
    """Refuse an --output that cannot be begun, or gone on with if `resume`.

    Args:
        resume: None says that the command has no option --resume.
    """
    if resume and output is None:
        raise ValueError("--resume is given without --output, which names the file to resume")
    check_file("--output", output)
    if output is not None and not resume and os.path.lexists(output):
        ways = "remove it" if resume is None else "give --resume to add what it lacks, remove it"
        raise FileExistsError(f"--output is {output!r}, which exists; {ways} or name another file")


def load(arguments: argparse.Namespace, value: str | None = None) -> tuple[Any, Any]:
    """The blend that the options ask for, and the value of the formula `value` if there is one."""
    from ..loading import load_blend

    quiet()
    device = device_of(arguments.device)
    return load_blend(
        arguments.model,
        arguments.blend,
        arguments.system,
        value=value,
        device=device,
        dtype=arguments.dtype,
    )


def device_of(name: str | None) -> str:
    """The device that was asked for, or by default a GPU if torch finds one, else the CPU."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by the kind of device
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device is {name!r}, which torch cannot use: {reason}") from None
    return name


def quiet() -> None:
    """Turn off the progress bars of loading weights, which are over before anyone has read them."""
    from transformers.utils import logging

    logging.disable_progress_bar()
