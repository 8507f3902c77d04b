"""The contenders of logp.py: our log-probs of a head, and those of peers that are installed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from crossfade import losses
from crossfade.ops import linear_logp
from torch import Tensor

try:
    import trl.trainer.utils as TRL
except ImportError:
    TRL = None
try:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
except ImportError:
    LigerFusedLinearDPOLoss = None
try:
    from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy
except ImportError:
    cut_cross_entropy = None

RESPONSES = 4  # "dpo" has two that are chosen, then two that are rejected


@dataclass(frozen=True)
class Sizes:
    tokens: int
    hidden: int
    vocab: int
    device: str = "cpu"
    dtype: str = "float32"


@dataclass(frozen=True)
class Case:
    """Hidden states, a head that is trained or frozen, and targets."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor


def case_of(kind: str, sizes: Sizes) -> Case:
    generator = torch.Generator(sizes.device).manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator, device=sizes.device)
    hidden = normal(sizes.tokens, sizes.hidden)
    weight = normal(sizes.vocab, sizes.hidden) / sizes.hidden**0.5
    targets = torch.randint(sizes.vocab, (sizes.tokens,), generator=generator, device=sizes.device)
    dtype = getattr(torch, sizes.dtype)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    return Case(hidden.requires_grad_(), weight.requires_grad_(kind != "frozen"), targets)


# ---- The mean of log-probs -----------------------------------------------------------------------


def ours(c: Case) -> Tensor:
    return linear_logp(c.hidden, c.weight, c.targets).logp.mean()


def our_mean(c: Case) -> Tensor:
    """It is for a loss that is this mean and nothing else, like torch's "mean"."""
    return linear_logp(c.hidden, c.weight, c.targets, mean_only=True).logp.mean()


def naive(c: Case) -> Tensor:
    log_p = F.linear(c.hidden, c.weight).log_softmax(-1)
    return log_p.gather(-1, c.targets[:, None]).mean()


def selective_log_softmax(c: Case) -> Tensor:
    """TRL's function where TRL is installed, else the same here, for sequences of 512 tokens."""
    logits = F.linear(c.hidden, c.weight)
    sequences, targets = torch.stack(logits.split(512)), torch.stack(c.targets.split(512))
    if TRL is not None:
        return TRL.selective_log_softmax(sequences, targets).mean()
    chosen = sequences.gather(-1, targets[..., None]).squeeze(-1)
    return (chosen - torch.stack([z.logsumexp(-1) for z in sequences])).mean()


def trl_logp(c: Case) -> Tensor:
    """What TRL's trainers run: in TRL 1.16 four products, in chunks of 32,768 tokens."""
    apply = TRL._ChunkedLogProbFunction.apply
    size = TRL._CHUNKED_LOGPROB_CHUNK_SIZE
    return apply(c.hidden, c.weight, None, c.targets, 1.0, size, None, 1.0, ())[0]


def trl_chunks(c: Case) -> Tensor:
    return trl_logp(c).mean()


def torch_chunks(c: Case, reduction: str, rows: int | None = None) -> Tensor:
    """torch's loss in chunks of `rows` tokens, by default of as many as torch chooses.

    For the reduction "mean" torch makes the gradients in the forward pass, with one product less.
    That is for a loss which is this mean and nothing else.
    """
    chunks = {} if rows is None else {"batch_chunk_size": rows, "chunking_method": None}
    options = torch.nn.LinearCrossEntropyOptions(**chunks)
    loss = F.linear_cross_entropy(
        c.hidden, c.weight, c.targets, reduction=reduction, options=options
    )
    return -loss.mean()


def checkpoints(c: Case) -> Tensor:
    """Chunks of 128 tokens, whose logits are made again in the backward pass."""

    def part(hidden: Tensor, targets: Tensor) -> Tensor:
        log_p = F.linear(hidden, c.weight).log_softmax(-1)
        return log_p.gather(-1, targets[:, None])

    again = functools.partial(torch.utils.checkpoint.checkpoint, part, use_reentrant=False)
    parts = zip(c.hidden.split(128), c.targets.split(128), strict=True)
    return torch.cat([again(h, t) for h, t in parts]).mean()


def liger(c: Case) -> Tensor:
    """Liger's makes the gradients of a mean in the forward pass, as torch's "mean" does."""
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    return -LigerFusedLinearCrossEntropyFunction.apply(c.hidden, c.weight, c.targets)[0]


def cut(c: Case) -> Tensor:
    return -cut_cross_entropy(c.hidden, c.weight, c.targets)


# ---- The DPO loss --------------------------------------------------------------------------------


def dpo_of(logp: Tensor) -> Tensor:
    chosen, rejected = logp.view(RESPONSES, -1).sum(1).chunk(2)
    none = torch.zeros_like(chosen)
    return losses.sigmoid(losses.Pairs(chosen, rejected, none, none)).mean()


def our_dpo(c: Case) -> Tensor:
    return dpo_of(linear_logp(c.hidden, c.weight, c.targets).logp)


def naive_dpo(c: Case) -> Tensor:
    log_p = F.linear(c.hidden, c.weight).log_softmax(-1)
    return dpo_of(log_p.gather(-1, c.targets[:, None]))


def trl_dpo(c: Case) -> Tensor:
    return dpo_of(trl_logp(c))


def liger_dpo(c: Case, compiled: bool) -> Tensor:
    """Liger's makes its gradients in the forward pass, in chunks of one pair."""
    loss = LigerFusedLinearDPOLoss(use_ref_model=False, compiled=compiled)
    hidden, targets = (x.view(RESPONSES, -1, *x.shape[1:]) for x in (c.hidden, c.targets))
    return loss(c.weight, hidden, targets)[0]


# ---- All of them ---------------------------------------------------------------------------------


def contenders(kind: str, sizes: Sizes) -> dict[str, Callable[[Case], Tensor]]:
    """The contenders that are installed and run on the device; `missing` names the rest."""
    ways: dict[str, Callable[[Case], Tensor]]
    if kind == "dpo":
        ways = {"ours": our_dpo, "naive": naive_dpo}
        if TRL is not None:
            ways["TRL's chunks"] = trl_dpo
        if LigerFusedLinearDPOLoss is not None:
            ways["Liger's"] = functools.partial(liger_dpo, compiled=False)
            ways["Liger's, compiled"] = functools.partial(liger_dpo, compiled=True)
        return ways
    written_out = "" if TRL else " (written out)"
    ways = {"ours": ours}
    if kind == "trained" and sizes.device == "cpu" and sizes.dtype == "float32":
        ways["ours, mean alone"] = our_mean
    ways |= {
        "naive": naive,
        f"TRL's selective_log_softmax{written_out}": selective_log_softmax,
    }
    if TRL is not None:
        ways["TRL's chunks"] = trl_chunks
    ways["checkpoints"] = checkpoints
    if hasattr(F, "linear_cross_entropy"):
        chunks = functools.partial(torch_chunks, rows=256)
        ways["torch's chunks of 256"] = functools.partial(chunks, reduction="none")
        ways["torch's chunks of 256, mean alone"] = functools.partial(chunks, reduction="mean")
        ways["torch's chunks, mean alone"] = functools.partial(torch_chunks, reduction="mean")
    if sizes.device == "cuda" and LigerFusedLinearDPOLoss is not None:
        ways["Liger's, mean alone"] = liger
    if sizes.device == "cuda" and cut_cross_entropy is not None:
        ways["cut-cross-entropy"] = cut
    return ways


def missing(device: str) -> list[str]:
    """The peers that would run on the device if they were installed."""
    peers = {"TRL": TRL, "Liger": LigerFusedLinearDPOLoss}
    if device == "cuda":
        peers["cut-cross-entropy"] = cut_cross_entropy
    if not hasattr(F, "linear_cross_entropy"):
        peers["torch's linear_cross_entropy"] = None
    return [name for name, peer in peers.items() if peer is None]
