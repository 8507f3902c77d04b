"""The sampling loop: blend, process, draw, append, until every row has ended."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from .. import ops
from ..blend import Blend
from ..ops import BlendSample, check
from .inputs import Prompts
from .runner import Runner
from .settings import Sampling


class Mixer:
    """A blend's arithmetic for the rows of one call, each request `copies` times."""

    def __init__(
        self, blend: Blend, requests: int, copies: int, vocabulary: int, device: torch.device
    ) -> None:
        self.blend, self.copies = blend, copies
        self.vocabulary, self.device = vocabulary, device
        self.weights = self._rows(blend.row_weights(requests, device))
        self.value_weights = self._rows(blend.row_value_weights(requests, device))

    def _rows(self, weights: tuple[float, ...] | Tensor) -> tuple[float, ...] | Tensor:
        each = isinstance(weights, Tensor) and weights.dim() == 2
        return weights.repeat_interleave(self.copies, 0) if each else weights  # type: ignore[union-attr]

    def _inputs(self, logits: Sequence[Tensor]) -> dict[str, Any]:
        blend = self.blend
        k = len(blend.terms)
        return {
            "logits": logits[:k],
            "weights": self.weights,
            "values": logits[k:],
            "value_weights": self.value_weights,
            "power": blend.power,
            "support": blend.support,
            "vocab_size": self.vocabulary,
        }

    def log_probs(self, logits: Sequence[Tensor]) -> Tensor:
        """``[rows, V]`` float32 under the blend."""
        return ops.blend(**self._inputs(logits))

    def sample(self, logits: Sequence[Tensor], draw: dict[str, Any]) -> BlendSample:
        return ops.blend_sample(**self._inputs(logits), **draw)

    def term_log_probs(self, logits: Sequence[Tensor]) -> list[Tensor]:
        """``[rows, V]`` float32 under each term alone."""
        z = logits[: len(self.blend.terms)]
        return [t[:, : self.vocabulary].float().log_softmax(dim=-1) for t in z]

    def scores(self, logits: Sequence[Tensor], log_p: Tensor) -> Tensor:
        """What logits processors read: the blended logits, or log-probs where there are none.

        The geometric blend has logits, ``sum_k w_k z_k + sum_m v_m q_m``: with one term of weight 1
        the model's own, so that processors which look at the sign of a logit (the repetition
        penalty) do what they do in Hugging Face. They are `log_p`, shifted so that the best token
        has its blended logit.
        """
        if self.blend.power != 0:
            return log_p.clone()  # a processor may write into it
        best = log_p.argmax(dim=-1, keepdim=True)
        shift = -log_p.gather(1, best)
        k = len(self.blend.terms)
        for group, weights in ((logits[:k], self.weights), (logits[k:], self.value_weights)):
            w = torch.as_tensor(weights, dtype=torch.float32, device=log_p.device)
            w = w.expand(len(log_p), len(group))
            for i, z in enumerate(group):
                score = w[:, i : i + 1] * z.gather(1, best).float()
                shift = shift + torch.where(w[:, i : i + 1] == 0, 0.0, score)
        return log_p + shift


@dataclass(frozen=True)
class Job:
    """One call's rows and what is to be done with them."""

    prompts: Sequence[Prompts]  # one a term, then one a value
    sampling: Sampling
    seeds: Tensor  # [rows] int64
    streams: Tensor  # [rows] int64
    pad: int
    processors: LogitsProcessorList
    ends: StoppingCriteriaList
    limits: StoppingCriteriaList
    streamer: Any = None
    term_logprobs: bool = False
    kl_to_base: bool = False


@dataclass
class Trace:
    """What the loop wrote, a column a step."""

    ids: Tensor
    lengths: Tensor
    finished: Tensor
    failed: Tensor
    logprobs: list[Tensor] = field(default_factory=list)
    sampled_logprobs: list[Tensor] = field(default_factory=list)
    term_logprobs: list[Tensor] = field(default_factory=list)
    kl_to_base: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def run(runner: Runner, mixer: Mixer, job: Job) -> Trace:
    """Decode until all rows have ended. A row without a token to choose ends there, with a warning.

    Finished rows get padding, as in Hugging Face; the host waits for the device once a step.
    """
    ids = job.prompts[0].repeat(mixer.copies).ids.to(mixer.device)
    rows = len(ids)
    no = torch.zeros(rows, dtype=torch.bool, device=mixer.device)
    trace = Trace(ids, no.long(), no, no)
    done = no
    if job.streamer is not None:
        job.streamer.put(ids.cpu())

    logits = runner.prefill(job.prompts, mixer.copies)
    step = 0
    while True:
        sample = _draw(mixer, job, logits, trace.ids, step)
        failed = (sample.tokens < 0) & ~done
        closed = done | failed  # rows that get no token in this step
        _record(trace, mixer, job, logits, sample, closed)

        tokens = sample.tokens.masked_fill(closed, job.pad)
        trace.ids = torch.cat([trace.ids, tokens[:, None]], dim=1)
        trace.lengths = trace.lengths + (~closed).long()
        ended = job.ends(trace.ids, None) & ~closed
        trace.finished = trace.finished | ended
        trace.failed = trace.failed | failed
        done = closed | ended
        if job.streamer is not None:
            job.streamer.put(tokens.cpu())

        stop = (done | job.limits(trace.ids, None)).all()
        stop, any_failed = torch.stack([stop, failed.any()]).tolist()
        if any_failed:
            _warn(failed.nonzero()[:, 0].tolist(), step, runner, mixer, logits)
        if stop:
            break
        logits = runner.step(tokens.masked_fill(done, 0))  # 0: an id that every model has
        step += 1
    if job.streamer is not None:
        job.streamer.end()
    return trace


def _draw(mixer: Mixer, job: Job, logits: list[Tensor], ids: Tensor, step: int) -> BlendSample:
    s = job.sampling
    draw: dict[str, Any] = {
        "temperature": s.temperature,
        "top_k": s.top_k,
        "top_p": s.top_p,
        "min_p": s.min_p,
        "do_sample": s.do_sample,
        "seed": job.seeds,
        "stream": job.streams,
        "step": step,
    }
    if not job.processors:
        return mixer.sample(logits, {**draw, "return_term_logprobs": job.term_logprobs})

    log_p = mixer.log_probs(logits)
    scores = job.processors(ids, mixer.scores(logits, log_p))  # type: ignore[arg-type]
    if not isinstance(scores, Tensor) or scores.shape != log_p.shape:
        found = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(
            f"logits_processor returned {found}; it must return scores {list(log_p.shape)}"
        )
    sample = ops.blend_sample([scores.float().contiguous()], [1.0], **draw)
    at = sample.tokens.clamp(min=0)[:, None]
    terms = None
    if job.term_logprobs:
        terms = torch.cat([t.gather(1, at) for t in mixer.term_log_probs(logits)], dim=1)
    return sample._replace(logprobs=log_p.gather(1, at)[:, 0], term_logprobs=terms)


def _record(
    trace: Trace,
    mixer: Mixer,
    job: Job,
    logits: list[Tensor],
    sample: BlendSample,
    closed: Tensor,
) -> None:
    trace.logprobs.append(sample.logprobs.masked_fill(closed, 0.0))
    trace.sampled_logprobs.append(sample.sampled_logprobs.masked_fill(closed, 0.0))
    if sample.term_logprobs is not None:
        trace.term_logprobs.append(sample.term_logprobs.masked_fill(closed[:, None], 0.0))
    if job.kl_to_base:
        log_p, log_q = mixer.log_probs(logits), mixer.term_log_probs(logits[:1])[0]
        ratio = torch.where(log_p == -float("inf"), 0.0, log_p - log_q)
        kl = (log_p.exp() * ratio).sum(dim=-1).clamp(min=0.0)  # below 0 by rounding alone
        trace.kl_to_base.append(kl.masked_fill(closed, 0.0))


def _bad_weights(w: Tensor, power: float) -> bool:
    """Whether a request's weights, one a term, cannot be blended with."""
    mean = power != 0 and ((w < 0).any() or (w.sum() - 1).abs() > check.WEIGHT_SUM_TOLERANCE)
    return bool(mean) or not bool(w.isfinite().all())


def _warn(rows: list[int], step: int, runner: Runner, mixer: Mixer, logits: list[Tensor]) -> None:
    names = [m.name for m in runner.models]
    for row in rows:
        culprits = [
            n
            for n, z in zip(names, logits, strict=True)
            if (z[row, : mixer.vocabulary].isnan() | z[row, : mixer.vocabulary].isposinf()).any()
        ]
        why = "no token has a finite score"
        if culprits:
            why = f"{' and '.join(culprits)} gave logits that are NaN or infinite"
        for w, power in ((mixer.weights, mixer.blend.power), (mixer.value_weights, 0.0)):
            if isinstance(w, Tensor) and _bad_weights(w[row], power):
                why = f"its weights are {w[row].tolist()}"
        copy = f", sample {row % mixer.copies}" if mixer.copies > 1 else ""
        warnings.warn(
            f"request {row // mixer.copies}{copy} was ended at its token {step}: {why}",
            RuntimeWarning,
            stacklevel=2,
        )
