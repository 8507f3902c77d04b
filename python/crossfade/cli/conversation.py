"""A conversation with a blend: its messages, its faders, and the cache of what was read."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..blends.blend import Blend
    from ..loading import Loaded


class Conversation:
    """Answers are printed as they are written, and what was read for one is kept for the next.

    Each answer draws by a seed that is made of `seed` and of its place in the conversation.

    Args:
        loaded: the blend, whose faders may move between answers.
        seed: what answers are drawn by.
        writing: the arguments of `generate` for all answers.

    Attributes:
        messages: the conversation so far.
        faders: where each fader stands.
        interrupted: whether Ctrl-C has cut the last answer.

    Raises:
        ValueError: a model of the blend has no chat template.
    """

    def __init__(self, loaded: Loaded, seed: int, writing: Mapping[str, Any]) -> None:
        from ..models.instruct import has_template

        self.loaded, self.seed, self.writing = loaded, seed, writing
        self.faders = dict(loaded.faders)
        self.messages: list[dict[str, str]] = []
        self.cache: Any = None
        self.interrupted = False
        self.keeps = True  # whether what was read is kept
        for name, term in loaded.terms.items():
            if not has_template(term.tokenizer):
                raise ValueError(f"{name} has no chat template, which a chat needs")

    def __str__(self) -> str:
        """The formula, and where its faders stand."""
        return ", ".join([self.loaded.formula, *(f"{n} = {w:g}" for n, w in self.faders.items())])

    def move(self, name: str, position: float) -> None:
        """Move a fader. Nothing that was read has to be read again."""
        from ..checks import check_number, did_you_mean

        if name not in self.faders:
            known = f"the faders are {', '.join(self.faders) or 'none'}"
            raise ValueError(
                f"there is no fader {name!r}; {known}{did_you_mean(name, self.faders)}"
            )
        moved = {**self.faders, name: check_number(name, position)}
        self.loaded.blend(moved)  # raises an error where the formula does not allow it
        self.faders[name] = moved[name]

    def answer(self, message: str) -> None:
        """Add a message, and print and add its answer."""
        self.messages.append({"role": "user", "content": message})
        try:
            self._write()
        except BaseException:
            self.messages.pop()
            raise

    def again(self) -> None:
        """Answer the last message once more."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise ValueError("there is no answer yet")
        last = self.messages.pop()
        try:
            self._write()
        except BaseException:
            self.messages.append(last)
            raise

    def undo(self) -> None:
        """Take back the last message and its answer."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise ValueError("there is no message to take back")
        del self.messages[-2:]

    def reset(self) -> None:
        """Begin anew, with the same system prompt."""
        self.messages = self.messages[:1] if self._system else []

    def set_system(self, text: str | None) -> None:
        """Set the system prompt, or remove it."""
        rest = self.messages[1:] if self._system else self.messages
        self.messages = [*([{"role": "system", "content": text}] if text else []), *rest]

    @property
    def _system(self) -> bool:
        return bool(self.messages) and self.messages[0]["role"] == "system"

    def _write(self) -> None:
        """Print the answer to the last message, and add it. An interrupt ends it."""
        import torch

        # As tensors no weight is left out, whatever it is, so that the cache is always of the same
        # terms.
        positions = {name: torch.tensor([x]) for name, x in self.faders.items()}
        blend = self.loaded.blend(positions)
        try:
            out = self._generate(blend)
        except NotImplementedError:
            if not self.keeps:
                raise
            self.keeps, self.cache = False, None  # The engine does not know one of the models.
            out = self._generate(blend)
        sys.stdout.write("\n")
        sys.stdout.flush()
        if bool(out.failed[0]):
            raise ValueError("there is no answer; /undo or /reset makes the conversation shorter")
        self.interrupted = out.stats.interrupted
        if self.interrupted and not out.text[0]:
            raise KeyboardInterrupt
        self.cache = self.cache if out.cache is None else out.cache  # An interrupt leaves none.
        self.messages.append({"role": "assistant", "content": out.text[0]})

    def _generate(self, blend: Blend) -> Any:
        from ..bulk.records import seed_of
        from ..decoding import generate
        from .streaming import Printer

        turn = sum(m["role"] == "assistant" for m in self.messages)
        kept = {"return_cache": True, "cache": self.cache} if self.keeps else {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "interrupted when")
            return generate(
                blend,
                [self.messages],
                seed=[seed_of(self.seed, turn)],
                streamer=Printer(blend.terms[0].tokenizer, chat=True),
                **kept,
                **self.writing,
            )
