"""Preference training on the policy's own responses, of which a judge prefers one.

Source: SELF-JUDGE (Lee et al., arXiv:2402.11253, section 3.2).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..blends.blend import Model
from ..checks import check_number
from ..decoding.generation import generate
from ..decoding.inputs import encode
from ..decoding.search.tournament import judged
from ..extras import require
from ..models.hf import is_peft
from ..search import check_prefer
from . import rows
from .processes import STANDS_IN, check_processes, get_logger
from .sampling import as_decoded, noise
from .trainers.base import columns_error, columns_of
from .trainers.dpo import PAIR_WEIGHTS, WITHOUT_REFERENCE, WITHOUT_WEIGHTS, DPOTrainer

trl = require("trl", "train")
logger = get_logger(__name__)
# Losses that do not go with sampled pairs, and why.
REFUSED_LOSSES = {
    **dict.fromkeys(WITHOUT_WEIGHTS, "sorts the batch, and ties must count nothing"),
    "modpo": "needs margins, which sampled pairs do not have",
}


@dataclass
class SelfJudgeConfig(trl.DPOConfig):  # type: ignore[name-defined]
    """TRL's `DPOConfig` with the paper's defaults, and how responses are sampled.

    Args:
        temperature: of sampling, above 0.
        top_p: the share of the probability that is sampled from, within (0, 1].
        max_new_tokens: the most tokens of a response. One that reaches them is cut, and is trained
            on without EOS.
        max_length: a prompt whose response might pass it is left out. Nothing is cut.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
    """

    temperature: float = field(default=1.0, metadata={"help": "of sampling, above 0"})
    top_p: float = field(
        default=0.9, metadata={"help": "the share of the probability that is sampled from"}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "the most tokens of a response"})
    learning_rate: float = field(default=5e-6, metadata={"help": "the highest"})
    lr_scheduler_type: Any = field(
        default="constant_with_warmup", metadata={"help": "constant after the warm-up by default"}
    )
    warmup_steps: float = field(
        default=0.1, metadata={"help": "steps of warm-up; a share of all steps if below 1"}
    )

    def __post_init__(self) -> None:
        if check_number("temperature", self.temperature) <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")
        if not 0 < check_number("top_p", self.top_p) <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be within (0, 1]")
        most = self.max_new_tokens
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise ValueError(f"max_new_tokens is {most!r}; it must be an int of at least 1")
        if self.precompute_ref_log_probs:
            raise ValueError(
                "precompute_ref_log_probs is True; it must be False, as responses are sampled "
                "while the policy is trained"
            )
        super().__post_init__()


class SelfJudgeTrainer(DPOTrainer):
    """`DPOTrainer` on prompts: at each step the policy responds, and a judge makes the pairs.

    For each prompt of a step two responses are sampled by `crossfade.generate`. The judge prefers
    one, and the step is that of `DPOTrainer` on these pairs, with the very ids that were sampled.
    Models sample and judge without dropout and gradients, and without what a saved generation
    config says of sampling. The noise of a prompt depends on ``args.seed``, the global step and the
    prompt's place in the dataset alone. So a run that is resumed from a checkpoint ends in the same
    weights to the last bit, and several processes sample what one would.

    As in a `Tournament`, the judge is not asked of a response that failed or has no word, which
    loses against any other, nor of two with the same text, which tie. A pair gives no gradient if
    it ties, as it does where the judge finds exactly 0.5, or if it fails: neither response has a
    word, one has no tokens, as the prompt is too long for the model, or the judge gave NaN. The
    loss is still the mean over all prompts of a batch.

    Beside the figures of `DPOTrainer`, whose rewards are of the pairs that count, it logs
    `judge/chosen`, the mean probability of chosen responses by the judge, `judge/ties` and
    `judge/failed`, the shares of pairs without gradient, `samples/length`, the mean number of
    tokens of a response, and `samples/finished`, the share of responses that ended by themselves.

    Args:
        model: as in `DPOTrainer`. With an adapter of `peft_config` the reference is the model
            without it.
        ref_model: the reference, which must be given where all weights are trained.
        args: a `SelfJudgeConfig`.
        judge: has ``prefer(contexts, firsts, seconds)``, which gives the probability that the first
            response is preferred, ``[n]``: above 0.5 where it is, NaN where it could not say. The
            contexts are the prompts as they are in the dataset (texts or chats; of ids alone, what
            they decode to), the responses are texts. It must stay as it is while the policy
            changes. Or a function that makes it of the model that is trained, once the adapter of
            `peft_config` is there: under LoRA ``lambda policy: cf.Judge(cf.Model(policy,
            tokenizer=tokenizer, adapter=None))`` is the model without it.
        train_dataset: rows with ``prompt``, a text or a chat, or ``prompt_ids``, or both: the ids
            then are what the policy reads, and the prompt is what the judge reads. `eval_dataset`
            has pairs, as in `DPOTrainer`.
        loss, loss_options: as in `DPOTrainer`, but "aot", "aot_unpaired" and "modpo".

    Raises:
        ValueError, TypeError: an argument does not fit the others.
        NotImplementedError: the model's weights are spread over processes.
    """

    _kind = "dpo"

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        *rest: Any,
        judge: Any,
        loss: str = "sigmoid",
        loss_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        makes = inspect.isfunction(judge) or isinstance(judge, functools.partial)
        if not makes:
            _check_judge("judge", judge)
        if not isinstance(args, SelfJudgeConfig):
            raise TypeError(f"args is a {type(args).__name__}; it must be a SelfJudgeConfig")
        if loss is None or loss in REFUSED_LOSSES:
            raise ValueError(
                f"loss is {loss!r}; it must be another one, as this one "
                f"{REFUSED_LOSSES.get(loss, 'is left to args.loss_type')}"
            )
        adapted = is_peft(model) or options.get("peft_config") is not None
        if ref_model is None and not adapted and loss not in WITHOUT_REFERENCE:
            raise ValueError(
                "ref_model is None, and all weights are trained; it must be a copy of the model, "
                "or peft_config must be given: the reference is then the model without the adapter"
            )
        super().__init__(
            model, ref_model, args, *rest, loss=loss, loss_options=loss_options, **options
        )
        self.judge = judge(self.model) if makes else judge
        _check_judge("what judge(model) gave", self.judge)
        check_processes(self, whole=True)
        self.data_collator = OfPrompts(self.data_collator)

    # ---- rows

    def _check(self, dataset: Any, name: str) -> Any:
        kind = "prompts" if name == "the train dataset" else self._kind
        return rows.checked(dataset, kind, name, **self._known)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        if dataset_name != "train":
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        name = "the train dataset"
        if not {"prompt", "prompt_ids"} & columns_of(dataset):
            raise columns_error(name, columns_of(dataset), "prompt or prompt_ids")
        tokenizer = self._tokenizer
        given = dataset.map(functools.partial(_encoded, tokenizer=tokenizer), with_indices=True)
        if args.max_length is None:
            return given
        most = args.max_length - args.max_new_tokens
        kept = given.filter(lambda row: len(row["prompt_ids"]) <= most)
        if hasattr(kept, "__len__") and len(kept) < len(given):
            why = (
                f"longer than {most} tokens, which args.max_length ({args.max_length}) less "
                f"args.max_new_tokens ({args.max_new_tokens}) leaves"
            )
            if len(kept) == 0:
                raise ValueError(f"{name} has no row left: all prompts are {why}")
            logger.warning(
                "%s: %d of %d prompts are left out, as they are %s",
                name,
                len(given) - len(kept),
                len(given),
                why,
            )
        return kept

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        for name in ("prompt", "prompt_index"):
            if name not in self._signature_columns:
                self._signature_columns.append(name)

    # ---- a step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: Any
    ) -> tuple[list[Any], Any]:
        """As in Transformers: the batches of a step. Pairs take the place of their prompts."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        prompts = [row for batch in batches for row in batch["prompts"]]
        counted = [not batch.get(STANDS_IN) for batch in batches for _ in batch["prompts"]]
        pairs = iter(self._pairs(prompts, counted) if prompts else ())
        made = []
        for batch in batches:
            some = [next(pairs) for _ in batch["prompts"]]
            weights = torch.tensor([pair.weight for pair in some])
            told = {PAIR_WEIGHTS: weights, STANDS_IN: batch.get(STANDS_IN, False)}
            made.append({**self.data_collator([p.row for p in some]), **told})
        return made, count

    def _pairs(self, prompts: Sequence[Mapping[str, Any]], counted: Sequence[bool]) -> list[Pair]:
        """Two responses to each prompt, in the order of the judge's preference.

        Args:
            counted: whether the figures that are logged are of a prompt too.
        """
        with as_decoded(self.model):
            out: Any = generate(
                Model(self.model, tokenizer=self._tokenizer, name="policy"),
                [row["prompt_ids"] for row in prompts],
                seed=[self._noise(row["prompt_index"]) for row in prompts],
                do_sample=True,
                temperature=self.args.temperature,
                top_p=self.args.top_p,
                max_new_tokens=self.args.max_new_tokens,
                num_return_sequences=2,
                progress=False,
            )
            contexts = [_context(row, self._tokenizer) for row in prompts for _ in range(2)]
            referee = judged(self.judge, contexts, out.text, out.failed.tolist())
            found = referee.probs([(i, i + 1) for i in range(0, len(contexts), 2)])
        ids = list(zip(out.responses[::2], out.responses[1::2], strict=True))
        probs = [p if a and b else math.nan for p, (a, b) in zip(found, ids, strict=True)]
        self._tell(probs, out, counted)
        pairs = []
        for row, both, p in zip(prompts, ids, probs, strict=True):
            chosen, rejected = both[::-1] if p < 0.5 else both
            made = {"chosen_ids": chosen, "rejected_ids": rejected}
            pairs.append(Pair({"prompt_ids": row["prompt_ids"], **made}, float(abs(p - 0.5) > 0)))
        return pairs

    def _noise(self, index: int) -> int:
        """The seed of a prompt's responses at this step."""
        return noise(self.args.seed, self.state.global_step, index)

    # ---- figures

    def _tell(self, probs: Sequence[float], out: Any, counted: Sequence[bool]) -> None:
        """Count what became of the pairs of a step, in all processes."""
        kept = torch.tensor(counted)
        p = torch.tensor(probs)[kept]
        counts, failed = (p - 0.5).abs() > 0, p.isnan()
        both = kept.repeat_interleave(2).to(out.lengths.device)
        lengths, finished = out.lengths[both], out.finished[both]
        lengths = lengths[lengths > 0].float()
        sums = [
            (p[counts] - 0.5).abs().sum() + 0.5 * counts.sum(),
            counts.sum(),
            (~counts & ~failed).sum(),
            failed.sum(),
            torch.tensor(len(p)),
            lengths.sum(),
            torch.tensor(len(lengths)),
            finished.sum(),
        ]
        local = torch.stack([x.float().cpu() for x in sums]).to(self.accelerator.device)
        probability, count, ties, failures, n, tokens, written, ended = self.accelerator.reduce(
            local, reduction="sum"
        ).tolist()
        self._tally(
            "train",
            {
                "judge/chosen": (probability, count),
                "judge/ties": (ties, n),
                "judge/failed": (failures, n),
                "samples/length": (tokens, written),
                "samples/finished": (ended, written),
            },
        )

    _tokenizer: Any
    _signature_columns: list[str]
    state: Any


class Pair(NamedTuple):
    """A row of ids as `DPOTrainer` takes it, and whether it counts, 1.0 or 0.0."""

    row: dict[str, list[int]]
    weight: float


@dataclass
class OfPrompts:
    """A collator that leaves prompts as they are, and gives pairs to TRL's collator."""

    collator: Callable[[list[dict[str, Any]]], dict[str, Tensor]]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {"prompts": rows} if "prompt_index" in rows[0] else self.collator(rows)


def _check_judge(name: str, judge: Any) -> None:
    if not callable(getattr(judge, "prefer", None)) or isinstance(judge, type):
        raise TypeError(
            f"{name} is a {type(judge).__name__}; it must have prefer(contexts, firsts, seconds), "
            "as crossfade.Judge has"
        )
    check_prefer(judge, name)


def _encoded(row: Mapping[str, Any], index: int, tokenizer: Any) -> dict[str, Any]:
    """A prompt's ids, and its place in the dataset."""
    ids = row.get("prompt_ids") or encode(_plain(row["prompt"]), tokenizer, "policy")
    return {"prompt_ids": ids, "prompt_index": index}


def _context(row: Mapping[str, Any], tokenizer: Any) -> Any:
    """What the judge reads of a prompt."""
    if row.get("prompt") is not None:
        return _plain(row["prompt"])
    return tokenizer.decode(row["prompt_ids"], skip_special_tokens=True)


def _plain(prompt: Any) -> Any:
    """A prompt as it was given: a table has None for the keys that a message does not have."""
    if isinstance(prompt, str):
        return prompt
    return [{key: x for key, x in message.items() if x is not None} for message in prompt]
