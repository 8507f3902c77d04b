"""What several commands share: options for models and batches, and checks of what is given."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..blends.blend import Blend
    from ..bulk.prompts import Line
    from ..loading import Loaded, Plan

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


def draft_formula(
    arguments: argparse.Namespace, words: Collection[str] = ("prompt",)
) -> str | None:
    """The formula of --draft; None if there is none, or if it is a word that needs no model."""
    draft = getattr(arguments, "draft", None)
    if draft is None and getattr(arguments, "draft_length", None) is not None:
        raise ValueError("--draft-length is given without --draft, which says what guesses")
    if draft not in words:
        return draft
    if any(text.startswith(f"{draft}=") for text in arguments.model):
        raise ValueError(f"--draft is {draft!r}, and a --model has that name; give it another one")
    return None


def draft_of(arguments: argparse.Namespace, loaded: Loaded) -> Any | None:
    """What guesses tokens, as `generate` takes it; None if nothing does."""
    from ..drafts import AUTO, Draft

    if arguments.draft is None:
        return None
    length = arguments.draft_length or AUTO
    return Draft(arguments.draft if loaded.draft is None else loaded.draft, length=length)


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


def writing(arguments: argparse.Namespace, *, draws: bool = False) -> dict[str, Any]:
    """The arguments of `generate` that `add_sampling_options` names, checked.

    Args:
        draws: whether something else that is asked for needs texts to be drawn.
    """
    from ..bulk.settings import SAMPLING, check_setting

    given: dict[str, Any] = {}
    for name in ("max_new_tokens", "seed", *SAMPLING, "stop"):
        if getattr(arguments, name) is not None:
            with option_errors(name):
                given[name] = check_setting(name, getattr(arguments, name))
    drawn = [name for name in SAMPLING if name in given]
    if arguments.greedy and drawn:
        option = "--" + drawn[0].replace("_", "-")
        raise ValueError(
            f"--greedy and {option} are both given; {option} is for draws, which --greedy is not"
        )
    if arguments.greedy or arguments.sample or drawn or draws:
        given["do_sample"] = not arguments.greedy
    del given["seed"]
    return {"stop_strings" if name == "stop" else name: x for name, x in given.items()}


@contextmanager
def option_errors(name: str) -> Iterator[None]:
    """Let errors about a setting name its option: ``temperature is -1`` by --temperature."""
    try:
        yield
    except (TypeError, ValueError) as error:
        option = "--" + name.replace("_", "-")
        raise type(error)(str(error).replace(name, option, 1)) from None


def plan_of(arguments: argparse.Namespace) -> Plan:
    """What the options say of models, blend and value, read but not loaded."""
    from ..loading import Plan

    return Plan.read(
        arguments.model,
        arguments.blend,
        system=getattr(arguments, "system", ()),
        fader=arguments.fader,
        value=getattr(arguments, "value", None),
        reward=getattr(arguments, "reward", ()),
        judge=getattr(arguments, "judge", None),
        tilt=getattr(arguments, "tilt", None),
        draft=draft_formula(arguments),
    )


def load(arguments: argparse.Namespace, plan: Plan) -> Loaded:
    """What a plan names, loaded where the options say."""
    quiet()
    return plan.load(device_of(arguments.device), arguments.dtype)


def check_chat(arguments: argparse.Namespace) -> None:
    """Refuse --no-chat where a system prompt makes prompts chats."""
    if arguments.chat is False and arguments.system:
        raise ValueError("--no-chat and --system are both given; a system prompt needs a chat")


def check_keep(arguments: argparse.Namespace, own: Collection[str]) -> None:
    """Refuse a --keep that results have themselves."""
    for key in arguments.keep:
        if key in own:
            raise ValueError(f"--keep is {key!r}, which results have themselves; rename that key")


def check_lines(arguments: argparse.Namespace, lines: Sequence[Line], plan: Plan) -> None:
    """Check the formulas with the faders of each line, and refuse a line for chats by --no-chat."""
    known: set[tuple[Any, ...]] = set()
    for i, line in enumerate(lines):
        if arguments.chat is False and "system" in line.settings:
            raise ValueError(f'--no-chat is given, and prompt {i} has a "system", for chats')
        weights = line.settings.get("weights", {})
        key = tuple(sorted(weights.items()))
        if key in known:
            continue
        known.add(key)
        try:
            plan.check(weights)
        except ValueError as error:
            if not weights:
                raise
            raise ValueError(f"prompt {i}: {error}") from None


def sends_chats(
    arguments: argparse.Namespace, loaded: Loaded, blend: Blend, lines: Sequence[Line]
) -> bool:
    """Whether texts are sent as chats: as the options say, or else if the blend answers chats.

    Where the options do not say it, and there are texts, a note says what is done.
    """
    if arguments.chat is not None or arguments.system:
        return arguments.chat is not False
    found = loaded.answers_chats(blend)
    if found and any(isinstance(x.prompt, str) and "system" not in x.settings for x in lines):
        single = len(arguments.model) == 1 and loaded.saved is None
        first = arguments.model[0] if single else blend.names[0]
        what = f"{first} is an instruct model: texts are sent as chats"
        note(arguments, f"{what} (--no-chat sends them as they are)")
    return found


def note(arguments: argparse.Namespace, text: str) -> None:
    """Say something on stderr that is no result."""
    from ..progress import print_line

    print_line(f"crossfade {arguments.command}: {text}", sys.stderr)


def device_of(name: str | None) -> str:
    """The device that was asked for, or by default a GPU if torch finds one, else the CPU."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by the kind of device
        reason = str(error).splitlines()[0]
        if name.lower().startswith(("gpu", "nvidia")):
            reason = "did you mean 'cuda'?"
        raise ValueError(f"--device is {name!r}, which torch cannot use: {reason}") from None
    return name


def quiet() -> None:
    """Turn off the progress bars of loading weights, which are over before anyone has read them."""
    from transformers.utils import logging

    logging.disable_progress_bar()
