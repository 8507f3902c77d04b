"""A tiny model of every causal-LM class of Transformers, with no number that changes nothing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    GenerationConfig,
    PreTrainedModel,
)

VOCAB, EOS, PAD = 83, 1, 0

# The values that fields of configs get in every family. Windows, chunks and original contexts are
# shorter than the texts, so that they matter.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "text_vocab_size"), VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("embedding_size", "embed_dim", "emb_dim", "input_embedding_size"), 32),
    "output_embedding_size": 32,
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "attn_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "swa_head_dim", "kv_channels"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("ffn_hidden_size", "n_inner", "dff", "d_ff", "dim_ff"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("shared_intermediate_size", "expert_ffn_hidden_size"), 24),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_groups"), 1),
    **dict.fromkeys(("n_positions", "n_ctx", "max_position_embeddings", "max_seq_len"), 512),
    **dict.fromkeys(("sliding_window", "attention_window", "window_size"), 4),
    "attention_chunk_size": 8,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "state_size": 8,
    **dict.fromkeys(("mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": 2,
    "tie_word_embeddings": False,
}

# Fields of single families, which go before those of SMALL; None leaves a field at its default.
INDEXER = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "bamba": {"num_hidden_layers": 3, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "rope_parameters": {
            k: {"rope_type": "default", "rope_theta": 1e4}
            for k in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v32": INDEXER,
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {"text_config": INDEXER},
    "dots3_note_text": INDEXER,
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 4,
    },
    "glm_moe_dsa": INDEXER,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2},
    "mamba2": {"head_dim": 16, "n_groups": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"n_groups": 2, "moe_shared_expert_intermediate_size": 24},
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 4,
            "indexer_compress_ratio": 1,
        }
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "feed_forward_size": 48,
        "attention_head_size": 8,
        "hash_seed": 0,
    },
    "xlstm": {"num_blocks": 2, "embedding_dim": 128, "hidden_size": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {
        "layer_types": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
        "hybrid_layer_ids": [1, 3],
        "adapter_rank": 4,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
FAMILIES["qwen4_exp_text"] = FAMILIES["qwen4_exp"]["text_config"]

# Families in another shape than that of their default config.
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0}
LONG |= {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.5, 4.0, 8.0]}
SCALES = {"short_mscale": 1.1, "long_mscale": 1.3}
SHORT = {"original_max_position_embeddings": 12}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, dynamic": ("llama", {"max_position_embeddings": 12, "rope_parameters": DYNAMIC}),
    "llama, longrope": ("llama", {"rope_parameters": {**LONG, **SHORT}}),
    "llama, yarn": ("llama", {"rope_parameters": {**YARN, **SHORT}}),
    "phi3, longrope": ("phi3", {"rope_parameters": LONG, **SHORT}),
    "phimoe, longrope": ("phimoe", {"rope_parameters": {**LONG, **SCALES}, **SHORT}),
    "minicpm3, longrope": ("minicpm3", {"rope_parameters": {**LONG, **SHORT}}),
    "falcon, dynamic": ("falcon", {"max_position_embeddings": 12, "rope_parameters": DYNAMIC}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "gemma3_text, dynamic": (
        "gemma3_text",
        {
            "max_position_embeddings": 12,
            "rope_parameters": {
                "full_attention": DYNAMIC,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}


def small_config(kind: str, overrides: dict[str, Any], cls: Any = None) -> Any:
    """A small config of a family, made by its class so that derived fields follow the others."""
    cls = cls or CONFIG_MAPPING[kind]
    default = cls()
    known = vars(default)
    fields: dict[str, Any] = {}
    for name, value in SMALL.items():
        mapped = default.attribute_map.get(name, name)
        own = known.get(name, known.get(mapped, missing))
        if own is not missing and (own is None) <= (name.endswith("token_id")):
            fields[name] = value
    if "kv_lora_rank" in fields:  # with latent attention a head's size follows from its parts
        fields.pop("head_dim", None)
        fields |= {k: 4 for k in ("num_key_value_heads",) if k in fields}
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    made = getattr(cls, cls.attribute_map.get("layer_types", "layer_types"), None)
    if len(kinds) > 1 and not isinstance(made, property):
        fields |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}  # one of each kind
    for name in getattr(default, "sub_configs", {}):
        sub = getattr(default, name, None)
        if sub is not None:
            fields[name] = small_config("", overrides.get(name, {}), type(sub)).to_dict()
    for name, value in overrides.items():
        if name in fields and value is None:
            del fields[name]
        elif name not in getattr(default, "sub_configs", {}):
            fields[name] = value
    return cls(**fields)


missing = object()


def perturb(model: PreTrainedModel, seed: int = 0) -> None:
    """Fill a model with numbers of which none leaves its input as it was."""
    generator = torch.Generator().manual_seed(seed)

    def noise(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator)

    for name, p in model.named_parameters():
        last = "embed" in name or "wte" in name or "lm_head" in name
        if p.dim() > 1:
            fan = math.prod(p.shape[1:]) if p.dim() == 2 else p.shape[-1]
            p.data = noise(p) * (0.6 if last else 1.2 / fan**0.5)
        else:
            p.data = p.data.float() + 0.3 * noise(p)
    saved = model.state_dict()
    for name, b in model.named_buffers():
        if name in saved and b.is_floating_point() and "bias" in name:
            b.add_(0.3 * noise(b))


def build(name: str) -> PreTrainedModel:
    kind, more = VARIANTS.get(name, (name, {}))
    fields = {**FAMILIES.get(kind, {}), **more}
    cls = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[kind]]
    if cls.config_class is CONFIG_MAPPING[kind]:
        config = small_config(kind, fields)
    else:  # the text part of a larger model, as AutoModelForCausalLM takes it
        config = small_config(kind, fields.get("text_config", {}), cls.config_class)
    for decoder in (config, config.get_text_config(decoder=True)):
        if hasattr(decoder, "is_decoder"):
            decoder.is_decoder = True
    config.is_encoder_decoder = False
    torch.manual_seed(0)
    model = cls(config).eval().float()
    model.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=EOS)
    perturb(model)
    return model
