"""What the op tests share: backends, problems and layouts, and how far results may be apart."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from crossfade import ops
from crossfade.ops import BlendSample, Draw, Inputs, Part, Support, reference
from crossfade.ops.backends import select
from crossfade.ops.noise import GROUP, Noise
from crossfade.ops.types import ShardDraw
from torch import Tensor

NAN, INF = float("nan"), float("inf")
EPS = 2.0**-23  # of float32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """A backend on a device. `interpreted` is slow: give it small problems."""

    name: str
    device: str

    @property
    def interpreted(self) -> bool:
        return self.name == "triton" and self.device == "cpu"

    def __str__(self) -> str:
        return self.name if self.device == "cpu" else f"{self.name}-cuda"

    def blend(self, *args: Any, **kwargs: Any) -> Tensor:
        return ops.blend(*args, backend=self.name, **kwargs)

    def blend_sample(self, *args: Any, **kwargs: Any) -> BlendSample:
        return ops.blend_sample(*args, backend=self.name, **kwargs)

    def raw_scores(self, inputs: Inputs) -> Tensor:
        return select(self.name, inputs.device).blend(inputs, raw=True)

    def draw_shard(self, inputs: Inputs, draw: Draw) -> ShardDraw:
        return select(self.name, inputs.device).draw_shard(inputs, draw)


def rms(x: Tensor) -> Tensor:
    """The root of the mean square."""
    return x.square().mean().sqrt()


# ---- Layouts: the same numbers in other memory, with NaN in everything around them ---------------

LAYOUTS = ("contiguous", "sliced", "offset", "padded")


def lay_out(x: Tensor, layout: str, extra: int = 3) -> Tensor:
    """`x` [B, V] as a view of a larger buffer of NaN.

    "sliced": columns out of a wider tensor, so rows start unaligned. "offset": contiguous, one
    element into its storage, so that no vector's alignment holds. "padded": `extra` columns of
    infinity follow the vocabulary within the tensor, where a model's padded head has them.
    """
    rows, vocab = x.shape
    if layout == "contiguous":
        return x.contiguous()
    if layout == "offset":
        flat = x.new_full((rows * vocab + 1,), NAN)
        view = flat[1:].view(rows, vocab)
    else:
        wide = x.new_full((rows, vocab + 2 * extra + 1), NAN)
        view = wide[:, extra : extra + vocab]
        if layout == "padded":
            wide[:, extra + vocab : 2 * extra + vocab] = INF
            view.copy_(x)
            return wide[:, extra : 2 * extra + vocab]
    return view.copy_(x)


# ---- Problems ------------------------------------------------------------------------------------


@dataclass
class Problem:
    """The arguments of `blend`. `options`: power, support, mask, vocab_size."""

    logits: list[Tensor]
    weights: Sequence[float] | Tensor
    values: list[Tensor] = field(default_factory=list)
    value_weights: Sequence[float] | Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def args(self) -> tuple[Any, ...]:
        return self.logits, self.weights, self.values, self.value_weights

    @property
    def vocab(self) -> int:
        columns = min(t.shape[1] for t in (*self.logits, *self.values))
        return self.options.get("vocab_size") or columns

    @property
    def rows(self) -> int:
        return self.logits[0].shape[0]

    def scores(self) -> Tensor:
        """The reference's scores `[B, V]` in float64, -inf where a token is removed."""
        options = dict(self.options)
        if options.get("mask") is not None:
            options["mask"] = options["mask"][..., : self.vocab]
        return reference.blend_scores(Inputs(*self.args, **options))[0]


def normal(
    rows: int,
    vocab: int,
    seed: int,
    *,
    scale: float = 3.0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Tensor:
    """Normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator) * scale).to(dtype).to(device)


def mean_weights(rows: int, terms: int, seed: int, device: str = "cpu") -> Tensor:
    """Weights `[rows, terms]` of a power mean: positive, with a sum of one."""
    return normal(rows, terms, seed, scale=1.0).softmax(dim=-1).to(device)


def problem(
    backend: Backend,
    *,
    terms: int = 3,
    rows: int = 4,
    vocab: int = 257,
    values: int = 0,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    power: float = 0.0,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """Normal logits under weights of both signs, or those of a mean where `power` is not 0."""

    def matrix(k: int) -> Tensor:
        x = normal(rows, vocab, 1000 * seed + k, dtype=dtype, device=backend.device)
        return lay_out(x, layout, extra=1 + k)

    weights = mean_weights(1, terms, seed)[0] if power else normal(1, terms, seed, scale=1.0)[0]
    return Problem(
        [matrix(k) for k in range(terms)],
        weights.tolist(),
        [matrix(100 + m) for m in range(values)],
        normal(1, values, seed + 7, scale=0.5)[0].tolist() if values else None,
        {"power": power, "vocab_size": vocab if layout == "padded" else None, **options},
    )


def structs(
    *args: Any, return_term_logprobs: bool = False, return_pushes: bool = False, **options: Any
) -> tuple[Inputs, Draw, bool, bool]:
    """The arguments of `blend_sample` as a backend takes them."""
    names = {*inspect.signature(Draw).parameters} & options.keys()
    draw = {name: options.pop(name) for name in names}
    inputs = Inputs(*args, **options)
    return inputs, Draw(inputs, **draw), return_term_logprobs, return_pushes


def matrices(count: int, device: str = "cpu") -> list[Tensor]:
    return [normal(3, 8, k, scale=1.0, device=device) for k in range(count)]


def good_call(device: str, sample: bool = True) -> dict[str, Any]:
    """Every argument of `blend_sample` or `blend`: two terms and a value, 3 rows of 8 tokens."""
    call: dict[str, Any] = {
        "logits": matrices(2, device),
        "weights": [0.6, 0.4],
        "values": matrices(1, device),
        "value_weights": [0.5],
        "power": 0.0,
        "parts": [Part([0.5, -0.5], min=-1.0, max=1.0)],
        "support": Support(top_k=6),
        "mask": torch.ones(8, dtype=torch.bool, device=device),
        "vocab_size": 8,
    }
    if sample:
        call |= {"temperature": 0.9, "top_k": 7, "top_p": 0.99, "min_p": 0.001, "do_sample": True}
        call |= {"seed": 1, "stream": 2, "step": 3, "return_term_logprobs": True}
        call |= {"return_pushes": False}  # which parts have not
    return call


# ---- Agreement with the reference ----------------------------------------------------------------


def magnitudes(p: Problem) -> Tensor:
    """What rounding in float32 grows with, `[B, V]`: sum |w z|, plus the best token's, for log Z.

    With `power` != 0 the terms are normalised, not weighted: sum |z| of a token and of each best.
    Those of parts are both.
    """
    rows, device = p.rows, p.logits[0].device
    total = torch.zeros(rows, p.vocab, dtype=torch.float64, device=device)
    weights = reference.weights_of(p.weights, rows, device).nan_to_num()
    for k, z in enumerate(p.logits):
        w = weights[:, k : k + 1].abs()
        z = z[:, : p.vocab].double().nan_to_num(0.0, 0.0, 0.0).abs()
        if p.options.get("power"):
            best = p.logits[k][:, : p.vocab].double().nan_to_num(0.0).argmax(-1, keepdim=True)
            total += torch.where(w > 0, z + z.gather(1, best), 0.0)
        else:
            total += w * z
    for part in p.options.get("parts", ()):
        weights = reference.weights_of(part.weights, rows, device).nan_to_num().abs()
        for k, z in enumerate(p.logits):
            z = z[:, : p.vocab].double().nan_to_num(0.0, 0.0, 0.0).abs()
            best = p.logits[k][:, : p.vocab].double().nan_to_num(0.0).argmax(-1, keepdim=True)
            total += weights[:, k : k + 1] * (z + z.gather(1, best))
    if p.values:
        weights = reference.weights_of(p.value_weights, rows, device).nan_to_num()
        for m, q in enumerate(p.values):
            q = q[:, : p.vocab].double().nan_to_num(0.0, 0.0, 0.0).abs()
            total += weights[:, m : m + 1].abs() * q
    best = p.scores().nan_to_num(-INF).argmax(dim=-1, keepdim=True)
    return total + total.gather(1, best)


def tolerance(p: Problem) -> Tensor:
    """How far a log-prob may be off, `[B, V]`."""
    return 1e-5 + 4 * EPS * magnitudes(p)


def assert_blend_agrees(backend: Backend, p: Problem) -> None:
    got = backend.blend(*p.args, **p.options)
    want = ops.blend(*p.args, **p.options, backend="reference")
    assert (got.shape, got.dtype) == ((p.rows, p.vocab), torch.float32)
    assert got.device == p.logits[0].device
    assert torch.equal(got.isnan(), want.isnan()), "rows that are bad"
    assert torch.equal(got == -INF, want == -INF), "tokens that are removed"
    finite = want.isfinite()
    error = torch.where(finite, got.double() - want.double(), 0.0).abs()
    excess = (error - tolerance(p)).max() if error.numel() else torch.tensor(0.0)
    assert excess <= 0, f"log-probs are off by up to {error.max():.3g}, {excess:.3g} too far"


def temperatures(p: Problem, settings: dict[str, Any]) -> Tensor:
    """Each row's temperature `[B]`, 0 where it is greedy."""
    if not settings.get("do_sample", True):
        return torch.zeros(p.rows, device=p.logits[0].device)
    given = settings.get("temperature", 1.0)
    return reference.per_row(given, p.rows, p.logits[0].device, torch.float32)


def assert_samples_agree(backend: Backend, p: Problem, **settings: Any) -> BlendSample:
    """Checks a backend's tokens, log-probs and pushes against the reference's, and returns them."""
    has_pushes = not p.options.get("power") and not p.options.get("parts")
    settings = {"return_term_logprobs": True, "return_pushes": has_pushes, **settings}
    got = backend.blend_sample(*p.args, **p.options, **settings)
    want = ops.blend_sample(*p.args, **p.options, **settings, backend="reference")
    assert (got.tokens.shape, got.tokens.dtype) == ((p.rows,), torch.int64)
    assert torch.equal(got.tokens < 0, want.tokens < 0), "rows that are bad"
    for b in (got.tokens != want.tokens).nonzero()[:, 0].tolist():
        _assert_tied(p, settings, b, int(got.tokens[b]), int(want.tokens[b]))

    same = (got.tokens == want.tokens) & (want.tokens >= 0)
    token = want.tokens.clamp(min=0)[:, None]
    allowed = tolerance(p).gather(1, token)[:, 0]
    t = temperatures(p, settings).double()
    allowed_sampled = torch.where(t > 0, 1e-5 + allowed / t, allowed)
    _assert_close("logprobs", got.logprobs, want.logprobs, allowed, same)
    _assert_close(
        "sampled_logprobs", got.sampled_logprobs, want.sampled_logprobs, allowed_sampled, same
    )
    assert (got.term_logprobs is not None) == settings["return_term_logprobs"]
    if got.term_logprobs is not None:
        _assert_terms_close(p, got.term_logprobs, want.term_logprobs, token, same)
    assert (got.pushes is not None) == settings["return_pushes"]
    if got.pushes is not None:
        assert got.pushes[want.tokens < 0].isnan().all()
        _assert_pushes_close(p, got.pushes, want.pushes, token, same)
    return got


def _assert_terms_close(
    p: Problem, got: Tensor, want: Tensor | None, token: Tensor, same: Tensor
) -> None:
    assert want is not None
    assert got.shape == (p.rows, len(p.logits))
    for k, z in enumerate(p.logits):
        z = z[:, : p.vocab].double()
        scale = z.gather(1, token)[:, 0].abs() + z.nan_to_num(0.0).amax(dim=-1).abs()
        allowed = 1e-5 + 4 * EPS * scale.nan_to_num(0.0, 0.0)
        _assert_close(f"term_logprobs[:, {k}]", got[:, k], want[:, k], allowed, same)


def _assert_pushes_close(
    p: Problem, got: Tensor, want: Tensor | None, token: Tensor, same: Tensor
) -> None:
    """They are off by the rounding of logits, and of the probabilities that weigh these."""
    assert want is not None
    assert got.shape == (p.rows, len(p.logits) + len(p.values))
    shares = p.scores().nan_to_num(-INF).softmax(dim=-1)
    rounding = 1e-5 + 4 * EPS * magnitudes(p)
    inputs = [x[:, : p.vocab].double() for x in (*p.logits, *p.values)]
    each = (p.weights, p.value_weights) if p.values else (p.weights,)
    weights = torch.cat([reference.weights_of(w, p.rows, shares.device) for w in each], dim=1)
    for c, w in enumerate(weights.unbind(1)):
        base = inputs[0] if c < len(p.logits) else torch.zeros_like(inputs[0])
        x, size = inputs[c] - base, inputs[c].abs() + base.abs()
        ahead, sizes = (x.gather(1, token) - x).abs(), size + size.gather(1, token)
        error = torch.where(shares > 0, shares * (ahead * rounding + 4 * EPS * sizes), 0.0)
        allowed = 1e-6 + w.abs() * error.sum(dim=-1)
        _assert_close(f"pushes[:, {c}]", got[:, c], want[:, c], allowed.nan_to_num(0.0), same)


def _assert_close(name: str, got: Tensor, want: Tensor, allowed: Tensor, same: Tensor) -> None:
    assert got.dtype == torch.float32, name
    assert torch.equal(got.isnan()[same], want.isnan()[same]), f"{name}: NaN"
    exact = (got == want) | want.isnan() | ~same  # infinities too
    error = torch.where(exact, 0.0, got.double() - want.double()).abs()
    excess = torch.where(exact, -1.0, error - allowed)
    assert bool((excess <= 0).all()), f"{name}: {got.tolist()} for {want.tolist()}"


def _assert_tied(p: Problem, settings: dict[str, Any], b: int, got: int, want: int) -> None:
    """Row b may draw another token than the reference only where rounding decides.

    That is where their noisy scores are closer than rounding, or where one of the two lies within
    1e-6 of the boundary of top-p's mass.
    """
    device = p.logits[0].device

    def of_row(name: str, default: Any, dtype: torch.dtype) -> Tensor:
        value = reference.signed(settings.get(name, default))
        return reference.per_row(value, p.rows, device, dtype)[b : b + 1]

    t = float(temperatures(p, settings)[b])
    row, rounding = p.scores()[b : b + 1], tolerance(p)[b]
    if t == 0:
        gap = row[0, want] - row[0, got]
        assert abs(gap) <= rounding[[got, want]].sum(), f"row {b}: token {got} for {want}: {gap}"
        return
    tempered, allowed = row / t, float(rounding[[got, want]].sum()) / t + 4e-6
    noise = Noise(*(of_row(n, 0, torch.int64) for n in ("seed", "stream", "step")))
    top_k, min_p = of_row("top_k", 0, torch.int64), of_row("min_p", 0.0, torch.float32).double()
    top_p = of_row("top_p", 1.0, torch.float32).double()
    gaps = []
    for shift in (0.0, -1e-6, 1e-6):  # at the edge of the nucleus a token may stay or go
        edge = top_p if bool(top_p >= 1) else (top_p + shift).clamp(0, 1)
        kept = reference.keep(tempered, top_k, edge, min_p)
        gaps.append(_gap(tempered.masked_fill(~kept, -INF), noise, got, want))
        if abs(gaps[-1]) <= allowed:
            return
    raise AssertionError(
        f"row {b}: token {got} for {want}, whose noisy score is {gaps[0]:.3g} higher "
        f"({allowed:.3g} would be rounding)"
    )


def _gap(x: Tensor, noise: Noise, got: int, want: int) -> float:
    """How far token `want` leads `got` in one row: their groups or, within one, they themselves."""
    groups = -(-x.shape[1] // GROUP)
    one, other = got // GROUP, want // GROUP
    if one == other:
        group = torch.tensor([one], device=x.device)
        first = one * GROUP
        noisy = x[:, first : first + GROUP]
        noisy = (noisy + noise.of_tokens(group)[:, : noisy.shape[1]])[0]
        return float(noisy[want - first] - noisy[got - first])
    short = groups * GROUP - x.shape[1]
    padded = torch.nn.functional.pad(x, (0, short), value=-INF)
    mass = padded.unflatten(1, (groups, -1)).logsumexp(-1)
    noisy = (mass + noise.of_groups(groups))[0]
    return float(noisy[other] - noisy[one])
