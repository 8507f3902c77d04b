"""Checks that the engine gives a model's own logits, when it first meets the model.

The engine replaces a model's attention, linear layers, caches and adapters. That is right only for
models that are built of what it replaces, and a few tokens tell whether one is: the engine and
Hugging Face's modules both read them, and the logits are compared. How far back a layer attends is
more than few tokens can show; that is read off the masks that the model makes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...blends.mixes import Mix
from ...models.hf import text_config
from ..inputs import left_pad
from ..memory import is_out_of_memory
from ..runner import Shares
from ..simple.runner import CachedTerm
from ..simple.structure import remembered, why_as_it_is
from ..simple.term_model import TermModel
from .comparing import distance, worst_of
from .deltas import Deltas
from .group import Group
from .head import ScoreHead
from .lanes import Rider
from .modules import ForwardPass, Unsupported, attention

CHECKED = "crossfade_checked"  # Transformers' name for attention that also looks at the masks
LENGTHS = (3, 6)  # tokens of the two prompts; one more token is fed after each
FAR = 1 << 16  # tokens up to which masks are looked at


class Finding(NamedTuple):
    """Why the engine cannot run a model on rows of more than `past` tokens; None: it can."""

    why: str | None
    past: int = 0


# What is found of the model under test while it runs: where its layers do not do what they say.
_findings: ContextVar[list[Finding]] = ContextVar("crossfade_findings")


def check(group: Group, kernels: bool) -> None:
    """Compare the engine's logits with the models' own, unless that was done since these changed.

    Args:
        group: whose models share a forward, and whose rows may have `most` tokens.
        kernels: as in `Group`.

    Raises:
        Unsupported: says how the logits differ, or what the engine must not do with a model.
    """
    models, riders = group.models, [*group.riders.values()]
    bare = models[0].bare
    if why := why_as_it_is(bare):
        raise Unsupported(f"{models[0].name} is run as it is: {why}")
    # What holds for one mix of adapters holds for all others of them.
    adapters = (m.adapter.names if isinstance(m.adapter, Mix) else m.adapter for m in models)
    ridden = tuple((id(r.model.bare), r.lane) for r in riders)
    how = tuple(adapters), group.own, ridden, group.deltas is None, kernels
    others = (r.model for r in riders)
    distinct: dict[int, TermModel] = {}
    for m in (*models, *others):
        distinct.setdefault(id(m.bare), m)
    found: Finding = remembered(
        bare,
        [m.structure for m in distinct.values()],
        how,
        lambda: _compare(models, group.deltas, kernels, group.own, riders),
    )
    if found.why is not None and group.most > found.past:
        raise Unsupported(f"{models[0].name}: {found.why}")


@torch.no_grad()
def _compare(
    models: Sequence[TermModel],
    deltas: Deltas | None,
    kernels: bool,
    own: int | None = None,
    riders: Sequence[Rider] = (),
) -> tuple[Finding, bool]:
    """What is found of the models of a group, and whether to remember it.

    Logits that are all alike show nothing, so that the models must be tried again.
    """
    looked = _findings.set([Finding(None)])
    try:
        return _run_both(models, deltas, kernels, own, riders)
    finally:
        _findings.reset(looked)


def _run_both(
    models: Sequence[TermModel],
    deltas: Deltas | None,
    kernels: bool,
    own: int | None,
    riders: Sequence[Rider],
) -> tuple[Finding, bool]:
    device = models[0].device
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):  # Dropout must not change what the caller draws next.
        rows = _tokens(models[0])
        try:
            group = Group(
                models,
                range(len(models)),
                len(rows),
                longest=max(LENGTHS),
                limit=1,
                deltas=deltas,
                own=own,
                riders=dict(enumerate(riders, len(models))),
                kernels=kernels,
                attention=CHECKED,
            )
            members = [*models[: group.own], *(r.model for r in riders)]
            for model in members:  # Copied before anything runs: hooks may switch adapters.
                _ = model.runs
            mixes = [_mixes(m, len(rows)) for m in models]
            by_engine = _engine(group, rows, mixes)
            itself = [
                _own(m, group, rows, mixes[k] if k < group.own else _mixes(m, len(rows)))
                for k, m in enumerate(members)
            ]
        except Unsupported as reason:
            return Finding(str(reason)), True
        except Exception as error:
            if is_out_of_memory(error):  # This says nothing about the model.
                raise
            what = (str(error).splitlines() or [""])[0]
            return Finding(f"a few tokens ended in {type(error).__name__}: {what:.120}"), True
    tells, worst = True, 0.0
    for model, here, there in zip(members, by_engine, itself, strict=True):
        off, spread = distance(here, there)
        tells &= bool((spread > 0).all())
        if not bool((off <= _tolerance(there, model) * spread).all()):
            worst = max(worst, worst_of(off, spread))
    if worst == 0.0:
        return min(_findings.get(), key=_first), tells
    why = f"its logits on the engine are not its own (off by {worst:.2g} of their spread)"
    return Finding(why), True


def _first(finding: Finding) -> float:
    """By which findings are ordered: the first is that which growing rows reach first."""
    return math.inf if finding.why is None else finding.past


# Where layers round their inputs to 8 bits, the least difference may round one of them up instead
# of down, and more of them in each layer that follows.
ROUNDED = 0.6


def _tolerance(own: Tensor, model: TermModel) -> float:
    """How far rounding in the model's dtype may put logits off, as a part of their spread."""
    if any(hasattr(m, "packed") for m in model.bare.modules()):
        return ROUNDED
    dtypes = {p.dtype for p in model.bare.parameters() if p.is_floating_point()}
    eps = max((torch.finfo(d).eps for d in dtypes if d.itemsize > 1), default=2.0**-7)
    if own.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        eps = max(eps, 2.0**-10)
    return 1e-3 + 16 * eps


def _tokens(model: TermModel) -> list[list[int]]:
    """Two rows of ordinary ids: each is a prompt and one more token, none of them special."""
    size = model.vocabulary or len(model.bare.get_input_embeddings().weight)
    special = {0}
    for config in (model.bare.config, text_config(model.bare)):
        for name, value in vars(config).items():
            if name.endswith(("token_id", "token_index", "idx")):
                special.update(value if isinstance(value, list) else [value])
    step = max(1, size // 17)
    ids = [i for i in [*range(size // 3, size, step), *range(size)] if i not in special]
    rows, first = [], 0
    for length in LENGTHS:
        rows.append([ids[(first + i) % len(ids)] for i in range(length + 1)])
        first += length + 1
    return rows


def _mixes(model: TermModel, rows: int) -> list[Shares]:
    """Weights of the model's mix of adapters for each row, all of them different."""
    if not isinstance(model.adapter, Mix):
        return [None] * rows
    count = len(model.adapter.names)
    return [
        tuple(1 - (i * rows + row) / (2 * count * rows) for i in range(count))
        for row in range(rows)
    ]


def _engine(
    group: Group, rows: Sequence[Sequence[int]], mixes: Sequence[Sequence[Shares]]
) -> list[Tensor]:
    """Logits ``[2, rows, V]`` after each prompt, and after the token that follows: of each lane
    that goes through the head of the model, and of each rider."""
    count = len(group.terms)
    each, prompts = range(count * len(rows)), [row[:-1] for row in rows] * count
    group.join(each, prompts, [mix for of_term in mixes for mix in of_term])
    while group.unread:
        group.read()
    group.begin(each, prompts)
    next_tokens = torch.tensor([row[-1] for row in rows], device=group.device)
    live = torch.ones(len(rows), dtype=torch.bool, device=group.device)
    found = []
    for tokens in (torch.zeros_like(next_tokens), next_tokens):
        group.reserve()
        own = group.step(tokens, live).clone().unflatten(0, (group.own, len(rows)))
        found.append([*own, *(group.ridden(k)[:, 0] for k in group.riders)])
    return [torch.stack(pair) for pair in zip(*found, strict=True)]


def _own(
    model: TermModel,
    group: Group,
    rows: Sequence[Sequence[int]],
    mixes: Sequence[Shares],
) -> Tensor:
    """What `_engine` gives of one term, by Hugging Face's own modules: logits ``[2, rows, V]``."""
    if isinstance(group.head, ScoreHead):
        return torch.stack(
            [torch.stack([_scores(model, row[:end]) for row in rows]) for end in (-1, None)]
        )
    term = CachedTerm(model)
    weights = None if mixes[0] is None else torch.tensor(mixes)
    first = term.prefill(left_pad([row[:-1] for row in rows], 0), limit=1, mixes=weights)
    tokens = torch.tensor([row[-1] for row in rows], device=model.device)
    return torch.stack([first, term.step(tokens)])


def _scores(model: TermModel, ids: Sequence[int]) -> Tensor:
    """``[labels]`` of a classifier for a text."""
    read = torch.tensor([ids], device=model.device)
    mask = torch.ones_like(read)
    model.seat(None, 1)
    z = model.runs(input_ids=read, attention_mask=mask, return_dict=True).logits[0]
    return z[-1] if z.dim() == 2 else z


def _mask(*, mask_function: Any, q_length: int, batch_size: int, device: Any, **_: Any) -> Any:
    """A mask for one token, which carries the function that it is made by; None for several."""
    if q_length != 1:
        return None
    mask = torch.ones(batch_size, 1, 1, 1, dtype=torch.bool, device=device)
    mask.function = mask_function  # type: ignore[attr-defined]
    return mask


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    sliding_window: int | None = None,
    crossfade: ForwardPass | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """`modules.attention`, but it also notes where masks or caches are not as the layer says."""
    if crossfade is not None:
        _check_shapes(module, query, key, value, len(crossfade.lengths))
    findings = _findings.get()
    kept = _kept(module)
    if kept is not None and kept != sliding_window:
        why = f"its cache keeps {kept} tokens, of which its layers do not know"
        findings.append(Finding(why, min(kept, sliding_window or kept)))
    if attention_mask is not None:
        function = getattr(attention_mask, "function", None)
        if function is None:
            raise Unsupported("its layers make masks of their own")
        right = _causal_up_to(function, sliding_window or 0, module)
        if right is not None:
            why = f"its masks are not those that its layers tell of, past {right} tokens"
            findings.append(Finding(why, right))
    return attention(
        module,
        query,
        key,
        value,
        None,
        sliding_window=sliding_window,
        crossfade=crossfade,
        **others,
    )


def _check_shapes(module: Any, query: Tensor, key: Tensor, value: Tensor, rows: int) -> None:
    """Refuse tensors that are not a query, a key and a value for each token of the rows."""
    heads, shared = query.shape[1], key.shape[1]
    groups = getattr(module, "num_key_value_groups", None)
    if not (
        query.shape[::2] == key.shape[::2] == value.shape[::2]
        and query.shape[0] == rows
        and query.shape[3] == key.shape[3]
        and value.shape[1] == shared
        and heads % shared == 0
        and (groups is None or heads == shared * groups)
    ):
        shapes = ", ".join(str(list(x.shape)) for x in (query, key, value))
        raise Unsupported(f"its attention of {rows} rows is over tensors of the shapes {shapes}")


def _causal_up_to(function: Any, window: int, module: Any) -> int | None:
    """Up to how many tokens a mask shows each token the last `window` and no others.

    None if it does so for all texts, `window` of 0 stands for no window.
    """
    config = module.config
    most = getattr(config, "max_position_embeddings", None) or FAR
    most = max(2, min(int(most), FAR))
    said = getattr(config, "sliding_window", None) or most
    window = window or most
    ends = {0, 1, 5, most // 2, most - 1, *(w + i for w in (window, said) for i in (-1, 0, 1, w))}
    q = torch.tensor(sorted(e for e in ends if 0 <= e < most), device="cpu")[:, None]
    k = torch.arange(most, device="cpu")[None]
    try:
        shown = _shown(function, q, k).broadcast_to(len(q), most)
    except Exception:  # It needs more than positions, as masks of packed texts do.
        return 0
    wrong = (shown != ((k <= q) & (k > q - window))).any(1).tolist()
    if True not in wrong:
        return None
    at = wrong.index(True)
    return 0 if at == 0 else int(q[at - 1]) + 1


def _shown(function: Any, q: Tensor, k: Tensor) -> Tensor:
    """Which positions `k` a mask shows to the tokens at positions `q`."""
    zero = torch.zeros((), dtype=torch.int64, device="cpu")
    try:
        return function(zero, zero, q, k)
    except IndexError:
        # Masks of multimodal models also show the tokens of one image to each other. They look
        # images up in a table of the given tokens, which ends with these. No token here is of an
        # image, so that this part of the mask is left out.
        parts = inspect.getclosurevars(function).nonlocals.get("mask_functions")
        if parts is None and not function(zero, zero, zero, zero):
            return zero.bool()
        if parts is None or function.__name__ != "or_mask":
            raise
        return torch.stack([_shown(f, q, k).broadcast_to(len(q), k.shape[1]) for f in parts]).any(0)


def _kept(module: Any) -> int | None:
    """How many of a layer's last tokens Hugging Face's cache keeps; None: all."""
    config = module.config
    if not hasattr(config, "get_text_config"):
        return None
    layers = DynamicCache(config=config).layers
    layer = layers[module.layer_idx] if module.layer_idx < len(layers) else None
    return getattr(layer, "sliding_window", None)


ALL_ATTENTION_FUNCTIONS.register(CHECKED, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(CHECKED, _mask)
