"""Which models read what at a step, and what logits come of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from .group import Group


class Plan(Protocol):
    """Decides which of the engine's models read a step's tokens, and which wait."""

    @property
    def stepped(self) -> Sequence[Group]:
        """The groups that read a token of every live row at every step."""

    def join(self, slots: Sequence[int]) -> None:
        """Called when the prompts of these slots have been read, except their last tokens."""

    def fork(self, parents: Sequence[int]) -> None:
        """Slot i becomes what slot ``parents[i]`` is; -1 leaves it as it is."""

    def step(
        self, tokens: Tensor, live: Tensor, slots: Tensor | None = None
    ) -> dict[Group, Tensor]:
        """Logits ``[rows, V]`` of every group, after one more token ``[slots]``.

        Args:
            slots: those that are fed, among them all that are live; None: all. `Lazy` feeds all.
        """

    def take_back(self, which: Tensor) -> None:
        """Let rows forget the token of the last step, which they kept: ``[slots]`` bool."""


class All:
    """The plan by which every model reads every token. In a CUDA graph each has its own stream."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.stepped: Sequence[Group] = groups

    def join(self, slots: Sequence[int]) -> None:
        pass

    def fork(self, parents: Sequence[int]) -> None:
        pass

    def step(
        self, tokens: Tensor, live: Tensor, slots: Tensor | None = None
    ) -> dict[Group, Tensor]:
        first, *others = self.stepped
        streams: dict[Group, torch.cuda.Stream] = {}
        if first.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            here = torch.cuda.current_stream(first.device)
            streams = {g: torch.cuda.Stream(g.device) for g in others if g.device == first.device}
        found = {}
        for group in others:  # They begin first, as the largest model is often the first term's.
            with on_stream(streams.get(group)):
                found[group] = group.step(tokens.to(group.device), live.to(group.device), slots)
        found[first] = first.step(tokens.to(first.device), live.to(first.device), slots)
        for stream in streams.values():
            here.wait_stream(stream)
        return found

    def take_back(self, which: Tensor) -> None:
        for group in self.stepped:
            group.take_back(which)


@contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Run on a stream that begins where the current one is; the current one for None."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        yield


def logits_of(
    found: Mapping[Group, Tensor], device: torch.device, models: int
) -> dict[tuple[int, ...], Tensor]:
    """The logits of each model on one device, of those that groups gave: ``[own * slots, ...]``.

    Those that share a head have their logits together, by all their places.

    Args:
        models: how many of a call's models have logits; riders after these are asked otherwise.
    """
    each: dict[tuple[int, ...], Tensor] = {}
    for group, logits in found.items():
        logits, own = logits.to(device), group.terms[: group.own]
        if group.head.weights is not None:
            each[own] = logits
        else:
            each.update(((k,), z) for k, z in zip(own, logits.chunk(len(own)), strict=True))
        for k in group.riders:
            if k < models:
                ridden = group.ridden(k).to(device)
                each[(k,)] = ridden if logits.dim() == 3 else ridden[:, 0]
    return each
