"""``crossfade info``: what is installed, how it was built, and which backends work here."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

HELP = "Show what is installed, how it was built, and which backends work here."
PACKAGES = (
    *("crossfade", "torch", "transformers", "triton", "numpy", "peft", "accelerate", "gguf"),
    *("vaderSentiment", "matplotlib"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the same as JSON")


def run(arguments: argparse.Namespace) -> int:
    found = collect()
    print(json.dumps(found, indent=2) if arguments.json else text(found))
    return 0


def collect() -> dict[str, Any]:
    """Everything that `crossfade info` prints, as values that JSON has."""
    import torch

    from .. import models
    from ..ops import backends

    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "native": _native(),
        "torch_cuda": torch.version.cuda,
        "nvidia_driver": _driver(),
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "backends": {
            device: {name: backends.why_not(name, torch.device(device)) for name in backends.NAMES}
            for device in devices
        },
        "small_model": {"path": str(models.path()), "cached": models.is_cached()},
    }


def text(info: dict[str, Any]) -> str:
    """What `collect` found, for people: a label and a value on each line."""
    rows = [("python", f"{info['python']} on {info['platform']}, {info['threads']} threads")]
    rows += [(name, version or "not installed") for name, version in info["packages"].items()]
    rows += [(f"native {key}".replace("_", " "), value) for key, value in info["native"].items()]
    rows += [
        ("torch's CUDA", info["torch_cuda"] or "none: a CPU build"),
        ("NVIDIA driver", info["nvidia_driver"] or "none found"),
    ]
    rows += [
        (gpu["device"], f"{gpu['name']}, sm_{gpu['capability']}, {gpu['memory_gib']} GiB")
        for gpu in info["gpus"]
    ]
    for device, reasons in info["backends"].items():
        rows += [
            (f"{name} on {device}", "works" if reason is None else f"no: {reason}")
            for name, reason in reasons.items()
        ]
    model = info["small_model"]
    rows.append(("small model", f"{model['path']} ({'' if model['cached'] else 'not '}cached)"))
    return "\n".join(f"{label:26s} {value}" for label, value in rows)


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _native() -> dict[str, Any]:
    try:
        from crossfade import _native as native
    except ImportError as error:
        return {"error": str(error)}
    return {
        "cpu_instructions": native.cpu_isa(),
        "cuda_architectures": native.cuda_architectures or "none: built without nvcc",
    }


def _driver() -> str | None:
    """The version of NVIDIA's kernel driver, where Linux shows it."""
    try:
        first = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except (OSError, IndexError):
        return None
    return next((word for word in first.split() if word[0].isdigit() and "." in word), first)


def _gpu(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "device": f"cuda:{index}",
        "name": properties.name,
        "capability": f"{properties.major}{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }
