"""How `crossfade.generate` runs a blend's models: the settings of the engine."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ... import elsewhere
from ...checks import explained


@explained(elsewhere.ENGINE)
@dataclass(frozen=True)
class Engine:
    """What the engine may do to be fast. The tokens are the same with every option on and off.

    That holds exactly in real arithmetic and, but for near ties, in float32; in bfloat16 logits
    differ by its rounding. What a blend or a model excludes is left out by itself, and
    `Output.stats.notes` says why.

    Args:
        simple: run every model by the steps of its own ``generate``, with its own modules and
            state: the truth that the rest is compared with. The other options are unused then.
        kernels: on CPUs, run linear layers by `ops.linear`.
        share_weights: models over one backbone, with adapters or prompts of their own, are rows of
            one forward, and value heads are further heads of the same rows. Off: a forward a model.
        share_head: where terms over one model share the head and the blend is geometric, blend
            hidden states and run the head once. Not with a soft-cap, a bias of the head, a
            support, or log-probs and divergences of terms.
        restrict_guides: with a support, the other models compute only those columns of their
            logits that survive it. On CPUs.
        skip_guides: with a support, the other models rest while one token survives in every row,
            and catch up in one forward later. On CPUs.
        cuda_graph: on GPUs, capture a step of all models once and replay it.
        tape: on CPUs, record the operations of a step once, check the record against the model's
            own forward, and let native code replay it.
        compile: run each model's step under `torch.compile`. The first step of each shape takes
            a minute, which pays in long jobs.
        sync_every: steps between looks at what the device has done; None is 1 on CPUs and 8 on
            GPUs. Streamers, processors and stop strings look after every step.

    Raises:
        TypeError, ValueError: names the option, what it was and what it must be.
    """

    simple: bool = False
    kernels: bool = True
    share_weights: bool = True
    share_head: bool = True
    restrict_guides: bool = True
    skip_guides: bool = True
    cuda_graph: bool = True
    tape: bool = True
    compile: bool = False
    sync_every: int | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "sync_every":
                if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                    raise TypeError(f"Engine.sync_every is {value!r}; it must be an int or None")
                if value is not None and value < 1:
                    raise ValueError(f"Engine.sync_every is {value}; it must be at least 1")
            elif not isinstance(value, bool):
                raise TypeError(f"Engine.{f.name} is {value!r}; it must be a bool")


def check_engine(engine: Any) -> None:
    """Raise a TypeError unless `engine` is an `Engine` or None."""
    if engine is not None and not isinstance(engine, Engine):
        raise TypeError(
            f"engine is a {type(engine).__name__}; it must be a crossfade.Engine, such as "
            "Engine(simple=True)"
        )
