"""Training data from a reward: a base writes responses, and a reward scores them.

`rollouts` samples responses and scores them, into a file that an interrupted run goes on with. From
its rows `pairs` makes rows for preference losses, and `values` rows for value heads. They hold
texts for people, and the ids that were sampled for trainers: a text that is encoded again may give
other ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import reading
from ..blends.blend import as_blend
from ..bulk import records
from ..bulk.decode import decode
from ..checks import check_number
from ..decoding import Output
from ..identity import run_id
from ..progress import progress_bar
from .processes import get_logger

# Arguments of `generate` that do not change what the rows hold.
WITHOUT_EFFECT = {
    *("engine", "streamer", "kl_to", "return_kl_to_base", "return_term_logprobs", "return_pushes"),
    "return_cache",
}
RewardFn = Callable[[list[Any], list[str]], Sequence[float]]
# Why rows leave responses out, as what is logged says it.
REASONS = {
    "failed": "failed, and have no tokens",
    "cut": "were cut by a limit before they ended",
    "tied": "have the same reward as the other of their pair",
    "close": "have a reward within the margin of the other's",
    "spare": "have no partner, or their prompt has its pairs",
    "empty": "are empty, or their partner is",
    "same": "are the same text as their partner",
    "equal": "are of prompts that have no response rated worse than the best",
}
logger = get_logger(__name__)


def rollouts(
    blend: Any,
    prompts: Sequence[Any],
    rewards: Mapping[str, RewardFn],
    output: str | Path,
    *,
    n: int = 4,
    seed: int = 0,
    batch_size: int = 32,
    **generation: Any,
) -> list[dict[str, Any]]:
    """Sample n responses to each prompt and score them. A prompt is a line of the file `output`.

    The noise of a prompt depends on `seed` and the prompt's index alone, so its responses depend
    neither on the other prompts nor on `batch_size`. If the file is of a run with the same settings
    and models, this run goes on with it: an interrupted run loses no more than what was being
    decoded, and a file that is complete costs nothing. No other run can write the file meanwhile.

    Args:
        blend: what writes the responses, a model or a blend.
        prompts: texts or chats.
        rewards: by name, ``fn(prompts, responses) -> scores``, as `cf.Reward` takes them. A run
            knows a reward by its name alone: a function that has changed needs another name or
            another file.
        output: the ``.jsonl`` file.
        n: how many responses each prompt gets.
        seed: of all sampling.
        batch_size: how many rows are decoded at a time.
        generation: arguments of `cf.generate`. Responses are sampled unless `do_sample` is False.

    Returns:
        A row for each prompt, in order, with ``index``, ``prompt``, ``run`` (see
        `crossfade.identity`), ``prompt_ids`` (as the first term of the blend reads the prompt) and
        ``responses``. Each response has ``text``, ``ids`` (with EOS), ``finished`` (False if a
        limit cut it) and ``rewards`` by name. A prompt that was too long for a model has responses
        without ids, after a warning that names it.

    Raises:
        ValueError: the file holds something else, and is left as it is; n is not positive; a reward
            gives a number that is not finite, or not one for each response.
        TypeError: a reward is not a function; a prompt is not JSON; an argument holds something
            that cannot be compared between processes.
        BlockingIOError: another run is writing the file.
    """
    _check_positive("n", n)
    for name, fn in rewards.items():
        if not callable(fn):
            raise TypeError(f"rewards[{name!r}] is a {type(fn).__name__}; it must be a function")
    for key, instead in (("num_return_sequences", "n"), ("max_batch", "batch_size")):
        if key in generation:
            raise ValueError(f"{key} is given; it must be {instead}")
    mixed = as_blend(blend)
    generation = {"do_sample": True, **generation}
    prompts, path = list(prompts), Path(output)
    decisive = {key: x for key, x in generation.items() if key not in WITHOUT_EFFECT}
    with records.Results(path, resume=True) as results:
        run = run_id(blend=mixed, seed=seed, n=n, rewards=sorted(rewards), generation=decisive)
        have = results.begin(prompts, run)
        unscored: list[tuple[int, Output]] = []

        def write() -> None:
            """Score what has ended, as many responses at a time as are decoded."""
            now = list(unscored)
            unscored.clear()  # What is being scored at an interrupt is not scored again.
            for record in _scored(prompts, now, rewards) if now else ():
                results.write({**record, "run": run})

        with progress_bar((len(prompts) - len(have)) * n, "response") as bar:
            try:
                for i, out in decode(
                    mixed,
                    prompts,
                    seed=seed,
                    skip=have,
                    max_batch=batch_size,
                    progress=bar.update,
                    num_return_sequences=n,
                    **generation,
                ):
                    unscored.append((i, out))
                    if len(unscored) * n >= batch_size:
                        write()
            except KeyboardInterrupt:
                write()
                raise
            write()
        results.finish()
    return sorted(read_jsonl(path), key=lambda row: row["index"])


def _scored(
    prompts: Sequence[Any], unscored: Sequence[tuple[int, Output]], rewards: Mapping[str, RewardFn]
) -> list[dict[str, Any]]:
    """The rows of some prompts, whose responses are scored together."""
    asked = [prompts[i] for i, out in unscored for _ in out.lengths]
    texts = [text for _, out in unscored for text in out.text or ()]
    scores = {name: _scores(name, fn(asked, texts), len(texts)) for name, fn in rewards.items()}
    each = {name: iter(of) for name, of in scores.items()}
    return [
        {
            "index": i,
            "prompt": prompts[i],
            "prompt_ids": out.sequences[0, : out.prompt_length].tolist(),
            "responses": [
                {
                    "text": text,
                    "ids": ids,
                    "finished": finished,
                    "rewards": {name: next(of) for name, of in each.items()},
                }
                for text, ids, finished in zip(
                    out.text or (), out.responses, out.finished.tolist(), strict=True
                )
            ],
        }
        for i, out in unscored
    ]


def _scores(name: str, scores: Any, count: int) -> list[float]:
    given = scores.tolist() if hasattr(scores, "tolist") else scores
    if not isinstance(given, Iterable):
        raise TypeError(f"reward {name!r} gave {given!r:.80}; it must give {count} numbers")
    found = [
        check_number(f"score {i} of reward {name!r}", x.item() if hasattr(x, "item") else x)
        for i, x in enumerate(given)
    ]
    if len(found) != count:
        raise ValueError(f"reward {name!r} gave {len(found)} scores; it must give {count}")
    return found


class Rows(list[dict[str, Any]]):
    """Rows of training data, and what became of the responses that they were made of.

    Attributes:
        responses: how many responses there were.
        left_out: how many of them are in no row, for each reason: "failed" (without tokens), and
            in `pairs` "cut" (a limit cut them), "tied" (the other of their pair has the same
            reward), "close" (the rewards differ by no more than the margin) and "spare" (no partner
            was left, or their prompt had its `per_prompt` pairs); in `rated_pairs` "equal" (their
            prompt has no response that is rated worse than the best) and "spare" (their prompt has
            its pair). `REASONS` says what each is.
    """

    def __init__(
        self, rows: Iterable[dict[str, Any]], responses: int, left_out: Mapping[str, int]
    ) -> None:
        super().__init__(rows)
        self.responses, self.left_out = responses, dict(left_out)

    def summary(self) -> str:
        """What is left out and why, as a sentence."""
        parts = [f"{count} {REASONS[why]}" for why, count in self.left_out.items() if count]
        left = sum(self.left_out.values())
        used = f"{self.responses - left} of {self.responses} responses are in {len(self)} rows"
        return f"{used}; of the others, {', '.join(parts)}" if parts else used


def pairs(
    rows: Sequence[Mapping[str, Any]], reward: str, *, margin: float = 0.0, per_prompt: int = 1
) -> Rows:
    """Pairs of responses to the same prompt whose rewards differ by more than `margin`.

    The best response is paired with the worst, the second best with the second worst, and so on. No
    response is in two pairs. Responses that a limit cut are left out, because their end was not the
    model's choice. How many are left out for which reason is in `Rows.left_out`, and is logged
    where responses failed, were cut or tied.

    Args:
        rows: as `rollouts` gives them.
        reward: the name of the reward to compare by.
        margin: by how much the better reward must be larger, 0 or more.
        per_prompt: how many pairs a prompt gives at most.

    Returns:
        A list of rows with ``prompt, chosen, rejected`` in TRL's format (lists of messages if the
        prompt is a chat), ``prompt_ids, chosen_ids, rejected_ids``, and ``chosen_reward,
        rejected_reward``: what `DPOTrainer` takes.

    Raises:
        ValueError: the rows do not have the reward, `margin` is below 0, or `per_prompt` is not
            positive.
        TypeError: a row is not as `rollouts` gives it; `margin` is not a number.
    """
    _check_positive("per_prompt", per_prompt)
    if check_number("margin", margin) < 0:
        raise ValueError(f"margin is {margin}; it must be 0 or more")
    found: list[dict[str, Any]] = []
    count, left_out = 0, Counter(failed=0, cut=0, tied=0, close=0, spare=0)
    for row, responses in _rewarded(rows, reward):
        count += len(responses)
        whole = [(score, r) for score, r in responses if r["finished"] and r["ids"]]
        left_out["failed"] += sum(not r["ids"] for _, r in responses)
        left_out["cut"] += sum(not r["finished"] for _, r in responses if r["ids"])
        left_out["spare"] += len(whole) % 2
        ranked = sorted(whole, key=lambda x: x[0], reverse=True)
        couples = list(zip(ranked, reversed(ranked), strict=True))[: len(ranked) // 2]
        for k, ((high, best), (low, worst)) in enumerate(couples):
            if high - low <= margin:
                left_out["close" if high > low else "tied"] += 2
            elif k >= per_prompt:
                left_out["spare"] += 2
            else:
                found.append(
                    {
                        "prompt": row["prompt"],
                        "chosen": message(row["prompt"], best["text"]),
                        "rejected": message(row["prompt"], worst["text"]),
                        "prompt_ids": row["prompt_ids"],
                        "chosen_ids": best["ids"],
                        "rejected_ids": worst["ids"],
                        "chosen_reward": high,
                        "rejected_reward": low,
                    }
                )
    made = Rows(found, count, left_out)
    if any(left_out[why] for why in ("failed", "cut", "tied")):
        logger.warning("pairs by %s: %s", reward, made.summary())
    return made


def values(rows: Sequence[Mapping[str, Any]], reward: str) -> Rows:
    """A row for each response, as `ValueTrainer` takes them.

    Responses that failed, and so have no tokens, are left out. How many there are is in
    `Rows.left_out`, and is logged. Those that a limit cut are there, with ``finished`` False:
    `ValueConfig.unfinished` says what becomes of them.

    Args:
        rows: as `rollouts` gives them.
        reward: the name of the reward to learn.

    Returns:
        A list of rows with ``prompt, completion``, ``prompt_ids, completion_ids``, ``reward`` and
        ``finished``.

    Raises:
        ValueError: the rows do not have the reward.
        TypeError: a row is not as `rollouts` gives it.
    """
    scored = [(row, x) for row, responses in _rewarded(rows, reward) for x in responses]
    found = [
        {
            "prompt": row["prompt"],
            "completion": message(row["prompt"], r["text"]),
            "prompt_ids": row["prompt_ids"],
            "completion_ids": r["ids"],
            "reward": score,
            "finished": r["finished"],
        }
        for row, (score, r) in scored
        if r["ids"]
    ]
    made = Rows(found, len(scored), {"failed": len(scored) - len(found)})
    if made.left_out["failed"]:
        logger.warning("values by %s: %s", reward, made.summary())
    return made


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return reading.parse_json_lines(reading.read_text(path).split("\n"), str(path))


def _check_positive(name: str, x: Any) -> None:
    if isinstance(x, bool) or not isinstance(x, int) or x < 1:
        raise ValueError(f"{name} is {x!r}; it must be an int of at least 1")


def _rewarded(
    rows: Sequence[Mapping[str, Any]], reward: str
) -> Iterator[tuple[Mapping[str, Any], list[tuple[float, Mapping[str, Any]]]]]:
    """Each row of `rollouts`, with its responses and the reward of each."""
    for i, row in enumerate(rows):
        name = f"row {i} of rows"
        check_keys(row, name, {"prompt": (str, list), "prompt_ids": (list,), "responses": (list,)})
        scored = []
        for k, response in enumerate(row["responses"]):
            place = f"responses[{k}] of {name}"
            check_keys(response, place, RESPONSE)
            if reward not in response["rewards"]:
                raise ValueError(
                    f"reward is {reward!r}; it must be one of {sorted(response['rewards'])}, which "
                    f"{place} has"
                )
            score = check_number(f"reward {reward!r} of {place}", response["rewards"][reward])
            scored.append((score, response))
        yield row, scored


RESPONSE = {"text": (str,), "ids": (list,), "finished": (bool,), "rewards": (dict,)}


def check_keys(row: Any, name: str, keys: Mapping[str, tuple[type, ...]]) -> None:
    """Require that a row has keys, each with a value of one of its types."""
    if not isinstance(row, Mapping):
        raise TypeError(f"{name} is {row!r:.80}; it must be a mapping, as rollouts gives")
    for key, kinds in keys.items():
        if not isinstance(row.get(key), kinds):
            found = f"{row[key]!r:.80}" if key in row else "missing"
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise TypeError(f"{key} of {name} is {found}; it must be a {wanted}")


def message(prompt: Any, text: str) -> Any:
    """A response in the form of its prompt: a text, or a list of one message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
