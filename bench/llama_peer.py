"""llama.cpp as a contender, by llama-cpp-python's low-level interface, and models in its files.

The files are written from models of Transformers of the Llama family, so that everybody decodes the
same weights: F16 here, the smaller types by llama.cpp's own quantiser from the F16.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decode_peers import SAMPLING, WEIGHTS, Tick
from torch import Tensor

KINDS = {"F16": 1, "Q8_0": 7, "Q4_1": 3}  # llama.cpp's numbers of file types
INSTALLED = util.find_spec("llama_cpp") is not None
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def build() -> dict[str, str] | None:
    """What llama.cpp says of how it was built; None where it is not installed."""
    if not INSTALLED:
        return None
    import llama_cpp

    return {
        "version": llama_cpp.__version__,
        "system": llama_cpp.llama_print_system_info().decode().strip(),
    }


def write(model: Any, file: Path) -> None:
    """Write a model of the Llama family as a GGUF file of type F16, without a tokenizer."""
    from gguf import GGUFWriter

    c = model.config
    writer = GGUFWriter(file, "llama")
    writer.add_file_type(KINDS["F16"])
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("no_vocab")
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, x in model.state_dict().items():
        if name != "lm_head.weight" or not tied:
            heads = {"q": c.num_attention_heads, "k": c.num_key_value_heads}
            kind = next((k for k in heads if f"{k}_proj" in name), None)
            x = x if kind is None else _interleaved(x, heads[kind])
            numbers = x.float() if x.dim() == 1 else x.half()
            writer.add_tensor(_name(name), numbers.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(name: str) -> str:
    """The name that a GGUF file gives a weight of Transformers' Llama."""
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in whole:
        return f"{whole[stem]}.weight"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{NAMES[part]}.weight"


def _interleaved(x: Tensor, heads: int) -> Tensor:
    """Rows as llama.cpp rotates them: the numbers of a pair beside each other."""
    return x.view(heads, 2, -1, x.shape[1]).transpose(1, 2).reshape(x.shape)


def quantised(file: Path, kind: str) -> Path:
    """The file of another type beside an F16 one, by llama.cpp's own quantiser."""
    import llama_cpp

    other = file.with_name(f"{file.stem}.{kind}.gguf")
    if other.exists():
        return other
    quiet()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = KINDS[kind], torch.get_num_threads()
    params.pure = True  # Else some layers and the head get other types.
    code = llama_cpp.llama_model_quantize(
        str(file).encode(), str(other).encode(), ctypes.byref(params)
    )
    if code != 0:
        raise RuntimeError(f"llama.cpp could not quantise {file} to {kind}")
    return other


def quiet() -> None:
    """Turn off llama.cpp's messages."""
    import llama_cpp

    global _silent
    _silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))


_silent: Any = None  # llama.cpp keeps a pointer to it


class Weights:
    """A file that llama.cpp has loaded.

    Attributes:
        bytes: of its tensors, of which a step reads all.
    """

    def __init__(self, file: Path) -> None:
        import llama_cpp

        quiet()
        params = llama_cpp.llama_model_default_params()
        self.model: Any = llama_cpp.llama_model_load_from_file(str(file).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {file}")
        self.bytes = file.stat().st_size
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(vocab)


class Context:
    """Rows of tokens that a model of llama.cpp reads.

    Args:
        rows, tokens: as many as there may be, and the tokens of a row.
        threads: that compute.
    """

    def __init__(self, weights: Weights, rows: int, tokens: int, threads: int) -> None:
        import llama_cpp

        self.lib: Any = llama_cpp
        self.weights, self.rows = weights, rows
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = rows * tokens, rows
        params.n_batch = rows * tokens
        params.n_threads = params.n_threads_batch = threads
        self.context: Any = llama_cpp.llama_init_from_model(weights.model, params)
        self.batch = llama_cpp.llama_batch_init(rows * tokens, 0, 1)
        self.lengths = [0] * rows

    def close(self) -> None:
        self.lib.llama_batch_free(self.batch)
        self.lib.llama_free(self.context)

    def keep(self, length: int) -> None:
        """Forget all tokens of each row but the first ones."""
        memory = self.lib.llama_get_memory(self.context)
        for row in range(self.rows):
            self.lib.llama_memory_seq_rm(memory, row, length, -1)
            self.lengths[row] = length

    def read(self, rows: Sequence[Sequence[int]], every: bool = False) -> np.ndarray:
        """Take in tokens of each row.

        Returns:
            Logits ``[rows, V]`` after the last token of each, or with `every` ``[tokens, V]`` after
            all of them; valid until the next call.
        """
        batch, n = self.batch, 0
        for row, tokens in enumerate(rows):
            for i, token in enumerate(tokens):
                batch.token[n], batch.pos[n] = token, self.lengths[row] + i
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, row
                batch.logits[n] = every or i == len(tokens) - 1
                n += 1
            self.lengths[row] += len(tokens)
        batch.n_tokens = n
        if self.lib.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama.cpp could not decode a batch")
        found = self.lib.llama_get_logits(self.context)
        shape = n if every else len(rows), self.weights.vocabulary
        return np.ctypeslib.as_array(found, shape=shape)


class Alone:
    """One model, sampled by llama.cpp's own samplers."""

    def __init__(self, context: Context) -> None:
        import llama_cpp as lib

        self.lib: Any = lib
        self.context = context
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        for sampler in (
            lib.llama_sampler_init_top_k(SAMPLING["top_k"]),
            lib.llama_sampler_init_temp(SAMPLING["temperature"]),
            lib.llama_sampler_init_top_p(SAMPLING["top_p"], 1),
            lib.llama_sampler_init_dist(0),
        ):
            lib.llama_sampler_chain_add(chain, sampler)
        self.chain = chain

    def __call__(self, ids: Tensor, new: int, sample: bool, tick: Tick | None = None) -> Tensor:
        """New tokens ``[B, new]`` after prompts ``[B, n]``; the second call does not read them."""
        context = self.context
        begin(context, ids)
        tokens, rows = ids[:, -1:].tolist(), context.rows
        found = []
        for _ in range(new):
            context.read(tokens)
            # Logits are numbered from the last one back.
            tokens = [
                [self.lib.llama_sampler_sample(self.chain, context.context, row - rows)]
                for row in range(rows)
            ]
            found.append(tokens)
            if tick is not None:
                tick()
        return torch.tensor(found)[:, :, 0].T


class Blended:
    """Models decoded in turn and blended by NumPy: what one writes around llama.cpp."""

    def __init__(self, contexts: Sequence[Context]) -> None:
        self.contexts = contexts
        self.random = np.random.default_rng(0)

    def __call__(self, ids: Tensor, new: int, sample: bool, tick: Tick | None = None) -> Tensor:
        for context in self.contexts:
            begin(context, ids)
        tokens = ids[:, -1:].numpy()
        found = []
        for _ in range(new):
            logits = [context.read(tokens.tolist()) for context in self.contexts]
            tokens = blend(logits, self.random)[:, None]
            found.append(tokens)
            if tick is not None:
                tick()
        return torch.from_numpy(np.concatenate(found, axis=1))


def blend(logits: Sequence[np.ndarray], random: np.random.Generator) -> np.ndarray:
    """Tokens ``[B]`` drawn from the blend of logits ``[B, V]``, by temperature, top-k and top-p."""
    k, p = SAMPLING["top_k"], SAMPLING["top_p"]
    z = sum(np.float32(w) * x for w, x in zip(WEIGHTS, logits, strict=True))
    best = np.argpartition(z, -k, axis=1)[:, -k:]
    z = np.take_along_axis(z, best, axis=1)
    order = np.argsort(-z, axis=1)
    z = np.take_along_axis(z, order, axis=1) / SAMPLING["temperature"]
    q = np.exp(z - z[:, :1])
    q /= q.sum(axis=1, keepdims=True)
    q[q.cumsum(axis=1) - q >= p] = 0
    sums = q.cumsum(axis=1)
    drawn = (sums < random.random((len(q), 1)) * sums[:, -1:]).sum(axis=1, keepdims=True)
    return np.take_along_axis(np.take_along_axis(best, order, axis=1), drawn, axis=1)[:, 0]


def begin(context: Context, ids: Tensor) -> None:
    """Have all tokens of the prompts but the last in a context, which may have them from before."""
    length = ids.shape[1] - 1
    if min(context.lengths) < length:
        context.keep(0)
        context.read(ids[:, :-1].tolist())
    context.keep(length)
