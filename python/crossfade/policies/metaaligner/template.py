"""What an aligner reads: a query, an answer, and the objectives to edit the answer toward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...checks import explained
from ...decoding.inputs import encode
from ...decoding.writing import tokens_after
from ...reading import check_unicode
from ..turns import quoted, turns
from .objectives import heading, resolve

END = " | Edit: "  # what every prompt ends in
GOALS = {"better": "improve it", "equal": "make it equal"}


@explained()
@dataclass(frozen=True)
class AlignerTemplate:
    """The form of an aligner's prompt, the same in training and in use.

    It is plain text, which no chat template wraps, and it ends in a space::

        You are an assistant to human. You will be provided with a context and an answer. Consider
        the context, then edit the answer to improve it considering these aspects: Brevity: The
        response should be short | Context: How was it? | Answer: It was long. | Edit:

    (in one line). The tokens of the prompt and of the edited answer are made apart, by
    `encode_prompt` and `encode_answer`, and joined: together, "Edit: Hello" would be other tokens.

    Args:
        noun: what the query is called: "context", as in the paper's prompts for HH-RLHF, or
            "query", as in those for UltraFeedback.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.

    Source: MetaAligner (Yang et al., arXiv:2403.17141), appendix C.2.
    """

    noun: str = "context"

    def __post_init__(self) -> None:
        if not isinstance(self.noun, str):
            raise TypeError(f"noun is {self.noun!r:.80}; it must be a text, such as 'query'")
        check_unicode(self.noun, "noun")
        if not self.noun or self.noun != self.noun.strip():
            raise ValueError(
                f"noun is {self.noun!r:.80}; it must be a word without white space around it, such "
                "as 'query'"
            )

    def prompt(self, query: Any, answer: str, objectives: Any, goal: str = "better") -> str:
        """The very text that an aligner reads.

        Args:
            query: the text or chat that was answered. A chat is written as `query_text` does.
            answer: what to edit, as it is, with any white space around it.
            objectives: descriptions by name, as `resolve` gives them, or anything that it takes.
                They are written in their order, as "Name: description".
            goal: "better", or "equal" for an answer that is as good.

        Raises:
            TypeError, ValueError: names the argument, what it was and what it must be.
        """
        if goal not in GOALS:
            raise ValueError(f"goal is {goal!r:.80}; it must be 'better' or 'equal'")
        if not isinstance(answer, str):
            raise TypeError(f"answer is {answer!r:.80}; it must be a text")
        if not answer.strip():
            raise ValueError(f"answer is {answer!r:.80}; it must not be empty")
        check_unicode(answer, "answer")
        aspects = "; ".join(f"{heading(name)}: {x}" for name, x in resolve(objectives).items())
        noun = self.noun
        return (
            f"You are an assistant to human. You will be provided with a {noun} and an answer. "
            f"Consider the {noun}, then edit the answer to {GOALS[goal]} considering these "
            f"aspects: {aspects} | {heading(noun)}: {query_text(query)} | Answer: {answer}{END}"
        )


def query_text(query: Any, name: str = "query") -> str:
    """A query as prompts write it; `name` is what errors call it.

    A text, or a chat that is one message of the user's, is its bare text. Another chat has a line
    for each turn, which begins with the role: "User: ...", "Assistant: ...", "System: ...".

    Raises:
        TypeError, ValueError: it is neither a text nor a chat, or has half of a surrogate pair.
    """
    found = turns(name, query)
    for _, said in found:
        check_unicode(said, name)
    if len(found) == 1 and found[0][0] == "User":
        return found[0][1]
    return "\n".join(f"{role}: {said}" for role, said in found)


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens of a prompt, as `crossfade.generate` reads that text: with a BOS, where the
    tokenizer puts one before texts. No special token stands in it: see `quoted`."""
    return encode(quoted(prompt, tokenizer), tokenizer, "the aligner")


def encode_answer(tokenizer: Any, answer: str, *, finished: bool = False) -> list[int]:
    """The tokens of an edited answer, which follow those of any prompt as they are.

    They depend on the answer alone. After the tokens of a prompt they read as the answer, whatever
    a tokenizer does with the space that the prompt ends in: most make a token of it, and an answer
    then begins without a space; some leave it out, and then it is the answer's first token that has
    it. No special token stands in the answer: see `quoted`.

    Args:
        finished: whether EOS follows. It does not after an answer that a limit cut.

    Raises:
        ValueError: it is finished, and the tokenizer has no EOS.
    """
    return encode_answers(tokenizer, [answer], [finished])[0]


def encode_answers(
    tokenizer: Any, answers: Sequence[str], finished: Sequence[bool]
) -> list[list[int]]:
    """The tokens of several answers, as `encode_answer` gives them."""
    eos: Any = getattr(tokenizer, "eos_token_id", None)
    if any(finished) and eos is None:
        raise ValueError("tokenizer has no EOS, which follows a finished answer; set its eos_token")
    spelled = [quoted(answer, tokenizer) for answer in answers]
    found = tokens_after(tokenizer, [END] * len(answers), spelled)
    ends = [[eos] if end else [] for end in finished]
    return [[*ids, *end] for ids, end in zip(found, ends, strict=True)]
