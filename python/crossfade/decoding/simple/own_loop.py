"""Rows of one model in Hugging Face's own generation loop, a step at a time.

Models differ in what `model.generate` does between two tokens: what inputs they make of the tokens
so far, what state they keep, and when they drop it. So `generate` itself prepares the rows, and a
step calls the same methods of the model in the same order.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    cache_utils,
)

from ...models.hf import text_config
from .replica import Replica
from .structure import remembered, why_as_it_is
from .term_model import TermModel, positions_of

# Layers of caches in which padding is masked like any other key.
PADDED_LAYERS = {
    cache_utils.DynamicLayer,
    cache_utils.DynamicSlidingWindowLayer,
    getattr(cache_utils, "DummyLayer", cache_utils.DynamicLayer),
}


class OwnRows:
    """Rows of one model, decoded as in ``model.generate``, with a state of their own.

    Args:
        ids, mask: the prompts ``[rows, tokens]`` on the model's device, padded on the left.
        limit: how many new tokens a row may have.
        mixes: as in `TermModel.seat`.
    """

    def __init__(
        self,
        model: TermModel,
        ids: Tensor,
        mask: Tensor,
        limit: int,
        mixes: Tensor | None = None,
    ) -> None:
        self.model, self.mixes = model, mixes
        self.ids = ids.masked_fill(mask == 0, 0)  # Padding may be an id of another vocabulary.
        self.arguments = prepared(model, self.ids, mask, limit)
        self.runs = own_modules(model)
        self.first = True
        self.tokens = int(mask.sum(dim=1).max())  # of the longest row
        self.forwards = 0

    def step(self, tokens: Tensor | None = None) -> Tensor:
        """Logits ``[rows, V]`` after the prompts, or after one more token ``[rows]``."""
        if tokens is not None:
            self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        context = self.model.context
        self.tokens += tokens is not None
        if context is not None and len(self.ids) == 1 and self.tokens > context:
            return self.logits  # There is no position for one more token, so the row has ended.
        inputs = next_inputs(self.model, self.ids, self.arguments, first=self.first)
        # Rows that have ended are fed beside the others, but not past the last position there is.
        if context is not None and inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"].clamp(max=context - 1)
        self.model.seat(self.mixes, len(self.ids))
        output = self.runs(**inputs, return_dict=True)
        self.arguments = self._updated(output)
        self.first = False
        self.forwards += 1
        self.logits: Tensor = output.logits[:, -1]
        return self.logits

    def _updated(self, output: Any) -> dict[str, Any]:
        bare = self.model.bare
        if generates(self.model):
            return bare._update_model_kwargs_for_generation(output, self.arguments)
        arguments = dict(self.arguments)
        seen = arguments["past_key_values"].get_seq_length()
        if seen != self.ids.shape[1]:
            raise NotImplementedError(
                f"{self.model.name} ({type(bare).__name__}) does not fill a DynamicCache; a model "
                "that is not one of Transformers' must, or have a generate"
            )
        if "attention_mask" in arguments and arguments["attention_mask"] is not None:
            mask = arguments["attention_mask"]
            arguments["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if "position_ids" in arguments:
            arguments["position_ids"] = arguments["position_ids"][:, -1:] + 1
        return arguments

    def copy(self) -> OwnRows:
        """Rows that go on from here, independent of these."""
        other = copy.copy(self)
        other.ids = self.ids.clone()
        other.arguments = copy.deepcopy(self.arguments)
        if self.model.keeps:
            other.runs = Replica(self.runs).model
        return other

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row ``rows[i]`` is. The state must be a cache of keys and values."""
        count = len(self.ids)
        self.ids = self.ids[rows]
        if self.mixes is not None:
            self.mixes = self.mixes[rows.cpu()]
        for name, value in self.arguments.items():
            if isinstance(value, Tensor):
                # Positions are [rows, tokens], or [1, tokens] for all rows, or [3, rows, tokens].
                dim = value.dim() - 2 if name == "position_ids" else 0
                if value.shape[dim] == count:
                    self.arguments[name] = value.index_select(dim, rows)
            elif isinstance(value, DynamicCache):
                value.batch_select_indices(rows)

    @property
    def nbytes(self) -> int:
        """The size of what the model keeps between steps."""
        return sum(t.nbytes for t in tensors_in(self.arguments).values())


def why_alone(model: TermModel, tokens: int) -> str | None:
    """Why rows of up to so many tokens cannot share a batch that is padded to one length.

    None where padding on the left leaves every row as it is alone: the model takes a mask and
    positions, keeps nothing but keys and values, and gives the same logits when it is tried.
    """
    return model.follows_longest(tokens) or _told(model, _tried(model).why_alone)


def why_a_token_at_a_time(model: TermModel, tokens: int) -> str | None:
    """Why one forward over texts of up to so many tokens is not what `model.generate` computes.

    None where it is: then texts can share that forward, padded on the left.
    """
    if why := model.follows_longest(tokens):
        return why
    alone, window = _tried(model)
    if alone or window is None or tokens <= window or why_as_it_is(model.bare) is not None:
        return _told(model, alone)
    forgets: bool = remembered(
        model.bare, model.structure, "forgets", lambda: (_forgets(model, window), True)
    )
    why = f"attends to more than the {window} tokens its cache keeps" if forgets else None
    return _told(model, why)


class Tried(NamedTuple):
    """What is found when a model is tried out.

    Attributes:
        why_alone: why its rows cannot share a padded batch; None: they can.
        window: the fewest tokens that a layer of its cache keeps; None: all layers keep all.
    """

    why_alone: str | None
    window: int | None = None


def _tried(model: TermModel) -> Tried:
    return remembered(model.bare, model.structure, "alone", lambda: (_try(model), True))


def _told(model: TermModel, why: str | None) -> str | None:
    return why and f"{model.name} ({type(model.bare).__name__}) {why}"


def _try(model: TermModel) -> Tried:
    if not {"attention_mask", "position_ids"} <= model.accepts:
        return Tried("counts positions by itself")
    # A row of padding and one token. The first forward must get both and their mask, a later one
    # the last token alone.
    ids, mask = torch.tensor([[0, 0], [0, 1]], device=model.device)[:, None]
    arguments = prepared(model, ids, mask, 1)
    cache = arguments.get("past_key_values")
    if (
        getattr(model.bare, "_is_stateful", False)
        or not isinstance(cache, DynamicCache)
        or {type(x) for x in cache.layers} - PADDED_LAYERS
    ):
        return Tried("keeps more than keys and values")
    first, later = (next_inputs(model, ids, arguments, first=x) for x in (True, False))
    read, after = (x.get("input_ids") for x in (first, later))
    if first.get("attention_mask") is None or read is None or after is None:
        return Tried("makes inputs of its own")
    if read.tolist() != [[0, 0]] or after.tolist() != [[0]]:
        return Tried("makes inputs of its own")
    if not isinstance(model.bare, PreTrainedModel):  # the user's own module is not tried out
        return Tried(None)
    windows = [getattr(layer, "sliding_window", None) for layer in cache.layers]
    window = min((w for w in windows if w is not None), default=None)
    reads_padding = why_as_it_is(model.bare) is None and _reads_padding(model)
    return Tried("reads padding" if reads_padding else None, window)


def _reads_padding(model: TermModel) -> bool:
    """Whether a prompt and a token after it give other logits with padding before them."""
    text = torch.tensor([[0, 0, 0, 1, 2]], device=model.device) % (model.vocabulary or 3)
    mask = torch.tensor([[0, 0, 0, 1, 1]], device=model.device)
    padded, plain = OwnRows(model, text, mask, 2), OwnRows(model, text[:, 3:], mask[:, 3:], 2)
    return any(_differ(model, padded.step(x), plain.step(x)) for x in (None, text[:, -1]))


def _differ(model: TermModel, a: Tensor, b: Tensor) -> bool:
    """Whether logits differ by more than the rounding of the model's dtype."""
    kinds = {p.dtype for p in model.bare.parameters() if p.is_floating_point()}
    rounding = 4 * max(torch.finfo(k).eps for k in kinds or {torch.float32})
    a, b = a.float(), b.float()
    return bool((a - b).abs().max() > max(rounding, 1e-4) * b.abs().max())


def _forgets(model: TermModel, window: int) -> bool:
    """Whether a token past the window gets other logits over a cache than in one forward.

    So it is in a model whose cache drops what its layers would still attend to.
    """
    text = torch.arange(window + 2, device=model.device)[None] % (model.vocabulary or 3)
    ones = torch.ones_like(text)
    steps = OwnRows(model, text[:, :-1], ones[:, :-1], 2)
    steps.step()
    return _differ(model, steps.step(text[0, -1:]), OwnRows(model, text, ones, 1).step())


def generates(model: TermModel) -> bool:
    """Whether a model has Hugging Face's loop. Value heads and the user's own modules have none."""
    return isinstance(model.bare, GenerationMixin)


class Captured(NamedTuple):
    """What `generate` has prepared for its loop, which `_capture` stands in for."""

    arguments: dict[str, Any]


def _capture(
    model: Any,
    input_ids: Tensor,
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **arguments: Any,
) -> Captured:
    return Captured(arguments)


def prepared(model: TermModel, ids: Tensor, mask: Tensor, limit: int) -> dict[str, Any]:
    """The arguments that `generate` begins its loop with, its cache among them."""
    bare = model.bare
    if not generates(model):
        arguments: dict[str, Any] = {
            # As in Hugging Face, there is no mask where nothing is padded: attention is faster so.
            "attention_mask": None if mask.all() else mask,
            "position_ids": positions_of(mask),
            "logits_to_keep": 1,
        }
        arguments = {k: v for k, v in arguments.items() if k in model.accepts}
        config = text_config(bare)
        # A value head's config may be of the user's own class; its layers then keep all tokens.
        cache = DynamicCache(config=config if hasattr(config, "get_text_config") else None)
        return {**arguments, "past_key_values": cache, "use_cache": True}
    # The same modules, but not the saved generation config. A copy by `copy` would fail with FSDP,
    # whose classes make a module anew where `__new__` is called.
    plain: Any = object.__new__(type(bare))
    vars(plain).update(vars(bare))
    plain.generation_config = GenerationConfig()
    found = plain.generate(
        ids,
        attention_mask=mask,
        generation_config=GenerationConfig(
            max_new_tokens=limit, use_cache=True, pad_token_id=0, do_sample=False, num_beams=1
        ),
        custom_generate=_capture,
    )
    if not isinstance(found, Captured):
        raise NotImplementedError(
            f"{model.name} is a {type(bare).__name__}, whose generate is its own; not supported"
        )
    return found.arguments


def next_inputs(
    model: TermModel, ids: Tensor, arguments: dict[str, Any], *, first: bool
) -> dict[str, Any]:
    """What the model's next forward gets."""
    bare = model.bare
    if generates(model):
        new = 1 if arguments.get("use_cache") and not first else None
        return bare.prepare_inputs_for_generation(
            ids, next_sequence_length=new, is_first_iteration=first, **arguments
        )
    return {**arguments, "input_ids": ids if first else ids[:, -1:]}


def own_modules(model: TermModel) -> Any:
    """What new rows call: the model or, if its modules keep something of what they have read, a
    replica that has read nothing yet."""
    if not model.keeps:
        return model.runs
    found = Replica(model.runs).model
    for module in found.modules():
        if hasattr(module, "max_seq_len_cached"):
            _forget(module)
    return found


def _forget(module: Any) -> None:
    """Set RoPE frequencies back to what they are before the first text."""
    for name in list(vars(module)):
        if name.endswith("max_seq_len_cached"):
            setattr(module, name, module.original_max_seq_len)
    for name in list(module._buffers):
        prefix = name.removesuffix("inv_freq")
        original = getattr(module, f"{prefix}original_inv_freq", None)
        if name != prefix and original is not None:
            setattr(module, name, original.clone())  # Some models write into their frequencies.


def tensors_in(x: Any, found: dict[int, Tensor] | None = None) -> dict[int, Tensor]:
    """The tensors in a state, each once, by their Python ids."""
    found = {} if found is None else found
    if isinstance(x, Tensor):
        found[id(x)] = x
    elif isinstance(x, (list, tuple)):
        for y in x:
            tensors_in(y, found)
    elif isinstance(x, dict):
        for y in x.values():
            tensors_in(y, found)
    elif hasattr(x, "__dict__") and not isinstance(x, type):
        tensors_in(vars(x), found)
    return found
