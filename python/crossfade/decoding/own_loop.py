"""Rows of one model in Hugging Face's own generation loop, a step at a time.

What `model.generate` does between two tokens is the model's own affair: the inputs it makes of the
tokens so far, the state it keeps, and when it drops that state. So `generate` itself prepares the
rows, and a step calls the same methods of the model in the same order.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, cache_utils, DynamicCache, GenerationConfig, GenerationMixin

from ..terms import text_config
from .term_model import TermModel, positions_of

# Layers of caches in which padding is masked like any other key.
PADDED_LAYERS = {
    cache_utils.DynamicLayer,
    cache_utils.DynamicSlidingWindowLayer,
    getattr(cache_utils, "DummyLayer", cache_utils.DynamicLayer),
}
# What a RoPE module keeps of the longest text that it has seen.
SEEN = ("inv_freq", "max_seq_len_cached", "attention_scaling")


class OwnRows:
    """Rows of one model: its inputs, its state and its updates, as in ``model.generate``.

    Args:
        ids, mask: ``[rows, tokens]`` on the model's device, padded on the left.
        limit: new tokens that a row may have.
    """

    def __init__(self, model: TermModel, ids: Tensor, mask: Tensor, limit: int) -> None:
        self.model = model
        self.ids = ids.masked_fill(mask == 0, 0)  # padding may be another vocabulary's
        self.arguments = prepared(model, self.ids, mask, limit)
        self.frequencies = Frequencies(model)
        self.first = True
        self.forwards = 0

    def step(self, tokens: Tensor | None = None) -> Tensor:
        """Logits ``[rows, V]`` after the prompts, or after one more token ``[rows]``."""
        if tokens is not None:
            self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        inputs = next_inputs(self.model, self.ids, self.arguments, first=self.first)
        with self.frequencies.seated():
            output = self.model.runs(**inputs, return_dict=True)
        self.arguments = self._updated(output)
        self.first = False
        self.forwards += 1
        return output.logits[:, -1]

    def _updated(self, output: Any) -> dict[str, Any]:
        bare = self.model.bare
        if isinstance(bare, GenerationMixin):
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
        """Rows that go on alone from here."""
        other = copy.copy(self)
        other.ids = self.ids.clone()
        other.arguments = copy.deepcopy(self.arguments)
        other.frequencies = copy.copy(self.frequencies)
        return other

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row ``rows[i]`` is. For states that are caches of keys and values."""
        count = len(self.ids)
        self.ids = self.ids[rows]
        for name, value in self.arguments.items():
            if isinstance(value, Tensor):
                # positions are [rows, tokens], for all rows [1, tokens], in some models [3, rows, ...]
                dim = value.dim() - 2 if name == "position_ids" else 0
                if value.shape[dim] == count:
                    self.arguments[name] = value.index_select(dim, rows)
            elif isinstance(value, DynamicCache):
                value.batch_select_indices(rows)

    @property
    def nbytes(self) -> int:
        """Of what the model keeps between steps."""
        return sum(t.nbytes for t in tensors_in(self.arguments).values())


def why_alone(model: TermModel, tokens: int) -> str | None:
    """Why rows of up to so many tokens cannot share a batch that is padded to one length.

    None where padding on the left leaves every row as it is alone: the model takes a mask and
    positions, and keeps nothing but keys and values.
    """
    bare = model.bare
    own = f"{model.name} ({type(bare).__name__})"
    if why := model.follows_longest(tokens):
        return why
    if not {"attention_mask", "position_ids"} <= model.accepts:
        return f"{own} counts positions by itself"
    if getattr(bare, "_is_stateful", False):
        return f"{own} keeps more than keys and values"
    arguments, plain = _tried(model)
    cache = arguments.get("past_key_values")
    if not isinstance(cache, DynamicCache) or {type(x) for x in cache.layers} - PADDED_LAYERS:
        return f"{own} keeps more than keys and values"
    return None if plain else f"{own} makes inputs of its own"


def steps_matter(model: TermModel, tokens: int) -> bool:
    """Whether a text that is read at once gives other logits than one that is written."""
    if model.follows_longest(tokens) is not None:
        return True
    arguments, plain = _tried(model)
    return not plain or not any(isinstance(value, Cache) for value in arguments.values())


def _tried(model: TermModel) -> tuple[dict[str, Any], bool]:
    """What a model's loop begins with, and whether its forwards get the tokens as they are.

    Asked with a token after one that is padding: the first forward must get both with their mask,
    and a later one the last alone.
    """
    ids, mask = torch.tensor([[0, 0], [0, 1]], device=model.device)[:, None]
    arguments = prepared(model, ids, mask, 1)
    first, later = (next_inputs(model, ids, arguments, first=x) for x in (True, False))
    read, after = first.get("input_ids"), later.get("input_ids")
    masked = first.get("attention_mask") is not None
    plain = masked and read is not None and read.tolist() == [[0, 0]]
    return arguments, plain and after is not None and after.tolist() == [[0]]


class Captured(NamedTuple):
    """What `generate` has prepared for the loop that it calls."""

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
    if not isinstance(bare, GenerationMixin):
        arguments: dict[str, Any] = {
            # no mask where nothing is padded, as in Hugging Face: attention has faster ways then
            "attention_mask": None if mask.all() else mask,
            "position_ids": positions_of(mask),
            "logits_to_keep": 1,
        }
        arguments = {k: v for k, v in arguments.items() if k in model.accepts}
        config = text_config(bare)
        # a value head's config may be its own: then all its layers are plain
        cache = DynamicCache(config=config if hasattr(config, "get_text_config") else None)
        return {**arguments, "past_key_values": cache, "use_cache": True}
    plain: Any = copy.copy(bare)  # the same modules, with another generation config
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
    if isinstance(bare, GenerationMixin):
        new = 1 if arguments.get("use_cache") and not first else None
        return bare.prepare_inputs_for_generation(
            ids, next_sequence_length=new, is_first_iteration=first, **arguments
        )
    return {**arguments, "input_ids": ids if first else ids[:, -1:]}


class Frequencies:
    """What a model's RoPE modules keep of the texts before, as one row alone would leave it.

    Dynamic frequencies grow with the longest text that a module has seen, so each row brings its
    own and the model's are put back.
    """

    def __init__(self, model: TermModel) -> None:
        self.modules: list[nn.Module] = []
        if model.original_context is not None:
            self.modules = [m for m in model.bare.modules() if hasattr(m, "max_seq_len_cached")]
        self.states = [_fresh(m) for m in self.modules]

    @contextmanager
    def seated(self) -> Iterator[None]:
        found = [_state(m) for m in self.modules]
        try:
            self._set(self.states)
            yield
            self.states = [_state(m) for m in self.modules]
        finally:
            self._set(found)

    def _set(self, states: list[dict[str, Any]]) -> None:
        for module, state in zip(self.modules, states, strict=True):
            for name in _state(module).keys() - state.keys():
                delattr(module, name)
            for name, value in state.items():
                setattr(module, name, value)


def _state(module: nn.Module) -> dict[str, Any]:
    every = {**vars(module), **module._buffers}
    return {k: v for k, v in every.items() if k.endswith(SEEN)}


def _fresh(module: Any) -> dict[str, Any]:
    """The state of a module that has seen nothing."""
    state = _state(module)
    for name in list(state):
        original = f"{name.removesuffix('inv_freq')}original_inv_freq"
        if name.endswith("max_seq_len_cached"):
            state[name] = module.original_max_seq_len
        elif name.endswith("inv_freq") and original in state:
            state[name] = state[original].clone()  # some are written to in place
    return state


def tensors_in(x: Any, found: dict[int, Tensor] | None = None) -> dict[int, Tensor]:
    """The tensors that a state holds, each once."""
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
