"""Models whose weights are not all where they are used: right, or an error that names the term."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
import torch
from tiny_models import VOCAB, make
from transformers import LlamaForCausalLM, PreTrainedModel

accelerate = pytest.importorskip("accelerate")

PROMPTS = [[7, 9, 30], [40], [11, 12, 13, 14, 15]]
NOTE = (
    "the simple path: {} is offloaded or spread over several devices; the engine runs models on "
    "one device, and in shards on several ranks"
)


def on_cpu(model: Any, folder: Path) -> Any:
    return accelerate.cpu_offload(model, execution_device="cpu")


def on_disk(model: Any, folder: Path) -> Any:
    return accelerate.disk_offload(model, folder, execution_device="cpu")


def in_part(model: Any, folder: Path) -> Any:
    """Put one layer on the disk, and leave the others where they are."""
    devices = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    devices |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    return accelerate.dispatch_model(
        model, devices, main_device="cpu", offload_dir=folder, force_hooks=True
    )


@pytest.mark.parametrize("offload", [on_cpu, on_disk, in_part])
def test_an_offloaded_term_is_right(offload: Any, base: PreTrainedModel, tmp_path: Path) -> None:
    whole, away = make("llama", 1), offload(make("llama", 1), tmp_path)
    blends = [cf.Model(base) + 0.5 * cf.Model(m, name="guide") for m in (whole, away)]
    theirs, ours = (cf.generate(b, PROMPTS, max_new_tokens=6) for b in blends)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, atol=1e-4, rtol=1e-4)
    assert ours.stats.notes == (NOTE.format("guide"),)
    scores = [cf.score(b, PROMPTS, ours.responses).logprobs for b in blends]
    torch.testing.assert_close(*scores)


def test_an_offloaded_first_term_is_right(tmp_path: Path) -> None:
    model = on_cpu(make(), tmp_path)
    theirs = cf.generate(make(), PROMPTS, max_new_tokens=6)
    assert torch.equal(cf.generate(model, PROMPTS, max_new_tokens=6).sequences, theirs.sequences)


def test_a_term_without_numbers_is_named(base: PreTrainedModel) -> None:
    with torch.device("meta"):
        empty = LlamaForCausalLM(base.config)
    blend = cf.Model(base) + 0.5 * cf.Model(empty, name="guide")
    match = "guide is a LlamaForCausalLM whose parameter model.embed_tokens.weight is on the meta"
    with pytest.raises(ValueError, match=match):
        cf.generate(blend, PROMPTS, max_new_tokens=2)
    with pytest.raises(ValueError, match=match):
        cf.score(blend, PROMPTS, [[5], [6], [VOCAB - 1]])
    part = make()
    part.lm_head.weight = torch.nn.Parameter(part.lm_head.weight.to("meta"))
    with pytest.raises(ValueError, match=r"model0 .* parameter lm_head\.weight is on the meta"):
        cf.generate(part, PROMPTS, max_new_tokens=2)
