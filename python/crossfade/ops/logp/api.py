"""`linear_logp`: log-probs of tokens under a linear head, whose logits are made in tiles."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import backends, check, memory, native, reference
from ..types import LinearLogp
from . import eager, mean, tiles
from .tiles import Gradients, Settings

LEAST, MOST = 1e-37, 1e37  # the range of soft caps and temperatures: kernels have float32
RANGE = f"within [{LEAST}, {MOST}]"
OR_NONE = f"{RANGE}, or None"


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
    mean_only: bool = False,
    backend: str | None = None,
    uniform: bool | None = None,
) -> LinearLogp:
    """Log-probs of targets under a linear head, in tiles of tokens and vocabulary.

    The same in torch::

        z = hidden @ weight.T + bias
        z = softcap * (z / softcap).tanh()               # if softcap is not None
        z = (z / temperature).float()
        lse = z.logsumexp(-1)
        logp = z.gather(-1, targets[..., None])[..., 0] - lse
        logp = logp.where(targets != ignore_index, 0)
        entropy = lse - (z.softmax(-1) * z).sum(-1)

    Each result is differentiable by hidden, weight and bias, once. It takes the memory of the
    gradients and of a few tiles. What it costs is counted in products of all tokens with the whole
    head:

    * one, where no gradient is wanted;
    * two with a frozen head, whose weight and bias need no gradient, and a third for the entropy.
      All are made in the forward pass, which keeps the expected embedding, so that the backward
      pass has nothing to multiply;
    * else four: one in the forward pass, and in the backward pass one to make the logits again and
      one each for the gradients of hidden and weight. On a CPU, tokens without a gradient (padding
      and prompts) cost nothing in the backward pass;
    * with `mean_only` three, all in the forward pass.

    Nothing waits for a GPU.

    Products and sums are float32 (float64 for float64) whatever the dtypes, as is the accumulation
    of gradients. Where hidden and weight are both bfloat16 or both float16, an NVIDIA GPU
    multiplies them as they are. There, what gradients are products of is rounded to that dtype, as
    in torch's own functions: the softmax's terms (a frozen head) or the gradient of the logits.
    Sums stay float32. Products of float32 follow torch's settings of TF32. A token's results are
    the same bits whichever gradients are recorded. Where the same is true of torch's products, they
    depend neither on `mean_only` nor on the other tokens.

    Args:
        hidden: ``[..., H]`` float32, bfloat16, float16 or float64.
        weight: ``[V, H]``, of any of these dtypes; float64 if hidden is, and only then.
        targets: int64 ``[...]``, each within [0, V) or `ignore_index`.
        bias: ``[V]``, like `weight`, or None; -inf removes a token.
        softcap: bounds the logits to (-softcap, softcap), before the temperature; None leaves them.
        temperature: what logits are divided by, above 0.
        ignore_index: a target that means none: its log-prob is 0, which has no gradient.
        return_entropy: return the entropy too.
        mean_only: expect a loss whose derivatives by the log-probs are one number, as those of
            their mean are. Gradients of hidden and weight are then made in the forward pass and
            kept: three products in place of four. It takes the memory of the weight twice: once for
            the weight's gradient, and once for all logits of up to H tokens (1,024 at most). Any
            other loss has its gradients all the same, for three products more. It changes nothing
            where hidden or weight needs no gradient, where the weight is not float32, with a bias,
            soft-cap or temperature, and on a GPU.
        backend: what works on the tiles between torch's products: "native" (CPUs), "triton" (GPUs),
            neither for float64, or "torch" (any device and dtype); or "reference" (float64, all
            logits at once), or None for the fastest.
        uniform: what `mean_only` was called before; it will be removed in the next release.

    Returns:
        `LinearLogp`. A token with NaN or +inf among its logits, or nothing but -inf, is NaN.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be. Targets out of
            range raise on a CPU; elsewhere their log-prob is NaN.
        RuntimeError: a second or a forward-mode derivative is asked for; the reference alone has
            them.

    Source: online log-sum-exp of tiles, recomputed backward: Cut Cross-Entropy (Wijmans et al.,
    arXiv:2411.09009); expectations beside it: FlashAttention's rescaled sums (Dao et al.,
    arXiv:2205.14135). The soft cap is Gemma 2's (arXiv:2408.00118).
    """
    _check_tensors(hidden, weight, targets, bias)
    settings = Settings(_softcap(softcap), temperature_of(temperature), _ignore_index(ignore_index))
    check.flag("return_entropy", return_entropy)
    if uniform is not None:
        said = "linear_logp's uniform is now called mean_only; uniform will be removed"
        warnings.warn(said, FutureWarning, stacklevel=2)
        mean_only = check.flag("uniform", uniform)
    check.flag("mean_only", mean_only)
    _check_backend(backend, hidden)
    args = hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1), bias
    if backend == "reference":
        _check_targets(args[2], len(weight), settings.ignore_index)
        dtype = tiles.compute_dtype(hidden.dtype)
        results = tuple(x.to(dtype) for x in reference.linear_logp(*args, *settings))
    else:
        results = all_results(*args, settings, return_entropy, mean_only, backend)
    logp, lse, entropy = (x.view(targets.shape) for x in results[:3])
    return LinearLogp(logp, lse, entropy if return_entropy else None)


def all_results(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    settings: Settings,
    of_entropy: bool = False,
    mean_only: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """All results of the op below: logp, lse, entropy, `Forward.normaliser`, and what is kept.

    `of_entropy` says whether the entropy is differentiable too.
    """
    advice = "backend='reference' has, with all logits stored"
    memory.check_no_tangents("linear_logp", advice, hidden, weight, bias)
    keep = to_keep(hidden, weight, bias, settings, of_entropy, mean_only, backend)
    return torch.ops.crossfade.linear_logp(hidden, weight, targets, bias, *settings, keep, backend)


def to_keep(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    settings: Settings,
    of_entropy: bool,
    mean_only: bool,
    backend: str | None,
) -> int:
    """What the forward pass should keep for the backward pass, see `tiles.NOTHING`."""
    if not torch.is_grad_enabled() or not hidden.requires_grad:
        return tiles.NOTHING
    if not weight.requires_grad and (bias is None or not bias.requires_grad):
        return tiles.MOMENTS if of_entropy else tiles.MEAN
    plain = bias is None and settings.plain
    fits = weight.requires_grad and weight.dtype == torch.float32
    if mean_only and plain and fits and hidden.is_cpu and _kernel(hidden, backend) is native:
        return tiles.SUM
    return tiles.NOTHING


def _check_tensors(hidden: Any, weight: Any, targets: Any, bias: Any) -> None:
    for name, x in (("hidden", hidden), ("weight", weight), ("targets", targets), ("bias", bias)):
        if name == "bias" and x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}; it must be a tensor")
        memory.check_strided([(name, x)])
        if name != "targets" and x.dtype not in check.MATRIX_DTYPES:
            raise TypeError(f"{name} has dtype {x.dtype}; it must be {check.DTYPE_NAMES}")
        if (x.dtype == torch.float64) != (hidden.dtype == torch.float64) and name != "targets":
            raise TypeError(
                f"{name} has dtype {x.dtype} and hidden {hidden.dtype}; both must be float64, or "
                "neither"
            )
        if x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device}; it must be on {hidden.device}, as hidden")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets has dtype {targets.dtype}; it must be torch.int64")
    shape = weight.shape
    if len(shape) != 2 or shape[0] == 0 or shape[1] == 0:
        raise ValueError(f"weight has shape {list(shape)}; it must be [V, H], both at least 1")
    if hidden.dim() == 0 or hidden.shape[-1] != shape[1]:
        raise ValueError(
            f"hidden has shape {list(hidden.shape)}; it must be [..., {shape[1]}], as weight has "
            "columns"
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets has shape {list(targets.shape)}; it must be {list(hidden.shape[:-1])}, one a "
            "row of hidden"
        )
    if bias is not None and bias.shape != shape[:1]:
        raise ValueError(f"bias has shape {list(bias.shape)}; it must be [{shape[0]}]")


def _softcap(x: Any) -> float:
    """A checked soft cap; 0 is none."""
    if x is None:
        return 0.0
    return check.number("softcap", x, LEAST, MOST, OR_NONE)


def temperature_of(x: Any) -> float:
    """A checked temperature."""
    return check.number("temperature", x, LEAST, MOST, RANGE)


def _ignore_index(x: Any) -> int:
    return check.integer("ignore_index", x, -(2**63), 2**63 - 1, "within [-2^63, 2^63)")


def _check_backend(backend: Any, hidden: Tensor) -> None:
    if backend not in (None, "native", "triton", "torch", "reference"):
        raise ValueError(
            f"backend is {backend!r}; it must be None, 'native', 'triton', 'torch' or 'reference'"
        )
    if backend in ("native", "triton"):
        reason = backends.why_not(backend, hidden.device)
        if backend == "native" and not hidden.is_cpu:
            reason = f"hidden is on {hidden.device}; the kernel is for CPUs"
        elif hidden.dtype == torch.float64:
            reason = "hidden has dtype torch.float64; the kernel has float32"
        if reason is not None:
            raise ValueError(f"backend is {backend!r}, which cannot run this: {reason}")


def _check_targets(targets: Tensor, vocab: int, ignore_index: int) -> None:
    if not targets.is_cpu:
        return
    outside = ((targets < 0) | (targets >= vocab)) & (targets != ignore_index)
    if bool(outside.any()):
        place = int(outside.nonzero()[0])
        raise ValueError(
            f"targets has {int(targets[place])} at position {place}; it must be within "
            f"[0, {vocab}) or ignore_index, {ignore_index}"
        )


# ---- The op as autograd and torch.compile see it: one node, whose gradient is another ----------

_INPUTS = "Tensor hidden, Tensor weight, Tensor targets, Tensor? bias"
_SETTINGS = "float softcap, float temperature, int ignore_index"
torch.library.define(
    "crossfade::linear_logp",
    f"({_INPUTS}, {_SETTINGS}, int keep, str? backend) "
    "-> (Tensor logp, Tensor lse, Tensor entropy, Tensor normaliser, Tensor first, Tensor second)",
)
torch.library.define(
    "crossfade::linear_logp_backward",
    f"({_INPUTS}, {_SETTINGS}, int keep, str? backend, Tensor entropy, Tensor normaliser, "
    "Tensor first, Tensor second, Tensor? of_logp, Tensor? of_lse, Tensor? of_entropy, "
    "bool[] wanted) "
    "-> (Tensor hidden, Tensor weight, Tensor bias)",
)


def _kernel(hidden: Tensor, backend: str | None) -> ModuleType:
    """What works on the tiles. `backend` is None, "native", "triton" or "torch"."""
    if hidden.dtype == torch.float64:
        return eager
    name = backend or ("native" if hidden.is_cpu else "triton")
    if name == "native" and native.why_not(hidden.device) is None:
        return native
    if name == "triton" and backends.why_not(name, hidden.device) is None:
        from ..triton import logp  # which imports Triton

        return logp
    return eager


@torch.library.impl("crossfade::linear_logp", "CompositeExplicitAutograd")
def _forward(hidden, weight, targets, bias, softcap, temperature, ignore_index, keep, backend):
    memory.check_stored(hidden=hidden, weight=weight, targets=targets, bias=bias)
    _check_targets(targets, len(weight), ignore_index)
    settings = Settings(softcap, temperature, ignore_index)
    if keep == tiles.SUM:
        done = mean.forward(hidden, weight, targets, settings)
    else:
        kernel = _kernel(hidden, backend)
        done = tiles.forward(hidden, weight, targets, bias, settings, keep, kernel)
    return tuple(done.logp.new_empty(0) if x is None else x for x in done)


@torch.library.register_fake("crossfade::linear_logp")
def _forward_fake(hidden, weight, targets, bias, softcap, temperature, ignore_index, keep, backend):
    dtype = tiles.compute_dtype(hidden.dtype)
    each = [hidden.new_empty(len(hidden), dtype=dtype) for _ in range(3)]
    normaliser = hidden.new_empty((3, len(hidden)), dtype=dtype)
    shapes = {
        tiles.NOTHING: (0, 0),
        tiles.MEAN: (hidden.shape, 0),
        tiles.MOMENTS: (hidden.shape, hidden.shape),
        tiles.SUM: (hidden.shape, weight.shape),
    }
    kept = [hidden.new_empty(shape, dtype=dtype) for shape in shapes[keep]]
    return *each, normaliser, *kept


def _setup_context(ctx, inputs, output):
    hidden, weight, targets, bias, *ctx.settings, ctx.keep, ctx.backend = inputs
    ctx.save_for_backward(hidden, weight, targets, bias, *output[2:])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])


def _backward(ctx, of_logp, of_lse, of_entropy, *_):
    hidden, weight, targets, bias, *results = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    grads = torch.ops.crossfade.linear_logp_backward(
        hidden,
        weight,
        targets,
        bias,
        *ctx.settings,
        ctx.keep,
        ctx.backend,
        *results,
        of_logp,
        of_lse,
        of_entropy,
        wanted,
    )
    of_hidden, of_weight, of_bias = (g if w else None for g, w in zip(grads, wanted, strict=True))
    return of_hidden, of_weight, None, of_bias, None, None, None, None, None


torch.library.register_autograd("crossfade::linear_logp", _backward, setup_context=_setup_context)


@torch.library.impl("crossfade::linear_logp_backward", "CompositeExplicitAutograd")
def _run_backward(
    hidden,
    weight,
    targets,
    bias,
    softcap,
    temperature,
    ignore_index,
    keep,
    backend,
    entropy,
    normaliser,
    first,
    second,
    of_logp,
    of_lse,
    of_entropy,
    wanted,
):
    settings = Settings(softcap, temperature, ignore_index)
    gradients = Gradients(of_logp, of_lse, of_entropy)
    grads: Sequence[Tensor | None] | None = None
    if keep in (tiles.MEAN, tiles.MOMENTS):
        covariance = second if keep == tiles.MOMENTS else None
        grads = tiles.frozen_backward(
            hidden, weight, targets, settings, normaliser, first, covariance, gradients
        )
    elif keep == tiles.SUM:
        grads = mean.backward(hidden, targets, settings, first, second, gradients)
    if grads is None:
        grads = tiles.backward(
            hidden,
            weight,
            targets,
            bias,
            settings,
            entropy,
            normaliser,
            gradients,
            wanted,
            _kernel(hidden, backend),
        )
    return tuple(hidden.new_empty(0) if x is None else x for x in grads)


@torch.library.register_fake("crossfade::linear_logp_backward")
def _run_backward_fake(hidden, weight, targets, bias, *args):
    wanted = args[-1]
    return tuple(
        hidden.new_empty(0) if x is None or not w else x.new_empty(x.shape)
        for x, w in zip((hidden, weight, bias), wanted, strict=True)
    )


def _no_second_derivative(ctx, *_):
    raise RuntimeError(
        "linear_logp has no second derivative; backend='reference' has, with all logits stored"
    )


torch.library.register_autograd("crossfade::linear_logp_backward", _no_second_derivative)
