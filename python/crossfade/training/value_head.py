"""Value heads over a language model's hidden states: made, read at tokens, saved and loaded.

With ``h_t`` the last hidden state after token ``y_t`` of a response, a *Q-head* gives one number
for each next token, and ``V(x, y_1 .. y_t) = head(h_{t-1})[y_t]``; a *scalar head* gives one
number, and ``V(x, y_1 .. y_t) = head(h_t)``. `value_model` is a causal LM whose output embeddings
are the head: what `crossfade.ValueHead` takes.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import models, reading, saved_models
from ..decoding.after_head import after_head
from ..terms import check_language_model, is_peft, text_config, underlying

KINDS = ("q", "scalar")
FORMAT = 1
WEIGHTS, SETTINGS = "value_head.safetensors", "value_head.json"
ADAPTER = (saved_models.ADAPTER_CONFIG, saved_models.ADAPTER)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LowRankHead(nn.Module):
    """A Q-head of rank r: ``(h A^T) B^T`` in float32, whatever the dtype of ``h [..., H]``.

    A is random and B zero at first, as in LoRA, so that all values are 0. Both are parameters and
    not layers: adapters for "all linear layers" leave them alone.

    Attributes:
        a, b: A ``[r, H]`` and B ``[V, r]``.
    """

    def __init__(self, hidden: int, vocabulary: int, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = hidden, vocabulary
        self.a = nn.Parameter(torch.randn(rank, hidden, dtype=torch.float32).to(dtype))
        self.b = nn.Parameter(torch.zeros(vocabulary, rank, dtype=dtype))
        with torch.no_grad():
            self.a.mul_(hidden**-0.5)  # h A^T is then of h's own scale

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(F.linear(hidden.float(), self.a.float()), self.b.float())


class WideLinear(nn.Linear):
    """A linear layer in its own dtype over hidden states of another, with float32 outputs."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype)).float()


def value_model(
    base: Any, kind: str = "q", *, rank: int | None = None, dtype: torch.dtype = torch.float32
) -> Any:
    """A value head over a model's hidden states, for `crossfade.ValueHead` and `ValueTrainer`.

    It has modules and a config of its own over the *storage* of `base`'s weights: nothing of the
    backbone is copied, and what is done to it (training the head, an adapter, another dtype or
    device) leaves `base` as it is. Only the head requires a gradient. All values are 0 at first:
    a full or scalar head is zero. A token that no rollout has keeps a value of about 0, so rewards
    should be centred around 0 (their mean taken off) where a Q-head steers each token.

    Args:
        base: a causal LM. Its hidden states must go to its head, and the logits out, as they are;
            a soft-cap or scale of logits that the config holds is left out of the value model.
        kind: "q", one number for each next token, or "scalar", one number.
        rank: of a Q-head: None is the full ``Linear(H, V, bias=False)``, r is `LowRankHead`.
        dtype: of the head, whatever the backbone's.

    Returns:
        A model of `base`'s class. Its outputs are float32, or the backbone's dtype where the
        head's is the same and the head a plain layer.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be. A model with
            PEFT adapters is refused: merge one first (``merge_and_unload``).
        NotImplementedError: as in `crossfade.Model`, or the model computes something between its
            hidden states, head and logits.

    Source: Q-heads and their training, Mudgal et al., arXiv:2310.17022; the full head as an
    explicit value, Liu et al., arXiv:2409.17819.
    """
    check_language_model(base, head=True)
    if is_peft(base) or hasattr(base, "peft_config"):
        raise TypeError(
            f"base is a {type(base).__name__} with PEFT adapters; it must be a plain model: merge "
            "an adapter with merge_and_unload(), or load the model without"
        )
    own: Any = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if not isinstance(getattr(own, "weight", None), Tensor) or own.weight.dim() != 2:
        raise TypeError(
            f"base is a {type(base).__name__} without output embeddings; it must be a causal LM"
        )
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be 'q' or 'scalar'")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; it must be float32, bfloat16 or float16")
    vocabulary, hidden = own.weight.shape
    if rank is not None:
        if kind != "q":
            raise ValueError(f"rank is {rank}, but kind is {kind!r}; only a Q-head has a rank")
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise TypeError(f"rank is {rank!r}; it must be an int or None")
        if not 1 <= rank <= min(hidden, vocabulary):
            raise ValueError(f"rank is {rank}; it must be within [1, {min(hidden, vocabulary)}]")

    model = shared_copy(base)
    for config in {id(c): c for c in (model.config, text_config(model))}.values():
        config.tie_word_embeddings = False
        for name, plain in (("final_logit_softcapping", None), ("logits_scaling", 1.0)):
            if getattr(config, name, None) is not None:
                setattr(config, name, plain)
    if hasattr(model, "logit_scale"):
        model.logit_scale = 1.0
    if kind == "scalar":
        model.config.num_labels = 1
    head: nn.Module
    if rank is not None:
        head = LowRankHead(hidden, vocabulary, rank, dtype)
    else:
        # a plain layer is what the engine's kernels take, but it needs its input's dtype
        layer = nn.Linear if own.weight.dtype is dtype else WideLinear
        outputs, bias = (1, True) if kind == "scalar" else (vocabulary, False)
        head = layer(hidden, outputs, bias, dtype=dtype)
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
    model.set_output_embeddings(head.to(own.weight.device).train(model.training))
    model.all_tied_weights_keys = {}  # the head is tied to nothing
    model.value_kind = kind
    _check_head_is_last(model)
    return model


def shared_copy(model: Any) -> Any:
    """Modules and a config of its own, over the storage of a model's parameters, all frozen."""
    shared: dict[int, Any] = {id(b): b for b in model.buffers()}
    for p in model.parameters():
        # a Parameter of its own, so that .to() and requires_grad_() are seen by one side alone
        plain = type(p) is nn.Parameter
        shared[id(p)] = nn.Parameter(p.detach(), requires_grad=False) if plain else p
    return copy.deepcopy(model, shared)


def value_head(model: Any) -> Any:
    """The head of a value model, also of one inside a PEFT model.

    Raises:
        TypeError: it is no value model.
    """
    bare: Any = underlying(model) if isinstance(model, nn.Module) else None
    if getattr(bare, "value_kind", None) not in KINDS:
        raise TypeError(
            f"model is a {type(model).__name__}; it must be what value_model or load_value_head "
            "gives"
        )
    return bare.get_output_embeddings()


def token_values(head: nn.Module, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Values of tokens, without those of all others.

    Args:
        head: of a value model.
        hidden: ``[..., H]``: for a Q-head the state before each token, for a scalar head after it.
        tokens: int64 ``[...]``, of which a scalar head takes no notice.

    Returns:
        float32 ``[...]``.
    """
    parts: Any = head
    if isinstance(head, LowRankHead):
        down = F.linear(hidden.float(), parts.a.float())
        return (down * F.embedding(tokens, parts.b).float()).sum(dim=-1)
    if parts.out_features == 1:
        return parts(hidden.to(parts.weight.dtype))[..., 0].float()
    rows = F.embedding(tokens, parts.weight)
    return (hidden.float() * rows.float()).sum(dim=-1)


def save_value_head(
    model: Any, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None
) -> None:
    """Write a value model's head, and the adapter of its backbone if it has one, into a folder.

    The folder gets ``value_head.safetensors``, ``value_head.json`` (kind, rank, hidden size,
    vocabulary and where the backbone was loaded from) and PEFT's own files. The backbone is not
    written; the folder may be the backbone's.

    Args:
        model: of `value_model`, or a `peft.PeftModel` around one.
        dtype: that the head is stored in; None: as it is. Rank 8 over 49,152 tokens and 576 hidden
            numbers is 0.8 MB in bfloat16.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
    """
    head = value_head(model)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; it must be float32, bfloat16, float16 or None")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if is_peft(model):
        if len(model.peft_config) != 1:
            raise ValueError(
                f"model has the adapters {sorted(model.peft_config)}; it must have one, which the "
                "head was trained with"
            )
        (name,) = model.peft_config
        # saved beside the head and not in a folder of its name; no look at the hub for the backbone
        model.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
        if name != "default":
            for file in ADAPTER:
                (folder / name / file).replace(folder / file)
    save_file(
        {k: v.detach().to("cpu", dtype).contiguous() for k, v in head.state_dict().items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    settings = {"format": FORMAT, **_settings(model), "adapter": is_peft(model)}
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


def load_value_head(
    folder: str | os.PathLike[str], base: Any = None, *, dtype: torch.dtype = torch.float32
) -> Any:
    """The value model that `save_value_head` wrote, in eval mode.

    Its head, and its adapter, can be trained further by `ValueTrainer`.

    Args:
        folder: what was written.
        base: the backbone's causal LM, whose weights are shared as by `value_model`. None: loaded
            from where the file says that it was (safetensors only, no code of its own is run).
        dtype: of the head.

    Returns:
        A value model, or a `peft.PeftModel` around one where an adapter was saved.

    Raises:
        FileNotFoundError, OSError: names the file that is missing or cannot be read.
        ValueError: a file is not as it must be, or `base` has another hidden size or vocabulary.
        TypeError, NotImplementedError: `base` is refused, as by `value_model`.
    """
    folder = Path(folder)
    settings = _read_settings(folder / SETTINGS)
    weights = _read_weights(folder / WEIGHTS)
    if settings["adapter"]:
        for name in ADAPTER:
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"there is no {folder / name}; {SETTINGS} says that the backbone has an "
                    "adapter (pickled weights are not loaded)"
                )
    if base is None:
        base = _load_backbone(settings["backbone"], folder / SETTINGS)
    model = value_model(base, settings["kind"], rank=settings["rank"], dtype=dtype)
    given = _settings(model)
    for key in ("hidden_size", "vocabulary"):
        if settings[key] != given[key]:
            raise ValueError(
                f"{folder / SETTINGS} has {key} {settings[key]}; it must be {given[key]}, as base "
                "has"
            )
    fill_head(model, weights, folder / WEIGHTS)
    if settings["adapter"]:
        model = saved_models.add_adapter(model, folder, "the value head's folder", trainable=True)
        value_head(model).requires_grad_(True)  # PEFT freezes all but the adapter
    return model.eval()


def load_into(model: Any, folder: str | os.PathLike[str]) -> None:
    """Give a value model the head, and the adapter if it has one, that were saved in a folder."""
    folder = Path(folder)
    settings = _read_settings(folder / SETTINGS)
    given = {**_settings(model), "adapter": is_peft(model)}
    for key in ("kind", "rank", "hidden_size", "vocabulary", "adapter"):
        if settings[key] != given[key]:
            raise ValueError(
                f"{folder / SETTINGS} has {key} {settings[key]!r}; it must be {given[key]!r}, as "
                "model has"
            )
    fill_head(model, _read_weights(folder / WEIGHTS), folder / WEIGHTS)
    if is_peft(model):
        saved_models.fill_adapter(model, folder)


def fill_head(model: Any, weights: dict[str, Tensor], file: Path) -> None:
    """Copy weights into the head of a model; `file` is where they are from."""
    own = value_head(model).state_dict()
    if set(weights) != set(own):
        raise ValueError(f"{file} has the tensors {sorted(weights)}; it must have {sorted(own)}")
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape or not tensor.is_floating_point():
            raise ValueError(
                f"{name} in {file} is {tensor.dtype} {list(tensor.shape)}; it must be floats "
                f"{list(own[name].shape)}"
            )
        own[name].copy_(tensor)  # state_dict's tensors are the parameters' own


def _settings(model: Any) -> dict[str, Any]:
    bare: Any = underlying(model)
    head = bare.get_output_embeddings()
    return {
        "kind": bare.value_kind,
        "rank": head.a.shape[0] if isinstance(head, LowRankHead) else None,
        "hidden_size": head.in_features,
        "vocabulary": bare.get_input_embeddings().weight.shape[0],
        "backbone": str(getattr(bare.config, "name_or_path", "") or ""),
    }


def _read_settings(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}; the folder must be of save_value_head")
    settings = reading.parse_json(reading.read_text(file), str(file))
    if not isinstance(settings, dict):
        raise ValueError(f"{file} is {settings!r:.80}; it must be what save_value_head writes")
    if settings.get("format") != FORMAT:
        raise ValueError(f"{file} has format {settings.get('format')!r}; it must be {FORMAT}")
    if settings.get("kind") not in KINDS:
        raise ValueError(f"{file} has kind {settings.get('kind')!r}; it must be 'q' or 'scalar'")
    wanted: dict[str, tuple[type, ...]] = {"rank": (int, type(None)), "hidden_size": (int,)}
    wanted |= {"vocabulary": (int,), "backbone": (str,), "adapter": (bool,)}
    for key, kinds in wanted.items():
        if type(settings.get(key, ...)) not in kinds:
            names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            found = repr(settings[key]) if key in settings else "missing"
            raise ValueError(f"{key} in {file} is {found}; it must be of type {names}")
    return settings


def _read_weights(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}; the folder must be of save_value_head")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise OSError(f"{file} cannot be read as safetensors: {error}") from error


def _load_backbone(name: str, file: Path) -> Any:
    if not name:
        raise ValueError(f"base is None, and {file} names no backbone; base must be its model")
    try:
        return models.load(name, dtype="auto")[0]
    except (OSError, ValueError) as error:
        raise OSError(
            f"the backbone {name!r} that {file} names could not be loaded; give base=... "
            f"({str(error).strip().splitlines()[0]:.200})"
        ) from error


def _check_head_is_last(model: Any) -> None:
    """That the head reads the backbone's output and gives the logits, on one token."""
    found = after_head(model)
    if not (found.reads == 1 and found.is_nothing):
        raise NotImplementedError(
            f"base is a {type(model).__name__}, which computes something between its hidden "
            "states, its head and its logits; not supported yet"
        )
