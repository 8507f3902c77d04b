"""``crossfade chat``: a conversation with a blend, whose faders move while it goes on."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import options, parsed
from .conversation import Conversation

if TYPE_CHECKING:
    from collections.abc import Callable

HELP = "Talk to a blend of models, and move its faders while you do."
USAGE = "--model [NAME=]PATH ... [options]"
COMMANDS = """\
/w                  show the faders
/w NAME NUMBER      move a fader: from the next answer on
/again              answer the last message once more, as the faders stand now
/undo               take back the last message and its answer
/reset              begin a new conversation
/system [TEXT]      set the system prompt, or remove it
/seed NUMBER        draw other answers
/save FILE          write the conversation to FILE, as --prompts reads it
/help               show this
/quit               leave; so does Ctrl-D, and Ctrl-C ends an answer
"""
EXAMPLES = f"""\
A message is a line; one that ends in \\ goes on in the next. Lines that begin
with / are commands:

{COMMANDS}
Answers go to stdout and all else to stderr, so that messages can come from a
file:
  crossfade chat --model smollm2 < messages.txt > answers.txt

example:
  crossfade chat --model base=smollm2 --model kind=smollm2@sentiment \\
      --blend "base + w * (kind - base)" --fader w=0
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    options.add_blend_options(parser)
    options.add_sampling_options(parser, max_new_tokens=512)


def run(arguments: argparse.Namespace) -> int:
    writing = parsed.writing(arguments)
    if sys.stdin is None:
        raise ValueError("stdin is closed; messages must come from there")
    plan = parsed.plan_of(arguments)
    plan.check()
    conversation = Conversation(parsed.load(arguments, plan), arguments.seed, writing)
    talk = _Talk(conversation)
    interactive = _interactive()
    say(f"{conversation}  (/help shows the commands, /quit leaves)")
    status = 0
    while (message := read(interactive)) is not None:
        try:
            if not talk.take(message):
                break
        except BrokenPipeError:  # Nobody reads the answers any more.
            raise
        except (ValueError, TypeError, OSError) as error:  # A mistake does not end the chat.
            say(f"error: {error}")
            status = 0 if interactive else 2
        except KeyboardInterrupt:
            if not interactive:
                raise
            say("interrupted: the conversation is as it was before")
        if conversation.interrupted and not interactive:
            raise KeyboardInterrupt
    return status


def read(interactive: bool) -> str | None:
    """A message from stdin, without what is around it; None at its end.

    Args:
        interactive: whether it is typed at a terminal, where Ctrl-C begins it anew.
    """
    lines: list[str] = []
    while True:
        try:
            line = ask("... " if lines else "> ") if interactive else sys.stdin.readline()
        except EOFError:
            say("")
            return None
        except KeyboardInterrupt:
            if not interactive:
                raise
            say("\n(/quit or Ctrl-D leaves)")
            lines = []
            continue
        if not line and not interactive:
            return "\n".join(lines).strip() or None
        lines.append(line.rstrip("\n"))
        if lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            continue
        return "\n".join(lines).strip()


def ask(prompt: str) -> str:
    """A line that is typed at the terminal. `input` would put the prompt among the answers.

    Raises:
        EOFError: after Ctrl-D.
    """
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def say(text: str) -> None:
    """Say something that is no answer."""
    print(text, file=sys.stderr, flush=True)


def _interactive() -> bool:
    """Whether messages are typed at a terminal. If not, they are read as UTF-8."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (with it, input() has a history)
        return True
    if isinstance(sys.stdin, io.TextIOWrapper):  # as files are read, whatever the locale says
        sys.stdin.reconfigure(encoding="utf-8-sig")
    return False


class _Talk:
    """What messages and commands do to a conversation."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.commands: dict[str, Callable[[str], object]] = {
            "/w": self.fader,
            "/again": lambda _: self.conversation.again(),
            "/undo": lambda _: self.conversation.undo(),
            "/reset": lambda _: self.conversation.reset(),
            "/system": self.system,
            "/seed": self.seed,
            "/save": self.save,
            "/help": lambda _: say(COMMANDS.rstrip()),
        }

    def take(self, message: str) -> bool:
        """Do what a message asks for. False ends the chat."""
        from ..checks import did_you_mean

        name, _, rest = message.partition(" ")
        if name in ("/quit", "/exit"):
            return False
        if not message:
            return True
        if not message.startswith("/"):
            self.conversation.answer(message)
        elif name in self.commands:
            self.commands[name](rest.strip())
        else:
            meant = did_you_mean(name, [*self.commands, "/quit"])
            raise ValueError(f"there is no command {name}{meant or '; /help shows them'}")
        return True

    def fader(self, text: str) -> None:
        faders = self.conversation.faders
        if text:
            name, _, number = text.replace("=", " ").partition(" ")
            try:
                position = float(number)
            except ValueError:
                raise ValueError(f"/w {text}: it must be /w NAME NUMBER") from None
            self.conversation.move(name, position)
        for name, position in faders.items():
            say(f"{name} = {position:g}")
        if not faders:
            say("the formula has no faders: give --blend a name that is no model, and --fader")

    def system(self, text: str) -> None:
        self.conversation.set_system(text or None)

    def seed(self, text: str) -> None:
        if not text.isdecimal() or len(text) > 20 or int(text) >= 2**64:
            raise ValueError(f"/seed {text}: it must be a whole number below 2**64")
        self.conversation.seed = int(text)

    def save(self, text: str) -> None:
        if not text:
            raise ValueError("/save needs the name of a file")
        parsed.check_file("/save", text)
        if Path(text).exists():
            raise FileExistsError(f"/save {text}: it exists; name another file")
        line = json.dumps({"messages": self.conversation.messages}, ensure_ascii=False)
        Path(text).write_text(f"{line}\n", encoding="utf-8")
