"""Models with layers of 8 and 4 bits: what they compute, that they are saved, and errors."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.extras import old_names
from crossfade.models.quantized import MARK, QuantizedLinear
from tiny_models import HEADS, LONG, SIZES, lora, make, make_tokenizer
from tiny_models import IDS as SPECIAL
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

IDS = torch.tensor([[3, 5, 8, 13, 4]])


def small(shape: str = "llama", seed: int = 0) -> Any:
    """A random model of which all layers have multiples of 16 inputs."""
    if shape != "llama":
        return make(shape, seed)
    sizes = {**SIZES, "intermediate_size": 32, **HEADS, **LONG, **SPECIAL}
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.5)
    return model.eval()


def quantized(model: nn.Module) -> list[QuantizedLinear]:
    return [x for x in model.modules() if isinstance(x, QuantizedLinear)]


def new_tokens(out: Any) -> list[list[int]]:
    rows = out.sequences[:, out.prompt_length :]
    return [row[:n].tolist() for row, n in zip(rows, out.lengths, strict=True)]


def dequantized(model: nn.Module) -> Any:
    """The same model with float layers, whose weights are the quantised ones."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, QuantizedLinear):
                plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
                plain.weight.data = layer.packed.dequantized(layer.dtype)
                if layer.bias is not None:
                    plain.bias.data = layer.bias.data
                setattr(parent, name, plain)
    return model


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_forwards(shape: str, bits: int) -> None:
    """With gradients it is the dequantised model; without, activations are rounded as well."""
    model = small(shape)
    kinds = (nn.Linear, Conv1D)
    count = sum(type(x) in kinds for x in model.modules())
    assert cf.quantize(model, bits, 16) is model
    assert len(quantized(model)) == count - 1  # without the head
    assert {(x.bits, x.group) for x in quantized(model)} == {(bits, 16)}
    with torch.enable_grad():
        embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
        got = model(inputs_embeds=embedded).logits
        want = dequantized(model)(IDS).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert bool(torch.autograd.grad(got.sum(), embedded)[0].isfinite().all())
    with torch.no_grad():
        near = model(IDS).logits
    assert (near - want).square().mean() < 0.01 * want.var()


def test_decoding_over_it_as_over_any_model() -> None:
    """The engine runs it, and blends it with others; rows are what they are alone."""
    model, other, tokenizer = (
        cf.quantize(small(), 8, 16, head=True),
        small(seed=1),
        make_tokenizer(),
    )
    assert not model.config.tie_word_embeddings
    blend = cf.Model(model, tokenizer=tokenizer) * 0.5 + cf.Model(other) * 0.5
    prompts = [[3, 5, 8], [4, 9, 2, 7]]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    both = cf.generate(blend, prompts, **options)
    for i, prompt in enumerate(prompts):
        alone = cf.generate(blend, [prompt], **options)
        assert new_tokens(alone)[0] == new_tokens(both)[i]
    plain = cf.generate(cf.Model(model, tokenizer=tokenizer), [prompts[0]], **options)
    ids = torch.tensor([prompts[0]])
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    assert new_tokens(plain)[0] == ids[0, 3:].tolist()[: len(new_tokens(plain)[0])]


def test_adapters_stay_float() -> None:
    pytest.importorskip("peft")
    with old_names():
        tuned = lora(0, small(), "tuned")
    before = {k: x.clone() for k, x in tuned.state_dict().items() if "lora_" in k}
    cf.quantize(tuned, 8, 16)
    assert quantized(tuned)
    assert all(torch.equal(tuned.state_dict()[k], x) for k, x in before.items())
    model = cf.Model(tuned, adapter="tuned", tokenizer=make_tokenizer())
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    got = cf.generate(model, [[3, 5, 8]], **options)
    ids = torch.tensor([[3, 5, 8]])
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat((ids, tuned(ids).logits[:, -1:].argmax(-1)), dim=1)
    assert new_tokens(got)[0] == ids[0, 3:].tolist()[: len(new_tokens(got)[0])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_saved_and_loaded(shape: str, head: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    small(shape).save_pretrained(tmp_path / "float")
    make_tokenizer().save_pretrained(tmp_path / "float")
    model = cf.quantize(cf.models.load(tmp_path / "float", dtype=dtype)[0], 4, 16, head=head)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    loaded, _ = cf.models.load(tmp_path, dtype=dtype)
    assert len(quantized(loaded)) == len(quantized(model))
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)
    own, there = model.state_dict(), loaded.state_dict()
    assert own.keys() == there.keys()
    assert all(torch.equal(x, there[k]) for k, x in own.items())


def test_moved_and_copied() -> None:
    """No dtype changes numbers and scales, and a copy is one of its own."""
    model = cf.quantize(small(), 8, 16)
    before = {k: x.clone() for k, x in model.state_dict().items()}
    twin = copy.deepcopy(model).to(torch.bfloat16)
    layer = quantized(twin)[0]
    assert layer.dtype is torch.bfloat16
    twin.float()
    for k, x in twin.state_dict().items():
        if k.endswith((".numbers", ".scales")):
            assert torch.equal(x, before[k])
    layer.numbers.zero_()
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())


def test_a_file_that_is_not_whole(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = cf.quantize(small(), 4, 16)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors, key = load_file(file), "model.layers.0.mlp.up_proj"
    for changed, says in (
        ({f"{key}.scales": None}, "scales is missing"),
        ({f"{key}.numbers": tensors[f"{key}.numbers"][:1]}, "weight.numbers has shape"),
        ({f"{key}.numbers": None, f"{key}.scales": None}, f"no weights for {key}.weight"),
        ({"model.norm.weight": None}, "no weights for model.norm.weight"),
        ({"model.norm.weight": torch.ones(3)}, "model.norm.weight is"),
    ):
        edited = {k: x for k, x in (tensors | changed).items() if x is not None}
        save_file(edited, file, metadata={"format": "pt"})
        with pytest.raises((OSError, ValueError), match=says):
            cf.models.load(tmp_path)


@pytest.mark.parametrize(
    ("model", "options", "error", "says"),
    [
        (small(), {"bits": 3}, ValueError, "bits is 3; it must be 4 or 8"),
        (small(), {"group": 48}, ValueError, "group is 48"),
        (small(), {"group": 256}, ValueError, "inputs; group 256 must divide them"),
        (cf.quantize(small(), group=16), {"group": 16}, ValueError, "quantized layers already"),
        (small().to("meta"), {"group": 16}, ValueError, "offloaded or on meta"),
        ("smollm2", {}, TypeError, "model is a str"),
        (nn.LayerNorm(3), {}, TypeError, "model is a LayerNorm"),
    ],
)
def test_bad_calls(model: Any, options: dict[str, Any], error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        cf.quantize(model, **options)


def test_a_model_with_a_bad_layer_stays_as_it_was() -> None:
    model = small()
    model.model.layers[0].mlp.down_proj = nn.Linear(40, 8)
    with pytest.raises(ValueError, match=r"down_proj has 40 inputs; group 16"):
        cf.quantize(model, group=16)
    assert not quantized(model)
    assert not hasattr(model.config, MARK)
