"""Rows of behaviours as token ids: statements with a label, and pairs of responses with a tag."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ..checks import warn
from ..decoding.forms import Ids
from ..decoding.inputs import encode
from ..training.encoding import encoded
from ..training.rows import LONGEST, check_ids

TAG = "behaviour"
OF_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
OF_TEXTS = ("prompt", "chosen", "rejected")


class Texts(NamedTuple):
    """What is read of a row: a text on the side that its label says, or one on each side.

    `prompt` is how many of the first tokens are the prompt's: all of a statement.
    """

    number: int
    behaviour: str
    positive: Ids | None
    negative: Ids | None
    prompt: int


class LeftOut:
    """Rows that say nothing of a behaviour, for each reason; they are warned of together."""

    def __init__(self) -> None:
        self.rows: dict[str, list[int]] = {}

    def add(self, index: int, why: str) -> None:
        self.rows.setdefault(why, []).append(index)

    def warn(self) -> None:
        for why, rows in self.rows.items():
            if len(rows) == 1:
                warn(f"row {rows[0]} of rows is {why}; it is left out")
            else:
                warn(f"{len(rows)} rows are {why}, the first is row {rows[0]}; they are left out")


class Reader:
    """Reads rows one after another.

    Attributes:
        left_out: the rows that are passed over.
        taken: how many rows were taken.
        pairs: whether rows are pairs of responses; None before the first.

    Args:
        tag: the key of the name of a row's behaviour.
        vocabulary: ids must be below it; None: it is not known.
        context: the most tokens that a text may have; None: any number.
    """

    def __init__(self, tokenizer: Any, tag: str, vocabulary: int | None, context: int | None):
        self.tokenizer, self.tag = tokenizer, tag
        self.vocabulary, self.context = vocabulary or LONGEST, context
        self.left_out = LeftOut()
        self.taken = 0
        self.pairs: bool | None = None
        # what a tokenizer puts around a text of nothing
        self.empty = [] if tokenizer is None else encode("", tokenizer, "model")

    def __call__(self, rows: Iterable[Any]) -> Iterator[Texts]:
        """The texts of those rows that have some.

        Raises:
            TypeError, ValueError: name the row, the key, what it was and what it must be.
        """
        for i, row in enumerate(rows):
            self.taken += 1
            where = f"row {i} of rows"
            behaviour = behaviour_of(row, self.tag, where)
            if behaviour is None:
                self.left_out.add(i, f"without a {self.tag!r}")
                continue
            pairs = self.pairs = is_pair(row, where, self.pairs)
            positive, negative, prompt = (
                self._pair(row, where) if pairs else self._statement(row, where)
            )
            found = [x for x in (positive, negative) if x is not None]
            if not all(found):
                self.left_out.add(i, "without a token to read")
            elif self.context is not None and max(map(len, found)) > self.context:
                self.left_out.add(i, f"with more tokens than the model's context, {self.context}")
            else:
                yield Texts(i, behaviour, positive, negative, prompt)

    def _statement(self, row: Mapping[str, Any], where: str) -> tuple[Ids | None, Ids | None, int]:
        ids = encode(row["text"], self.tokenizer, where)
        if ids == self.empty:
            ids = []
        else:
            self._check(ids, f"text of {where}", False)
        return (ids, None, len(ids)) if row["label"] else (None, ids, len(ids))

    def _pair(self, row: Mapping[str, Any], where: str) -> tuple[Ids, Ids, int]:
        """Both responses after their prompt, as trainers encode them."""
        are_ids = "chosen_ids" in row
        names = OF_IDS if are_ids else OF_TEXTS
        prompt, *responses = (row[name] for name in names) if are_ids else texts_of(row, where)
        found: list[list[int]] = []
        for name, response in zip(names[1:], responses, strict=True):
            if are_ids:
                before = _list(prompt)
                whole = [*before, *_list(response)]
            else:
                has_eos = getattr(self.tokenizer, "eos_token_id", None) is not None
                before, after = encoded(prompt, response, self.tokenizer, has_eos, where)
                whole = before + after
            if whole:
                self._check(whole, f"{name} of {where}", are_ids)
            found.append(whole)
        return found[0], found[1], len(before)

    def _check(self, ids: list[int], name: str, given: bool) -> None:
        """Require that the model knows ids, which were given or come from the tokenizer."""
        if not given and max(ids) >= self.vocabulary:
            raise ValueError(
                f"{name} has id {max(ids)} once it is encoded: the tokenizer has "
                f"{len(self.tokenizer)} tokens and the model {self.vocabulary}; they must be of "
                "one model"
            )
        check_ids(ids, name, self.vocabulary)


def sides(rows: Iterable[Any], tag: str) -> dict[str, set[bool]]:
    """Check rows without reading their texts; the labels that each behaviour has texts of.

    Raises:
        TypeError, ValueError: name the row, the key, what it was and what it must be.
    """
    found: dict[str, set[bool]] = {}
    pairs: bool | None = None
    for i, row in enumerate(rows):
        where = f"row {i} of rows"
        behaviour = behaviour_of(row, tag, where)
        if behaviour is not None:
            pairs = is_pair(row, where, pairs)
            of = found.setdefault(behaviour, set())
            of |= {True, False} if pairs else {bool(row["label"])}
    return found


def is_pair(row: Mapping[str, Any], where: str, first: bool | None) -> bool:
    """Whether a row is a pair of responses, as the `first` is; it has what it must have then."""
    pairs = "chosen" in row or "chosen_ids" in row
    if first is not None and first is not pairs:
        kinds = ("a statement", "a pair of responses")
        raise ValueError(
            f"{where} is {kinds[pairs]}, and the first is {kinds[not pairs]}; all must be of one "
            "kind"
        )
    if pairs:
        names = OF_IDS if "chosen_ids" in row else OF_TEXTS
        for name in names:
            if row.get(name) is None and (name in row or name != "prompt"):
                there = "is None" if name in row else "is missing"
                raise ValueError(f"{name} of {where} {there}; it must have {', '.join(names)}")
        if names is OF_TEXTS:
            texts_of(row, where)
        return True
    for name in ("text", "label"):
        if name not in row:
            raise ValueError(
                f"{name} of {where} is missing; its keys are {', '.join(map(str, row))}; it must "
                f"have text and label, or {', '.join(OF_TEXTS)}"
            )
    text, label = row["text"], row["label"]
    if not isinstance(text, str):
        raise TypeError(
            f"text of {where} is {text!r:.80}; it must be a text (or give prompt, chosen and "
            "rejected)"
        )
    if not isinstance(label, (bool, int)) or label not in (0, 1):
        raise TypeError(
            f"label of {where} is {label!r:.80}; it must be a bool (true or false in JSON)"
        )
    return False


def texts_of(row: Mapping[str, Any], where: str) -> tuple[Any, Any, Any]:
    """The prompt of a pair of texts or chats, and both responses to it.

    Without a prompt it is what both begin with, as for TRL's `maybe_extract_prompt`. So it is where
    the prompt is a text and the responses are whole conversations whose first message of the user
    is that text, as in UltraFeedback.

    Raises:
        ValueError: they begin with nothing in common, or their prompt is another one.
    """
    texts: list[Any] = [row.get(name) for name in OF_TEXTS]
    prompt, chosen, rejected = texts
    responses = {"chosen": chosen, "rejected": rejected}
    if "prompt" in row:
        # one message alone is a response to the prompt
        whole = {k: x for k, x in responses.items() if isinstance(x, (list, tuple)) and len(x) > 1}
        if not isinstance(prompt, str) or not whole:
            return prompt, chosen, rejected
        for name, chat in whole.items():
            first = next(
                (m for m in chat if isinstance(m, Mapping) and m.get("role") == "user"), {}
            )
            if len(whole) < 2 or first.get("content") != prompt:
                raise ValueError(
                    f"prompt of {where} is a text, and {name} is {len(chat)} messages; unless "
                    "both responses begin with it as a message of the user, drop prompt, or give "
                    "what follows it as chosen and rejected"
                )
    for name, x in responses.items():
        if not isinstance(x, (str, list, tuple)) or type(x) is not type(chosen):
            raise TypeError(
                f"{name} of {where} is {x!r:.80}; without a prompt, chosen and rejected must be "
                "texts or lists of messages that begin with it"
            )
    shared = min(len(chosen), len(rejected)) - 1  # where they are the same, all but the last
    for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)):
        if a != b:
            shared = i - (i > 0 and chosen[i - 1] == " ")  # the space is the response's
            break
    if shared < 1:
        raise ValueError(
            f"prompt of {where} is missing, and chosen and rejected begin with nothing in common; "
            f"it must have {', '.join(OF_TEXTS)}"
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def behaviour_of(row: Any, tag: str, where: str) -> str | None:
    """The name of a row's behaviour, or None if it has none."""
    if not isinstance(row, Mapping):
        raise TypeError(f"{where} is a {type(row).__name__}; it must be a mapping")
    behaviour = row.get(tag)
    if behaviour is not None and not isinstance(behaviour, str):
        raise TypeError(f"{tag} of {where} is {behaviour!r:.80}; it must be a text")
    return behaviour or None


def _list(ids: Any) -> list[Any]:
    return list(ids.tolist() if hasattr(ids, "tolist") else ids)
