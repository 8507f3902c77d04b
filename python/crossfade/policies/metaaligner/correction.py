"""`crossfade.correct`: answers to queries, edited toward objectives, round after round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ... import elsewhere
from ...blends.algebra import Algebra
from ...checks import explained
from ...decoding.call import Seed, seeds_and_streams
from ...decoding.forms import is_chat
from ...decoding.settings import check_int
from ...drafts import ANSWER, Draft, check_draft
from ...reading import check_unicode
from ...search import Recipe
from .aligner import MetaAligner
from .corrections import Corrections
from .rounds import Rounds

# Arguments of `generate` that a correction has no use for, and what to say of them.
REFUSED = {
    "tokenizer": "the texts are encoded by the aligner's: MetaAligner(model, tokenizer)",
    "attention_mask": "queries are texts or chats",
    "cache": "the prompts of each round are new",
    "return_cache": "the prompts of each round are new",
    "return_dict_in_generate": "corrections are an Output; Output.sequences has the tensor",
}


@explained(elsewhere.CORRECT)
def correct(
    aligner: MetaAligner,
    queries: Any,
    answers_or_policy: Any,
    objectives: Any,
    *,
    rounds: int = 1,
    search: Any = None,
    draft: Any = None,
    accept: Any = None,
    seed: Seed = None,
    policy_generation: Mapping[str, Any] | None = None,
    **generation: Any,
) -> Corrections:
    """Let an aligner edit answers toward objectives.

    Of a query q and its answer y, a round draws ``y' ~ aligner(prompt(q, y, objectives))``, up to
    EOS; the next one edits y'. All queries of a round are one batch, whatever their objectives. A
    search, `accept` and `kl_to` work as in `generate`: values read the query as their prompt and
    the correction as the response, never the aligner's prompt, and a reference of `kl_to` reads
    what the aligner reads.

    A row fails whose query or answer is empty, whose prompt is longer than a model's context, or
    for which the aligner writes nothing. A RuntimeWarning names it, its answer stands as it was,
    and the others are corrected. After Ctrl-C, what stood before stands, with the corrections that
    had ended, and `stats.interrupted` is set.

    Args:
        aligner: a `MetaAligner`.
        queries: what was answered: n texts or chats, or one.
        answers_or_policy: n texts, from anywhere. Or a policy, which answers the queries first: a
            `Model`, a `Blend`, a `Recipe` or a bare causal LM. It reads them as `generate` does, so
            that a model that was tuned to chat needs chats. If it has no tokenizer, its tokens are
            those of the aligner's. White space around its answers is left out.
        objectives: one set for all queries: a name, ``{name: description}``, or a list of names,
            in which such mappings may stand. Or a list without a name in it: a set for each query.
            `MetaAligner.objectives` has the names that are known.
        rounds: how often each answer is edited. A round before the last goes on with one
            correction of each query, the best of a search.
        search: how rows are chosen by a value, as in `generate`.
        draft: what guesses tokens, as in `generate`, for the same corrections sooner: ``"answer"``,
            which in each round is the answer that it edits, or a `Draft`, also
            ``Draft("answer", length=8)``. A model that guesses reads what the aligner reads.
        accept: a value, as searches take them: a correction stands only where its value is higher
            than that of the answer which it edits. Both are scored as texts that have ended.
        seed: as in `generate`, whose tokens the first round's are. Later rounds and the policy draw
            by seeds made of it.
        policy_generation: the arguments of `generate` by which a policy writes. Where it does not
            say `max_new_tokens` or `max_batch`, those of the corrections count.
        generation: the arguments of `generate` by which corrections are written. A `streamer` is
            told of the last round.

    Returns:
        `Corrections`, an `Output` with the answers and the texts of each round. Its `stats` are of
        all rounds together, the policy's work included.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be, before any
            work.
        NotImplementedError: names what is not supported.

    Source: MetaAligner (Yang et al., arXiv:2403.17141).
    """
    if not isinstance(aligner, MetaAligner):
        raise TypeError(
            f"aligner is a {type(aligner).__name__}; it must be a MetaAligner: "
            "correct(MetaAligner(model, tokenizer), queries, answers, objectives)"
        )
    draft = _draft(draft)
    if rounds is None:
        raise TypeError("rounds is None; it must be an int")
    check_int("rounds", rounds, 1)
    for name, says in REFUSED.items():
        if generation.get(name) is not None:
            raise NotImplementedError(f"{name} is not supported by crossfade.correct; {says}")
    work = Rounds(aligner, _queries(queries), objectives, draft)
    policy = answers_or_policy
    is_policy = isinstance(policy, (Algebra, nn.Module, Recipe))
    if policy_generation is not None and not is_policy:
        raise ValueError("policy_generation is given, and answers are given too, not a policy")
    given = [] if is_policy else _answers(policy, len(work.items))
    seeds_and_streams(seed, len(work.items), 1, False, torch.device("cpu"))
    if accept is not None:
        work.take_value(accept)
    if is_policy or rounds > 1:  # Else the only call checks all that there is.
        work.check_last(search, seed, generation)
    work.refuse_empty("query", work.queries)
    if is_policy:
        work.write_answers(policy, seed, policy_generation, generation)
    else:
        work.take_answers(given)
    work.run(rounds, search, seed, generation)
    return work.corrections()


def _draft(draft: Any) -> Draft | None:
    """What guesses the tokens of corrections."""
    if isinstance(draft, str):
        if draft != ANSWER:
            raise ValueError(
                f"draft is {draft!r:.80}; it must be 'answer', or a crossfade.Draft such as "
                "Draft('prompt')"
            )
        return Draft(ANSWER)
    if not isinstance(draft, Draft) or draft.source != ANSWER:
        check_draft(draft)
    return draft


def _queries(queries: Any) -> list[Any]:
    queries = _listed(queries)
    if isinstance(queries, str) or is_chat(queries):
        return [queries]
    if not isinstance(queries, Sequence) or isinstance(queries, (bytes, bytearray)):
        alone = isinstance(queries, Mapping) and "role" in queries
        raise TypeError(
            f"queries is a {type(queries).__name__}; it must be a list of texts or chats, or one"
            + ("; a message alone is no chat; pass a list: [message]" if alone else "")
        )
    if not queries:
        raise ValueError("queries is empty; it must have at least one")
    return list(queries)


def _answers(answers: Any, n: int) -> list[str]:
    answers = _listed(answers)
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(answers, Sequence) or isinstance(answers, (bytes, bytearray)):
        raise TypeError(
            f"answers_or_policy is a {type(answers).__name__}; it must be a list of texts, one for "
            "each query, or a policy: a Model, a Blend or a causal LM"
        )
    for i, answer in enumerate(answers):
        if not isinstance(answer, str):
            raise TypeError(f"answers_or_policy[{i}] is {answer!r:.80}; it must be a text")
        check_unicode(answer, f"answers_or_policy[{i}]")
    if len(answers) != n:
        raise ValueError(
            f"answers_or_policy has {len(answers)} answers; it must have {n}, one for each query"
        )
    return list(answers)


def _listed(x: Any) -> Any:
    """Arrays and columns of tables as the lists that they hold."""
    return x.tolist() if hasattr(x, "tolist") else x
