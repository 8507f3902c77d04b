"""What `crossfade bench ops` compares: our op, plain torch, FlashInfer, and a mere read.

Each contender of a case is a function without arguments, over inputs of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import util
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .report import FLOOR, OURS
from .timing import inputs_needed, read

WEIGHTS = (1.0, 0.8, -0.8)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top-p 0.9": {"top_p": 0.9},
    "top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9},
}


def flat_rows(batch: int, vocab: int, generator: torch.Generator) -> Tensor:
    """Logits of all terms whose rows are nearly uniform: four fifths of the tokens pass top-p 0.9.

    They are [terms, batch, vocab], as are those of `normal_rows` and `real_rows`.
    """
    return 0.3 * _normal(batch, vocab, generator)


def normal_rows(batch: int, vocab: int, generator: torch.Generator) -> Tensor:
    """Rows of which some 5,000 tokens pass top-p 0.9 where V = 128,256."""
    return 2 * _normal(batch, vocab, generator)


def real_rows(batch: int, vocab: int, generator: torch.Generator) -> Tensor:
    """Rows like a language model's: some 30 tokens pass top-p 0.9, and the terms nearly agree.

    The token of rank r has the logit -1.6 log r and a little noise. In SmolLM2's rows, too, the
    tenth token lies 3.6 nats below the first one, the hundredth 7.4 and the thousandth 11.5.
    """
    keys = torch.rand(batch, vocab, generator=generator, device=generator.device)
    ranks = keys.argsort(dim=-1) + 1.0  # each token's, which are a random order
    return -1.6 * ranks.log() + 0.3 * _normal(batch, vocab, generator)


def _normal(batch: int, vocab: int, generator: torch.Generator) -> Tensor:
    shape = len(WEIGHTS), batch, vocab
    return torch.randn(shape, generator=generator, device=generator.device)


ROWS = {"flat": flat_rows, "normal": normal_rows, "real": real_rows}


@dataclass(frozen=True)
class Case:
    """Three terms with logits `[batch, vocab]`, blended with `WEIGHTS`, sampled by a setting.

    Attributes:
        setting: one of `SETTINGS`.
        rows: what the logits are, one of `ROWS`.
    """

    dtype: str
    batch: int
    vocab: int
    setting: str
    rows: str = "normal"

    @property
    def bytes(self) -> int:
        """The size of all logits."""
        return len(WEIGHTS) * self.batch * self.vocab * getattr(torch, self.dtype).itemsize


def chain(logits: list[Tensor], setting: dict[str, Any]) -> Callable[[], Tensor]:
    """What one writes in torch: log-softmaxes, Hugging Face's processors, softmax, multinomial."""
    from transformers.generation import logits_process as hf

    processors = hf.LogitsProcessorList()
    if "top_k" in setting:
        processors.append(hf.TopKLogitsWarper(setting["top_k"]))
    if "top_p" in setting:
        processors.append(hf.TopPLogitsWarper(setting["top_p"]))
    ids: Any = torch.zeros(len(logits[0]), 1, dtype=torch.long, device=logits[0].device)

    def sample() -> Tensor:
        blended: Any = sum(
            w * z.float().log_softmax(-1) for w, z in zip(WEIGHTS, logits, strict=True)
        )
        return torch.multinomial(processors(ids, blended).softmax(-1), 1)

    return sample


def flashinfer(logits: list[Tensor], setting: dict[str, Any]) -> Callable[[], Tensor] | None:
    """FlashInfer's sampler on logits that torch blends; None if there is no FlashInfer or GPU."""
    if logits[0].device.type != "cuda" or util.find_spec("flashinfer") is None:
        return None
    from flashinfer import sampling

    def sample() -> Tensor:
        blended: Any = sum(w * z.float() for w, z in zip(WEIGHTS, logits, strict=True))
        if "top_k" in setting:
            return sampling.top_k_top_p_sampling_from_logits(
                blended, setting["top_k"], setting["top_p"]
            )
        if "top_p" in setting:
            return sampling.top_p_sampling_from_probs(blended.softmax(-1), setting["top_p"])
        return sampling.sampling_from_logits(blended)

    return sample


def logits(case: Case, generator: torch.Generator) -> Tensor:
    """All terms' logits, [terms, batch, vocab], in one piece."""
    made = ROWS[case.rows](case.batch, case.vocab, generator)
    return made.to(getattr(torch, case.dtype))


def contenders(case: Case, device: str) -> dict[str, list[Callable[[], Any]]]:
    """Calls of each contender, which share the inputs of their index."""
    setting = SETTINGS[case.setting]
    generator = torch.Generator(device).manual_seed(0)
    calls: dict[str, list[Callable[[], Any]]] = {}
    # A graph replays the same launches, so that on a GPU the step is a tensor, as in a decoder.
    step = torch.zeros(case.batch, dtype=torch.int64, device=device) if device == "cuda" else 0
    for _ in range(inputs_needed(case.bytes, device)):
        whole = logits(case, generator)
        z = list(whole)

        def ours(z: list[Tensor] = z, **kw: Any) -> Any:
            return ops.blend_sample(z, WEIGHTS, seed=0, step=step, **setting, **kw)

        ways: dict[str, Callable[[], Any] | None] = {
            FLOOR: read_of(whole),
            OURS: ours,
            "torch chain": chain(z, setting),
            "flashinfer": flashinfer(z, setting),
        }
        if device == "cuda":
            ways["ours, Triton"] = functools.partial(ours, backend="triton")
        for name, call in ways.items():
            if call is not None:
                calls.setdefault(name, []).append(call)
    return calls


def read_of(x: Tensor) -> Callable[[], Any]:
    """What no contender can be faster than: reading all inputs once.

    On a GPU a copy moves as many bytes.
    """
    if x.is_cpu:
        return functools.partial(read, x)
    source = x.flatten()
    half = source.numel() // 2  # a copy both reads and writes, so that half the inputs suffice
    target = torch.empty_like(source[:half])
    return lambda: target.copy_(source[:half])
