"""Value heads in the engine and by hand, over weights that stay the base's, saved and loaded."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crossfade as cf
import pytest
import torch
from crossfade.training.value_head import (
    LowRankHead,
    load_value_head,
    save_value_head,
    token_values,
    value_head,
    value_model,
)
from safetensors.torch import load_file, save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "decoding"))

from tiny_models import SHAPES, VOCAB, doubled, lora, make, spread

# PEFT asks transformers for an attribute that this version of it has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

PROMPTS = [[7, 9, 30, 12, 8], [40], [11, 12, 13, 14, 15, 16, 17]]
DRAW: dict[str, Any] = {"max_new_tokens": 9, "seed": 5, "eos_token_id": [1, 20, 21, 22]}
HEADS: dict[str, dict[str, Any]] = {
    "full": {},
    "low rank": {"rank": 3},
    "scalar": {"kind": "scalar"},
    "bfloat16 full": {"dtype": torch.bfloat16},
    "bfloat16 low rank": {"rank": 5, "dtype": torch.bfloat16},
}


def fill(model: Any, seed: int = 0) -> Any:
    """The model with a head whose values are spread."""
    spread(value_head(model), seed)
    return model


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@torch.no_grad()
def by_hand(base: Any, model: Any, ids: list[int]) -> torch.Tensor:
    """Values ``[tokens, V or 1]`` at every position, in float64 from the hidden states on."""
    hidden = base.base_model(input_ids=torch.tensor([ids]), use_cache=False)[0][0]
    head = value_head(model)
    weights = {k: v.double() for k, v in head.state_dict().items()}
    if isinstance(head, LowRankHead):
        return hidden.double() @ weights["a"].T @ weights["b"].T
    if head.weight.dtype is not hidden.dtype:
        hidden = hidden.to(head.weight.dtype)
    return hidden.double() @ weights["weight"].T + weights.get("bias", 0.0)


def last(model: Any, values: torch.Tensor, ids: list[int]) -> float:
    scalar = model.value_kind == "scalar"
    return float(values[-1, 0] if scalar else values[-2, ids[-1]])


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("shape", SHAPES)
def test_searches_see_the_values(shape: str, options: dict[str, Any]) -> None:
    base = make(shape)
    model = fill(value_model(base, **options))
    search = cf.ChunkBeamSearch(2, 3, 4, cf.ValueHead(model))
    outs = [
        cf.generate(base, PROMPTS, search=search, engine=cf.Engine(simple=simple), **DRAW)
        for simple in (False, True)
    ]
    assert not outs[0].stats.notes
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    torch.testing.assert_close(outs[0].values, outs[1].values, atol=1e-4, rtol=1e-4)
    rough = {"atol": 0.05, "rtol": 0.02} if options.get("dtype") else {"atol": 1e-4, "rtol": 1e-4}
    for i, (prompt, response) in enumerate(zip(PROMPTS, outs[0].responses, strict=True)):
        ids = prompt + response
        truth = last(model, by_hand(base, model, ids), ids)
        torch.testing.assert_close(float(outs[0].values[i]), truth, **rough)


@pytest.mark.parametrize("options", [HEADS["full"], HEADS["low rank"]], ids=["full", "low rank"])
@pytest.mark.parametrize("within", [None, cf.Support(top_k=3)], ids=["all", "support"])
def test_blends_add_the_values(options: dict[str, Any], within: cf.Support | None) -> None:
    base, guide = make("llama"), make("qwen3", 2)
    model = fill(value_model(base, **options))
    blend = cf.Model(base) + 0.2 * cf.Model(guide) + 0.7 * cf.ValueHead(model)
    blend = blend if within is None else blend.within(within)
    outs = [
        cf.generate(blend, PROMPTS, engine=cf.Engine(simple=simple), **DRAW)
        for simple in (False, True)
    ]
    assert torch.equal(outs[0].sequences, outs[1].sequences)
    torch.testing.assert_close(outs[0].logprobs, outs[1].logprobs, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for i, (prompt, response) in enumerate(zip(PROMPTS, outs[0].responses, strict=True)):
            ids = torch.tensor([prompt + response])
            logits = base(ids).logits[0].double()
            mixed = logits.log_softmax(-1) + 0.2 * guide(ids).logits[0].double().log_softmax(-1)
            mixed += 0.7 * by_hand(base, model, ids[0].tolist())
            if within is not None:
                mixed[logits < logits.topk(3).values[:, -1:]] = -torch.inf
            at = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
            truth = mixed.log_softmax(-1)[at, torch.tensor(response)]
            found = outs[0].logprobs[i, : len(response)].double()
            torch.testing.assert_close(found, truth, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_values_of_tokens(options: dict[str, Any]) -> None:
    base = make("gpt2")
    model = fill(value_model(base, **options))
    assert model(torch.tensor([[5, 6]])).logits.dtype is torch.float32
    ids = [9, 4, 33, 60, 7]
    values = by_hand(base, model, ids)
    hidden = base.base_model(input_ids=torch.tensor([ids]))[0].detach()
    if model.value_kind == "scalar":
        found, truth = token_values(value_head(model), hidden, torch.tensor([ids]))[0], values[:, 0]
    else:
        tokens = torch.tensor([ids[1:]])
        found = token_values(value_head(model), hidden[:, :-1], tokens)[0]
        truth = values[:-1].gather(1, tokens.T)[:, 0]
    assert found.dtype is torch.float32
    # a full head's products are of the hidden states as they are
    rough = 0.03 if options.get("dtype") and "rank" not in options else 1e-4
    torch.testing.assert_close(found.double(), truth, atol=rough, rtol=rough)


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_values_begin_at_zero(options: dict[str, Any]) -> None:
    model = value_model(make("qwen3"), **options)
    assert model(torch.tensor([[5, 6, 50]])).logits.abs().max() == 0
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"lm_head.{n}" for n, _ in value_head(model).named_parameters()}


def test_the_base_stays_as_it_is() -> None:
    """Its storage is shared; modes, dtypes, adapters and configs are not."""
    base = make("llama").train()
    before, config = state(base), base.config.to_dict()
    model = value_model(base, "scalar")
    own = dict(base.named_parameters())
    for name, p in model.named_parameters():
        if not name.startswith("lm_head"):
            assert p.data_ptr() == own[name].data_ptr()
    assert model.training
    model.eval()
    lora(0, model, "tone")
    fill(model.to(torch.bfloat16))
    model.tie_weights()
    assert base.training
    assert base.config.to_dict() == config
    assert all(p.requires_grad for p in base.parameters())
    assert equal(state(base), before)
    assert type(base.lm_head) is nn.Linear
    assert all(type(m) in (nn.Linear,) for n, m in base.named_modules() if n.endswith("q_proj"))


def test_tied_embeddings_and_soft_caps() -> None:
    """A tied head is replaced and not trained into the embeddings; values are not capped."""
    from transformers import Gemma3ForCausalLM

    config = make("gemma3").config
    config.final_logit_softcapping, config.tie_word_embeddings = 2.0, True
    torch.manual_seed(0)
    base = Gemma3ForCausalLM(config).eval()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    model = fill(value_model(base))
    with torch.no_grad():
        value_head(model).weight.mul_(10)
    model.tie_weights()
    assert value_head(model).weight is not model.model.embed_tokens.weight
    values = by_hand(base, model, [5, 6, 7])
    assert values.abs().max() > 4
    found = model(torch.tensor([[5, 6, 7]])).logits[0].double()
    torch.testing.assert_close(found, values, atol=1e-4, rtol=1e-4)
    assert base.config.final_logit_softcapping == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", list(HEADS.values())[:3], ids=list(HEADS)[:3])
def test_saved_and_loaded(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    base = make("llama")
    base.config.name_or_path = "somewhere/llama"
    model = fill(value_model(base, **options))
    save_value_head(model, tmp_path / "head", dtype=dtype)
    assert {p.name for p in (tmp_path / "head").iterdir()} == {
        "value_head.json",
        "value_head.safetensors",
    }
    stored = load_file(tmp_path / "head" / "value_head.safetensors")
    assert {t.dtype for t in stored.values()} == {dtype}
    loaded = load_value_head(tmp_path / "head", base)
    assert loaded.value_kind == model.value_kind
    assert type(value_head(loaded)) is type(value_head(model))
    for a, b in zip(value_head(loaded).parameters(), value_head(model).parameters(), strict=True):
        assert a.dtype is torch.float32
        assert torch.equal(a, b.to(dtype).float())
    assert loaded.model.norm.weight.data_ptr() == base.model.norm.weight.data_ptr()
    assert json.loads((tmp_path / "head" / "value_head.json").read_text()) == {
        "format": 1,
        "kind": model.value_kind,
        "rank": options.get("rank"),
        "hidden_size": 16,
        "vocabulary": VOCAB,
        "backbone": "somewhere/llama",
        "adapter": False,
    }


def test_the_backbone_is_found_where_it_was(tmp_path: Path) -> None:
    from tiny_models import make_tokenizer
    from transformers import AutoModelForCausalLM

    make("llama").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True)
    model = fill(value_model(base.eval(), rank=2))
    save_value_head(model, tmp_path)  # beside it
    ids = torch.tensor([[5, 6, 7, 8]])
    loaded = load_value_head(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not loaded.training
    (tmp_path / "config.json").unlink()
    with pytest.raises(OSError, match=r"the backbone '.*' that .*value_head.json names could not"):
        load_value_head(tmp_path)


def test_an_adapter_is_saved_with_the_head(tmp_path: Path) -> None:
    base = make("llama")
    before = state(base)
    model = lora(3, fill(value_model(base, rank=2)), "tone").eval()
    save_value_head(model, tmp_path)
    loaded = load_value_head(tmp_path, base)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not torch.equal(loaded(ids).logits, fill(value_model(base, rank=2))(ids).logits)
    assert equal(state(base), before)
    out = cf.generate(
        base, PROMPTS, search=cf.ChunkBeamSearch(2, 2, 3, cf.ValueHead(loaded)), **DRAW
    )
    for i, (prompt, response) in enumerate(zip(PROMPTS, out.responses, strict=True)):
        q = loaded(torch.tensor([prompt + response])).logits[0, -2, response[-1]].detach()
        torch.testing.assert_close(out.values[i], q, atol=1e-4, rtol=1e-4)
    own = {id(p) for p in value_head(loaded).parameters()}  # and can be trained further
    learn = [n for n, p in loaded.named_parameters() if p.requires_grad and id(p) not in own]
    assert all(p.requires_grad for p in value_head(loaded).parameters())
    assert learn
    assert all("lora_" in name for name in learn)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors; .*\(pickled weights"):
        load_value_head(tmp_path, base)
    lora(4, model, "other")
    with pytest.raises(ValueError, match=r"adapters \['other', 'tone'\]; it must have one"):
        save_value_head(model, tmp_path)


BAD_MODELS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "kind": (lambda: value_model(make(), "v"), ValueError, "kind is 'v'; it must be 'q' or"),
    "rank of a scalar": (lambda: value_model(make(), "scalar", rank=2), ValueError, "only a Q-"),
    "rank 0": (lambda: value_model(make(), rank=0), ValueError, r"rank is 0; .* within \[1, 16\]"),
    "rank 17": (lambda: value_model(make(), rank=17), ValueError, "rank is 17"),
    "rank 2.0": (lambda: value_model(make(), rank=2.0), TypeError, "rank is 2.0; it must be an"),  # type: ignore[arg-type]
    "dtype": (lambda: value_model(make(), dtype=torch.int8), ValueError, "dtype is torch.int8"),
    "no model": (lambda: value_model(3), TypeError, "model is a int"),
    "backbone": (lambda: value_model(make().model), TypeError, "no language modelling head"),
    "adapter": (lambda: value_model(lora(0, make(), "x")), TypeError, "with PEFT adapters; it"),
    "inside": (
        lambda: value_model(lora(0, make(), "x").get_base_model()),
        TypeError,
        "LlamaForCausalLM with PEFT adapters",
    ),
    "save": (lambda: save_value_head(make(), "x"), TypeError, "a LlamaForCausalLM; it must be"),
    "save dtype": (
        lambda: save_value_head(value_model(make()), "x", dtype=torch.int8),
        ValueError,
        "dtype is torch.int8",
    ),
}


@pytest.mark.parametrize("bad", BAD_MODELS.values(), ids=BAD_MODELS)
def test_what_is_wrong_is_named(bad: tuple[Callable[[], Any], type[Exception], str]) -> None:
    with pytest.raises(bad[1], match=bad[2]):
        bad[0]()


def test_logits_that_are_more_than_the_heads_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="computes something between"):
        value_model(doubled())


BAD_FILES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "format": ({"format": 2}, ValueError, "json has format 2; it must be 1"),
    "kind": ({"kind": "v"}, ValueError, "json has kind 'v'; it must be 'q' or 'scalar'"),
    "rank": ({"rank": "8"}, ValueError, "rank in .*json is '8'; it must be of type int or null"),
    "other rank": ({"rank": 4}, ValueError, r"a in .*safetensors is .* \[3, 16\]; .* \[4, 16\]"),
    "not low rank": ({"rank": None}, ValueError, r"the tensors \['a', 'b'\]; it must have \['w"),
    "hidden": ({"hidden_size": 24}, ValueError, "json has hidden_size 24; it must be 16, as base"),
    "vocabulary": ({"vocabulary": 64}, ValueError, "json has vocabulary 64; it must be 61, as"),
    "no backbone": ({"backbone": None}, ValueError, "backbone in .*json is None; .* type str"),
    "adapter": ({"adapter": True}, FileNotFoundError, "there is no .*adapter_config.json"),
}


@pytest.mark.parametrize("bad", BAD_FILES.values(), ids=BAD_FILES)
def test_what_is_wrong_in_a_file_is_named(
    bad: tuple[dict[str, Any], type[Exception], str], tmp_path: Path
) -> None:
    base = make("llama")
    save_value_head(value_model(base, rank=3), tmp_path)
    file = tmp_path / "value_head.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **bad[0]}))
    with pytest.raises(bad[1], match=bad[2]):
        load_value_head(tmp_path, base)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    base = make("llama")
    weights, settings = tmp_path / "value_head.safetensors", tmp_path / "value_head.json"
    with pytest.raises(FileNotFoundError, match=r"there is no .*value_head.json; the folder must"):
        load_value_head(tmp_path, base)
    save_value_head(value_model(base), tmp_path)
    with pytest.raises(ValueError, match="names no backbone; base must be"):
        load_value_head(tmp_path)
    save_file({"weight": torch.zeros(VOCAB, 16, dtype=torch.int8)}, weights)
    with pytest.raises(ValueError, match=r"is torch.int8 \[61, 16\]; it must be floats \[61, 16\]"):
        load_value_head(tmp_path, base)
    weights.write_bytes(b"no tensors")
    with pytest.raises(OSError, match=r"value_head.safetensors cannot be read as safetensors"):
        load_value_head(tmp_path, base)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*value_head.safetensors"):
        load_value_head(tmp_path, base)
    settings.write_text("{")
    with pytest.raises(ValueError, match=r"value_head.json: not JSON"):
        load_value_head(tmp_path, base)
    settings.write_text("[]")
    with pytest.raises(ValueError, match=r"json is \[\]; it must be what save_value_head writes"):
        load_value_head(tmp_path, base)


def test_a_blend_counts_shared_weights_once() -> None:
    base = make()
    blend = cf.Model(base, name="base") + cf.ValueHead(value_model(base, rank=2), name="q")
    shared, head = blend.models
    assert shared.parameters == sum(p.numel() for p in base.parameters())
    assert head.parameters == 2 * (16 + VOCAB)
