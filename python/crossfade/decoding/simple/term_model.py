"""A model of a call, with what decoding must know to call it: adapter, device, arguments."""

from __future__ import annotations

import inspect
from collections.abc import Hashable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...blends.mixes import Mix
from ...models.adapters import adapter_layers
from ...models.backbones import backbone
from ...models.hf import text_config, underlying
from ..inputs import Prompts
from ..members import Members
from .adapters import MixedRows, adapter_states
from .contexts import context_of, ropes_of
from .replica import Replica
from .structure import Structure, structure


class TermModel:
    """One model of a blend, ready to be called: its adapter, device and arguments.

    Attributes:
        bare: the model without PEFT's wrapper.
        accepts: the names of the arguments that its forward takes.
        vocabulary: how many ids its config says that it knows; None if it does not say.
        context: the most tokens that it can read; None where nothing bounds them.
        original_context: the tokens past which RoPE frequencies depend on how many there are; None
            if they never do.

    Args:
        tokenizer: what it reads requests with.
        reads_request: whether it reads every request as it is, with no prompt of its own.
    """

    def __init__(
        self,
        model: Any,
        name: str,
        adapter: str | Mix | None = "active",
        *,
        tokenizer: Any = None,
        reads_request: bool = False,
    ) -> None:
        self.model, self.name = model, name
        self.tokenizer, self.reads_request = tokenizer, reads_request
        self.bare: Any = underlying(model)
        self.adapter = adapter
        self.mixed_rows: MixedRows | None = None
        self.adapter_states = adapter_states(model, adapter, name)
        parameters = inspect.signature(self.bare.forward).parameters
        self.accepts = set(parameters)
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and not isinstance(
            self.bare, PreTrainedModel
        ):  # It is a module of the user's own that hands all arguments on, maybe to a model.
            self.accepts |= {"attention_mask", "position_ids"}
        self.device = _input_device(self.bare, name)
        self.vocabulary: int | None = getattr(text_config(self.bare), "vocab_size", None)
        self.context = context_of(self.bare)
        self.original_context = _original_context(text_config(self.bare))

    @cached_property
    def runs(self) -> Any:
        """What is called: the model or, if it has adapters, a replica that applies the term's."""
        if not adapter_layers(self.model):
            return self.model
        replica = Replica(self.model)
        for state in self.adapter_states:
            state.apply(replica)
        if isinstance(self.adapter, Mix):
            self.mixed_rows = MixedRows(self.model, replica, self.adapter.names, self.name)
        return replica.model

    def seat(self, mixes: Tensor | None, rows: int) -> None:
        """Say which mix of adapters each row of the next forward of `runs` has.

        Args:
            mixes: the weights ``[rows, adapters]``. None where the model has no mix, or one for
                all requests; where each has its own, trials of the model take the first one's.
        """
        if isinstance(self.adapter, Mix):
            _ = self.runs
            assert self.mixed_rows is not None
            if mixes is None:
                mixes = self.adapter.rows(self.adapter.requests or 1, self.name)[:1].expand(
                    rows, -1
                )
            self.mixed_rows.seat(mixes)

    @cached_property
    def structure(self) -> Structure:
        """What decides how the model is run. It is looked at once, as it holds for a whole call."""
        return structure(self.bare)

    @cached_property
    def backbone(self) -> Hashable:
        """What is equal for models over one and the same backbone. It is looked at once."""
        return backbone(self.bare)

    @cached_property
    def keeps(self) -> bool:
        """Whether modules themselves, and not a cache, keep something of what they have read.

        RoPE frequencies may be those of the longest text so far, and some recurrent layers hold
        their state.
        """
        return any(map(_keeps, self.bare.modules()))

    def follows_longest(self, tokens: int) -> str | None:
        """Why rows of so many tokens depend on the longest row beside them; None if they do not.

        RoPE frequencies of the types "dynamic" and "longrope" are those of the longest row of a
        forward, once that is past the model's original context. Keys that were written before keep
        the frequencies of their time. So a row becomes what `model.generate` makes of it only if it
        is read alone, and a token at a time.
        """
        if self.original_context is None or tokens <= self.original_context:
            return None
        return (
            f"{self.name}'s RoPE frequencies change past {self.original_context} tokens with the "
            "longest row"
        )

    def check(self, prompts: Prompts) -> None:
        """Refuse ids that the model has no embedding for, as a GPU would abort the process."""
        if self.vocabulary is None:
            return
        outside = (prompts.ids < 0) | (prompts.ids >= self.vocabulary)
        outside &= prompts.mask.bool()
        if outside.any():
            row, column = outside.nonzero()[0].tolist()
            raise ValueError(
                f"the prompt of row {row} has id {int(prompts.ids[row, column])} for {self.name}; "
                f"ids must be within [0, {self.vocabulary}), those of its own tokenizer"
            )


def _input_device(model: nn.Module, name: str) -> torch.device:
    """Where a model reads its tokens, also where accelerate keeps its weights elsewhere.

    Raises:
        ValueError: its parameters are on the meta device, and nothing brings their numbers; or they
            are pieces that only FullyShardedDataParallel brings together.
    """
    if any(hasattr(p, "_is_flat_param") for p in model.parameters()):
        raise ValueError(
            f"{name} is wrapped by FullyShardedDataParallel, which keeps its layers without "
            "numbers; it must be whole, sharded by torch's fully_shard, or loaded with "
            "distributed_config=DistributedConfig(tp_size=...)"
        )
    if not any(p.is_meta for p in model.parameters()):
        return next(model.parameters()).device
    devices = []
    for prefix, module in model.named_modules():
        for key in (k for k, p in module.named_parameters(prefix, recurse=False) if p.is_meta):
            hook = getattr(module, "_hf_hook", None)  # Accelerate's hook loads the numbers.
            if hook is None:
                raise ValueError(
                    f"{name} is a {type(model).__name__} whose parameter {key} is on the meta "
                    "device, which holds no numbers; it must be loaded"
                )
            devices.append(getattr(hook, "execution_device", None))
    return torch.device(next((d for d in devices if d is not None), "cpu"))


def _keeps(module: nn.Module) -> bool:
    kind = getattr(module, "rope_type", None)
    kinds = kind.values() if isinstance(kind, dict) else [kind]
    if any(k == "longrope" or "dynamic" in (k or "") for k in kinds):
        return True
    states = (v for k, v in vars(module).items() if k.endswith(("_state", "_states")))
    return any(v is None or isinstance(v, Tensor) for v in states)


def _original_context(config: Any) -> int | None:
    """The tokens past which RoPE frequencies depend on their number; None if they never do."""
    found = []
    for p in ropes_of(config):
        kind = p.get("rope_type") or p.get("type") or ""
        if "dynamic" in kind:
            found.append(config.max_position_embeddings)
        elif kind == "longrope":
            own = getattr(config, "original_max_position_embeddings", None)
            found.append(p.get("original_max_position_embeddings") or own or 0)
    return min(found, default=None)


def positions_of(mask: Tensor) -> Tensor:
    """Positions of tokens, counted without padding, as Hugging Face counts them."""
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)


def term_models(
    members: Members, known: dict[Hashable, TermModel] | None = None
) -> list[TermModel]:
    """The models of a call's members.

    Args:
        known: those of earlier calls, for the ones that follow: what a model and its adapters are
            is then not looked at again. Mixes of adapters, which are of their requests, are not
            kept.
    """
    found = []
    for member, name in zip(members.all, members.names, strict=True):
        adapter = getattr(member, "adapter", "active")
        tokenizer = members.tokenizer if member.tokenizer is None else member.tokenizer
        reads = reads_request(member)
        key = id(member.model), adapter, name, id(tokenizer), reads
        model = None if known is None else known.get(key)
        if model is None:
            model = TermModel(member.model, name, adapter, tokenizer=tokenizer, reads_request=reads)
            if known is not None and not isinstance(adapter, Mix):
                known[key] = model
        found.append(model)
    return found


def reads_request(member: Any) -> bool:
    """Whether a member of a call reads every request as it is, with no prompt of its own."""
    return all(getattr(member, name, None) is None for name in ("system", "prompt"))
