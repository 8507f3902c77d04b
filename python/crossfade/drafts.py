"""What guesses the next tokens for `generate`: the settings of speculative decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from . import elsewhere
from .blends.blend import Blend, as_blend
from .checks import did_you_mean, explained

PROMPT, ANSWER, AUTO = "prompt", "answer", "auto"
LONGEST = 64  # tokens that one round may check

DraftText = str | Sequence[int] | None


@explained(elsewhere.DRAFT)
@dataclass(frozen=True, eq=False)
class Draft:
    """Something cheap that guesses tokens, which all models of a blend then check in one forward.

    The tokens are those of decoding without it: at each position the blend draws with the noise
    that it draws with anyhow, and goes on in the same forward as long as it draws what was guessed.
    (Daliri et al., arXiv:2408.07978: a coupling by common randomness.) In float32 they are the same
    but for near ties; in bfloat16 they are draws from the same blend.

    Args:
        source: ``"prompt"``: what follows the last tokens elsewhere, in the prompts or in what was
            written. Or a `Model`, a Hugging Face model or a `Blend` of the same vocabulary, which
            draws with the same noise, temperature and truncation, without logits processors. A
            model that is a term of the blend, and shares its forward with no other, is run once
            for both. Rows that fill the context of one that is none go on without guesses. In
            `crossfade.correct` also ``"answer"``: the answer that is edited.
        texts: in the place of `source`, a text or token ids for each request, which the response is
            likely to repeat with changes, and None where there is none. After a change the text is
            found again where it goes on.
        length: how many tokens are guessed at a time, 1 to 64. ``"auto"``: as many as pay, by what
            rounds have cost and yielded so far, down to none.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.

    Example::

        cf.generate(blend, prompts, draft=cf.Draft("prompt"))
        cf.generate(blend, prompts, draft=cf.Draft(small))
        cf.generate(blend, prompts, draft=cf.Draft(texts=answers))
    """

    source: Any = None
    _: KW_ONLY
    texts: Sequence[DraftText] | None = None
    length: int | str = AUTO

    def __post_init__(self) -> None:
        if (self.source is None) == (self.texts is None):
            both = "source and texts are both given" if self.texts is not None else "it has neither"
            raise ValueError(
                f"a Draft has a source ('prompt', a Model or a Blend) or texts; {both}"
            )
        if self.texts is not None:
            self._check_texts()
        elif isinstance(self.source, str):
            if self.source not in (PROMPT, ANSWER):
                meant = did_you_mean(self.source, [PROMPT])
                raise ValueError(
                    f"draft.source is {self.source!r:.80}; it must be 'prompt', a Model or a Blend "
                    f"(and texts are given as texts=[...]){meant}"
                )
        else:
            _ = self.blend  # Its error names what the source is.
        n = self.length
        if n == AUTO:
            return
        if isinstance(n, bool) or not isinstance(n, int):
            raise TypeError(f"draft.length is {n!r}; it must be an int or 'auto'")
        if not 1 <= n <= LONGEST:
            raise ValueError(f"draft.length is {n}; it must be within [1, {LONGEST}], or 'auto'")

    @property
    def blend(self) -> Blend | None:
        """What draws guesses; None where they are looked up in texts."""
        if self.source is None or isinstance(self.source, str):
            return None
        found = as_blend(self.source, "draft.source")
        if found.classifiers:
            raise NotImplementedError(
                f"draft.source is {found}; classifiers read texts, which guesses are not"
            )
        return found

    def _check_texts(self) -> None:
        texts: Any = self.texts
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise TypeError(
                f"draft.texts is a {type(texts).__name__}; it must be a list with a text, token "
                "ids or None for each request"
            )


def check_draft(draft: Any, *, simple: bool = False) -> None:
    """Refuse what is no `Draft`, and one where the engine is `simple`.

    Raises:
        TypeError, ValueError: names the argument.
    """
    if draft is None:
        return
    if not isinstance(draft, Draft):
        raise TypeError(
            f"draft is a {type(draft).__name__}; it must be a crossfade.Draft, such as "
            "Draft('prompt'), Draft(model) or Draft(texts=[...])"
        )
    if draft.source == ANSWER:
        raise ValueError(
            "draft.source is 'answer', which crossfade.correct alone has; Draft(texts=[...]) takes "
            "texts that responses edit"
        )
    if simple:
        raise ValueError("engine is simple, which reads a token at a time; leave draft out")


def speedup(acceptance: float, length: int, check: float = 1.0, guess: float = 0.0) -> float:
    """How many times as fast as plain decoding a draft is: the tokens of a round over its time in
    plain steps, ``(1 + acceptance length) / (check + length guess)``.

    Args:
        acceptance: the share of guesses that are drawn, `Output.stats.acceptance`. Where each is
            with a chance of a, if those before it were, it is ``(a + ... + a^length) / length``
            (Leviathan et al., arXiv:2211.17192).
        length: guesses at a time.
        check: the time of a forward that reads ``length + 1`` tokens of each row, in plain steps:
            ``stats.step_seconds[length + 1] / stats.step_seconds[1]``.
        guess: the time that making a guess takes, in plain steps; nothing where texts draft.
    """
    return (1.0 + acceptance * length) / (check + length * guess)


def acceptance_needed(length: int, check: float = 1.0, guess: float = 0.0) -> float:
    """The acceptance from which on a draft is as fast as plain decoding, ``(check - 1) / length +
    guess``; above 1 it never is.

    Args:
        length, check, guess: as of `speedup`.
    """
    return (check - 1.0) / length + guess
