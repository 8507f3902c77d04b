"""The options that several commands have: of models, sampling and batches."""

from __future__ import annotations

import argparse
from typing import Any

TEMPERATURE = "below 1 likely tokens become likelier still, above 1 less so; 0 is --greedy"
CHAT = (
    "send each text as a user's message, in the form of the model's chat template; the default "
    "where all models have one and the first model of the blend is an instruct model: its template "
    "closes an answer with a token at which the model ends its texts"
)


def add_blend_options(parser: argparse.ArgumentParser, *, system: bool = True) -> None:
    """The options that say which models are loaded and how they are blended.

    Args:
        system: whether models may have system prompts.
    """
    group = parser.add_argument_group("models and blend")
    group.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="[NAME=]PATH[@GUIDE]",
        help="a model and its name in the formula; give the option once for each model. PATH is "
        "the folder of a saved model, an id on the Hugging Face hub, or smollm2. GUIDE is the "
        "folder of a PEFT adapter or of a value head for that model; sentiment, brevity, "
        "aligner and sentiment_value, which are for smollm2, come with crossfade. A single model "
        "needs no NAME",
    )
    group.add_argument(
        "--blend",
        metavar="FORMULA|FILE",
        help='how the models are blended, by their names, such as "base + w * (tuned - ref)", or '
        "by a preset, such as \"cfg(base, 1.5, negative_system='Be rude.')\" (eft, dera, "
        "proxy_tuning, mod, genarm, contrastive, cfg and args, as in crossfade.presets); a single "
        "model needs none. Or a .json file that Blend.save wrote, which names its models itself",
    )
    add_fader_option(group)
    if system:
        group.add_argument(
            "--system",
            action="append",
            default=[],
            metavar="[NAME=]TEXT",
            help="a system prompt that only this model reads; it makes prompts chats, as --chat "
            "does",
        )
    add_device_option(group)
    add_dtype_option(group)


def add_fader_option(parser: Any) -> None:
    parser.add_argument(
        "--fader",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="where a fader stands: a name in the formula that is no model, such as w=0.8",
    )


def add_device_option(parser: Any) -> None:
    parser.add_argument(
        "--device",
        help="where the models run, such as cpu or cuda:1; by default a GPU if torch finds one, "
        "else the CPU",
    )


def add_dtype_option(parser: Any) -> None:
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        default="auto",
        help="the number format of the weights; auto keeps the one that they were saved in",
    )


def add_text_options(parser: Any, *, max_new_tokens: int) -> None:
    """The options of commands that write texts; a text has at most `max_new_tokens` by default."""
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        default=max_new_tokens,
        help="how many tokens a text may have (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        default=0,
        help="the same seed gives the same texts (default: %(default)s)",
    )


def add_sampling_options(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    """The options that say how texts are written. The model's saved settings are the defaults."""
    group = parser.add_argument_group(
        "writing", "Whether tokens are drawn is as the first model's generation config says."
    )
    add_text_options(group, max_new_tokens=max_new_tokens)
    mode = group.add_mutually_exclusive_group()
    mode.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    mode.add_argument(
        "--sample",
        action="store_true",
        help="draw tokens at random; each of the next four options implies it",
    )
    group.add_argument("--temperature", type=float, metavar="T", help=TEMPERATURE)
    group.add_argument(
        "--top-k", type=int, metavar="K", help="draw from the K likeliest tokens only"
    )
    group.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw from the likeliest tokens only, as few as have the probability P together",
    )
    group.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="draw only from tokens at least P times as likely as the likeliest",
    )
    group.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end a text where it has written TEXT, which stays in it; may be given several times",
    )


def add_draft_options(group: Any, *, answers: bool = False) -> None:
    """The options that say what guesses tokens.

    Args:
        answers: whether the command edits answers, which may guess too.
    """
    more = "answer, the answer that is corrected, " if answers else ""
    group.add_argument(
        "--draft",
        metavar="|".join([*(["answer"] if answers else []), "prompt", "FORMULA"]),
        help="guess tokens, which one forward then checks, for the same texts sooner: by "
        f"{more}prompt, what followed the last tokens in the prompt or the text before, or the "
        "name of a small --model or a blend of several",
    )
    group.add_argument(
        "--draft-length",
        type=_draft_length,
        metavar="N",
        help="how many tokens --draft guesses at a time; auto, the default, is as many as pay",
    )


def _draft_length(text: str) -> int | str:
    from ..drafts import AUTO, LONGEST

    if text == AUTO or (text.isdecimal() and 1 <= int(text) <= LONGEST):
        return text if text == AUTO else int(text)
    raise argparse.ArgumentTypeError(f"{text!r} must be a number from 1 to {LONGEST}, or auto")


def add_batch_options(
    group: Any, work: str = "prompts are worked on", *, chats: bool = True
) -> None:
    """The options of commands that read many prompts, or pairs, and write a line for each.

    Args:
        work: what is done with how many of them at a time.
        chats: whether a text may be sent as a chat.
    """
    if chats:
        chat = group.add_mutually_exclusive_group()
        chat.add_argument("--chat", action="store_true", default=None, help=CHAT)
        chat.add_argument(
            "--no-chat",
            action="store_false",
            dest="chat",
            default=None,
            help="send texts as they are, which the models go on with",
        )
    group.add_argument(
        "--batch-size",
        type=positive,
        metavar="N",
        default=8,
        help=f"how many {work} at a time (default: %(default)s)",
    )
    group.add_argument("--output", metavar="FILE", help="where results go; by default to stdout")
    group.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="KEY",
        help="copy what a line of the input has under KEY to its result, as is done with id and "
        "metadata; may be given several times",
    )


def add_resume_option(group: Any) -> None:
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with the file of --output: keep its lines and write those that it lacks",
    )


def positive(text: str) -> int:
    """The type of an option that is a whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return value


def number(text: str) -> float:
    """The type of an option that is a finite number of at least 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of at least 0")
    return value
