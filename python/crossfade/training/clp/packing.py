"""Responses to a prompt in one row behind it, so that the prompt is read once for all of them.

A row is ``[prompt, response 1, response 2, ...]``. Positions of each response go on from the
prompt, and a token sees the prompt and its own response alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...decoding.inputs import right_pad
from ...models.hf import text_config, underlying
from ..fused_head import IGNORED


def packed(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[Sequence[int]]]
) -> dict[str, Tensor]:
    """The arguments of `Learner.forward` for some prompts and n responses to each.

    Returns:
        ``input_ids [B, L]``; ``labels [B, n, T]``: the tokens of responses, and `IGNORED` after
        their ends; ``before [B, n, T]``: the place in the row of the state that a token is said
        from; ``visible [B, L, L]`` bool: whether a token, by the second dimension, sees another,
        and ``position_ids [B, L]``. With one response a row is plain text: ``visible [B, L]`` is
        then its mask, and there are no ``position_ids``, as the model counts them itself.
    """
    most = max(1, max(len(r) for own in responses for r in own))
    ids, positions, blocks, labels, before = [], [], [], [], []
    for prompt, own in zip(prompts, responses, strict=True):
        row, position, block = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        for k, response in enumerate(own):
            # The first token is said from the prompt's last state, each other from the one before.
            start = len(row)
            places = [len(prompt) - 1, *range(start, start + len(response) - 1)][: len(response)]
            before.append(places + [0] * (most - len(response)))
            labels.append([*response, *[IGNORED] * (most - len(response))])
            row += response
            position += range(len(prompt), len(prompt) + len(response))
            block += [k + 1] * len(response)
        ids.append(row)
        positions.append(position)
        blocks.append(block)
    size = len(prompts), -1, most
    input_ids, mask = right_pad(ids)
    found = {
        "input_ids": input_ids,
        "visible": mask,
        "labels": torch.tensor(labels).view(*size),
        "before": torch.tensor(before).view(*size),
    }
    if len(labels) == len(prompts):
        return found
    of = right_pad(blocks, -1)[0]  # 0: the prompt, k: the k-th response, -1: padding
    here, there = of[:, :, None], of[:, None, :]
    order = torch.ones(of.shape[1], of.shape[1], dtype=torch.bool).tril()
    found["visible"] = order & ((there == here) | (there == 0))
    return {**found, "position_ids": right_pad(positions)[0]}


def states(
    model: Any,
    input_ids: Tensor,
    visible: Tensor,
    before: Tensor,
    position_ids: Tensor | None = None,
) -> Tensor:
    """The states ``[B, n, T, H]`` that the tokens of packed rows are said from."""
    bare: Any = underlying(model)
    given: dict[str, Any] = {"input_ids": input_ids, "attention_mask": visible}
    if visible.dim() == 3:
        dtype = next(bare.parameters()).dtype
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        given["attention_mask"] = mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None]
        given["position_ids"] = position_ids
    found = bare.base_model(**given, use_cache=False, return_dict=True).last_hidden_state
    at = before.flatten(1)[..., None].expand(-1, -1, found.shape[-1])
    return found.gather(1, at).view(*before.shape, -1)


@torch.no_grad()
def takes_packed(model: Any) -> bool:
    """Whether a model reads packed rows as it reads each response alone behind its prompt.

    It is tried with a few tokens, which are also read as plain text, where each response sees the
    one before it: what packed rows give must be far nearer to what the responses give alone.
    Attention that sees a window alone, and what works its way along the row, such as recurrent
    layers, cannot be told what a token sees.
    """
    config = text_config(model)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = (getattr(config, name, None) for name in ("sliding_window", "window_size"))
    if kinds != {"full_attention"} or any(windows):
        return False
    if getattr(config, "_attn_implementation", None) not in ("eager", "sdpa"):
        return False
    last = config.vocab_size - 1
    prompt, own = [last, 0], [[last // 2, 1], [0, last]]
    row = packed([prompt], [own])
    plain = {k: x for k, x in row.items() if k != "position_ids"}
    plain["visible"] = torch.ones_like(row["input_ids"])
    alone = [packed([prompt], [[response]]) for response in own]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        found, leaking, *each = (_read(model, x) for x in (row, plain, *alone))
    except (TypeError, ValueError, RuntimeError):
        return False
    finally:
        for module, training in modes:
            module.training = training
    expected = torch.cat(each, dim=1)
    return float((found - expected).norm()) < 0.1 * float((leaking - expected).norm())


def _read(model: Any, row: dict[str, Tensor]) -> Tensor:
    device = next(model.parameters()).device
    given = {k: x.to(device) for k, x in row.items() if k != "labels"}
    return states(model, **given).float()
