"""GGUF files: blocks against the package gguf, whole models, and files that are damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import crossfade as cf
import numpy as np
import pytest
import torch
from crossfade.models import gguf as ours
from crossfade.models import gguf_header
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

gguf = pytest.importorskip("gguf")

Q8_0, Q4_0, Q4_1, Q4_K, Q6_K = 8, 2, 3, 12, 14
# where blocks have float16 numbers
HALVES = {
    Q4_0: [0],
    Q4_1: [0, 2],
    Q8_0: [0],
    Q4_K: [0, 2],
    Q6_K: [208],
}  # where float16 numbers are
HIDDEN, INNER, HEADS, KV = 64, 96, 4, 2
BYTES = "".join(map(chr, [*range(33, 127), *range(161, 173), *range(174, 256)]))
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BYTES, *map(chr, range(256, 324)), "th"]
VOCAB = len(TOKENS)


def blocks(kind: int, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random blocks whose float16 numbers are of the size of weights."""
    numbers, size = gguf_header.BLOCKS[kind]
    random = np.random.default_rng(seed)
    found = random.integers(0, 256, (rows * columns // numbers, size), dtype=np.uint8)
    for at in HALVES[kind]:
        halves = (random.random(len(found)) * 0.01 + 0.001).astype(np.float16)
        found[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    return found.reshape(rows, -1)


@pytest.mark.parametrize("kind", HALVES)
def test_blocks(kind: int) -> None:
    """Exact, but for scales of K types, which are rounded to float16."""
    raw = blocks(kind, 5, 512)
    got = ours._packed(raw.reshape(-1), gguf_header.Tensors((5, 512), kind, 0, 0)).dequantized()
    want = torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType(kind)))
    exact = kind not in (Q4_K, Q6_K)
    torch.testing.assert_close(got, want, rtol=0, atol=0 if exact else 2e-3 * want.abs().max())
    assert exact or (got - want).abs().mean() < 5e-4 * want.abs().mean()


def write(path: Path, kind: int = Q8_0, embedded: int = Q4_1) -> Path:
    """A llama of two layers, of which all matrices are blocks."""
    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(128)
    w.add_embedding_length(HIDDEN)
    w.add_block_count(2)
    w.add_feed_forward_length(INNER)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(10000.0)
    w.add_vocab_size(VOCAB)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    w.add_token_list(TOKENS)
    w.add_token_types([3, 3, 3] + [1] * (VOCAB - 3))
    w.add_token_merges(["t h"])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    narrow = HIDDEN // HEADS * KV
    shapes = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (narrow, HIDDEN), "attn_v": (narrow, HIDDEN)}
    shapes |= {"attn_output": (HIDDEN, HIDDEN), "ffn_gate": (INNER, HIDDEN)}
    shapes |= {"ffn_up": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER)}
    named = {f"blk.{i}.{name}.weight": shape for i in range(2) for name, shape in shapes.items()}
    for seed, (name, shape) in enumerate(named.items()):
        raw = blocks(kind, *shape, seed)
        w.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType(kind))
    raw = blocks(embedded, VOCAB, HIDDEN, 99)
    w.add_tensor("token_embd.weight", raw, raw_dtype=gguf.GGMLQuantizationType(embedded))
    for i in range(2):
        for name in ("attn_norm", "ffn_norm"):
            w.add_tensor(f"blk.{i}.{name}.weight", np.full(HIDDEN, 1.1, dtype=np.float32))
    w.add_tensor("output_norm.weight", np.ones(HIDDEN, dtype=np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.mark.parametrize("kind", [Q8_0, Q4_0, Q4_1])
def test_a_model_is_the_one_that_transformers_reads(kind: int, tmp_path: Path) -> None:
    """Theirs is dequantised. Ours has layers of few bits, and the tokenizer of the file."""
    from transformers import AutoModelForCausalLM

    path = write(tmp_path / "model.gguf", kind)
    model, tokenizer = cf.models.load(path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    layers = [type(x).__name__ for x in model.modules() if "Linear" in type(x).__name__]
    assert layers == ["QuantizedLinear"] * 15  # with the head, which has the embeddings' blocks
    ids = torch.tensor([[5, 9, 17, 30]])
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    assert tokenizer.decode(tokenizer("the lake", add_special_tokens=False).input_ids) == "the lake"
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "hm"}], tokenize=False) == "hm"
    )
    assert model.config.name_or_path == str(path)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, _ = cf.models.load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("gguf") / "model.gguf").read_bytes()


def end_of_header(data: bytes) -> int:
    return data.rindex(b"output_norm.weight") + 18 + 4 + 8 + 4 + 8


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_file_that_is_changed_is_refused_or_read(
    data: Any, whole: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever its header says, nothing outside the file is a tensor's."""
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, end_of_header(whole) - 1))
        value = data.draw(st.binary(min_size=1, max_size=8))
        changed[at : at + len(value)] = value
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(changed))))
    path = tmp_path_factory.mktemp("fuzz") / "model.gguf"
    path.write_bytes(bytes(changed[:cut]))
    try:
        found = gguf_header.read(path)
    except ValueError:
        return
    size = path.stat().st_size
    assert all(0 < t.start < t.end <= size for t in found.values())


def edit(whole: bytes, name: bytes, skip: int, value: bytes) -> bytes:
    """With other bytes at a distance after the last place of a name."""
    at = whole.rindex(name) + len(name) + skip
    return whole[:at] + value + whole[at + len(value) :]


INT = 2**62


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda b: b"", "has 0 bytes"),
        (lambda b: b"GGML" + b[4:], "begins with b'GGML'"),
        (lambda b: b[:4] + (9).to_bytes(4, "little") + b[8:], "version 9"),
        (lambda b: b[:8] + INT.to_bytes(8, "little") + b[16:], "tensors, more than its"),
        (lambda b: b[:16] + INT.to_bytes(8, "little") + b[24:], "fields, more than its"),
        (lambda b: b[: len(b) // 2], "they must be in the file"),
        (lambda b: b[:500], "is cut off"),
        (lambda b: edit(b, b"output_norm.weight", 12, b"\x63"), "output_norm.weight has type 99"),
        (lambda b: edit(b, b"output_norm.weight", 16, b"\x01"), "begin at a multiple of 32"),
        (lambda b: edit(b, b"output_norm.weight", 4, b"\xff" * 7), "must be in the file"),
        (lambda b: edit(b, b"output_norm.weight", 0, b"\x09"), "9 dimensions"),
        (lambda b: edit(b, b"token_embd.weight", 4, b"\x41"), "whole blocks of 32"),
        (lambda b: edit(b, b"llama.embedding_length", 0, b"\x63"), "unknown type 99"),
    ],
)
def test_named_errors(change: Any, says: str, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(change(whole))
    with pytest.raises(ValueError, match=says):
        cf.models.load(path)


def test_a_head_of_floats_stays_one(tmp_path: Path) -> None:
    """Types without blocks are float layers."""
    path = write(tmp_path / "model.gguf")
    header = gguf_header.read(path)
    assert header["output_norm.weight"].type == 0
    model, _ = cf.models.load(path, dtype=torch.bfloat16)
    assert model.model.norm.weight.dtype is torch.bfloat16
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
