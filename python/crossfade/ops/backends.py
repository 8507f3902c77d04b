"""The one place that chooses what runs an op: "reference", "native" or "triton"."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch

from ..checks import did_you_mean

NAMES = ("native", "triton", "reference")  # the fastest first


@functools.cache
def why_not(name: str, device: torch.device) -> str | None:
    """Why a backend cannot take tensors of this device; None if it can."""
    if name == "reference":
        return None
    if name == "native":
        return _module(name).why_not(device)
    kind = device.type
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if kind == "cpu" and not interpreted:
        return "Triton compiles for GPUs only (TRITON_INTERPRET=1 runs its interpreter on a CPU)"
    if kind not in ("cpu", "cuda", "xpu"):
        return f"Triton has no {kind} backend"
    return None


@functools.cache
def _fastest(device: torch.device) -> ModuleType:
    for name in NAMES:
        interpreted = name == "triton" and device.type == "cpu"  # for tests, never for speed
        if why_not(name, device) is None and not interpreted:
            return _module(name)
    raise AssertionError("the reference runs everywhere")


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")


def select(name: str | None, device: torch.device) -> ModuleType:
    """The module that runs an op on `device`: the one named, or the fastest that can."""
    if name is None:
        return _fastest(device)
    if name not in NAMES:
        raise ValueError(
            f"backend is {name!r}; it must be None or one of {sorted(NAMES)}"
            f"{did_you_mean(name, NAMES)}"
        )
    reason = why_not(name, device)
    if reason is not None:
        raise ValueError(f"backend is {name!r}, which cannot run on {device}: {reason}")
    return _module(name)


def of_dtype(name: str | None, dtype: torch.dtype, argument: str) -> str | None:
    """The backend for tensors of a dtype: the reference alone computes with float64."""
    if dtype != torch.float64 or name == "reference":
        return name
    if name is not None:
        raise ValueError(
            f"backend is {name!r}, which cannot run this: {argument} has dtype {dtype}; it must be "
            "None or 'reference' then"
        )
    return "reference"
