"""Two adapters of PEFT, one trained over the other, joined into one that does what both do.

An adapter adds ``s B A`` to a layer's weight. The sum of two is again of this form: the rows of
``s1 A1`` and ``s2 A2`` one below the other, and the columns of ``B1`` and ``B2`` side by side. Its
rank is ``r1 + r2``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..extras import require
from .saved_adapters import ADAPTER, check_adapter_folder

PREFIX, DOWN, UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# The fields of a LoraConfig with which an adapter still is a sum of ``s B A``. With any other one
# that is not as it is by default, it may be something else.
PLAIN = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha"),
    *("lora_dropout", "fan_in_fan_out", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("layers_to_transform", "layers_pattern", "runtime_config", "megatron_core"),
    *("qalora_group_size", "ensure_weight_tying"),
}
INITIAL = (True, False, "gaussian", "orthogonal")  # other beginnings change the base's weights too


def join_adapters(
    first: str | os.PathLike[str],
    second: str | os.PathLike[str],
    into: str | os.PathLike[str],
) -> None:
    """Write the adapter that adds what two saved adapters add, which `check_joined` has passed.

    Args:
        first, second: their folders.
        into: the folder of the new adapter; it may be one of the two.
    """
    peft = require("peft", "adapters")
    config = peft.PeftConfig.from_pretrained(str(second))
    found = [_parts(Path(folder)) for folder in (first, second)]
    names = list(dict.fromkeys(name for parts in found for name in parts))
    pairs = {name: [parts[name] for parts in found if name in parts] for name in names}
    rank = max(sum(len(a) for a, _ in of_layer) for of_layer in pairs.values())
    tensors = {}
    for name, of_layer in pairs.items():
        a = torch.cat([a for a, _ in of_layer])
        b = torch.cat([b for _, b in of_layer], dim=1)
        short = rank - len(a)  # all layers get one rank; zeros add nothing
        tensors[PREFIX + name + DOWN] = F.pad(a, (0, 0, 0, short)).contiguous()
        tensors[PREFIX + name + UP] = F.pad(b, (0, short)).contiguous()
    config = replace(
        config,
        r=rank,
        lora_alpha=rank,  # the scale is 1: both adapters' own are in A
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        target_modules=names,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        init_lora_weights=True,
        inference_mode=True,
    )
    save_file(tensors, Path(into) / ADAPTER, metadata={"format": "pt"})
    config.save_pretrained(str(into))


def check_joined(folder: str | os.PathLike[str], where: str) -> None:
    """Require that a saved adapter can be joined with another one.

    Args:
        where: what errors call the folder.
    """
    check_adapter_folder(folder, where)
    config = require("peft", "adapters").PeftConfig.from_pretrained(str(folder))
    odd = odd_setting(config) or odd_weight(load_file(Path(folder) / ADAPTER))
    if odd is not None:
        raise ValueError(f"{where} is {str(folder)!r}, which {odd}")


def odd_setting(config: Any) -> str | None:
    """What in the config of an adapter keeps it from being joined with another; None if nothing."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        return f"has the peft_type {kind}"
    plain = type(config)()
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name == "init_lora_weights":
            odd = value not in INITIAL
        else:
            odd = field.name not in PLAIN and value != getattr(plain, field.name)
        if odd:
            return f"has {field.name}: {value!r:.80}"
    return None


def odd_weight(tensors: dict[str, Tensor]) -> str | None:
    """A weight that keeps an adapter from being joined with another; None if there is none."""
    for name, x in tensors.items():
        if name.startswith(f"{PREFIX}lm_head."):  # may be tied to the input embeddings
            return f"trains {name}, of the output embeddings"
        if x.dim() != 2 or not name.startswith(PREFIX) or not name.endswith((DOWN, UP)):
            return f"trains {name}, which is not of a linear layer"
    return None


def _parts(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A, times the scale, and B of each layer that an adapter changes."""
    peft = require("peft", "adapters")
    config = peft.PeftConfig.from_pretrained(str(folder))
    tensors = load_file(folder / ADAPTER)
    found = {}
    for key, a in tensors.items():
        if not key.endswith(DOWN):
            continue
        name = key.removeprefix(PREFIX).removesuffix(DOWN)
        pattern = _pattern(config.alpha_pattern, name)
        alpha = config.lora_alpha if pattern is None else config.alpha_pattern[pattern]
        scale = alpha / (len(a) ** 0.5 if config.use_rslora else len(a))
        found[name] = ((a.float() * scale).to(a.dtype), tensors[PREFIX + name + UP])
    return found


def _pattern(patterns: Iterable[str], name: str) -> str | None:
    """The first pattern that a layer's name ends with, as PEFT reads patterns."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", name)), None)
