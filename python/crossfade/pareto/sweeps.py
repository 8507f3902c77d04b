"""`sweep`: methods that follow weightings of rewards, decoded at many weightings and measured."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from importlib import metadata
from typing import Any

from torch import nn

from .. import elsewhere
from ..blends.algebra import Algebra
from ..blends.blend import as_blend
from ..blends.values import as_value
from ..bulk import decode as bulk
from ..bulk.records import number, seed_of
from ..checks import explained, warn
from ..decoding.forms import is_chat
from ..decoding.output import Output
from ..decoding.settings import Sampling, check_int
from ..identity import run_id, run_ids
from ..ops import check
from ..progress import progress_bar
from ..reading import check_unicode
from ..search import Recipe
from .fronts import Front
from .joining import FORMS, Asked, asked, joined
from .ledger import Ledger
from .points import PERPLEXITY, Points, failed
from .weightings import KL, key, objectives, said, weightings

# Arguments of `generate` that a sweep has no use for, and what to say of them.
REFUSED = {
    "search": "a method gives it: lambda w: crossfade.Recipe(blend, search)",
    "streamer": "all texts are written in one loop",
    "cache": "all texts are written in one loop",
    "return_cache": "all texts are written in one loop",
    "attention_mask": "prompts are texts or chats",
    "return_term_logprobs": "a Front has no log-probs of terms",
    "return_pushes": "a Front has no pushes of terms",
    "return_kl_to_base": "the reference is given as kl_to",
    "return_dict_in_generate": "a sweep gives a Front",
    "max_time": "texts would depend on the time",
}
RUNNING = ("max_batch", "engine")  # arguments that change no text
EACH = (*(f.name for f in fields(Sampling)), "max_new_tokens")  # may be lists, one a request


@explained(elsewhere.GENERATE)
def sweep(
    methods: Mapping[str, Callable[[dict[str, float]], Any]],
    prompts: Sequence[Any],
    rewards: Mapping[str, Any],
    *,
    weights: Any = 11,
    seed: int = 0,
    path: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **generation: Any,
) -> Front:
    """Let methods answer prompts at many weightings of rewards, and measure what they write.

    A method is called with each weighting, a dict of a number for each reward, and gives what
    writes the texts there. The weightings of a method that run the same models are decoded in one
    loop, in which each request has the weights, the mix of adapters, the prompt and the weights of
    values of its own; others, such as merged models, one after the other. All draw with the same
    random numbers: a text depends on its blend, its prompt and the prompt's place alone.

    After Ctrl-C, the front has the points that were finished, and `Front.interrupted` is set. A
    reward that raises or gives NaN at a point is named by a RuntimeWarning, the point has None for
    it, and the rest of the sweep goes on; it is an error if it raises at the first point that it
    ever scores.

    Args:
        methods: for each name a function of a weighting that gives a `Model`, a `Blend`, a bare
            causal LM, or a `Recipe`; or a dict of arguments of `generate` with the `blend` among
            them; or a function ``write(prompts, seed=seeds, **generation)`` that writes the texts
            itself and gives an `Output`, or a list with a text for each prompt.
        prompts: texts or chats.
        rewards: for each name a function ``fn(prompts, responses) -> scores``, or another value
            that scores texts: a `Reward`, a `RewardModel`, a `LogRatio`. More is better.
        weights: n for the simplex grid of steps ``1 / (n - 1)``, or a list of weightings: mappings
            of the rewards' names to any numbers, where names left out count 0. They may have "kl"
            too, the weight of staying near `kl_to`; then the negative divergence from it is one
            more reward.
        seed: of all draws; prompt i draws by a seed that is made of it and i.
        path: a file of JSON lines, to which each text goes as soon as it is written, and the scores
            of each point. If it exists, the sweep goes on from what it has: it must be of the same
            prompts, settings and models. Methods, weightings and rewards may be added or left out,
            and a reward that has changed scores anew.
        progress: whether to show a bar on stderr.
        generation: the arguments of `generate`, one for all texts: `max_new_tokens`, `do_sample`,
            `temperature`, `num_return_sequences`, `max_batch` and so on. With `kl_to`, a `Model` or
            a blend, points have the divergence from it and the perplexity under it.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be; or the method
            and the weighting at which it failed. What was written by then is in `path`.
        NotImplementedError: names what is not supported.
    """
    work = Sweep(methods, prompts, rewards, weights, seed, generation)
    check.flag("progress", progress)
    settings = {} if path is None else work.settings()
    with Ledger(path, settings) as ledger:
        return work.run(ledger, progress)


class Sweep:
    """The arguments of `sweep`, checked, and the work itself."""

    def __init__(
        self,
        methods: Any,
        prompts: Any,
        rewards: Any,
        weights: Any,
        seed: Any,
        generation: Mapping[str, Any],
    ) -> None:
        for name, says in REFUSED.items():
            if generation.get(name) is not None and generation[name] is not False:
                raise NotImplementedError(f"{name} is not supported by crossfade.pareto; {says}")
        for name in EACH:
            if getattr(generation.get(name), "shape", None) or isinstance(
                generation.get(name), (list, tuple)
            ):
                raise TypeError(
                    f"{name} is {generation[name]!r:.80}; in a sweep it must be one for all texts"
                )
        if seed is None:
            raise TypeError("seed is None; it must be an int")
        check_int("seed", seed, 0, 2**64 - 1)
        self.methods = _methods(methods)
        self.prompts = _prompts(prompts)
        self.generation, self.seed = dict(generation), seed
        if not isinstance(rewards, Mapping) or not rewards:
            raise TypeError(
                f"rewards is {rewards!r:.80}; it must be a mapping of names to functions, such as "
                "{'brevity': lambda prompts, responses: [-len(text) for text in responses]}"
            )
        for name in rewards:
            if not isinstance(name, str) or not name or (name == KL and "kl_to" in generation):
                raise ValueError(f"rewards has the name {name!r}; it must be another text")
        self.values = {n: as_value(x, f"rewards[{n!r}]") for n, x in rewards.items()}
        self.weightings = weightings(weights, list(rewards))
        self.names = objectives(self.weightings, list(rewards))
        if len(self.names) > len(rewards) and generation.get("kl_to") is None:
            raise ValueError('weights have "kl", and kl_to is not given')
        self.reference = generation.get("kl_to")
        if self.reference is not None:
            self.reference = as_blend(self.reference, "kl_to")
        self.seeds = [seed_of(seed, i) for i in range(len(self.prompts))]
        self.points = Points(self.prompts, self.values, self.names, self.reference, generation)

    def settings(self) -> dict[str, Any]:
        """What the texts depend on besides the blends, as JSON, for a file of texts.

        The rewards get their hashes too, by which a file says which ones have scored.
        """
        shown = {"crossfade": metadata.version("crossfade"), "seed": self.seed}
        for name, x in self.generation.items():
            if name not in RUNNING:
                shown[name] = x if _is_json(x) else run_id(**{name: x})
        for name, value in self.values.items():
            self.points.ids[name] = run_id(**{f"rewards[{name!r}]": value})
        self.points.ids[PERPLEXITY] = shown.get("kl_to")
        return {**shown, "prompts": self.prompts}

    def run(self, ledger: Ledger, progress: bool) -> Front:
        """Write, score and put together."""
        self.ledger = self.points.ledger = ledger
        interrupted = False
        total = len(self.methods) * len(self.weightings)
        with progress_bar(total * len(self.prompts) if progress else 1, "text") as self.bar:
            try:
                for name in self.methods:
                    for parts in self._groups(name):
                        self._write(name, parts)
            except KeyboardInterrupt:
                interrupted = True
        found = self.points.found
        if interrupted:
            warn(f"interrupted when {len(found)} of {total} points were done", RuntimeWarning)
        places = [(name, key(weights)) for name in self.methods for weights in self.weightings]
        each = [found[place] for place in places if place in found]
        points, texts, scores = ([*x] for x in zip(*each, strict=True)) if each else ([], [], [])
        shown = {"seed": self.seed}
        shown |= {n: x if _is_json(x) else str(x) for n, x in self.generation.items()}
        return Front(self.names, self.prompts, points, texts, scores, shown, interrupted)

    def _groups(self, name: str) -> Iterator[list[tuple[dict[str, float], Asked, str]]]:
        """The weightings of a method that go in one call, with what each asks and its hash.

        A method is called when its turn comes, so that of merged models two are there at a time.
        """
        group: list[tuple[dict[str, float], Asked]] = []
        for weights in self.weightings:
            try:
                own = asked(self.methods[name](dict(weights)))
            except Exception as error:  # It may raise whatever it likes.
                raise failed(error, f"methods[{name!r}] at {said(weights)}") from error
            if group and joined([*(x for _, x in group), own], self.prompts) is None:
                yield self._with_ids(name, group)
                group = []
            group.append((weights, own))
        yield self._with_ids(name, group)

    def _with_ids(
        self, name: str, group: Sequence[tuple[dict[str, float], Asked]]
    ) -> list[tuple[dict[str, float], Asked, str]]:
        ids = [""] * len(group)
        if self.ledger.path is not None:
            ids = run_ids({f"methods[{name!r}]": x} for _, x in group)
        return [(weights, x, own) for (weights, x), own in zip(group, ids, strict=True)]

    def _write(self, name: str, parts: Sequence[tuple[dict[str, float], Asked, str]]) -> None:
        """Write the texts of some weightings that are missing, and score each that is complete."""
        n = len(self.prompts)
        lines: list[dict[int, Any]] = [{} for _ in parts]
        for own, (weights, _, run) in zip(lines, parts, strict=True):
            for i in range(n):
                line = self.ledger.text(name, weights, i, run)
                if line is not None:
                    own[i] = line
            self.bar.update(len(own))
            if len(own) == n:
                self.points.finish(name, weights, own)
        done = {k * n + i for k, own in enumerate(lines) for i in own}
        if len(done) == n * len(parts):
            return
        whole = joined([x for _, x, _ in parts], self.prompts)
        assert whole is not None
        where = f"methods[{name!r}]"
        for place, line in self._written(where, whole, len(parts), done):
            k, i = divmod(place, n)
            weights, _, run = parts[k]
            if i in lines[k]:
                continue
            record = {"method": name, "weights": weights, "prompt": i, **line, "run": run}
            self.ledger.write(record)
            lines[k][i] = record
            self.bar.update()
            if len(lines[k]) == n:
                self.points.finish(name, weights, lines[k])

    def _written(
        self, where: str, whole: Asked, parts: int, done: set[int]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """What is written of each request that is not done."""
        if whole.writer is not None:
            try:
                lines = self._by_writer(whole.writer)
            except Exception as error:  # It may raise whatever it likes.
                raise failed(error, where) from error
            yield from enumerate(lines)
            return
        blend: Any = whole.blend
        try:
            for place, out in bulk.decode(
                blend if whole.search is None else Recipe(blend, whole.search),
                self.prompts * parts,
                seed=self.seeds * parts,
                skip=done,
                **{**self.generation, **whole.options},
            ):
                line = _line(out, range(len(out.lengths)))
                yield place, {**line, "ids": out.responses}
        except (TypeError, ValueError, NotImplementedError) as error:
            raise failed(error, where) from error

    def _by_writer(self, writer: Callable[..., Any]) -> list[dict[str, Any]]:
        out = writer(self.prompts, seed=self.seeds, **self.generation)
        n = len(self.prompts)
        if isinstance(out, Output):
            if out.stats.interrupted:
                raise KeyboardInterrupt
            each, more = divmod(len(out.lengths), n)
            if more == 0:
                return [_line(out, range(i * each, (i + 1) * each)) for i in range(n)]
            raise ValueError(f"it wrote {len(out.lengths)} texts; it must be some for each prompt")
        if not isinstance(out, Sequence) or isinstance(out, str):
            raise TypeError(
                f"it gave a {type(out).__name__}; it must be an Output or a list of texts"
            )
        if len(out) != n:
            raise ValueError(f"it gave {len(out)} texts; it must be {n}, one a prompt")
        for i, text in enumerate(out):
            if not isinstance(text, str):
                raise TypeError(f"text {i} is {text!r:.80}; it must be a text")
            check_unicode(text, f"text {i}")
        return [{"texts": [text], "ids": None, "failed": [False], "kl": None} for text in out]


def _line(out: Output, rows: range) -> dict[str, Any]:
    """What a file keeps of the texts to one prompt."""
    if out.text is None:
        raise ValueError("tokenizer is None; texts need one: Model(..., tokenizer=...)")
    kl = None if out.kl is None else out.kl.sum(dim=1).tolist()
    return {
        "texts": [out.text[r] for r in rows],
        "ids": None,  # of a writer's texts, which need not be what its model wrote last
        "failed": [bool(out.failed[r]) for r in rows],
        "kl": None if kl is None else [number(kl[r]) for r in rows],
    }


def _methods(methods: Any) -> dict[str, Callable[[dict[str, float]], Any]]:
    if not isinstance(methods, Mapping) or not methods:
        raise TypeError(
            f"methods is {methods!r:.80}; it must be a mapping of names to functions of weights, "
            "such as {'blend': lambda w: base + w['kind'] * (kind - base)}"
        )
    for name, method in methods.items():
        if not isinstance(name, str) or not name.strip():
            raise TypeError(f"methods has the name {name!r:.80}; it must be a text")
        check_unicode(name, "the name of a method")
        if isinstance(method, (Algebra, nn.Module, Recipe, type)) or not callable(method):
            raise TypeError(
                f"methods[{name!r}] is a {type(method).__name__}; it must be a function of a "
                f"weighting: {FORMS}"
            )
    return dict(methods)


def _prompts(prompts: Any) -> list[Any]:
    prompts = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    if isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Sequence) or is_chat(prompts):
        raise TypeError(f"prompts is {prompts!r:.80}; it must be a list of texts or chats")
    if not prompts:
        raise ValueError("prompts is empty; it must have one at least")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str) and not is_chat(prompt):
            raise TypeError(f"prompts[{i}] is {prompt!r:.80}; it must be a text or a chat")
        check_unicode(prompt, f"prompts[{i}]")
    return list(prompts)


def _is_json(x: Any) -> bool:
    """Whether JSON gives this back as it is."""
    if isinstance(x, Mapping):
        return all(isinstance(k, str) and _is_json(y) for k, y in x.items())
    if isinstance(x, list):
        return all(map(_is_json, x))
    if isinstance(x, float):
        return math.isfinite(x)
    return x is None or type(x) in (bool, int, str)
