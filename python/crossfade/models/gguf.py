"""Models from GGUF files, whose blocks of 8 and 4 bits stay what they are.

Q8_0, Q4_0 and Q4_1 become `ops.Packed` weights of the same numbers, scales and minima. Q4_K and
Q6_K have a scale of a few bits for each 32 or 16 numbers, times one of float16 for 256: that
product is rounded to float16, which changes it by a part in 2,000 at most. Numbers of Q6_K take 8
bits. What is in another type is dequantised by the package gguf.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from .. import ops
from ..extras import require
from ..ops import packed
from . import gguf_header, gguf_tokenizer, quantized

PLAIN = {0: "float32", 1: "float16"}  # types without blocks
ROWS_ALONE = ("TensorProcessor", "LlamaTensorProcessor", "Gemma2TensorProcessor")


def load(path: Path, dtype: torch.dtype | str = torch.float32) -> tuple[Any, Any]:
    """The causal LM in a GGUF file, in eval mode, and its tokenizer, which pads on the left.

    Args:
        dtype: of what is not quantised, and of activations; "auto" is float32.

    Raises:
        ValueError: something in the file cannot be, or its architecture is not known; says what.
        ImportError: the package gguf is missing; names the extra that brings it.
    """
    gguf = require("gguf", "smollm2")
    header, fields = gguf_header.read(path), gguf.GGUFReader(path).fields
    config = AutoConfig.from_pretrained(
        path.parent, gguf_file=path.name, trust_remote_code=False, local_files_only=True
    )
    tokenizer = gguf_tokenizer.of_file(path, fields, config.max_position_embeddings)
    wanted = torch.float32 if dtype == "auto" else dtype
    wanted = getattr(torch, wanted) if isinstance(wanted, str) else wanted
    model, report = _model(header, fields, path, config, wanted)
    if report["missing_keys"]:
        raise ValueError(f"{path} is incomplete: it has no {report['missing_keys'][0]}")
    model.config.name_or_path = model.name_or_path = str(path)
    return model, tokenizer


def _model(
    header: dict[str, gguf_header.Tensors],
    fields: Any,
    path: Path,
    config: Any,
    dtype: torch.dtype,
) -> tuple[Any, dict[str, list[str]]]:
    from transformers import modeling_gguf_pytorch_utils as theirs

    architecture = fields["general.architecture"].contents()
    kind = theirs.TENSOR_PROCESSORS.get(architecture, theirs.TensorProcessor)
    if kind.__name__ not in ROWS_ALONE:
        raise ValueError(f"architecture {architecture} is not read from blocks")
    processor = kind(config=config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if "output.weight" not in header:  # the head gets the blocks of the embeddings
        config.tie_word_embeddings = False
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    names = theirs.get_gguf_hf_weights_map(skeleton, processor)
    embeddings = skeleton.get_input_embeddings()
    np = require("numpy", "smollm2")
    data = np.memmap(path, mode="r")
    found: dict[str, Tensor] = {}
    for name, at in header.items():
        blocks = data[at.start : at.end]
        for key in [names[name]] if name in names else []:
            layer = skeleton.get_submodule(key.rpartition(".")[0])
            linear = type(layer) is torch.nn.Linear and key.endswith(".weight")
            if linear and at.type in READERS and len(at.shape) == 2:
                _put(found, key, _rows(_packed(blocks, at), processor, name))
            else:
                weights = _dequantized(blocks, at)
                found[key] = torch.from_numpy(
                    np.array(processor.process(weights=weights, name=name).weights)
                ).to(dtype)
            if layer is embeddings and "output.weight" not in header:
                _put_head(found, skeleton, blocks, at, found[key])
    return quantized.assemble(AutoModelForCausalLM, config, found, dtype)


def _put(found: dict[str, Tensor], key: str, weight: ops.Packed) -> None:
    name = key.removesuffix(".weight")
    found[f"{name}.numbers"] = weight.numbers
    found[f"{name}.scales"] = weight.scales.view(torch.int16)
    if weight.minima is not None:
        found[f"{name}.minima"] = weight.minima.view(torch.int16)


def _put_head(found: dict[str, Tensor], skeleton: Any, blocks: Any, at: Any, own: Tensor) -> None:
    """The head that is tied to the embeddings: of their blocks, or else their numbers."""
    head = skeleton.get_output_embeddings()
    (key,) = [f"{name}.weight" for name, x in skeleton.named_modules() if x is head]
    if at.type in READERS:
        _put(found, key, _packed(blocks, at))
    else:
        found[key] = own


def _dequantized(blocks: Any, at: gguf_header.Tensors) -> Any:
    if at.type in PLAIN:
        return blocks.view(PLAIN[at.type]).reshape(at.shape)
    gguf = require("gguf", "smollm2")
    rows = blocks.reshape(*at.shape[:-1], -1)
    return gguf.dequantize(rows, gguf.GGMLQuantizationType(at.type)).reshape(at.shape)


def _rows(weight: ops.Packed, processor: Any, name: str) -> ops.Packed:
    """The rows in the order that the model has them in: llama.cpp permutes those of queries."""
    places = torch.arange(weight.out).numpy()[:, None]
    order = torch.from_numpy(processor.process(weights=places, name=name).weights[:, 0].copy())
    if torch.equal(order, torch.arange(weight.out)):
        return weight
    numbers, scales, minima = weight.unpacked()
    low = None if minima is None else minima[order]
    return packed.pack(numbers[order], scales[order], low, weight.bits)


def _packed(blocks: Any, at: gguf_header.Tensors) -> ops.Packed:
    size = gguf_header.BLOCKS[at.type][1]
    each = torch.from_numpy(blocks.copy()).view(-1, size)
    bits, q, scales, minima = READERS[at.type](each)
    out = at.shape[0]
    if not bool(scales.isfinite().all()):
        raise ValueError("a block has a scale that is not finite")
    low = None if minima is None else minima.reshape(out, -1)
    return packed.pack(q.reshape(at.shape), scales.reshape(out, -1), low, bits)


def _half(bytes_of: Tensor) -> Tensor:
    return bytes_of.contiguous().view(torch.float16)


Blocks = tuple[int, Tensor, Tensor, Tensor | None]  # bits, numbers, scales and minima


def _q8_0(b: Tensor) -> Blocks:
    return 8, b[:, 2:] ^ 128, _half(b[:, :2]), None


def _halves(q: Tensor) -> Tensor:
    """The low halves of bytes, then the high ones."""
    return torch.cat((q & 15, q >> 4), dim=-1)


def _q4_0(b: Tensor) -> Blocks:
    return 4, _halves(b[:, 2:]), _half(b[:, :2]), None


def _q4_1(b: Tensor) -> Blocks:
    return 4, _halves(b[:, 4:]), _half(b[:, :2]), _half(b[:, 2:4])


def _q4_k(b: Tensor) -> Blocks:
    of_scales, of_minima = _half(b[:, :2]).float(), _half(b[:, 2:4]).float()
    first, second, both = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scales = torch.cat((first & 63, both & 15 | first >> 6 << 4), dim=1)
    minima = torch.cat((second & 63, both >> 4 | second >> 6 << 4), dim=1)
    numbers = _halves(b[:, 16:].view(-1, 4, 32)).reshape(-1, 256)
    return 4, numbers, (of_scales * scales).half(), (-of_minima * minima).half()


def _q6_k(b: Tensor) -> Blocks:
    low, high = b[:, :128].view(-1, 2, 2, 32), b[:, 128:192].view(-1, 2, 1, 32)
    scales, of = b[:, 192:208].view(torch.int8), _half(b[:, 208:]).float()
    nibbles = torch.cat((low & 15, low >> 4), dim=2)  # [blocks, 2, 4, 32]
    pairs = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], dim=2)
    numbers = (nibbles | pairs << 4) + (packed.ZERO[8] - 32)
    return 8, numbers.reshape(-1, 256), (of * scales).half(), None


READERS = {2: _q4_0, 3: _q4_1, 8: _q8_0, 12: _q4_k, 14: _q6_k}
