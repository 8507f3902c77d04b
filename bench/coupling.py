"""How often a draft's token is the target's where both are drawn with the same noise.

    python bench/coupling.py --json bench/results/coupling.json    # 5 minutes

Targets are blends of SmolLM2 and its guides, or of its answers under other system prompts; drafts
are single terms. The contexts are teacher-forced: answers that the target wrote. At each of their
tokens both draw with the ops themselves, with equal seeds, streams and steps. That is compared with

- the closed form for noise on two levels (groups of 256 tokens, then the tokens of one), which it
  must match: the exit status is 1 where it is more than four standard deviations away;
- draws with noise a token over the whole row, and their closed form, which must match as well;
- the best that any coupling can do, 1 - TV, and the least that noise a token can, by Daliri et al.
  (arXiv:2408.07978): (1 - TV) / (1 + TV);
- a draft that proposes its likeliest token.

Closed forms are of the distributions after temperature and top-p, in float64. The same data give
the closed form for groups of other sizes. Random pairs, which are flat, come last.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import crossfade as cf
import torch
import torch.nn.functional as F
from crossfade import metrics, ops
from crossfade.bench import hardware
from crossfade.ops import Inputs, reference
from crossfade.ops.noise import GROUP, Noise
from reports.coupling import EACH, render
from torch import Tensor
from tqdm import tqdm

SIZES = (64, 128, 256, 512, 1024)
VOCABULARIES = (49_152, 128_256, 151_936)
SEED, NEW = 7, 20
SYSTEMS = {
    "neutral": "You are a helpful assistant.",
    "happy": "You are very happy, and praise everything that you talk about.",
    "bitter": "You are bitter, and complain about everything that you talk about.",
}
SUBJECTS = (
    *("a heist film", "a silent comedy", "a spy thriller", "a boxing drama", "a fairy tale"),
    *("the rain", "a new bicycle", "fresh bread", "the moon", "a long train ride", "old maps"),
    *("a garden in winter", "chess", "honey", "the sea at night", "a crowded market"),
)


@dataclass(frozen=True)
class Pair:
    """A target as weights of terms, and the term that drafts."""

    target: Mapping[str, float]
    draft: str
    settings: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        parts = " ".join(f"{w:+g} {term}" for term, w in self.target.items())
        settings = "".join(f", {name} {x:g}" for name, x in self.settings.items())
        return parts.removeprefix("+").removeprefix("1 ") + settings


MIX = {"sentiment": 0.5, "brevity": 0.5}
MOOD = {"neutral": 1.0, "happy": 0.8, "bitter": -0.8}
COLD = {"temperature": 0.7, "top_p": 0.9}
PAIRS = (
    Pair({"base": 0.5, "sentiment": 0.5}, "base"),
    Pair({"base": 0.5, "sentiment": 0.5}, "base", COLD),
    Pair(MIX, "base"),
    Pair(MIX, "brevity"),
    Pair(MIX, "brevity", COLD),
    Pair(MOOD, "neutral"),
    Pair(MOOD, "happy", COLD),
)
RANDOM = ((1.0, 0.25), (1.0, 1.0), (2.0, 1.0))  # scales of the target's logits, and of the noise


# ---- Closed forms --------------------------------------------------------------------------------


def one_level(p: Tensor, q: Tensor) -> Tensor:
    """Pr[equal draws] of rows `[..., V]` of probabilities under noise a token.

    It is ``sum_v 1 / sum_u max(p_u / p_v, q_u / q_v)`` over the v that both have. The maximum is
    the first where ``p_u / q_u >= p_v / q_v``, so that sums over tokens sorted by this ratio do.
    """
    order = (p.log() - q.log()).nan_to_num(0.0, torch.inf, -torch.inf).argsort(-1, descending=True)
    p, q = p.gather(-1, order), q.gather(-1, order)
    above, below = p.cumsum(-1), q.sum(-1, keepdim=True) - q.cumsum(-1)
    both = (p > 0) & (q > 0)
    return torch.where(both, 1 / (above / p + below.clamp(min=0) / q), 0.0).sum(-1)


def two_levels(p: Tensor, q: Tensor, size: int) -> Tensor:
    """The same of noise on two levels: equal groups times, in each group, equal tokens."""
    short = -p.shape[-1] % size
    p, q = (F.pad(x, (0, short)).unflatten(-1, (-1, size)) for x in (p, q))
    mass_p, mass_q = p.sum(-1), q.sum(-1)
    within = one_level(p / mass_p[..., None], q / mass_q[..., None])

    order = (mass_p.log() - mass_q.log()).nan_to_num(0.0, torch.inf, -torch.inf)
    order = order.argsort(-1, descending=True)
    mass_p, mass_q, within = (x.gather(-1, order) for x in (mass_p, mass_q, within))
    above, below = mass_p.cumsum(-1), mass_q.sum(-1, keepdim=True) - mass_q.cumsum(-1)
    both = (mass_p > 0) & (mass_q > 0)
    group = torch.where(both, 1 / (above / mass_p + below.clamp(min=0) / mass_q), 0.0)
    return torch.where(both, group * within, 0.0).sum(-1)


def noise_of_row(vocab: int, size: int | None) -> dict[str, int]:
    """How many words of noise a row needs, and how many calls of Philox, which give four.

    A row has noise for each group of `size` tokens and for the tokens of one, or if `size` is None
    for each token.
    """
    if size is None:
        return {"words": vocab, "philox": -(-vocab // 4)}
    groups = -(-vocab // size)
    return {"words": groups + size, "philox": -(-groups // 4) + size // 4}


def noise_of_rows() -> dict[str, dict[str, dict[str, int]]]:
    """The same by vocabulary and by the size of groups, last for each token."""
    sizes: dict[str, int | None] = {**{str(size): size for size in SIZES}, EACH: None}
    return {str(v): {name: noise_of_row(v, s) for name, s in sizes.items()} for v in VOCABULARIES}


# ---- Measurement ---------------------------------------------------------------------------------


def probabilities(logits: Sequence[Tensor], weights: Sequence[float], settings: Any) -> Tensor:
    """Of a blend's draws, `[rows, V]` in float64."""
    x, _ = reference.blend_scores(Inputs(list(logits), list(weights)))
    x = x / settings.get("temperature", 1.0)
    if "top_p" not in settings:
        return x.softmax(dim=-1)
    top_p = torch.full((len(x),), settings["top_p"], dtype=torch.float64)
    kept = reference.keep(x, torch.zeros(len(x), dtype=torch.int64), top_p, torch.zeros_like(top_p))
    return x.masked_fill(~kept, -torch.inf).softmax(dim=-1)


@functools.cache  # pairs are measured with the same noise
def token_noise(vocab: int, rows: int, step: int, stream: int) -> Tensor:
    """Noise for each token of rows at consecutive steps, `[rows, V]`: what groups replace."""
    groups = -(-vocab // GROUP)
    steps = torch.arange(step, step + rows).repeat_interleave(groups)
    noise = Noise(torch.full_like(steps, SEED), torch.full_like(steps, stream), steps).of_tokens(
        torch.arange(groups).repeat(rows)
    )
    return noise.view(rows, -1)[:, :vocab].float()


def measure(
    target: Sequence[Tensor],
    weights: Sequence[float],
    draft: Tensor,
    settings: Mapping[str, float],
    step: int,
    draws: int,
    flat_draws: int,
    backend: str,
) -> dict[str, Tensor]:
    """Of logits `[rows, V]` at steps that follow `step`: figures `[rows]`, by name.

    "drawn" and "drawn, flat" are shares of `draws` and `flat_draws` draws that were equal.
    """
    rows, vocab = draft.shape
    p, q = probabilities(target, weights, settings), probabilities([draft], [1.0], settings)
    tv = (p - q).abs().sum(-1) / 2
    found = {"optimum": 1 - tv, "bound": (1 - tv) / (1 + tv), "one level": one_level(p, q)}
    found |= {f"groups of {size}": two_levels(p, q, size) for size in SIZES}
    found["argmax"] = p.gather(-1, q.argmax(-1, keepdim=True))[:, 0]

    ids = {"seed": SEED, "step": torch.arange(step, step + rows)}
    equal = torch.zeros(rows)
    for stream in range(draws):
        one, other = (
            ops.blend_sample(list(z), list(w), **settings, **ids, stream=stream, backend=backend)
            for z, w in ((target, weights), ([draft], [1.0]))
        )
        equal += one.tokens == other.tokens
    found["drawn"] = equal / draws
    equal = torch.zeros(rows)
    for stream in range(flat_draws):
        noise = token_noise(vocab, rows, step, stream)
        equal += (p.log() + noise).argmax(-1) == (q.log() + noise).argmax(-1)
    found["drawn, flat"] = equal / flat_draws
    return found


def gathered(parts: Iterable[dict[str, Tensor]], draws: int, flat_draws: int) -> dict[str, Any]:
    """Means over all positions of all texts, with 95 % intervals as if positions were independent.

    Of what was drawn the interval is that of the draws alone, at these positions: its variance is
    that of the closed form. `deviations` is how many standard deviations the two are apart.
    """
    whole = {name: torch.cat(x) for name, x in _columns(parts).items()}
    count = len(whole["drawn"])
    found: dict[str, Any] = {"positions": count, "draws": draws, "flat_draws": flat_draws}
    for name, x in whole.items():
        found[name], found[f"{name}, interval"] = metrics.mean_interval(x.tolist())
    closed = {
        "drawn": (f"groups of {GROUP}", draws),
        "drawn, flat": ("one level", flat_draws),
    }
    for name, (form, each) in closed.items():
        a = whole[form]
        deviation = float((a * (1 - a)).clamp(min=0).sum() / each) ** 0.5 / count
        found[f"{name}, interval"] = 1.96 * deviation
        found[f"{name}, deviations"] = (found[name] - found[form]) / max(deviation, 1e-12)
    return {name: round(x, 5) if isinstance(x, float) else x for name, x in found.items()}


def _columns(parts: Iterable[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    columns: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, x in part.items():
            columns.setdefault(name, []).append(x.double())
    return columns


# ---- Models --------------------------------------------------------------------------------------


class Terms:
    """SmolLM2, its guides, and its moods, by name."""

    def __init__(self) -> None:
        model, self.tokenizer = cf.models.smollm2()
        guides = {name: cf.models.guide(name) for name in ("sentiment", "brevity")}
        self.model = cf.models.with_adapters(model, guides)
        self.of: dict[str, cf.Model] = {
            name: cf.Model(
                self.model,
                tokenizer=self.tokenizer,
                adapter=name if name in guides else None,
                system=SYSTEMS.get(name),
                name=name,
            )
            for name in ("base", *guides, *SYSTEMS)
        }

    def blend(self, weights: Mapping[str, float]) -> Any:
        first, *others = (w * self.of[name] for name, w in weights.items())
        return sum(others, start=first)

    @torch.no_grad()
    def logits(self, name: str, chat: list[dict[str, str]], response: list[int]) -> Tensor:
        """Before each token of the response, `[tokens, V]`."""
        term = self.of[name]
        system = [{"role": "system", "content": term.system}] if term.system else []
        prompt = self.tokenizer.apply_chat_template(
            [*system, *chat], add_generation_prompt=True, return_dict=False
        )
        ids = torch.tensor([[*prompt, *response]])
        if term.adapter is None:
            with self.model.disable_adapter():
                z = self.model(ids).logits
        else:
            self.model.set_adapter(term.adapter)
            z = self.model(ids).logits
        return z[0, len(prompt) - 1 : -1].float().clone()


def of_guides(terms: Terms, pair: Pair, args: argparse.Namespace) -> dict[str, Any]:
    chats = [
        [{"role": "user", "content": f"Write a few sentences about {s}."}]
        for s in SUBJECTS[: args.prompts]
    ]
    out: Any = cf.generate(
        terms.blend(pair.target), chats, max_new_tokens=NEW, do_sample=True, seed=SEED,
        progress=False, **pair.settings,
    )  # fmt: skip
    parts = []
    for n, (chat, response) in enumerate(
        tqdm(list(zip(chats, out.responses, strict=True)), desc=pair.name, file=sys.stderr)
    ):
        z = {name: terms.logits(name, chat, response) for name in {*pair.target, pair.draft}}
        target, weights = [z[name] for name in pair.target], [*pair.target.values()]
        parts.append(
            measure(
                target,
                weights,
                z[pair.draft],
                pair.settings,
                n * NEW,
                args.draws,
                args.flat_draws,
                args.backend,
            )
        )
    return gathered(parts, args.draws, args.flat_draws)


def of_random(scale: float, noise: float, args: argparse.Namespace) -> dict[str, Any]:
    parts = []
    for n in tqdm(range(args.prompts), desc=f"random {scale:g}, {noise:g}", file=sys.stderr):
        generator = torch.Generator().manual_seed(n)
        z = scale * torch.randn(4, VOCABULARIES[0], generator=generator)
        draft = z + noise * torch.randn(z.shape, generator=generator)
        parts.append(
            measure([z], [1.0], draft, {}, 4 * n, args.draws, args.flat_draws, args.backend)
        )
    return gathered(parts, args.draws, args.flat_draws)


# ---- Report --------------------------------------------------------------------------------------


def far_off(row: dict[str, Any]) -> bool:
    """Whether draws are more than four standard deviations from a closed form."""
    return max(abs(row["drawn, deviations"]), abs(row["drawn, flat, deviations"])) > 4


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=8, help=f"of {len(SUBJECTS)} (default 8)")
    parser.add_argument("--draws", type=int, default=128, help="at each token, by the ops")
    parser.add_argument("--flat-draws", type=int, default=8, help="with noise a token")
    parser.add_argument("--backend", default="native")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    report: dict[str, Any] = {
        "command": " ".join(
            ["python bench/coupling.py", *(sys.argv[1:] if arguments is None else arguments)]
        ),
        "machine": hardware("cpu"),
        "versions": {p: metadata.version(p) for p in ("torch", "transformers")},
        **{"backend": args.backend, "seed": SEED, "tokens": NEW, "group": GROUP},
        "prompts": SUBJECTS[: args.prompts],
        "systems": SYSTEMS,
        "noise": noise_of_rows(),
        "rows": [],
    }
    terms = Terms()
    for pair in PAIRS:
        found = of_guides(terms, pair, args)
        report["rows"].append(
            {**asdict(pair), "target": pair.name, "weights": dict(pair.target), **found}
        )
    for scale, noise in RANDOM:
        name = {"target": f"random, N(0, {scale:g}²)", "draft": f"the same + N(0, {noise:g}²)"}
        report["rows"].append({**name, **of_random(scale, noise, args)})
    print(render(report))
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    far = [r["target"] for r in report["rows"] if far_off(r)]
    if far:
        print(f"not what the closed form says: {', '.join(far)}", file=sys.stderr)
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(main())
