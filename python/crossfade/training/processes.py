"""Several processes that train one model, each on its share of every batch, as one process would.

Three things make their curve that of one process with the whole batch:

* Rows: a batch is divided among the processes, and so is the shorter one that ends an epoch, of
  which no row is read twice (`Shares`).
* Losses: they are computed from the log-probs of the whole batch, in every process (`WholeBatch`),
  or are sums that are divided by what all processes count.
* Decisions: what ends a run in one process ends it in all, at the same step (`in_any`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler

from ..extras import require

IGNORED = -100  # the label of a position that is not trained on
PARTS = ("FSDP", "DEEPSPEED")  # what keeps the weights in parts, as Accelerate calls it
STANDS_IN = "stands_in"  # the key of a batch that is there for the number of steps alone
_PARTED: list[Any] = []  # groups of processes that no longer work together


def is_main_process() -> bool:
    """Whether this process is the one, of several, that prints what all have done.

    What starts processes says it before they have found each other, such as while rows are read.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def in_any(accelerator: Any, flag: bool) -> bool:
    """Whether a flag is set in any of the processes, all of which have to ask."""
    if accelerator.num_processes == 1:
        return flag
    said = torch.tensor([int(flag)], device=accelerator.device)
    return bool(accelerator.gather(said).any())


def get_logger(name: str) -> logging.Logger:
    """A logger for what all processes find, and the first one alone says."""
    logger = logging.getLogger(name)
    logger.addFilter(lambda record: is_main_process())
    return logger


def part(accelerator: Any) -> None:
    """End what the processes did together.

    Their group is kept until this process ends. Torch would destroy it together with the trainer,
    and would then wait, with Python's lock, for threads of gloo: for ever, where one of them is
    about to free a tensor that was exchanged, which takes the same lock.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        _PARTED.append(torch.distributed.group.WORLD)
    accelerator.end_training()


def of_the_first(x: Any) -> Any:
    """What the first process has, in all of them."""
    return require("accelerate.utils", "train").broadcast_object_list([x])[0]


def check_processes(trainer: Any, *, whole: bool = False) -> None:
    """Refuse processes that would each train alone, and weights in parts where none can be.

    Args:
        whole: whether the trainer needs the whole model in each process.

    Raises:
        ValueError: Accelerate passes over what was asked for, as it does on CPUs.
        NotImplementedError: the weights are in parts, and the trainer needs the whole model.
    """
    accelerator = trainer.accelerator
    how, device = accelerator.distributed_type.value, accelerator.device
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and accelerator.num_processes == 1:
        raise ValueError(
            f"WORLD_SIZE is {started}, and args.use_cpu is {trainer.args.use_cpu!r}; it must be "
            f"True, without DeepSpeed, where processes are to train on {device} together: "
            "Accelerate would let each of them train alone"
        )
    for name in PARTS:
        asked = os.environ.get(f"ACCELERATE_USE_{name}", "false")
        if asked.lower() in ("1", "true") and how != name:
            raise ValueError(
                f"ACCELERATE_USE_{name} is {asked!r}, as accelerate launch sets it; it must be "
                f"left out for {device}, on which Accelerate passes over it and gives each process "
                "a copy of the model"
            )
    if whole and how in PARTS:
        raise NotImplementedError(
            f"{how} spreads the weights over processes, which {type(trainer).__name__} does not "
            "support; processes with a copy each (DDP) are, as torchrun starts them, and "
            "accelerate launch with docs/configs/ddp.yaml"
        )


class Shares(BatchSampler):
    """The rows that one process reads, of batches that several processes read together.

    A batch of all has `size` rows for each process; the last one of an epoch has what is left,
    divided as evenly as can be. A process for which nothing is left reads the first of these rows,
    as all have to make the same steps: it stands in, and its batch counts nothing.

    Args:
        sampler: gives the rows in their order, the same in all processes.
        size: rows of a process.
        processes, index: how many there are, and which of them this is.
        drop_last: whether to leave out a last batch that is not full.
    """

    def __init__(
        self, sampler: Any, size: int, processes: int, index: int, drop_last: bool
    ) -> None:
        self.rows, self.batch_size, self.drop_last = sampler, size, drop_last
        self.sampler = sampler  # by this name Accelerate tells it of epochs
        self.processes, self.index = processes, index

    @property
    def whole(self) -> int:
        """Rows of a batch of all processes."""
        return self.batch_size * self.processes

    @property
    def stands_in(self) -> bool:
        """Whether nothing is left for this process of an epoch's last batch."""
        return not self.drop_last and 0 < len(self.rows) % self.whole <= self.index

    def __len__(self) -> int:
        full, left = divmod(len(self.rows), self.whole)
        return full + bool(left and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in BatchSampler(self.sampler, self.whole, self.drop_last):
            size, more = divmod(len(batch), self.processes)
            start = self.index * size + min(self.index, more)
            yield batch[start : start + size + (self.index < more)] or batch[:1]


def divide(loader: Any) -> bool:
    """Have the data loader of several processes give each its `Shares`.

    Accelerate would fill up an epoch's last batch with rows of its first one, which would then
    count twice.

    Returns:
        Whether this process stands in for an epoch's last batch.
    """
    kind = require("accelerate.data_loader", "train").BatchSamplerShard
    shard = getattr(loader, "batch_sampler", None)
    if not isinstance(shard, kind) or shard.split_batches:
        return False  # streams, or how `args.accelerator_config` wants it
    inner = shard.batch_sampler
    if type(inner) is not BatchSampler:
        return False
    shares = Shares(
        inner.sampler, inner.batch_size, shard.num_processes, shard.process_index, inner.drop_last
    )
    # what it gives is divided already: the shard passes it on as it comes
    shard.batch_sampler, shard.num_processes, shard.process_index = shares, 1, 0
    shard.even_batches = False
    return shares.stands_in


class InParallel:
    """What trainers share that train with several processes as with one. It comes first of bases.

    `get_batch_samples` marks a batch that stands in by the key `STANDS_IN`, which `compute_loss`
    has to take out, and has no token of it counted.
    """

    _stands_in_at_end = False

    @property
    def _several(self) -> bool:
        """Whether there are several processes, each with rows of its own."""
        alike = self.get_tp_size() * self.get_cp_size() * self.get_sp_size()
        return self.accelerator.num_processes > 1 and alike == 1

    def _divides(self) -> bool:
        """Whether batches may have a few rows less in one process than in another."""
        return self._several

    def get_train_dataloader(self) -> Any:
        """As in Transformers, with rows divided as `Shares` does."""
        loader = super().get_train_dataloader()  # type: ignore[misc]
        if self._divides():
            self._stands_in_at_end = divide(loader)
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: Any
    ) -> tuple[list[Any], Any]:
        """As in Transformers: the batches of a step, and what their loss is divided by."""
        marked = self._marked(epoch_iterator)
        return super().get_batch_samples(marked, num_batches, device)  # type: ignore[misc]

    def _marked(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            if self._stands_in_at_end and self.accelerator.gradient_state.end_of_dataloader:
                labels = {k: batch[k] for k in ("labels", "shift_labels") if k in batch}
                none = {k: torch.full_like(x, IGNORED) for k, x in labels.items()}
                yield {**batch, **none, STANDS_IN: True}
            else:
                yield batch

    def _rows_that_count(self, rows: int) -> int:
        """How many rows of an evaluation's batch are not there to fill it up."""
        state = self.accelerator.gradient_state
        if not self._several or not state.end_of_dataloader or state.remainder <= 0:
            return rows
        return min(rows, max(0, state.remainder - rows * self.accelerator.process_index))

    accelerator: Any
    get_tp_size: Callable[[], int]
    get_cp_size: Callable[[], int]
    get_sp_size: Callable[[], int]


# The whole batch in whose rows the models of a trainer are asked for log-probs, if any.
_WHOLE: ContextVar[WholeBatch | None] = ContextVar("whole batch", default=None)


class WholeBatch:
    """The batch of all processes, of which this one has some rows.

    A loss may be more than a mean over rows: a divergence of the batch (KTO), a sort of it (AOT).
    So each process computes the loss of all rows, from log-probs that each model computes for the
    process's own rows and that are then exchanged. Only numbers of tokens travel, no logits and no
    hidden states.

    Args:
        accelerator: of the trainer.
        inputs: this process's batch. A tensor has `rows` rows, or a multiple of it, such as all
            chosen ones and then all rejected ones.
        rows: of the batch in this process.
        count: how many of them count, the first ones.

    Attributes:
        inputs: the whole batch, the same in all processes.
    """

    def __init__(self, accelerator: Any, inputs: Mapping[str, Any], rows: int, count: int) -> None:
        self._gather = accelerator.gather
        self._processes = accelerator.num_processes
        own = {k: x for k, x in inputs.items() if isinstance(x, Tensor) and x.dim()}
        widths = [x.shape[1] if x.dim() > 1 else 1 for x in own.values()]
        said = self._gather(torch.tensor([[count, *widths]], device=accelerator.device)).cpu()
        counts = said[:, 0].tolist()
        self._count, self._most, self._total = count, max(counts), sum(counts)
        self._first = sum(counts[: accelerator.process_index])
        self._kept = [r * self._most + i for r, n in enumerate(counts) for i in range(n)]
        self._groups = len(inputs["input_ids"]) // rows
        self.inputs = dict(inputs)
        for (name, x), width in zip(own.items(), said[:, 1:].amax(0).tolist(), strict=True):
            wide = x if x.dim() == 1 else _padded(x, 1, width)
            self.inputs[name] = self._of_all(wide, len(x) // rows)

    def log_probs(self, forward: Callable[..., Any], **given: Any) -> Any:
        """What a model's ``forward`` gives for the whole batch, when asked by all processes."""
        size, own = self._groups * self._total, self._own()
        mine = {
            k: x[own] if isinstance(x, Tensor) and x.dim() and len(x) == size else x
            for k, x in given.items()
        }
        found = forward(**mine)
        each = {k: x for k, x in found.items() if x is not None and x.dim()}
        first = each["log_probs"]
        together = _Together.apply(torch.stack([x.to(first.dtype) for x in each.values()], 2), self)
        made = {k: x.to(each[k].dtype) for k, x in zip(each, together.unbind(2), strict=True)}
        if found.aux_loss is not None:  # the mean over processes, whose gradients are averaged too
            mean = self._gather(found.aux_loss.detach()[None]).mean()
            made["aux_loss"] = found.aux_loss + (mean - found.aux_loss).detach()
        return dataclasses.replace(found, **made)

    def _own(self) -> list[int]:
        """The places of this process's rows; of one that has none, the first row's."""
        rows = range(self._first, self._first + self._count) if self._count else range(1)
        return [group * self._total + row for group in range(self._groups) for row in rows]

    def _of_all(self, x: Tensor, groups: int) -> Tensor:
        """The rows of all processes, of this one's: ``[groups x rows, ...]`` both."""
        rows = x.unflatten(0, (groups, -1)).transpose(0, 1)[: self._count]
        found = self._gather(_padded(rows, 0, self._most).contiguous())[self._kept]
        return found.transpose(0, 1).flatten(0, 1)

    def share(self, gradient: Tensor) -> Tensor:
        """This process's part of a gradient, so that the mean over processes is that of all."""
        own = gradient[self._own()]
        return own * self._processes if self._count else torch.zeros_like(own)


class _Together(torch.autograd.Function):
    """The rows of all processes, of which this one's own have a gradient."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, whole: WholeBatch) -> Tensor:
        ctx.whole = whole
        return whole._of_all(own, whole._groups)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.whole.share(gradient), None


def together(forward: Callable[..., Any], **given: Any) -> Any:
    """What `forward` gives, for the rows of all processes inside of `whole_batch`."""
    whole = _WHOLE.get()
    return forward(**given) if whole is None else whole.log_probs(forward, **given)


@contextlib.contextmanager
def whole_batch(
    accelerator: Any, inputs: Mapping[str, Any], rows: int, count: int
) -> Iterator[dict[str, Any]]:
    """Have the models here give the log-probs of a `WholeBatch`, whose inputs are given.

    What the block has the accelerator gather is there for all rows already, and stays as it is.
    """
    whole = WholeBatch(accelerator, inputs, rows, count)
    token = _WHOLE.set(whole)
    try:
        with _gathering(accelerator, lambda x: x):
            yield whole.inputs
    finally:
        _WHOLE.reset(token)


@contextlib.contextmanager
def sums_of_all(accelerator: Any, counts: bool) -> Iterator[None]:
    """Have the accelerator gather for figures what each process has summed up in training.

    By itself it leaves some out at the end of an epoch, where it takes them for rows.

    Args:
        counts: whether the batch of this process does.
    """
    plain = accelerator.gather
    with _gathering(accelerator, lambda x: plain(x if counts else torch.zeros_like(x))):
        yield


@contextlib.contextmanager
def _gathering(accelerator: Any, gather: Callable[[Any], Any]) -> Iterator[None]:
    names = ("gather", "gather_for_metrics")
    before = {name: vars(accelerator).get(name) for name in names}
    vars(accelerator).update(dict.fromkeys(names, gather))
    try:
        yield
    finally:
        for name, was in before.items():
            if was is None:
                del vars(accelerator)[name]
            else:
                vars(accelerator)[name] = was


def _padded(x: Tensor, dim: int, size: int) -> Tensor:
    """A tensor with zeros at the end of a dimension, which then has that size."""
    if x.shape[dim] == size:
        return x
    shape = list(x.shape)
    shape[dim] = size - x.shape[dim]
    return torch.cat([x, x.new_zeros(shape)], dim)
