"""Models whose linear layers have weights of 8 or 4 bits, which are saved and loaded as such."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from .. import ops
from ..ops import packed
from .hf import in_shards, underlying

MARK = "crossfade_quantized"  # a config has it if its model has layers of this kind


class QuantizedLinear(nn.Module):
    """A linear layer whose weight has 8 or 4 bits, with a scale for each group of a row's numbers.

    `crossfade.ops.linear` runs it. Its buffers move with ``model.to``, but no dtype changes them:
    scales are kept as the bits of float16. Gradients reach its input, not its weight.

    Attributes:
        in_features, out_features, bits, group: what the weight is.
        numbers, scales, minima: its buffers, as in `ops.Packed`, scales and minima as int16.
        bias: ``[out]``, or None.
    """

    bias: nn.Parameter | None
    numbers: Tensor
    scales: Tensor
    minima: Tensor | None
    like: Tensor

    def __init__(self, weight: ops.Packed, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.inner, weight.out
        self.bits, self.group = weight.bits, weight.group
        self.register_buffer("numbers", weight.numbers)
        self.register_buffer("scales", weight.scales.view(torch.int16))
        low = weight.minima
        self.register_buffer("minima", None if low is None else low.view(torch.int16))
        # of the dtype and on the device that the layer has been moved to
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def packed(self) -> ops.Packed:
        """The weight as `ops.linear` takes it."""
        low, half = self.minima, torch.float16
        scales, minima = self.scales.view(half), None if low is None else low.view(half)
        return ops.Packed(self.numbers, scales, minima, self.out_features, self.bits)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model is in, which its activations have."""
        return self.like.dtype

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.packed, self.bias)

    def extra_repr(self) -> str:
        size = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{size}, bits={self.bits}, group={self.group}, bias={self.bias is not None}"


def quantize(model: Any, bits: int = 8, group: int = 32, *, head: bool = False) -> Any:
    """Give all linear layers of a model weights of 8 or 4 bits, in place.

    Weights are rounded to nearest, symmetrically about 0, with a float16 scale for each `group`
    numbers of a row: 8.5 or 4.5 bits a weight with groups of 32. On CPUs a native kernel reads
    them as they are, and rounds activations to 8 bits a group as well; elsewhere, and where
    gradients are wanted, the weight is dequantised for each product. Layers under LoRA adapters are
    quantised too, and the adapters stay as they are. Embeddings stay as they are.

    `save_pretrained` saves such a model, and `crossfade.models.load` loads it.

    Args:
        model: of Transformers, or one that PEFT wraps.
        bits: 8 or 4.
        group: 16, 32, 64, 128 or 256. It must divide each layer's inputs.
        head: whether the output head is quantised too. If it is tied to the embeddings, it gets a
            weight of its own, as those stay as they are.

    Returns:
        The model itself.

    Raises:
        TypeError, ValueError: names the layer and says why. The model is then as it was.
    """
    packed.check_format(bits, group)
    bare: Any = underlying(model) if isinstance(model, nn.Module) else None
    if not isinstance(bare, PreTrainedModel):
        raise TypeError(f"model is a {type(model).__name__}; it must be a model of Transformers")
    own = bare.get_output_embeddings()
    layers = {
        name: layer
        for name, layer in bare.named_modules()
        if type(layer) in (nn.Linear, Conv1D) and not _is_adapter(name)
    }
    if any(isinstance(x, QuantizedLinear) for x in bare.modules()):
        raise ValueError("model has quantized layers already; quantize a model once")
    if getattr(bare.config, "quantization_config", None) is not None:
        raise ValueError("model is quantized by another library; it must have float weights")
    if not head:
        layers = {name: layer for name, layer in layers.items() if layer is not own}
    if not layers:
        raise ValueError("model has no linear layers")
    for name, layer in layers.items():
        _check(name, layer, group)
    for name, layer in layers.items():
        set_layer(bare, name, _quantized(name, layer, bits, group))
    if head and getattr(bare.config, "tie_word_embeddings", False):
        bare.config.tie_word_embeddings = False
    setattr(bare.config, MARK, True)
    return model


def _is_adapter(name: str) -> bool:
    return any(part.startswith(("lora_", "modules_to_save")) for part in name.split("."))


def _check(name: str, layer: nn.Module, group: int) -> None:
    weight: Any = layer.weight
    inner = weight.shape[0 if isinstance(layer, Conv1D) else 1]
    if weight.is_meta or hasattr(layer, "_hf_hook"):
        raise ValueError(f"{name}.weight is offloaded or on meta; it must be on a device")
    if in_shards(weight):
        raise ValueError(
            f"{name}.weight lies in shards on several processes; it must be whole: quantize a "
            "model that is loaded without distributed_config or FSDP"
        )
    if not weight.is_floating_point():
        raise TypeError(f"{name}.weight has dtype {weight.dtype}; it must be a float dtype")
    if inner == 0 or inner % group:
        raise ValueError(f"{name} has {inner} inputs; group {group} must divide them")


def _quantized(name: str, layer: Any, bits: int, group: int) -> QuantizedLinear:
    weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
    try:
        found = packed.quantize(weight, bits, group)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    new = QuantizedLinear(found, layer.bias, weight.dtype).to(weight.device)
    return new.train(layer.training)


def set_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer into the place of the one of that name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def assemble(
    auto: Any, config: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[Any, dict[str, list[str]]]:
    """A model of a config, with quantised layers where there are numbers of theirs.

    Args:
        auto: `AutoModelForCausalLM` or its like.
        tensors: what `model.state_dict()` gives. They are taken over, not copied, where they have
            the right dtype.

    Returns:
        The model in eval mode, and what was missing and unexpected.

    Raises:
        ValueError: a weight does not have the shape that the config says; names it.
    """
    with no_init_weights():
        model = auto.from_config(config, dtype=dtype)
    left = dict(tensors)
    for key in [k for k in tensors if k.endswith(".numbers")]:
        name = key.removesuffix(".numbers")
        try:
            layer: Any = model.get_submodule(name)
        except AttributeError:
            continue  # it is reported as unexpected
        parts = [left.pop(f"{name}.{part}", None) for part in ("numbers", "scales", "minima")]
        bias = left.pop(f"{name}.bias", None)
        set_layer(model, name, _layer_of(name, layer, parts, bias, dtype))
    own = {k: x for k, x in model.state_dict().items() if k not in tensors or k in left}
    own = {k: x for k, x in own.items() if not k.endswith((".numbers", ".scales", ".minima"))}
    for key, x in left.items():
        if key in own and own[key].shape != x.shape:
            raise ValueError(f"{key} is {list(x.shape)}; it must be {list(own[key].shape)}")
    cast = {k: x.to(own[k].dtype) for k, x in left.items() if k in own}
    model.load_state_dict(cast, strict=False, assign=True)
    model.tie_weights()
    tied = {k for k in own if k not in left and _is_tied(model, k, left)}
    report = {
        "missing_keys": sorted(own.keys() - left.keys() - tied - _quantized_keys(model)),
        "unexpected_keys": sorted(left.keys() - own.keys()),
        "mismatched_keys": [],
    }
    setattr(model.config, MARK, True)
    return model.eval().requires_grad_(True), report


def _quantized_keys(model: nn.Module) -> set[str]:
    """The keys of quantised layers, which have what they need."""
    names = [n for n, x in model.named_modules() if isinstance(x, QuantizedLinear)]
    return {key for key in model.state_dict() if key.rpartition(".")[0] in names}


def _is_tied(model: nn.Module, key: str, given: Mapping[str, Tensor]) -> bool:
    state = model.state_dict()
    at = state[key].data_ptr()
    return any(k in state and state[k].data_ptr() == at != 0 for k in given)


def _layer_of(
    name: str, layer: Any, parts: list[Tensor | None], bias: Tensor | None, dtype: torch.dtype
) -> QuantizedLinear:
    numbers, scales, minima = parts
    if type(layer) not in (nn.Linear, Conv1D):
        raise ValueError(f"{name} is a {type(layer).__name__}; only linear layers are quantized")
    inner, out = getattr(layer, "in_features", 0) or layer.nx, getattr(layer, "out_features", 0)
    out = out or layer.nf
    if scales is None or numbers is None or numbers.dim() != 3:
        raise ValueError(f"{name}.scales is missing, or {name}.numbers has no three dimensions")
    low = None if minima is None else minima.view(torch.float16)
    bits = numbers.shape[1] * 32 // inner
    weight = ops.Packed(numbers, scales.view(torch.float16), low, out, bits)
    try:
        packed.check(weight, numbers.device)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error
    if weight.inner != inner or (bias is None) != (layer.bias is None):
        raise ValueError(
            f"{name} has {weight.inner} inputs; it must have {inner}, and its own bias"
        )
    return QuantizedLinear(weight, None if bias is None else bias.to(dtype), dtype)
