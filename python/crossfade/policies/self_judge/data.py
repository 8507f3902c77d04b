"""Training rows of a model that answers and judges: judge-augmented supervised fine-tuning."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ... import reading
from ...checks import did_you_mean
from ...decoding.writing import tokens_after
from ...training.data import Rows
from ...training.encoding import content_of, encoded
from ...training.rows import LONGEST, check_ids
from .template import JudgeTemplate, as_template, check_chats, encode_prompt

SFT = ("chosen", None)


def jsft_rows(
    pairs: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    template: Any = "hh",
    *,
    principles: Any = None,
    sft: Any = "chosen",
) -> Rows:
    """Rows that teach a model to answer and to judge (judge-augmented supervised fine-tuning).

    Each pair gives two judgments, so that no label is the better one more often: (chosen, rejected)
    with the first label and (rejected, chosen) with the second. A judgment's completion is the one
    token of its label, without EOS. Where the pair has a `rationale`, this follows the label, and
    EOS follows the rationale. Then there are the rows of `sft`.

    Args:
        pairs: each with `prompt`, `chosen` and `rejected`, texts or chats in TRL's format. Ids
            beside them (`prompt_ids, chosen_ids, rejected_ids`) are what an SFT row has, as they
            are; of texts, a response ends with EOS unless `chosen_finished` is False, where a
            limit cut it. `principle` is the name of the aspect that was judged, None the template's
            own question. `rationale` says why; ``{chosen}`` and ``{rejected}`` in it stand for the
            labels.
        tokenizer: has a chat template.
        template: "hh", "ultrafeedback", a `JudgeTemplate` or a mapping of its fields.
        principles: the principles that pairs may name, see `JudgeTemplate.phrases`; None: all that
            the template has.
        sft: "chosen" gives a row for each different chosen response; None none. Or rows with
            `prompt` and `completion`, or their ids, which may have `finished`.

    Returns:
        Rows with `prompt_ids`, `completion_ids` and `judge`, which says whether it is a judgment;
        `JSFTTrainer` takes them. Of pairs whose answers are empty or the same text there are no
        judgments: `Rows.left_out` counts them. The order is that of `pairs`, then of `sft`; nothing
        of the caller's is changed.

    Raises:
        TypeError, ValueError: names the row or the argument, what it was and what it must be.

    Source: SELF-JUDGE (Lee et al., arXiv:2402.11253), section 3.1.
    """
    form = as_template(template)
    check_chats(tokenizer)
    phrases = form.phrases(form.principles or None if principles is None else principles)
    phrases = {None: form.principle, **phrases}
    if isinstance(sft, (str, type(None))) and sft not in SFT:
        raise ValueError(f"sft is {sft!r}; it must be 'chosen', None, or a list of rows")
    found: list[dict[str, Any]] = []
    supervised: dict[tuple[tuple[int, ...], tuple[int, ...]], None] = {}
    left_out = Counter(dict.fromkeys(("empty", "same"), 0))

    @functools.cache
    def labels(phrase: str) -> tuple[int, int]:
        """The tokens of both labels, which stand after the same prefix in all prompts."""
        return form.label_ids(tokenizer, form.render(tokenizer, "a", "a", "b", phrase))

    for i, row in enumerate(pairs):
        pair = _pair(row, tokenizer, f"row {i} of pairs")
        if sft == "chosen":
            ids = _completion(row, "chosen", tokenizer, f"row {i} of pairs")
            supervised[tuple(ids[0]), tuple(ids[1])] = None
        answers = {pair.chosen.strip(), pair.rejected.strip()}
        if "" in answers or len(answers) == 1:
            left_out["empty" if "" in answers else "same"] += 2
            continue
        phrase = _phrase(row.get("principle"), phrases, f"row {i} of pairs")
        found += _judgments(pair, tokenizer, form, phrase, labels(phrase))
    others: Sequence[Any] = () if isinstance(sft, (str, type(None))) else sft
    for i, row in enumerate(others):
        ids = _completion(row, "completion", tokenizer, f"row {i} of sft")
        supervised[tuple(ids[0]), tuple(ids[1])] = None
    found += [
        {"prompt_ids": [*prompt], "completion_ids": [*completion], "judge": False}
        for prompt, completion in supervised
    ]
    return Rows(found, 2 * len(pairs) + len(others), left_out)


class _Pair(NamedTuple):
    """Two answers to a text or a chat, as texts."""

    prompt: Any
    chosen: str
    rejected: str
    rationale: str | None


def _judgments(
    pair: _Pair,
    tokenizer: Any,
    template: JudgeTemplate,
    phrase: str,
    labels: tuple[int, int],
) -> Iterator[dict[str, Any]]:
    """The rows of a pair's two judgments, whose `labels` are these tokens."""
    a, b = template.labels
    orders = ((pair.chosen, pair.rejected, a, b), (pair.rejected, pair.chosen, b, a))
    for place, (first, second, chosen, rejected) in enumerate(orders):
        prompt = template.render(tokenizer, pair.prompt, first, second, phrase)
        completion = [labels[place]]
        if pair.rationale is not None:
            said = pair.rationale.replace("{chosen}", chosen).replace("{rejected}", rejected)
            begun = f"{prompt} {chosen}"
            completion += tokens_after(tokenizer, [begun], [template.reason(said)])[0]
            if tokenizer.eos_token_id is not None:
                completion.append(tokenizer.eos_token_id)
        ids = encode_prompt(tokenizer, prompt)
        yield {"prompt_ids": ids, "completion_ids": completion, "judge": True}


def _pair(row: Any, tokenizer: Any, name: str) -> _Pair:
    """A row of preferences, checked, with its answers as texts."""
    if not isinstance(row, Mapping):
        raise TypeError(f"{name} is a {type(row).__name__}; it must be a mapping")
    for key in ("prompt", "chosen", "rejected"):
        if row.get(key) is None:
            says = next((s for k in row if k not in KNOWN and (s := did_you_mean(k, [key]))), "")
            raise ValueError(f"{name} has no {key}; it must have prompt, chosen and rejected{says}")
    if isinstance(row["prompt"], (list, tuple)) and not row["prompt"]:
        raise ValueError(f"prompt of {name} is empty; it must be a text or a chat")
    texts = {}
    for key in ("chosen", "rejected"):
        text = content_of(row[key], f"{key} of {name}")
        if not isinstance(text, str):
            raise TypeError(f"{key} of {name} is {text!r:.80}; it must be a text or a message")
        reading.check_unicode(text, f"{key} of {name}")
        texts[key] = text
    rationale = row.get("rationale")
    if rationale is not None and not isinstance(rationale, str):
        raise TypeError(f"rationale of {name} is {rationale!r:.80}; it must be a text or None")
    return _Pair(row["prompt"], **texts, rationale=rationale)


KNOWN = ("prompt", "chosen", "rejected", "principle", "rationale", "prompt_ids", "chosen_ids")


def _completion(
    row: Any, key: str, tokenizer: Any, name: str
) -> tuple[Sequence[int], Sequence[int]]:
    """The ids of a prompt and of the completion under `key`: those that are there, as they are."""
    if not isinstance(row, Mapping):
        raise TypeError(f"{name} is a {type(row).__name__}; it must be a mapping")
    if f"{key}_ids" in row:
        for needed in ("prompt_ids", f"{key}_ids"):
            if row.get(needed) is None:
                raise ValueError(f"{name} has no {needed}; it must have both, or texts alone")
        return (
            check_ids(row["prompt_ids"], f"prompt_ids of {name}", LONGEST),
            check_ids(row[f"{key}_ids"], f"{key}_ids of {name}", LONGEST),
        )
    for needed in ("prompt", key):
        if row.get(needed) is None:
            raise ValueError(f"{name} has no {needed}; it must have prompt and {key}")
    flag = f"{key}_finished" if key == "chosen" else "finished"
    finished = row.get(flag, True)
    if not isinstance(finished, bool):
        raise TypeError(f"{flag} of {name} is {finished!r:.80}; it must be a bool")
    return encoded(row["prompt"], row[key], tokenizer, finished, name)


def _phrase(principle: Any, phrases: Mapping[str | None, str], name: str) -> str:
    if principle in list(phrases):
        return phrases[principle]
    known = [p for p in phrases if p is not None]
    raise ValueError(
        f"principle of {name} is {principle!r:.80}; it must be among {', '.join(known) or 'none'}, "
        f"or None: principles={{name: phrase}} adds others{did_you_mean(principle, known)}"
    )
