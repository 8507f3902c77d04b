"""The CUDA kernels of blends, compiled for the CPU, as a backend like all others."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import structs
from crossfade.ops import BlendSample, Draw, Inputs
from crossfade.ops.types import ShardDraw
from emulation import build
from torch import Tensor

MAX_TERMS = 16
MAX_PARTS = 8
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


# ---- csrc/crossfade.h in ctypes ------------------------------------------------------------------


class Matrix(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    )


class Weights(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("all", ctypes.c_float * MAX_TERMS),
    )


class PerRowFloat(ctypes.Structure):
    _fields_ = (("rows", ctypes.c_void_p), ("all", ctypes.c_float))


class PerRowInt(ctypes.Structure):
    _fields_ = (("rows", ctypes.c_void_p), ("all", ctypes.c_int64))


class SupportStruct(ctypes.Structure):
    _fields_ = (
        ("term", ctypes.c_int32),
        ("top_k", ctypes.c_int64),
        ("top_p", ctypes.c_float),
        ("min_p", ctypes.c_float),
    )


class PartStruct(ctypes.Structure):
    _fields_ = (
        ("weight", Weights),
        ("power", ctypes.c_float),
        ("min", ctypes.c_float),
        ("max", ctypes.c_float),
    )


class BlendStruct(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        ("terms", ctypes.c_int32),
        ("values", ctypes.c_int32),
        ("term", Matrix * MAX_TERMS),
        ("value", Matrix * MAX_TERMS),
        ("weight", Weights),
        ("value_weight", Weights),
        ("power", ctypes.c_float),
        ("parts", ctypes.c_int32),
        ("part", PartStruct * MAX_PARTS),
        ("support", SupportStruct),
        ("mask", ctypes.c_void_p),
        ("mask_stride", ctypes.c_int64),
        ("log_z", ctypes.c_void_p),
    )


class SamplingStruct(ctypes.Structure):
    _fields_ = (
        ("sample", ctypes.c_bool),
        ("temperature", PerRowFloat),
        ("top_p", PerRowFloat),
        ("min_p", PerRowFloat),
        ("top_k", PerRowInt),
        ("seed", PerRowInt),
        ("stream", PerRowInt),
        ("step", PerRowInt),
        ("tokens", ctypes.c_void_p),
        ("logprobs", ctypes.c_void_p),
        ("sampled_logprobs", ctypes.c_void_p),
        ("term_logprobs", ctypes.c_void_p),
        ("pushes", ctypes.c_void_p),
        ("first_token", ctypes.c_int64),
        ("shard", ctypes.c_void_p),
    )


def at(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def matrix(t: Tensor) -> Matrix:
    return Matrix(t.data_ptr(), t.stride(0), DTYPE_CODES[t.dtype])


def weights_struct(w: Any) -> Weights:
    if isinstance(w, Tensor):
        return Weights(w.data_ptr(), w.stride(0) if w.dim() == 2 else 0)
    return Weights(None, 0, tuple(w))


def part_weights(i: Inputs) -> list[Any]:
    """The weights of each part, which are parts of what `Inputs` has."""
    terms = len(i.logits)
    return [
        i.part_weights[..., g * terms :]
        if isinstance(i.part_weights, Tensor)
        else i.part_weights[g * terms : (g + 1) * terms]
        for g in range(len(i.parts))
    ]


def blend_struct(i: Inputs) -> BlendStruct:
    s, mask = i.support, i.mask
    return BlendStruct(
        rows=i.rows,
        vocab=i.vocab_size,
        terms=len(i.logits),
        values=len(i.values),
        term=tuple(map(matrix, i.logits)),
        value=tuple(map(matrix, i.values)),
        weight=weights_struct(i.weights),
        value_weight=weights_struct(i.value_weights),
        power=i.power,
        parts=len(i.parts),
        part=tuple(
            PartStruct(weights_struct(w), *part)
            for w, part in zip(part_weights(i), i.parts, strict=True)
        ),
        support=SupportStruct(s.term, s.top_k, s.top_p, s.min_p) if s else SupportStruct(-1),
        mask=at(mask),
        mask_stride=mask.stride(0) if mask is not None and mask.dim() == 2 else 0,
        log_z=at(i.log_z),
    )


def sampling_struct(d: Draw, out: BlendSample | ShardDraw) -> SamplingStruct:
    def setting(struct: Callable[..., Any], x: Any) -> Any:
        return struct(x.data_ptr()) if isinstance(x, Tensor) else struct(None, x)

    return SamplingStruct(
        d.do_sample,
        *(setting(PerRowFloat, x) for x in (d.temperature, d.top_p, d.min_p)),
        *(setting(PerRowInt, x) for x in (d.top_k, d.seed, d.stream, d.step)),
        at(out.tokens),
        *((None,) * 4 if isinstance(out, ShardDraw) else map(at, out[1:])),
        d.first_token,
        at(out.facts) if isinstance(out, ShardDraw) else None,
    )


# ---- The emulated backend ------------------------------------------------------------------------


def load_blends(directory: Path) -> Any:
    """The library of an `EmulatedCuda`, compiled into a directory."""
    loaded: Any = build("kernels.cpp", directory)
    for name in ("emulated_blend", "emulated_blend_sample"):
        getattr(loaded, name).restype = ctypes.c_char_p
    assert loaded.blend_bytes() == ctypes.sizeof(BlendStruct)
    assert loaded.sampling_bytes() == ctypes.sizeof(SamplingStruct)
    return loaded


@dataclasses.dataclass(frozen=True)
class EmulatedCuda:
    """What `cases` asks of a backend: ops with the public signatures."""

    library: Any
    cluster: int
    threads: int
    order: int = 1  # the seed that shuffles the threads
    device: str = "cpu"

    def _run(self, name: str, *args: Any) -> None:
        capability = 9 if self.cluster > 1 else 8
        self.library.configure(self.cluster, self.threads, self.order, capability)
        error = getattr(self.library, name)(*(ctypes.byref(a) for a in args))
        assert error is None, error.decode()

    def blend(self, *args: Any, **options: Any) -> Tensor:
        return self._blend(Inputs(*args, **options), raw=False)

    def raw_scores(self, inputs: Inputs) -> Tensor:
        return self._blend(inputs, raw=True)

    def _blend(self, inputs: Inputs, raw: bool) -> Tensor:
        out = torch.full((inputs.rows, inputs.vocab_size), 12345.0)
        to = (ctypes.c_float * 0).from_address(out.data_ptr())
        self._run("emulated_blend", blend_struct(inputs), to, ctypes.c_bool(raw))
        return out

    def blend_sample(self, *args: Any, **options: Any) -> BlendSample:
        inputs, draw, return_term_logprobs, return_pushes = structs(*args, **options)
        logprobs, sampled = torch.full((2, inputs.rows), 12345.0)
        terms = len(inputs.logits)
        both = terms + len(inputs.values)
        out = BlendSample(
            torch.full((inputs.rows,), 77),
            logprobs,
            sampled,
            torch.full((inputs.rows, terms), 12345.0) if return_term_logprobs else None,
            torch.full((inputs.rows, both), 12345.0) if return_pushes else None,
        )
        self._run("emulated_blend_sample", blend_struct(inputs), sampling_struct(draw, out))
        return out

    def draw_shard(self, inputs: Inputs, draw: Draw) -> ShardDraw:
        out = ShardDraw(torch.full((inputs.rows,), 77), torch.full((inputs.rows, 7), 12345.0))
        self._run("emulated_blend_sample", blend_struct(inputs), sampling_struct(draw, out))
        return out
