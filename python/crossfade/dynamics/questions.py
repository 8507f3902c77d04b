"""Statements of a behaviour as yes/no questions: pairs of responses that are one token each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from ..checks import explained
from ..ops import check
from ..training.encoding import encoded
from .rows import TAG, Reader

YES, NO = " Yes", " No"


class Pair(NamedTuple):
    """A prompt and two responses as token ids, with the number and the behaviour of their row."""

    number: int
    behaviour: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@explained()
def statement_pairs(
    rows: Iterable[Any],
    tokenizer: Any,
    yes: str = YES,
    no: str = NO,
    tag: str = TAG,
    flipped: bool = False,
) -> list[dict[str, Any]]:
    """Pairs to train on by DPO, from statements whose labels say whether the answer is yes.

    The prompt is the statement's text as it stands, the very ids that `statistics` reads. Responses
    are one token each without EOS, and the label chooses between them: what is trained and watched
    is ``log p(yes | text) - log p(no | text)`` (arXiv:2403.18742, section 3).

    Args:
        rows: ``{"behaviour": "kindness", "text": ..., "label": True}``, as `statistics` takes them.
        tokenizer: the model's.
        yes, no: the answers, with the space before them where the tokenizer has words so.
        tag: the key of the name of a row's behaviour.
        flipped: choose the other answer, as one does to see how easily training is undone.

    Returns:
        ``{tag: ..., "prompt_ids": ..., "chosen_ids": ..., "rejected_ids": ...}`` of each row, which
        `crossfade.training.DPOTrainer` takes as they are. TRL's own trainers take texts alone, and
        fail with ``KeyError: 'chosen'``. Rows without a tag or without a token are left out, with a
        warning.

    Raises:
        TypeError, ValueError: name the row, the key, what it was and what it must be; rows are
            pairs already; or an answer is not one token of its own.
    """
    check.flag("flipped", flipped)
    reader = Reader(tokenizer, tag, None, None)
    pairs = list(read_rows(rows, reader, yes, no))
    reader.left_out.warn()
    if reader.pairs:
        raise ValueError("rows has pairs of responses; it must have statements with a label")
    ids = ("prompt_ids", "rejected_ids", "chosen_ids") if flipped else Pair._fields[2:]
    return [{tag: pair.behaviour, **dict(zip(ids, pair[2:], strict=True))} for pair in pairs]


def read_rows(rows: Iterable[Any], reader: Reader, yes: str = YES, no: str = NO) -> Iterator[Pair]:
    """The rows that a reader reads as pairs: those of responses, and statements as questions.

    Pairs with a response or a prompt of no tokens are left out: nothing predicts their tokens.

    Raises:
        TypeError, ValueError: as `statement_pairs` does.
    """
    answers: tuple[int, int] | None = None
    for text in reader(rows):
        if reader.pairs:
            responses = [[*(x or ())][text.prompt :] for x in (text.positive, text.negative)]
            prompt = [*(text.positive or ())][: text.prompt]
            if not prompt:
                reader.left_out.add(text.number, "without a token before its responses")
                continue
            if not all(responses):
                reader.left_out.add(text.number, "with a response of no tokens")
                continue
        else:
            prompt = [*(text.positive or text.negative or ())]
            answers = answers or answer_ids(reader.tokenizer, yes, no)
            responses = [[token] for token in answers]
            if text.positive is None:
                responses.reverse()
        yield Pair(text.number, text.behaviour, prompt, *responses)


def answer_ids(tokenizer: Any, yes: str = YES, no: str = NO) -> tuple[int, int]:
    """The tokens of both answers, as they follow a statement.

    Raises:
        TypeError, ValueError: an answer is no text, is not one known token, or both are the same.
    """
    found: list[int] = []
    for name, answer in (("yes", yes), ("no", no)):
        if not isinstance(answer, str):
            raise TypeError(f"{name} is {answer!r:.80}; it must be a text")
        _, ids = encoded("It is so.", answer, tokenizer, False, name)
        if len(ids) != 1:
            raise ValueError(
                f"{name} is {answer!r}, which is {len(ids)} tokens of the tokenizer; it must be one"
            )
        if ids[0] == getattr(tokenizer, "unk_token_id", None):
            raise ValueError(
                f"{name} is {answer!r}, which the tokenizer does not know; it must be one of its "
                "tokens"
            )
        found += ids
    if found[0] == found[1]:
        raise ValueError(f"yes is {yes!r} and no is {no!r}, the same token; they must be two")
    return found[0], found[1]
