"""A step, captured as a CUDA graph where that can be done."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# How many steps are run as they are before one is captured. They allocate, tune and compile what a
# step needs.
WARM = 3

Step = Callable[[], list[Tensor]]


class Stepper:
    """Calls a step: as it is or, on a GPU, as one captured graph of all its kernels.

    A step may be captured if nothing in it depends on the host, but for where its buffers are.

    Attributes:
        note: why steps are not captured, where they should be.
    """

    def __init__(self, capture: bool) -> None:
        self.capture = capture
        self.note: str | None = None
        self.warm = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: list[Tensor] = []

    def __call__(self, step: Step, moved: bool) -> list[Tensor]:
        """The step's logits. `moved` says that its buffers are no longer where they were."""
        if moved:
            self.forget()
        if self.graph is None and self.capture and self.warm >= WARM:
            self._capture(step)
        if self.graph is None:
            self.warm += 1
            return step()
        self.graph.replay()
        return self.logits

    def forget(self) -> None:
        """Capture anew, as somebody has taken a step without this."""
        self.graph, self.warm = None, 0

    def _capture(self, step: Step) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.logits = step()
        except RuntimeError as error:
            self.capture = False
            self.note = f"no CUDA graph: {str(error).splitlines()[0]}"
        else:
            self.graph = graph
