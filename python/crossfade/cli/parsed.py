"""What the options of several commands say, once they are parsed: checked, and loaded."""

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
