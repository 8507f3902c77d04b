"""How much a model can read: its context, and the room that prompts leave in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ...models.hf import text_config

if TYPE_CHECKING:
    from ..inputs import Prompts
    from .term_model import TermModel

# What configs call the number of tokens that a model has positions for.
NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")


def context_of(model: nn.Module) -> int | None:
    """The most tokens that a model can read; None where nothing bounds them.

    Its config says so. ALiBi and dynamic RoPE frequencies go on for ever. Linear and YaRN
    frequencies stretch the length of training by their factor, which some configs do not count in.
    """
    config = text_config(model)
    stated = (getattr(config, name, None) for name in NAMES)
    found = next((n for n in stated if isinstance(n, int) and n > 0), None)
    if found is None or getattr(config, "alibi", False):
        return None
    ropes = ropes_of(config)
    for p in ropes:
        kind, factor = p.get("rope_type") or "", p.get("factor") or 1.0
        if "dynamic" in kind:
            return None
        if kind in ("linear", "yarn"):
            trained = p.get("original_max_position_embeddings") or found
            found = max(found, int(factor * trained))
    for name, module in () if any(ropes) else model.named_modules():
        # Where the table has a row for padding, positions are counted from the row after it.
        table = name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
        if table and module.padding_idx is not None:
            found = min(found, module.num_embeddings - module.padding_idx - 1)
    return found


def ropes_of(config: Any) -> list[dict[str, Any]]:
    """The settings of RoPE in a config: its own, and those of each type of layers, if any."""
    own = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [p for p in (own, *own.values()) if isinstance(p, dict)]


class ModelPrompts(NamedTuple):
    """A model of a call, and what it reads of each request before anything is written.

    Attributes:
        unread: how many of the last tokens of a response the model never reads. None: it does not
            read the response's tokens but others, so that nobody knows their number beforehand.
    """

    model: TermModel
    prompts: Prompts
    unread: int | None = 1


class Room:
    """How many new tokens each request of a call has room for, and whose context says so.

    Terms do not read the last token of a response, so a full context has room for one more.

    Attributes:
        new: ``[requests]`` int64, on the CPU: at most `limit`, and 0 for prompts that do not fit
            and for requests that are refused.

    Args:
        each: every model that reads the requests, with what it reads of them.
        limit: the most new tokens that any row is asked for.
        refused: as `Requests.refused`.
    """

    def __init__(
        self,
        each: Sequence[ModelPrompts],
        requests: int,
        limit: int,
        refused: Sequence[int] = (),
    ) -> None:
        self.new = torch.full((requests,), limit, dtype=torch.int64, device="cpu")
        # Of a request whose room is smaller: the model that says so, its context, its prompt.
        self._limits: dict[int, tuple[str, int, int]] = {}
        for model, prompts, unread in each:
            if model.context is None:
                continue
            lengths = prompts.mask.sum(dim=1).cpu()
            room = model.context - lengths + (1 if unread is None else unread)
            room = room.clamp(min=0) if unread is not None else torch.where(room > 0, limit, 0)
            for request in (room < self.new).nonzero()[:, 0].tolist():
                self._limits[request] = (model.name, model.context, int(lengths[request]))
            self.new = torch.minimum(self.new, room)
        self._refused = frozenset(refused)
        self.new[[*refused]] = 0

    def why(self, request: int) -> str | None:
        """Why a request has less room than the call's limit; None if it has not, or is refused."""
        if request in self._refused or request not in self._limits:
            return None
        name, context, prompt = self._limits[request]
        if prompt > context:
            return f"its prompt has {prompt} tokens for {name}, whose context is {context}"
        return f"the context of {name}, {context} tokens, is full after a prompt of {prompt}"


def check_context(model: TermModel, prompts: Tensor, responses: Sequence[Sequence[int]]) -> None:
    """Refuse responses that a model cannot read after their prompts.

    Args:
        prompts: ``[requests]``: the number of tokens of each prompt.

    Raises:
        ValueError: names the request.
    """
    for i, (prompt, response) in enumerate(zip(prompts.tolist(), responses, strict=True)):
        if model.context is not None and prompt + len(response) - 1 > model.context:
            raise ValueError(
                f"prompts[{i}] and responses[{i}] have {prompt} and {len(response)} tokens for "
                f"{model.name}, whose context is {model.context}"
            )
